"""A trail of recorded steps: those of one segment, and marks at checkpoints, from which the others are taken again.

What is needed to transpose a step (its state, or more) is kept for the steps of one segment; and marks, the states of the
forward loop, at checkpoints: the starts of some segments. The steps behind a checkpoint are taken again when their turn
comes. Where the times of all steps are kept, or given, nothing else is needed for that. In lanes of few numbers each, times
are more than all the rest: they are kept of one segment alone, and earlier steps are chosen again just as they were chosen,
so that nothing that is kept is as long as the largest number of steps.
Where there are fewer checkpoints than segments, `revolve` tells where they stand.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from adjoint_jax import tree
from adjoint_jax.adjoints.adjoint import Inputs
from adjoint_jax.adjoints.keep import AbstractMemo
from adjoint_jax.adjoints.memory import Kept, Memory
from adjoint_jax.adjoints.revolve import division, places, repetitions, reversible_segments
from adjoint_jax.adjoints.trail import AbstractTrail, Carry, Segment, Walked, Way, standing_still
from adjoint_jax.ends import AbstractEnds, EndsFrom, RecordedEnds
from adjoint_jax.integrate import Integrator, Mark, Recording, Stretch, chunk_length, round_up
from adjoint_jax.lanes import any_lane, max_lane, put, put_block
from adjoint_jax.problem import Problem
from adjoint_jax.recorders import AbstractRecorder, Layout, Place
from adjoint_jax.solvers.solver import AbstractSolver, Step
from adjoint_jax.tree import Scalar

LANE_SEGMENT_BYTES = 2 * 2**10
"""A segment of an adaptive integration is at least as long as fits in this."""
CHECKPOINT_BYTES = 2**22
"""So much may be taken by checkpoints in any case."""


class Tape(AbstractTrail):
    """What is kept of each step of the last segment; the marks at checkpoints; and the ends of all steps, from t0 on, or of
    those of the last segment, from its start on. Buffers are longer than that by up to a chunk, so that every chunk lies
    inside.

    Checkpoints stand at the starts of the segments that `places` tells: on a given grid where they are best, else at those
    of every `stride`th."""

    ends: AbstractEnds
    recent: Any
    checkpoints: Mark
    stride: Any
    keep: AbstractMemo
    layout: "TapeLayout" = eqx.field(static=True)

    @property
    def chunk(self) -> int:
        return self.layout.chunk

    @property
    def slots(self) -> int:
        return self.layout.slots + self.layout.chunk

    def memory(self, way: Way) -> Memory:
        del way
        kept = Kept.rows(self.keep.what, self.recent), Kept.rows("checkpoints", self.checkpoints), *Kept.times(self.ends)
        layout = self.layout
        again = repetitions(layout.checkpoints, layout.segments, known=layout.places is not None)
        return Memory(kept, layout.segment, layout.segments, again)

    @property
    def places(self) -> Int[Array, " checkpoints"]:
        """The segments of checkpoints; those that there will be no use for lie behind the last segment."""
        layout = self.layout
        if layout.places is None:
            return jnp.arange(layout.checkpoints, dtype=jnp.int32) * self.stride
        unused = (layout.segments,) * (layout.checkpoints - len(layout.places))
        return jnp.asarray(layout.places + unused, jnp.int32)

    def walk_back(self, way: Way, visit: Callable[[Segment, Carry], Carry], carry: Carry) -> Walked:
        count, segment = max_lane(way.report.slots), self.layout.segment
        if self.layout.segments == 1:
            return Walked(visit(self._segment(way, jnp.zeros((), jnp.int32), count), carry), None)

        def visit_last(going: _Going) -> _Going:
            turn = way.problem.decide(_Turn.of, going.left, count, segment)
            mark, stack = self._first_mark(way, turn, going.stack)
            tape = self._with(going.recent, going.ends)._again(way, turn.begin, turn.again, mark)
            of_segment = tape._segment(way, turn.begin, turn.steps)
            return _Going(turn.begin, stack, tape.recent, tape.ends, visit(of_segment, going.carry))

        going = _Going(count, _Stack.of(self, count), self.recent, self.ends, carry)
        return Walked(jax.lax.while_loop(lambda going: going.left > 0, visit_last, going).carry, None)

    def _segment(self, way: Way, begin: Int[Array, ""], steps: Int[Array, ""]) -> Segment:
        """The recorded segment, of so many steps."""
        ends = standing_still(way, self.ends)
        return Segment(begin, steps, EndsFrom(ends, begin) if self.layout.timed else ends, self.recent)

    def _with(self, recent: Any, ends: AbstractEnds) -> "Tape":
        return dataclasses.replace(self, recent=recent, ends=ends)

    def _again(self, way: Way, begin: Int[Array, ""], steps: Int[Array, ""], mark: Mark) -> "Tape":
        """The tape with other steps, taken again from a mark."""
        recorder = StepRecorder(way.problem, way.integrator.solver, self.keep, self.layout.interpolated)
        stretch = Stretch(begin, steps, self.layout.common, way.report.reached)
        return way.integrator.again(way.problem, mark, stretch, self._grid, Recording(recorder, self))[1]

    @property
    def _grid(self) -> AbstractEnds | None:
        return self.ends if self.layout.timed else None

    def _first_mark(self, way: Way, turn: "_Turn", stack: "_Stack") -> tuple[Mark, "_Stack"]:
        """The mark at the start of a segment, or any if the segment's steps are known; and the checkpoints without that
        one."""
        if self.layout.checkpoints == self.layout.segments:
            return tree.take(stack.marks, turn.segment), stack
        stack = self._divide(way, stack, turn.segment + 1)
        at = tree.take(stack.at, stack.top)
        mark = self._advance(way, tree.take(stack.marks, stack.top), at, jnp.where(turn.again == 0, at, turn.segment))
        return mark, stack._replace(top=stack.top - (at == turn.segment))

    def _divide(self, way: Way, stack: "_Stack", left: Int[Array, ""]) -> "_Stack":
        """Set free checkpoints between the last one and the segment whose turn it is."""
        capacity = self.layout.checkpoints
        reversible = jnp.asarray(reversible_segments(capacity, self.layout.segments))

        def has_room(stack: _Stack) -> Bool[Array, ""]:
            return (tree.take(stack.at, stack.top) < left - 1) & (stack.top < capacity - 1)

        def push(stack: _Stack) -> _Stack:
            start, free = tree.take(stack.at, stack.top), capacity - 1 - stack.top
            split = start + division(reversible, free, left - start)
            mark = self._advance(way, tree.take(stack.marks, stack.top), start, split)
            top = stack.top + 1
            return _Stack(top, put(stack.at, top, split), put(stack.marks, top, mark))

        return jax.lax.while_loop(has_room, push, stack)

    def _advance(self, way: Way, mark: Mark, start: Int[Array, ""], end: Int[Array, ""]) -> Mark:
        """The mark at the start of segment `end`, from that at the start of segment `start`."""
        segment = self.layout.segment
        stretch = Stretch(start * segment, (end - start) * segment, self.layout.common, way.report.reached)
        return way.integrator.again(way.problem, mark, stretch, self._grid, None)[0]


class _Stack(NamedTuple):
    """Checkpoints in use: the index of the last one; the segments at whose starts they stand; the marks there."""

    top: Int[Array, ""]
    at: Int[Array, " checkpoints"]
    marks: Mark

    @staticmethod
    def of(tape: Tape, steps: Int[Array, ""]) -> "_Stack":
        """Those up to the last segment of so many steps."""
        places, last = tape.places, tree.quotient(jnp.maximum(steps - 1, 0), tape.layout.segment)
        return _Stack(_last(places, last), places, tape.checkpoints)


def _last(places: Int[Array, " checkpoints"], index: Int[Array, ""]) -> Int[Array, ""]:
    """Which is the last of some ascending places that is not behind an index."""
    return jnp.sum(places <= index, dtype=jnp.int32) - 1


class _Turn(NamedTuple):
    """The segment that is next on the way back: which it is, the slot of its first step, how many of its steps must be
    taken again, none of those of the last segment, and how many it has."""

    segment: Int[Array, ""]
    begin: Int[Array, ""]
    again: Int[Array, ""]
    steps: Int[Array, ""]

    @staticmethod
    def of(left: Int[Array, ""], count: Int[Array, ""], length: int) -> "_Turn":
        """Of so many steps that are left, of so many."""
        segment = tree.quotient(left - 1, length)
        begin = segment * length
        return _Turn(segment, begin, jnp.where(left == count, 0, length), left - begin)


class _Going(NamedTuple):
    """Where the walk back stands: the number of steps left, the checkpoints, the buffers of a segment."""

    left: Int[Array, ""]
    stack: _Stack
    recent: Any
    ends: AbstractEnds
    carry: Any


class TapeLayout(NamedTuple):
    """Static sizes: steps at most, in a segment, and in a chunk, and those between two calls of `flush`; checkpoints, and
    the largest number of segments; the segments of checkpoints, where they are known; whether the times of all steps are;
    and whether the loss may depend on interpolants."""

    slots: int
    segment: int
    chunk: int
    flushed: int
    checkpoints: int
    segments: int
    places: tuple[int, ...] | None
    timed: bool
    interpolated: bool

    def is_first(self, place: Place, segment: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether what `flush` is called for is the first part of a segment, or all of it."""
        if self.flushed == self.segment:
            return jnp.array(True)
        return place.first == segment * self.segment

    def position(self, place: Place) -> Int[Array, ""]:
        """Which step of its segment a place is."""
        return place.position if self.flushed == self.segment else tree.remainder(place.slot, self.segment)

    def marked(self, mark: Mark) -> Mark:
        """What is kept of a mark."""
        return mark._replace(choice=()) if self.timed else mark

    @property
    def common(self) -> int:
        """Steps of the chunks in which segments are taken again: a divisor of both."""
        return math.gcd(self.segment, self.chunk)


