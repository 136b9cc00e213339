"""What is solved: problems with a loss, and references for its value and gradient that no timed library computed."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp


@dataclasses.dataclass(frozen=True)
class Problem:
    """dy/dt = field(t, y, parameters) saved at ts; the loss is the mean square of what is saved."""

    name: str
    field: Callable[[Any, Any, Any], Any]
    parameters: Any
    y0: jax.Array
    ts: jax.Array
    rtol: float
    atol: float


def loss(ys: jax.Array) -> jax.Array:
    """The mean square: its gradient weighs all save times."""
    return jnp.mean(jnp.square(ys))


def lotka_volterra(rtol: float) -> Problem:
    """Two states, four parameters, 100 save times, float64."""

    def field(t: Any, y: jax.Array, p: jax.Array) -> jax.Array:
        del t
        return jnp.stack([p[0] * y[0] - p[1] * y[0] * y[1], -p[2] * y[1] + p[3] * y[0] * y[1]])

    parameters = jnp.array([1.5, 1.0, 3.0, 1.0])
    ts = jnp.linspace(0.0, 10.0, 100)
    return Problem(f"Lotka-Volterra, rtol {rtol:.0e}", field, parameters, jnp.array([1.0, 1.0]), ts, rtol, rtol)


def neural(rtol: float) -> Problem:
    """A 16-64-64-16 tanh network on a batch of 128, float32, saved at the end."""

    def field(t: Any, y: jax.Array, p: Any) -> jax.Array:
        del t
        (w1, b1), (w2, b2), (w3, b3) = p
        return jnp.tanh(jnp.tanh(y @ w1 + b1) @ w2 + b2) @ w3 + b3

    sizes, generator = (16, 64, 64, 16), np.random.default_rng(0)
    parameters = tuple(
        (
            jnp.asarray(generator.normal(size=(m, n)) / np.sqrt(m), jnp.float32),
            jnp.asarray(0.1 * generator.normal(size=n), jnp.float32),
        )
        for m, n in itertools.pairwise(sizes)
    )
    y0 = jnp.asarray(generator.normal(size=(128, 16)), jnp.float32)
    return Problem("neural ODE 16-64-64-16", field, parameters, y0, jnp.array([0.0, 1.0], jnp.float32), rtol, rtol)


def reference(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The saved values and the flattened gradient, by SciPy's DOP853 at tolerance 1e-12 in float64: the values from the
    ODE, the gradient from the adjoint ODE between save times."""
    double = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), problem.parameters)
    flat, unravel = jax.flatten_util.ravel_pytree(double)
    y0, ts = np.asarray(problem.y0, np.float64), np.asarray(problem.ts, np.float64)
    shape, size = y0.shape, y0.size

    @jax.jit
    def forward(t: float, y: jax.Array) -> jax.Array:
        return problem.field(t, y.reshape(shape), double).ravel()

    @jax.jit
    def backward(t: float, state: jax.Array) -> jax.Array:
        y, a = state[:size].reshape(shape), state[size : 2 * size].reshape(shape)
        f, pullback = jax.vjp(lambda y, p: problem.field(t, y, unravel(p)), y, flat)
        da, dp = pullback(a)
        return jnp.concatenate([f.ravel(), -da.ravel(), -dp])

    options = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-12}
    saved = solve_ivp(forward, (ts[0], ts[-1]), y0.ravel(), t_eval=ts, **options).y.T
    cotangents = np.asarray(jax.grad(loss)(jnp.asarray(saved)))
    a, gradient = np.zeros(size), np.zeros(flat.size)
    for i in range(len(ts) - 1, 0, -1):
        state = np.concatenate([saved[i], a + cotangents[i], gradient])
        state = solve_ivp(backward, (ts[i], ts[i - 1]), state, **options).y[:, -1]
        a, gradient = state[size : 2 * size], state[2 * size :]
    return saved.reshape(len(ts), *shape), gradient
