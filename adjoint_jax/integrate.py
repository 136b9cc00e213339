"""The forward loops: `lax.scan` over a given grid, `lax.while_loop` with a step size controller.

They know a method's step, a controller's decisions and the recorders' protocol, and nothing of adjoints.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from adjoint_jax import tree
from adjoint_jax.controllers.controller import AbstractController, AbstractStepSize, Trial
from adjoint_jax.ends import AbstractEnds, EndsFrom, Stride
from adjoint_jax.lanes import any_lane, apart, put, slots_first
from adjoint_jax.linear.mass import is_consistent
from adjoint_jax.problem import Interval, Problem
from adjoint_jax.recorders import AbstractRecorder, Layout, Place
from adjoint_jax.solution import Stats, Status
from adjoint_jax.solvers.solver import AbstractSolver, Step
from adjoint_jax.tree import Arrays, Scalar

STRETCH = 1.001
"""A step may be longer than proposed by this factor if it then ends where it must stop, rather than just before."""

GRID_SEGMENT_BYTES = 256 * 1024
GRID_SEGMENT = 64
"""Steps of a given grid between two looks at whether the state is still finite."""


class Report(NamedTuple):
    """How an integration went: the time reached; the `Status` that its loop ended with, and the one to report, which may
    tell more of a failure; counts, the number of slots that were recorded, and the step size that would come next.

    Each is computed apart, so that a gradient, which asks little of it, compiles little."""

    reached: Scalar
    ended: Int[Array, ""]
    status: Int[Array, ""]
    stats: Stats
    slots: Int[Array, ""]
    h: Scalar

    @property
    def failed(self) -> Bool[Array, ""]:
        """Whether t1 was not reached."""
        return self.ended != Status.SUCCESS


class Outcome(NamedTuple):
    """The method's state at the time reached, one record for each recorder, and the report."""

    state: Arrays
    records: tuple[Any, ...]
    report: Report


class Mark(NamedTuple):
    """What a loop can be taken up from again: the method's state and, where steps are chosen, where the choice stands."""

    state: Arrays
    choice: Any


class Stretch(NamedTuple):
    """Steps that are taken again: the slot of the first, how many there are, and by how many they are counted: of steps
    without a given grid there are whole chunks, as in every segment but the last. And the time that was reached by them and
    all steps after them."""

    slot: Int[Array, ""]
    steps: Int[Array, ""]
    chunk: int
    reached: Scalar


class Recording(NamedTuple):
    """A recorder, and what it has recorded."""

    recorder: AbstractRecorder
    record: Any


class Integrator(eqx.Module):
    """A method and a controller, ready to integrate any problem."""

    method: AbstractSolver
    controller: AbstractController
    dt0: Any
    max_steps: int = eqx.field(static=True)

    @property
    def solver(self) -> AbstractSolver:
        """The method, which knows the controller's tolerance."""
        return self.method.within(self.controller.tolerance)

    def __call__(self, problem: Problem, recorders: Sequence[AbstractRecorder], valid: Bool[Array, ""]) -> Outcome:
        """Integrate from t0 to t1. If not `valid`, report `Status.INVALID_TIMES` instead of taking any step."""
        interpolated = any(recorder.interpolates for recorder in recorders)
        return problem.compute(self._run, problem, tuple(recorders), valid, interpolated=interpolated)

    def _run(self, problem: Problem, recorders: Sequence[AbstractRecorder], valid: Bool[Array, ""]) -> Outcome:
        return self._loop(problem, recorders).run(valid)

    def again(
        self,
        problem: Problem,
        mark: Mark,
        stretch: Stretch,
        ends: AbstractEnds | None,
        kept: Recording | None,
    ) -> tuple[Mark, Any]:
        """Take steps again from a mark on: the mark behind them, and their record (None without a recorder). Where the ends
        of all steps are known, they are a given grid; otherwise steps are chosen again as they were."""
        recorders, records = ((), ()) if kept is None else ((kept.recorder,), (kept.record,))
        if ends is None:
            loop = self._loop(problem, recorders)
        else:
            loop = _GridLoop(problem.for_steps(), self._method(recorders), self.controller, recorders, ends)
        mark, records = loop.again(mark, stretch, records)
        return mark, (records[0] if records else None)

    def _loop(self, problem: Problem, recorders: Sequence[AbstractRecorder]) -> "_SteppingLoop | _GridLoop":
        problem, grid = problem.for_steps(), self.controller.grid(problem.t0, problem.t1)
        solver = self._method(recorders)
        if grid is None:
            assert isinstance(self.controller, AbstractStepSize)
            return _SteppingLoop(problem, solver, self.controller, tuple(recorders), self.max_steps, self.dt0)
        if self.dt0 is not None:
            raise ValueError(f"dt0 has no meaning for {type(self.controller).__name__}, whose grid is given.")
        return _GridLoop(problem, solver, self.controller, tuple(recorders), grid)

    def _method(self, recorders: Sequence[AbstractRecorder]) -> AbstractSolver:
        return functools.reduce(lambda solver, recorder: recorder.method(solver), recorders, self.solver)

    def restarted(self, h: Scalar) -> "Integrator":
        """The same integrator, with a first step size where it has use for one."""
        takes_step_size = isinstance(self.controller, AbstractStepSize) and self.controller.adapts
        return Integrator(self.method, self.controller, h if takes_step_size else None, self.max_steps)

    @property
    def grid_steps(self) -> int | None:
        """The number of steps where it is known before the solution, else None."""
        return self.controller.grid_steps

    @property
    def slots(self) -> int:
        """The largest number of steps."""
        return self.max_steps if self.grid_steps is None else self.grid_steps


