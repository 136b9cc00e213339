"""The discrete adjoint: the transposed method on the forward's own grid."""

import dataclasses
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from adjoint_jax import tree
from adjoint_jax.adjoints.adjoint import (
    AbstractAdjoint,
    Inputs,
    Saved,
    blame,
    ends_cotangent,
    integrate,
    is_zero,
    materialise,
    reached_rows,
    recorders,
    saved,
    times_cotangent,
    unknown_if,
)
from adjoint_jax.integrate import Integrator, Report, chunk_length, round_up
from adjoint_jax.interpolation import Interpolant, powers
from adjoint_jax.lanes import any_lane, max_lane
from adjoint_jax.problem import Problem
from adjoint_jax.recorders import AbstractRecorder, Layout, Place, RowRecorder
from adjoint_jax.saveat import Requests, Rows
from adjoint_jax.solution import Status
from adjoint_jax.solvers.explicit_runge_kutta import ExplicitRungeKutta, Step, StepCotangent
from adjoint_jax.tree import Arrays, Scalar

KEEP_ALL_BYTES = 16 * 2**20
"""All states of a given grid are kept if they take no more than this; else about the square root of their number."""

LANE_SEGMENT_BYTES = 4 * 2**10
"""A segment of an adaptive integration is at least as long as fits in this."""


class DiscreteAdjoint(AbstractAdjoint):
    """The exact derivative of the computed solution: each step's transpose, from the last to the first.

    The transposed method is itself a Runge-Kutta method for the adjoint ODE, on the forward's grid (derivation in
    `solvers/explicit_runge_kutta.py`). Step sizes are constants of the derivative; derivatives with respect to t0, t1 and
    `ts` are those of the flow, f at that time.

    Times are recorded for all steps. States are recorded at the start of every segment of steps and throughout the last
    segment; the steps of an earlier segment are taken again, on the recorded grid, when its turn comes.

    - `checkpoints`: how many segment starts to keep; memory is that many states plus one segment. By default, all states
      of a given grid are kept if they fit in 16 MiB, and otherwise about the square root of the largest number of steps.

    Memory: O(checkpoints + steps / checkpoints) states. Works under `jit`, `vmap`, and forward-mode differentiation of
    the gradient (`jax.jvp(jax.grad(loss), ...)`).
    """

    checkpoints: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if self.checkpoints is not None and self.checkpoints < 1:
            raise ValueError(f"DiscreteAdjoint(checkpoints=...) must be at least 1, got {self.checkpoints}.")

    def solve(
        self, integrator: Integrator, problem: Problem, requests: Requests, valid: Bool[Array, ""]
    ) -> tuple[Saved, Report]:
        return _solve(Inputs(problem, requests), integrator, valid, self.checkpoints)


class Tape(eqx.Module):
    """The times of all steps; the states at the start of every step of the last segment; those at the start of every
    segment. Buffers are longer than segments and steps by up to a chunk, so that every chunk lies inside."""

    times: Float[Array, " times"]
    recent: Arrays
    checkpoints: Arrays
    segment: int = eqx.field(static=True)
    chunk: int = eqx.field(static=True)

    @property
    def segments(self) -> int:
        """The largest number of segments."""
        return jax.tree.leaves(self.checkpoints)[0].shape[0]


class TapeNote(NamedTuple):
    """A step's start, as a state, and its end, as a time."""

    y0: Arrays
    end: Scalar


