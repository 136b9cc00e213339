"""A method that finds out whether the problem is stiff."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from adjoint_jax import tree
from adjoint_jax.interpolation import Interpolant
from adjoint_jax.lanes import any_lane
from adjoint_jax.linear.dense import DenseJacobian
from adjoint_jax.linear.jacobian import AbstractJacobian
from adjoint_jax.problem import Interval, Parameters, Problem
from adjoint_jax.quadrature import Nodes, Rule, gauss_legendre
from adjoint_jax.solvers.methods import Tsit5
from adjoint_jax.solvers.rosenbrock_methods import Rodas5P
from adjoint_jax.solvers.solver import (
    AbstractImplicitSolver,
    AbstractSolver,
    Step,
    StepOutputs,
    through_interpolant,
    with_cost,
)
from adjoint_jax.tree import Arrays, Scalar

LIMIT = 3.0
"""A step size times the largest rate of the field, near the end of Tsit5's region of stability."""
PATIENCE = 10
"""By so many steps must those that speak for the other method outnumber the rest."""


class Watched(NamedTuple):
    """y; a direction of length one in which the field changes fast; one if the problem is stiff, else zero; and by how many
    the latest steps that spoke against this outnumber those that spoke for it. All but y are constants of a derivative."""

    y: Arrays
    direction: Arrays
    stiff: Scalar
    doubt: Scalar


class AutoSolver(AbstractImplicitSolver):
    """Tsit5 where the problem is not stiff, Rodas5P where it is: order 5(4), dense output of order 4.

    The largest rate of the field is estimated by one product with its Jacobian a step, a power iteration along the
    solution. When for some ten steps the step size times this rate has been near the limit of Tsit5's stability, Rodas5P
    takes over; when it has been far below, Tsit5 does again. Compare E. Hairer and G. Wanner, "Solving Ordinary
    Differential Equations II", section IV.2. Under `vmap` each lane has its own method; unused ones cost nothing.

    `DiscreteAdjoint` transposes each step by the method that took it. `solution.stats.evaluations` counts the product with
    the Jacobian as one evaluation, those of Rodas5P's Jacobians aside.

    - `jacobian`: that of `Rodas5P`.
    """

    jacobian: AbstractJacobian = DenseJacobian()

    @property
    def order(self) -> int:
        return 5

    @property
    def error_order(self) -> int:
        return 4

    @property
    def dense_degree(self) -> int:
        return 4

    def evaluations(self, *, estimated: bool, interpolated: bool) -> int:
        del estimated, interpolated
        return 0

    def start(self, problem: Problem) -> Watched:
        irregular = tree.map(lambda leaf: jnp.cos(1.0 + jnp.arange(leaf.size)).reshape(leaf.shape), problem.y0)
        length = _length(irregular)
        direction = tree.map(
            lambda v, leaf: (v / jnp.where(length > 0, length, 1.0)).astype(leaf.dtype), irregular, problem.y0
        )
        zero = jnp.zeros((), problem.t0.dtype)
        return Watched(problem.y0, direction, zero, zero)

    def output(self, state: Watched) -> Arrays:
        return state.y

    def step(self, problem: Problem, interval: Interval, state: Watched, first: Arrays | None) -> Step:
        del first

        def taken(solver: AbstractSolver) -> _Taken:
            step = solver.step(problem, interval, state.y, None)
            evaluations = jnp.int32(solver.evaluations(estimated=True, interpolated=True) + solver.reuses_last_stage)
            return _Taken(step.after, step.error, solver.interpolant(step).coefficients, evaluations)

        y, error, coefficients, evaluations = self._by_either(state, taken)
        after = _watched(problem, interval, state, y)
        return Step(interval, state, after, (coefficients,), error, evaluations + 1)

    def _by_either(self, state: Watched, result: Callable[[AbstractSolver], Any]) -> Any:
        """The result of the method in use; under `vmap`, of those that some lane uses."""
        stiff = state.stiff > 0

        def if_used(used: Bool[Array, ""], solver: AbstractSolver) -> Any:
            shapes = jax.eval_shape(lambda: result(solver))
            return jax.lax.cond(any_lane(used), lambda: result(solver), lambda: tree.zeros_like(shapes))

        explicit, implicit = if_used(~stiff, Tsit5()), if_used(stiff, Rodas5P(jacobian=self.jacobian))
        return tree.where(stiff, implicit, explicit)

    def blank_step(self, t: Scalar, state: Watched) -> Step:
        coefficients = tree.buffer(self.dense_degree, state.y)
        return Step(Interval(t, t, t, t), state, state, (coefficients,), None, jnp.zeros((), jnp.int32))

    def interpolant(self, step: Step) -> Interpolant:
        return Interpolant(step.interval.start, step.interval.end, step.before.y, step.stages[0])

    def quadrature(self, step: Step) -> Nodes:
        return _rule().over(self.interpolant(step))

    def transposed_step(
        self, problem: Problem, interval: Interval, state: Watched, cotangent: StepOutputs
    ) -> tuple[Watched, Parameters]:
        of_y, of_cost = cotangent._replace(after=cotangent.after.y), None
        if problem.running_cost is not None:
            interpolant = self.interpolant(self.step(problem, interval, state, None))
            of_y, of_cost = through_interpolant(problem, interpolant, self.dense_degree, _rule(), of_y)
        plain = problem.without_cost()
        y, gradient = self._by_either(state, lambda solver: solver.transposed_step(plain, interval, state.y, of_y))
        return tree.zeros_like(state)._replace(y=y), gradient if of_cost is None else with_cost(gradient, of_cost)


class _Taken(NamedTuple):
    """What either method makes of a step: y after it, the error estimate, the interpolant's coefficients, and how many
    evaluations that took."""

    y: Arrays
    error: Arrays
    coefficients: Arrays
    evaluations: Int[Array, ""]


def _rule() -> Rule:
    """The quadrature of the cost on either method's interpolant."""
    return gauss_legendre(3)


def _watched(problem: Problem, interval: Interval, state: Watched, y: Arrays) -> Watched:
    """The state after a step to y."""

    def field(y: Arrays) -> Arrays:
        return problem.field(interval.first, y)

    moved = jax.lax.stop_gradient(jax.jvp(field, (state.y,), (state.direction,))[1])
    rate = _length(moved)
    direction = tree.where(rate > 0, tree.scale(1 / jnp.where(rate > 0, rate, 1.0), moved), state.direction)
    reach = rate * jnp.abs(jax.lax.stop_gradient(interval.end - interval.start))
    against = jnp.where(state.stiff > 0, reach < LIMIT / 3, reach > LIMIT)
    doubt = jnp.maximum(state.doubt + jnp.where(against, 1.0, -1.0), 0.0)
    stiff = jnp.where(doubt >= PATIENCE, 1.0 - state.stiff, state.stiff)
    return Watched(y, direction, stiff, jnp.where(doubt >= PATIENCE, 0.0, doubt))


def _length(vector: Arrays) -> Scalar:
    squares = [jnp.sum(jnp.square(jnp.abs(leaf))) for leaf in jax.tree.leaves(vector)]
    return jnp.sqrt(sum(squares, start=jnp.zeros(())))