class _Walk(NamedTuple):
    """Where an integration with a step size controller stands: all that its next steps depend on. `state` is the method's;
    `slope` is what the method hands on from step to step, if it does: the field at t, or more."""

    t: Scalar
    state: Any
    slope: Any
    h: Scalar
    memory: PyTree[Any]

    @property
    def mark(self) -> Mark:
        """What it can be taken up from again: without the slope, which is as large as the state and one evaluation."""
        return Mark(self.state, self._replace(state=None, slope=None))


class _Ending(NamedTuple):
    """What became of an attempted step: whether there was one; whether it was accepted; whether t1 is reached; whether it
    was finite; whether its size is too small to go on; and the evaluations besides those that every attempt takes."""

    ran: Bool[Array, ""]
    accepted: Bool[Array, ""]
    arrived: Bool[Array, ""]
    finite: Bool[Array, ""]
    stuck: Bool[Array, ""]
    evaluations: Int[Array, ""]


class _Tally(NamedTuple):
    """How an integration goes: `extra` counts evaluations besides those of the attempted steps."""

    status: Int[Array, ""]
    accepted: Int[Array, ""]
    rejected: Int[Array, ""]
    extra: Int[Array, ""]

    def goes_on(self, t: Scalar, t1: Scalar) -> Bool[Array, ""]:
        return (self.status == Status.SUCCESS) & (t != t1)

    def after(self, ending: _Ending, max_steps: int) -> "_Tally":
        attempts = self.accepted + self.rejected + ending.ran
        exhausted = (attempts >= max_steps) & ~ending.arrived
        failure = jnp.where(ending.stuck, Status.STEP_SIZE_UNDERFLOW, Status.MAX_STEPS_REACHED)
        failure = jnp.where(ending.finite, failure, Status.NON_FINITE)
        return _Tally(
            status=jnp.where(ending.ran & (ending.stuck | exhausted), failure, self.status).astype(jnp.int32),
            accepted=self.accepted + ending.accepted,
            rejected=self.rejected + (ending.ran & ~ending.accepted),
            extra=self.extra + ending.evaluations,
        )

    def with_more(self, evaluations: Int[Array, ""]) -> "_Tally":
        return self._replace(extra=self.extra + evaluations)


