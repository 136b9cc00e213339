"""Methods whose steps can be undone by algebra, up to rounding."""

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from adjoint_jax import tree
from adjoint_jax.interpolation import Interpolant
from adjoint_jax.problem import Interval, Problem
from adjoint_jax.quadrature import Nodes
from adjoint_jax.solvers.explicit_runge_kutta import ExplicitRungeKutta
from adjoint_jax.solvers.solver import AbstractSolver, Step
from adjoint_jax.tree import Arrays, Scalar


class AbstractReversibleSolver(AbstractSolver):
    """A method with an inverse."""

    @abc.abstractmethod
    def inverse(self, problem: Problem, interval: Interval, state: Arrays) -> Arrays:
        """The method's state before the step that led to `state`."""


class Pair(NamedTuple):
    """y and a second approximation of it."""

    y: Arrays
    z: Arrays


def _difference(a: Arrays, b: Arrays) -> Arrays:
    return tree.map(lambda x, y: x - y, a, b)


def _parting(y: Arrays, z: Arrays, y1: Arrays, z1: Arrays) -> Arrays:
    """By how much the two approximations have moved away from each other in a step."""
    return tree.map(lambda a, b, a1, b1: (a1 - b1) - (a - b), y, z, y1, z1)


def _larger(a: Array, b: Array) -> Array:
    return jnp.where(jnp.abs(a) >= jnp.abs(b), a, b)


def _reversed(interval: Interval) -> Interval:
    return Interval(interval.end, interval.start, interval.last, interval.first)


class _Half(NamedTuple):
    """Half a step: the increment of `base` over an interval, times a sign, is added to a target."""

    interval: Interval
    target: Arrays
    sign: Array


class Reversible(AbstractReversibleSolver):
    """Any explicit method made reversible: with Psi_h(t, x) the increment of one step of `base` from x, and the coupling c,

        y1 = c y + (1 - c) z + Psi_h(t, z),        z1 = z - Psi_{-h}(t + h, y1),

    of the order of `base`, for twice its evaluations (S. McCallum and J. Foster, "Efficient, accurate and stable gradients
    for neural ODEs", arXiv:2410.11648). The dense output is that of `base`, tilted so that it ends in y1; the error
    estimate is that of `base` or, where it is larger, the change of y - z.

    Stability: the inverse divides by c, so that rounding errors grow by 1 / c from step to step on the way back. Where the
    solution decays like exp(-rate t), the difference y - z changes by about c exp(rate h) in a step: it grows, and destroys
    the solution, if rate h > -log(c). Adaptive steps are kept below that; given steps must be chosen so. For dissipative
    problems other adjoints are cheaper.

    - `base`: an explicit method. `coupling`: c, above 0 and at most 1.
    """

    base: ExplicitRungeKutta
    coupling: float = eqx.field(static=True, default=0.999)

    def __check_init__(self) -> None:
        if not isinstance(self.base, ExplicitRungeKutta):
            raise TypeError(f"Reversible(base) makes an explicit method reversible, such as Tsit5(), got {self.base!r}.")
        if not 0 < self.coupling <= 1:
            raise ValueError(f"Reversible(coupling=...) must be above 0 and at most 1, got {self.coupling}.")

    @property
    def order(self) -> int:
        return self.base.order

    @property
    def error_order(self) -> int | None:
        return self.base.error_order

    @property
    def dense_degree(self) -> int:
        return self.base.dense_degree

    @property
    def extra_stages(self) -> int:
        return self.base.extra_stages

    def evaluations(self, *, estimated: bool, interpolated: bool) -> int:
        return 2 * len(self.base.stages_needed(estimated=estimated, interpolated=interpolated))

    def start(self, problem: Problem) -> Pair:
        return Pair(problem.y0, problem.y0)

    def output(self, state: Pair) -> Arrays:
        return state.y

    def step(self, problem: Problem, interval: Interval, state: Pair, first: Arrays | None) -> Step:
        del first
        (y, z), c = state, self.coupling
        towards_y1 = _Half(interval, tree.add(tree.scale(c, y), tree.scale(1 - c, z)), jnp.array(1.0))
        towards_z1 = _Half(_reversed(interval), z, jnp.array(-1.0))
        after, forward = self._two_halves(problem, z, towards_y1, towards_z1)
        error = None if forward.error is None else tree.map(_larger, forward.error, _parting(y, z, *after))
        return forward._replace(interval=interval, before=state, after=Pair(*after), error=error)

    def inverse(self, problem: Problem, interval: Interval, state: Pair) -> Pair:
        (y1, z1), c = state, self.coupling
        towards_z = _Half(_reversed(interval), z1, jnp.array(1.0))
        towards_y = _Half(interval, y1, jnp.array(-1.0))
        (z, of_y), _ = self._two_halves(problem, y1, towards_z, towards_y)
        return Pair(tree.map(lambda a, b: (a - (1 - c) * b) / c, of_y, z), z)

    def _two_halves(
        self, problem: Problem, x: Arrays, first: "_Half", second: "_Half"
    ) -> tuple[tuple[Arrays, Arrays], Step]:
        """The results of two halves of a step, of which the second starts where the first has arrived; and the step of
        `base` in the first.

        In a loop: written out, XLA's fusion would compute stages of the first again inside the second."""

        def take(x: Arrays, half: _Half) -> tuple[Arrays, tuple[Arrays, Step]]:
            step = self.base.step(problem, half.interval, x, None)
            moved = tree.add(half.target, tree.scale(half.sign, _difference(step.after, x)))
            return moved, (moved, step)

        results, steps = jax.lax.scan(take, x, tree.stack([first, second]))[1]
        return tuple(tree.map(lambda leaf, i=i: leaf[i], results) for i in (0, 1)), tree.map(lambda leaf: leaf[0], steps)

    def blank_step(self, t: Scalar, state: Pair) -> Step:
        return self.base.blank_step(t, state.z)._replace(before=state, after=state)

    def with_dense_stages(self, problem: Problem, step: Step) -> Step:
        return self.base.with_dense_stages(problem, self._step_of_z(step))._replace(before=step.before)

    def interpolant(self, step: Step) -> Interpolant:
        of_z = self.base.interpolant(self._step_of_z(step))
        y, y1 = step.before.y, step.after.y

        def tilted(coefficients: Arrays, y: Arrays, y1: Arrays) -> Arrays:
            return coefficients.at[0].add(y1 - y - jnp.sum(coefficients, axis=0))

        return of_z._replace(y0=y, coefficients=tree.map(tilted, of_z.coefficients, y, y1))

    def quadrature(self, step: Step) -> Nodes:
        return self.base.quadrature(self._step_of_z(step))

    def _step_of_z(self, step: Step) -> Step:
        return step._replace(before=step.before.z)


