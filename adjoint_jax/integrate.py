"""The forward loops: `lax.scan` over a given grid, `lax.while_loop` with a step size controller.

They know a method's step, a controller's decisions and the recorders' protocol, and nothing of adjoints.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from adjoint_jax import tree
from adjoint_jax.controllers.controller import AbstractController, AbstractStepSize
from adjoint_jax.lanes import any_lane
from adjoint_jax.problem import Problem
from adjoint_jax.recorders import AbstractRecorder, Place
from adjoint_jax.solution import Stats, Status
from adjoint_jax.solvers.explicit_runge_kutta import ExplicitRungeKutta, Step
from adjoint_jax.tree import Arrays, Scalar

STRETCH = 1.001
"""A step may be longer than proposed by this factor if it then ends where it must stop, rather than just before."""

GRID_SEGMENT = 64
"""Steps of a given grid between two looks at whether the state is still finite."""


class Report(NamedTuple):
    """How an integration went: the time reached, its `Status`, counts, and the number of slots that were recorded."""

    reached: Scalar
    status: Int[Array, ""]
    stats: Stats
    slots: Int[Array, ""]


class Outcome(NamedTuple):
    """The state at the time reached, one record for each recorder, and the report."""

    y: Arrays
    records: tuple[Any, ...]
    report: Report


class Integrator(eqx.Module):
    """A method and a controller, ready to integrate any problem."""

    solver: ExplicitRungeKutta
    controller: AbstractController
    dt0: Scalar | None
    max_steps: int = eqx.field(static=True)

    def __call__(self, problem: Problem, recorders: Sequence[AbstractRecorder], valid: Bool[Array, ""]) -> Outcome:
        """Integrate from t0 to t1. If not `valid`, report `Status.INVALID_TIMES` instead of taking any step."""
        limits = [recorder.segment_limit for recorder in recorders if recorder.segment_limit is not None]
        grid = self.controller.grid(problem.t0, problem.t1)
        if grid is None:
            assert isinstance(self.controller, AbstractStepSize)
            loop = _SteppingLoop(problem, self.solver, self.controller, tuple(recorders), self.max_steps)
            return loop.run(self.dt0, min(limits, default=None), valid)
        if self.dt0 is not None:
            raise ValueError(f"dt0 has no meaning for {type(self.controller).__name__}, whose grid is given.")
        return _GridLoop(problem, self.solver, self.controller, tuple(recorders)).run(grid, limits, valid)

    def grid_steps(self, problem: Problem) -> int | None:
        """The number of steps where it is known before the solution, else None."""
        grid = jax.eval_shape(self.controller.grid, problem.t0, problem.t1)
        return None if grid is None else grid.shape[0] - 1


class _Walk(NamedTuple):
    """The loop state of an integration with a step size controller. `slope` is the field at (t, y), where the method
    hands it on from step to step; `extra` counts evaluations besides those of the attempted steps."""

    t: Scalar
    y: Arrays
    slope: Arrays | None
    h: Scalar
    memory: PyTree[Any]
    status: Int[Array, ""]
    accepted: Int[Array, ""]
    rejected: Int[Array, ""]
    extra: Int[Array, ""]


class _Trial(NamedTuple):
    """The walk after an attempted step; the step, of no length if it was not accepted; and whether it was."""

    walk: _Walk
    step: Step
    accepted: Bool[Array, ""]


class _Progress(NamedTuple):
    walk: _Walk
    records: tuple[Any, ...]
    place: Place


class _SteppingLoop(NamedTuple):
    """Three nested loops: segments, the slots of a segment, and the attempts until a step is accepted.

    The innermost carries no record. XLA:CPU compiles a loop that carries less than about 1 kB into one kernel, and runs
    the operations of a larger one as a kernel each: for small states that is several times slower.
    """

    problem: Problem
    solver: ExplicitRungeKutta
    controller: AbstractStepSize
    recorders: tuple[AbstractRecorder, ...]
    max_steps: int

    def run(self, dt0: Scalar | None, segment: int | None, valid: Bool[Array, ""]) -> Outcome:
        problem, zero = self.problem, _zero()
        walk = self._first_walk(dt0, valid)
        if not self.recorders:
            walk = jax.lax.while_loop(lambda w: any_lane(self._running(w)), lambda w: self._attempt(w).walk, walk)
            return Outcome(walk.y, (), self._report(walk, zero))
        records = tuple(r.start(problem, self.max_steps, segment or self.max_steps) for r in self.recorders)
        progress = _Progress(walk, records, Place(zero, zero, problem.t0))
        if segment is None:
            progress = jax.lax.while_loop(lambda p: any_lane(self._running(p.walk)), self._fill_slot, progress)
        else:

            def fill_segment(progress: _Progress) -> _Progress:
                def unfilled(p: _Progress) -> Bool[Array, ""]:
                    return any_lane(self._running(p.walk)) & (p.place.position < segment)

                place = progress.place._replace(position=zero, segment_start=progress.walk.t)
                progress = jax.lax.while_loop(unfilled, self._fill_slot, progress._replace(place=place))
                pairs = zip(self.recorders, progress.records, strict=True)
                flushed = tuple(recorder.flush(record, progress.place, progress.walk.t) for recorder, record in pairs)
                return progress._replace(records=flushed)

            progress = jax.lax.while_loop(lambda p: any_lane(self._running(p.walk)), fill_segment, progress)
        return Outcome(progress.walk.y, progress.records, self._report(progress.walk, progress.place.slot))

    def _first_walk(self, dt0: Scalar | None, valid: Bool[Array, ""]) -> _Walk:
        problem, zero = self.problem, _zero()
        slope = problem.field(self.controller.interval(problem.t0, problem.t1).first, problem.y0)
        proposal = self.controller.first(problem, self.solver, slope, dt0)
        status = jnp.where(self.controller.unresolvable(problem.y0), Status.TOLERANCE_TOO_SMALL, Status.SUCCESS)
        status = jnp.where(problem.t0 == problem.t1, Status.SUCCESS, status)
        evaluations = 1 + proposal.evaluations if self.solver.reuses_last_stage or proposal.evaluations else 0
        return _Walk(
            t=problem.t0,
            y=problem.y0,
            slope=slope if self.solver.reuses_last_stage else None,
            h=proposal.h,
            memory=proposal.memory,
            status=jnp.where(valid, status, Status.INVALID_TIMES).astype(jnp.int32),
            accepted=zero,
            rejected=zero,
            extra=zero + evaluations,
        )

    def _running(self, walk: _Walk) -> Bool[Array, ""]:
        return (walk.status == Status.SUCCESS) & (walk.t != self.problem.t1)

    def _fill_slot(self, progress: _Progress) -> _Progress:
        """Attempt steps until one is accepted, in any lane, and record it."""

        def unaccepted(trial: _Trial) -> Bool[Array, ""]:
            return any_lane(self._running(trial.walk)) & ~any_lane(trial.accepted)

        walk, place = progress.walk, progress.place
        nothing = _Trial(walk, self.solver.blank_step(walk.t, walk.y), jnp.array(False))
        trial = jax.lax.while_loop(unaccepted, lambda trial: self._attempt(trial.walk), nothing)
        step, extra = self._dense(trial.step, trial.accepted)
        pairs = zip(self.recorders, progress.records, strict=True)
        records = tuple(recorder.step(record, place, step, trial.accepted) for recorder, record in pairs)
        advance = any_lane(trial.accepted)
        place = place._replace(slot=place.slot + advance, position=place.position + advance)
        return _Progress(trial.walk._replace(extra=trial.walk.extra + extra), records, place)

    def _attempt(self, walk: _Walk) -> _Trial:
        """Try one step. A lane that has ended stands still: its step has no length and is not accepted."""
        controller = self.controller
        running = self._running(walk)
        stop = controller.next_stop(walk.t, self.problem.t1)
        lands = jnp.abs(walk.h) * STRETCH >= jnp.abs(stop - walk.t)
        end = jnp.where(lands, stop, jax.lax.stop_gradient(walk.t + walk.h))
        interval = controller.interval(walk.t, jnp.where(running, end, walk.t))
        step = self.solver.step(self.problem.field, interval, walk.y, walk.slope)
        verdict = controller.judge(self.solver, step, walk.h, walk.memory)
        accepted = running & verdict.accepted
        slope, slope_evaluations = self._next_slope(walk, step, accepted)
        kept = step._replace(
            interval=interval._replace(end=jnp.where(accepted, interval.end, walk.t)),
            y1=tree.where(accepted, step.y1, walk.y),
            error=None,
        )
        attempts = walk.accepted + walk.rejected + running
        stuck = ~verdict.accepted & (jnp.abs(verdict.h) < controller.smallest(walk.t))
        exhausted = (attempts >= self.max_steps) & (kept.interval.end != self.problem.t1)
        failure = jnp.where(stuck, Status.STEP_SIZE_UNDERFLOW, Status.MAX_STEPS_REACHED)
        failure = jnp.where(verdict.finite, failure, Status.NON_FINITE)
        after = _Walk(
            t=kept.interval.end,
            y=kept.y1,
            slope=slope,
            h=verdict.h,
            memory=verdict.memory,
            status=jnp.where(running & (stuck | exhausted), failure, walk.status).astype(jnp.int32),
            accepted=walk.accepted + accepted,
            rejected=walk.rejected + (running & ~verdict.accepted),
            extra=walk.extra + slope_evaluations,
        )
        return _Trial(after, kept, accepted)

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
            lambda s: self.solver.with_dense_stages(self.problem.field, s),
            lambda s: s._replace(stages=s.stages + self.solver.extra_stages * (tree.zeros_like(s.y0),)),
            step,
        )
        return step, wanted * jnp.int32(self.solver.extra_stages)

    def _next_slope(self, walk: _Walk, step: Step, accepted: Bool[Array, ""]) -> tuple[Arrays | None, Int[Array, ""]]:
        """The field at the start of the next step, evaluated anew behind a jump."""
        if not self.solver.reuses_last_stage:
            return None, _zero()
        last = step.stages[self.solver.tableau.stages - 1]
        slope = tree.where(accepted, last, walk.slope)
        if self.controller.jump_ts is None:
            return slope, _zero()
        jumped = accepted & self.controller.jumps_at(step.interval.end)
        behind = self.controller.interval(step.interval.end, self.problem.t1).first
        fresh = jax.lax.cond(any_lane(jumped), self.problem.field, lambda t, y: slope, behind, step.y1)
        return tree.where(jumped, fresh, slope), jumped.astype(jnp.int32)

    def _report(self, walk: _Walk, slots: Int[Array, ""]) -> Report:
        starved = (walk.status == Status.STEP_SIZE_UNDERFLOW) | (walk.status == Status.MAX_STEPS_REACHED)
        unresolvable = starved & self.controller.unresolvable(walk.y)
        status = jnp.where(unresolvable, Status.TOLERANCE_TOO_SMALL, walk.status).astype(jnp.int32)
        attempts = walk.accepted + walk.rejected
        per_step = self.solver.tableau.stages - self.solver.reuses_last_stage
        stats = Stats(walk.accepted, walk.rejected, walk.extra + per_step * attempts)
        return Report(walk.t, status, stats, slots)


class _Stride(NamedTuple):
    """One step of a given grid: its ends, its slot, and its position within the segment."""

    start: Scalar | Float[Array, "..."]
    end: Scalar | Float[Array, "..."]
    slot: Int[Array, "..."]
    position: Int[Array, "..."]


class _GridLoop(NamedTuple):
    problem: Problem
    solver: ExplicitRungeKutta
    controller: AbstractController
    recorders: tuple[AbstractRecorder, ...]

    def run(self, grid: Float[Array, " times"], limits: list[int], valid: Bool[Array, ""]) -> Outcome:
        problem, steps = self.problem, grid.shape[0] - 1
        segment = even_segment(steps, min(limits, default=GRID_SEGMENT))
        strides, padding = _strides(grid, segment)
        slope = None
        if self.solver.reuses_last_stage:
            slope = problem.field(problem.t0, problem.y0)
        records = tuple(recorder.start(problem, steps + padding, segment) for recorder in self.recorders)

        def run_segment(carry: tuple[Any, ...], strides: _Stride) -> tuple[tuple[Any, ...], None]:
            y, slope, records, reached = carry
            begin, end = strides.start[0], strides.end[-1]

            def take_stride(carry: tuple[Any, ...], stride: _Stride) -> tuple[tuple[Any, ...], None]:
                return self._stride(carry, stride, begin, padding > 0), None

            y, slope, records = jax.lax.scan(take_stride, (y, slope, records), strides)[0]
            place = Place(strides.slot[-1] + 1, jnp.int32(segment), begin)
            pairs = zip(self.recorders, records, strict=True)
            records = tuple(recorder.flush(record, place, end) for recorder, record in pairs)
            return (y, slope, records, jnp.where(tree.all_finite(y), end, reached)), None

        carry = (problem.y0, slope, records, problem.t0)
        y, _, records, reached = jax.lax.scan(run_segment, carry, strides)[0]
        status = jnp.where(tree.all_finite(y), Status.SUCCESS, Status.NON_FINITE)
        status = jnp.where(valid, status, Status.INVALID_TIMES).astype(jnp.int32)
        evaluations = steps * self.solver.tableau.stages
        if self.solver.reuses_last_stage:
            evaluations += 1 - steps
        stats = Stats(_zero() + steps, _zero(), _zero() + evaluations)
        return Outcome(y, records, Report(reached, status, stats, _zero() + steps))

    def _stride(self, carry: tuple[Any, ...], stride: _Stride, begin: Scalar, padded: bool) -> tuple[Any, ...]:
        y, slope, records = carry
        step = self.solver.step(self.problem.field, self.controller.interval(stride.start, stride.end), y, slope)
        if self.solver.extra_stages and any(recorder.interpolates for recorder in self.recorders):
            step = self.solver.with_dense_stages(self.problem.field, step)
        taken = stride.start != stride.end
        if padded:
            step = step._replace(y1=tree.where(taken, step.y1, y))
        place = Place(stride.slot, stride.position, begin)
        pairs = zip(self.recorders, records, strict=True)
        records = tuple(recorder.step(record, place, step, taken) for recorder, record in pairs)
        slope = step.stages[self.solver.tableau.stages - 1] if self.solver.reuses_last_stage else None
        return step.y1, slope, records


def even_segment(steps: int, longest: int) -> int:
    """The segment length, at most `longest` and above its half, that divides the steps with the least padding."""
    if steps <= longest:
        return max(steps, 1)
    return min(range(longest, longest // 2, -1), key=lambda length: -steps % length)


def _strides(grid: Float[Array, " times"], segment: int) -> tuple[_Stride, int]:
    """The grid's steps in segments, and the number of steps of no length that fill up the last one."""
    steps = grid.shape[0] - 1
    padding = -steps % segment
    times = jnp.concatenate([grid, jnp.full(padding, grid[-1])]) if padding else grid
    slots = jnp.arange(steps + padding, dtype=jnp.int32)
    flat = _Stride(times[:-1], times[1:], slots, slots % segment)
    return tree.map(lambda leaf: leaf.reshape(-1, segment), flat), padding


def _zero() -> Int[Array, ""]:
    return jnp.zeros((), jnp.int32)
