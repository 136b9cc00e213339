"""Linear systems with the Jacobian of the vector field, which implicit methods solve.

Every such method solves systems with one matrix a step, M - g df/dy, where M is the problem's mass matrix and g the step
size times a coefficient of the method. A Jacobian says how df/dy is computed and these systems are solved.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
from jaxtyping import Array, Float

from adjoint_jax import tree
from adjoint_jax.problem import Problem
from adjoint_jax.tree import Arrays, Scalar


class AbstractInverse(eqx.Module):
    """The inverse of M - g df/dy at one point."""

    @abc.abstractmethod
    def times(self, right: Float[Array, " n"]) -> Float[Array, " n"]:
        """The inverse times a vector."""

    @abc.abstractmethod
    def transposed_times(self, right: Float[Array, " n"]) -> Float[Array, " n"]:
        """The transposed inverse times a vector."""

    def solve(self, right: Arrays) -> Arrays:
        """The inverse times a tangent of the state."""
        flat, unravel = ravel(right)
        return unravel(self.times(flat)) if flat.size else right

    def solve_transposed(self, right: Arrays) -> Arrays:
        """The transposed inverse times a cotangent of the state. JAX pairs a complex cotangent a + i b with a tangent
        x + i y to a x - b y, so the real numbers of a cotangent are those of its conjugate."""
        flat, unravel = ravel(tree.map(jnp.conj, right))
        return tree.map(jnp.conj, unravel(self.transposed_times(flat))) if flat.size else right


class AbstractJacobian(eqx.Module):
    """How the Jacobian of the vector field is computed, and systems with it are solved."""

    @abc.abstractmethod
    def inverse(self, problem: Problem, t: Scalar, y: Arrays, g: Scalar) -> AbstractInverse:
        """The inverse of M - g df/dy at (t, y)."""


def check_jacobian(jacobian: Any, name: str) -> None:
    """Raise `TypeError` unless this is a way to compute Jacobians."""
    if not isinstance(jacobian, AbstractJacobian):
        raise TypeError(
            f"{name}(jacobian=...) must be DenseJacobian(), BandedJacobian(lower, upper) or another of its kind, got "
            f"{jacobian!r}."
        )


def ravel(y: Arrays) -> tuple[Float[Array, " n"], Callable[[Float[Array, " n"]], Arrays]]:
    """All real numbers of a state in one vector, and the way back."""
    parts = tree.map(lambda leaf: (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else leaf, y)
    flat, unravel = jax.flatten_util.ravel_pytree(parts)

    def back(flat: Float[Array, " n"]) -> Arrays:
        return jax.tree.map(
            lambda leaf, part: jax.lax.complex(*part) if isinstance(part, tuple) else part, y, unravel(flat)
        )

    return flat, back
