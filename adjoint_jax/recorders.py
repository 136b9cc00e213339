"""What the forward loops write down. The loops know recorders by this protocol alone.

Every step has a *slot*. The loops first hold what recorders note of each step in small arrays, and hand over a *chunk* of
notes at a time (`write`); they announce the end of every *segment* of chunks (`flush`). Slots are the same for all lanes of
a `vmap`: a lane that had nothing to record in a slot has a step of no length there, so that all writes are slice updates.

Chunks exist for small states: XLA:CPU runs the operations of a loop body one after the other, at some 40 ns each, if no
array in it exceeds 512 bytes, and else hands them to a scheduler that costs several times as much.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from adjoint_jax import tree
from adjoint_jax.interpolation import Interpolant
from adjoint_jax.kernels import stored_in_lanes
from adjoint_jax.lanes import max_lane, min_lane, on_one_cpu, put, put_block
from adjoint_jax.problem import Problem
from adjoint_jax.quadrature import Nodes
from adjoint_jax.saveat import Rows
from adjoint_jax.solvers.solver import AbstractSolver, Step
from adjoint_jax.tree import Arrays, Scalar


class Layout(NamedTuple):
    """Static sizes: slots in all, slots of a segment, slots of a chunk. Each is a multiple of the next, but for a single
    segment."""

    slots: int
    segment: int
    chunk: int


class Place(NamedTuple):
    """Where a loop stands: the first slot of this segment, and the number of slots behind it; and where the segment began:
    its first time, and the loop's own state there, from which it can go on again."""

    first: Int[Array, ""]
    position: Int[Array, ""]
    segment_start: Scalar
    mark: Any

    @property
    def slot(self) -> Int[Array, ""]:
        """The slot over all segments."""
        return self.first + self.position


class AbstractRecorder(eqx.Module):
    """Writes down something of every step."""

    adds_up: ClassVar[bool] = False
    """Whether it adds up what is written. If not, what is written into a slot replaces what was written there before."""

    @property
    def interpolates(self) -> bool:
        """Whether it needs the stages of the dense output."""
        return False

    @property
    def segment_limit(self) -> int | None:
        """How many steps it can hold before `flush` must be called; None for any number."""
        return None

    @property
    def longest_chunk(self) -> int | None:
        """How many notes it takes at a time, at most; None for any number."""
        return None

    def method(self, solver: AbstractSolver) -> AbstractSolver:
        """The method to take steps with: the same, or one that hands on from step to step what is noted of them."""
        return solver

    @abc.abstractmethod
    def start(self, problem: Problem, layout: Layout, mark: Any) -> Any:
        """The empty record. `mark` is the loop's state at t0, as in `Place`."""

    @abc.abstractmethod
    def note(self, step: Step, accepted: Bool[Array, ""]) -> Any:
        """What to keep of a step. If it was not accepted, in this lane, this stands for a step of no length."""

    def blank_note(self, step: Step) -> Any:
        """What stands for a step of no length, given one."""
        return self.note(step, jnp.array(False))

    @abc.abstractmethod
    def write(self, record: Any, place: Place, notes: Any) -> Any:
        """Write the notes of some steps, along a leading axis, into the slots from `place` on. Behind the last step of an
        integration, and in a slot that will be written again, there may be notes of steps of no length."""

    def flush(self, record: Any, place: Place, now: Scalar) -> Any:
        """Called when a segment is full (`place.position` slots of it) or the integration has ended, at time `now`."""
        del place, now
        return record

    def wants_dense(self, start: Scalar, end: Scalar) -> Bool[Array, ""]:
        """Whether the step from start to end will be interpolated. Asked only of recorders that interpolate."""
        del start, end
        return jnp.array(True)


class InterpolantNote(NamedTuple):
    """An interpolant with the coefficients of each power apart, so that arrays of many of them are small; or many, along a
    leading axis."""

    start: Scalar | Float[Array, " steps"]
    end: Scalar | Float[Array, " steps"]
    y0: Arrays
    coefficients: list[Arrays]

    @staticmethod
    def of(interpolant: Interpolant, degree: int) -> "InterpolantNote":
        start, end, y0, coefficients = interpolant
        return InterpolantNote(start, end, y0, tree.unstack(coefficients, degree))

    def interpolant(self) -> Interpolant:
        """The one, not many."""
        return Interpolant(self.start, self.end, self.y0, tree.stack(self.coefficients))


class Window(NamedTuple):
    """A row recorder's interpolants of this segment's steps, and all rows."""

    recent: InterpolantNote
    rows: Arrays
    saved: Int[Array, ""]
    """The number of rows that are known."""


