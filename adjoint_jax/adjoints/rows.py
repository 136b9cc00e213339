"""The transpose of saving at given times: from the derivatives of rows to those of the steps' interpolants."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from adjoint_jax import tree
from adjoint_jax.adjoints.trail import Way
from adjoint_jax.interpolation import Interpolant, powers
from adjoint_jax.lanes import any_lane
from adjoint_jax.problem import Problem
from adjoint_jax.saveat import Rows
from adjoint_jax.tree import Arrays, Scalar

PULLED_ROWS = 16
PULLED_ROWS_OF_ONE_STEP = 1
PULLED_BYTES = 4096
"""Rows that are pulled back at a time: so many, or fewer if they are larger than that."""


class Pulled(NamedTuple):
    """What has been pulled back of one request: how many of its rows are left, dJ/d(leaves of fn) and dJ/dargs."""

    left: Int[Array, ""]
    fn: PyTree[Any]
    args: PyTree[Any]

    @staticmethod
    def nothing(rows: Rows, way: Way) -> "Pulled":
        """All rows up to the time reached are left."""
        left = rows.until(way.report.reached, way.problem.direction)
        inexact = (eqx.filter(value, eqx.is_inexact_array) for value in (rows.fn, way.problem.args))
        return Pulled(left, *(tree.zeros_like(leaves) for leaves in inexact))


class Steps(NamedTuple):
    """Recorded steps, along a leading axis, of which the first `valid` count: their ends in time, and the method's states
    before them."""

    starts: Float[Array, " steps"]
    ends: Float[Array, " steps"]
    states: Arrays
    valid: Int[Array, ""]


class FromRows(NamedTuple):
    """What the rows say of steps, along a leading axis: dJ/dy at their starts, and dJ/d(coefficients of their
    interpolants), one power after the other."""

    y0: Arrays
    coefficients: list[Arrays]


def pull_row(
    rows: Rows, problem: Problem, t: Scalar, y: Arrays, cotangent: Arrays
) -> tuple[Arrays, PyTree[Any], PyTree[Any]]:
    """The derivatives of one saved row: with respect to the state, to the leaves of `fn`, and to `args`."""
    fn, fixed_fn = eqx.partition(rows.fn, eqx.is_inexact_array)
    args, fixed_args = eqx.partition(problem.args, eqx.is_inexact_array)
    if rows.fn is None:
        return cotangent, fn, tree.zeros_like(args)

    def row(y: Arrays, fn: PyTree[Any], args: PyTree[Any]) -> Arrays:
        return Rows(rows.ts, eqx.combine(fn, fixed_fn)).apply(t, y, eqx.combine(args, fixed_args))

    return jax.vjp(row, y, fn, args)[1](cotangent)


class RowPull(NamedTuple):
    """The rows of one request that were saved inside some steps. Lanes look at the same steps at a time, each at its own
    rows."""

    way: Way
    rows: Rows
    cotangent: Arrays
    steps: Steps

    def run(self, pulled: Pulled) -> tuple[Pulled, FromRows]:
        """Pull the rows inside the steps, last first; those behind them have been pulled already."""
        solver = self.way.integrator.solver
        y0 = tree.zeros_like(solver.output(self.steps.states))

        def more(carry: tuple[Pulled, FromRows]) -> Bool[Array, ""]:
            last = carry[0].left - 1
            return any_lane((last >= 0) & self._behind_start(tree.take(self.rows.ts, last)))

        def pull(carry: tuple[Pulled, FromRows]) -> tuple[Pulled, FromRows]:
            return self._pull_block(interpolants, *carry)

        start = pulled, FromRows(y0, [y0] * solver.dense_degree)
        interpolants = self._interpolants(more(start))
        return jax.lax.while_loop(more, pull, start)

    def _behind_start(self, ts: Float[Array, "..."]) -> Bool[Array, "..."]:
        direction = self.way.problem.direction
        return ts * direction > self.steps.starts[0] * direction

    def _interpolants(self, wanted: Bool[Array, ""]) -> Interpolant:
        """The interpolants of the steps, if they are wanted. Without an fn, only their times are needed."""
        solver, problem, (starts, ends, states, _) = self.way.integrator.solver, self.way.problem, self.steps
        if self.rows.fn is None:
            return Interpolant(starts, ends, states, None)

        def interpolant(start: Scalar, end: Scalar, state: Arrays) -> Interpolant:
            step = solver.step(problem, self.way.interval(start, end), state, None)
            return solver.interpolant(solver.with_dense_stages(problem, step))

        def interpolants() -> Interpolant:
            return jax.vmap(interpolant)(starts, ends, states)

        return jax.lax.cond(wanted, interpolants, lambda: tree.zeros_like(jax.eval_shape(interpolants)))

    def _pull_block(self, interpolants: Interpolant, pulled: Pulled, so_far: FromRows) -> tuple[Pulled, FromRows]:
        row_bytes = max(1, tree.size_in_bytes(self.cotangent) // len(self.rows.ts))
        most = PULLED_ROWS_OF_ONE_STEP if len(self.steps.starts) == 1 else PULLED_ROWS
        block = min(len(self.rows.ts), max(1, min(most, PULLED_BYTES // row_bytes)))
        first = jnp.maximum(pulled.left - block, 0)
        ts, a = tree.take_block((self.rows.ts, self.cotangent), first, block)
        inside = (first + jnp.arange(block, dtype=jnp.int32) < pulled.left) & self._behind_start(ts)
        ts, a = jnp.where(inside, ts, self.steps.starts[0]), tree.keep_rows(inside, a)
        at = jax.vmap(self._step_of)(ts)
        interpolants = tree.take_rows(interpolants, at)
        pulled = pulled._replace(left=pulled.left - jnp.sum(inside, dtype=jnp.int32))
        if self.rows.fn is not None:
            a, fn, args = jax.vmap(self._pull)(interpolants, ts, a)
            pulled = Pulled(pulled.left, tree.add(pulled.fn, _total(fn)), tree.add(pulled.args, _total(args)))
        of_step = (at[:, None] == jnp.arange(len(self.steps.starts))).astype(ts.dtype)
        weights = powers(interpolants.fraction(ts), len(so_far.coefficients))
        coefficients = [
            tree.add(q, _collected(of_step * w[:, None], a)) for q, w in zip(so_far.coefficients, weights, strict=True)
        ]
        return pulled, FromRows(tree.add(so_far.y0, _collected(of_step, a)), coefficients)

    def _step_of(self, t: Scalar) -> Int[Array, ""]:
        """The step in which a row lies."""
        direction, steps = self.way.problem.direction, self.steps
        if len(steps.ends) == 1:
            return jnp.zeros((), jnp.int32)
        passed = (steps.ends * direction < t * direction) & (jnp.arange(len(steps.ends)) < steps.valid)
        return jnp.sum(passed, dtype=jnp.int32)

    def _pull(self, interpolant: Interpolant, t: Scalar, g: Arrays) -> tuple[Arrays, PyTree[Any], PyTree[Any]]:
        return pull_row(self.rows, self.way.problem, t, interpolant.evaluate(t), g)


def _total(stacked: Arrays) -> Arrays:
    return tree.map(lambda leaf: jnp.sum(leaf, axis=0), stacked)


def _collected(weights: Float[Array, "rows steps"], stacked: Arrays) -> Arrays:
    """For every step, the rows times their weights."""
    weighted = jax.vmap(lambda row, of_row: jax.vmap(lambda weight: tree.scale(weight, of_row))(row))(weights, stacked)
    return _total(weighted)
