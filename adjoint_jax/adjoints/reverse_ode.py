"""The reverse adjoint ODE, solved as an ODE: what the continuous adjoints share.

With a(t) = dJ/dy(t), the running cost l and g = dJ/dcost, between observations,

    da/dt = -(df/dy)^T a - (dl/dy)^T g,      a(t_i^-) = a(t_i^+) + dJ/dy(t_i),
    dJ/dtheta = integral of (df/dtheta)^T a + (dl/dtheta)^T g dt.

The last is a quadrature: it feeds nothing, so it is no part of the ODE's state and of its error norm. It is summed up over
accepted steps.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PyTree

from adjoint_jax import tree
from adjoint_jax.adjoints.trail import Way
from adjoint_jax.controllers.controller import AbstractController
from adjoint_jax.controllers.step_sizes import ConstantStepSize
from adjoint_jax.integrate import Integrator
from adjoint_jax.linear.jacobian import AbstractInverse, AbstractJacobian
from adjoint_jax.problem import Parameters, Problem, Rates
from adjoint_jax.quadrature import Nodes
from adjoint_jax.recorders import AbstractRecorder, QuadratureRecorder
from adjoint_jax.solution import Status
from adjoint_jax.solvers.solver import AbstractSolver
from adjoint_jax.tree import Arrays, Scalar


class Observations(NamedTuple):
    """What the loss says directly of the states at some times, ordered from t0 on."""

    times: Float[Array, " observations"]
    states: Arrays
    cotangents: Arrays


class Adjoint(NamedTuple):
    """The state y and a = dJ/dy at one time, or their derivatives; or at many times, along leading axes."""

    y: Arrays
    a: Arrays


class AbstractReverseSystem(eqx.Module):
    """The reverse ODE in the variables that an adjoint method chooses."""

    problem: eqx.AbstractVar[Problem]
    cost: eqx.AbstractVar[Arrays]
    """dJ/dcost, a constant."""

    @abc.abstractmethod
    def adjoint(self, t: Scalar, state: Arrays) -> Adjoint:
        """y and a at t, from the ODE's state."""

    @abc.abstractmethod
    def velocity(self, rates: Adjoint) -> Arrays:
        """The derivative of the ODE's state, from those of y and a."""

    @abc.abstractmethod
    def jacobian(self, forward: AbstractJacobian) -> AbstractJacobian:
        """That of the reverse ODE, where `forward` is how the vector field's is computed and solved with."""

    def field(self, t: Scalar, state: Arrays, args: PyTree[Any]) -> Arrays:
        """The reverse ODE."""
        del args
        y, a = self.adjoint(t, state)
        rates, pullback = jax.vjp(lambda y: self.problem.rates(t, y), y)
        return self.velocity(Adjoint(rates.y, tree.scale(-1.0, pullback(Rates(a, self.cost))[0])))

    def integral(self, nodes: Nodes) -> Parameters:
        """dJ/dparameters from some steps, whose weights are negative: one vjp for all nodes."""
        times, states, weights = nodes.flattened()
        ys, cotangents = jax.vmap(self.adjoint)(times, states)
        weighted = jax.vmap(lambda weight, a: tree.scale(-weight, Rates(a, self.cost)))(weights, cotangents)

        def rates(parameters: Parameters) -> Rates:
            return jax.vmap(self.problem.at(parameters).rates)(times, ys)

        gradient = jax.vjp(rates, self.problem.parameters)[1](weighted)[0]
        taken = jnp.any(weights != 0)
        return tree.where(taken, gradient, tree.zeros_like(gradient))


class OfAdjoint(AbstractJacobian):
    """The Jacobian of the reverse ODE for a(t) alone. It is -J^T, where J is the vector field's at y(t); so I - h (-J^T) is
    the transpose of I - (-h) J, whose structure, whatever it is, serves both."""

    forward: AbstractJacobian
    system: AbstractReverseSystem

    def inverse(self, problem: Problem, t: Scalar, y: Arrays, g: Scalar) -> AbstractInverse:
        del problem
        return _Transposed(self.forward.inverse(self.system.problem, t, self.system.adjoint(t, y).y, -g))


