"""Backward differentiation formulas of variable order."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from adjoint_jax import tree
from adjoint_jax.interpolation import Interpolant
from adjoint_jax.lanes import put
from adjoint_jax.linear.dense import DenseJacobian
from adjoint_jax.linear.jacobian import AbstractJacobian
from adjoint_jax.problem import Interval, Problem
from adjoint_jax.quadrature import Nodes, gauss_legendre
from adjoint_jax.solvers.newton import SimplifiedNewton, Solved, StageEquation, differentiable
from adjoint_jax.solvers.solver import AbstractImplicitSolver, Step
from adjoint_jax.tolerance import Rounding, Tolerance
from adjoint_jax.tree import Arrays, Scalar

MAX_ORDER = 5
ROWS = MAX_ORDER + 3
KAPPA = np.array([0.0, -0.1850, -1 / 9, -0.0823, -0.0415, 0.0])
GAMMA = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, MAX_ORDER + 1))])
ALPHA = (1 - KAPPA) * GAMMA
ERROR = KAPPA * GAMMA + 1 / np.arange(1, MAX_ORDER + 2)
SAFETY = 0.9


class Differences(NamedTuple):
    """The method's state: y and its backward differences for steps of size h, of which those up to the order are in use and
    the next two serve the choice of the order; and the number of equal steps taken with this order and size. All numbers
    are floating-point, so that a cotangent looks like a state; all but the differences are constants of the derivative."""

    y: Arrays
    higher: Arrays
    h: Scalar
    order: Scalar
    equal: Scalar

    @property
    def table(self) -> Arrays:
        """All differences, y itself first."""
        return tree.map(lambda y, rest: jnp.concatenate([y[None], rest]), self.y, self.higher)


class BDF(AbstractImplicitSolver):
    r"""Numerical differentiation formulas of order 1 to 5, with quasi-constant steps: one nonlinear system and one
    factorisation a step. For large or expensive stiff systems.

    With the backward differences $D^j$ of steps of equal size $h$, the next state solves, for order $k$,

    $$\sum_{j=1}^k \frac1j D^j y_{n+1} - \kappa_k \gamma_k D^{k+1} y_{n+1} = h f(t_{n+1}, y_{n+1}),
    \qquad \gamma_k = \sum_{j=1}^k \frac1j.$$

    When the step size changes, the differences are those of the interpolating polynomial. After k + 1 equal steps of order
    k, the order (k - 1, k or k + 1) is chosen that allows the longest step. On a given grid it rises until rounding errors
    stop it; the first steps, of order 1 and 2, limit the accuracy there. The orders and step sizes are constants of the
    derivative. L. F. Shampine and M. W. Reichelt, "The MATLAB ODE suite", SIAM J. Sci. Comput. 18 (1997), sections 2 and 3.

    `solution.stats.evaluations` counts the field evaluations of the iterations, those of Jacobians aside.

    - `jacobian`, `newton`: see `ESDIRK`.
    """

    jacobian: AbstractJacobian = DenseJacobian()
    newton: SimplifiedNewton = SimplifiedNewton()
    tolerance: Tolerance | None = eqx.field(default=None, kw_only=True)
    """The controller's, which `within` sets."""

    @property
    def order(self) -> int:
        return MAX_ORDER

    @property
    def error_order(self) -> int | None:
        """Of the first step."""
        return 1

    @property
    def dense_degree(self) -> int:
        return MAX_ORDER

    def evaluations(self, *, estimated: bool, interpolated: bool) -> int:
        del estimated, interpolated
        return 0

    @property
    def start_evaluations(self) -> int:
        return 1

    def within(self, tolerance: Tolerance | None) -> "BDF":
        return dataclasses.replace(self, tolerance=tolerance)

    def start(self, problem: Problem) -> Differences:
        return self.start_from(problem, problem.field(problem.t0, problem.y0))

    def start_from(self, problem: Problem, slope: Arrays) -> Differences:
        h = jax.lax.stop_gradient(jnp.where(problem.t1 == problem.t0, 1.0, problem.t1 - problem.t0))
        higher = put(tree.buffer(ROWS - 1, problem.y0), jnp.int32(0), tree.scale(h, slope))
        return Differences(problem.y0, higher, h, jnp.ones_like(h), jnp.zeros_like(h))

    def output(self, state: Differences) -> Arrays:
        return state.y

    def step(self, problem: Problem, interval: Interval, state: Differences, first: Arrays | None) -> Step:
        del first
        h = jax.lax.stop_gradient(interval.end - interval.start)
        factor, order, equal = jax.lax.stop_gradient((h / state.h, state.order, state.equal))
        k = order.astype(jnp.int32)
        table = _transformed(_rescaling(k, factor), state.table)
        solved, correction = self._corrected(problem, interval, table, k, h)
        updated = tree.add(
            _transformed(_summation(k), table),
            tree.map(lambda leaf: _rows(jnp.arange(ROWS) <= k + 2, leaf) * leaf, _repeated(correction)),
        )
        equal = jnp.where(jnp.abs(factor - 1) < SAME_SIZE, equal, 0.0) + 1
        ratios = self._ratios(state, updated, correction, k)
        next_order, growth = _choice(ratios, k, equal)
        changes = growth != 1
        result = tree.map(lambda leaf: jnp.where(solved.converged, leaf, jnp.nan), updated)
        after = Differences(
            y=tree.map(lambda leaf: leaf[0], result),
            higher=tree.map(lambda leaf: leaf[1:], result),
            h=jnp.where(h == 0, state.h, h),
            order=next_order.astype(order.dtype),
            equal=jnp.where(changes, 0.0, equal),
        )
        used = tree.map(lambda leaf: _rows(jnp.arange(ROWS) <= k, leaf) * leaf, updated)
        stages = tuple(tree.map(lambda leaf, j=j: leaf[j], used) for j in range(1, MAX_ORDER + 1))
        error = tree.scale(jnp.asarray(ERROR)[k], correction)
        return Step(interval, state, after, stages, error, solved.iterations, growth)

    def _corrected(self, problem: Problem, interval: Interval, table: Arrays, k: Array, h: Scalar) -> tuple[Solved, Arrays]:
        """The next state less its prediction."""
        rows = jnp.arange(ROWS)
        predicted = tree.contract((rows <= k).astype(h.dtype), table)
        gammas = jnp.asarray(np.concatenate([GAMMA, np.zeros(ROWS - len(GAMMA))]), h.dtype)
        alpha = jnp.asarray(ALPHA, h.dtype)[k]
        history = tree.contract(jnp.where(rows <= k, gammas, 0.0) / alpha, table)
        base = tree.map(lambda a, b: a - b, predicted, history)
        equation = StageEquation(problem, interval.last, base, h / alpha)
        still, guess = equation.standing_still(), jax.lax.stop_gradient(predicted)
        inverse = self.jacobian.inverse(still.problem, still.t, guess, still.g)
        tolerance = self.newton.tolerance(self.tolerance)
        solved = self.newton.solve(still, guess, inverse, tolerance, jnp.ones((), h.dtype))
        slope = differentiable(solved.slope, equation, self.jacobian)
        return solved, tree.map(lambda a, b: a - b, equation.state(slope), predicted)

    def _ratios(self, state: Differences, table: Arrays, correction: Arrays, k: Array) -> Float[Array, "3"]:
        """The sizes of the errors of orders k - 1, k and k + 1."""
        before, table, correction = jax.lax.stop_gradient((self.output(state), table, correction))
        y = tree.map(lambda leaf: leaf[0], table)
        constants = jnp.asarray(np.concatenate([ERROR, [0.0]]))
        tolerance = Rounding() if self.tolerance is None else self.tolerance

        def ratio(difference: Arrays, order: Array) -> Scalar:
            return tolerance.ratio(tree.scale(constants[order], difference), before, y).astype(state.h.dtype)

        lower = jnp.where(k > 1, ratio(tree.take(table, k), k - 1), jnp.inf)
        higher = jnp.where(k < MAX_ORDER, ratio(tree.take(table, k + 2), k + 1), jnp.inf)
        return jnp.stack([lower, ratio(correction, k), higher])

    def blank_step(self, t: Scalar, state: Differences) -> Step:
        stages = (tree.zeros_like(self.output(state)),) * MAX_ORDER
        return Step(Interval(t, t, t, t), state, state, stages, None, jnp.zeros((), jnp.int32), jnp.ones_like(t))

    def interpolant(self, step: Step) -> Interpolant:
        """The polynomial through the states on which the step has been built, and through its result."""
        coefficients = tree.stack([tree.weighted_sum(column, step.stages) for column in zip(*_NEWTON, strict=True)])
        return Interpolant(step.interval.start, step.interval.end, self.output(step.before), coefficients)

    def quadrature(self, step: Step) -> Nodes:
        """Gauss-Legendre nodes on the interpolant."""
        return gauss_legendre(3).over(self.interpolant(step))


