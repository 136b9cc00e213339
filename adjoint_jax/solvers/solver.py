"""What a method is: one step, its dense output, its quadrature, and the transpose of all that."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from adjoint_jax import tree
from adjoint_jax.interpolation import Interpolant
from adjoint_jax.linear.jacobian import AbstractJacobian, check_jacobian
from adjoint_jax.problem import Interval, Parameters, Problem, Rates
from adjoint_jax.quadrature import Nodes, Rule, cost_of
from adjoint_jax.tolerance import Tolerance
from adjoint_jax.tree import Arrays, Scalar

Pullback = Callable[[Rates], tuple[Arrays, Parameters]]
"""From dJ/d(rates) to dJ/dy and dJ/dparameters, at one point."""


class Step(NamedTuple):
    """What one step computed. `before` and `after` are states of the method: y itself, or y and what else the method
    carries from step to step. `stages` are values of the field, or what else the method computes on its way; `error`, like
    y, is None without an error estimate. A method that iterates counts its field evaluations in `iterations`, and its
    `after` is NaN where it has not converged: no controller accepts that."""

    interval: Interval
    before: Arrays
    after: Arrays
    stages: tuple[Arrays, ...]
    error: Arrays | None
    iterations: Int[Array, ""] | None = None
    factor: Scalar | None = None
    """By what a method of variable order wants the step size to change, in place of the controller's own choice."""
    noted: Any = ()
    """What else the method notes of the field at its stages."""

    def reached(self, accepted: Bool[Array, ""]) -> Scalar:
        """The time at which the step is left: its end, or its start if it was not accepted."""
        return jnp.where(accepted, self.interval.end, self.interval.start)


class StepOutputs(NamedTuple):
    """All that a loss can see of one step; or the loss's derivative with respect to it.

    The method's state after the step; y at its start and the coefficients of its interpolant, one power after the other
    (None if nothing is saved inside any step); and the step's part of the cost.
    """

    after: Arrays
    y0: Arrays
    coefficients: list[Arrays] | None
    cost: Arrays


class AbstractSolver(eqx.Module):
    """A one-step method. Static sizes are properties; all arrays pass through arguments."""

    takes_mass: ClassVar[bool] = False
    """Whether it solves problems with a mass matrix."""

    @property
    @abc.abstractmethod
    def order(self) -> int:
        """Order of the step."""

    @property
    @abc.abstractmethod
    def error_order(self) -> int | None:
        """Order of the error estimate's embedded method; None without an error estimate."""

    @property
    @abc.abstractmethod
    def dense_degree(self) -> int:
        """Degree of the interpolant."""

    @property
    def extra_stages(self) -> int:
        """Stages that only the interpolant needs."""
        return 0

    @property
    def reuses_last_stage(self) -> bool:
        """Whether the last stage is the next step's first: the field at its end."""
        return False

    @abc.abstractmethod
    def evaluations(self, *, estimated: bool, interpolated: bool) -> int:
        """Field evaluations of one step after another, without those that only the interpolant needs, and without those
        that are counted in `Step.iterations`."""

    @property
    def start_evaluations(self) -> int:
        """Field evaluations of `start`."""
        return 0

    def within(self, tolerance: Tolerance | None) -> "AbstractSolver":
        """The same method, for a controller with this tolerance (None: a given grid)."""
        del tolerance
        return self

    def with_jacobian(self, change: Callable[[AbstractJacobian], AbstractJacobian]) -> "AbstractSolver":
        """The same method, with another way to solve its linear systems in place of its own, if it has any."""
        del change
        return self

    def start(self, problem: Problem) -> Arrays:
        """The method's state at t0."""
        return problem.y0

    def start_from(self, problem: Problem, slope: Arrays) -> Arrays:
        """`start`, where the field at t0 is known, which saves the evaluations of `start`."""
        del slope
        return self.start(problem)

    def output(self, state: Arrays) -> Arrays:
        """y, of a state of the method: a selection, so that its transpose is known without a value."""
        return state

    def is_finite(self, state: Arrays) -> Bool[Array, ""]:
        """Whether the method can go on from a state."""
        return tree.all_finite(state)

    def slope(self, problem: Problem, t: Scalar, state: Arrays) -> Arrays:
        """The first stage of a step from the state."""
        return problem.field(t, self.output(state))

    @abc.abstractmethod
    def step(self, problem: Problem, interval: Interval, state: Arrays, first: Any) -> Step:
        """One step over the interval. `first` is what it takes over, or None if that is not known."""

    def taken_over(self, problem: Problem, t: Scalar, state: Arrays, slope: Arrays) -> Any:
        """What a step from the state takes over where no step was taken before, of which the first stage is known. Only
        called if `reuses_last_stage`."""
        del problem, t, state
        return slope

    def handed_on(self, step: Step) -> Any:
        """What a step hands on to the next: the stage that it reuses. Only called if `reuses_last_stage`."""
        raise NotImplementedError(step)

    @abc.abstractmethod
    def blank_step(self, t: Scalar, state: Arrays) -> Step:
        """A step of no length, with its dense stages and without an error estimate."""

    def with_dense_stages(self, problem: Problem, step: Step) -> Step:
        """The step with the stages added that only its interpolant needs."""
        del problem
        return step

    def with_blank_stages(self, step: Step) -> Step:
        """The same, with zeros in their place, where its interpolant is not wanted."""
        return step._replace(stages=step.stages + self.extra_stages * (tree.zeros_like(step.stages[0]),))

    @abc.abstractmethod
    def interpolant(self, step: Step) -> Interpolant:
        """The step's dense output, from a step with its dense stages."""

    @abc.abstractmethod
    def quadrature(self, step: Step) -> Nodes:
        """The method as a quadrature over the step, of the method's order."""

    def outputs(self, problem: Problem, interval: Interval, state: Arrays, *, interpolated: bool) -> StepOutputs:
        """One step as a function of the state and of the problem's parameters."""
        step = self.step(problem, interval, state, None)
        coefficients = None
        if interpolated:
            stacked = self.interpolant(self.with_dense_stages(problem, step)).coefficients
            coefficients = tree.unstack(stacked, self.dense_degree)
        return StepOutputs(step.after, self.output(state), coefficients, cost_of(problem, self.quadrature(step)))

    def transposed_step(
        self, problem: Problem, interval: Interval, state: Arrays, cotangent: StepOutputs
    ) -> tuple[Arrays, Parameters]:
        """dJ/dstate at the step's start, and the step's part of dJ/dparameters, for a constant step size."""
        interpolated = cotangent.coefficients is not None

        def outputs(state: Arrays, parameters: Parameters) -> StepOutputs:
            return self.outputs(problem.at(parameters), interval, state, interpolated=interpolated)

        return jax.vjp(outputs, state, problem.parameters)[1](cotangent)

    def from_output(self, state: Arrays, cotangent: Arrays) -> Arrays:
        """The transpose of `output`: the derivative with respect to a state like `state`, of that with respect to y."""
        return jax.vjp(self.output, state)[1](cotangent)[0]


