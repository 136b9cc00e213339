"""The libraries that are timed, each with the settings its users are told to use, as parameters -> saved values."""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
from jax.experimental.ode import odeint

import adjoint_jax as aj
from benchmarks.problems import Problem

Solve = Callable[[Any], jax.Array]


def adjoint_jax_discrete(problem: Problem) -> Solve:
    return _adjoint_jax(problem, aj.DiscreteAdjoint())


def adjoint_jax_backsolve(problem: Problem) -> Solve:
    return _adjoint_jax(problem, aj.BacksolveAdjoint())


def _adjoint_jax(problem: Problem, adjoint: Any) -> Solve:
    def solve(parameters: Any) -> jax.Array:
        controller = aj.PIDController(problem.rtol, problem.atol)
        return aj.odeint(
            problem.field, problem.y0, problem.ts, parameters, controller=controller, adjoint=adjoint, throw=False
        )

    return solve


def diffrax_default(problem: Problem) -> Solve:
    return _diffrax(problem, diffrax.RecursiveCheckpointAdjoint())


def diffrax_backsolve(problem: Problem) -> Solve:
    return _diffrax(problem, diffrax.BacksolveAdjoint())


def _diffrax(problem: Problem, adjoint: Any) -> Solve:
    def solve(parameters: Any) -> jax.Array:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(problem.field),
            diffrax.Tsit5(),
            problem.ts[0],
            problem.ts[-1],
            None,
            problem.y0,
            parameters,
            saveat=diffrax.SaveAt(ts=problem.ts),
            stepsize_controller=diffrax.PIDController(rtol=problem.rtol, atol=problem.atol),
            adjoint=adjoint,
            throw=False,
        )
        assert solution.ys is not None
        return solution.ys

    return solve


def jax_odeint(problem: Problem) -> Solve:
    def field(y: jax.Array, t: Any, parameters: Any) -> jax.Array:
        return problem.field(t, y, parameters)

    def solve(parameters: Any) -> jax.Array:
        return odeint(field, problem.y0, problem.ts, parameters, rtol=problem.rtol, atol=problem.atol)

    return solve


LIBRARIES: dict[str, Callable[[Problem], Solve]] = {
    "adjoint_jax Discrete": adjoint_jax_discrete,
    "adjoint_jax Backsolve": adjoint_jax_backsolve,
    "diffrax default": diffrax_default,
    "diffrax Backsolve": diffrax_backsolve,
    "jax.experimental.ode": jax_odeint,
}
