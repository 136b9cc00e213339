"""Adaptive Tsit5 and its transposed steps, written by hand for one problem: times and states in buffers, one loop to fill
them, one to walk back. The floor of a build with a discrete adjoint: it knows nothing of failures, of lanes that have
ended, of segments, or of statistics."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import adjoint_jax as aj
from benchmarks.problems import Field, Problem
from benchmarks.programs import JaxProgram, Program, Quantity, Told

TABLEAU = aj.Tsit5().tableau
ROWS = 8
"""Save times that are looked at in a step: more than lie in any."""


class Walk(NamedTuple):
    """Where the forward loop stands, and the starts and states of its steps."""

    t: Any
    h: Any
    y: Any
    slope: Any
    steps: Any
    times: Any
    states: Any


def adaptive(problem: Problem, quantity: Quantity) -> Program:
    """The solve, with a derivative of its own."""
    field, dtype = problem.equation.field(jnp), problem.dtype
    t0, t1 = jnp.asarray(problem.t0, dtype), jnp.asarray(problem.t1, dtype)
    ts = None if problem.ts is None else jnp.asarray(problem.ts)

    def steps(y0: Any, p: Any, tolerance: Any) -> Walk:
        def attempt(walk: Walk) -> Walk:
            h = jnp.minimum(walk.h, t1 - walk.t)
            after, slopes = _step(field, walk.t, h, walk.y, p, walk.slope)
            error = h * _weighted(TABLEAU.b_error, slopes)
            scale = tolerance * (1 + jnp.maximum(abs(walk.y), abs(after)))
            ratio = jnp.sqrt(jnp.mean((error / scale) ** 2))
            accepted = ratio <= 1
            return Walk(
                jnp.where(accepted, walk.t + h, walk.t),
                h * jnp.clip(0.9 * ratio**-0.2, 0.2, 10.0),
                jnp.where(accepted, after, walk.y),
                jnp.where(accepted, slopes[-1], walk.slope),
                walk.steps + accepted,
                walk.times.at[walk.steps].set(walk.t),
                walk.states.at[walk.steps].set(walk.y),
            )

        times, states = jnp.full(problem.max_steps + 1, t1), jnp.zeros((problem.max_steps, *y0.shape), dtype)
        start = Walk(t0, 0.01 * (t1 - t0), y0, field(t0, y0, p), 0, times, states)
        walk = jax.lax.while_loop(lambda walk: walk.t < t1, attempt, start)
        return walk._replace(times=walk.times.at[walk.steps].set(t1))

    def with_rows(y: Any, p: Any, t: Any, h: Any, first: Any) -> tuple[Any, Any]:
        """The state after a step, and those at the save times from `first` on, which are in the step or ignored."""
        after, slopes = _step(field, t, h, y, p, None)
        if ts is None:
            return after, None
        s = (jax.lax.dynamic_slice_in_dim(ts, first, ROWS) - t) / h
        weights = [sum(c * s ** (power + 1) for power, c in enumerate(row)) for row in TABLEAU.dense]
        return after, y + h * sum(w[:, None] * k for w, k in zip(weights, slopes, strict=True))

    def rows_of(walk: Walk, index: Any) -> tuple[Any, Any]:
        """The first save time to look at in a step, and which of those from it on lie in the step."""
        if ts is None:
            return 0, None
        first = jnp.minimum(jnp.searchsorted(ts, walk.times[index], side="right"), len(ts) - ROWS)
        times = jax.lax.dynamic_slice_in_dim(ts, first, ROWS)
        return first, ((times > walk.times[index]) & (times <= walk.times[index + 1]))[:, None]

    def saved(walk: Walk, y0: Any, p: Any) -> Any:
        if ts is None:
            return walk.y

        def fill(index: Any, ys: Any) -> Any:
            first, inside = rows_of(walk, index)
            t, h = walk.times[index], walk.times[index + 1] - walk.times[index]
            new, old = with_rows(walk.states[index], p, t, h, first)[1], jax.lax.dynamic_slice_in_dim(ys, first, ROWS)
            return jax.lax.dynamic_update_slice_in_dim(ys, jnp.where(inside, new, old), first, 0)

        return jax.lax.fori_loop(0, walk.steps, fill, jnp.tile(y0, (len(ts), 1)))

    @jax.custom_vjp
    def solve(y0: Any, p: Any, tolerance: Any) -> Any:
        return saved(steps(y0, p, tolerance), y0, p)

    def forward(y0: Any, p: Any, tolerance: Any) -> tuple[Any, Any]:
        walk = steps(y0, p, tolerance)
        return saved(walk, y0, p), (walk, p)

    def backward(residuals: tuple[Walk, Any], g: Any) -> tuple[Any, Any, Any]:
        walk, p = residuals

        def transpose(back: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            index = walk.steps - 1 - back
            first, inside = rows_of(walk, index)
            t, h = walk.times[index], walk.times[index + 1] - walk.times[index]
            pull = jax.vjp(lambda y, p: with_rows(y, p, t, h, first), walk.states[index], p)[1]
            of_rows = None if ts is None else jnp.where(inside, jax.lax.dynamic_slice_in_dim(g, first, ROWS), 0.0)
            a, gradient = pull((carry[0], of_rows))
            return a, jax.tree.map(jnp.add, carry[1], gradient)

        last = g if ts is None else jnp.zeros_like(walk.y)
        a, gradient = jax.lax.fori_loop(0, walk.steps, transpose, (last, jax.tree.map(jnp.zeros_like, p)))
        return a, gradient, None

    solve.defvjp(forward, backward)

    def program(y0: Any, parameters: Any, tolerance: Any) -> tuple[Any, Told]:
        return solve(y0, parameters, tolerance), {}

    return JaxProgram(problem, quantity, program)


def _step(field: Field, t: Any, h: Any, y: Any, p: Any, slope: Any) -> tuple[Any, list[Any]]:
    slopes = [field(t, y, p) if slope is None else slope]
    for row, c in zip(TABLEAU.a[1:], TABLEAU.c[1:], strict=True):
        slopes.append(field(t + c * h, y + h * _weighted(row, slopes), p))
    return y + h * _weighted(TABLEAU.b, slopes), slopes


def _weighted(weights: Any, slopes: list[Any]) -> Any:
    return sum(w * k for w, k in zip(weights, slopes, strict=True) if w)
