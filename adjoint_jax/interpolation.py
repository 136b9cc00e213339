"""Dense output: a step's interpolant, and the interpolant of a whole trajectory."""

import itertools
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adjoint_jax import tree
from adjoint_jax.tree import Arrays, Scalar


class Interpolant(NamedTuple):
    """A polynomial on a step: y(start + s (end - start)) = y0 + sum over p >= 1 of s^p coefficients[p - 1].

    Of one step, or of many with a leading axis on every array.
    """

    start: Scalar | Float[Array, " steps"]
    end: Scalar | Float[Array, " steps"]
    y0: Arrays
    coefficients: Arrays

    def evaluate(self, t: Scalar) -> Arrays:
        """The state at t, in the dtype of y0. A step of no length gives y0, if its coefficients are finite."""
        return tree.map(lambda y, q: y + _horner(self.fraction(t), q), self.y0, self.coefficients)

    @property
    def finite(self) -> "Interpolant":
        """The same, but of no length without coefficients: it may stand for a step that was rejected, in this lane, since
        it was not finite."""
        is_step = self.start != self.end
        return self._replace(coefficients=tree.map(lambda q: jnp.where(is_step, q, 0), self.coefficients))

    def fraction(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
        """The place of a time, or of many, in the step: 0 at its start, 1 at its end."""
        length = self.end - self.start
        return jnp.where(length == 0, 0.0, (t - self.start) / jnp.where(length == 0, 1.0, length))


def powers(fraction: Float[Array, "..."], degree: int) -> list[Float[Array, "..."]]:
    """s, s^2, ..., s^degree: the weights of an interpolant's coefficients."""
    return list(itertools.accumulate([fraction] * degree, operator.mul))


def _horner(fraction: Scalar, coefficients: Array) -> Array:
    s = fraction.astype(tree.real_dtype(coefficients.dtype))
    value = coefficients[-1]
    for row in coefficients[-2::-1]:
        value = row + s * value
    return s * value


class Trajectory(NamedTuple):
    """The interpolants of all steps, `taken` of them valid, from t0 to the time reached."""

    steps: Interpolant
    taken: Int[Array, ""]
    t0: Scalar
    reached: Scalar

    def evaluate(self, t: Scalar) -> Arrays:
        """The state at t; NaN outside of [t0, reached]."""
        direction = jnp.where(self.reached < self.t0, -1, 1).astype(self.t0.dtype)
        index = jnp.clip(self._search(t, direction), 0, jnp.maximum(self.taken - 1, 0))
        value = tree.take(self.steps, index).finite.evaluate(t)
        inside = (t * direction >= self.t0 * direction) & (t * direction <= self.reached * direction)
        return tree.map(lambda leaf: jnp.where(inside, leaf, jnp.nan), value)

    def _search(self, t: Scalar, direction: Scalar) -> Int[Array, ""]:
        padded = jnp.where(jnp.arange(self.steps.end.shape[0]) < self.taken, self.steps.end * direction, jnp.inf)
        return jnp.searchsorted(padded, t * direction, side="left").astype(jnp.int32)
