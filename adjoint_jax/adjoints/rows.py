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

PULLED_ROWS = 8
"""Rows that are pulled back at a time."""


class Steps(NamedTuple):
    """A chunk of recorded steps, along a leading axis: their ends in time, and the method's states before them."""

    starts: Float[Array, " steps"]
    ends: Float[Array, " steps"]
    states: Arrays


class Pulled(NamedTuple):
    """What has been pulled back of one request: how many of its rows are left, dJ/d(leaves of fn) and dJ/dargs."""

    left: Int[Array, ""]
    fn: PyTree[Any]
    args: PyTree[Any]

    @staticmethod
    def nothing(rows: Rows, way: Way) -> "Pulled":
        """All rows up to the time reached are left."""
        direction = way.direction
        left = jnp.sum(rows.ts * direction <= way.report.reached * direction, dtype=jnp.int32)
        inexact = (eqx.filter(value, eqx.is_inexact_array) for value in (rows.fn, way.problem.args))
        return Pulled(left, *(tree.zeros_like(leaves) for leaves in inexact))


class FromRows(NamedTuple):
    """What the rows say of a chunk of steps: dJ/dy at their starts and dJ/d(coefficients of their interpolants)."""

    y0: Arrays
    coefficients: Arrays


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
    """The rows of one request that were saved inside a chunk of steps, of which the first `valid` are looked at."""

    way: Way
    rows: Rows
    cotangent: Arrays
    steps: Steps
    valid: Int[Array, ""]

    def run(self, pulled: Pulled) -> tuple[Pulled, FromRows]:
        """Pull the rows inside the chunk, last first; those behind it have been pulled already."""
        y0 = tree.zeros_like(self.way.integrator.solver.output(self.steps.states))
        coefficients = tree.map(lambda leaf: jnp.zeros((len(leaf), self._degree, *leaf.shape[1:]), leaf.dtype), y0)
        interpolants = self._interpolants()

        def more(carry: tuple[Pulled, FromRows]) -> Bool[Array, ""]:
            return any_lane(self._inside(carry[0].left - 1))

        def pull(carry: tuple[Pulled, FromRows]) -> tuple[Pulled, FromRows]:
            return self._pull_block(interpolants, *carry)

        return jax.lax.while_loop(more, pull, (pulled, FromRows(y0, coefficients)))

    @property
    def _degree(self) -> int:
        return self.way.integrator.solver.dense_degree

    def _inside(self, place: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether the row lies behind the start of the chunk."""
        direction = self.way.direction
        return (place >= 0) & (tree.take(self.rows.ts, place) * direction > self.steps.starts[0] * direction)

    def _interpolants(self) -> Interpolant:
        """The interpolants of the steps. Without an fn, only their times are needed."""
        solver, problem, (starts, ends, states) = self.way.integrator.solver, self.way.problem, self.steps
        if self.rows.fn is None:
            return Interpolant(starts, ends, states, None)

        def interpolant(start: Scalar, end: Scalar, state: Arrays) -> Interpolant:
            step = solver.step(problem, self.way.interval(start, end), state, None)
            return solver.interpolant(solver.with_dense_stages(problem, step))

        return jax.vmap(interpolant)(starts, ends, states)

    def _pull_block(self, interpolants: Interpolant, pulled: Pulled, so_far: FromRows) -> tuple[Pulled, FromRows]:
        places = pulled.left - 1 - jnp.arange(min(len(self.rows.ts), PULLED_ROWS), dtype=jnp.int32)
        inside = jax.vmap(self._inside)(places)
        at, a, fn, args, weights = jax.vmap(lambda p, i: self._pull(interpolants, p, i))(places, inside)
        left = pulled.left - jnp.sum(inside, dtype=jnp.int32)
        pulled = Pulled(left, tree.add(pulled.fn, _total(fn)), tree.add(pulled.args, _total(args)))
        of_step = at[:, None] == jnp.arange(len(self.steps.starts))
        weights = of_step[:, :, None] * weights[:, None, :]
        y0, coefficients = (_total(tree.map(lambda g, w=w: _outer(w, g), a)) for w in (of_step, weights))
        return pulled, FromRows(tree.add(so_far.y0, y0), tree.add(so_far.coefficients, coefficients))

    def _pull(
        self, interpolants: Interpolant, place: Int[Array, ""], inside: Bool[Array, ""]
    ) -> tuple[Int[Array, ""], Arrays, PyTree[Any], PyTree[Any], Float[Array, " degree"]]:
        """The step in which a row lies; the row's derivatives; the weights of the step's coefficients."""
        direction, (starts, ends, _) = self.way.direction, self.steps
        t = jnp.where(inside, tree.take(self.rows.ts, place), starts[0])
        passed = (ends * direction < t * direction) & (jnp.arange(len(ends)) < self.valid)
        at = jnp.sum(passed, dtype=jnp.int32)
        interpolant = tree.take(interpolants, at)
        g = tree.take(self.cotangent, place)
        g = tree.where(inside, g, tree.zeros_like(g))
        y = g if self.rows.fn is None else interpolant.evaluate(t)
        return at, *pull_row(self.rows, self.way.problem, t, y, g), powers(interpolant.fraction(t), self._degree)


def _total(stacked: Arrays) -> Arrays:
    return tree.map(lambda leaf: jnp.sum(leaf, axis=0), stacked)


def _outer(weights: Array, g: Array) -> Array:
    """weights[row, ...] times g[row, ...], for all pairs of their other axes."""
    weights = weights.astype(tree.real_dtype(g.dtype))
    return weights.reshape(*weights.shape, *[1] * (g.ndim - 1)) * g.reshape(len(g), *[1] * (weights.ndim - 1), *g.shape[1:])
