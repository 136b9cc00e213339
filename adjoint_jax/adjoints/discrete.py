"""The discrete adjoint: the transposed method on the forward's own grid."""

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
    recorders,
    saved,
    times_cotangent,
)
from adjoint_jax.integrate import Integrator, Report
from adjoint_jax.interpolation import Interpolant, powers
from adjoint_jax.lanes import any_lane, max_lane
from adjoint_jax.problem import Interval, Problem
from adjoint_jax.recorders import AbstractRecorder, Place, RowRecorder
from adjoint_jax.saveat import Requests, Rows
from adjoint_jax.solution import Status
from adjoint_jax.solvers.explicit_runge_kutta import Step, StepCotangent
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


class Tape(NamedTuple):
    """The times of all steps; the states at the start of every step of the last segment; those at the start of every
    segment."""

    times: Float[Array, " slots_and_one"]
    recent: Arrays
    checkpoints: Arrays

    @property
    def segment(self) -> int:
        """Steps from one checkpoint to the next."""
        return jax.tree.leaves(self.recent)[0].shape[0]


class TapeRecorder(AbstractRecorder):
    """Records what the reverse sweep needs, in segments of at least `length` steps."""

    length: int = eqx.field(static=True)
    slots: int = eqx.field(static=True)

    @property
    def segment_limit(self) -> int | None:
        return None if self.length >= self.slots else self.length

    def start(self, problem: Problem, slots: int, segment: int) -> Tape:
        length = slots if self.segment_limit is None else min(slots, segment * math.ceil(self.length / segment))
        return Tape(
            jnp.full(slots + 1, problem.t0),
            tree.buffer(length, problem.y0),
            tree.buffer(math.ceil(slots / length), problem.y0),
        )

    def step(self, record: Tape, place: Place, step: Step, accepted: Bool[Array, ""]) -> Tape:
        del accepted
        times = tree.put(record.times, place.slot + 1, step.interval.end)
        return record._replace(times=times, recent=tree.put(record.recent, place.slot % record.segment, step.y0))

    def flush(self, record: Tape, place: Place, now: Scalar) -> Tape:
        del now
        index = jnp.maximum(place.slot - 1, 0) // record.segment
        first = tree.map(lambda leaf: leaf[0], record.recent)
        return record._replace(checkpoints=tree.put(record.checkpoints, index, first))