class TapeRecorder(AbstractRecorder):
    """Records what the reverse sweep needs, in segments of at least `length` steps."""

    length: int = eqx.field(static=True)
    slots: int = eqx.field(static=True)
    solver: ExplicitRungeKutta

    @property
    def segment_limit(self) -> int | None:
        return None if self.length >= self.slots else self.length

    def start(self, problem: Problem, layout: Layout) -> Tape:
        segment = layout.slots if self.length >= self.slots else round_up(self.length, layout.segment)
        chunk = chunk_length(tree.buffer(self.solver.dense_degree, problem.y0))
        return Tape(
            times=jnp.full(layout.slots + chunk + 1, problem.t0),
            recent=tree.buffer(round_up(segment, chunk), problem.y0),
            checkpoints=tree.buffer(math.ceil(layout.slots / segment), problem.y0),
            segment=segment,
            chunk=chunk,
        )

    def note(self, step: Step, accepted: Bool[Array, ""]) -> TapeNote:
        del accepted
        return TapeNote(step.y0, step.interval.end)

    def write(self, record: Tape, place: Place, notes: TapeNote) -> Tape:
        return dataclasses.replace(
            record,
            times=tree.put_block(record.times, place.slot + 1, notes.end),
            recent=tree.put_block(record.recent, place.slot % record.segment, notes.y0),
        )

    def flush(self, record: Tape, place: Place, now: Scalar) -> Tape:
        del now
        index = jnp.maximum(place.slot - 1, 0) // record.segment
        first = tree.map(lambda leaf: leaf[0], record.recent)
        return dataclasses.replace(record, checkpoints=tree.put(record.checkpoints, index, first))


