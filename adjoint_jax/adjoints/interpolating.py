"""Adjoints that solve for a(t) alone, backward, with y(t) from the interpolants of the forward steps."""

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from adjoint_jax import tree
from adjoint_jax.adjoints.adjoint import Inputs
from adjoint_jax.adjoints.continuous import AbstractContinuousAdjoint, Final, Swept, preceded_by_t0
from adjoint_jax.adjoints.keep import KeepInterpolants, Polynomial
from adjoint_jax.adjoints.memory import Memory
from adjoint_jax.adjoints.reverse_ode import (
    AbstractReverseSystem,
    Adjoint,
    Observations,
    OfAdjoint,
    Reverse,
    ReverseState,
    over_stages,
    prepared,
    reverse_integrator,
)
from adjoint_jax.adjoints.tape import check_checkpoints, tape_recorder
from adjoint_jax.adjoints.trail import Segment, Way
from adjoint_jax.controllers.controller import AbstractController
from adjoint_jax.integrate import Integrator
from adjoint_jax.interpolation import Interpolant
from adjoint_jax.lanes import any_lane
from adjoint_jax.linear.jacobian import AbstractJacobian
from adjoint_jax.problem import Problem
from adjoint_jax.recorders import AbstractRecorder
from adjoint_jax.solution import Status
from adjoint_jax.solvers.solver import AbstractSolver
from adjoint_jax.tree import Arrays, Scalar


class AbstractInterpolatingAdjoint(AbstractContinuousAdjoint):
    """Solves the reverse ODE for a(t) over one segment of the forward steps after the other, from the last to the first."""

    solver: eqx.AbstractVar[AbstractSolver | None]
    controller: eqx.AbstractVar[AbstractController | None]
    checkpoints: eqx.AbstractVar[int | None]

    def __check_init__(self) -> None:
        check_checkpoints(self.checkpoints, type(self).__name__)

    @abc.abstractmethod
    def reverse(self, integrator: Integrator, problem: Problem) -> Reverse:
        """The integration of a(t) by an integrator."""

    def prepare(self, dtype: DTypeLike) -> "AbstractInterpolatingAdjoint":
        if self.controller is None:
            return self
        controller = prepared(self.controller, type(self).__name__, dtype)
        return eqx.tree_at(lambda adjoint: adjoint.controller, self, controller, is_leaf=lambda x: x is self.controller)

    def recorders(self, integrator: Integrator, inputs: Inputs) -> list[AbstractRecorder]:
        return [tape_recorder(KeepInterpolants(), self.checkpoints, integrator, inputs, whole=0)]

    def memory(self, way: Way, records: Sequence[Any]) -> Memory:
        return records[0].memory(way)

    def sweep(self, way: Way, records: Sequence[Any], observations: Observations, final: Final) -> Swept:
        trail = records[0]
        observations = preceded_by_t0(way.problem, observations)
        reverse = self.reverse(reverse_integrator(way, self.solver, self.controller), way.problem)
        sweep = _SegmentSweep(way, reverse, observations, final.cost)
        h = jnp.abs(way.report.reached - way.problem.t0) / jnp.maximum(way.report.stats.accepted, 1)
        start = ReverseState.beginning(final.t, final.a, final.parameters, h)
        stand = _Stand(start, jnp.full((), len(observations.times), jnp.int32))
        end, left = trail.walk_back(way, sweep.over_segment, stand).carry
        at_t0 = tree.keep_rows(jnp.arange(len(observations.times)) < left, observations.cotangents)
        a = tree.add(end.state, tree.map(lambda leaf: jnp.sum(leaf, axis=0), at_t0))
        a, parameters = tree.unknown_if(end.status != Status.SUCCESS, (a, end.parameters))
        return Swept(a, parameters, end.status, end.failure)


class InterpolatingAdjoint(AbstractInterpolatingAdjoint):
    """The continuous adjoint with the state from the forward solution's dense output.

    a(t) is integrated backward, each step controlled by its error estimate, and parameters are summed up over the stages of
    the reverse method. States are kept at checkpoints, the starts of some segments of forward steps, and the interpolants
    of the last segment's steps; those of an earlier one are computed again when its turn comes. The reverse integration
    stops at observations and at the ends of segments.

    - `solver`, `controller`: the method and controller of the reverse integration, by default the forward ones; where the
      forward grid is given, steps of its mean size. Tolerances given as pytrees are like y.
    - `checkpoints`: how many states to keep besides those of one segment, as in `DiscreteAdjoint`; by default those at the
      starts of all segments, about the square root of the largest number of steps.

    Memory: O(checkpoints + sqrt(steps)) states. The gradient differs from the exact derivative of the computed solution by
    O(tolerance), and of the order of the dense output on given grids; stable on dissipative problems. If the reverse
    integration fails, the gradient is NaN, and with `throw=True` an error is raised.
    """

    solver: AbstractSolver | None = None
    controller: AbstractController | None = None
    checkpoints: int | None = eqx.field(static=True, default=None)

    def reverse(self, integrator: Integrator, problem: Problem) -> Reverse:
        return Reverse(integrator, over_stages(integrator, problem))


class _Stand(NamedTuple):
    """Where the sweep stands, and how many observations are left."""

    state: ReverseState
    left: Int[Array, ""]


class _SegmentSweep(NamedTuple):
    """The reverse integration of a(t), to be carried over one segment of the forward steps after the other."""

    way: Way
    reverse: Reverse
    observations: Observations
    cost: Arrays

    def over_segment(self, segment: Segment, stand: _Stand) -> _Stand:
        """From the segment's end to its start, with the observations in between."""
        begin, direction = segment.times[0], self.way.problem.direction
        system = _Along(self.way.problem, self.cost, segment.times, segment.kept, segment.steps, direction)

        def observed(stand: _Stand) -> Bool[Array, ""]:
            return tree.take(self.observations.times, stand.left - 1) * direction > begin * direction

        def unfinished(stand: _Stand) -> Bool[Array, ""]:
            return any_lane(observed(stand) | (stand.state.t * direction > begin * direction))

        def to_next(stand: _Stand) -> _Stand:
            is_observed = observed(stand)
            observation = tree.take(self.observations, stand.left - 1)
            here = jnp.minimum(begin * direction, stand.state.t * direction) * direction
            stop = jnp.where(is_observed, observation.times, here)
            state = self.reverse.to(system, stand.state, stop)
            jump = tree.where(is_observed, observation.cotangents, tree.zeros_like(observation.cotangents))
            return _Stand(state._replace(state=tree.add(state.state, jump)), stand.left - is_observed)

        return jax.lax.while_loop(unfinished, to_next, stand)


class _Along(AbstractReverseSystem):
    """The reverse ODE for a(t) along the interpolants of some forward steps."""

    problem: Problem
    cost: Arrays
    times: Float[Array, " times"]
    polynomials: Polynomial
    steps: Int[Array, ""]
    direction: Scalar

    def adjoint(self, t: Scalar, state: Arrays) -> Adjoint:
        ends = self.times[1:]
        passed = (ends * self.direction < t * self.direction) & (jnp.arange(len(ends)) < self.steps - 1)
        at = jnp.sum(passed, dtype=jnp.int32)
        start, end = tree.take(self.times, at), tree.take(self.times, at + 1)
        interpolant = Interpolant(start, end, *tree.take(self.polynomials, at))
        return Adjoint(interpolant.finite.evaluate(t), state)

    def velocity(self, rates: Adjoint) -> Arrays:
        return rates.a

    def jacobian(self, forward: AbstractJacobian) -> AbstractJacobian:
        return OfAdjoint(forward, self)
