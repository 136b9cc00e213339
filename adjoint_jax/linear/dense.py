"""The whole Jacobian, and direct solves."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adjoint_jax.linear.jacobian import AbstractInverse, AbstractJacobian, ravel
from adjoint_jax.linear.mass import mass_of
from adjoint_jax.problem import Problem
from adjoint_jax.tree import Arrays, Scalar


class DenseJacobian(AbstractJacobian):
    """The whole Jacobian, n forward derivatives at once for a state of n real numbers, and direct solves.

    - `jac(t, y, args)`: the Jacobian, if it is known: a real array of shape (n, n) for the n entries of y (of all leaves in
      the order of `jax.flatten_util.ravel_pytree`, real and then imaginary parts of complex ones).
    """

    jac: Callable[[Scalar, Any, Any], Any] | None = eqx.field(static=True, default=None)

    def inverse(self, problem: Problem, t: Scalar, y: Arrays, g: Scalar) -> AbstractInverse:
        flat, unravel = ravel(y)
        if self.jac is None:
            jacobian = jax.jacfwd(lambda flat: ravel(problem.field(t, unravel(flat)))[0])(flat)
        else:
            jacobian = self._given(self.jac(t, y, problem.args), flat)
        matrix = mass_of(problem, flat) - g.astype(flat.dtype) * jacobian
        if flat.size <= WRITTEN_OUT:
            return Inverted(_inverted(matrix))
        return (
            Inverted(jnp.linalg.inv(matrix)) if flat.size <= INVERTED else Factorised(*jax.scipy.linalg.lu_factor(matrix))
        )

    def _given(self, jacobian: Any, flat: Float[Array, " n"]) -> Float[Array, "n n"]:
        jacobian = jnp.asarray(jacobian, flat.dtype)
        if jacobian.shape != (flat.size, flat.size):
            raise ValueError(
                f"DenseJacobian(jac): jac(t, y, args) must return an array of shape {(flat.size, flat.size)} for a state "
                f"of {flat.size} real numbers, got {jacobian.shape}."
            )
        return jacobian


WRITTEN_OUT = 4
INVERTED = 24
"""Matrices of up to so many rows are inverted, by elimination written out or by LAPACK, because products with an inverse
fuse with what surrounds them; larger ones are factorised. Measured on CPU, alone and in 256 lanes: an inverse and six
products take 0.7 and 34 us for three rows written out, 2.8 and 270 us with LAPACK's inverse, 5.5 and 940 us with its
factors. Alone, an inverse and eight products take 14 us for 24 rows and 55 us for 32, factors 19 us and 25 us."""


class Inverted(AbstractInverse):
    """An inverse matrix."""

    matrix: Float[Array, "n n"]

    def times(self, right: Float[Array, " n"]) -> Float[Array, " n"]:
        return jnp.sum(self.matrix * right, axis=1)

    def transposed_times(self, right: Float[Array, " n"]) -> Float[Array, " n"]:
        return jnp.sum(self.matrix * right[:, None], axis=0)


class Factorised(AbstractInverse):
    """Factors L U of a matrix with permuted rows."""

    factors: Float[Array, "n n"]
    pivots: Array

    def times(self, right: Float[Array, " n"]) -> Float[Array, " n"]:
        return jax.scipy.linalg.lu_solve((self.factors, self.pivots), right)

    def transposed_times(self, right: Float[Array, " n"]) -> Float[Array, " n"]:
        return jax.scipy.linalg.lu_solve((self.factors, self.pivots), right, trans=1)


def _inverted(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The inverse of a small matrix, by Gauss-Jordan elimination with partial pivoting, written out."""
    n = matrix.shape[0]
    rows, both = jnp.arange(n), jnp.concatenate([matrix, jnp.eye(n, dtype=matrix.dtype)], axis=1)
    for k in range(n):
        pivot_row = jnp.argmax(jnp.where(rows >= k, jnp.abs(both[:, k]), -1.0))
        is_pivot = (rows == pivot_row)[:, None]
        pivot = jnp.sum(jnp.where(is_pivot, both, 0), axis=0)
        both = jnp.where(is_pivot, both[k], both)
        pivot = pivot / pivot[k]
        both = (both - both[:, k : k + 1] * pivot).at[k].set(pivot)
    return both[:, n:]