class RowRecorder(AbstractRecorder):
    """Saves `rows.fn(t, y(t), args)` at given times: holds the interpolants of a segment, then evaluates all times that
    the segment covers, in blocks (a small problem on a CPU one by one). So a step costs one write, hundreds of times inside
    it cost one pass, and lanes that have come to different times share all indices."""

    longest_segment: ClassVar[int] = 32
    segment_bytes: ClassVar[int] = 64 * 1024

    rows: Rows
    problem: Problem
    solver: AbstractSolver

    @property
    def interpolates(self) -> bool:
        return True

    @property
    def segment_limit(self) -> int:
        interpolant_bytes = tree.size_in_bytes(self.problem.y0) * (1 + self.solver.dense_degree)
        return max(1, min(self.longest_segment, self.segment_bytes // max(1, interpolant_bytes)))

    def start(self, problem: Problem, layout: Layout, mark: Any) -> Window:
        del mark
        empty = _empty_interpolants(problem, self.solver, layout.segment)
        recent = jax.vmap(lambda one: InterpolantNote.of(one, self.solver.dense_degree))(empty)
        return Window(recent, *self._rows_at_t0())

    def _rows_at_t0(self) -> tuple[Arrays, Int[Array, ""]]:
        """All rows, of which those at t0 are known, and how many these are."""
        problem, ts = self.problem, self.rows.ts
        at_t0 = self.rows.apply(problem.t0, problem.y0, problem.args)
        count = self.rows.until(problem.t0, problem.direction)

        def unknown(value: Array) -> Array:
            blank = jnp.nan if jnp.issubdtype(value.dtype, jnp.inexact) else 0
            return jnp.full((len(ts), *value.shape), blank, value.dtype)

        def save(index: Array, rows: Arrays) -> Arrays:
            is_known = (index < count) & (tree.take(ts, index) == problem.t0)
            return put(rows, index, tree.where(is_known, at_t0, tree.take(rows, index)))

        return jax.lax.fori_loop(0, max_lane(count), save, tree.map(unknown, at_t0)), count

    def note(self, step: Step, accepted: Bool[Array, ""]) -> InterpolantNote:
        return _noted(self.solver, step, accepted)

    def blank_note(self, step: Step) -> InterpolantNote:
        return _blank_note(self.solver, step)

    def write(self, record: Window, place: Place, notes: InterpolantNote) -> Window:
        is_all = len(notes.start) == len(record.recent.start)
        return record._replace(recent=notes if is_all else put_block(record.recent, place.position, notes))

    def wants_dense(self, start: Scalar, end: Scalar) -> Bool[Array, ""]:
        return jnp.any((self.rows.ts - start) * (self.rows.ts - end) <= 0)

    def flush(self, record: Window, place: Place, now: Scalar) -> Window:
        saved = self.rows.until(now, self.problem.direction)
        one_by_one = on_one_cpu() and self.problem.is_small and not self.problem.is_in_lanes
        save = self._save_one_by_one if one_by_one else self._save_blocks
        return Window(record.recent, save(record, place.position, saved), saved)

    def _save_one_by_one(self, record: Window, steps: Int[Array, ""], saved: Int[Array, ""]) -> Arrays:
        """For programs that are one kernel: those of which XLA counts fewer than 1,000 operations, once for each that is
        written in a loop, are run without a change of threads, which takes as long as a small solve."""
        ends, direction = record.recent.end, self.problem.direction

        def save_row(index: Array, carry: tuple[Int[Array, ""], Arrays]) -> tuple[Int[Array, ""], Arrays]:
            step, rows = carry
            t, wanted = tree.take(self.rows.ts, index), (index >= record.saved) & (index < saved)

            def is_behind(step: Array) -> Bool[Array, ""]:
                return (step < steps - 1) & (tree.take(ends, step) * direction < t * direction)

            step = jax.lax.while_loop(is_behind, lambda step: step + 1, step)
            interpolant = tree.take(record.recent, step)
            row = self._row(jnp.where(wanted, t, interpolant.start), interpolant)
            return step, put(rows, index, tree.where(wanted, row, tree.take(rows, index)))

        start, last = min_lane(record.saved), max_lane(saved)
        return jax.lax.fori_loop(start, last, save_row, (jnp.zeros((), jnp.int32), record.rows))[1]

    def _save_blocks(self, record: Window, steps: Int[Array, ""], saved: Int[Array, ""]) -> Arrays:
        ts, direction = self.rows.ts, self.problem.direction
        block = min(len(ts), self.segment_limit)
        filled = jnp.arange(record.recent.end.shape[0]) < steps
        ends = jnp.where(filled, record.recent.end * direction, jnp.inf)

        def save_block(carry: tuple[Int[Array, ""], Arrays]) -> tuple[Int[Array, ""], Arrays]:
            begin, rows = carry
            index = jnp.minimum(begin, len(ts) - block)
            times, places = tree.take_block(ts, index, block), index + jnp.arange(block)
            wanted = (places >= record.saved) & (places < saved)
            steps = jnp.sum(ends < (times * direction)[:, None], axis=1, dtype=jnp.int32)
            steps = jax.lax.optimization_barrier(steps)
            interpolants = tree.take_rows(record.recent, jnp.where(wanted, steps, 0))
            new = jax.vmap(self._row)(jnp.where(wanted, times, interpolants.start), interpolants)
            new = jax.vmap(tree.where)(wanted, new, tree.take_block(rows, index, block))
            return begin + block, put_block(rows, index, new)

        start, last = (min_lane(record.saved), record.rows), max_lane(saved)
        return jax.lax.while_loop(lambda carry: carry[0] < last, save_block, start)[1]

    def _row(self, t: Scalar, note: InterpolantNote) -> Arrays:
        return self.rows.apply(t, note.interpolant().evaluate(t), self.problem.args)


class States(NamedTuple):
    """The end of every recorded step: its time, its state, and whether the slot holds a step of this lane."""

    ts: Float[Array, " slots"]
    ys: Arrays
    taken: Bool[Array, " slots"]


class StateRecorder(AbstractRecorder):
    """Saves the state after every step."""

    solver: AbstractSolver

    def start(self, problem: Problem, layout: Layout, mark: Any) -> States:
        del mark
        times = jnp.zeros(layout.slots, problem.t0.dtype)
        return States(times, tree.buffer(layout.slots, problem.y0), jnp.zeros(layout.slots, bool))

    def note(self, step: Step, accepted: Bool[Array, ""]) -> States:
        return States(step.reached(accepted), self.solver.output(step.after), accepted)

    def write(self, record: States, place: Place, notes: States) -> States:
        return put_block(record, place.slot, notes)


class DenseRecorder(AbstractRecorder):
    """Saves the interpolant of every step."""

    solver: AbstractSolver

    @property
    def interpolates(self) -> bool:
        return True

    def start(self, problem: Problem, layout: Layout, mark: Any) -> Interpolant:
        del mark
        return _empty_interpolants(problem, self.solver, layout.slots)

    def note(self, step: Step, accepted: Bool[Array, ""]) -> InterpolantNote:
        return _noted(self.solver, step, accepted)

    def blank_note(self, step: Step) -> InterpolantNote:
        return _blank_note(self.solver, step)

    def write(self, record: Interpolant, place: Place, notes: InterpolantNote) -> Interpolant:
        return put_block(record, place.slot, jax.vmap(InterpolantNote.interpolant)(notes))


class QuadratureRecorder(AbstractRecorder):
    """Adds up an integral along the solution, step by step: what feeds nothing back need not be part of the ODE's state
    and of its error norm."""

    adds_up: ClassVar[bool] = True

    nodes: Callable[[Step], Nodes]
    """A step's nodes and weights."""
    integral: Callable[[Nodes], Arrays]
    """The integral over many steps, along the leading axis of the nodes. Those of weight zero must count as nothing."""
    so_far: Arrays
    anywhere: Arrays
    """A state at which the integrand can be evaluated for nothing, in place of the nodes of rejected steps."""
    dense: bool = eqx.field(static=True, default=False)
    """Whether the nodes are taken from the step's interpolant."""
    notes: int | None = eqx.field(static=True, default=None)
    """See `longest_chunk`."""

    @property
    def interpolates(self) -> bool:
        return self.dense

    @property
    def longest_chunk(self) -> int | None:
        return self.notes

    def start(self, problem: Problem, layout: Layout, mark: Any) -> Arrays:
        del problem, layout, mark
        return self.so_far

    def note(self, step: Step, accepted: Bool[Array, ""]) -> Nodes:
        times, states, weights = self.nodes(step)
        states = tree.map(lambda leaf, finite: jnp.where(accepted, leaf, finite), states, self.anywhere)
        return Nodes(times, states, jnp.where(accepted, weights, 0.0))

    def write(self, record: Arrays, place: Place, notes: Nodes) -> Arrays:
        del place
        return tree.add(record, self.integral(notes))


def _noted(solver: AbstractSolver, step: Step, accepted: Bool[Array, ""]) -> InterpolantNote:
    """The step's interpolant, of no length if the step was not accepted."""
    interpolant = solver.interpolant(stored_in_lanes(step))
    interpolant = interpolant._replace(end=step.reached(accepted))
    return stored_in_lanes(InterpolantNote.of(interpolant, solver.dense_degree))


def _blank_note(solver: AbstractSolver, step: Step) -> InterpolantNote:
    """An interpolant of no length at the step's start."""
    start, y = step.interval.start, solver.output(step.before)
    return InterpolantNote(start, start, y, [tree.zeros_like(y)] * solver.dense_degree)


def _empty_interpolants(problem: Problem, solver: AbstractSolver, count: int) -> Interpolant:
    """Constant interpolants of no length at (t0, y0)."""
    times = jnp.full(count, problem.t0)
    states: PyTree[Array] = tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), problem.y0)
    coefficients = tree.buffer(count, tree.buffer(solver.dense_degree, problem.y0))
    return Interpolant(times, times, states, coefficients)
