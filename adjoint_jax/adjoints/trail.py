"""The forward integration as it can be walked back: from the last step to the first, some steps at a time."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adjoint_jax.adjoints.keep import AbstractMemo
from adjoint_jax.adjoints.memory import Memory
from adjoint_jax.ends import AbstractEnds, EndsReached
from adjoint_jax.integrate import Integrator, Report
from adjoint_jax.problem import Interval, Problem
from adjoint_jax.tree import Arrays, Scalar

Carry = TypeVar("Carry")


class Segment(NamedTuple):
    """Some consecutive steps: the slot of the first, how many there are; the times of their ends, from the start of the
    first on; and what is kept of each of them, in buffers that are longer than that by up to a chunk."""

    begin: Int[Array, ""]
    steps: Int[Array, ""]
    ends: AbstractEnds
    kept: Any

    @property
    def times(self) -> Float[Array, " times"]:
        """The ends of as many steps as the buffers hold."""
        return self.ends.block(jnp.zeros((), jnp.int32), len(jax.tree.leaves(self.kept)[0]) + 1)


class Way(NamedTuple):
    """A problem, what integrated it, how far, and the method's state there."""

    problem: Problem
    integrator: Integrator
    report: Report
    last: Arrays

    def interval(self, start: Scalar, end: Scalar) -> Interval:
        """The step from start to end."""
        return self.integrator.controller.interval(start, end)

    def to_the_end_or_none(self) -> "Way":
        """The same of a given grid, but as if none of its steps had been taken where t1 was not reached: for a loss that
        asks of nothing before t1. How far it was reached then need not be computed."""
        steps = self.integrator.grid_steps
        if steps is None:
            return self
        report, problem = self.report, self.problem
        reached = jnp.where(report.failed, problem.t0, problem.t1)
        stats = dataclasses.replace(report.stats, accepted=jnp.where(report.failed, 0, steps))
        return self._replace(report=report._replace(reached=reached, stats=stats))


class Walked(NamedTuple):
    """What was carried back to t0; and how far the state recovered there is from y0, in parts of its size, or None where
    states are recorded rather than recovered."""

    carry: Any
    drift: Scalar | None


class AbstractTrail(eqx.Module):
    """A record of the forward integration. A step of no length stands for none."""

    keep: eqx.AbstractVar[AbstractMemo]
    """What is kept of every step."""

    @property
    @abc.abstractmethod
    def chunk(self) -> int:
        """The number of steps that may be looked at at a time, wherever they begin."""

    @property
    @abc.abstractmethod
    def slots(self) -> int:
        """The largest number of steps, and at least a chunk more."""

    @abc.abstractmethod
    def memory(self, way: Way) -> Memory:
        """What is kept, from its shapes."""

    @abc.abstractmethod
    def walk_back(self, way: Way, visit: Callable[[Segment, Carry], Carry], carry: Carry) -> Walked:
        """Visit all steps in segments, from the last segment to the first."""


def standing_still(way: Way, ends: AbstractEnds) -> AbstractEnds:
    """The ends of all steps. Where a given grid goes on behind a failure, steps have no length there."""
    if way.integrator.grid_steps is None:
        return ends
    return EndsReached(ends, way.report.stats.accepted, way.report.reached)