def tape_recorder(checkpoints: int | None, integrator: Integrator, problem: Problem) -> TapeRecorder:
    """The recorder with a segment length that suits the sizes known at trace time."""
    state_bytes = max(1, tree.size_in_bytes(problem.y0))
    grid_steps, slots = integrator.grid_steps(problem), integrator.slots(problem)
    if checkpoints is not None:
        length = math.ceil(slots / checkpoints)
    elif grid_steps is None:
        length = max(math.isqrt(slots), LANE_SEGMENT_BYTES // state_bytes)
    else:
        length = slots if slots * state_bytes <= KEEP_ALL_BYTES else math.isqrt(slots)
    return TapeRecorder(min(slots, length), slots, integrator.solver)


@eqx.filter_custom_vjp
def _solve(inputs: Inputs, integrator: Integrator, valid: Array, checkpoints: int | None) -> tuple[Saved, Report]:
    del checkpoints
    return integrate(inputs, integrator, valid)


class _Residuals(NamedTuple):
    tape: Tape
    y1: Arrays
    row_states: tuple[Arrays | None, ...]
    report: Report


@_solve.def_fwd
def _forward(
    perturbed: Inputs, inputs: Inputs, integrator: Integrator, valid: Array, checkpoints: int | None
) -> tuple[tuple[Saved, Report], _Residuals]:
    """The solve, with a tape. The states at saved times are kept too where the derivative of a time needs them."""
    wanted = recorders(inputs, integrator)
    times_wanted = [rows.ts for rows in perturbed.requests.rows]
    plain = [Rows(rows.ts, None) for rows, is_wanted in zip(inputs.requests.rows, times_wanted, strict=True) if is_wanted]
    extra = [RowRecorder(rows, inputs.problem, integrator.solver) for rows in plain]
    tape = tape_recorder(checkpoints, integrator, inputs.problem)
    outcome = integrator(inputs.problem, [*wanted, *extra, tape], valid)
    states = iter(outcome.records[len(wanted) :])
    row_states = tuple(next(states).rows if is_wanted else None for is_wanted in times_wanted)
    residuals = _Residuals(outcome.records[-1], outcome.y, row_states, outcome.report)
    return (saved(inputs, integrator, outcome), outcome.report), residuals


@_solve.def_bwd
def _backward(
    residuals: _Residuals,
    cotangent: tuple[Saved, Report],
    perturbed: Inputs,
    inputs: Inputs,
    integrator: Integrator,
    valid: Array,
    checkpoints: int | None,
) -> Inputs:
    del valid, checkpoints
    problem, requests = inputs
    sweep = _Sweep(inputs, integrator, residuals, cotangent[0])
    y1_cotangent = sweep.final_cotangent()
    swept = sweep.run(y1_cotangent)
    t0, t1 = ends_cotangent(problem, integrator, perturbed.problem, (residuals.y1, y1_cotangent), swept.a)
    vector_field, args = swept.parameters
    rows = []
    for index, (request, states) in enumerate(zip(requests.rows, residuals.row_states, strict=True)):
        g = sweep.row_cotangents[index]
        ts = jnp.zeros_like(request.ts)
        if states is not None and g is not None:
            reached = reached_rows(problem, residuals.report, request.ts)
            ts = times_cotangent(problem, request, states, reached, g)
        rows.append(Rows(ts, swept.observables[index]))
    return Inputs(Problem(vector_field, args, swept.a, t0, t1), Requests(tuple(rows), requests.states, requests.dense))


class _Swept(NamedTuple):
    """What the reverse sweep carries: a = dJ/dy, dJ/dparameters, dJ/d(leaves of each fn), and how many rows of each
    request lie before the current step."""

    a: Arrays
    parameters: PyTree[Any]
    observables: tuple[PyTree[Any], ...]
    remaining: tuple[Int[Array, ""], ...]


class _Steps(NamedTuple):
    """A chunk of recorded steps: their ends in time and their first states, along a leading axis."""

    starts: Float[Array, " steps"]
    ends: Float[Array, " steps"]
    ys: Arrays


class _Observed(NamedTuple):
    """What the loss says directly of a chunk of steps: of their last states, first states and interpolants."""

    y1: Arrays | None
    y0: Arrays | None
    coefficients: Arrays | None


class _Sweep:
    """The reverse adjoint ODE, discretised by the transposed method on the recorded grid.

    Loops over segments, over the chunks of a segment, and over the steps of a chunk, each from the last to the first.
    """

    def __init__(self, inputs: Inputs, integrator: Integrator, residuals: _Residuals, cotangent: Saved):
        self.problem, self.requests = inputs
        self.integrator, self.solver = integrator, integrator.solver
        self.report, self.y1 = residuals.report, residuals.y1
        self.tape = self._standing_still(residuals.tape)
        self.direction = jnp.where(self.problem.t1 < self.problem.t0, -1, 1).astype(self.problem.t0.dtype)
        self.row_cotangents = [self._rows(*pair) for pair in zip(self.requests.rows, cotangent.rows, strict=True)]
        self.y1_cotangent = blame(materialise(cotangent.y1, self.y1), self.report.status != Status.SUCCESS)
        self.states = None if cotangent.states is None else self._per_slot(cotangent.states.ys, self.problem.y0)
        self.dense_y0 = self.dense_coefficients = None
        if cotangent.dense is not None and not is_zero((cotangent.dense.y0, cotangent.dense.coefficients)):
            coefficients = tree.buffer(self.solver.dense_degree, self.problem.y0)
            self.dense_y0 = self._per_slot(cotangent.dense.y0, self.problem.y0, keep_zero=True)
            self.dense_coefficients = self._per_slot(cotangent.dense.coefficients, coefficients, keep_zero=True)

    def _rows(self, rows: Rows, cotangent: PyTree[Any]) -> Arrays | None:
        if is_zero(cotangent):
            return None
        problem = self.problem
        one = jax.eval_shape(lambda t, y: rows.apply(t, y, problem.args), problem.t0, problem.y0)
        like = tree.map(lambda leaf: jnp.zeros((len(rows.ts), *leaf.shape), leaf.dtype), one)
        return blame(materialise(cotangent, like), ~reached_rows(problem, self.report, rows.ts))

    def _per_slot(self, cotangent: PyTree[Any], one: Arrays, keep_zero: bool = False) -> Arrays | None:
        """The cotangents of what was saved in every slot, with zeros behind them up to the tape's length."""
        if is_zero(cotangent) and not keep_zero:
            return None
        slots = self.integrator.slots(self.problem)
        padding = self.tape.times.shape[0] - slots
        given = materialise(cotangent, tree.buffer(slots, one))
        return tree.map(lambda leaf: jnp.pad(leaf, [(0, padding), *[(0, 0)] * (leaf.ndim - 1)]), given)

    def _standing_still(self, tape: Tape) -> Tape:
        """The tape of a given grid, where it goes on behind a failure, with steps of no length there."""
        if self.integrator.grid_steps(self.problem) is None:
            return tape
        taken = jnp.arange(tape.times.shape[0]) <= self.report.stats.accepted
        return dataclasses.replace(tape, times=jnp.where(taken, tape.times, self.report.reached))

    @property
    def blamed(self) -> Bool[Array, ""]:
        """Whether the loss depends on something that was not reached."""
        asked = [self.y1_cotangent, *self.row_cotangents]
        return (self.report.status != Status.SUCCESS) & ~tree.all_finite([g for g in asked if g is not None])

    def final_cotangent(self) -> Arrays:
        """dJ/dy1, NaN where the loss depends on something that was not reached."""
        return unknown_if(self.blamed, self.y1_cotangent)

    def run(self, a: Arrays) -> _Swept:
        """From a(t1) to a(t0)."""
        swept = _Swept(
            a,
            unknown_if(self.blamed, tree.zeros_like(self.problem.parameters)),
            tuple(tree.zeros_like(eqx.filter(rows.fn, eqx.is_inexact_array)) for rows in self.requests.rows),
            tuple(self._count_until(rows.ts, self.report.reached) for rows in self.requests.rows),
        )
        count, segment = max_lane(self.report.slots), self.tape.segment
        if self.tape.segments == 1:
            return self._observed_at_t0(self._reverse_chunks(jnp.int32(0), count, self.tape.recent, swept))
        last = jnp.maximum(count - 1, 0) // segment

        def reverse_segment(reversed_index: Array, carry: tuple[Arrays, _Swept]) -> tuple[Arrays, _Swept]:
            states, swept = carry
            index = last - reversed_index
            begin = index * segment
            end = jnp.minimum(count, begin + segment)
            states = tree.put(states, jnp.int32(0), tree.take(self.tape.checkpoints, index))
            states = self._replay(begin, jnp.where(index == last, begin, end - 1), states)
            return states, self._reverse_chunks(begin, end - begin, states, swept)

        swept = jax.lax.fori_loop(0, last + 1, reverse_segment, (self.tape.recent, swept))[1]
        return self._observed_at_t0(swept)

    def _count_until(self, ts: Float[Array, " rows"], t: Scalar) -> Int[Array, ""]:
        return jnp.sum(ts * self.direction <= t * self.direction, dtype=jnp.int32)

    def _replay(self, begin: Int[Array, ""], end: Int[Array, ""], states: Arrays) -> Arrays:
        """Take the steps from slot `begin` to `end` again, of which the first state is known."""
        times = self.tape.times

        def take_step(slot: Array, states: Arrays) -> Arrays:
            interval = self.integrator.controller.interval(tree.take(times, slot), tree.take(times, slot + 1))
            y = tree.take(states, slot - begin)
            step = self.solver.step(self.problem.field, interval, y, None)
            y1 = tree.where(interval.end != interval.start, step.y1, y)
            return tree.put(states, slot - begin + 1, y1)

        return jax.lax.fori_loop(begin, end, take_step, states)

    def _reverse_chunks(self, begin: Int[Array, ""], count: Int[Array, ""], states: Arrays, swept: _Swept) -> _Swept:
        """Reverse the `count` steps from slot `begin` on, whose first states are given."""
        chunk = self.tape.chunk
        chunks = (count + chunk - 1) // chunk

        def reverse_chunk(reversed_index: Array, swept: _Swept) -> _Swept:
            first = (chunks - 1 - reversed_index) * chunk
            slot = begin + first
            steps = _Steps(
                tree.take_block(self.tape.times, slot, chunk),
                tree.take_block(self.tape.times, slot + 1, chunk),
                tree.take_block(states, first, chunk),
            )
            valid = jnp.minimum(chunk, count - first)
            swept, observed = self._observed_inside(slot, valid, steps, swept)
            return self._reverse_steps(valid, steps, observed, swept)

        return jax.lax.fori_loop(0, chunks, reverse_chunk, swept)

    def _reverse_steps(self, count: Int[Array, ""], steps: _Steps, observed: _Observed, swept: _Swept) -> _Swept:
        """Reverse the first `count` steps of a chunk."""

        def reverse_step(reversed_index: Array, carry: tuple[Arrays, PyTree[Any]]) -> tuple[Arrays, PyTree[Any]]:
            a, parameters = carry
            start, end, y = tree.take(steps, count - 1 - reversed_index)
            y1, y0, coefficients = tree.take(observed, count - 1 - reversed_index)
            a = a if y1 is None else tree.add(a, y1)
            y0 = tree.zeros_like(y) if y0 is None else y0
            cotangent = StepCotangent(a, y0, coefficients)
            interval = self.integrator.controller.interval(start, end)
            through, gradient = self.solver.transposed_step(self.problem, interval, y, cotangent)
            taken = start != end
            gradient = tree.where(taken, gradient, tree.zeros_like(gradient))
            return tree.where(taken, through, tree.add(a, y0)), tree.add(parameters, gradient)

        a, parameters = jax.lax.fori_loop(0, count, reverse_step, (swept.a, swept.parameters))
        return swept._replace(a=a, parameters=parameters)

    def _observed_inside(
        self, slot: Int[Array, ""], valid: Int[Array, ""], steps: _Steps, swept: _Swept
    ) -> tuple[_Swept, _Observed]:
        chunk = self.tape.chunk
        y1 = None if self.states is None else tree.take_block(self.states, slot, chunk)
        y0 = coefficients = None
        if self.dense_y0 is not None:
            y0 = tree.take_block(self.dense_y0, slot, chunk)
            coefficients = tree.take_block(self.dense_coefficients, slot, chunk)
        for index, g in enumerate(self.row_cotangents):
            if g is not None:
                swept, from_rows = _RowPull(self, index, valid, steps, g).run(swept)
                y0 = from_rows.y0 if y0 is None else tree.add(y0, from_rows.y0)
                more = from_rows.coefficients
                coefficients = more if coefficients is None else tree.add(coefficients, more)
        return swept, _Observed(y1, y0, coefficients)

    def _observed_at_t0(self, swept: _Swept) -> _Swept:
        """Rows saved at t0 itself, which lie in no step."""
        problem = self.problem
        for index, (rows, g) in enumerate(zip(self.requests.rows, self.row_cotangents, strict=True)):
            if g is not None:
                at_t0 = tree.map(lambda leaf, rows=rows: jnp.sum(_rows_where(rows.ts == problem.t0, leaf), axis=0), g)
                a, observables, args = pull_row(rows, problem, problem.t0, problem.y0, at_t0)
                swept = _with_observables(swept, index, observables, args)
                swept = swept._replace(a=tree.add(swept.a, a))
        if self.dense_y0 is not None:
            first = tree.add(swept.a, tree.take(self.dense_y0, jnp.int32(0)))
            swept = swept._replace(a=tree.where(self.report.slots == 0, first, swept.a))
        return swept


def _rows_where(predicate: Bool[Array, " rows"], leaf: Array) -> Array:
    """The rows for which the predicate holds, zero in place of the others."""
    return jnp.where(predicate.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0)


def pull_row(
    rows: Rows, problem: Problem, t: Scalar, y: Arrays, cotangent: Arrays
) -> tuple[Arrays, PyTree[Any], PyTree[Any]]:
    """The derivatives of one saved row: with respect to the state, to the leaves of `fn`, and to `args`."""
    fn, fixed_fn = eqx.partition(rows.fn, eqx.is_inexact_array)
    args, fixed_args = eqx.partition(problem.args, eqx.is_inexact_array)
    if rows.fn is None:
        return cotangent, fn, tree.zeros_like(args)

    def row(y: Arrays, fn: PyTree[Any], args: PyTree[Any]) -> Arrays:
        return Rows(rows.ts, eqx.combine(fn, fixed_fn)).apply(t, y, eqx.combine(args, fixed_args))

    return jax.vjp(row, y, fn, args)[1](cotangent)


def _with_observables(swept: _Swept, index: int, observables: PyTree[Any], args: PyTree[Any]) -> _Swept:
    """Add derivatives with respect to the leaves of the fn of one request, and to args."""
    all_observables = list(swept.observables)
    all_observables[index] = tree.add(all_observables[index], observables)
    vector_field, args_before = swept.parameters
    return swept._replace(observables=tuple(all_observables), parameters=(vector_field, tree.add(args_before, args)))


PULLED_ROWS = 8
"""Rows that are pulled back at a time."""


class _RowPull(NamedTuple):
    """The rows of one request that were saved inside a chunk of steps, pulled back to the steps' interpolants."""

    sweep: _Sweep
    request: int
    valid: Int[Array, ""]
    steps: _Steps
    cotangent: Arrays

    def run(self, swept: _Swept) -> tuple[_Swept, _Observed]:
        y0 = tree.zeros_like(self.steps.ys)
        coefficients = tree.map(lambda leaf: jnp.zeros((len(leaf), self._degree, *leaf.shape[1:]), leaf.dtype), y0)
        interpolants = self._interpolants()

        def more(carry: tuple[_Swept, _Observed]) -> Array:
            return any_lane(self._inside(carry[0].remaining[self.request] - 1))

        def pull(carry: tuple[_Swept, _Observed]) -> tuple[_Swept, _Observed]:
            return self._pull_block(interpolants, *carry)

        return jax.lax.while_loop(more, pull, (swept, _Observed(None, y0, coefficients)))

    @property
    def _rows(self) -> Rows:
        return self.sweep.requests.rows[self.request]

    @property
    def _degree(self) -> int:
        return self.sweep.solver.dense_degree

    def _inside(self, place: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether the row lies behind the start of the chunk; those behind its end have been pulled back already."""
        direction = self.sweep.direction
        t = tree.take(self._rows.ts, place)
        return (place >= 0) & (t * direction > self.steps.starts[0] * direction)

    def _interpolants(self) -> Interpolant:
        """The interpolants of the steps. Without an fn, only their times are needed."""
        solver, problem, (starts, ends, ys) = self.sweep.solver, self.sweep.problem, self.steps
        if self._rows.fn is None:
            return Interpolant(starts, ends, ys, None)

        def interpolant(start: Scalar, end: Scalar, y: Arrays) -> Interpolant:
            interval = self.sweep.integrator.controller.interval(start, end)
            step = solver.step(problem.field, interval, y, None)
            return solver.interpolant(solver.with_dense_stages(problem.field, step))

        return jax.vmap(interpolant)(starts, ends, ys)

    def _pull_block(self, interpolants: Interpolant, swept: _Swept, observed: _Observed) -> tuple[_Swept, _Observed]:
        remaining = swept.remaining[self.request]
        places = remaining - 1 - jnp.arange(min(len(self._rows.ts), PULLED_ROWS), dtype=jnp.int32)
        inside = jax.vmap(self._inside)(places)
        at, a, observables, args, weights = jax.vmap(lambda p, i: self._pull(interpolants, p, i))(places, inside)
        swept = _with_observables(swept, self.request, *(tree.map(_total, part) for part in (observables, args)))
        left = list(swept.remaining)
        left[self.request] = remaining - jnp.sum(inside, dtype=jnp.int32)
        of_step = at[:, None] == jnp.arange(self.sweep.tape.chunk)
        y0 = tree.map(lambda g: _total(_outer(of_step, g)), a)
        weights = of_step[:, :, None] * weights[:, None, :]
        coefficients = tree.map(lambda g: _total(_outer(weights, g)), a)
        observed = _Observed(None, tree.add(observed.y0, y0), tree.add(observed.coefficients, coefficients))
        return swept._replace(remaining=tuple(left)), observed

    def _pull(
        self, interpolants: Interpolant, place: Int[Array, ""], inside: Bool[Array, ""]
    ) -> tuple[Int[Array, ""], Arrays, PyTree[Any], PyTree[Any], Float[Array, " degree"]]:
        """The step in which a row lies; the row's derivatives; the weights of the step's coefficients."""
        direction = self.sweep.direction
        t = jnp.where(inside, tree.take(self._rows.ts, place), self.steps.starts[0])
        passed = (self.steps.ends * direction < t * direction) & (jnp.arange(self.sweep.tape.chunk) < self.valid)
        at = jnp.sum(passed, dtype=jnp.int32)
        interpolant = tree.take(interpolants, at)
        g = tree.take(self.cotangent, place)
        g = tree.where(inside, g, tree.zeros_like(g))
        y = g if self._rows.fn is None else interpolant.evaluate(t)
        return at, *pull_row(self._rows, self.sweep.problem, t, y, g), powers(interpolant.fraction(t), self._degree)


def _total(leaf: Array) -> Array:
    return jnp.sum(leaf, axis=0)


def _outer(weights: Array, g: Array) -> Array:
    """weights[row, ...] times g[row, ...], for all pairs of their other axes."""
    weights = weights.astype(tree.real_dtype(g.dtype))
    return weights.reshape(*weights.shape, *[1] * (g.ndim - 1)) * g.reshape(len(g), *[1] * (weights.ndim - 1), *g.shape[1:])
