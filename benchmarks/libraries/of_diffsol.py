"""diffsol, in Rust, through its JAX bindings: implicit methods, whose derivatives are always forward sensitivities."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from diffsol_jax import ODEProblem

from benchmarks.problems import Components, Problem
from benchmarks.programs import Program, Quantity, StaticToleranceProgram, Told

LARGEST_SYSTEM = 200
"""The bindings write out one system of the state and all its sensitivities; a larger one takes too long to compile."""


def solve_by(problem: Problem, quantity: Quantity, method: str) -> Program:
    """One of its methods. Its tolerances are static, and it tells nothing of its steps."""
    components, size = problem.equation, problem.y0.size * (1 + problem.parameters.size)
    if problem.lanes is not None or not isinstance(components, Components):
        raise ValueError("diffsol takes part in solves of single small systems.")
    if quantity is Quantity.GRADIENT and size > LARGEST_SYSTEM:
        raise ValueError(f"The system of all sensitivities has {size} equations, which takes too long to compile.")
    y0, parameters = jnp.asarray(problem.y0), jnp.asarray(problem.parameters)
    system = ODEProblem(lambda t, y, p: tuple(components.of(t, y, p)), y0, parameters)

    def solve(y0: jax.Array, parameters: jax.Array, tolerance: float) -> tuple[jax.Array, Told]:
        del y0
        options: dict[str, Any] = {"rtol": tolerance, "atol": tolerance * problem.scale, "h0": 1e-6}
        return system.solve(parameters, jnp.asarray(problem.times), ode_solver=method, **options)[1][-1], {}

    return StaticToleranceProgram(problem, quantity, solve)


bdf = functools.partial(solve_by, method="bdf")
