"""Forward sensitivities: a solve through plain loops."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from adjoint_jax import tree
from adjoint_jax.adjoints.adjoint import AbstractAdjoint, Inputs, Run, Saved, integrate, observed_rows, without_observables
from adjoint_jax.forward_only import forward_only
from adjoint_jax.integrate import Report
from adjoint_jax.kernels import in_blocks_of_kernels, is_told
from adjoint_jax.problem import Problem
from adjoint_jax.saveat import Requests, Rows
from adjoint_jax.tree import Arrays, Scalar


class ForwardMode(AbstractAdjoint):
    """For `jax.jvp`, `jax.jacfwd` and `jax.linearize`: the forward sensitivities of the computed solution, stepped along
    with it. The cheapest choice for a handful of inputs, or for all derivatives of many outputs. On a CPU, sensitivities of
    a small system are one kernel by themselves, as its solution is, and lanes of a `vmap` are computed in blocks.

    Exact for the computed solution, with step sizes as constants of the derivative; derivatives with respect to t0, t1 and
    `ts` are those of the flow, f at that time. The error estimate does not look at sensitivities.

    Memory: O(1) in the number of steps. Reverse mode through it raises `RuntimeError`: use `DiscreteAdjoint`, through which
    `jax.jvp(jax.grad(loss), ...)` works.
    """

    def solve(self, inputs: Inputs, run: Run) -> tuple[Saved, Report]:
        (problem, requests), integrator = inputs, run.integrator
        t0, t1 = jax.lax.stop_gradient((problem.t0, problem.t1))
        ends = integrator.controller.interval(t0, t1)
        at_t0, backward = problem.rates(ends.first, problem.y0), -problem.t0
        moved = dataclasses.replace(problem, y0=_carried(problem.y0, at_t0.y, backward), t0=t0, t1=t1)
        plain = without_observables(requests)
        still = Requests(tuple(Rows(jax.lax.stop_gradient(r.ts), None) for r in plain.rows), plain.states, plain.dense)
        saved, report = _integrated(Inputs(moved, still), run)
        at_t1 = problem.rates(ends.last, saved.y1)
        ys = [_carried_rows(moved, *pair) for pair in zip(requests.rows, saved.rows, strict=True)]
        differentiated = saved._replace(
            y1=_carried(saved.y1, at_t1.y, problem.t1),
            cost=_carried(_carried(saved.cost, at_t1.cost, problem.t1), at_t0.cost, backward),
            rows=observed_rows(requests, problem, tuple(ys), report),
        )
        return forward_only(differentiated, _REMEDY), report


def _integrated(inputs: Inputs, run: Run) -> tuple[Saved, Report]:
    """The solve; lanes of small problems in blocks, where these are kernels."""
    if not (is_told() and inputs.problem.is_small):
        return integrate(inputs, run)
    return in_blocks_of_kernels(lambda inputs: integrate(inputs, run), inputs)


_REMEDY = "ForwardMode() has no reverse mode (jax.grad, jax.vjp, jax.jacrev): use DiscreteAdjoint() for it."


@jax.custom_jvp
def _carried(value: Arrays, rate: Arrays, t: Scalar) -> Arrays:
    """The value, as something that moves with t at the given rate."""
    del rate, t
    return value


def _carried_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Arrays, Arrays]:
    (value, rate, _), (value_dot, _, t_dot) = primals, tangents

    def instantiated(primal: Array, tangent: Any) -> Array:
        return jnp.zeros_like(primal) if isinstance(tangent, jax.custom_derivatives.SymbolicZero) else tangent

    value_dot = tree.map(instantiated, value, value_dot)
    if isinstance(t_dot, jax.custom_derivatives.SymbolicZero):
        return value, value_dot
    return value, tree.add(value_dot, tree.scale(t_dot, rate))


_carried.defjvp(_carried_jvp, symbolic_zeros=True)


def _carried_rows(problem: Problem, rows: Rows, ys: Arrays) -> Arrays:
    def carried(t: Scalar, y: Arrays) -> Arrays:
        return _carried(y, problem.field(jax.lax.stop_gradient(t), y), t)

    return jax.vmap(carried)(rows.ts, ys)
