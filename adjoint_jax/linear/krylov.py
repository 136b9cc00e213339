"""Linear systems solved from products with the Jacobian alone."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adjoint_jax.linear.jacobian import AbstractInverse, AbstractJacobian, ravel
from adjoint_jax.problem import Problem
from adjoint_jax.tree import Arrays, Scalar

Product = Callable[[Float[Array, " n"]], Float[Array, " n"]]


class KrylovJacobian(AbstractJacobian):
    """Systems solved by restarted GMRES, from forward derivatives of the field along vectors; no matrix is held.

    For states so large that a Jacobian does not fit, and whose stiffness GMRES without a preconditioner can bear.

    - `rtol`: the residual at which it stops, in parts of the right-hand side; by default the square root of the state's
      machine epsilon. Static.
    - `restart`: vectors between two restarts. `restarts`: how many there may be.

    A system that is not solved to ten times `rtol` gives NaN, so that an adaptive step is tried again with a shorter step.
    Y. Saad and M. H. Schultz, "GMRES", SIAM J. Sci. Stat. Comput. 7 (1986).
    """

    rtol: float | None = eqx.field(static=True, default=None)
    restart: int = eqx.field(static=True, default=20)
    restarts: int = eqx.field(static=True, default=10)

    def inverse(self, problem: Problem, t: Scalar, y: Arrays, g: Scalar) -> "Iterated":
        flat, unravel = ravel(y)
        pullback = jax.vjp(lambda flat: ravel(problem.field(t, unravel(flat)))[0], flat)[1]
        rtol = float(jnp.finfo(flat.dtype).eps ** 0.5) if self.rtol is None else self.rtol
        return Iterated(pullback, problem.mass, g.astype(flat.dtype), rtol, self.restart, self.restarts)


class Iterated(AbstractInverse):
    """The inverse of M - g J, from products with M, J and their transposes. `pullback` is the product with J^T."""

    pullback: Any
    mass: Float[Array, "n n"] | None
    g: Scalar
    rtol: float = eqx.field(static=True)
    restart: int = eqx.field(static=True)
    restarts: int = eqx.field(static=True)

    def times(self, right: Float[Array, " n"]) -> Float[Array, " n"]:
        pushforward = jax.linear_transpose(lambda vector: self.pullback(vector)[0], right)

        def product(vector: Array) -> Array:
            return (vector if self.mass is None else self.mass @ vector) - self.g * pushforward(vector)[0]

        return self._solved(product, right)

    def transposed_times(self, right: Float[Array, " n"]) -> Float[Array, " n"]:
        def product(vector: Array) -> Array:
            return (vector if self.mass is None else self.mass.T @ vector) - self.g * self.pullback(vector)[0]

        return self._solved(product, right)

    def _solved(self, product: Product, right: Float[Array, " n"]) -> Float[Array, " n"]:
        from jax.scipy.sparse.linalg import gmres  # slow to import, and rarely needed

        options = {"tol": self.rtol, "restart": min(self.restart, len(right)), "maxiter": self.restarts}
        solution, _ = gmres(product, right, **options)
        missed = jnp.linalg.norm(product(solution) - right) > 10 * self.rtol * jnp.linalg.norm(right)
        return jnp.where(missed, jnp.nan, solution)