class TapeNote(NamedTuple):
    """What is kept of a step, and its end in time."""

    kept: Any
    end: Scalar


class StepRecorder(AbstractRecorder):
    """Records the steps of a segment in a `Tape`: those of the last one, or others that are taken again."""

    problem: Problem
    solver: AbstractSolver
    keep: AbstractMemo
    interpolated: bool = eqx.field(static=True)

    @property
    def interpolates(self) -> bool:
        return self.interpolated or self.keep.interpolates

    def method(self, solver: AbstractSolver) -> AbstractSolver:
        return self.keep.method(self.problem, solver)

    def start(self, problem: Problem, layout: Layout, mark: Mark) -> Tape:
        raise NotImplementedError("A tape is started by a TapeRecorder.")

    def note(self, step: Step, accepted: Bool[Array, ""]) -> TapeNote:
        kept = self.keep.of(self.problem, self.solver, step, interpolated=self.interpolated)
        return TapeNote(kept, step.reached(accepted))

    def blank_note(self, step: Step) -> TapeNote:
        kept = self.keep.shapes(self.problem, self.solver, interpolated=self.interpolated)
        return TapeNote(tree.zeros_like(kept), step.interval.end)

    def write(self, record: Tape, place: Place, notes: TapeNote) -> Tape:
        position = record.layout.position(place)
        record = dataclasses.replace(record, recent=put_block(record.recent, position, notes.kept))
        if record.layout.timed:
            return record
        zero = jnp.zeros((), jnp.int32)
        start = jnp.where(position == 0, place.segment_start, record.ends.at(zero))
        ends = record.ends.recorded(zero, start[None]).recorded(position + 1, notes.end)
        return dataclasses.replace(record, ends=ends)


