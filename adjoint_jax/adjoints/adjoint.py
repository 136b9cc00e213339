"""What an adjoint is, and what all adjoints share."""

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PyTree

from adjoint_jax import tree
from adjoint_jax.adjoints.memory import Memory
from adjoint_jax.adjoints.trail import Way
from adjoint_jax.integrate import Integrator, Outcome, Report
from adjoint_jax.interpolation import Interpolant
from adjoint_jax.problem import Parameters, Problem, Rates, flow_cotangent
from adjoint_jax.quadrature import cost_of
from adjoint_jax.recorders import AbstractRecorder, DenseRecorder, QuadratureRecorder, RowRecorder, StateRecorder, States
from adjoint_jax.saveat import Requests, Rows
from adjoint_jax.solution import Status
from adjoint_jax.tree import Arrays, Scalar


class Saved(NamedTuple):
    """What an adjoint differentiates: the final state and the cost (NaN if t1 was not reached), and what was requested."""

    y1: Arrays
    cost: Arrays
    rows: tuple[Arrays, ...]
    states: States | None
    dense: Interpolant | None


class Inputs(NamedTuple):
    """What it differentiates with respect to."""

    problem: Problem
    requests: Requests


class Run(NamedTuple):
    """How a solve goes: what integrates; whether its times make sense; and whether a derivative that cannot be computed
    raises an error."""

    integrator: Integrator
    valid: Bool[Array, ""]
    throw: bool


class AbstractAdjoint(eqx.Module):
    """A way to differentiate a solve."""

    def prepare(self, dtype: DTypeLike) -> "AbstractAdjoint":
        """The same adjoint with arrays for its numbers, times in the given dtype."""
        del dtype
        return self

    def recorders(self, integrator: Integrator, inputs: Inputs) -> list[AbstractRecorder]:
        """What must be recorded for the way back, besides what is asked for."""
        del integrator, inputs
        return []

    def memory(self, way: Way, records: Sequence[Any]) -> Memory:
        """What is kept for the way back, from the shapes of what its recorders recorded."""
        del way, records
        return Memory.of()

    @abc.abstractmethod
    def solve(self, inputs: Inputs, run: Run) -> tuple[Saved, Report]:
        """Integrate, with a derivative of `Saved` with respect to every inexact array of the inputs."""


def recorders(inputs: Inputs, integrator: Integrator) -> list[AbstractRecorder]:
    """The recorders that a solve needs for its own sake: one for each of the requested rows, then states, then dense, then
    the cost."""
    (problem, requests), solver = inputs, integrator.solver
    chosen: list[AbstractRecorder] = [RowRecorder(rows, problem, solver) for rows in requests.rows]
    chosen += [StateRecorder(solver)] * requests.states
    chosen += [DenseRecorder(solver)] * requests.dense
    if problem.running_cost is not None:
        zero, y0 = problem.zero_cost(), problem.y0
        chosen.append(QuadratureRecorder(solver.quadrature, lambda nodes: cost_of(problem, nodes), zero, y0))
    return chosen


def saved(inputs: Inputs, integrator: Integrator, outcome: Outcome) -> Saved:
    """What the recorders of `recorders` have saved; records of further recorders are ignored."""
    (problem, requests), records = inputs, iter(outcome.records)
    slots, failed = integrator.slots, outcome.report.failed
    return Saved(
        rows=tuple(next(records).rows for _ in requests.rows),
        states=tree.map(lambda leaf: leaf[:slots], next(records)) if requests.states else None,
        dense=tree.map(lambda leaf: leaf[:slots], next(records)) if requests.dense else None,
        cost=tree.unknown_if(failed, next(records)) if problem.running_cost is not None else (),
        y1=tree.unknown_if(failed, integrator.solver.output(outcome.state)),
    )


def integrate(inputs: Inputs, run: Run) -> tuple[Saved, Report]:
    """A solve without anything that a derivative would need."""
    outcome = run.integrator(inputs.problem, recorders(inputs, run.integrator), run.valid)
    return saved(inputs, run.integrator, outcome), outcome.report


def materialise(cotangent: PyTree[Any], like: Arrays) -> Arrays:
    """The cotangent with zeros in place of None, which stands for a cotangent known to be zero."""
    return jax.tree.map(
        lambda leaf, g: jnp.zeros_like(leaf) if g is None else g, like, cotangent, is_leaf=lambda x: x is None
    )


def is_zero(cotangent: PyTree[Any]) -> bool:
    """Whether a cotangent is known to be zero at trace time."""
    return not jax.tree.leaves(cotangent)


class AtEnd(NamedTuple):
    """What the loss says of the end of a solve: dJ/dy1, and dJ/dcost, which is () for a problem without a cost; and whether
    it asks for anything that was not reached, there or at save times.

    If so, both are NaN; if the solve failed and it does not, they are zero, as `blame` has it."""

    y1: Arrays
    cost: Arrays
    is_lost: Bool[Array, ""]

    @staticmethod
    def of(ended: Int[Array, ""], y1: Arrays, cost: Arrays, rows: Sequence[Arrays | None]) -> "AtEnd":
        """`ended`: the `Status` of the loop. `rows`: what the loss says of save times, as `blame` leaves it."""
        failed = ended != Status.SUCCESS
        blamed = blame((y1, cost), failed)
        is_lost = failed & ~tree.all_finite((blamed, rows))
        y1, cost = tree.unknown_if(is_lost, blamed)
        return AtEnd(y1, cost, is_lost)


