"""References of high precision, stored beside this file: `python -m benchmarks.references [NAME ...]` makes them again.

Made by SciPy's DOP853 in float64 at rtol 1e-13, for fields evaluated by JAX: gradients of problems with few parameters from
the sensitivity equations, solved along with the state; those of networks from the adjoint equation, solved backward. Each
is solved a second time at rtol 1e-11, and how far the two differ is stored with it. References of stiff problems are those
of the tests, by collocation in extended precision, and CVODES with forward sensitivities shows how right they are; those of
their lanes are CVODES's.

Of large results at most 4,096 entries are stored, evenly spread; of problems with lanes the first 64 lanes, and at most 256
entries of each.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks import problems
from benchmarks.problems import Problem
from benchmarks.programs import Quantity, loss
from tests import stiff_problems

FOLDER = Path(__file__).parent / "references"
LANES = 64
ENTRIES = 4096
ENTRIES_OF_LANE = 256
PRECISION = 1e-13
CHECK = 1e-11


def error(numbers: np.ndarray, problem: Problem, quantity: Quantity) -> float:
    """The largest deviation from the reference, relative to its largest entry, or for stiff problems in their own units;
    with lanes, the median of theirs."""
    expected, scale = _stored(problem.reference, quantity)
    lanes = min(len(numbers), len(expected))
    if not np.all(np.isfinite(numbers)):
        return float("nan")
    deviations = np.abs(_sample(numbers[:lanes], problem) - expected[:lanes]) / scale[:lanes]
    return float(np.median(np.max(deviations, axis=1)))


def check(problem: Problem) -> None:
    """Raise `FileNotFoundError` if the problem has no reference, before anything is measured."""
    for quantity in Quantity:
        _stored(problem.reference, quantity)


@functools.cache
def _stored(name: str, quantity: Quantity) -> tuple[np.ndarray, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as stored:
        return stored[quantity.value], stored[f"{quantity.value}-scale"].reshape(len(stored[quantity.value]), -1)


def _sample(rows: np.ndarray, problem: Problem) -> np.ndarray:
    """Entries of each row, evenly spread."""
    size, most = rows.shape[1], ENTRIES if problem.lanes is None else ENTRIES_OF_LANE
    return rows if size <= most else rows[:, np.linspace(0, size - 1, most).astype(int)]


class Truth(NamedTuple):
    """Saved values and gradients, flat, one row for each lane."""

    forward: np.ndarray
    gradient: np.ndarray


def by_sensitivities(problem: Problem, rtol: float) -> Truth:
    """The state together with its derivatives with respect to the parameters; all lanes as one system."""
    field, size = problem.equation.field(jnp), problem.y0.size
    parameters = np.atleast_2d(problem.parameters)[:LANES].astype(np.float64)
    lanes, count = parameters.shape

    def rate(t: float, state: jax.Array, parameters: jax.Array) -> jax.Array:
        def tangent(dy: jax.Array, dp: jax.Array) -> jax.Array:
            return jax.jvp(lambda y, p: field(t, y, p), (state[0], parameters), (dy, dp))[1]

        moved = jax.vmap(tangent)(state[1:], jnp.eye(count))
        return jnp.concatenate([field(t, state[0], parameters)[None], moved])

    @jax.jit
    def all_rates(t: float, states: jax.Array) -> jax.Array:
        states = states.reshape(lanes, 1 + count, size)
        return jax.vmap(rate, (None, 0, 0))(t, states, parameters).ravel()

    start = np.zeros((lanes, 1 + count, size))
    start[:, 0] = problem.y0
    saved = _solved(all_rates, start.ravel(), problem.times, rtol).reshape(-1, *start.shape)
    saved = saved if problem.ts is not None else saved[-1:]
    values, tangents = saved[:, :, 0], saved[:, :, 1:]
    weights = 2 * values / (len(values) * size)
    return Truth(values.swapaxes(0, 1).reshape(lanes, -1), np.einsum("tli,tlpi->lp", weights, tangents))


def by_adjoint(problem: Problem, rtol: float) -> Truth:
    """The state forward, then the adjoint equation backward, together with the state and the parameters' integral."""
    parameters, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(lambda x: x.astype(np.float64), problem.parameters))
    shape, size, field = problem.y0.shape, problem.y0.size, problem.equation.field(jnp)

    @jax.jit
    def rate(t: float, y: jax.Array) -> jax.Array:
        return field(t, y.reshape(shape), unravel(parameters)).ravel()

    @jax.jit
    def reverse_rate(t: float, state: jax.Array) -> jax.Array:
        y, a = state[:size].reshape(shape), state[size : 2 * size].reshape(shape)
        f, pullback = jax.vjp(lambda y, p: field(t, y, unravel(p)), y, parameters)
        da, dp = pullback(a)
        return jnp.concatenate([f.ravel(), -da.ravel(), -dp])

    end = _solved(rate, problem.y0.ravel().astype(np.float64), problem.times, rtol)[-1]
    cotangent = np.asarray(jax.grad(loss, 1)(problem, jnp.asarray(end)))
    start = np.concatenate([end, cotangent, np.zeros(parameters.size)])
    gradient = _solved(reverse_rate, start, problem.times[::-1], rtol)[-1, 2 * size :]
    return Truth(end[None], gradient[None])


