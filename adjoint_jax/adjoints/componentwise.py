"""Small systems solved in scalars: the same problem, with tuples of scalars for its state and its parameters.

Arrays of two or three numbers are fewer operations, scalars are faster ones: in lanes of a `vmap`, where arrays are loops
over a last axis of two or three, several times as fast; on given grids a third. Where steps are chosen one by one, a single
problem in arrays takes as long, and a fifth less to compile.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, PyTree

from adjoint_jax.adjoints.adjoint import Inputs, Run, Saved, integrate, is_zero, materialise
from adjoint_jax.adjoints.exact import AbstractExactAdjoint, Residuals, backward, forward
from adjoint_jax.adjoints.tape import Tape
from adjoint_jax.forward_only import gradient_once
from adjoint_jax.hoisting import Function, Hoisted
from adjoint_jax.integrate import Integrator, Report
from adjoint_jax.interpolation import Interpolant
from adjoint_jax.lanes import are_lanes, in_lanes, on_one_cpu
from adjoint_jax.problem import Problem
from adjoint_jax.recorders import States
from adjoint_jax.reverse_only import gradient_in_reverse
from adjoint_jax.saveat import Requests, Rows
from adjoint_jax.scalars import Components, written_out
from adjoint_jax.solvers.explicit_runge_kutta import ExplicitRungeKutta
from adjoint_jax.tree import Arrays, Scalar

MOST_COMPONENTS = 8
MOST_NUMBERS = 16
"""Components and parameters together. Every one is an output of the transposed step, and XLA computes what several outputs
need anew for each of them."""
MOST_ADDITIONS = 400
"""Of a step: longer ones take long to compile."""


class OfArrays(eqx.Module):
    """A function of (t, y, args), called with their entries."""

    function: Function
    args: PyTree[Any]
    state: Components = eqx.field(static=True)
    of_args: Components = eqx.field(static=True)

    def __call__(self, t: Scalar, y: tuple[Array, ...], args: tuple[tuple[Array, ...], ...]) -> PyTree[Array]:
        return self.function(t, self.state.joined(y), eqx.combine(self.of_args.joined(args[1]), self.args))


class Correspondence(eqx.Module):
    """Which arrays the scalars of a problem stand for: those of the state, those that the vector field closes over, and
    those of `args`; with what is no inexact array in the latter two."""

    field: Hoisted
    args: PyTree[Any]
    state: Components = eqx.field(static=True)
    of_field: Components = eqx.field(static=True)
    of_args: Components = eqx.field(static=True)

    def inputs_in_arrays(self, inputs: Inputs) -> Inputs:
        problem, requests = inputs
        arrays = eqx.combine(self.of_field.joined(problem.args[0]), self.field.arrays)
        field = Hoisted(arrays, self.field.program, self.field.structure)
        args, y0 = eqx.combine(self.of_args.joined(problem.args[1]), self.args), self.state.joined(problem.y0)
        rows = tuple(Rows(row.ts, row.fn.function if isinstance(row.fn, OfArrays) else None) for row in requests.rows)
        joined = Problem(field, None, args, y0, problem.t0, problem.t1)
        return Inputs(joined, Requests(rows, requests.states, requests.dense))

    def saved_in_arrays(self, saved: Saved, requests: Requests) -> Saved:
        return _saved(self._joined, saved, requests)

    def saved_in_scalars(self, saved: Saved, requests: Requests) -> Saved:
        return _saved(self.state.apart, saved, requests)

    def residuals_in_arrays(self, residuals: Residuals) -> Residuals:
        return _residuals(self._joined, residuals)

    def residuals_in_scalars(self, residuals: Residuals) -> Residuals:
        return _residuals(self.state.apart, residuals)

    def _joined(self, entries: tuple[Any, ...]) -> Arrays | None:
        """The arrays; None if all entries are."""
        if is_zero(entries):
            return None
        like = next(entry for entry in entries if entry is not None)
        return self.state.joined(materialise(entries, (like,) * len(entries)))


def _saved(change: Callable[[Any], Any], saved: Saved, requests: Requests) -> Saved:
    states, dense = saved.states, saved.dense
    rows = zip(requests.rows, saved.rows, strict=True)
    return Saved(
        y1=change(saved.y1),
        cost=saved.cost,
        rows=tuple(change(ys) if request.fn is None else ys for request, ys in rows),
        states=None if states is None else States(states.ts, change(states.ys), states.taken),
        dense=None if dense is None else Interpolant(dense.start, dense.end, change(dense.y0), change(dense.coefficients)),
    )


def _residuals(change: Callable[[Any], Any], residuals: Residuals) -> Residuals:
    trail = residuals.trail
    assert isinstance(trail, Tape)
    checkpoints = trail.checkpoints._replace(state=change(trail.checkpoints.state))
    return Residuals(
        dataclasses.replace(trail, recent=change(trail.recent), checkpoints=checkpoints),
        change(residuals.last),
        tuple(None if states is None else change(states) for states in residuals.row_states),
        residuals.report,
    )


def solve_in_scalars(inputs: Inputs, run: Run, adjoint: AbstractExactAdjoint) -> tuple[Saved, Report] | None:
    """The solve, if the system is so small that scalars are faster; by sizes alone. Otherwise None."""
    small = _in_scalars(inputs, run.integrator)
    if small is None:
        return None
    scalars, correspondence = small
    saved, report = _solve(gradient_in_reverse(scalars), run, adjoint, correspondence)
    return correspondence.saved_in_arrays(saved, scalars.requests), report


def _in_scalars(inputs: Inputs, integrator: Integrator) -> tuple[Inputs, Correspondence] | None:
    (problem, requests), tolerance = inputs, integrator.controller.tolerance
    field, solver = problem.vector_field, integrator.solver
    if not isinstance(field, Hoisted) or not isinstance(solver, ExplicitRungeKutta) or problem.running_cost is not None:
        return None
    if tolerance is not None and not tolerance.is_uniform:
        return None
    (closed, closed_rest), (own, own_rest) = (eqx.partition(v, eqx.is_inexact_array) for v in (field.arrays, problem.args))
    state, of_field, of_args = (Components.of(values) for values in (problem.y0, closed, own))
    has_entries = state.number > 0 and all(0 not in shape for c in (state, of_field, of_args) for shape in c.shapes)
    numbers = state.number + of_field.number + of_args.number
    if not has_entries or state.number > MOST_COMPONENTS or numbers > MOST_NUMBERS:
        return None
    lanes = are_lanes(inputs)
    program = written_out(field, problem.t0, problem.y0, problem.args, in_lanes=lanes, in_blocks=lanes and on_one_cpu())
    stages = solver.tableau.stages + solver.extra_stages
    if program is None or stages * program.cost + state.number * stages**2 // 2 > MOST_ADDITIONS:
        return None
    rows = tuple(Rows(r.ts, None if r.fn is None else OfArrays(r.fn, own_rest, state, of_args)) for r in requests.rows)
    args = of_field.apart(closed), of_args.apart(own)
    scalars = Problem(program, None, args, state.apart(problem.y0), problem.t0, problem.t1)
    rest = Hoisted(closed_rest, field.program, field.structure)
    correspondence = Correspondence(rest, own_rest, state, of_field, of_args)
    return Inputs(scalars, Requests(rows, requests.states, requests.dense)), correspondence


def _chosen(in_arrays: Callable[..., Any], in_scalars: Callable[..., Any], run: Run, inputs: Inputs, *operands: Any) -> Any:
    """What both compute: in scalars on a given grid or in lanes, else in arrays."""
    if inputs.problem.is_in_lanes or run.integrator.grid_steps is not None:
        return in_scalars(run, inputs, *operands)
    return in_lanes(in_arrays, in_scalars)(run, inputs, *operands)


@eqx.filter_custom_vjp
def _solve(inputs: Inputs, run: Run, adjoint: AbstractExactAdjoint, correspondence: Correspondence) -> tuple[Saved, Report]:
    del adjoint

    def in_scalars(run: Run, inputs: Inputs, correspondence: Correspondence) -> tuple[Saved, Report]:
        del correspondence
        return integrate(inputs, run)

    def in_arrays(run: Run, inputs: Inputs, correspondence: Correspondence) -> tuple[Saved, Report]:
        saved, report = integrate(correspondence.inputs_in_arrays(inputs), run)
        return correspondence.saved_in_scalars(saved, inputs.requests), report

    return _chosen(in_arrays, in_scalars, run, inputs, correspondence)


@_solve.def_fwd
def _forward(
    perturbed: Inputs, inputs: Inputs, run: Run, adjoint: AbstractExactAdjoint, correspondence: Correspondence
) -> tuple[tuple[Saved, Report], Residuals]:
    def in_scalars(
        run: Run, inputs: Inputs, adjoint: AbstractExactAdjoint, correspondence: Correspondence
    ) -> tuple[tuple[Saved, Report], Residuals]:
        del correspondence
        return forward(perturbed, inputs, run, adjoint)

    def in_arrays(
        run: Run, inputs: Inputs, adjoint: AbstractExactAdjoint, correspondence: Correspondence
    ) -> tuple[tuple[Saved, Report], Residuals]:
        arrays = correspondence.inputs_in_arrays(inputs)
        (saved, report), residuals = forward(perturbed, arrays, run, adjoint)
        saved = correspondence.saved_in_scalars(saved, inputs.requests)
        return (saved, report), correspondence.residuals_in_scalars(residuals)

    return _chosen(in_arrays, in_scalars, run, inputs, adjoint, correspondence)


@_solve.def_bwd
def _backward(
    residuals: Residuals,
    cotangent: tuple[Saved, Report],
    perturbed: Inputs,
    inputs: Inputs,
    run: Run,
    adjoint: AbstractExactAdjoint,
    correspondence: Correspondence,
) -> Inputs:
    def in_scalars(run: Run, inputs: Inputs, *rest: Any) -> Inputs:
        residuals, cotangent, adjoint, _ = rest
        return backward(residuals, cotangent, perturbed, inputs, run, adjoint)

    def in_arrays(run: Run, inputs: Inputs, *rest: Any) -> Inputs:
        residuals, (saved, report), adjoint, correspondence = rest
        arrays, pull_back = eqx.filter_vjp(correspondence.inputs_in_arrays, inputs)
        cotangent = correspondence.saved_in_arrays(saved, inputs.requests), report
        residuals = correspondence.residuals_in_arrays(residuals)
        return pull_back(backward(residuals, cotangent, perturbed, arrays, run, adjoint))[0]

    return gradient_once(_chosen(in_arrays, in_scalars, run, inputs, residuals, cotangent, adjoint, correspondence))
