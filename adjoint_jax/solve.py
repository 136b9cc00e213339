"""`solve` and `odeint`."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, PyTree

from adjoint_jax import tree
from adjoint_jax.adjoints.adjoint import AbstractAdjoint, Inputs, Run, Saved, undifferentiable
from adjoint_jax.adjoints.discrete import DiscreteAdjoint
from adjoint_jax.controllers.controller import AbstractController, positive
from adjoint_jax.controllers.step_sizes import PIDController
from adjoint_jax.errors import raise_on_failure
from adjoint_jax.integrate import Integrator, Report
from adjoint_jax.interpolation import Trajectory
from adjoint_jax.lanes import differ_between_devices
from adjoint_jax.linear.jacobian import ravel
from adjoint_jax.linear.mass import algebraic_residuals, is_consistent
from adjoint_jax.problem import (
    Problem,
    RunningCost,
    VectorField,
    canonical_args,
    canonical_state,
    check_function,
    hoist,
    hoist_running_cost,
    state_precision,
    time_dtype,
)
from adjoint_jax.saveat import Requests, Rows, SaveAt, hoist_observable, observe
from adjoint_jax.solution import Solution
from adjoint_jax.solvers.methods import Tsit5
from adjoint_jax.solvers.solver import AbstractSolver
from adjoint_jax.tree import Arrays, Scalar


def solve(
    vector_field: VectorField,
    t0: Any,
    t1: Any,
    y0: PyTree[Any],
    args: PyTree[Any] = None,
    *,
    solver: AbstractSolver = Tsit5(),
    controller: AbstractController = PIDController(),
    saveat: PyTree[SaveAt] = SaveAt(t1=True),
    adjoint: AbstractAdjoint = DiscreteAdjoint(),
    running_cost: RunningCost | None = None,
    mass_matrix: Any = None,
    dt0: Any = None,
    max_steps: int = 4096,
    throw: bool = True,
) -> Solution:
    """Solve dy/dt = vector_field(t, y, args), y(t0) = y0, from t0 to t1; or M dy/dt = vector_field(t, y, args).

    - `vector_field(t, y, args)`: returns dy/dt, a pytree like y. A function, or an `equinox.Module`, whose arrays receive
      gradients, as do arrays that a function closes over.
    - `t0`, `t1`: numbers; t1 < t0 integrates backward. Times have their own dtype, float64 or float32: that of the times
      given, or JAX's default if they are Python numbers.
    - `y0`: a pytree of real or complex floating-point arrays, of any shapes. What is saved has its dtypes.
    - `args`: any pytree, passed on to `vector_field`. Python floats in it become arrays of the state's precision, so that
      changing them recompiles nothing; integers, strings and functions are static.
    - `solver`: the method. `controller`: how it steps. `saveat`: what is saved, a `SaveAt` or a pytree of several.
    - `adjoint`: how the solve is differentiated.
    - `running_cost(t, y, args)`: a floating-point number, or a pytree of arrays of them, whose integral from t0 to t1 is
      `solution.cost`: computed by the method's own quadrature over its stages, so to its order, but outside of the error
      estimate. The cost has the precision of the state.
    - `mass_matrix`: M, for Rosenbrock methods: a constant real array of shape (n, n) for the n entries of y (of all leaves
      in the order of `jax.flatten_util.ravel_pytree`, real and then imaginary parts of complex ones). It may be singular:
      the equations w^T vector_field(t, y, args) = 0 for all w with w^T M = 0 are algebraic. They must determine the part
      of y that M leaves out (a problem of index 1), and y0 must satisfy them.
    - `dt0`: the first step size of an adaptive controller, in units of time; by default it is estimated.
    - `max_steps`: the largest number of attempted steps of a controller without a given grid; static.
    - `throw`: raise `SolveError` if t1 is not reached. If False, see `solution.status`; what was not reached is NaN.

    Differentiable in reverse mode with respect to the arrays of `vector_field` and `args`, y0, t0, t1, `saveat.ts` and
    whatever `vector_field`, `running_cost` and `saveat.fn` close over. Tolerances, `dt0` and jump times are constants:
    differentiating with respect to them raises `TypeError`, and so do M and, with M, all times.

    Raises `TypeError` or `ValueError` for arguments that do not fit together, `SolveError` as described above; from within
    a jitted function, JAX's run-time error with the message of the `SolveError`.
    """
    saveats, structure = jax.tree.flatten(saveat, is_leaf=lambda node: isinstance(node, SaveAt))
    _check_arguments(vector_field, running_cost, solver, controller, saveats, adjoint, max_steps)
    dtype = time_dtype(t0, t1, *(save.ts for save in saveats if save.ts is not None))
    _check_times(t0, t1, dtype, saveats, controller)
    t0, t1 = tree.as_array(t0, dtype), tree.as_array(t1, dtype)
    saveats = [save if save.ts is None else eqx.tree_at(_ts, save, tree.as_array(save.ts, dtype)) for save in saveats]
    controller = controller.prepare(dtype)
    y0 = canonical_state(y0)
    mass = _checked_mass(mass_matrix, solver, y0)
    if mass is not None:
        explanation = "With mass_matrix, M, t0, t1 and ts are constants of the derivative: use jax.lax.stop_gradient."
        mass, t0, t1, saveats = undifferentiable((mass, t0, t1, saveats), explanation)
        _check_consistency(vector_field, canonical_args(args, y0), y0, jnp.asarray(t0), mass)
    dt0 = None if dt0 is None else positive("dt0", dt0, dtype)
    constants = "{} is a constant of the derivative: wrap it in jax.lax.stop_gradient."
    adjoint = adjoint.prepare(dtype)
    controller = undifferentiable(controller, constants.format("A controller's tolerance or time"))
    adjoint = undifferentiable(adjoint, constants.format("A tolerance or time of an adjoint's controller"))
    dt0 = undifferentiable(dt0, constants.format("dt0"))
    integrator = Integrator(solver, controller, dt0, max_steps)
    arguments = vector_field, running_cost, mass, t0, t1, y0, canonical_args(args, y0)
    given = _Given(*arguments, integrator, saveats, adjoint)
    if differ_between_devices(given):
        raise ValueError(
            "jax.shard_map follows which values differ between devices, and loops over steps do not: solve needs "
            "jax.shard_map(..., check_vma=False)."
        )
    parts, solution = _solve(tree.as_jax(given), throw) if tree.is_staged() else _compiled(given, throw)
    ts, ys = (jax.tree.unflatten(structure, part) for part in zip(*parts, strict=True))
    solution = Solution(tree.map(jnp.asarray, ts), ys, *solution)
    return raise_on_failure(solution) if throw else solution


def odeint(
    vector_field: VectorField,
    y0: PyTree[Any],
    ts: Any,
    args: PyTree[Any] = None,
    *,
    rtol: PyTree[Any] = 1e-5,
    atol: PyTree[Any] = 1e-7,
    **options: Any,
) -> PyTree[Array]:
    """The solution of dy/dt = vector_field(t, y, args) at the times ts, from y(ts[0]) = y0.

    Every leaf of the result has one row for each time, the first of which is y0. `ts` must be monotone; it may descend.
    `options` are those of `solve`: `solver`, `adjoint`, `controller` (instead of rtol and atol), `max_steps`, `throw`, ….
    Gradients, dtypes and errors are those of `solve`.
    """
    if np.ndim(ts) != 1 or np.size(ts) == 0:
        raise ValueError(f"odeint needs ts to be a one-dimensional array of times, got shape {np.shape(ts)}.")
    if "saveat" in options:
        raise ValueError("odeint saves at ts; to choose saveat yourself, call solve.")
    options.setdefault("controller", PIDController(rtol, atol))
    return solve(vector_field, ts[0], ts[-1], y0, args, saveat=SaveAt(ts), **options).ys


class _Given(NamedTuple):
    """The arguments of a solve, checked and canonical."""

    vector_field: VectorField
    running_cost: RunningCost | None
    mass: Array | None
    t0: Scalar
    t1: Scalar
    y0: Arrays
    args: PyTree[Any]
    integrator: Integrator
    saveats: list[SaveAt]
    adjoint: AbstractAdjoint


def _solve(given: _Given, throw: bool) -> tuple[list[tuple[Array | None, PyTree[Any]]], tuple[Any, ...]]:
    vector_field, running_cost, mass, t0, t1, y0, args, integrator, saveats, adjoint = given
    field, cost = hoist(vector_field, t0, y0, args), hoist_running_cost(running_cost, t0, y0, args)
    problem = Problem(field, cost, args, y0, t0, t1, mass)
    saveats = [_hoisted(save, problem) for save in saveats]
    requests = Requests(
        rows=tuple(Rows(save.ts, save.fn) for save in saveats if save.ts is not None),
        states=any(save.steps for save in saveats),
        dense=any(save.dense for save in saveats),
    )
    valid = _valid_times(problem, saveats, integrator.controller)
    saved, report = adjoint.solve(Inputs(problem, requests), Run(integrator, valid, throw))
    report = jax.lax.stop_gradient(report)
    rows = iter(saved.rows)
    assembly = [_assemble(save, problem, saved, report, next(rows) if save.ts is not None else None) for save in saveats]
    reached = jnp.where(report.failed, report.reached, t1)
    cost = None if running_cost is None else saved.cost
    return assembly, (cost, report.stats, report.status, reached, _trajectory(problem, saved, report, reached))


_compiled = eqx.filter_jit(_solve)
"""For callers that are not compiled themselves. Within a function that is, this would trace what a derivative replaces."""


def _hoisted(save: SaveAt, problem: Problem) -> SaveAt:
    if save.fn is None:
        return save
    return eqx.tree_at(lambda s: s.fn, save, hoist_observable(save.fn, problem), is_leaf=lambda node: node is save.fn)


def _assemble(
    save: SaveAt, problem: Problem, saved: Saved, report: Report, inner: Arrays | None
) -> tuple[Float[Array, " rows"] | None, PyTree[Any]]:
    """The times and rows of one SaveAt, in the order t0, inner rows, t1."""
    parts: list[tuple[Array, Arrays]] = []
    if save.t0:
        parts.append((problem.t0[None], _single(observe(save.fn, problem.t0, problem.y0, problem.args))))
    if save.ts is not None:
        parts.append((save.ts, inner))
    if save.steps:
        parts.append(_step_rows(save, problem, saved, report))
    if save.t1:
        parts.append((problem.t1[None], _single(_final_row(save, problem, saved, report))))
    if not parts:
        return None, None
    times, rows = zip(*parts, strict=True)
    return jnp.concatenate(times), tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)


def _final_row(save: SaveAt, problem: Problem, saved: Saved, report: Report) -> Arrays:
    """y(t1), or what fn makes of it; NaN if t1 was not reached. fn sees y0 then, so that its derivative stays finite."""
    if save.fn is None:
        return saved.y1
    row = observe(save.fn, problem.t1, tree.where(report.failed, problem.y0, saved.y1), problem.args)
    return _masked(row, ~report.failed)


def _step_rows(save: SaveAt, problem: Problem, saved: Saved, report: Report) -> tuple[Array, Arrays]:
    """The states after the accepted steps, moved together to the front; NaN behind them.

    The last one is y(t1) itself, so that derivatives with respect to t1 find it."""
    states = saved.states
    assert states is not None
    order = jnp.argsort(~states.taken, stable=True)
    valid = jnp.arange(order.size) < report.stats.accepted
    last = (jnp.arange(order.size) == report.stats.accepted - 1) & ~report.failed

    def gather(leaf: Array, final: Array, fallback: Array) -> Array:
        shape = (-1,) + (1,) * fallback.ndim
        rows = jnp.where(valid.reshape(shape), leaf[order], fallback)
        return jnp.where(last.reshape(shape), final, rows)

    times = jnp.where(last, problem.t1, jax.lax.stop_gradient(gather(states.ts, problem.t1, problem.t0)))
    rows = jax.vmap(lambda t, y: observe(save.fn, t, y, problem.args))(
        times, tree.map(gather, states.ys, saved.y1, problem.y0)
    )
    return jnp.where(valid, times, jnp.nan), jax.vmap(_masked)(rows, valid)


def _masked(row: Arrays, valid: Bool[Array, ""]) -> Arrays:
    """NaN in place of floating-point numbers (zero in place of others) where a row is not valid."""

    def mask(leaf: Array) -> Array:
        missing = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0
        return jnp.where(valid, leaf, jnp.asarray(missing, leaf.dtype))

    return tree.map(mask, row)


def _single(row: Arrays) -> Arrays:
    return tree.map(lambda leaf: jnp.asarray(leaf)[None], row)


def _trajectory(problem: Problem, saved: Saved, report: Report, reached: Scalar) -> Trajectory | None:
    if saved.dense is None:
        return None
    start, end = jax.lax.stop_gradient((saved.dense.start, saved.dense.end))
    return Trajectory(saved.dense._replace(start=start, end=end), report.slots, problem.t0, reached)


def _check_arguments(
    vector_field: Any, running_cost: Any, solver: Any, controller: Any, saveats: list[Any], adjoint: Any, max_steps: Any
) -> None:
    check_function(vector_field, "vector_field", "vector_field")
    if running_cost is not None:
        check_function(running_cost, "running_cost", "running_cost")
    expected = (
        ("solver", solver, AbstractSolver, "a method such as Tsit5(), or ExplicitRungeKutta(tableau)"),
        ("controller", controller, AbstractController, "a controller such as PIDController(rtol=1e-6, atol=1e-8)"),
        ("adjoint", adjoint, AbstractAdjoint, "an adjoint such as DiscreteAdjoint()"),
        *(("saveat", save, SaveAt, "a SaveAt or a pytree of them, such as SaveAt(ts)") for save in saveats),
    )
    for name, value, kind, description in expected:
        if isinstance(value, type):
            raise TypeError(f"{name} must be an instance, got the class {value.__name__}: write {value.__name__}(...).")
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be {description}, got {value!r}.")
    if not isinstance(max_steps, int | np.integer) or max_steps < 1:
        raise ValueError(f"max_steps must be a positive Python integer (it is static), got {max_steps!r}.")


def _checked_mass(mass_matrix: Any, solver: AbstractSolver, y0: Arrays) -> Array | None:
    """The mass matrix in the precision of the state. Raises `TypeError` or `ValueError` if it cannot be one."""
    if mass_matrix is None:
        return None
    if not solver.takes_mass:
        raise ValueError(f"{type(solver).__name__} does not solve problems with a mass_matrix: use Rodas5P().")
    size = jax.eval_shape(lambda y: ravel(y)[0], y0).shape[0]
    if np.shape(mass_matrix) != (size, size):
        raise ValueError(
            f"mass_matrix must have the shape {(size, size)}, for a state of {size} real numbers, got "
            f"{np.shape(mass_matrix)}."
        )
    if jnp.iscomplexobj(mass_matrix):
        raise TypeError(f"mass_matrix must be real, got {jnp.result_type(mass_matrix)}.")
    return jnp.asarray(mass_matrix, state_precision(y0))


def _check_consistency(vector_field: VectorField, args: PyTree[Any], y0: Arrays, t0: Scalar, mass: Array) -> None:
    """Raise `ValueError` if y0 is known now not to satisfy the algebraic equations of a mass matrix."""
    problem = Problem(vector_field, None, args, y0, t0, t0, mass)
    if tree.is_traced(*jax.tree.leaves(problem)):
        return
    residuals = algebraic_residuals(problem)
    if not tree.is_traced(*residuals) and not is_consistent(problem):
        worst = int(jnp.argmax(residuals.relative))
        raise ValueError(
            "y0 does not satisfy the algebraic equations that the singular mass_matrix leaves: the combination of "
            f"vector_field's entries with weights {np.round(residuals.directions[worst], 6)} must vanish at t0, and is "
            f"{residuals.values[worst]:.6g}. Change the entries of y0 that this equation determines."
        )


def _check_times(t0: Any, t1: Any, dtype: DTypeLike, saveats: list[SaveAt], controller: AbstractController) -> None:
    """Raise `ValueError` for times that make no sense, if their values are known now."""
    for time, name in ((t0, "t0"), (t1, "t1")):
        if np.ndim(time) != 0:
            raise ValueError(f"{name} must be a scalar, got shape {np.shape(time)}; use jax.vmap for several.")
        if jnp.iscomplexobj(time):
            raise TypeError(f"{name} must be a real number, got {time}, which is complex.")
    for save in saveats:
        if save.ts is not None and (np.ndim(save.ts) != 1 or np.size(save.ts) == 0):
            raise ValueError(
                f"SaveAt(ts) must be a one-dimensional array of at least one time, got shape {np.shape(save.ts)}."
            )
    given = [t0, t1, controller.given_times, *(save.ts for save in saveats)]
    if not tree.is_traced(*given):
        t0, t1, grid, *ts = (None if time is None else np.asarray(time, dtype) for time in given)
        with np.errstate(invalid="ignore"):
            for is_wrong, message in _time_faults(t0, t1, grid, ts):
                if is_wrong:
                    raise ValueError(message)


def _valid_times(problem: Problem, saveats: list[SaveAt], controller: AbstractController) -> Bool[Array, ""]:
    """Whether the times make sense, where their values are known only at run time."""
    faults = _time_faults(problem.t0, problem.t1, controller.given_times, [save.ts for save in saveats])
    return ~jnp.any(jnp.stack([is_wrong for is_wrong, _ in faults]))


def _time_faults(t0: Any, t1: Any, grid: Any, all_ts: list[Any]) -> Iterator[tuple[Any, str]]:
    """Conditions that must not hold, each with what it means."""
    direction = 1 - 2 * (t1 < t0)
    yield (t0 - t0) + (t1 - t1) != 0, f"t0 and t1 must be finite, got t0 = {t0} and t1 = {t1}."
    for ts in all_ts:
        if ts is not None:
            turns = ~(ts[1:] * direction >= ts[:-1] * direction).all()
            yield turns, f"SaveAt(ts) must be sorted in the direction from t0 = {t0} to t1 = {t1}, got {ts}."
            outside = ~((ts[0] * direction >= t0 * direction) & (ts[-1] * direction <= t1 * direction))
            yield outside, f"SaveAt(ts) must lie between t0 = {t0} and t1 = {t1}, got {ts}."
    if grid is not None:
        yield (grid[0] != t0) | (grid[-1] != t1), f"StepTo(ts) must run from t0 = {t0} to t1 = {t1}, got {grid}."
        turns = ~(grid[1:] * direction >= grid[:-1] * direction).all()
        yield turns, f"StepTo(ts) must be sorted in the direction from t0 = {t0} to t1 = {t1}, got {grid}."


def _ts(save: SaveAt) -> Any:
    return save.ts