class StateAndVelocity(NamedTuple):
    """y and an approximation of dy/dt."""

    y: Arrays
    v: Arrays


class AbstractTwoSlopes(AbstractReversibleSolver):
    """A method with one evaluation per step, two slopes (at the step's two ends) for stages, Euler's method embedded, and
    for dense output the parabola with these slopes, which is of order 2."""

    @property
    def error_order(self) -> int:
        return 1

    @property
    def dense_degree(self) -> int:
        return 2

    def evaluations(self, *, estimated: bool, interpolated: bool) -> int:
        del estimated, interpolated
        return 1

    def output(self, state: Pair | StateAndVelocity) -> Arrays:
        return state.y

    def blank_step(self, t: Scalar, state: Pair | StateAndVelocity) -> Step:
        return Step(Interval(t, t, t, t), state, state, (tree.zeros_like(state.y),) * 2, None)

    def interpolant(self, step: Step) -> Interpolant:
        (start, end, _, _), (f0, f1) = step.interval, step.stages
        coefficients = tree.stack([f0, tree.scale(0.5, _difference(f1, f0))])
        return Interpolant(start, end, step.before.y, tree.scale(end - start, coefficients))


class ReversibleHeun(AbstractTwoSlopes):
    """The reversible Heun method: order 2, one evaluation per step, Euler's method embedded, dense output of order 2.

        z1 = 2 y - z + h f(t, z),        y1 = y + h / 2 (f(t, z) + f(t + h, z1)).

    Stable for linear problems only where h times the eigenvalue lies on the imaginary axis between -i and i: for
    oscillations and non-stiff problems, not for dissipative ones (P. Kidger, J. Foster, X. Li and T. Lyons, "Efficient and
    accurate gradients for neural SDEs", NeurIPS 2021).
    """

    @property
    def order(self) -> int:
        return 2

    @property
    def reuses_last_stage(self) -> bool:
        return True

    def start(self, problem: Problem) -> Pair:
        return Pair(problem.y0, problem.y0)

    def slope(self, problem: Problem, t: Scalar, state: Pair) -> Arrays:
        return problem.field(t, state.z)

    def step(self, problem: Problem, interval: Interval, state: Pair, first: Arrays | None) -> Step:
        (y, z), h = state, interval.end - interval.start
        f0 = problem.field(interval.first, z) if first is None else first
        z1 = tree.add(_difference(tree.scale(2.0, y), z), tree.scale(h, f0))
        f1 = problem.field(interval.last, z1)
        y1 = tree.add(y, tree.scale(h / 2, tree.add(f0, f1)))
        return Step(interval, state, Pair(y1, z1), (f0, f1), tree.scale(h / 2, _difference(f1, f0)))

    def handed_on(self, step: Step) -> Arrays:
        return step.stages[1]

    def inverse(self, problem: Problem, interval: Interval, state: Pair) -> Pair:
        (y1, z1), h = state, interval.end - interval.start
        f1 = problem.field(interval.last, z1)
        z = _difference(_difference(tree.scale(2.0, y1), z1), tree.scale(h, f1))
        return Pair(_difference(y1, tree.scale(h / 2, tree.add(problem.field(interval.first, z), f1))), z)

    def quadrature(self, step: Step) -> Nodes:
        """The trapezoidal rule on the second approximation."""
        (start, end, first, last), states = step.interval, (step.before.z, step.after.z)
        weights = jnp.broadcast_to((end - start) / 2, (2,))
        return Nodes(jnp.stack([first, last]), tree.stack(states), weights)


