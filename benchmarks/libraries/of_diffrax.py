"""diffrax, as its documentation has it, and tuned as well as we know how; benchmarks/README.md says what was tried."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix

from benchmarks.problems import Components, Problem
from benchmarks.programs import Derivative, JaxProgram, Program, Quantity, Solve, Told


class RK4(diffrax.AbstractERK):
    """The classical method, which diffrax does not have, as its documentation says a method is added."""

    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(
        c=np.array([0.5, 0.5, 1.0]),
        b_sol=np.array([1.0, 2.0, 2.0, 1.0]) / 6,
        b_error=np.zeros(4),
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
    )
    interpolation_cls: ClassVar[Callable[..., Any]] = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms: Any) -> int:
        return 4


@dataclasses.dataclass(frozen=True)
class Settings:
    """How diffrax solves. Steps are chosen by its default controller, an I controller: see the README for others."""

    adjoint: diffrax.AbstractAdjoint
    solver: diffrax.AbstractSolver


def solve_by(problem: Problem, settings: Settings, max_steps: int) -> Solve:
    """The problem's solve, its state an array."""
    return _solve(problem, problem.equation.field(jnp), settings, max_steps)


def solve_on_tuples(problem: Problem, settings: Settings, max_steps: int) -> Solve:
    """The problem's solve with the state a tuple of scalars, which XLA compiles better under vmap."""
    components = problem.equation
    assert isinstance(components, Components)

    def field(t: Any, y: tuple[Any, ...], p: jax.Array) -> tuple[Any, ...]:
        return components.of(t, y, list(p))

    inner = _solve(problem, field, settings, max_steps)

    def solve(y0: jax.Array, parameters: Any, tolerance: Any) -> tuple[jax.Array, Told]:
        ys, told = inner(tuple(y0), parameters, tolerance)
        return jnp.stack(ys, -1), told

    return solve


def _solve(problem: Problem, field: Callable[..., Any], settings: Settings, max_steps: int) -> Solve:
    saveat = diffrax.SaveAt(t1=True) if problem.ts is None else diffrax.SaveAt(ts=problem.ts)

    def solve(y0: Any, parameters: Any, tolerance: Any) -> tuple[Any, Told]:
        t0, t1 = (jnp.asarray(t, problem.dtype) for t in (problem.t0, problem.t1))
        dt0, controller = None, diffrax.PIDController(rtol=tolerance, atol=tolerance * problem.scale)
        if problem.steps is not None:
            dt0, controller = (t1 - t0) / problem.steps, diffrax.ConstantStepSize()
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            settings.solver,
            t0,
            t1,
            dt0,
            y0,
            parameters,
            saveat=saveat,
            stepsize_controller=controller,
            adjoint=settings.adjoint,
            max_steps=max_steps,
            throw=False,
        )
        ys = solution.ys if problem.ts is not None else jax.tree.map(lambda leaf: leaf[0], solution.ys)
        stats = solution.stats
        return ys, {"accepted": stats["num_accepted_steps"], "rejected": stats["num_rejected_steps"]}

    return solve


@dataclasses.dataclass(frozen=True)
class With:
    """diffrax with these settings and the problem's usual limit of steps."""

    settings: Settings
    derivative: Derivative = jax.grad

    def __call__(self, problem: Problem, quantity: Quantity) -> Program:
        solve = solve_by(problem, self.settings, _limit(problem))
        return JaxProgram(problem, quantity, solve, self.derivative)


def _limit(problem: Problem) -> int:
    """On a fixed grid a few steps more than it has: diffrax adds up the steps to get the time, with rounding errors."""
    return problem.max_steps if problem.steps is None else problem.steps + problem.steps // 100 + 2


class Tuned:
    """diffrax at its best: a tight limit of steps; forward without the machinery of checkpoints, gradients with a
    checkpoint for every step, so that nothing is computed twice."""

    def __init__(self, solver: diffrax.AbstractSolver, solve_as: Callable[[Problem, Settings, int], Solve]):
        self.solver, self.solve_as = solver, solve_as

    def __call__(self, problem: Problem, quantity: Quantity) -> Program:
        bound = problem.bound if problem.steps is None else _limit(problem)
        store_all = diffrax.RecursiveCheckpointAdjoint(checkpoints=bound)
        adjoint = diffrax.ForwardMode() if quantity is Quantity.FORWARD else store_all
        settings = Settings(adjoint, self.solver)
        return JaxProgram(problem, quantity, self.solve_as(problem, settings, bound))


_default, _backsolve = diffrax.RecursiveCheckpointAdjoint(), diffrax.BacksolveAdjoint()
_tsit5 = diffrax.Tsit5()
default = With(Settings(_default, _tsit5))
default_rk4 = With(Settings(_default, RK4()))
backsolve = With(Settings(_backsolve, _tsit5))
backsolve_rk4 = With(Settings(_backsolve, RK4()))
forward_mode = With(Settings(diffrax.ForwardMode(), _tsit5), jax.jacfwd)
tuned = Tuned(_tsit5, solve_by)
tuned_rk4 = Tuned(RK4(), solve_by)
_newton = diffrax.with_stepsize_controller_tols(optimistix.Newton)()
_kvaerno5_newton = diffrax.Kvaerno5(root_finder=_newton)
kvaerno5 = With(Settings(_default, diffrax.Kvaerno5()))
kvaerno5_newton = Tuned(_kvaerno5_newton, solve_by)
kvaerno5_forward_mode = With(Settings(diffrax.ForwardMode(), _kvaerno5_newton), jax.jacfwd)
tuned_tuple = Tuned(_tsit5, solve_on_tuples)
