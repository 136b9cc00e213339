"""References of high precision, stored beside this file: `python -m benchmarks.references` makes them again.

Made by SciPy's DOP853 in float64 at rtol 1e-13, for fields evaluated by JAX: gradients of problems with few parameters from
the sensitivity equations, solved along with the state; those of networks from the adjoint equation, solved backward. Each
is solved a second time at rtol 1e-11, and how far the two differ is stored with it.

Of large results at most 4,096 entries are stored, evenly spread; of problems with lanes the first 64 lanes, and at most 256
entries of each.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp
from tqdm import tqdm

from benchmarks import problems
from benchmarks.problems import Problem
from benchmarks.programs import Quantity, loss

FOLDER = Path(__file__).parent / "references"
LANES = 64
ENTRIES = 4096
ENTRIES_OF_LANE = 256
PRECISION = 1e-13
CHECK = 1e-11


def error(numbers: np.ndarray, problem: Problem, quantity: Quantity) -> float:
    """The largest deviation from the reference, relative to its largest entry; with lanes, the median of theirs."""
    expected, scale = _stored(problem.reference, quantity)
    lanes = min(len(numbers), len(expected))
    if not np.all(np.isfinite(numbers)):
        return float("nan")
    deviation = np.max(np.abs(_sample(numbers[:lanes], problem) - expected[:lanes]), axis=1)
    return float(np.median(deviation / scale[:lanes]))


def check(problem: Problem) -> None:
    """Raise `FileNotFoundError` if the problem has no reference, before anything is measured."""
    for quantity in Quantity:
        _stored(problem.reference, quantity)


@functools.cache
def _stored(name: str, quantity: Quantity) -> tuple[np.ndarray, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as stored:
        return stored[quantity.value], stored[f"{quantity.value}-scale"]


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
    cotangent = np.asarray(jax.grad(loss)(jnp.asarray(end)))
    start = np.concatenate([end, cotangent, np.zeros(parameters.size)])
    gradient = _solved(reverse_rate, start, problem.times[::-1], rtol)[-1, 2 * size :]
    return Truth(end[None], gradient[None])


def _solved(rate: Callable[..., object], start: np.ndarray, times: np.ndarray, rtol: float) -> np.ndarray:
    """The states at the times."""
    times = times.astype(np.float64)
    solution = solve_ivp(rate, times[[0, -1]], start, "DOP853", t_eval=times, rtol=rtol, atol=rtol / 10)
    if not solution.success:
        raise ArithmeticError(solution.message)
    return solution.y.T


Method = Callable[[Problem, float], Truth]


def everything() -> list[tuple[Problem, Method]]:
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
    return [(p, by_sensitivities) for p in systems] + [(p, by_adjoint) for p in networks]


def make(problem: Problem, method: Method) -> None:
    """Compute and store one reference."""
    precise, check = method(problem, PRECISION), method(problem, CHECK)
    stored = {}
    for name, truth, other in zip(Truth._fields, precise, check, strict=True):
        scale = np.max(np.abs(truth), axis=1)
        stored[name], stored[f"{name}-scale"] = _sample(truth, problem), scale
        stored[f"{name}-doubt"] = np.max(np.max(np.abs(truth - other), axis=1) / scale)
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / f"{problem.reference}.npz", **stored)
    tqdm.write(f"{problem.reference}: in doubt by {stored['forward-doubt']:.0e}, {stored['gradient-doubt']:.0e}")


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    for each in tqdm(everything()):
        make(*each)
