"""Adaptive Tsit5 and its transposed steps, written by hand for one problem: times and states in buffers, one loop to fill
them, one to walk back. A floor of a build with a discrete adjoint: it knows nothing of failures, of lanes that have ended,
of segments, of statistics, or of how long a first step should be."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import adjoint_jax as aj
from benchmarks.problems import Field, Problem
from benchmarks.programs import JaxProgram, Program, Quantity, Told

TABLEAU = aj.Tsit5().tableau
ROWS = 8
"""Save times that are looked at in a step: more than lie in any."""


class Saved(NamedTuple):
    """What is saved: rows at times, or where there are none (None) the state at t1."""

    ts: Any

    def first(self, start: Any) -> Any:
        """The first save time to look at in a step."""
        return 0 if self.ts is None else jnp.minimum(jnp.searchsorted(self.ts, start, side="right"), len(self.ts) - ROWS)

    def after(self, field: Field, y: Any, p: Any, t: Any, h: Any, first: Any) -> tuple[Any, Any]:
        """The state after a step, and those at the save times from `first` on, which are in the step or ignored."""
        after, slopes = tsit5_step(field, t, h, y, p, None)
        return after, self.rows(t, h, y, slopes, first)

    def rows(self, t: Any, h: Any, y: Any, slopes: list[Any], first: Any) -> Any:
        if self.ts is None:
            return None
        s = (jax.lax.dynamic_slice_in_dim(self.ts, first, ROWS) - t) / h
        weights = [sum(c * s ** (power + 1) for power, c in enumerate(row)) for row in TABLEAU.dense]
        return y + h * sum(w[:, None] * k for w, k in zip(weights, slopes, strict=True))

    def written(self, ys: Any, first: Any, start: Any, end: Any, rows: Any) -> Any:
        """With those rows that are in a step from start to end."""
        if self.ts is None:
            return ys
        new = jnp.where(self._inside(first, start, end), rows, jax.lax.dynamic_slice_in_dim(ys, first, ROWS))
        return jax.lax.dynamic_update_slice_in_dim(ys, new, first, 0)

    def said(self, g: Any, first: Any, start: Any, end: Any) -> Any:
        """What the loss says of those rows."""
        if self.ts is None:
            return None
        return jnp.where(self._inside(first, start, end), jax.lax.dynamic_slice_in_dim(g, first, ROWS), 0.0)

    def said_at_t1(self, g: Any, y: Any) -> Any:
        return g if self.ts is None else jnp.zeros_like(y)

    def _inside(self, first: Any, start: Any, end: Any) -> Any:
        times = jax.lax.dynamic_slice_in_dim(self.ts, first, ROWS)
        return ((times > start) & (times <= end))[:, None]


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
    save = Saved(None if problem.ts is None else jnp.asarray(problem.ts))

    def steps(y0: Any, p: Any, tolerance: Any) -> Walk:
        def attempt(walk: Walk) -> Walk:
            h = jnp.minimum(walk.h, t1 - walk.t)
            after, slopes = tsit5_step(field, walk.t, h, walk.y, p, walk.slope)
            ratio = error_ratio(tolerance, h * weighted(TABLEAU.b_error, slopes), walk.y, after)
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

    def saved(walk: Walk, y0: Any, p: Any) -> Any:
        if save.ts is None:
            return walk.y

        def fill(index: Any, ys: Any) -> Any:
            start, end = walk.times[index], walk.times[index + 1]
            first = save.first(start)
            rows = save.after(field, walk.states[index], p, start, end - start, first)[1]
            return save.written(ys, first, start, end, rows)

        return jax.lax.fori_loop(0, walk.steps, fill, jnp.tile(y0, (len(save.ts), 1)))

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
            start, end = walk.times[index], walk.times[index + 1]
            first = save.first(start)
            pull = jax.vjp(lambda y, p: save.after(field, y, p, start, end - start, first), walk.states[index], p)[1]
            a, gradient = pull((carry[0], save.said(g, first, start, end)))
            return a, jax.tree.map(jnp.add, carry[1], gradient)

        start = save.said_at_t1(g, walk.y), jax.tree.map(jnp.zeros_like, p)
        a, gradient = jax.lax.fori_loop(0, walk.steps, transpose, start)
        return a, gradient, None

    solve.defvjp(forward, backward)

    return telling_nothing(problem, quantity, solve)


def telling_nothing(problem: Problem, quantity: Quantity, solve: Callable[..., Any]) -> Program:
    """The program of a solve that keeps no statistics."""

    def program(y0: Any, parameters: Any, tolerance: Any) -> tuple[Any, Told]:
        return solve(y0, parameters, tolerance), {}

    return JaxProgram(problem, quantity, program)


def error_ratio(tolerance: Any, error: Any, y: Any, after: Any) -> Any:
    """The size of an error; one is what is tolerated."""
    return jnp.sqrt(jnp.mean((error / (tolerance * (1 + jnp.maximum(abs(y), abs(after))))) ** 2))


def tsit5_step(field: Field, t: Any, h: Any, y: Any, p: Any, slope: Any) -> tuple[Any, list[Any]]:
    """The state after a step, and its stages, of which the first may be known."""
    slopes = [field(t, y, p) if slope is None else slope]
    for row, c in zip(TABLEAU.a[1:], TABLEAU.c[1:], strict=True):
        slopes.append(field(t + c * h, y + h * weighted(row, slopes), p))
    return y + h * weighted(TABLEAU.b, slopes), slopes


def weighted(weights: Any, slopes: list[Any]) -> Any:
    return sum(w * k for w, k in zip(weights, slopes, strict=True) if w)
