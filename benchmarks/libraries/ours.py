"""adjoint_jax."""

import dataclasses

import jax
import jax.numpy as jnp

import adjoint_jax as aj
from adjoint_jax.adjoints.adjoint import AbstractAdjoint
from adjoint_jax.controllers.controller import AbstractController
from adjoint_jax.solvers.solver import AbstractSolver
from benchmarks.problems import Problem
from benchmarks.programs import Derivative, JaxProgram, Program, Quantity, Solve, Told


def solve_by(problem: Problem, adjoint: AbstractAdjoint, solver: AbstractSolver) -> Solve:
    """The problem's solve with this adjoint and method; on a fixed grid if the problem has one."""
    field = problem.equation.field(jnp)
    saveat = aj.SaveAt(t1=True) if problem.ts is None else aj.SaveAt(problem.ts)

    def solve(y0: jax.Array, parameters: object, tolerance: jax.Array) -> tuple[jax.Array, Told]:
        controller: AbstractController = aj.PIDController(tolerance, tolerance * problem.scale)
        if problem.steps is not None:
            controller = aj.FixedSteps(problem.steps)
        t0, t1 = (jnp.asarray(t, problem.dtype) for t in (problem.t0, problem.t1))
        options = {"solver": solver, "controller": controller, "saveat": saveat, "adjoint": adjoint}
        solution = aj.solve(field, t0, t1, y0, parameters, **options, max_steps=problem.max_steps, throw=False)
        stats = solution.stats
        told = {"accepted": stats.accepted, "rejected": stats.rejected, "evaluations": stats.evaluations}
        return solution.ys, told

    return solve


@dataclasses.dataclass(frozen=True)
class With:
    """A choice of an adjoint and a method. `bounded`: told a tight bound on the steps, as tuned peers are."""

    adjoint: AbstractAdjoint
    solver: AbstractSolver
    derivative: Derivative = jax.grad
    bounded: bool = False

    def __call__(self, problem: Problem, quantity: Quantity) -> Program:
        if self.bounded:
            problem = dataclasses.replace(problem, max_steps=problem.bound)
        return JaxProgram(problem, quantity, solve_by(problem, self.adjoint, self.solver), self.derivative)


_tsit5, _rk4, _rodas5p = aj.Tsit5(), aj.RK4(), aj.Rodas5P()
discrete = With(aj.DiscreteAdjoint(), _tsit5)
discrete_bounded = With(aj.DiscreteAdjoint(), _tsit5, bounded=True)
discrete_rk4 = With(aj.DiscreteAdjoint(), _rk4)
linearisations = With(aj.DiscreteAdjoint(keep=aj.KeepLinearisations()), _tsit5)
linearisations_rk4 = With(aj.DiscreteAdjoint(keep=aj.KeepLinearisations()), _rk4)
gauss = With(aj.GaussAdjoint(), _tsit5)
backsolve = With(aj.BacksolveAdjoint(), _tsit5)
backsolve_rk4 = With(aj.BacksolveAdjoint(), _rk4)
reversible_rk4 = With(aj.ReversibleAdjoint(), aj.Reversible(_rk4, coupling=0.9999))
forward_mode = With(aj.ForwardMode(), _tsit5, jax.jacfwd)
rodas5p = With(aj.DiscreteAdjoint(), _rodas5p)
kvaerno5 = With(aj.DiscreteAdjoint(), aj.Kvaerno5())


def square_root_checkpoints_rk4(problem: Problem, quantity: Quantity) -> Program:
    """As many checkpoints as the square root of the number of steps."""
    assert problem.steps is not None
    adjoint = aj.DiscreteAdjoint(checkpoints=round(problem.steps**0.5))
    return JaxProgram(problem, quantity, solve_by(problem, adjoint, _rk4))
