"""Small systems solved in scalars: the same problem, with tuples of scalars for its state and its parameters.

Arrays of two or three numbers are slices and concatenations more than arithmetic, and in lanes of a `vmap` they are loops
over a last axis of two or three.
"""

from typing import Any, NamedTuple

import equinox as eqx
from jaxtyping import Array, PyTree

from adjoint_jax.adjoints.adjoint import Inputs, Saved
from adjoint_jax.hoisting import Function, Hoisted
from adjoint_jax.integrate import Integrator
from adjoint_jax.interpolation import Interpolant
from adjoint_jax.problem import Problem
from adjoint_jax.recorders import States
from adjoint_jax.saveat import Requests, Rows
from adjoint_jax.scalars import Components, written_out
from adjoint_jax.solvers.explicit_runge_kutta import ExplicitRungeKutta
from adjoint_jax.tree import Scalar

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


class InScalars(NamedTuple):
    """A problem in scalars, and which arrays its state stands for."""

    inputs: Inputs
    state: Components

    def saved_in_arrays(self, saved: Saved, requests: Requests) -> Saved:
        """The same with arrays for scalars."""
        joined, states, dense = self.state.joined, saved.states, saved.dense
        rows = zip(requests.rows, saved.rows, strict=True)
        return Saved(
            y1=joined(saved.y1),
            cost=saved.cost,
            rows=tuple(joined(ys) if request.fn is None else ys for request, ys in rows),
            states=None if states is None else States(states.ts, joined(states.ys), states.taken),
            dense=None
            if dense is None
            else Interpolant(dense.start, dense.end, joined(dense.y0), joined(dense.coefficients)),
        )


def in_scalars(inputs: Inputs, integrator: Integrator) -> InScalars | None:
    """The problem in scalars, if it is so small that they are faster; by sizes alone. Otherwise None."""
    (problem, requests), tolerance = inputs, integrator.controller.tolerance
    field, solver = problem.vector_field, integrator.solver
    if not isinstance(field, Hoisted) or not isinstance(solver, ExplicitRungeKutta) or problem.running_cost is not None:
        return None
    if tolerance is not None and not tolerance.is_uniform:
        return None
    closed, (own, own_rest) = (
        eqx.filter(field.arrays, eqx.is_inexact_array),
        eqx.partition(problem.args, eqx.is_inexact_array),
    )
    state, of_field, of_args = (Components.of(values) for values in (problem.y0, closed, own))
    has_entries = state.number > 0 and all(0 not in shape for c in (state, of_field, of_args) for shape in c.shapes)
    numbers = state.number + of_field.number + of_args.number
    if not has_entries or state.number > MOST_COMPONENTS or numbers > MOST_NUMBERS:
        return None
    program = written_out(field, problem.t0, problem.y0, problem.args)
    stages = solver.tableau.stages + solver.extra_stages
    if program is None or stages * program.cost + state.number * stages**2 // 2 > MOST_ADDITIONS:
        return None
    rows = tuple(Rows(r.ts, None if r.fn is None else OfArrays(r.fn, own_rest, state, of_args)) for r in requests.rows)
    args = of_field.apart(closed), of_args.apart(own)
    scalars = Problem(program, None, args, state.apart(problem.y0), problem.t0, problem.t1)
    return InScalars(Inputs(scalars, Requests(rows, requests.states, requests.dense)), state)