class AsynchronousLeapfrog(AbstractTwoSlopes):
    """The asynchronous leapfrog method: order 2 (1 if damped), one evaluation per step, Euler's method embedded.

        u = f(t + h / 2, y + h / 2 v),        v1 = (1 - 2 eta) v + 2 eta u,        y1 = y + h / 2 (v + v1).

    With damping eta = 1 (none) it is stable for linear problems only where h times the eigenvalue lies on the imaginary
    axis; eta between 1/2 and 1 has a region of stability, and its inverse enlarges rounding errors by 1 / (2 eta - 1) from
    step to step (J. Zhuang, N. Dvornek, S. Tatikonda and J. Duncan, "MALI: a memory efficient and reverse accurate
    integrator for neural ODEs", ICLR 2021). Carries the slope v from step to step: for fields without jumps.

    - `damping`: eta, above 1/2 and at most 1.
    """

    damping: float = eqx.field(static=True, default=1.0)

    def __check_init__(self) -> None:
        if not 0.5 < self.damping <= 1:
            raise ValueError(f"AsynchronousLeapfrog(damping=...) must be above 1/2 and at most 1, got {self.damping}.")

    @property
    def order(self) -> int:
        return 2 if self.damping == 1 else 1

    @property
    def start_evaluations(self) -> int:
        return 1

    def start(self, problem: Problem) -> StateAndVelocity:
        return self.start_from(problem, problem.field(problem.t0, problem.y0))

    def start_from(self, problem: Problem, slope: Arrays) -> StateAndVelocity:
        return StateAndVelocity(problem.y0, slope)

    def step(self, problem: Problem, interval: Interval, state: StateAndVelocity, first: Arrays | None) -> Step:
        del first
        (y, v), h, eta = state, interval.end - interval.start, self.damping
        u = problem.field(interval.start + h / 2, tree.add(y, tree.scale(h / 2, v)))
        v1 = tree.add(tree.scale(1 - 2 * eta, v), tree.scale(2 * eta, u))
        y1 = tree.add(y, tree.scale(h / 2, tree.add(v, v1)))
        return Step(interval, state, StateAndVelocity(y1, v1), (v, v1), tree.scale(h / 2, _difference(v1, v)))

    def inverse(self, problem: Problem, interval: Interval, state: StateAndVelocity) -> StateAndVelocity:
        (y1, v1), h, eta = state, interval.end - interval.start, self.damping
        middle = _difference(y1, tree.scale(h / 2, v1))
        u = problem.field(interval.start + h / 2, middle)
        v = tree.scale(1 / (1 - 2 * eta), _difference(v1, tree.scale(2 * eta, u)))
        return StateAndVelocity(_difference(middle, tree.scale(h / 2, v)), v)

    def quadrature(self, step: Step) -> Nodes:
        """The midpoint rule."""
        (start, end, _, _), (y, v) = step.interval, step.before
        h = end - start
        return Nodes((start + h / 2)[None], tree.stack([tree.add(y, tree.scale(h / 2, v))]), h[None])