class _Known(NamedTuple):
    """How an integration went whose steps are taken again: up to some time. Lanes count their attempts together: should one
    be an ulp away from where it failed, it goes on failing, but not for ever."""

    reached: Scalar
    left: Int[Array, ""]

    def goes_on(self, t: Scalar, t1: Scalar) -> Bool[Array, ""]:
        is_before = ((t < self.reached) & (t < t1)) | ((t > self.reached) & (t > t1))
        return is_before & (self.left > 0)

    def after(self, ending: _Ending, max_steps: int) -> "_Known":
        del ending, max_steps
        return self._replace(left=self.left - 1)

    def with_more(self, evaluations: Int[Array, ""]) -> "_Known":
        del evaluations
        return self


_Course = _Tally | _Known


class _Journey(NamedTuple):
    """The walk, the course of the integration, and whether it goes on."""

    walk: _Walk
    course: _Course
    runs: Bool[Array, ""]


class _Chunk(NamedTuple):
    """The journey, whether that of any lane goes on, what the recorders noted of its latest accepted steps, and how many
    those are."""

    journey: _Journey
    going: Bool[Array, ""]
    notes: tuple[Any, ...]
    filled: Int[Array, ""]


class _Progress(NamedTuple):
    """The journey, whether that of any lane goes on, what was recorded, and where the recorders stand."""

    journey: _Journey
    going: Bool[Array, ""]
    records: tuple[Any, ...]
    place: Place