class AbstractImplicitSolver(AbstractSolver):
    """A method that solves linear systems with the Jacobian of the vector field."""

    jacobian: eqx.AbstractVar[AbstractJacobian]

    def __check_init__(self) -> None:
        check_jacobian(self.jacobian, type(self).__name__)

    def with_jacobian(self, change: Callable[[AbstractJacobian], AbstractJacobian]) -> "AbstractSolver":
        return dataclasses.replace(self, jacobian=change(self.jacobian))


def pullback_at(problem: Problem, t: Scalar, y: Arrays) -> tuple[Rates, Pullback]:
    """The rates at a point, and their linearisation there. The pullback is a pytree of what it keeps."""
    return jax.vjp(lambda y, parameters: problem.at(parameters).rates(t, y), y, problem.parameters)


def through_interpolant(
    problem: Problem, interpolant: Interpolant, degree: int, rule: Rule, cotangent: StepOutputs
) -> tuple[StepOutputs, Parameters]:
    """Where the cost is computed by a rule from the step's interpolant, a polynomial of so high a degree: dJ/dcost as a
    derivative with respect to the interpolant, added to those that are there, and as one with respect to the
    parameters."""

    def cost(y0: Arrays, coefficients: list[Arrays], parameters: Parameters) -> Arrays:
        of_step = interpolant._replace(y0=y0, coefficients=tree.stack(coefficients))
        return cost_of(problem.at(parameters), rule.over(of_step))

    powers = tree.unstack(interpolant.coefficients, degree)
    y0, coefficients, gradient = jax.vjp(cost, interpolant.y0, powers, problem.parameters)[1](cotangent.cost)
    if cotangent.coefficients is not None:
        coefficients = tree.add(cotangent.coefficients, coefficients)
    return StepOutputs(cotangent.after, tree.add(cotangent.y0, y0), coefficients, ()), gradient


def with_cost(gradient: Parameters, of_cost: Parameters) -> Parameters:
    """The sum of the parameters' derivatives of a problem without its cost, and of its cost."""
    return tree.add(gradient._replace(running_cost=tree.zeros_like(of_cost.running_cost)), of_cost)


def stage_time(interval: Interval, node: float) -> Scalar:
    """The time of a stage, on the right side of a jump at an end of the step."""
    if node == 0.0:
        return interval.first
    if node == 1.0:
        return interval.last
    return interval.start + node * (interval.end - interval.start)
