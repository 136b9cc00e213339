"""What the continuous adjoints share: from the derivatives of what was saved to the observations of the reverse ODE, and
from its solution to the derivatives of the inputs.

The adjoint is linear, so it is solved for cotangents scaled to at most one: tolerances do not depend on the scale of the
loss.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

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
    observed_rows,
    problem_cotangent,
    reached_rows,
    recorders,
    said_of_end,
    saved,
    times_cotangent,
    without_observables,
)
from adjoint_jax.adjoints.reverse_ode import Observations
from adjoint_jax.adjoints.trail import Way
from adjoint_jax.errors import raise_on_reverse_failure
from adjoint_jax.forward_only import gradient_once
from adjoint_jax.integrate import Report
from adjoint_jax.lanes import max_lane, put
from adjoint_jax.problem import Parameters, Problem
from adjoint_jax.reverse_only import gradient_in_reverse
from adjoint_jax.saveat import Requests, Rows
from adjoint_jax.solution import Status
from adjoint_jax.solvers.solver import StepOutputs
from adjoint_jax.tree import Arrays, Scalar


class Final(NamedTuple):
    """Where the reverse sweep starts: the time, the state there, what the loss says of it and of the cost, and what is
    known of dJ/dparameters already."""

    t: Scalar
    y: Arrays
    a: Arrays
    cost: Arrays
    parameters: Parameters


class Swept(NamedTuple):
    """The result of a reverse sweep: dJ/dy(t0) and dJ/dparameters, NaN if it failed; its status, and when it failed."""

    a: Arrays
    parameters: Parameters
    status: Int[Array, ""]
    failure: Scalar


class AbstractContinuousAdjoint(AbstractAdjoint):
    """An adjoint that solves the reverse adjoint ODE as an ODE of its own."""

    def resets(self, way: Way, records: Sequence[Any]) -> list[Observations]:
        """States that were recorded for the sweep's own sake, as observations of which the loss says nothing."""
        del way, records
        return []

    @abc.abstractmethod
    def sweep(self, way: Way, records: Sequence[Any], observations: Observations, final: Final) -> Swept:
        """Solve the reverse ODE from the end of the way to t0."""

    def solve(self, inputs: Inputs, run: Run) -> tuple[Saved, Report]:
        problem, requests = gradient_in_reverse(inputs)
        saved, report = _solve(Inputs(problem, without_observables(requests)), run, self)
        return saved._replace(rows=observed_rows(requests, problem, saved.rows, report)), report


class _Residuals(NamedTuple):
    saved: Saved
    report: Report
    last: Arrays
    records: tuple[Any, ...]


@eqx.filter_custom_vjp
def _solve(inputs: Inputs, run: Run, adjoint: AbstractContinuousAdjoint) -> tuple[Saved, Report]:
    del adjoint
    return integrate(inputs, run)


@_solve.def_fwd
def _forward(
    perturbed: Inputs, inputs: Inputs, run: Run, adjoint: AbstractContinuousAdjoint
) -> tuple[tuple[Saved, Report], _Residuals]:
    del perturbed
    integrator, wanted = run.integrator, recorders(inputs, run.integrator)
    outcome = integrator(inputs.problem, [*wanted, *adjoint.recorders(integrator, inputs)], run.valid)
    result = saved(inputs, integrator, outcome)
    return (result, outcome.report), _Residuals(result, outcome.report, outcome.state, outcome.records[len(wanted) :])