SMALL = 32
"""Numbers of a state whose differences are transformed in plain arithmetic, which can be part of a kernel."""

SAME_SIZE = 2e-3
"""Steps whose sizes differ by so little, for rounding or to land on a given time, count as equal."""


def _newton_polynomials() -> list[list[float]]:
    """Row j - 1: the coefficients of s, ..., s^5 in (s - 1) s (s + 1) ... (s + j - 2) / j!, which multiplies D^j."""
    rows = []
    product = np.poly1d([1.0])
    for j in range(1, MAX_ORDER + 1):
        product = product * np.poly1d([1.0, j - 2.0]) / j
        ascending = np.zeros(MAX_ORDER + 1)
        ascending[: j + 1] = product.coeffs[::-1]
        rows.append(ascending[1:].tolist())
    return rows


_NEWTON = _newton_polynomials()


def _rows(predicate: Bool[Array, " rows"], leaf: Array) -> Array:
    return predicate.reshape(-1, *[1] * (leaf.ndim - 1)).astype(tree.real_dtype(leaf.dtype))


def _repeated(y: Arrays) -> Arrays:
    return tree.map(lambda leaf: jnp.broadcast_to(leaf, (ROWS, *leaf.shape)), y)


def _transformed(matrix: Float[Array, "rows rows"], table: Arrays) -> Arrays:
    """The matrix times the rows of the table."""

    def product(leaf: Array) -> Array:
        own = matrix.astype(tree.real_dtype(leaf.dtype))
        if leaf.size > ROWS * SMALL:
            return jnp.tensordot(own, leaf, 1)
        return jnp.sum(own.reshape(ROWS, ROWS, *[1] * (leaf.ndim - 1)) * leaf, axis=1)

    return tree.map(product, table)


