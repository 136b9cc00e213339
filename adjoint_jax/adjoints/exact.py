"""The reverse adjoint ODE, discretised by the transposed method on the forward's own grid: what the exact adjoints share.

They differ in how the states before the steps are recovered on the way back, which their trail knows.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from adjoint_jax import tree
from adjoint_jax.adjoints.adjoint import (
    AbstractAdjoint,
    AtEnd,
    Inputs,
    Run,
    Saved,
    blame,
    ends_cotangent,
    integrate,
    is_zero,
    materialise,
    problem_cotangent,
    reached_rows,
    recorders,
    said_of_end,
    saved,
    times_cotangent,
)
from adjoint_jax.adjoints.keep import AbstractKeep
from adjoint_jax.adjoints.memory import Memory
from adjoint_jax.adjoints.rows import Pulled, RowPull, Steps, pull_row
from adjoint_jax.adjoints.trail import AbstractTrail, Segment, Walked, Way
from adjoint_jax.ends import AbstractEnds, Stride
from adjoint_jax.errors import raise_on_reverse_failure
from adjoint_jax.forward_only import gradient_once
from adjoint_jax.integrate import Integrator, Report
from adjoint_jax.lanes import flat, shaped
from adjoint_jax.problem import Parameters, Problem
from adjoint_jax.recorders import AbstractRecorder, RowRecorder
from adjoint_jax.reverse_only import gradient_in_reverse
from adjoint_jax.saveat import Requests, Rows
from adjoint_jax.solution import Status
from adjoint_jax.solvers.solver import StepOutputs
from adjoint_jax.tree import Arrays, Scalar

FEW_BYTES = 2**21
"""Of parameters: a single thread sets so many to zero in 0.1 ms."""


class AbstractExactAdjoint(AbstractAdjoint):
    """An adjoint that is exact for the computed solution: it transposes every step."""

    @abc.abstractmethod
    def recorders(self, integrator: Integrator, inputs: Inputs) -> list[AbstractRecorder]:
        """One, which records a trail."""

    def memory(self, way: Way, records: Sequence[Any]) -> Memory:
        return records[0].memory(way)

    def drift_limit(self, problem: Problem) -> Scalar:
        """How far the state recovered at t0 may be from y0, in parts of its size, before the gradient is in doubt."""
        return jnp.full((), jnp.inf, problem.t0.dtype)

    def solve(self, inputs: Inputs, run: Run) -> tuple[Saved, Report]:
        return _solve(gradient_in_reverse(inputs), run, self)


@eqx.filter_custom_vjp
def _solve(inputs: Inputs, run: Run, adjoint: AbstractExactAdjoint) -> tuple[Saved, Report]:
    del adjoint
    return integrate(inputs, run)


class Residuals(NamedTuple):
    """The trail; the method's last state; the states at save times whose own derivative is wanted; the report."""

    trail: AbstractTrail
    last: Arrays
    row_states: tuple[Arrays | None, ...]
    report: Report


def forward(
    perturbed: Inputs, inputs: Inputs, run: Run, adjoint: AbstractExactAdjoint
) -> tuple[tuple[Saved, Report], Residuals]:
    """The solve, and what its derivative needs."""
    integrator = run.integrator
    wanted = recorders(inputs, integrator)
    times_wanted = [rows.ts for rows in perturbed.requests.rows]
    plain = [Rows(rows.ts, None) for rows, is_wanted in zip(inputs.requests.rows, times_wanted, strict=True) if is_wanted]
    extra = [RowRecorder(rows, inputs.problem, integrator.solver) for rows in plain]
    outcome = integrator(inputs.problem, [*wanted, *extra, *adjoint.recorders(integrator, inputs)], run.valid)
    states = iter(outcome.records[len(wanted) :])
    row_states = tuple(next(states).rows if is_wanted else None for is_wanted in times_wanted)
    residuals = Residuals(outcome.records[-1], outcome.state, row_states, outcome.report)
    return (saved(inputs, integrator, outcome), outcome.report), residuals


