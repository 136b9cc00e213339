"""jax.experimental.ode: Dormand and Prince's method, continuous adjoint with the state integrated backward."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.ode import odeint

from benchmarks.problems import Problem
from benchmarks.programs import Program, Quantity, StaticToleranceProgram, Told


def default(problem: Problem, quantity: Quantity) -> Program:
    """`odeint`. Its tolerances are static, and it tells nothing of its steps."""
    field = problem.equation.field(jnp)

    def solve(y0: jax.Array, parameters: Any, tolerance: Any) -> tuple[jax.Array, Told]:
        ys = odeint(
            lambda y, t, p: field(t, y, p), y0, jnp.asarray(problem.times), parameters, rtol=tolerance, atol=tolerance
        )
        return ys if problem.ts is not None else ys[-1], {}

    return StaticToleranceProgram(problem, quantity, solve)