def tape_recorder(checkpoints: int | None, integrator: Integrator, problem: Problem) -> TapeRecorder:
    """The recorder with a segment length that suits the sizes known at trace time."""
    state_bytes = max(1, tree.size_in_bytes(problem.y0))
    grid_steps = integrator.grid_steps(problem)
    slots = integrator.max_steps if grid_steps is None else grid_steps
    if checkpoints is not None:
        length = math.ceil(slots / checkpoints)
    elif grid_steps is None:
        length = max(math.isqrt(slots), LANE_SEGMENT_BYTES // state_bytes)
    else:
        length = slots if slots * state_bytes <= KEEP_ALL_BYTES else math.isqrt(slots)
    return TapeRecorder(min(slots, length), slots)


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
    return (saved(inputs.requests, outcome), outcome.report), residuals


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
        ts = None if states is None or g is None else times_cotangent(problem, request, states, g)
        rows.append(Rows(ts, swept.observables[index]))
    return Inputs(Problem(vector_field, args, swept.a, t0, t1), Requests(tuple(rows), requests.states, requests.dense))


class _Swept(NamedTuple):
    """What the reverse sweep carries: a = dJ/dy, dJ/dparameters, dJ/d(leaves of each fn), and how many rows of each
    request lie before the current step."""

    a: Arrays
    parameters: PyTree[Any]
    observables: tuple[PyTree[Any], ...]
    remaining: tuple[Int[Array, ""], ...]


class _Sweep:
    """The reverse adjoint ODE, discretised by the transposed method on the recorded grid."""

    def __init__(self, inputs: Inputs, integrator: Integrator, residuals: _Residuals, cotangent: Saved):
        self.problem, self.requests = inputs
        self.integrator, self.solver = integrator, integrator.solver
        self.tape, self.report, self.y1 = residuals.tape, residuals.report, residuals.y1
        self.direction = jnp.where(self.problem.t1 < self.problem.t0, -1, 1).astype(self.problem.t0.dtype)
        self.cotangent = cotangent
        self.row_cotangents = [self._rows(*pair) for pair in zip(self.requests.rows, cotangent.rows, strict=True)]

    def _rows(self, rows: Rows, cotangent: PyTree[Any]) -> Arrays | None:
        if is_zero(cotangent):
            return None
        problem = self.problem
        one = jax.eval_shape(rows.apply, problem.t0, problem.y0, problem.args)
        like = tree.map(lambda leaf: jnp.zeros((len(rows.ts), *leaf.shape), leaf.dtype), one)
        return blame(materialise(cotangent, like), self._unreached(rows.ts))

    def _unreached(self, ts: Float[Array, "..."]) -> Bool[Array, "..."]:
        return (self.report.status != Status.SUCCESS) & ~(ts * self.direction <= self.report.reached * self.direction)

    def final_cotangent(self) -> Arrays:
        """dJ/dy1, NaN where the loss depends on something that was not reached."""
        g = materialise(self.cotangent.y1, self.y1)
        g = blame(g, self.report.status != Status.SUCCESS)
        blamed = [~tree.all_finite(rows) for rows in self.row_cotangents if rows is not None]
        any_blamed = (self.report.status != Status.SUCCESS) & jnp.any(jnp.array([False, *blamed]))
        return tree.map(lambda leaf: jnp.where(any_blamed, jnp.nan, leaf), g)

    def run(self, a: Arrays) -> _Swept:
        """From a(t1) to a(t0)."""
        swept = _Swept(
            a,
            tree.zeros_like(self.problem.parameters),
            tuple(tree.zeros_like(eqx.filter(rows.fn, eqx.is_inexact_array)) for rows in self.requests.rows),
            tuple(self._reached_rows(rows.ts) for rows in self.requests.rows),
        )
        segment, slots = self.tape.segment, self.tape.times.shape[0] - 1
        grid_steps = self.integrator.grid_steps(self.problem)
        if segment >= slots:
            count = max_lane(self.report.slots) if grid_steps is None else grid_steps
            swept = self._reverse_steps(jnp.int32(0), count, self.tape.recent, swept)
        else:
            swept = self._reverse_segments(segment, swept)
        return self._observed_at_t0(swept)

    def _reached_rows(self, ts: Float[Array, " rows"]) -> Int[Array, ""]:
        return jnp.sum(ts * self.direction <= self.report.reached * self.direction, dtype=jnp.int32)

    def _reverse_segments(self, segment: int, swept: _Swept) -> _Swept:
        count = max_lane(self.report.slots)
        last = jnp.maximum(count - 1, 0) // segment

        def reverse_segment(reversed_index: Array, carry: tuple[Arrays, _Swept]) -> tuple[Arrays, _Swept]:
            states, swept = carry
            index = last - reversed_index
            begin = index * segment
            end = jnp.minimum(count, begin + segment)
            states = tree.put(states, jnp.int32(0), tree.take(self.tape.checkpoints, index))
            states = self._replay(begin, jnp.where(index == last, begin, end - 1), states)
            return states, self._reverse_steps(begin, end - begin, states, swept)

        return jax.lax.fori_loop(0, last + 1, reverse_segment, (self.tape.recent, swept))[1]

    def _replay(self, begin: Int[Array, ""], end: Int[Array, ""], states: Arrays) -> Arrays:
        """Take the steps from slot `begin` to `end` again, of which the first state is known."""

        def take_step(slot: Array, states: Arrays) -> Arrays:
            interval, y = self._interval(slot), tree.take(states, slot - begin)
            step = self.solver.step(self.problem.field, interval, y, None)
            y1 = tree.where(interval.end != interval.start, step.y1, y)
            return tree.put(states, slot - begin + 1, y1)

        return jax.lax.fori_loop(begin, end, take_step, states)

    def _interval(self, slot: Int[Array, ""]) -> Interval:
        times = self.tape.times
        return self.integrator.controller.interval(tree.take(times, slot), tree.take(times, slot + 1))

    def _reverse_steps(self, begin: Int[Array, ""], count: Any, states: Arrays, swept: _Swept) -> _Swept:
        """Reverse the `count` steps from slot `begin` on, whose first states are given."""

        def reverse_step(reversed_index: Array, swept: _Swept) -> _Swept:
            slot = begin + count - 1 - reversed_index
            return self._reverse_step(slot, tree.take(states, slot - begin), swept)

        return jax.lax.fori_loop(0, count, reverse_step, swept)

    def _reverse_step(self, slot: Int[Array, ""], y: Arrays, swept: _Swept) -> _Swept:
        interval = self._interval(slot)
        swept, cotangent = self._observed_inside(slot, interval, y, swept)
        a, parameters = self.solver.transposed_step(self.problem, interval, y, cotangent)
        taken = interval.end != interval.start
        return swept._replace(
            a=tree.where(taken, a, tree.add(cotangent.y1, cotangent.y0)),
            parameters=tree.add(swept.parameters, tree.where(taken, parameters, tree.zeros_like(parameters))),
        )

    def _observed_inside(
        self, slot: Int[Array, ""], interval: Interval, y: Arrays, swept: _Swept
    ) -> tuple[_Swept, StepCotangent]:
        """What the loss says of this step's end, its start and its interpolant."""
        states, dense = self.cotangent.states, self.cotangent.dense
        a = swept.a
        if states is not None and not is_zero(states.ys):
            a = tree.add(a, tree.take(materialise(states.ys, tree.buffer(self._slots, y)), slot))
        start, coefficients = tree.zeros_like(y), tree.buffer(self.solver.dense_degree, y)
        interpolated = any(rows is not None for rows in self.row_cotangents)
        if dense is not None and not is_zero((dense.y0, dense.coefficients)):
            interpolated = True
            start = tree.take(materialise(dense.y0, tree.buffer(self._slots, y)), slot)
            coefficients = tree.take(materialise(dense.coefficients, tree.buffer(self._slots, coefficients)), slot)
        for index, g in enumerate(self.row_cotangents):
            if g is not None:
                pull = _RowPull(self, index, interval, y, g)
                swept, start, coefficients = pull.run(swept, start, coefficients)
        return swept, StepCotangent(a, start, coefficients if interpolated else None)

    @property
    def _slots(self) -> int:
        return self.tape.times.shape[0] - 1

    def _observed_at_t0(self, swept: _Swept) -> _Swept:
        """Rows saved at t0 itself, which lie in no step."""
        problem = self.problem
        for index, (rows, g) in enumerate(zip(self.requests.rows, self.row_cotangents, strict=True)):
            if g is None:
                continue
            at_t0 = rows.ts == problem.t0

            def masked(leaf: Array, at_t0: Array = at_t0) -> Array:
                return jnp.sum(jnp.where(at_t0.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0), axis=0)

            a, observables, args = pull_row(rows, problem, problem.t0, problem.y0, tree.map(masked, g))
            swept = _with_observables(swept, index, observables, args)._replace(a=tree.add(swept.a, a))
        dense = self.cotangent.dense
        if dense is not None and not is_zero(dense.y0):
            first = tree.take(materialise(dense.y0, tree.buffer(self._slots, problem.y0)), jnp.int32(0))
            no_steps = self.report.slots == 0
            swept = swept._replace(a=tree.where(no_steps, tree.add(swept.a, first), swept.a))
        return swept


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


class _RowPull(NamedTuple):
    """The rows of one request that were saved inside one step, pulled back to the step's interpolant, a few at a time."""

    sweep: _Sweep
    index: int
    interval: Interval
    y: Arrays
    cotangent: Arrays

    def run(self, swept: _Swept, start: Arrays, coefficients: Arrays) -> tuple[_Swept, Arrays, Arrays]:
        rows = self.sweep.requests.rows[self.index]
        interpolant = self._interpolant(rows)
        block = min(len(rows.ts), BLOCK)

        def inside(place: Array) -> Array:
            t = tree.take(rows.ts, place)
            return (place >= 0) & (t * self.sweep.direction > self.interval.start * self.sweep.direction)

        def pull_block(carry: tuple[_Swept, Arrays, Arrays]) -> tuple[_Swept, Arrays, Arrays]:
            swept, start, coefficients = carry
            remaining = swept.remaining[self.index]
            places = remaining - 1 - jnp.arange(block, dtype=jnp.int32)
            taken = jax.vmap(inside)(places)
            a, observables, args, weights = jax.vmap(lambda p, k: self._pull(rows, interpolant, p, k))(places, taken)
            total = lambda leaf: jnp.sum(leaf, axis=0)  # noqa: E731
            swept = _with_observables(swept, self.index, tree.map(total, observables), tree.map(total, args))
            left = list(swept.remaining)
            left[self.index] = remaining - jnp.sum(taken, dtype=jnp.int32)
            moments = tree.map(lambda g: _moments(weights, g), a)
            return (
                swept._replace(remaining=tuple(left)),
                tree.add(start, tree.map(total, a)),
                tree.add(coefficients, moments),
            )

        def more(carry: tuple[_Swept, Arrays, Arrays]) -> Array:
            return any_lane(inside(carry[0].remaining[self.index] - 1))

        return jax.lax.while_loop(more, pull_block, (swept, start, coefficients))

    def _interpolant(self, rows: Rows) -> Interpolant:
        """This step's interpolant. Without an fn, only its times are needed."""
        solver, problem = self.sweep.solver, self.sweep.problem
        if rows.fn is None:
            none = tree.buffer(solver.dense_degree, self.y)
            return Interpolant(self.interval.start, self.interval.end, self.y, none)
        step = solver.step(problem.field, self.interval, self.y, None)
        return solver.interpolant(solver.with_dense_stages(problem.field, step))

    def _pull(
        self, rows: Rows, interpolant: Interpolant, place: Int[Array, ""], taken: Bool[Array, ""]
    ) -> tuple[Arrays, PyTree[Any], PyTree[Any], Float[Array, " degree"]]:
        t = jnp.where(taken, tree.take(rows.ts, place), interpolant.start)
        g = tree.take(self.cotangent, place)
        g = tree.where(taken, g, tree.zeros_like(g))
        y = interpolant.evaluate(t)
        a, observables, args = pull_row(rows, self.sweep.problem, t, y, g)
        return a, observables, args, powers(interpolant.fraction(t), self.sweep.solver.dense_degree)


BLOCK = 4
"""Rows that are pulled back at a time. A step of an adaptive method rarely has more in it."""


def _moments(weights: Float[Array, "rows degree"], g: Array) -> Array:
    """sum over rows of weights[row, p] g[row]: the cotangent of the interpolant's coefficients."""
    weights = weights.astype(tree.real_dtype(g.dtype))
    return jnp.sum(weights.reshape(*weights.shape, *[1] * (g.ndim - 1)) * g[:, None], axis=0)