class _SteppingLoop(NamedTuple):
    """Three nested loops: over segments, over the chunks of a segment, and over attempted steps until a chunk is full. The
    latter two are one where chunks are single steps."""

    problem: Problem
    solver: AbstractSolver
    controller: AbstractStepSize
    recorders: tuple[AbstractRecorder, ...]
    max_steps: int
    dt0: Scalar | None

    def run(self, valid: Bool[Array, ""]) -> Outcome:
        journey, zero = self._start(valid), _zero()
        if not self.recorders:
            journey = jax.lax.while_loop(lambda j: any_lane(j.runs), lambda j: self._attempt(j)[0], journey)
            return Outcome(journey.walk.state, (), self._report(journey, zero))
        blank, mark = self._blank_notes(journey.walk), journey.walk.mark
        layout = self._layout(blank)
        records = tuple(recorder.start(self.problem, layout, mark) for recorder in self.recorders)
        journey, records = self._apart((journey, records))

        fill = self._fill(layout.chunk)

        def fill_segment(progress: _Progress) -> _Progress:
            def unfilled(p: _Progress) -> Bool[Array, ""]:
                return p.going & (p.place.position < layout.segment)

            walk = progress.journey.walk
            place = Place(progress.place.slot, zero, walk.t, walk.mark)
            progress = progress._replace(place=place)
            at_once = layout.chunk == layout.segment and not self._one_by_one(layout.chunk)
            progress = fill(progress) if at_once else jax.lax.while_loop(unfilled, fill, progress)
            pairs = zip(self.recorders, progress.records, strict=True)
            flushed = tuple(recorder.flush(record, progress.place, progress.journey.walk.t) for recorder, record in pairs)
            return progress._replace(records=flushed)

        progress = _Progress(journey, any_lane(journey.runs), records, Place(zero, zero, self.problem.t0, mark))
        whole = all(recorder.segment_limit is None for recorder in self.recorders)
        progress = jax.lax.while_loop(lambda p: p.going, fill if whole else fill_segment, progress)
        return Outcome(progress.journey.walk.state, progress.records, self._report(progress.journey, progress.place.slot))

    def again(self, mark: Mark, stretch: Stretch, records: tuple[Any, ...]) -> tuple[Mark, tuple[Any, ...]]:
        def unfilled(progress: _Progress) -> Bool[Array, ""]:
            return progress.going & (progress.place.position < stretch.steps)

        walk: _Walk = mark.choice._replace(state=mark.state)
        if self.solver.reuses_last_stage:
            first = self.controller.interval(walk.t, self.problem.t1).first
            walk = walk._replace(slope=_evaluated_for(stretch, self.problem, self.solver, first, walk.state))
        journey = self._journey(walk, _Known(stretch.reached, jnp.full((), self.max_steps, jnp.int32)))
        progress = _Progress(journey, any_lane(journey.runs), records, Place(stretch.slot, _zero(), walk.t, mark))
        progress = jax.lax.while_loop(unfilled, self._fill(stretch.chunk), progress)
        return progress.journey.walk.mark, progress.records

    def _apart(self, values: PyTree[Any]) -> PyTree[Any]:
        """The same with values of their own in all lanes, as they will have; but times of constant steps may be shared."""
        return apart(values) if self.controller.adapts else values

    def _layout(self, blank: tuple[Any, ...]) -> Layout:
        limit = min(_limits(recorder.segment_limit for recorder in self.recorders), default=None)
        chunk = min(
            [
                chunk_length(blank, self.problem.scalars_per_array),
                *_limits(recorder.longest_chunk for recorder in self.recorders),
            ]
        )
        if limit is None:
            slots = round_up(self.max_steps, chunk)
            return Layout(slots, slots, chunk)
        chunk = min(chunk, limit)
        segment = limit - limit % chunk
        return Layout(round_up(self.max_steps, segment), segment, chunk)

    def _start(self, valid: Bool[Array, ""]) -> _Journey:
        problem, solver, zero = self.problem, self.solver, _zero()
        first = self.controller.interval(problem.t0, problem.t1).first
        slope = problem.field(first, problem.y0)
        proposal = self.controller.first(problem, solver, slope, self.dt0)
        status = jnp.where(self.controller.unresolvable(problem.y0), Status.TOLERANCE_TOO_SMALL, Status.SUCCESS)
        status = jnp.where(problem.t0 == problem.t1, Status.SUCCESS, status)
        status = jnp.where(is_consistent(problem), status, Status.INCONSISTENT)
        jumps = self.controller.jump_ts is not None
        uses_slope = solver.reuses_last_stage or proposal.evaluations > 0 or (solver.start_evaluations > 0 and not jumps)
        evaluations = uses_slope + proposal.evaluations + (solver.start_evaluations if jumps else 0)
        state = solver.start(problem) if jumps else solver.start_from(problem, slope)
        walk = _Walk(
            t=problem.t0,
            state=state,
            slope=solver.taken_over(problem, first, state, slope) if solver.reuses_last_stage else None,
            h=proposal.h,
            memory=proposal.memory,
        )
        status = jnp.where(valid, status, Status.INVALID_TIMES).astype(jnp.int32)
        return self._journey(walk, _Tally(status, zero, zero, zero + evaluations))

    def _journey(self, walk: _Walk, course: _Course) -> _Journey:
        return _Journey(walk, course, course.goes_on(walk.t, self.problem.t1))

    def _one_by_one(self, chunk: int) -> bool:
        """Whether every attempt is written down as it is, where the next one writes over it if it was not accepted."""
        return chunk == 1 and not any(recorder.adds_up for recorder in self.recorders)

    def _fill(self, chunk: int) -> Callable[[_Progress], _Progress]:
        """What fills slots: a chunk of them, or with one attempt at most one."""
        return self._fill_slot if self._one_by_one(chunk) else functools.partial(self._fill_chunk, slots=chunk)

    def _fill_slot(self, progress: _Progress) -> _Progress:
        attempted = self._attempt_noted(progress.journey)
        notes = tree.map(lambda leaf: leaf[None], attempted.notes)
        return self._written(progress.place, progress.records, attempted._replace(notes=notes))

    def _fill_chunk(self, progress: _Progress, slots: int) -> _Progress:
        walk, course, runs = progress.journey
        blank = self._blank_notes(walk)
        empty = tree.map(lambda leaf: jnp.broadcast_to(leaf, (slots, *leaf.shape)), blank)
        walk, runs, empty = self._apart((walk, runs, empty))

        def unfilled(chunk: _Chunk) -> Bool[Array, ""]:
            return chunk.going & (chunk.filled < slots)

        def attempt(chunk: _Chunk) -> _Chunk:
            journey, going, note, written = self._attempt_noted(chunk.journey)
            notes = slots_first(put(chunk.notes, chunk.filled, note))
            return _Chunk(journey, going, notes, chunk.filled + written)

        start = _Chunk(_Journey(walk, course, runs), progress.going, empty, _zero())
        chunk = jax.lax.while_loop(unfilled, self.problem.looped(attempt), start)
        return self._written(progress.place, progress.records, chunk)

    def _attempt_noted(self, journey: _Journey) -> _Chunk:
        """Try one step: a chunk of one slot, filled if any lane accepted it, without an axis for slots."""
        journey, step, accepted = self._attempt(journey)
        step, evaluations = self._dense(step, accepted)
        journey = journey._replace(course=journey.course.with_more(evaluations))
        going, written = any_lane(jnp.stack([journey.runs, accepted]))
        return _Chunk(journey, going, self._notes(step, accepted), written.astype(jnp.int32))

    def _written(self, place: Place, records: tuple[Any, ...], chunk: _Chunk) -> _Progress:
        """With what was noted in a chunk."""
        triples = zip(self.recorders, records, chunk.notes, strict=True)
        records = tuple(recorder.write(record, place, notes) for recorder, record, notes in triples)
        place = place._replace(position=place.position + chunk.filled)
        return _Progress(chunk.journey, chunk.going, records, place)

    def _blank_notes(self, walk: _Walk) -> tuple[Any, ...]:
        blank = self.solver.blank_step(walk.t, walk.state)
        return tuple(recorder.blank_note(blank) for recorder in self.recorders)

    def _notes(self, step: Step, accepted: Bool[Array, ""]) -> tuple[Any, ...]:
        return tuple(recorder.note(step, accepted) for recorder in self.recorders)

    def _attempt(self, journey: _Journey) -> tuple[_Journey, Step, Bool[Array, ""]]:
        """Try one step: the journey after it; the step, whose state is left as it was if it was not accepted; and whether
        it was.

        A lane that has ended stands still: its step is not accepted.
        """
        walk, course, runs = journey
        decide, numbers = self.problem.decide, walk._replace(state=None, slope=None)
        interval = decide(self._next_interval, numbers, runs)
        step = self.solver.step(self.problem, interval, walk.state, walk.slope)
        ratio = self.controller.ratio(self.solver, step)
        of_step = interval, ratio, step.factor, step.iterations
        (ahead, course, runs), accepted = decide(self._judged, _Journey(numbers, course, runs), *of_step)
        kept = step._replace(after=tree.where(accepted, step.after, walk.state), error=None)
        walk = ahead._replace(state=kept.after, slope=self._next_slope(walk, step, accepted))
        return _Journey(walk, course, runs), kept, accepted

    def _next_interval(self, walk: _Walk, runs: Bool[Array, ""]) -> Interval:
        stop = self.controller.next_stop(walk.t, self.problem.t1)
        lands = jnp.abs(walk.h) * STRETCH >= jnp.abs(stop - walk.t)
        end = jnp.where(lands, stop, jax.lax.stop_gradient(walk.t + walk.h))
        return self.controller.interval(walk.t, jnp.where(runs, end, walk.t))

    def _judged(
        self, journey: _Journey, interval: Interval, ratio: Scalar, factor: Scalar | None, iterations: Array | None
    ) -> tuple[_Journey, Bool[Array, ""]]:
        """The journey after an attempted step, but for its arrays, and whether the step is accepted."""
        (walk, course, runs), controller = journey, self.controller
        trial = Trial(interval.end - interval.start, walk.h, ratio, factor)
        verdict = controller.judge(self.solver, trial, walk.memory)
        moves = interval.end != interval.start
        accepted = runs & verdict.accepted & moves
        end = jnp.where(accepted, interval.end, walk.t)
        ending = _Ending(
            ran=runs,
            accepted=accepted,
            arrived=end == self.problem.t1,
            finite=verdict.finite,
            stuck=(~verdict.accepted & (jnp.abs(verdict.h) < controller.smallest(walk.t))) | ~moves,
            evaluations=_taken(iterations, runs) + self._jumps(interval.end, accepted),
        )
        walk = walk._replace(t=end, h=verdict.h, memory=verdict.memory)
        return self._journey(walk, course.after(ending, self.max_steps)), accepted

    def _jumps(self, end: Scalar, accepted: Bool[Array, ""]) -> Int[Array, ""]:
        """Whether a step ends where the field jumps, so that its slope behind that must be evaluated anew."""
        if self.controller.jump_ts is None or not self.solver.reuses_last_stage:
            return _zero()
        return (accepted & self.controller.jumps_at(end)).astype(jnp.int32)

    def _dense(self, step: Step, accepted: Bool[Array, ""]) -> tuple[Step, Int[Array, ""]]:
        """The step with the stages of its dense output, if it has any and they are wanted."""
        interpolating = [recorder for recorder in self.recorders if recorder.interpolates]
        if not interpolating or not self.solver.extra_stages:
            return step, _zero()
        wanted = jnp.array(False)
        for recorder in interpolating:
            wanted |= recorder.wants_dense(step.interval.start, step.interval.end)
        wanted &= accepted
        step = jax.lax.cond(
            any_lane(wanted),
            lambda s: self.solver.with_dense_stages(self.problem, s),
            self.solver.with_blank_stages,
            step,
        )
        return step, wanted * jnp.int32(self.solver.extra_stages)

    def _next_slope(self, walk: _Walk, step: Step, accepted: Bool[Array, ""]) -> Any:
        """What the next step takes over, evaluated anew behind a jump."""
        if not self.solver.reuses_last_stage:
            return None
        slope = tree.where(accepted, self.solver.handed_on(step), walk.slope)
        if self.controller.jump_ts is None:
            return slope
        jumped = self._jumps(step.interval.end, accepted) > 0
        behind = self.controller.interval(step.interval.end, self.problem.t1).first
        fresh = jax.lax.cond(
            any_lane(jumped),
            lambda t, state: _evaluated(self.problem, self.solver, t, state),
            lambda t, state: slope,
            behind,
            step.after,
        )
        return tree.where(jumped, fresh, slope)

    def _report(self, journey: _Journey, slots: Int[Array, ""]) -> Report:
        walk, tally = journey.walk, journey.course
        assert isinstance(tally, _Tally)
        starved = (tally.status == Status.STEP_SIZE_UNDERFLOW) | (tally.status == Status.MAX_STEPS_REACHED)
        unresolvable = starved & self.controller.unresolvable(self.solver.output(walk.state))
        status = jnp.where(unresolvable, Status.TOLERANCE_TOO_SMALL, tally.status).astype(jnp.int32)
        attempts = tally.accepted + tally.rejected
        per_step = self.solver.evaluations(
            estimated=self.controller.adapts, interpolated=any(recorder.interpolates for recorder in self.recorders)
        )
        stats = Stats(tally.accepted, tally.rejected, tally.extra + per_step * attempts)
        return Report(walk.t, tally.status, status, stats, slots, walk.h)


