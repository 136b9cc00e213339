"""gradsolve: Tsit5 steps are recorded by an adaptive solve, and replayed by a scan that JAX differentiates.

Its recorder runs outside of JAX's transformations, for states and parameters that are vectors, in float64. Recording is
part of every call here, as choosing steps is of the other libraries' calls; the replay of a given mesh is shown too.
"""

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("GRADSOLVE_RECORDER", "jax")  # its numpy recorder, the default for few lanes on a CPU, is far slower

import gradsolve  # noqa: F401
import jax
import jax.numpy as jnp
import numpy as np
from gradsolve.solvers import fixed_step_explicit, fixed_step_tsit5
from gradsolve.solvers.tsit5_replay import record_tsit5_jax
from gradsolve.warp.warp_replay import replay_solve_jax, replay_solve_saveat_jax

from benchmarks.problems import Problem
from benchmarks.programs import Executable, JaxProgram, Outcome, Program, Quantity, Told, compiled, flattened


def described(problem: Problem) -> SimpleNamespace:
    """The problem with the members that gradsolve asks for."""
    field = problem.equation.field(jnp)
    return SimpleNamespace(
        name=problem.reference, dim=problem.y0.size, t0=problem.t0, t1=problem.t1, is_stiff=False, f_jax=field
    )


class Replay(Program):
    """Record, then replay or differentiate the replay."""

    def __init__(self, problem: Problem, quantity: Quantity):
        if problem.dtype != np.float64 or not isinstance(problem.parameters, np.ndarray):
            raise ValueError("gradsolve's general recorder is for float64 and for parameters that are vectors.")
        self.problem, self.quantity, self.described = problem, quantity, described(problem)
        self.parameters = np.atleast_2d(problem.parameters)
        self.y0 = np.broadcast_to(problem.y0, (len(self.parameters), problem.y0.size))

    def record(self, tolerance: float | None) -> np.ndarray:
        """The sizes of the accepted steps of every lane."""
        _, steps, _ = record_tsit5_jax(
            self.described.f_jax, self.y0, self.parameters, self.problem.t0, self.problem.t1, rtol=tolerance, atol=tolerance
        )
        return steps

    def replay(self, y0: jax.Array, parameters: jax.Array, steps: jax.Array) -> jax.Array:
        if self.problem.ts is None:
            return replay_solve_jax(self.described, y0, parameters, steps)
        return replay_solve_saveat_jax(self.described, y0, parameters, steps, jnp.asarray(self.problem.ts))[1]

    def function(self) -> Callable[..., Any]:
        def cost(parameters: jax.Array, y0: jax.Array, steps: jax.Array) -> jax.Array:
            squares = jnp.square(self.replay(y0, parameters, steps))
            return jnp.sum(squares) * (len(self.parameters) / squares.size)

        def gradient(y0: jax.Array, parameters: jax.Array, steps: jax.Array) -> jax.Array:
            return jax.grad(cost)(parameters, y0, steps)

        return self.replay if self.quantity is Quantity.FORWARD else gradient

    def ready(self, tolerance: float | None) -> Executable:
        arguments = jnp.asarray(self.y0), jnp.asarray(self.parameters)
        replay, build = compiled(self.function(), (*arguments, jnp.asarray(self.record(tolerance))))

        def call() -> Any:
            return jax.block_until_ready(replay(*arguments, jnp.asarray(self.record(tolerance))))

        return Executable(call, self.outcome, build)

    def outcome(self, numbers: Any) -> Outcome:
        return Outcome(flattened(numbers, self.problem), {})


default = Replay


def fixed(problem: Problem, quantity: Quantity, method: Any) -> Program:
    """A fixed number of steps, as one scan."""

    def solve(y0: jax.Array, parameters: jax.Array, tolerance: Any) -> tuple[jax.Array, Told]:
        del tolerance
        ys = method.solve_jax(described(problem), y0[None], parameters[None], n_steps=problem.steps)
        return ys[0], {}

    return JaxProgram(problem, quantity, solve)


rk4 = functools.partial(fixed, method=fixed_step_explicit)
tsit5 = functools.partial(fixed, method=fixed_step_tsit5)
