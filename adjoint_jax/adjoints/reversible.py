"""The discrete adjoint of a reversible method: the states on the way back are computed by undoing the steps."""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adjoint_jax import tree
from adjoint_jax.adjoints.adjoint import Inputs
from adjoint_jax.adjoints.exact import AbstractExactAdjoint
from adjoint_jax.adjoints.keep import AbstractKeep, KeepStates
from adjoint_jax.adjoints.trail import AbstractTrail, Carry, Segment, Way
from adjoint_jax.integrate import Integrator, chunk_length
from adjoint_jax.lanes import max_lane
from adjoint_jax.problem import Problem
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

    Memory: O(1) states; the times of the steps are recorded. Raises `TypeError` for a solver that has no inverse.
    """

    def recorder(self, integrator: Integrator, inputs: Inputs) -> "TimesRecorder":
        del inputs
        if not isinstance(integrator.solver, AbstractReversibleSolver):
            name = type(integrator.solver).__name__
            raise TypeError(f"ReversibleAdjoint needs a reversible solver, such as Reversible({name}()), got {name}().")
        return TimesRecorder()


class Times(AbstractTrail):
    """The ends of all steps."""

    times: Float[Array, " times"]
    keep: AbstractKeep
    length: int = eqx.field(static=True)

    @property
    def chunk(self) -> int:
        return self.length

    def walk_back(self, way: Way, visit: Callable[[Segment, Carry], Carry], carry: Carry) -> Carry:
        count, chunk = max_lane(way.report.slots), self.length
        chunks = (count + chunk - 1) // chunk
        empty = tree.buffer(chunk, way.last)

        def undo_chunk(reversed_index: Array, going: tuple[Arrays, Carry]) -> tuple[Arrays, Carry]:
            state, carry = going
            begin = (chunks - 1 - reversed_index) * chunk
            steps = jnp.minimum(chunk, count - begin)

            def undo(i: Array, undone: tuple[Arrays, Arrays]) -> tuple[Arrays, Arrays]:
                state, states = undone
                place = steps - 1 - i
                state = self._before(way, begin + place, state)
                return state, tree.put(states, place, state)

            state, states = jax.lax.fori_loop(0, steps, undo, (state, empty))
            return state, visit(Segment(begin, steps, states), carry)

        return jax.lax.fori_loop(0, chunks, undo_chunk, (way.last, carry))[1]

    def _before(self, way: Way, slot: Int[Array, ""], state: Arrays) -> Arrays:
        solver = way.integrator.solver
        assert isinstance(solver, AbstractReversibleSolver)
        interval = self.interval(way, slot)
        return tree.where(interval.start != interval.end, solver.inverse(way.problem.field, interval, state), state)


class TimesRecorder(AbstractRecorder):
    """Records `Times`."""

    def start(self, problem: Problem, layout: Layout) -> Times:
        chunk = chunk_length(problem.y0)
        return Times(jnp.full(layout.slots + chunk + 1, problem.t0), KeepStates(), chunk)

    def note(self, step: Step, accepted: Bool[Array, ""]) -> Scalar:
        del accepted
        return step.interval.end

    def write(self, record: Times, place: Place, notes: Scalar) -> Times:
        return dataclasses.replace(record, times=tree.put_block(record.times, place.slot + 1, notes))
