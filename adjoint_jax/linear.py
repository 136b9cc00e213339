"""Linear systems with the Jacobian of the vector field, which implicit methods solve.

Every such method solves systems with one matrix a step, M - g df/dy, where M is the problem's mass matrix and g the step
size times a coefficient of the method. A Jacobian says how df/dy is computed and these systems are solved.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from adjoint_jax import tree
from adjoint_jax.problem import Problem
from adjoint_jax.tree import Arrays, Scalar


class AbstractInverse(eqx.Module):
    """The inverse of M - g df/dy at one point."""

    @abc.abstractmethod
    def solve(self, right: Arrays) -> Arrays:
        """The inverse times a tangent of the state. Linear, and transposable by JAX."""

    def solve_transposed(self, right: Arrays) -> Arrays:
        """The transposed inverse times a cotangent of the state."""
        return jax.linear_transpose(self.solve, right)(right)[0]


class AbstractJacobian(eqx.Module):
    """How the Jacobian of the vector field is computed, and systems with it are solved."""

    @abc.abstractmethod
    def inverse(self, problem: Problem, t: Scalar, y: Arrays, g: Scalar) -> AbstractInverse:
        """The inverse of M - g df/dy at (t, y)."""


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
        mass = jnp.eye(flat.size, dtype=flat.dtype) if problem.mass is None else problem.mass
        matrix = mass - g.astype(flat.dtype) * jacobian
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
INVERTED = 16
"""Matrices of up to so many rows are inverted, by elimination written out or by LAPACK, because products with an inverse
fuse with what surrounds them; larger ones are factorised. Measured on CPU, alone and in 256 lanes: an inverse and six
products take 0.7 and 34 us for three rows written out, 2.8 and 270 us with LAPACK's inverse, 5.5 and 940 us with its
factors."""


class Inverted(AbstractInverse):
    """An inverse matrix."""

    matrix: Float[Array, "n n"]

    def solve(self, right: Arrays) -> Arrays:
        flat, unravel = ravel(right)
        return unravel(jnp.sum(self.matrix * flat, axis=1))


class Factorised(AbstractInverse):
    """Factors L U of a matrix with permuted rows."""

    factors: Float[Array, "n n"]
    pivots: Array

    def solve(self, right: Arrays) -> Arrays:
        flat, unravel = ravel(right)
        return unravel(jax.scipy.linalg.lu_solve((self.factors, self.pivots), flat))


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


def ravel(y: Arrays) -> tuple[Float[Array, " n"], Callable[[Float[Array, " n"]], Arrays]]:
    """All real numbers of a state in one vector, and the way back."""
    parts = tree.map(lambda leaf: (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else leaf, y)
    flat, unravel = jax.flatten_util.ravel_pytree(parts)

    def back(flat: Float[Array, " n"]) -> Arrays:
        return jax.tree.map(
            lambda leaf, part: jax.lax.complex(*part) if isinstance(part, tuple) else part, y, unravel(flat)
        )

    return flat, back


def times_mass(problem: Problem, tangent: Arrays) -> Arrays:
    """M times a tangent of the state."""
    if problem.mass is None:
        return tangent
    flat, unravel = ravel(tangent)
    return unravel(problem.mass @ flat)


def times_mass_transposed(problem: Problem, cotangent: Arrays) -> Arrays:
    """M^T times a cotangent of the state."""
    return jax.linear_transpose(lambda tangent: times_mass(problem, tangent), cotangent)(cotangent)[0]


class Residuals(NamedTuple):
    """What the algebraic equations leave at y0: w^T f(t0, y0) for an orthonormal basis of all w with w^T M = 0, and zero in
    place of the other directions; and by how much of the size of its terms each is off."""

    directions: Float[Array, "n n"]
    values: Float[Array, " n"]
    relative: Float[Array, " n"]


def algebraic_residuals(problem: Problem) -> Residuals:
    """By how much y0 misses the algebraic equations w^T f = 0. The size of their terms is that of w^T (df/dy) times y."""
    assert problem.mass is not None
    left, sizes, _ = jnp.linalg.svd(problem.mass)
    algebraic = sizes <= len(sizes) * jnp.finfo(sizes.dtype).eps * jnp.max(sizes, initial=0.0)
    directions = jnp.where(algebraic, left, 0).T
    flat, unravel = ravel(problem.y0)

    def residuals(flat: Float[Array, " n"]) -> Float[Array, " n"]:
        return directions @ ravel(problem.field(problem.t0, unravel(flat)))[0]

    values, terms = residuals(flat), jnp.abs(jax.jacfwd(residuals)(flat)) @ jnp.abs(flat)
    return Residuals(directions, values, jnp.where(values == 0, 0.0, jnp.abs(values) / terms))


def is_consistent(problem: Problem) -> Bool[Array, ""]:
    """Whether y0 satisfies the algebraic equations, to the cube root of the machine epsilon."""
    if problem.mass is None:
        return jnp.array(True)
    relative = algebraic_residuals(problem).relative
    return jnp.all(relative <= jnp.finfo(relative.dtype).eps ** (1 / 3))
