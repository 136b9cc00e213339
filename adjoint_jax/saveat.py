"""What a solve saves."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from adjoint_jax import tree
from adjoint_jax.hoisting import hoisted
from adjoint_jax.lanes import in_lanes, on_one_cpu
from adjoint_jax.problem import Problem
from adjoint_jax.tree import Arrays, Scalar

Observable = Callable[[Scalar, PyTree[Any], PyTree[Any]], PyTree[Any]]


class SaveAt(eqx.Module):
    """What to save; `solve` takes one, or a pytree of several, each with a `ts` and a `fn` of its own.

    The rows of `solution.ys` are, in this order: y(t0) if `t0`; y at `ts`, or after every step if `steps`; y(t1) if `t1`.

    - `t0`, `t1`: save the initial, the final state.
    - `ts`: times between t0 and t1 in the direction of integration (ascending if t0 < t1), repetitions allowed. They are
      reached by dense output; steps do not stop there.
    - `steps`: save after every accepted step. There are `max_steps` rows (for a fixed grid, as many as it has steps), of
      which the first `solution.stats.accepted` are valid; times and states of the others are NaN.
    - `dense`: record every step's interpolant, for `solution.evaluate(t)`.
    - `fn(t, y, args)`: applied to the state before saving, one state at a time, so that little is stored where little is
      wanted. Any pytree may be returned.

    Raises `ValueError` if nothing is to be saved, or for combinations that have no meaning.
    """

    ts: Any = eqx.field(default=None, converter=tree.as_times)
    t0: bool = eqx.field(static=True, default=False, kw_only=True)
    t1: bool = eqx.field(static=True, default=False, kw_only=True)
    steps: bool = eqx.field(static=True, default=False, kw_only=True)
    dense: bool = eqx.field(static=True, default=False, kw_only=True)
    fn: Observable | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self) -> None:
        if self.ts is None and not (self.t0 or self.t1 or self.steps or self.dense):
            raise ValueError("SaveAt() saves nothing: give it at least one of ts, t0, t1, steps and dense.")
        if self.steps and self.ts is not None:
            raise ValueError("SaveAt(ts=..., steps=True) would mix two orders of rows: pass two SaveAts, as a tuple.")
        if self.steps and self.t1:
            raise ValueError("SaveAt(steps=True, t1=True) would save y(t1) twice: the last step ends at t1.")
        if self.dense and self.fn is not None:
            raise ValueError("SaveAt(dense=True, fn=...): fn does not apply to dense output; apply it to evaluate(t).")


def observe(fn: Observable | None, t: Scalar, y: Arrays, args: PyTree[Any]) -> Arrays:
    """What is saved of a state: fn(t, y, args), or the state itself."""
    return y if fn is None else tree.map(jnp.asarray, fn(t, y, args))


class Rows(eqx.Module):
    """The states at given times, or what `fn` makes of them."""

    ts: Float[Array, " rows"]
    fn: Observable | None

    def apply(self, t: Scalar, y: Arrays, args: PyTree[Any]) -> Arrays:
        """One row."""
        return observe(self.fn, t, y, args)

    def until(self, now: Scalar, direction: Scalar) -> Int[Array, ""]:
        """How many rows do not lie behind `now`: on a CPU by bisection. Lanes would have to gather: they look at all."""
        search = in_lanes(_bisected, _counted) if on_one_cpu() else _counted
        return search(self.ts, now, direction)


def _bisected(ts: Float[Array, " rows"], now: Scalar, direction: Scalar) -> Int[Array, ""]:
    def halved(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = tree.quotient(low + high, 2)
        passed = (low < high) & (tree.take(ts, middle) * direction <= now * direction)
        return jnp.where(passed, middle + 1, low), jnp.where(passed, high, middle)

    bounds = jnp.zeros((), jnp.int32), jnp.full((), len(ts), jnp.int32)
    return jax.lax.fori_loop(0, len(ts).bit_length(), halved, bounds)[0]


def _counted(ts: Float[Array, " rows"], now: Scalar, direction: Scalar) -> Int[Array, ""]:
    return jnp.sum(ts * direction <= now * direction, dtype=jnp.int32)


class Requests(eqx.Module):
    """All that an integration is asked to save besides its end. Inexact arrays in it receive gradients."""

    rows: tuple[Rows, ...]
    states: bool = eqx.field(static=True)
    dense: bool = eqx.field(static=True)

    @property
    def interpolated(self) -> bool:
        """Whether a loss may depend on interpolants of steps."""
        return bool(self.rows) or self.dense


def hoist_observable(fn: Observable, problem: Problem) -> Observable:
    """`fn` as a pytree that holds every array it closes over."""
    return hoisted(fn, problem.t0, problem.y0, problem.args)