def said_of_end(problem: Problem, cotangent: Saved) -> tuple[Arrays, Arrays]:
    """dJ/dy1 and dJ/dcost, which is () for a problem without a cost: zero if nobody asks."""
    cost = () if problem.running_cost is None else materialise(cotangent.cost, problem.zero_cost())
    return materialise(cotangent.y1, problem.y0), cost


def relative_distance(y: Arrays, known: Arrays, size: PyTree[Scalar]) -> Scalar:
    """How far the leaf that is worst off is from what it is known to be (root mean square), in parts of its size."""
    off = tree.root_mean_squares(tree.map(lambda a, b: a - b, y, known))
    parts = tree.map(lambda distance, unit: jnp.where(distance == 0, 0.0, distance / unit), off, size)
    return jnp.max(jnp.stack([jnp.zeros(()), *jax.tree.leaves(parts)]))


def blame(cotangent: Arrays, unreached: Bool[Array, "..."]) -> Arrays:
    """NaN for a cotangent that asks for the derivative of what was not reached, zero where nothing is asked.

    So a failed lane whose value the loss has masked out gives no NaN to what the lanes share.
    """

    def leaf_blame(g: Array) -> Array:
        missed = unreached.reshape(unreached.shape + (1,) * (g.ndim - unreached.ndim))
        return jnp.where(missed, jnp.where(g == 0, 0, jnp.nan), g).astype(g.dtype)

    return tree.map(leaf_blame, cotangent)


def times_cotangent(
    problem: Problem, rows: Rows, states: Arrays, reached: Bool[Array, " rows"], cotangent: Arrays
) -> Array:
    """dJ/dts of saved rows, as the state is carried along the flow; zero for rows that were not reached."""
    problem = problem.without_cost()

    def one(t: Scalar, y: Arrays, reached: Bool[Array, ""], g: Arrays) -> Scalar:
        y = tree.where(reached, y, problem.y0)
        _, pullback = jax.vjp(lambda t, y: rows.apply(t, y, problem.args), t, y)
        explicit, a = pullback(g)
        return explicit + flow_cotangent(problem, t, y, Rates(a, ()))

    return jax.vmap(one)(rows.ts, states, reached, cotangent)


def reached_rows(problem: Problem, report: Report, ts: Float[Array, " rows"]) -> Bool[Array, " rows"]:
    """Which of the times were reached."""
    direction = problem.direction
    return ~report.failed | (ts * direction <= report.reached * direction)


def without_observables(requests: Requests) -> Requests:
    """The same with plain states for rows."""
    return Requests(tuple(Rows(rows.ts, None) for rows in requests.rows), requests.states, requests.dense)


def observed_rows(requests: Requests, problem: Problem, states: tuple[Arrays, ...], report: Report) -> tuple[Arrays, ...]:
    """What each request's fn makes of the states at its times; NaN where they were not reached, with a finite
    derivative."""

    def observed(rows: Rows, ys: Arrays) -> Arrays:
        def one(t: Scalar, y: Arrays, reached: Bool[Array, ""]) -> Arrays:
            row = rows.apply(t, tree.where(reached, y, problem.y0), problem.args)
            return tree.map(lambda leaf: jnp.where(reached, leaf, jnp.asarray(jnp.nan, leaf.dtype)), row)

        return ys if rows.fn is None else jax.vmap(one)(rows.ts, ys, reached_rows(problem, report, rows.ts))

    return tuple(observed(rows, ys) for rows, ys in zip(requests.rows, states, strict=True))


def ends_cotangent(
    problem: Problem, integrator: Integrator, perturbed: Problem, at_end: tuple[Arrays, Arrays], a0: Arrays, cost: Arrays
) -> tuple[Scalar, Scalar]:
    """dJ/dt0 = -<a(t0), f(t0, y0)> - <g, l(t0, y0)> and dJ/dt1 = <dJ/dy1, f(t1, y1)> + <g, l(t1, y1)>, with g = dJ/dcost,
    each zero if nobody asks. `at_end`: y1, dJ/dy1."""
    ends = integrator.controller.interval(problem.t0, problem.t1)
    y1, g1 = at_end
    y1 = tree.where(tree.all_finite(y1), y1, problem.y0)
    t0 = t1 = jnp.zeros_like(problem.t0)
    if perturbed.t0:
        t0 = -flow_cotangent(problem, ends.first, problem.y0, Rates(a0, cost))
    if perturbed.t1:
        t1 = flow_cotangent(problem, ends.last, y1, Rates(g1, cost))
    return t0, t1


def problem_cotangent(problem: Problem, parameters: Parameters, y0: Arrays, ends: tuple[Scalar, Scalar]) -> Problem:
    """All derivatives with respect to a problem; those of its running cost are zero where it was left out."""
    if parameters.running_cost is None:
        parameters = parameters._replace(running_cost=tree.zeros_like(problem.parameters.running_cost))
    return Problem(*parameters, y0, *ends, mass=tree.zeros_like(problem.mass))


def undifferentiable(values: PyTree[Any], explanation: str) -> PyTree[Any]:
    """The values; differentiating with respect to their arrays raises `TypeError` with the explanation."""
    if not tree.is_traced(*jax.tree.leaves(values)):
        return values

    @jax.custom_jvp
    def identity(arrays: PyTree[Array]) -> PyTree[Array]:
        return arrays

    def refuse(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        is_zero = [isinstance(t, jax.custom_derivatives.SymbolicZero) for t in jax.tree.leaves(tangents)]
        if not all(is_zero):
            raise TypeError(explanation)
        return primals[0], tangents[0]

    identity.defjvp(refuse, symbolic_zeros=True)
    arrays, rest = eqx.partition(values, eqx.is_inexact_array)
    return eqx.combine(identity(arrays), rest)
