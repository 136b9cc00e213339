"""Mass matrices, and the algebraic equations of a singular one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from adjoint_jax.linear.jacobian import ravel
from adjoint_jax.problem import Problem
from adjoint_jax.tree import Arrays


def mass_of(problem: Problem, like: Float[Array, " n"]) -> Float[Array, "n n"]:
    """M, for a state of these real numbers."""
    return jnp.eye(like.size, dtype=like.dtype) if problem.mass is None else problem.mass


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
