"""The same by hand, with what an adjoint of any number of steps cannot do without: states are held of one segment alone,
earlier ones are taken again from checkpoints. And the first step's size is chosen. A floor with these two parts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.libraries.bare_adjoint import TABLEAU, Saved, error_ratio, telling_nothing, tsit5_step, weighted
from benchmarks.problems import Field, Problem
from benchmarks.programs import Program, Quantity


class Walk(NamedTuple):
    """Where the forward loop stands; the starts of all steps, the states of those of a segment, and those at the starts of
    segments; and what is saved."""

    t: Any
    h: Any
    y: Any
    slope: Any
    steps: Any
    times: Any
    states: Any
    checkpoints: Any
    ys: Any


class Back(NamedTuple):
    """Where the walk back stands: steps left, the states of a segment, and what the loss says."""

    left: Any
    states: Any
    a: Any
    gradient: Any


def adaptive(problem: Problem, quantity: Quantity) -> Program:
    """The solve, with a derivative of its own."""
    field, dtype = problem.equation.field(jnp), problem.dtype
    t0, t1 = jnp.asarray(problem.t0, dtype), jnp.asarray(problem.t1, dtype)
    save = Saved(None if problem.ts is None else jnp.asarray(problem.ts))
    segment = round(problem.max_steps**0.5)

    def steps(y0: Any, p: Any, tolerance: Any) -> Walk:
        def attempt(walk: Walk) -> Walk:
            h = jnp.minimum(walk.h, t1 - walk.t)
            after, slopes = tsit5_step(field, walk.t, h, walk.y, p, walk.slope)
            ratio = error_ratio(tolerance, h * weighted(TABLEAU.b_error, slopes), walk.y, after)
            accepted, first = ratio <= 1, save.first(walk.t)
            end = jnp.where(accepted, walk.t + h, walk.t)
            return Walk(
                t=end,
                h=h * jnp.clip(0.9 * ratio**-0.2, 0.2, 10.0),
                y=jnp.where(accepted, after, walk.y),
                slope=jnp.where(accepted, slopes[-1], walk.slope),
                steps=walk.steps + accepted,
                times=walk.times.at[walk.steps].set(walk.t),
                states=walk.states.at[walk.steps % segment].set(walk.y),
                checkpoints=walk.checkpoints,
                ys=save.written(walk.ys, first, walk.t, end, save.rows(walk.t, h, walk.y, slopes, first)),
            )

        def fill(walk: Walk) -> Walk:
            end = walk.steps + segment
            walk = walk._replace(checkpoints=walk.checkpoints.at[walk.steps // segment].set(walk.y))
            return jax.lax.while_loop(lambda walk: (walk.t < t1) & (walk.steps < end), attempt, walk)

        blank, slope = jnp.zeros((segment, *y0.shape), dtype), field(t0, y0, p)
        h, times = _first_size(field, t0, y0, slope, p, tolerance), jnp.full(problem.max_steps + 1, t1)
        ys = None if save.ts is None else jnp.tile(y0, (len(save.ts), 1))
        walk = jax.lax.while_loop(lambda walk: walk.t < t1, fill, Walk(t0, h, y0, slope, 0, times, blank, blank, ys))
        return walk._replace(times=walk.times.at[walk.steps].set(t1))

    def saved(walk: Walk) -> Any:
        return walk.y if save.ts is None else walk.ys

    @jax.custom_vjp
    def solve(y0: Any, p: Any, tolerance: Any) -> Any:
        return saved(steps(y0, p, tolerance))

    def forward(y0: Any, p: Any, tolerance: Any) -> tuple[Any, Any]:
        walk = steps(y0, p, tolerance)
        return saved(walk), (walk, p)

    def backward(residuals: tuple[Walk, Any], g: Any) -> tuple[Any, Any, Any]:
        walk, p = residuals

        def again(begin: Any, count: Any, states: Any) -> Any:
            """The states of a segment, of which so many steps are taken again."""

            def take(index: Any, taken: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
                y, slope, states = taken
                start, end = walk.times[begin + index], walk.times[begin + index + 1]
                after, slopes = tsit5_step(field, start, end - start, y, p, slope)
                return after, slopes[-1], states.at[index].set(y)

            y = walk.checkpoints[begin // segment]
            slope = jax.lax.cond(count > 0, lambda: field(walk.times[begin], y, p), lambda: y)
            return jax.lax.fori_loop(0, count, take, (y, slope, states))[2]

        def reverse_segment(back: Back) -> Back:
            begin = (back.left - 1) // segment * segment
            states = again(begin, jnp.where(back.left == walk.steps, 0, segment), back.states)

            def transpose(reversed_index: Any, swept: tuple[Any, Any]) -> tuple[Any, Any]:
                index = back.left - 1 - reversed_index
                start, end = walk.times[index], walk.times[index + 1]
                first, y = save.first(start), states[index - begin]
                pull = jax.vjp(lambda y, p: save.after(field, y, p, start, end - start, first), y, p)[1]
                a, gradient = pull((swept[0], save.said(g, first, start, end)))
                return a, jax.tree.map(jnp.add, swept[1], gradient)

            a, gradient = jax.lax.fori_loop(0, back.left - begin, transpose, (back.a, back.gradient))
            return Back(begin, states, a, gradient)

        back = Back(walk.steps, walk.states, save.said_at_t1(g, walk.y), jax.tree.map(jnp.zeros_like, p))
        back = jax.lax.while_loop(lambda back: back.left > 0, reverse_segment, back)
        return back.a, back.gradient, None

    solve.defvjp(forward, backward)

    return telling_nothing(problem, quantity, solve)


def _first_size(field: Field, t0: Any, y0: Any, slope: Any, p: Any, tolerance: Any) -> Any:
    """E. Hairer, S. P. Norsett and G. Wanner, "Solving Ordinary Differential Equations I", section II.4."""
    d0, d1 = error_ratio(tolerance, y0, y0, y0), error_ratio(tolerance, slope, y0, y0)
    h0 = jnp.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    d2 = error_ratio(tolerance, field(t0 + h0, y0 + h0 * slope, p) - slope, y0, y0) / h0
    largest = jnp.maximum(d1, d2)
    return jnp.minimum(100 * h0, jnp.where(largest <= 1e-15, jnp.maximum(1e-6, 1e-3 * h0), (0.01 / largest) ** 0.2))
