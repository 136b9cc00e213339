"""CVODES from SUNDIALS, by way of casadi: Adams' methods and BDF of variable order, with CVODES's own adjoint."""

import functools
from typing import Any

import casadi
import numpy as np

from benchmarks.problems import Components, Problem
from benchmarks.programs import Executable, Outcome, Program, Quantity, flattened


class CvodesProgram(Program):
    """One integrator over all save times, differentiated in reverse mode by CVODES."""

    def __init__(self, problem: Problem, quantity: Quantity, method: str):
        if problem.lanes is not None or not isinstance(problem.equation, Components):
            raise ValueError("CVODES takes part in solves of single small systems.")
        self.problem, self.quantity, self.method = problem, quantity, method

    def ready(self, tolerance: float | None) -> Executable:
        problem = self.problem
        y, p, t = (casadi.SX.sym(name, n) for name, n in (("y", problem.y0.size), ("p", problem.parameters.size), ("t", 1)))
        rate = casadi.vertcat(*problem.equation.of(t, casadi.vertsplit(y), casadi.vertsplit(p)))
        options = {"reltol": tolerance, "linear_multistep_method": self.method, "max_num_steps": problem.max_steps}
        options |= {"abstol": tolerance * problem.scale}
        system = {"x": y, "p": p, "t": t, "ode": rate}
        times = problem.times.tolist()
        integrator = casadi.integrator("solve", "cvodes", system, times[0], times[1:], options)
        parameters = casadi.MX.sym("p", problem.parameters.size)
        saved = integrator(x0=problem.y0, p=parameters)["xf"]
        saved = casadi.horzcat(casadi.DM(problem.y0), saved) if problem.ts is not None else saved
        result = saved
        if self.quantity is Quantity.GRADIENT:
            cost = casadi.sumsqr(saved) / saved.numel() if problem.weights is None else casadi.dot(problem.weights, saved)
            result = casadi.gradient(cost, parameters)
        function = casadi.Function("quantity", [parameters], [result])
        return Executable(lambda: function(problem.parameters), self._outcome)

    def _outcome(self, result: Any) -> Outcome:
        return Outcome(flattened(np.asarray(result).T, self.problem), {})


adams = functools.partial(CvodesProgram, method="adams")
bdf = functools.partial(CvodesProgram, method="bdf")