def _rescaling(k: Array, factor: Scalar) -> Float[Array, "rows rows"]:
    """From differences of steps of one size to those of another, for the polynomial of order k: the identity beyond."""

    def pascal(factor: Any) -> Array:
        i, j = jnp.arange(1, ROWS)[:, None], jnp.arange(1, ROWS)[None, :]
        below = (i - 1 - factor * j) / i
        matrix = jnp.ones((ROWS, ROWS), factor.dtype).at[1:, 1:].set(below).at[1:, 0].set(0.0)
        return jnp.cumprod(matrix, axis=0)

    used = jnp.arange(ROWS) <= k
    both = used[:, None] & used[None, :]
    product = _transformed(*(jnp.where(both, pascal(by), 0.0) for by in (factor, jnp.ones_like(factor))))
    return jnp.where(both, product.T, jnp.eye(ROWS, dtype=factor.dtype))


def _summation(k: Array) -> Float[Array, "rows rows"]:
    """What becomes of the differences in a step of order k, before the correction is added to rows 0, ..., k + 2."""
    i, j = jnp.arange(ROWS)[:, None], jnp.arange(ROWS)[None, :]
    sums = ((i <= j) & (j <= k)).astype(float)
    second = -((i == k + 2) & (j == k + 1)).astype(float)
    return sums + second + ((i == j) & (i > k + 2)).astype(float)


def _choice(ratios: Float[Array, "3"], k: Array, equal: Scalar) -> tuple[Array, Scalar]:
    """The next order, and the factor of the next step size."""
    exponents = -1.0 / (k + jnp.arange(3))
    factors = SAFETY * jnp.maximum(ratios, 1e-30) ** exponents
    best = jnp.argmax(factors)
    rejected, due = ~(ratios[1] <= 1), equal >= k + 1
    growth = jnp.where(rejected, factors[1], jnp.where(due, factors[best], 1.0))
    return jnp.where(~rejected & due, k + best - 1, k), growth
