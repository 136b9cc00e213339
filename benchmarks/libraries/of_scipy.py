"""SciPy, forward only, one lane at a time, with fields in plain Python, for which small systems are fastest."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.integrate import odeint, solve_ivp

from benchmarks.problems import Components, Problem
from benchmarks.programs import Executable, Outcome, Program, Quantity, flattened

Solve = Callable[[Problem, Callable[..., Any], float], np.ndarray]


class ScipyProgram(Program):
    """One of SciPy's solvers."""

    def __init__(self, problem: Problem, quantity: Quantity, solve: Solve):
        if quantity is not Quantity.FORWARD or problem.lanes is not None or not isinstance(problem.equation, Components):
            raise ValueError("SciPy takes part in forward solves of single small systems.")
        components, parameters = problem.equation, problem.parameters.tolist()

        def field(t: float, y: np.ndarray) -> tuple[Any, ...]:
            return components.of(t, y.tolist(), parameters)

        self.problem, self.field, self.solve = problem, field, solve

    def ready(self, tolerance: float | None) -> Executable:
        assert tolerance is not None
        return Executable(lambda: self.solve(self.problem, self.field, tolerance), self.outcome)

    def outcome(self, ys: np.ndarray) -> Outcome:
        return Outcome(flattened(ys, self.problem), {})


def by_lsoda(problem: Problem, field: Callable[..., Any], tolerance: float) -> np.ndarray:
    options = {"rtol": tolerance, "atol": tolerance * problem.scale, "mxstep": problem.max_steps}
    ys = odeint(field, problem.y0, problem.times, tfirst=True, **options)
    return ys if problem.ts is not None else ys[-1:]


def by_dop853(problem: Problem, field: Callable[..., Any], tolerance: float) -> np.ndarray:
    span = problem.t0, problem.t1
    options = {"t_eval": problem.ts, "rtol": tolerance, "atol": tolerance * problem.scale}
    ys = solve_ivp(field, span, problem.y0, "DOP853", **options).y.T
    return ys if problem.ts is not None else ys[-1:]


lsoda = functools.partial(ScipyProgram, solve=by_lsoda)
dop853 = functools.partial(ScipyProgram, solve=by_dop853)