@_solve.def_bwd
def _backward(
    residuals: _Residuals,
    cotangent: tuple[Saved, Report],
    perturbed: Inputs,
    inputs: Inputs,
    run: Run,
    adjoint: AbstractContinuousAdjoint,
) -> Inputs:
    inputs = tree.as_jax(inputs)
    problem = inputs.problem.without_cost() if is_zero(cotangent[0].cost) else inputs.problem
    way = Way(problem, run.integrator, residuals.report, residuals.last)
    asked = _Asked(way, inputs.requests, residuals.saved, cotangent[0])
    observations, final, scale = asked.scaled(adjoint.resets(way, residuals.records))
    swept = asked.answer(adjoint.sweep(way, residuals.records, observations, final))
    if run.throw:
        swept = raise_on_reverse_failure(swept, swept.status, swept.failure)
    a0, parameters = tree.scale(scale, (swept.a, swept.parameters))
    at_t1 = residuals.saved.y1, asked.y1
    ends = ends_cotangent(problem, run.integrator, perturbed.problem, at_t1, a0, asked.cost)
    all_rows = zip(inputs.requests.rows, perturbed.requests.rows, residuals.saved.rows, asked.rows, strict=True)
    ts = [
        times_cotangent(problem, rows, ys, reached_rows(problem, residuals.report, rows.ts), row)
        if wanted.ts and row is not None
        else jnp.zeros_like(rows.ts)
        for rows, wanted, ys, row in all_rows
    ]
    requested = Requests(tuple(Rows(t, None) for t in ts), inputs.requests.states, inputs.requests.dense)
    return gradient_once(Inputs(problem_cotangent(inputs.problem, parameters, a0, ends), requested))


class _Asked:
    """What the loss says of everything that was saved."""

    def __init__(self, way: Way, requests: Requests, saved: Saved, cotangent: Saved):
        self.way, self.saved = way, saved
        problem, report = way.problem, way.report
        self.rows = [
            None if is_zero(row) else blame(materialise(row, ys), ~reached_rows(problem, report, rows.ts))
            for rows, ys, row in zip(requests.rows, saved.rows, cotangent.rows, strict=True)
        ]
        self.y1, self.cost, is_lost = AtEnd.of(report.ended, *said_of_end(problem, cotangent), self.rows)
        self.sources = [
            Observations(rows.ts, ys, row)
            for rows, ys, row in zip(requests.rows, saved.rows, self.rows, strict=True)
            if row is not None
        ]
        self.parameters = tree.zeros_like(problem.parameters)
        if cotangent.states is not None and not is_zero(cotangent.states.ys):
            assert saved.states is not None
            times, ys = _padded_times(saved.states.ts, report), saved.states.ys
            self.sources.append(Observations(times, ys, materialise(cotangent.states.ys, ys)))
        if cotangent.dense is not None and not is_zero((cotangent.dense.y0, cotangent.dense.coefficients)):
            source, self.parameters = _dense_source(way, saved, cotangent)
            self.sources.append(source)
        self.parameters = tree.unknown_if(is_lost, self.parameters)

    def scaled(self, resets: list[Observations]) -> tuple[Observations, Final, Scalar]:
        """All observations in the order of their times, the end of the way, and the scale: all cotangents are divided by
        it. The sweep starts at the time reached or, where t1 was not, at that of the last observation before."""
        problem, report, direction = self.way.problem, self.way.report, self.way.problem.direction
        scale, failed = self._scale(), report.failed
        observations = self._merged([*self.sources, *resets])
        if len(observations.times):
            reached = observations.times * direction <= report.reached * direction
            last = jnp.max(jnp.where(reached, observations.times * direction, problem.t0 * direction)) * direction
            begin = jnp.where(failed, last, report.reached)

            def known(leaf: Array, fallback: Array) -> Array:
                return jnp.where(reached.reshape(-1, *[1] * fallback.ndim), leaf, fallback)

            times = jnp.where(reached, observations.times, begin)
            states = tree.map(known, observations.states, problem.y0)
            observations = Observations(times, states, tree.scale(1 / scale, observations.cotangents))
        else:
            begin = jnp.where(failed, problem.t0, report.reached)
        y = tree.where(failed, problem.y0, self.saved.y1)
        a, cost, parameters = tree.scale(1 / scale, (self.y1, self.cost, self.parameters))
        return observations, Final(begin, y, a, cost, parameters), scale

    def answer(self, swept: Swept) -> Swept:
        """The sweep's result; where nothing was asked, zero, however the reverse integration went."""
        anything = tree.any_nonzero(self._cotangents)
        a, parameters = tree.where(anything, swept[:2], tree.zeros_like(swept[:2]))
        return Swept(a, parameters, jnp.where(anything, swept.status, Status.SUCCESS), swept.failure)

    @property
    def _cotangents(self) -> PyTree[Array]:
        return [source.cotangents for source in self.sources], self.y1, self.cost

    def _scale(self) -> Scalar:
        zero = jnp.zeros_like(self.way.problem.t0)
        leaves = jax.tree.leaves(self._cotangents)
        largest = [jnp.max(jnp.abs(leaf), initial=0.0).astype(zero.dtype) for leaf in leaves]
        scale = jnp.max(jnp.stack([*largest, zero]))
        return jnp.where(scale > 0, scale, 1.0)

    def _merged(self, sources: list[Observations]) -> Observations:
        if not sources:
            problem = self.way.problem
            empty = tree.map(lambda leaf: jnp.zeros((0, *leaf.shape), leaf.dtype), problem.y0)
            return Observations(jnp.zeros(0, problem.t0.dtype), empty, empty)
        merged = tree.map(lambda *leaves: jnp.concatenate(leaves), *sources)
        if len(sources) == 1:
            return merged
        order = jnp.argsort(merged.times * self.way.problem.direction, stable=True)
        return tree.map(lambda leaf: leaf[order], merged)