class _Finite(NamedTuple):
    """A state of the method that is finite, and the number of steps that led to it."""

    state: Arrays
    steps: Int[Array, ""]


class _Pace(NamedTuple):
    """The loop state of an integration on a given grid: the method's, what it hands on if it does, and the evaluations of
    its iterations."""

    state: Arrays
    slope: Any
    iterations: Int[Array, ""]

    @property
    def mark(self) -> Mark:
        """What it can be taken up from again."""
        return Mark(self.state, ())


class _GridLoop(NamedTuple):
    """Two nested scans: over segments, and over the steps of a segment. A segment is one chunk."""

    problem: Problem
    solver: AbstractSolver
    controller: AbstractController
    recorders: tuple[AbstractRecorder, ...]
    grid: AbstractEnds

    def run(self, valid: Bool[Array, ""]) -> Outcome:
        problem, grid, steps = self.problem, self.grid, self.controller.grid_steps
        assert steps is not None
        segment = even_segment(steps, self._longest_segment())
        slots = round_up(steps, segment)
        state = self.solver.start(problem)
        start = self._pace(state, lambda: _evaluated(problem, self.solver, problem.t0, state))
        layout = Layout(slots, segment, segment)
        records = tuple(recorder.start(problem, layout, start.mark) for recorder in self.recorders)

        def run_segment(carry: tuple[Any, ...], index: Int[Array, ""]) -> tuple[tuple[Any, ...], None]:
            (entry, records, finite), slot = carry, index * segment

            def take_stride(pace: _Pace, position: Int[Array, ""]) -> tuple[_Pace, tuple[Any, ...]]:
                return self._stride(pace, problem.decide(AbstractEnds.stride, EndsFrom(grid, slot), position))

            pace, notes = jax.lax.scan(take_stride, entry, jnp.arange(segment, dtype=jnp.int32))
            state, (begin, end) = pace.state, (grid.at(slot), grid.at(slot + segment))
            place = Place(slot, _zero(), begin, entry.mark)
            triples = zip(self.recorders, records, notes, strict=True)
            records = tuple(recorder.write(record, place, notes) for recorder, record, notes in triples)
            place = place._replace(position=_zero() + segment)
            pairs = zip(self.recorders, records, strict=True)
            records = tuple(recorder.flush(record, place, end) for recorder, record in pairs)
            here = _Finite(state, slot + segment)
            return (pace, records, tree.where(self.solver.is_finite(state), here, finite)), None

        carry = start, records, _Finite(start.state, _zero())
        segments = jnp.arange(slots // segment, dtype=jnp.int32)
        (state, _, iterations), records, finite = jax.lax.scan(run_segment, carry, segments)[0]
        status = jnp.where(self.solver.is_finite(state), Status.SUCCESS, Status.NON_FINITE)
        status = jnp.where(is_consistent(problem), status, Status.INCONSISTENT)
        status = jnp.where(valid, status, Status.INVALID_TIMES).astype(jnp.int32)
        taken = self._finite_steps(steps, finite)
        per_step = self.solver.evaluations(estimated=False, interpolated=self._interpolates)
        per_step += self.solver.extra_stages * self._interpolates
        start_evaluations = self.solver.start_evaluations + self.solver.reuses_last_stage
        stats = Stats(taken, _zero(), iterations + (steps * per_step + start_evaluations))
        last = grid.stride(_zero() + (steps - 1))
        h = last.end - last.start
        return Outcome(state, records, Report(grid.at(taken), status, status, stats, _zero() + steps, h))

    @property
    def _reuses_last_stage(self) -> bool:
        """Whether the slope at the end of a step is that at the start of the next: not where the field may jump between."""
        is_smooth = not isinstance(self.controller, AbstractStepSize) or self.controller.jump_ts is None
        return self.solver.reuses_last_stage and is_smooth

    def _pace(self, state: Arrays, slope: Callable[[], Any]) -> _Pace:
        """At a state, with what a step from it takes over if it takes over anything."""
        return _Pace(state, slope() if self._reuses_last_stage else None, _zero())

    def again(self, mark: Mark, stretch: Stretch, records: tuple[Any, ...]) -> tuple[Mark, tuple[Any, ...]]:
        first, ends = self.grid.at(stretch.slot), EndsFrom(self.grid, stretch.slot)

        def take_stride(position: Array, walk: tuple[_Pace, tuple[Any, ...]]) -> tuple[_Pace, tuple[Any, ...]]:
            pace, records = walk
            pace, notes = self._stride(pace, self.problem.decide(AbstractEnds.stride, ends, position))
            notes = tree.map(lambda leaf: leaf[None], notes)
            triples = zip(self.recorders, records, notes, strict=True)
            place = Place(stretch.slot, position, first, mark)
            return pace, tuple(recorder.write(record, place, note) for recorder, record, note in triples)

        pace = self._pace(mark.state, lambda: _evaluated_for(stretch, self.problem, self.solver, first, mark.state))
        pace, records = jax.lax.fori_loop(0, stretch.steps, take_stride, (pace, records))
        return pace.mark, records

    def _longest_segment(self) -> int:
        """A segment's notes are held twice, in a scan's output and where they are written: so they must not be large."""
        blank_step = self.solver.blank_step(self.problem.t0, self.solver.start(self.problem))
        blank = [recorder.blank_note(blank_step) for recorder in self.recorders]
        fitting = max(1, GRID_SEGMENT_BYTES // max(1, tree.size_in_bytes(blank)))
        limits = [r.segment_limit for r in self.recorders] + [r.longest_chunk for r in self.recorders]
        return min([GRID_SEGMENT, fitting, *_limits(limits)])

    def _finite_steps(self, steps: int, known: _Finite) -> Int[Array, ""]:
        """How many steps have a finite result: those up to the last segment that ends so, and those after it, which are
        taken again one by one."""

        def goes_on(walk: tuple[_Finite, Bool[Array, ""]]) -> Bool[Array, ""]:
            return any_lane(walk[1] & (walk[0].steps < steps))

        def take(walk: tuple[_Finite, Bool[Array, ""]]) -> tuple[_Finite, Bool[Array, ""]]:
            (state, n), finite = walk
            interval = self.controller.interval(*self.problem.decide(AbstractEnds.stride, self.grid, n))
            after = self.solver.step(self.problem, interval, state, None).after
            finite &= (n < steps) & self.solver.is_finite(after)
            return tree.where(finite, _Finite(after, n + 1), _Finite(state, n)), finite

        start = known._replace(steps=jnp.minimum(known.steps, steps))
        return jax.lax.while_loop(goes_on, take, (start, jnp.array(True)))[0].steps

    @property
    def _interpolates(self) -> bool:
        return any(recorder.interpolates for recorder in self.recorders)

    def _stride(self, pace: _Pace, stride: Stride) -> tuple[_Pace, tuple[Any, ...]]:
        state, slope, iterations = pace
        interval = self.controller.interval(stride.start, stride.end)
        step = self.solver.step(self.problem, interval, state, slope)
        if self._interpolates:
            step = self.solver.with_dense_stages(self.problem, step)
        taken = self.grid.has_length(stride)
        slope = self.solver.handed_on(step) if self._reuses_last_stage else None
        step = step._replace(after=tree.where(taken, step.after, state))
        iterations += _taken(step.iterations, taken)
        return _Pace(step.after, slope, iterations), tuple(recorder.note(step, taken) for recorder in self.recorders)


def _evaluated(problem: Problem, solver: AbstractSolver, t: Scalar, state: Arrays) -> Any:
    """What a step from the state takes over, where none was taken before."""
    return solver.taken_over(problem, t, state, solver.slope(problem, t, state))


def _evaluated_for(stretch: Stretch, problem: Problem, solver: AbstractSolver, t: Scalar, state: Arrays) -> Any:
    """The same, or anything if there is no step. In scalars an evaluation takes no longer than the choice."""

    def evaluated() -> Any:
        return _evaluated(problem, solver, t, state)

    if problem.is_in_scalars:
        return evaluated()
    like = jax.eval_shape(evaluated)
    is_like_state = jax.tree.flatten(like) == jax.tree.flatten(jax.eval_shape(lambda: state))
    anything = state if is_like_state else tree.zeros_like(like)
    return jax.lax.cond(any_lane(stretch.steps > 0), evaluated, lambda: anything)


SMALL_ARRAY_BYTES = 512
LONGEST_CHUNK = 32
LONGEST_CHUNK_OF_SCALARS = 8
"""Lanes are computed in scalars, and notes of many lanes are large."""


def chunk_length(notes: PyTree[Array], leaves_together: int = 1) -> int:
    """How many notes a chunk holds: a power of two, so that no array of it is large (see `recorders`), or no so many
    arrays together."""
    largest = max((leaves_together * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(notes)), default=1)
    chunk = LONGEST_CHUNK if leaves_together == 1 else LONGEST_CHUNK_OF_SCALARS
    while chunk > 1 and chunk * largest > SMALL_ARRAY_BYTES:
        chunk //= 2
    return chunk


def _limits(numbers: Iterable[int | None]) -> list[int]:
    return [number for number in numbers if number is not None]


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below the number."""
    return -(-number // multiple) * multiple


def even_segment(steps: int, longest: int) -> int:
    """The segment length, at most `longest` and above its half, that divides the steps with the least padding."""
    if steps <= longest:
        return max(steps, 1)
    return min(range(longest, longest // 2, -1), key=lambda length: -steps % length)


def _taken(iterations: Int[Array, ""] | None, taken: Bool[Array, ""]) -> Int[Array, ""]:
    """The evaluations of a step's iterations, if it was taken."""
    return _zero() if iterations is None else jnp.where(taken, iterations, 0)


def _zero() -> Int[Array, ""]:
    return jnp.zeros((), jnp.int32)
