"""The equations of implicit steps: simplified Newton iterations, and what their solutions' derivatives are."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from adjoint_jax import tree
from adjoint_jax.lanes import any_lane
from adjoint_jax.linear.jacobian import AbstractInverse, AbstractJacobian
from adjoint_jax.problem import Problem
from adjoint_jax.tolerance import AbstractTolerance, Rounding, Tolerance
from adjoint_jax.tree import Arrays, Scalar


class StageEquation(eqx.Module):
    """k = f(t, base + g k), for the slope k at the stage Y = base + g k."""

    problem: Problem
    t: Scalar
    base: Arrays
    g: Scalar

    def state(self, slope: Arrays) -> Arrays:
        """Y, of k."""
        return tree.add(self.base, tree.scale(self.g, slope))

    def slope(self, state: Arrays) -> Arrays:
        """k, of Y; zero where g is."""
        safe = jnp.where(self.g == 0, 1.0, self.g)
        return tree.map(lambda y, base: (y - base) / safe.astype(tree.real_dtype(y.dtype)), state, self.base)

    def defect(self, slope: Arrays) -> Arrays:
        """f(t, base + g k) - k."""
        return tree.map(lambda a, b: a - b, self.problem.field(self.t, self.state(slope)), slope)

    def standing_still(self) -> "StageEquation":
        """The same equation as a constant of the derivative."""
        problem = self.problem.at(jax.lax.stop_gradient(self.problem.parameters))
        return StageEquation(problem, *jax.lax.stop_gradient((self.t, self.base, self.g)))


class Solved(NamedTuple):
    """The slope; whether the iteration has converged; its rate, an estimate for the next equation with the same matrix; and
    the field evaluations spent."""

    slope: Arrays
    converged: Bool[Array, ""]
    rate: Float[Array, ""]
    iterations: Int[Array, ""]


class _Iterate(NamedTuple):
    """The loop state: as in `Solved`, with the size of the latest change and whether there is more to do."""

    slope: Arrays
    size: Float[Array, ""]
    rate: Float[Array, ""]
    converged: Bool[Array, ""]
    running: Bool[Array, ""]
    iterations: Int[Array, ""]


def _as_number(value: Any) -> Any:
    """An array, so that another value recompiles nothing."""
    return value if value is None or isinstance(value, Array) else np.asarray(value, float)


class SimplifiedNewton(eqx.Module):
    """Newton's iteration with one matrix for all stages of a step.

    With the size ||d_m|| of the m-th change of Y in units of the tolerance, and the rate theta = ||d_m|| / ||d_{m-1}||, it
    has converged when theta / (1 - theta) ||d_m||, an estimate of what is still to come, or ||d_m|| itself, is at most
    `accuracy`; in the first iteration theta is taken from the stage before. It is given up, so that the step is rejected,
    when this will not be reached within `max_iterations` (E. Hairer and G. Wanner, "Solving Ordinary Differential
    Equations II", section IV.8).

    - `rtol`, `atol`: numbers, traced: the tolerance. By default that of the controller or, on a given grid, a thousand
      rounding errors of the largest entry of y.
    - `accuracy`: see above.
    """

    rtol: Any = eqx.field(default=None, converter=_as_number)
    atol: Any = eqx.field(default=None, converter=_as_number)
    accuracy: float = eqx.field(static=True, default=0.01)
    max_iterations: int = eqx.field(static=True, default=10)

    def __check_init__(self) -> None:
        if (self.rtol is None) != (self.atol is None):
            raise ValueError("SimplifiedNewton needs both rtol and atol, or neither.")
        if self.max_iterations < 1:
            raise ValueError(f"SimplifiedNewton(max_iterations) must be at least one, got {self.max_iterations}.")

    def tolerance(self, given: Tolerance | None) -> AbstractTolerance:
        """The tolerance that applies, where a controller has given one or not."""
        if self.rtol is not None:
            return Tolerance(self.rtol, self.atol)
        return Rounding() if given is None else given

    def solve(
        self,
        equation: StageEquation,
        guess: Arrays,
        inverse: AbstractInverse,
        tolerance: AbstractTolerance,
        rate: Float[Array, ""],
    ) -> Solved:
        """The slope, from a guess of Y; `inverse` is that of I - g J. `rate` is one if nothing is known of it."""

        def iterate(walk: _Iterate) -> _Iterate:
            change = inverse.solve(equation.defect(walk.slope))
            slope = tree.add(walk.slope, change)
            state = equation.state(slope)
            size = tolerance.ratio(tree.scale(equation.g, change), guess, state).astype(walk.size.dtype)
            return self._judged(walk, slope, size)

        def next_iterate(walk: _Iterate) -> _Iterate:
            return tree.where(walk.running, iterate(walk), walk)

        start = _Iterate(
            slope=equation.slope(guess),
            size=jnp.full_like(rate, jnp.inf),
            rate=rate,
            converged=jnp.array(False),
            running=jnp.array(True),
            iterations=jnp.zeros((), jnp.int32),
        )
        end = jax.lax.while_loop(lambda walk: any_lane(walk.running), next_iterate, start)
        return Solved(end.slope, end.converged, end.rate, end.iterations)

    def _judged(self, walk: _Iterate, slope: Arrays, size: Float[Array, ""]) -> _Iterate:
        first, left = walk.iterations == 0, self.max_iterations - 1 - walk.iterations
        rate = jnp.where(first, walk.rate**CAUTION, size / jnp.where(first, 1.0, walk.size))
        to_come = jnp.where(rate < 1, rate / jnp.where(rate < 1, 1 - rate, 1.0) * size, jnp.inf)
        stopped_by_rounding = ~first & (rate > STALLED) & (size <= 10 * self.accuracy)
        converged = (jnp.minimum(to_come, size) <= self.accuracy) | stopped_by_rounding
        hopeless = (left == 0) | ~(size < jnp.inf) | (~first & ~(to_come * rate**left <= self.accuracy))
        return _Iterate(
            slope=slope,
            size=size,
            rate=jnp.where(first, walk.rate, rate),
            converged=converged,
            running=~converged & ~hopeless,
            iterations=walk.iterations + 1,
        )


CAUTION = 0.8
STALLED = 0.9
"""The rate of the stage before counts to this power. Changes that shrink more slowly than this, when they are small
already, are rounding errors."""


# The derivative of a stage. k is defined by k = f(t, base + g k, theta), so that, with J = df/dy at the stage itself,
#
#     (I - g J) dk = df(t, base + g k, theta)    at constant k:
#
# one solve with the matrix at the stage, whichever iteration has found k. In the rule k is again a function of everything
# in the equation, for second derivatives.


@eqx.filter_custom_jvp
def differentiable(slope: Arrays, equation: StageEquation, jacobian: AbstractJacobian) -> Arrays:
    """The solution of the equation, as a function of everything in it."""
    del equation, jacobian
    return slope


@differentiable.def_jvp
def _differentiable_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Arrays, Arrays]:
    (slope, equation, jacobian), (_, equation_dot, _) = primals, tangents
    slope = differentiable(slope, equation, jacobian)
    _, defect_dot = eqx.filter_jvp(lambda equation: equation.defect(slope), (equation,), (equation_dot,))
    inverse = jacobian.inverse(equation.problem, equation.t, equation.state(slope), equation.g)
    return slope, inverse.solve(defect_dot)