class TapeRecorder(StepRecorder):
    """Records a `Tape` with segments of at least `length` steps and at most so many checkpoints, if the user says how many.
    `grid`: the ends of all steps, where they are given."""

    length: int = eqx.field(static=True)
    checkpoints: int | None = eqx.field(static=True)
    slots: int = eqx.field(static=True)
    grid: AbstractEnds | None

    @property
    def interpolates(self) -> bool:
        """Others say which steps are interpolated, unless all interpolants are kept."""
        return self.keep.interpolates

    @property
    def segment_limit(self) -> int | None:
        return None if self.length >= self.slots else self.length

    def start(self, problem: Problem, layout: Layout, mark: Mark) -> Tape:
        segment = layout.slots if self.length >= self.slots else round_up(self.length, layout.segment)
        fitting = chunk_length(tree.buffer(self.solver.dense_degree, problem.y0), problem.scalars_per_array)
        kept = self.keep.shapes(problem, self.solver, interpolated=self.interpolated)
        chunk = max(fitting, self.keep.chunk(self.solver, tree.size_in_bytes(kept), interpolated=self.interpolated))
        segments = math.ceil(layout.slots / segment)
        checkpoints = min(segments, self.checkpoints or _most_checkpoints(layout.slots, mark))
        best = tuple(places(checkpoints, segments)) if self.grid is not None and checkpoints < segments else None
        timed = self.grid is not None or not problem.is_in_lanes
        sizes = TapeLayout(
            layout.slots, segment, chunk, layout.segment, checkpoints, segments, best, timed, self.interpolated
        )
        mark = sizes.marked(mark)
        length = (segments - 1) * segment * timed + round_up(segment, chunk) + 1
        return Tape(
            ends=RecordedEnds(jnp.full(length, problem.t0)) if self.grid is None else self.grid,
            recent=tree.buffer(round_up(segment, chunk), kept),
            checkpoints=tree.buffer(checkpoints, mark),
            stride=jnp.ones((), jnp.int32),
            keep=self.keep,
            layout=sizes,
        )

    def write(self, record: Tape, place: Place, notes: TapeNote) -> Tape:
        record = super().write(record, place, notes)
        if not record.layout.timed:
            return record
        return dataclasses.replace(record, ends=record.ends.recorded(place.slot + 1, notes.end))

    def flush(self, record: Tape, place: Place, now: Scalar) -> Tape:
        del now
        layout = record.layout
        mark = layout.marked(place.mark)
        index = tree.quotient(jnp.maximum(place.slot - 1, 0), layout.segment)
        is_first = layout.is_first(place, index)
        if layout.checkpoints == layout.segments:
            here = tree.where(is_first, mark, tree.take(record.checkpoints, index))
            return dataclasses.replace(record, checkpoints=put(record.checkpoints, index, here))
        if layout.places is None:
            record = _thinned(record, index)
        at = _last(record.places, index)
        stays = ~is_first | (tree.take(record.places, at) != index)
        here = tree.where(stays, tree.take(record.checkpoints, at), mark)
        return dataclasses.replace(record, checkpoints=put(record.checkpoints, at, here))