def preceded_by_t0(problem: Problem, observations: Observations) -> Observations:
    """The observations, and one at t0 of which the loss says nothing."""
    at_t0 = Observations(problem.t0, problem.y0, tree.zeros_like(problem.y0))
    return tree.map(lambda leaf, first: jnp.concatenate([first[None], leaf]), observations, at_t0)


def _padded_times(times: Float[Array, " slots"], report: Report) -> Float[Array, " slots"]:
    """The times of slots, those of unused slots moved to the end."""
    return jnp.where(jnp.arange(times.shape[0]) < report.slots, times, report.reached)


def _dense_source(way: Way, saved: Saved, cotangent: Saved) -> tuple[Observations, Parameters]:
    """Each step's interpolant depends on its first state and on the parameters, through the step's own stages: their
    transpose gives an observation of the first state, and a part of dJ/dparameters. A method that carries more than y from
    step to step is started anew at every step, which is as exact as the method."""
    problem, solver, dense, g = way.problem.without_cost(), way.integrator.solver, saved.dense, cotangent.dense
    assert dense is not None
    assert g is not None
    y0_cotangents, coefficients = materialise((g.y0, g.coefficients), (dense.y0, dense.coefficients))

    def transposed(slot: Array, carry: tuple[Arrays, Parameters]) -> tuple[Arrays, Parameters]:
        cotangents, parameters = carry
        start, end, y, g, q = tree.take((dense.start, dense.end, dense.y0, y0_cotangents, coefficients), slot)

        def started(y: Arrays, parameters: Parameters) -> Arrays:
            return solver.start(dataclasses.replace(problem.at(parameters), y0=y, t0=start))

        state, to_start = jax.vjp(started, y, problem.parameters)
        outputs = StepOutputs(tree.zeros_like(state), g, tree.unstack(q, solver.dense_degree), ())
        from_step, gradient = solver.transposed_step(problem, way.interval(start, end), state, outputs)
        a, more = to_start(from_step)
        gradient = tree.add(gradient, more)
        taken = start != end
        gradient = tree.where(taken, gradient, tree.zeros_like(gradient))
        return put(cotangents, slot, tree.where(taken, a, g)), tree.add(parameters, gradient)

    initial = y0_cotangents, tree.zeros_like(problem.parameters)
    cotangents, parameters = jax.lax.fori_loop(0, max_lane(way.report.slots), transposed, initial)
    parameters = parameters._replace(running_cost=tree.zeros_like(way.problem.parameters.running_cost))
    return Observations(_padded_times(dense.start, way.report), dense.y0, cotangents), parameters
