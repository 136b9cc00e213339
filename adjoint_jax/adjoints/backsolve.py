"""The adjoint of Chen et al.: the state is integrated backward together with its adjoint."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, PyTree

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
    times_cotangent,
    unknown_if,
)
from adjoint_jax.adjoints.reverse_ode import Observations, ReverseState, sweep
from adjoint_jax.controllers.controller import AbstractController
from adjoint_jax.integrate import Integrator, Report
from adjoint_jax.lanes import max_lane
from adjoint_jax.problem import Problem
from adjoint_jax.saveat import Requests, Rows
from adjoint_jax.solution import Status
from adjoint_jax.solvers.explicit_runge_kutta import ExplicitRungeKutta, StepCotangent
from adjoint_jax.tree import Arrays, Scalar


class BacksolveAdjoint(AbstractAdjoint):
    """The continuous adjoint with the state recomputed backward in time (Chen, Rubanova, Bettencourt and Duvenaud, "Neural
    ordinary differential equations", NeurIPS 2018, appendix B).

    State and adjoint are integrated together from t1 to t0, each step controlled by its error estimate. The state is reset
    to what was saved at every save time, where the adjoint jumps. Parameters are a quadrature outside of the ODE state and
    of its error norm. The adjoint is linear and is solved for cotangents scaled to at most one, so that tolerances do not
    depend on the scale of the loss.

    - `solver`, `controller`: the method and controller of the reverse integration, by default the forward ones. A
      `FixedSteps(n)` takes n steps between two observations (by default, where the forward grid is given, its share).
      Tolerances given as pytrees are like y, and hold for state and adjoint alike.

    Memory: O(1) in the number of steps, O(number of save times). The gradient differs from the exact derivative of the
    computed solution by O(tolerance), and is right only where the reversed flow is stable: on dissipative problems use
    `DiscreteAdjoint`. If the reverse integration fails, the gradient is NaN.
    """

    solver: ExplicitRungeKutta | None = None
    controller: AbstractController | None = None

    def prepare(self, dtype: DTypeLike) -> "BacksolveAdjoint":
        if self.controller is not None and self.controller.given_times is not None:
            raise ValueError(
                "BacksolveAdjoint(controller=StepTo(...)): the reverse integration runs between observations; use "
                "FixedSteps(n), which takes n steps between two of them."
            )
        return BacksolveAdjoint(self.solver, None if self.controller is None else self.controller.prepare(dtype))

    def solve(
        self, integrator: Integrator, problem: Problem, requests: Requests, valid: Bool[Array, ""]
    ) -> tuple[Saved, Report]:
        plain = Requests(tuple(Rows(rows.ts, None) for rows in requests.rows), requests.states, requests.dense)
        saved, report = _solve(Inputs(problem, plain), integrator, valid, self)
        rows = tuple(_observed(r, problem, ys, report) for r, ys in zip(requests.rows, saved.rows, strict=True))
        return saved._replace(rows=rows), report

    def reverse_integrator(self, integrator: Integrator, problem: Problem, observations: int) -> Integrator:
        """The integrator of the pair (y, a), from one observation to the next."""
        controller = self.controller
        if controller is None:
            controller = integrator.controller.between(observations + 1, integrator.grid_steps(problem))
        solver = integrator.solver if self.solver is None else self.solver
        return Integrator(solver, controller.on_pairs(), None, integrator.max_steps)


def _observed(rows: Rows, problem: Problem, ys: Arrays, report: Report) -> Arrays:
    """What fn makes of the saved states; NaN where they were not reached, with a finite derivative."""
    if rows.fn is None:
        return ys

    def one(t: Scalar, y: Arrays, reached: Bool[Array, ""]) -> Arrays:
        row = rows.apply(t, tree.where(reached, y, problem.y0), problem.args)
        return tree.map(lambda leaf: jnp.where(reached, leaf, jnp.asarray(jnp.nan, leaf.dtype)), row)

    return jax.vmap(one)(rows.ts, ys, reached_rows(problem, report, rows.ts))


@eqx.filter_custom_vjp
def _solve(inputs: Inputs, integrator: Integrator, valid: Array, adjoint: BacksolveAdjoint) -> tuple[Saved, Report]:
    del adjoint
    return integrate(inputs, integrator, valid)


@_solve.def_fwd
def _forward(
    perturbed: Inputs, inputs: Inputs, integrator: Integrator, valid: Array, adjoint: BacksolveAdjoint
) -> tuple[tuple[Saved, Report], tuple[Saved, Report]]:
    del perturbed, adjoint
    result = integrate(inputs, integrator, valid)
    return result, result


class _Source(NamedTuple):
    """Observations of one kind, as they come: times, states, cotangents."""

    times: Float[Array, " observations"]
    states: Arrays
    cotangents: Arrays


@_solve.def_bwd
def _backward(
    residuals: tuple[Saved, Report],
    cotangent: tuple[Saved, Report],
    perturbed: Inputs,
    inputs: Inputs,
    integrator: Integrator,
    valid: Array,
    adjoint: BacksolveAdjoint,
) -> Inputs:
    del valid
    (problem, requests), (saved, report), g = inputs, residuals, cotangent[0]
    failed = report.status != Status.SUCCESS
    direction = jnp.where(problem.t1 < problem.t0, -1, 1).astype(problem.t0.dtype)
    row_cotangents = [
        None if is_zero(row) else blame(materialise(row, ys), failed & ~(rows.ts * direction <= report.reached * direction))
        for rows, ys, row in zip(requests.rows, saved.rows, g.rows, strict=True)
    ]
    y1_cotangent = blame(materialise(g.y1, saved.y1), failed)
    sources = [
        _Source(rows.ts, ys, row)
        for rows, ys, row in zip(requests.rows, saved.rows, row_cotangents, strict=True)
        if row is not None
    ]
    parameters = tree.zeros_like(problem.parameters)
    if g.states is not None and not is_zero(g.states.ys):
        assert saved.states is not None
        times = _padded_times(saved.states.ts, report)
        sources.append(_Source(times, saved.states.ys, materialise(g.states.ys, saved.states.ys)))
    if g.dense is not None and not is_zero((g.dense.y0, g.dense.coefficients)):
        source, parameters = _dense_source(inputs, integrator, saved, report, g)
        sources.append(source)
    asked = [y1_cotangent, *(row for row in row_cotangents if row is not None)]
    parameters = unknown_if(failed & ~tree.all_finite(asked), parameters)
    observations, scale, begin = _merged(sources, y1_cotangent, direction, report, problem)
    start = ReverseState(
        t=begin,
        y=tree.where(failed, problem.y0, saved.y1),
        a=tree.scale(1 / scale, y1_cotangent),
        parameters=tree.scale(1 / scale, parameters),
        h=jnp.abs(report.reached - problem.t0) / jnp.maximum(report.stats.accepted, 1),
    )
    reverse = adjoint.reverse_integrator(integrator, problem, len(observations.times))
    a, parameters = sweep(problem, reverse, observations, start)
    a, (vector_field, args) = tree.scale(scale, a), tree.scale(scale, parameters)
    t0, t1 = ends_cotangent(problem, integrator, perturbed.problem, (saved.y1, y1_cotangent), a)
    all_rows = zip(requests.rows, perturbed.requests.rows, saved.rows, row_cotangents, strict=True)
    ts = [
        times_cotangent(problem, rows, ys, reached_rows(problem, report, rows.ts), row)
        if wanted.ts and row is not None
        else jnp.zeros_like(rows.ts)
        for rows, wanted, ys, row in all_rows
    ]
    cotangents = Requests(tuple(Rows(t, None) for t in ts), requests.states, requests.dense)
    return Inputs(Problem(vector_field, args, a, t0, t1), cotangents)


def _padded_times(times: Float[Array, " slots"], report: Report) -> Float[Array, " slots"]:
    """The times of slots, those of unused slots moved to the end."""
    return jnp.where(jnp.arange(times.shape[0]) < report.slots, times, report.reached)


def _dense_source(
    inputs: Inputs, integrator: Integrator, saved: Saved, report: Report, cotangent: Saved
) -> tuple[_Source, PyTree[Any]]:
    """Each step's interpolant depends on its first state and on the parameters, through the step's own stages: their
    transpose gives an observation of the first state, and a part of dJ/dparameters."""
    problem, dense, g = inputs.problem, saved.dense, cotangent.dense
    assert dense is not None
    assert g is not None
    y0_cotangents, coefficients = materialise((g.y0, g.coefficients), (dense.y0, dense.coefficients))

    def transposed(slot: Array, carry: tuple[Arrays, PyTree[Any]]) -> tuple[Arrays, PyTree[Any]]:
        cotangents, parameters = carry
        start, end, y, g, q = tree.take((dense.start, dense.end, dense.y0, y0_cotangents, coefficients), slot)
        interval = integrator.controller.interval(start, end)
        observed = StepCotangent(tree.zeros_like(y), g, q)
        a, gradient = integrator.solver.transposed_step(problem, interval, y, observed)
        taken = start != end
        gradient = tree.where(taken, gradient, tree.zeros_like(gradient))
        return tree.put(cotangents, slot, tree.where(taken, a, g)), tree.add(parameters, gradient)

    initial = y0_cotangents, tree.zeros_like(problem.parameters)
    cotangents, parameters = jax.lax.fori_loop(0, max_lane(report.slots), transposed, initial)
    return _Source(_padded_times(dense.start, report), dense.y0, cotangents), parameters


def _merged(
    sources: list[_Source], y1_cotangent: Arrays, direction: Scalar, report: Report, problem: Problem
) -> tuple[Observations, Scalar, Scalar]:
    """All observations in the order of their times, their cotangents scaled to at most one; the scale; and the time from
    which the sweep starts: the time reached or, where t1 was not, that of the last observation before."""
    leaves = jax.tree.leaves(([source.cotangents for source in sources], y1_cotangent))
    largest = [jnp.max(jnp.abs(leaf), initial=0.0).astype(problem.t0.dtype) for leaf in leaves]
    scale = jnp.max(jnp.stack([*largest, jnp.zeros_like(problem.t0)]))
    scale = jnp.where(scale > 0, scale, 1.0)
    failed = report.status != Status.SUCCESS
    if not sources:
        empty = tree.map(lambda leaf: jnp.zeros((0, *leaf.shape), leaf.dtype), problem.y0)
        none = Observations(jnp.zeros(0, problem.t0.dtype), empty, empty)
        return none, scale, jnp.where(failed, problem.t0, report.reached)
    merged = tree.map(lambda *leaves: jnp.concatenate(leaves), *sources)
    if len(sources) > 1:
        order = jnp.argsort(merged.times * direction, stable=True)
        merged = tree.map(lambda leaf: leaf[order], merged)
    reached = merged.times * direction <= report.reached * direction
    last = jnp.max(jnp.where(reached, merged.times * direction, problem.t0 * direction)) * direction
    begin = jnp.where(failed, last, report.reached)

    def known(leaf: Array, fallback: Array) -> Array:
        return jnp.where(reached.reshape(-1, *[1] * fallback.ndim), leaf, fallback)

    times = jnp.where(reached, merged.times, begin)
    states = tree.map(known, merged.states, problem.y0)
    return Observations(times, states, tree.scale(1 / scale, merged.cotangents)), scale, begin
