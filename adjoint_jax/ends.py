"""The times at which consecutive steps end, from the start of the first on: in memory, or as a formula.

A formula is evaluated where a loop over steps needs it, so that no operation is as long as there are steps. XLA:CPU hands a
program with 1,000 operations, once for each that is written in a loop, to another thread, which takes as long as hundreds
of steps of a small system.
"""

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adjoint_jax import tree
from adjoint_jax.lanes import in_lanes, put_block
from adjoint_jax.tree import Scalar


class Stride(NamedTuple):
    """Where a step starts and ends; or many, along a leading axis."""

    start: Scalar | Float[Array, " steps"]
    end: Scalar | Float[Array, " steps"]


class AbstractEnds(eqx.Module):
    """The ends of consecutive steps, by their number: the start of the first step is number 0."""

    @abc.abstractmethod
    def at(self, index: Int[Array, ""]) -> Scalar:
        """One of them; the last one, if there are not so many."""

    def block(self, index: Int[Array, ""], length: int) -> Float[Array, " length"]:
        """So many of them, from that index on."""
        return jax.vmap(self.at)(index + jnp.arange(length, dtype=jnp.int32))

    def stride(self, index: Int[Array, ""]) -> Stride:
        """The step of that number."""
        return Stride(self.at(index), self.at(index + 1))

    def strides(self, index: Int[Array, ""], length: int) -> Stride:
        """So many steps, from that index on."""
        return Stride(self.block(index, length), self.block(index + 1, length))

    def has_length(self, stride: Stride) -> Bool[Array, ""]:
        """Whether one of these steps is a step: one of no length stands for none."""
        return stride.start != stride.end

    def recorded(self, index: Int[Array, ""], times: Float[Array, " length"]) -> "AbstractEnds":
        """The same with those to which a loop over steps has come, from that index on, if they were not known."""
        del index, times
        return self


class GivenEnds(AbstractEnds):
    """The ends of the steps of a given grid."""

    times: Float[Array, " times"]

    def at(self, index: Int[Array, ""]) -> Scalar:
        return tree.take(self.times, index)


class RecordedEnds(AbstractEnds):
    """Ends that are known when steps have been taken."""

    times: Float[Array, " times"]

    def at(self, index: Int[Array, ""]) -> Scalar:
        return tree.take(self.times, index)

    def block(self, index: Int[Array, ""], length: int) -> Float[Array, " length"]:
        """So many of them, from that index on, or the last ones."""
        return tree.take_block(self.times, index, length)

    def has_length(self, stride: Stride) -> Bool[Array, ""]:
        """Always, as they are those of accepted steps; but where others are accepted, lanes record steps of no length."""
        return jnp.asarray(in_lanes(jnp.ones_like, lambda moves: moves)(stride.start != stride.end))

    def recorded(self, index: Int[Array, ""], times: Float[Array, " length"]) -> "RecordedEnds":
        return RecordedEnds(put_block(self.times, index, times))


class EvenEnds(AbstractEnds):
    """The ends of `steps` steps of equal size."""

    start: Scalar
    end: Scalar
    steps: int = eqx.field(static=True)

    def at(self, index: Int[Array, ""]) -> Scalar:
        size = (self.end - self.start) / self.steps
        return jnp.where(index < self.steps, self.start + index.astype(size.dtype) * size, self.end)


class EndsReached(AbstractEnds):
    """Ends as far as they were reached: those behind the first `count` steps are that time."""

    ends: AbstractEnds
    count: Int[Array, ""]
    reached: Scalar

    def at(self, index: Int[Array, ""]) -> Scalar:
        return jnp.where(index <= self.count, self.ends.at(index), self.reached)


class EndsFrom(AbstractEnds):
    """Ends from some step on."""

    ends: AbstractEnds
    begin: Int[Array, ""]

    def at(self, index: Int[Array, ""]) -> Scalar:
        return self.ends.at(self.begin + index)

    def block(self, index: Int[Array, ""], length: int) -> Float[Array, " length"]:
        return self.ends.block(self.begin + index, length)

    def has_length(self, stride: Stride) -> Bool[Array, ""]:
        return self.ends.has_length(stride)
