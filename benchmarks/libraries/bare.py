"""What one would write by hand in JAX for one problem, without a library: the floor that a library is measured against."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adjoint_jax as aj
from benchmarks.problems import Components, Field, Problem
from benchmarks.programs import JaxProgram, Program, Quantity, Told

Step = Callable[[Field, Any, Any, Any, Any], Any]
"""step(field, t, h, y, parameters) -> y at t + h."""
Carry = tuple[Any, Any]
Loop = Callable[[Callable[[Carry], Carry], Carry, int], Carry]
"""loop(step, start, steps) -> the end."""


def rk4_step(field: Field, t: Any, h: Any, y: Any, p: Any) -> Any:
    k1 = field(t, y, p)
    k2 = field(t + h / 2, y + h / 2 * k1, p)
    k3 = field(t + h / 2, y + h / 2 * k2, p)
    k4 = field(t + h, y + h * k3, p)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def tsit5_step(field: Field, t: Any, h: Any, y: Any, p: Any) -> Any:
    """Six stages: the seventh is for error estimates."""
    tableau = aj.Tsit5().tableau
    slopes: list[Any] = []
    for row, c in zip(tableau.a[:6], tableau.c[:6], strict=True):
        slopes.append(field(t + c * h, _combined(y, h, row, slopes), p))
    return _combined(y, h, tableau.b[:6], slopes)


def _combined(y: Any, h: Any, weights: Any, slopes: list[Any]) -> Any:
    return y + h * sum(w * k for w, k in zip(weights, slopes, strict=True)) if slopes else y


def plain(step: Callable[[Carry], Carry], start: Carry, steps: int) -> Carry:
    """One scan; its gradient keeps what every step leaves."""
    return jax.lax.scan(lambda carry, _: (step(carry), None), start, length=steps)[0]


def remat_steps(step: Callable[[Carry], Carry], start: Carry, steps: int) -> Carry:
    """One scan; its gradient keeps the state before every step."""
    return plain(jax.checkpoint(step), start, steps)


def remat_square_root(step: Callable[[Carry], Carry], start: Carry, steps: int) -> Carry:
    """Segments of about the square root of the number of steps; the gradient keeps the state before each, and takes its
    steps again."""
    segment = next(n for n in range(int(np.sqrt(steps)), 0, -1) if steps % n == 0)
    inner = jax.checkpoint(lambda carry: remat_steps(step, carry, segment))
    return plain(inner, start, steps // segment)


def fixed(problem: Problem, quantity: Quantity, step: Step, loop: Loop) -> Program:
    """A fixed number of steps of one method in one kind of loop."""
    field, steps = problem.equation.field(jnp), problem.steps
    assert steps is not None
    assert problem.ts is None

    def solve(y0: jax.Array, parameters: Any, tolerance: Any) -> tuple[jax.Array, Told]:
        del tolerance
        t0, t1 = (jnp.asarray(t, problem.dtype) for t in (problem.t0, problem.t1))
        h = (t1 - t0) / steps

        def advance(carry: Carry) -> Carry:
            t, y = carry
            return t + h, step(field, t, h, y, parameters)

        return loop(advance, (t0, y0), steps)[1], {}

    return JaxProgram(problem, quantity, solve)


rk4_plain = functools.partial(fixed, step=rk4_step, loop=plain)
rk4_remat = functools.partial(fixed, step=rk4_step, loop=remat_steps)
rk4_square_root = functools.partial(fixed, step=rk4_step, loop=remat_square_root)
tsit5_plain = functools.partial(fixed, step=tsit5_step, loop=plain)
tsit5_remat = functools.partial(fixed, step=tsit5_step, loop=remat_steps)


class LanesProgram(JaxProgram):
    """All lanes in one loop, each component an array with one entry for each lane; the gradient by forward mode."""

    def function(self) -> Callable[[Any, Any, Any], tuple[Any, Told]]:
        def values(y0: Any, parameters: Any, tolerance: Any) -> tuple[Any, Told]:
            return self.solve(y0, parameters, tolerance)

        def gradient(y0: Any, parameters: Any, tolerance: Any) -> tuple[Any, Told]:
            def cost(shift: jax.Array) -> jax.Array:
                return jnp.mean(jnp.square(self.solve(y0, parameters + shift, tolerance)[0]), axis=-1)

            return jax.jacfwd(cost)(jnp.zeros(parameters.shape[-1], parameters.dtype)), {}

        return values if self.quantity is Quantity.FORWARD else gradient

    def _of_lanes(self, one: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
        """A solve is of all lanes already."""
        return one


def lanes(problem: Problem, quantity: Quantity) -> Program:
    """Adaptive Tsit5 for many lanes of few components, with a step size for each lane."""
    components = problem.equation
    assert isinstance(components, Components)
    assert problem.ts is None

    def solve(y0: jax.Array, parameters: jax.Array, tolerance: jax.Array) -> tuple[jax.Array, Told]:
        count = parameters.shape[0]
        p, y = list(parameters.T), tuple(jnp.full(count, y0[i]) for i in range(y0.size))
        t0, t1 = (jnp.full(count, t, problem.dtype) for t in (problem.t0, problem.t1))
        end, steps = _adaptive(components, t0, t1, y, p, tolerance)
        return jnp.stack(end, -1), {"steps": steps}

    return LanesProgram(problem, quantity, solve)


def _adaptive(
    components: Components, t0: jax.Array, t1: jax.Array, y: tuple[Any, ...], p: list[Any], tolerance: jax.Array
) -> tuple[tuple[Any, ...], jax.Array]:
    tableau = aj.Tsit5().tableau
    states = range(len(y))

    def attempt(t: Any, h: Any, y: tuple[Any, ...], first: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any, Any]:
        slopes, point = [first], y
        for row, c in zip(tableau.a[1:], tableau.c[1:], strict=True):
            point = tuple(_combined(y[i], h, row, [k[i] for k in slopes]) for i in states)
            slopes.append(components.of(t + c * h, point, p))
        zero = [jnp.zeros_like(t)] * len(y)
        errors = [_combined(zero[i], h, tableau.b_error, [k[i] for k in slopes]) for i in states]
        scaled = [e / (tolerance * (1 + jnp.maximum(abs(a), abs(b)))) for e, a, b in zip(errors, y, point, strict=True)]
        return point, slopes[-1], jnp.sqrt(sum(s * s for s in scaled) / len(y))

    def body(carry: Any) -> Any:
        t, h, y, first, steps = carry
        h = jnp.minimum(h, t1 - t)
        after, last, ratio = attempt(t, h, y, first)
        ratio = jax.lax.stop_gradient(ratio)
        accepted, running = ratio <= 1, t < t1
        factor = jnp.clip(0.9 * jnp.maximum(ratio, 1e-10) ** -0.2, 0.2, 10.0)
        moved = accepted & running

        def select(new: tuple[Any, ...], old: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(jnp.where(moved, a, b) for a, b in zip(new, old, strict=True))

        t = jnp.where(moved, jnp.where(h >= t1 - t, t1, t + h), t)
        return t, jax.lax.stop_gradient(h * factor), select(after, y), select(last, first), steps + running

    start = t0, jnp.full_like(t0, 0.01), y, components.of(t0, y, p), jnp.zeros(t0.shape, jnp.int32)
    end = jax.lax.while_loop(lambda carry: jnp.any(carry[0] < t1), body, start)
    return end[2], end[4]