def backward(
    residuals: Residuals,
    cotangent: tuple[Saved, Report],
    perturbed: Inputs,
    inputs: Inputs,
    run: Run,
    adjoint: AbstractExactAdjoint,
) -> Inputs:
    """The derivatives with respect to all inputs."""
    inputs = tree.as_jax(inputs)
    integrator, requests, solver = run.integrator, inputs.requests, run.integrator.solver
    problem = inputs.problem.without_cost() if is_zero(cotangent[0].cost) else inputs.problem
    sweep = _Sweep(Way(problem, integrator, residuals.report, residuals.last), requests, residuals.trail, cotangent[0])
    swept, drift = problem.compute(sweep.run, interpolated=requests.interpolated)
    swept = sweep.observed_at_t0(swept)
    if drift is not None:
        lost = tree.any_nonzero(cotangent[0]) & ~(drift <= adjoint.drift_limit(problem))
        swept = tree.unknown_if(lost, swept)
        if run.throw:
            status = jnp.where(lost, Status.REVERSE_DRIFT, Status.SUCCESS)
            swept = raise_on_reverse_failure(swept, status, problem.t0)

    def start(y0: Arrays, parameters: Parameters) -> Arrays:
        return solver.start(dataclasses.replace(problem.at(parameters), y0=y0))

    a0, parameters = jax.vjp(start, problem.y0, problem.parameters)[1](swept.a)
    parameters = tree.add(swept.parameters, parameters)
    at_t1 = solver.output(residuals.last), sweep.at_end.y1
    ends = ends_cotangent(problem, integrator, perturbed.problem, at_t1, a0, sweep.at_end.cost)
    rows = []
    for request, states, g, pulled in zip(
        requests.rows, residuals.row_states, sweep.row_cotangents, swept.rows, strict=True
    ):
        ts = jnp.zeros_like(request.ts)
        if states is not None and g is not None:
            ts = times_cotangent(problem, request, states, reached_rows(problem, residuals.report, request.ts), g)
        rows.append(Rows(ts, pulled.fn))
        parameters = parameters._replace(args=tree.add(parameters.args, pulled.args))
    requested = Requests(tuple(rows), requests.states, requests.dense)
    return gradient_once(Inputs(problem_cotangent(inputs.problem, parameters, a0, ends), requested))


_solve.def_fwd(forward)
_solve.def_bwd(backward)


class _Swept(NamedTuple):
    """What the reverse sweep carries: dJ/d(the method's state); what is gathered for dJ/dparameters, which it is in the
    end; and what was pulled back of the rows."""

    a: Arrays
    parameters: Any
    rows: tuple[Pulled, ...]


class _KeptSteps(NamedTuple):
    """A chunk of recorded steps, along a leading axis: where they start and end, and what is kept of them."""

    strides: Stride
    kept: Any


class _Observed(NamedTuple):
    """What the loss says directly of a step, or of a chunk of them: of y behind it and before it, and of its interpolant's
    coefficients, one power after the other."""

    y1: Arrays | None
    y0: Arrays | None
    coefficients: list[Arrays] | None


