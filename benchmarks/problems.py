"""What is solved: problems with a loss, and references for its value and gradient that no timed library computed."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp


@dataclasses.dataclass(frozen=True)
class Problem:
    """dy/dt = field(t, y, parameters) saved at ts; the loss is the mean square of what is saved.

    With `lanes`, so many of them from the same y0, with a leading axis on the parameters.
    """

    name: str
    field: Callable[[Any, Any, Any], Any]
    parameters: Any
    y0: jax.Array
    ts: jax.Array
    rtol: float
    atol: float
    lanes: int | None = None

    def together(self) -> tuple[Callable[[Any, Any, Any], Any], jax.Array]:
        """The field and the initial state of all lanes as one system."""
        if self.lanes is None:
            return self.field, self.y0
        return jax.vmap(self.field, (None, 0, 0)), jnp.broadcast_to(self.y0, (self.lanes, *self.y0.shape))


def loss(ys: jax.Array) -> jax.Array:
    """The mean square: its gradient weighs all save times."""
    return jnp.mean(jnp.square(ys))


def predator_prey(t: Any, y: jax.Array, p: jax.Array) -> jax.Array:
    """Lotka and Volterra's equations."""
    del t
    return jnp.stack([p[0] * y[0] - p[1] * y[0] * y[1], -p[2] * y[1] + p[3] * y[0] * y[1]])


def lotka_volterra(rtol: float) -> Problem:
    """Two states, four parameters, 100 save times, float64."""
    parameters, ts = jnp.array([1.5, 1.0, 3.0, 1.0]), jnp.linspace(0.0, 10.0, 100)
    return Problem(f"Lotka-Volterra, rtol {rtol:.0e}", predator_prey, parameters, jnp.array([1.0, 1.0]), ts, rtol, rtol)


def save_times(end: float, count: int, lanes: int | None) -> Problem:
    """Lotka-Volterra to a given time at tolerance 1e-6, saved so many times; lanes have random parameters."""
    parameters = jnp.array([1.5, 1.0, 3.0, 1.0])
    if lanes is not None:
        parameters = parameters * np.random.default_rng(0).uniform(0.9, 1.1, size=(lanes, 4))
    name = f"to t = {end:g}, {count} save times" + ("" if lanes is None else f", {lanes} lanes")
    ts = jnp.linspace(0.0, end, count)
    return Problem(name, predator_prey, parameters, jnp.array([1.0, 1.0]), ts, 1e-6, 1e-6, lanes)


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


class Reference:
    """The saved values and the gradient, by SciPy's DOP853 at tolerance 1e-12 in float64: the values from the ODE, the
    gradient from the adjoint ODE between save times."""

    options: ClassVar[dict[str, Any]] = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-12}

    def __init__(self, problem: Problem):
        self.problem = problem
        self.parameters = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), problem.parameters)
        self.field, y0 = problem.together()
        self.shape, self.size = y0.shape, y0.size
        self.ts = np.asarray(problem.ts, np.float64)

        @jax.jit
        def forward(t: float, y: jax.Array) -> jax.Array:
            return self.field(t, y.reshape(self.shape), self.parameters).ravel()

        ends, start = (self.ts[0], self.ts[-1]), np.asarray(y0, np.float64).ravel()
        self.saved = solve_ivp(forward, ends, start, t_eval=self.ts, **self.options).y.T

    def values(self) -> np.ndarray:
        """What is saved, lanes first if there are any."""
        values = self.saved.reshape(len(self.ts), *self.shape)
        return values if self.problem.lanes is None else np.moveaxis(values, 1, 0)

    def gradient(self) -> np.ndarray:
        """The flattened gradient of the loss, of all lanes if there are any."""
        flat, unravel = jax.flatten_util.ravel_pytree(self.parameters)

        @jax.jit
        def backward(t: float, state: jax.Array) -> jax.Array:
            y, a = state[: self.size].reshape(self.shape), state[self.size : 2 * self.size].reshape(self.shape)
            f, pullback = jax.vjp(lambda y, p: self.field(t, y, unravel(p)), y, flat)
            da, dp = pullback(a)
            return jnp.concatenate([f.ravel(), -da.ravel(), -dp])

        lanes = 1 if self.problem.lanes is None else self.problem.lanes
        cotangents = lanes * np.asarray(jax.grad(loss)(jnp.asarray(self.saved)))
        a, gradient = np.zeros(self.size), np.zeros(flat.size)
        for i in range(len(self.ts) - 1, 0, -1):
            state = np.concatenate([self.saved[i], a + cotangents[i], gradient])
            state = solve_ivp(backward, (self.ts[i], self.ts[i - 1]), state, **self.options).y[:, -1]
            a, gradient = state[self.size : 2 * self.size], state[2 * self.size :]
        return gradient