def _thinned(tape: Tape, index: Int[Array, ""]) -> Tape:
    """The tape with every second checkpoint only, if segment `index` finds no room."""
    full = tree.quotient(index, tape.stride) >= tape.layout.checkpoints
    every_second = np.minimum(2 * np.arange(tape.layout.checkpoints), tape.layout.checkpoints - 1)

    def thinned(checkpoints: Mark) -> Mark:
        return tree.map(lambda leaf: leaf[every_second], checkpoints)

    checkpoints = jax.lax.cond(any_lane(full), thinned, lambda checkpoints: checkpoints, tape.checkpoints)
    return dataclasses.replace(tape, checkpoints=checkpoints, stride=jnp.where(full, 2 * tape.stride, tape.stride))


def _most_checkpoints(slots: int, mark: Mark) -> int:
    """How many are kept of so many steps, unless the user says."""
    return max(1, 2 * math.isqrt(slots), CHECKPOINT_BYTES // max(1, tree.size_in_bytes(mark)))


def check_checkpoints(checkpoints: Any, name: str) -> None:
    """Raise `ValueError` unless this is a number of states that can be kept, or None."""
    if checkpoints is not None and (not isinstance(checkpoints, int) or checkpoints < 1):
        raise ValueError(f"{name}(checkpoints=...) must be a positive integer, or None, got {checkpoints!r}.")


def tape_recorder(
    keep: AbstractMemo, checkpoints: int | None, integrator: Integrator, inputs: Inputs, *, whole: int
) -> TapeRecorder:
    """The recorder with a segment length and a number of checkpoints that suit the sizes known at trace time. `whole`:
    bytes up to which all steps of a given grid are one segment."""
    (problem, requests), solver = inputs, integrator.solver
    kept_bytes = max(1, keep.bytes_of_step(problem, solver, interpolated=requests.interpolated))
    slots, grid = integrator.slots, integrator.controller.grid(problem.t0, problem.t1)
    length = math.isqrt(slots)
    if grid is None:
        length = max(length, LANE_SEGMENT_BYTES // kept_bytes)
    elif checkpoints is None and slots * kept_bytes <= whole:
        length = slots
    if checkpoints is not None:
        length = min(length, math.ceil(slots / checkpoints))
    length = max(1, min(slots, keep.segment(length, kept_bytes)))
    return TapeRecorder(problem, solver, keep, requests.interpolated, length, checkpoints, slots, grid)