class _Sweep:
    """The reverse adjoint ODE on the recorded grid: over segments, over the chunks of a segment, and over the steps of a
    chunk, each from the last to the first."""

    def __init__(self, way: Way, requests: Requests, trail: AbstractTrail, cotangent: Saved):
        self.way, self.requests, self.trail = way, requests, trail
        self.problem, self.solver, keep = way.problem, way.integrator.solver, trail.keep
        assert isinstance(keep, AbstractKeep)
        self.keep = keep
        self.gathering = keep.gathering(self.problem, self.solver, interpolated=requests.interpolated)
        self.row_cotangents = [self._rows(*pair) for pair in zip(requests.rows, cotangent.rows, strict=True)]
        self.at_end, self.begun = self._begun(cotangent)
        self.states = self.dense_y0 = self.dense_coefficients = None
        if cotangent.states is not None and not is_zero(cotangent.states.ys):
            self.states = self._per_slot(cotangent.states.ys, self.problem.y0)
        if cotangent.dense is not None and not is_zero((cotangent.dense.y0, cotangent.dense.coefficients)):
            degree = self.solver.dense_degree
            stacked = self._per_slot(cotangent.dense.coefficients, tree.buffer(degree, self.problem.y0))
            self.dense_y0 = self._per_slot(cotangent.dense.y0, self.problem.y0)
            self.dense_coefficients = [tree.map(lambda leaf, p=p: leaf[:, p], stacked) for p in range(degree)]
        if self._asks_of_the_end_alone:
            self.way = way.to_the_end_or_none()

    @property
    def _asks_of_the_end_alone(self) -> bool:
        return self.states is self.dense_y0 is None and all(g is None for g in self.row_cotangents)

    def _begun(self, cotangent: Saved) -> tuple[AtEnd, Any]:
        """What the loss says of the end, and what is gathered of dJ/dparameters before any step: in one kernel, which takes
        half as long to compile as an operation for each of them. Where parameters are many, or all of the sweep is one
        kernel, the latter is left to `run`."""
        problem, report, begun = self.problem, self.way.report, self.gathering.begun
        y1, cost = said_of_end(problem, cotangent)
        if problem.is_small:
            return AtEnd.of(report.ended, y1, cost, self.row_cotangents), None

        are_few = tree.size_in_bytes(problem.parameters) <= FEW_BYTES

        def at_end(*operands: Any) -> tuple[AtEnd, Any]:
            end = AtEnd.of(*operands)
            return end, begun(flat(tree.zeros_like(problem.parameters)), end.is_lost) if are_few else None

        end, parameters = problem.decide(at_end, report.ended, *flat((y1, cost, self.row_cotangents)))
        if are_few:
            parameters = shaped(parameters, jax.eval_shape(begun, problem.parameters, end.is_lost))
        return AtEnd(shaped(end.y1, y1), shaped(end.cost, cost), end.is_lost), parameters

    def _rows(self, rows: Rows, cotangent: PyTree[Any]) -> Arrays | None:
        if is_zero(cotangent):
            return None
        problem = self.problem
        one = jax.eval_shape(lambda t, y: rows.apply(t, y, problem.args), problem.t0, problem.y0)
        like = tree.map(lambda leaf: jnp.zeros((len(rows.ts), *leaf.shape), leaf.dtype), one)
        return blame(materialise(cotangent, like), ~reached_rows(problem, self.way.report, rows.ts))

    def _per_slot(self, cotangent: PyTree[Any], one: Arrays) -> Arrays:
        """The cotangents of what was saved in every slot, with zeros behind them up to the trail's length."""
        slots = self.way.integrator.slots
        padding = self.trail.slots - slots
        given = materialise(cotangent, tree.buffer(slots, one))
        return tree.map(lambda leaf: jnp.pad(leaf, [(0, padding), *[(0, 0)] * (leaf.ndim - 1)]), given)

    def run(self) -> Walked:
        """All steps, from t1 to t0."""
        begun = self.begun
        if begun is None:
            begun = self.gathering.begun(tree.zeros_like(self.problem.parameters), self.at_end.is_lost)
        swept = _Swept(
            self.solver.from_output(self.way.last, self.at_end.y1),
            begun,
            tuple(Pulled.nothing(rows, self.way) for rows in self.requests.rows),
        )
        swept, drift = self.trail.walk_back(self.way, self._reverse_segment, swept)
        return Walked(swept._replace(parameters=self.gathering.ended(swept.parameters)), drift)

    def _reverse_segment(self, segment: Segment, swept: _Swept) -> _Swept:
        chunk = self.trail.chunk
        chunks = tree.blocks(segment.steps, chunk)

        def reverse_chunk(reversed_index: Array, swept: _Swept) -> _Swept:
            first, strides = self._chunk(segment.ends, chunks, reversed_index)
            slot = segment.begin + first
            steps = _KeptSteps(strides, tree.take_block(segment.kept, first, chunk))
            valid = jnp.minimum(chunk, segment.steps - first) if chunk > 1 else jnp.ones((), jnp.int32)
            return self._reverse_steps(segment.ends, valid, steps, self._observed(slot), swept)

        return jax.lax.fori_loop(0, chunks, reverse_chunk, swept)

    def _chunk(
        self, ends: AbstractEnds, chunks: Int[Array, ""], reversed_index: Int[Array, ""]
    ) -> tuple[Int[Array, ""], Stride]:
        """The first step of a chunk, and where its steps start and end. One step's times are scalars as where steps are
        taken, so that XLA compiles what is computed of them to the same kernels."""
        if self.trail.chunk > 1:
            first = (chunks - 1 - reversed_index) * self.trail.chunk
            return first, ends.strides(first, self.trail.chunk)

        def only_step(
            ends: AbstractEnds, chunks: Int[Array, ""], reversed_index: Int[Array, ""]
        ) -> tuple[Int[Array, ""], Stride]:
            first = chunks - 1 - reversed_index
            return first, ends.stride(first)

        first, stride = self.problem.decide(only_step, ends, chunks, reversed_index)
        return first, tree.map(lambda t: t[None], stride)

    def _observed(self, slot: Int[Array, ""]) -> _Observed:
        """What the loss says of a chunk of steps through saved steps and dense output."""

        def chunk_of(slots: Arrays | None) -> Arrays | None:
            return None if slots is None else tree.take_block(slots, slot, self.trail.chunk)

        return _Observed(chunk_of(self.states), chunk_of(self.dense_y0), chunk_of(self.dense_coefficients))

    def _reverse_steps(
        self, ends: AbstractEnds, count: Int[Array, ""], steps: _KeptSteps, observed: _Observed, swept: _Swept
    ) -> _Swept:
        """Reverse the first `count` steps of a chunk, some of those that end at `ends`. Rows are pulled back for one step
        at a time in scalars, which lanes are computed in; otherwise for the whole chunk, so that no array in the loop over
        its steps is large (see `recorders`)."""
        step_by_step = self.problem.is_in_scalars
        strides, length = steps.strides, self.trail.chunk
        gathered = self.gathering.opened(swept.parameters, length)
        swept = swept._replace(parameters=gathered)
        if not step_by_step:
            all_steps = Steps(strides.start, strides.end, self.keep.state(steps.kept), count)
            rows, observed = self._with_rows(all_steps, observed, swept.rows)
            swept = swept._replace(rows=rows)

        def reverse_step(reversed_index: Array, swept: _Swept) -> _Swept:
            index = count - 1 - reversed_index
            at = self.problem.decide(tree.take, strides, index) if length > 1 else tree.map(lambda t: t[0], strides)
            (start, end), kept = self.problem.stored((at, tree.take(steps.kept, index)))
            interval, state, rows = self.way.interval(start, end), self.keep.state(kept), swept.rows
            of_step = tree.take_block(observed, index, 1)
            if step_by_step:
                one = Steps(start[None], end[None], tree.map(lambda leaf: leaf[None], state), jnp.ones((), jnp.int32))
                rows, of_step = self._with_rows(one, of_step, rows)
            y1, y0, coefficients = tree.map(lambda leaf: leaf[0], of_step)
            a = swept.a if y1 is None else tree.add(swept.a, self.solver.from_output(state, y1))
            y0 = tree.zeros_like(self.problem.y0) if y0 is None else y0
            cotangent = StepOutputs(a, y0, coefficients, self.at_end.cost)
            through, said = self.gathering.transposed(interval, kept, cotangent)
            taken = ends.has_length(Stride(start, end))
            through = tree.where(taken, through, tree.add(a, self.solver.from_output(state, y0)))
            return _Swept(through, self.gathering.entered(swept.parameters, index, said, taken), rows)

        if length == 1:
            swept = reverse_step(jnp.zeros((), jnp.int32), swept)
        else:
            swept = jax.lax.fori_loop(0, count, self.problem.looped(reverse_step), swept)
        return swept._replace(parameters=self.gathering.closed(swept.parameters))

    def _with_rows(
        self, steps: Steps, observed: _Observed, all_pulled: tuple[Pulled, ...]
    ) -> tuple[tuple[Pulled, ...], _Observed]:
        """What the loss says of steps, with the rows that were saved inside them."""
        rows = []
        for request, g, pulled in zip(self.requests.rows, self.row_cotangents, all_pulled, strict=True):
            if g is not None:
                pulled, more = RowPull(self.way, request, g, steps).run(pulled)
                y0, coefficients = more
                if observed.y0 is not None:
                    y0, coefficients = tree.add((observed.y0, observed.coefficients), (y0, coefficients))
                observed = observed._replace(y0=y0, coefficients=coefficients)
            rows.append(pulled)
        return tuple(rows), observed

    def observed_at_t0(self, swept: _Swept) -> _Swept:
        """With what the loss says of rows saved at t0 itself, which lie in no step."""
        problem, a, pulled_rows = self.problem, tree.zeros_like(self.problem.y0), []
        for rows, g, pulled in zip(self.requests.rows, self.row_cotangents, swept.rows, strict=True):
            if g is not None:
                at_t0 = tree.map(lambda leaf: jnp.sum(leaf, axis=0), tree.keep_rows(rows.ts == problem.t0, g))
                more, fn, args = pull_row(rows, problem, problem.t0, problem.y0, at_t0)
                pulled = Pulled(pulled.left, tree.add(pulled.fn, fn), tree.add(pulled.args, args))
                a = tree.add(a, more)
            pulled_rows.append(pulled)
        if self.dense_y0 is not None:
            first = tree.add(a, tree.take(self.dense_y0, jnp.int32(0)))
            a = tree.where(self.way.report.slots == 0, first, a)
        return swept._replace(a=tree.add(swept.a, self.solver.from_output(self.way.last, a)), rows=tuple(pulled_rows))