def _solved(rate: Callable[..., object], start: np.ndarray, times: np.ndarray, rtol: float) -> np.ndarray:
    """The states at the times."""
    from scipy.integrate import solve_ivp

    times = times.astype(np.float64)
    solution = solve_ivp(rate, times[[0, -1]], start, "DOP853", t_eval=times, rtol=rtol, atol=rtol / 10)
    if not solution.success:
        raise ArithmeticError(solution.message)
    return solution.y.T


def by_cvodes(problem: Problem, rtol: float) -> Truth:
    """CVODES's BDF with forward sensitivities, one lane after another."""
    import casadi

    y, p = casadi.SX.sym("y", problem.y0.size), casadi.SX.sym("p", problem.parameters.shape[-1])
    rate = casadi.vertcat(*problem.equation.of(0.0, casadi.vertsplit(y), casadi.vertsplit(p)))
    options = {"reltol": rtol, "abstol": rtol * problem.scale, "max_num_steps": 10**6}
    solve = casadi.integrator("solve", "cvodes", {"x": y, "p": p, "ode": rate}, problem.t0, [problem.t1], options)
    differentiate = solve.forward(p.numel())
    ends, gradients = [], []
    for parameters in np.atleast_2d(problem.parameters)[:LANES]:
        end = solve(x0=problem.y0, p=parameters)["xf"]
        tangents = differentiate(x0=problem.y0, p=parameters, out_xf=end, fwd_p=casadi.DM.eye(p.numel()))["fwd_xf"]
        ends.append(np.asarray(end).ravel())
        gradients.append(problem.weights @ np.asarray(tangents))
    return Truth(np.array(ends), np.array(gradients))


def by_collocation(problem: Problem) -> Truth:
    """What the tests have."""
    stored = stiff_problems.reference(problem.reference)
    return Truth(stored.ys[-1:], stored.end.args[None])


class Work(NamedTuple):
    """A problem, and two computations of its reference, of which the first is more precise."""

    problem: Problem
    precise: Callable[[Problem], Truth]
    check: Callable[[Problem], Truth]


def everything() -> Iterator[Work]:
    """All problems that have a reference, and how it is computed."""
    systems = [
        problems.lotka_volterra(),
        problems.lotka_volterra(LANES),
        problems.lorenz(LANES, np.float64),
        problems.van_der_pol(LANES),
        problems.duffing(1),
        *(problems.ring(size) for size in problems.RING_SIZES),
        *(problems.save_times(*times, count) for count in (None, LANES) for times in problems.SAVE_TIMES),
    ]
    networks = [problems.network(sizes, batch) for sizes, batch in problems.NETWORKS]
    networks.append(problems.residual_network(*problems.RESIDUAL))
    for method, some in ((by_sensitivities, systems), (by_adjoint, networks)):
        for problem in some:
            yield Work(problem, functools.partial(method, rtol=PRECISION), functools.partial(method, rtol=CHECK))
    for name in problems.STIFF:
        check = functools.partial(by_cvodes, rtol=CHECK)
        yield Work(problems.stiff(name), by_collocation, check)
        yield Work(problems.stiff(name, LANES), functools.partial(by_cvodes, rtol=1e-12), check)


def scales(problem: Problem, truth: Truth) -> Truth:
    """What errors are relative to. Stiff problems have components and rates of all sizes: every component's error is
    relative to its size, and derivatives are those with respect to the parameters' logarithms."""
    if problem.weights is None:
        return Truth(*(np.max(np.abs(part), axis=1, keepdims=True) for part in truth))
    sizes = np.abs(np.atleast_2d(problem.parameters)[:LANES])
    largest = np.max(np.abs(truth.gradient * sizes), axis=1, keepdims=True)
    return Truth(np.abs(truth.forward) + problem.scale, largest / sizes)


def make(work: Work) -> None:
    """Compute and store one reference."""
    problem, precise, check = work.problem, work.precise(work.problem), work.check(work.problem)
    stored = {}
    for name, truth, other, scale in zip(Truth._fields, precise, check, scales(problem, precise), strict=True):
        stored[name], stored[f"{name}-scale"] = _sample(truth, problem), scale
        stored[f"{name}-doubt"] = np.max(np.abs(truth - other) / scale)
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / f"{problem.reference}.npz", **stored)
    tqdm.write(f"{problem.reference}: in doubt by {stored['forward-doubt']:.0e}, {stored['gradient-doubt']:.0e}")


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    for each in tqdm([work for work in everything() if work.problem.reference in sys.argv[1:] or not sys.argv[1:]]):
        make(each)
