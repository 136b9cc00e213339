"""The discrete adjoint of a reversible method: the states on the way back are computed by undoing the steps."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float

from adjoint_jax import tree
from adjoint_jax.adjoints.adjoint import Inputs, relative_distance
from adjoint_jax.adjoints.exact import AbstractExactAdjoint
from adjoint_jax.adjoints.keep import AbstractMemo, KeepStates
from adjoint_jax.adjoints.memory import Kept, Memory
from adjoint_jax.adjoints.trail import AbstractTrail, Carry, Segment, Walked, Way, standing_still
from adjoint_jax.controllers.controller import positive
from adjoint_jax.ends import AbstractEnds, EndsFrom, RecordedEnds
from adjoint_jax.integrate import Integrator, chunk_length
from adjoint_jax.lanes import max_lane, put
from adjoint_jax.problem import Interval, Problem, state_precision
from adjoint_jax.recorders import AbstractRecorder, Layout, Place
from adjoint_jax.solvers.reversible import AbstractReversibleSolver
from adjoint_jax.solvers.solver import Step
from adjoint_jax.tree import Arrays, Scalar


class ReversibleAdjoint(AbstractExactAdjoint):
    """The exact derivative of the computed solution in constant memory: the steps of a reversible method are undone one
    after the other, and transposed.

    Needs a reversible solver: `Reversible(Tsit5())` or of any other explicit method, `ReversibleHeun()` or
    `AsynchronousLeapfrog()`, with fixed or adaptive steps. The gradient is that of `DiscreteAdjoint` with the same solver,
    up to rounding, which the inverse may enlarge: the stability of each method is told by its own documentation.

    - `max_drift`: the guard against an inverse that has lost its digits. If the state that the inverse arrives at differs
      from y0 in any leaf by more than this (root mean square over the entries) times the larger size of this leaf at t0 and
      at the end, the gradient is NaN and, with `throw=True`, an error is raised. By default the cube root of the state's
      machine epsilon: 6e-6 in float64, 5e-3 in float32. `jnp.inf` turns the guard off.

    Memory: O(1) states; the times of adaptive steps are recorded. Raises `TypeError` for a solver that has no inverse.
    """

    max_drift: Any = None

    def prepare(self, dtype: DTypeLike) -> "ReversibleAdjoint":
        if self.max_drift is None:
            return self
        return ReversibleAdjoint(positive("ReversibleAdjoint(max_drift)", self.max_drift, dtype))

    def drift_limit(self, problem: Problem) -> Scalar:
        if self.max_drift is None:
            return jnp.asarray(jnp.finfo(state_precision(problem.y0)).eps ** (1 / 3), problem.t0.dtype)
        return self.max_drift

    def recorders(self, integrator: Integrator, inputs: Inputs) -> list[AbstractRecorder]:
        problem = inputs.problem
        if not isinstance(integrator.solver, AbstractReversibleSolver):
            name = type(integrator.solver).__name__
            raise TypeError(f"ReversibleAdjoint needs a reversible solver, such as Reversible({name}()), got {name}().")
        return [EndsRecorder(integrator.controller.grid(problem.t0, problem.t1))]


class Ends(AbstractTrail):
    """The ends of all steps."""

    ends: AbstractEnds
    keep: AbstractMemo
    most: int = eqx.field(static=True)
    length: int = eqx.field(static=True)

    @property
    def chunk(self) -> int:
        return self.length

    @property
    def slots(self) -> int:
        return self.most

    def memory(self, way: Way) -> Memory:
        states = Kept.rows("states of steps undone", tree.buffer(self.length, way.last))
        return Memory.of(states, *Kept.times(self.ends))

    def walk_back(self, way: Way, visit: Callable[[Segment, Carry], Carry], carry: Carry) -> Walked:
        count, chunk, ends = max_lane(way.report.slots), self.length, standing_still(way, self.ends)
        chunks = tree.blocks(count, chunk)
        empty = tree.buffer(chunk, way.last)

        def undo_chunk(reversed_index: Array, going: tuple[Arrays, Carry]) -> tuple[Arrays, Carry]:
            state, carry = going
            begin = (chunks - 1 - reversed_index) * chunk
            steps = jnp.minimum(chunk, count - begin)

            def undo(i: Array, undone: tuple[Arrays, Arrays]) -> tuple[Arrays, Arrays]:
                state, states = undone
                place = steps - 1 - i
                interval = way.interval(ends.at(begin + place), ends.at(begin + place + 1))
                state = self._before(way, interval, state)
                return state, put(states, place, state)

            state, states = jax.lax.fori_loop(0, steps, undo, (state, empty))
            return state, visit(Segment(begin, steps, EndsFrom(ends, begin), states), carry)

        first, carry = jax.lax.fori_loop(0, chunks, undo_chunk, (way.last, carry))
        output, y0 = way.integrator.solver.output, way.problem.y0
        largest = tree.map(jnp.maximum, tree.root_mean_squares(y0), tree.root_mean_squares(output(way.last)))
        return Walked(carry, relative_distance(output(first), y0, largest))

    def _before(self, way: Way, interval: Interval, state: Arrays) -> Arrays:
        solver = way.integrator.solver
        assert isinstance(solver, AbstractReversibleSolver)
        return tree.where(interval.start != interval.end, solver.inverse(way.problem, interval, state), state)


class EndsRecorder(AbstractRecorder):
    """Records `Ends`, but for those of a given grid."""

    grid: AbstractEnds | None

    def start(self, problem: Problem, layout: Layout, mark: Any) -> Ends:
        del mark
        chunk = chunk_length(problem.y0)
        slots = layout.slots + chunk + 1
        ends = RecordedEnds(jnp.full(slots, problem.t0)) if self.grid is None else self.grid
        return Ends(ends=ends, keep=KeepStates(), most=slots, length=chunk)

    def note(self, step: Step, accepted: Bool[Array, ""]) -> Scalar:
        return step.reached(accepted)

    def write(self, record: Ends, place: Place, notes: Float[Array, " steps"]) -> Ends:
        return dataclasses.replace(record, ends=record.ends.recorded(place.slot + 1, notes))