class _Transposed(AbstractInverse):
    """The transpose of another inverse."""

    inverse: AbstractInverse

    def times(self, right: Float[Array, " n"]) -> Float[Array, " n"]:
        return self.inverse.transposed_times(right)

    def transposed_times(self, right: Float[Array, " n"]) -> Float[Array, " n"]:
        return self.inverse.times(right)

    def solve(self, right: Arrays) -> Arrays:
        return self.inverse.solve_transposed(right)

    def solve_transposed(self, right: Arrays) -> Arrays:
        return self.inverse.solve(right)


class ReverseState(NamedTuple):
    """Where the sweep stands: the time, the ODE's state there, dJ/dparameters so far, the next step size; and how the
    integration went: its `Status`, and the time of the failure if it failed."""

    t: Scalar
    state: Arrays
    parameters: Parameters
    h: Scalar
    status: Int[Array, ""]
    failure: Scalar

    @staticmethod
    def beginning(t: Scalar, state: Arrays, parameters: Parameters, h: Scalar) -> "ReverseState":
        """Nothing has failed."""
        return ReverseState(t, state, parameters, h, jnp.zeros((), jnp.int32), t)

    def failing(self, failed: Bool[Array, ""], status: Int[Array, ""] | int, t: Scalar) -> "ReverseState":
        """The state after a failure, if it failed now and not before."""
        first = failed & (self.status == Status.SUCCESS)
        status = jnp.where(first, status, self.status).astype(jnp.int32)
        return self._replace(status=status, failure=jnp.where(first, t, self.failure))


Quadrature = Callable[[AbstractReverseSystem, ReverseState], AbstractRecorder]
"""The recorder that adds the parameters' integral over accepted reverse steps to that of a state."""


class Reverse(NamedTuple):
    """How the reverse ODE is solved, and the parameters' integral computed."""

    integrator: Integrator
    quadrature: Quadrature

    def to(self, system: AbstractReverseSystem, start: ReverseState, t: Scalar) -> ReverseState:
        """Integrate backward to t. After a failure there is nothing to integrate, and values mean nothing."""
        problem = Problem(system.field, None, None, start.state, start.t, t)
        recorders, integrator = [self.quadrature(system, start)], self.integrator.restarted(start.h)
        integrator = dataclasses.replace(integrator, method=integrator.method.with_jacobian(system.jacobian))
        outcome = integrator(problem, recorders, start.status == Status.SUCCESS)
        report, state = outcome.report, integrator.solver.output(outcome.state)
        h = jnp.where(report.stats.accepted > 0, jnp.abs(report.h), start.h)
        there = start._replace(t=t, state=state, parameters=outcome.records[0], h=h)
        return there.failing(report.status != Status.SUCCESS, report.status, report.reached)


def over_stages(solver: AbstractSolver) -> Quadrature:
    """The quadrature over the stages of the reverse method."""

    def quadrature(system: AbstractReverseSystem, start: ReverseState) -> QuadratureRecorder:
        return QuadratureRecorder(solver.quadrature, system.integral, start.parameters, start.state, notes=1)

    return quadrature


def prepared(controller: AbstractController, name: str, dtype: DTypeLike) -> AbstractController:
    """The controller of a reverse integration with arrays for its numbers. Raises `ValueError` for a given grid."""
    if controller.given_times is not None:
        raise ValueError(
            f"{name}(controller=StepTo(...)): the reverse integration stops at observations; use ConstantStepSize(dt), or "
            "FixedSteps(n), which takes n steps between two stops."
        )
    return controller.prepare(dtype)


def reverse_integrator(way: Way, solver: AbstractSolver | None, controller: AbstractController | None) -> Integrator:
    """The integrator of the reverse ODE: by default the forward one; where the forward grid is given, steps of its mean
    size. Raises `ValueError` for a problem with a mass matrix."""
    if way.problem.mass is not None:
        raise ValueError(
            "The continuous adjoints solve the reverse ODE without a mass matrix: with mass_matrix, use DiscreteAdjoint()."
        )
    forward, max_steps = way.integrator, way.integrator.max_steps
    solver, steps = forward.method if solver is None else solver, forward.grid_steps(way.problem)
    if controller is None and steps is not None:
        controller, max_steps = ConstantStepSize(dt=jnp.abs(way.problem.t1 - way.problem.t0) / steps), steps + 1
    return Integrator(solver, forward.controller if controller is None else controller, None, max_steps)
