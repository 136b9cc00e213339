"""The reverse adjoint ODE, solved as an ODE: what the continuous adjoints share.

With a(t) = dJ/dy(t), the running cost l and g = dJ/dcost, between observations,

    da/dt = -(df/dy)^T a - (dl/dy)^T g,      a(t_i^-) = a(t_i^+) + dJ/dy(t_i),
    dJ/dtheta = integral of (df/dtheta)^T a + (dl/dtheta)^T g dt.

The last is a quadrature: it feeds nothing, so it is no part of the ODE's state and of its error norm. It is summed up over
accepted steps: from nodes, when a step has been accepted, or from the stages, as they are computed.
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
from adjoint_jax.adjoints.linearisations import KeepLinearisations
from adjoint_jax.adjoints.trail import Way
from adjoint_jax.controllers.controller import AbstractController
from adjoint_jax.controllers.step_sizes import ConstantStepSize
from adjoint_jax.hoisting import hoisted
from adjoint_jax.integrate import Integrator, Outcome
from adjoint_jax.linear.jacobian import AbstractInverse, AbstractJacobian
from adjoint_jax.problem import Parameters, Problem, Rates
from adjoint_jax.quadrature import Nodes
from adjoint_jax.recorders import AbstractRecorder, QuadratureRecorder
from adjoint_jax.solution import Status
from adjoint_jax.solvers.accompanied import Accompanied, Along
from adjoint_jax.solvers.explicit_runge_kutta import ExplicitRungeKutta
from adjoint_jax.solvers.linearisation import in_stored_halves
from adjoint_jax.solvers.solver import AbstractSolver, pullback_at
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

    def rates(self, t: Scalar, state: Arrays) -> Along:
        """The reverse ODE, and the derivative of dJ/dparameters with respect to t: one linearisation for both."""
        y, a = self.adjoint(t, state)
        rates, pullback = pullback_at(self.problem, t, y)
        of_a, of_parameters = in_stored_halves(self.problem)(pullback)(tree.scale(-1.0, Rates(a, self.cost)))
        return Along(self.velocity(Adjoint(rates.y, of_a)), of_parameters)

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


class AbstractQuadrature(abc.ABC):
    """How the parameters' integral is computed and added to that of a state."""

    def method(self, method: AbstractSolver, system: AbstractReverseSystem, start: ReverseState) -> AbstractSolver:
        """What takes the reverse steps, in place of a method."""
        del system, start
        return method

    def recorders(self, system: AbstractReverseSystem, start: ReverseState) -> list[AbstractRecorder]:
        """What must be recorded of them."""
        del system, start
        return []

    @abc.abstractmethod
    def integral(self, outcome: Outcome) -> Parameters:
        """The integral, when the steps have been taken."""


class AfterSteps(AbstractQuadrature):
    """From nodes of every accepted step, by a recorder that adds them up."""

    def __init__(self, recorder: Callable[[AbstractReverseSystem, ReverseState], AbstractRecorder]):
        self.recorder = recorder

    def recorders(self, system: AbstractReverseSystem, start: ReverseState) -> list[AbstractRecorder]:
        return [self.recorder(system, start)]

    def integral(self, outcome: Outcome) -> Parameters:
        return outcome.records[0]


class AlongStages(AbstractQuadrature):
    """From the stages of every attempted step, which share their linearisations with it."""

    def method(self, method: AbstractSolver, system: AbstractReverseSystem, start: ReverseState) -> Accompanied:
        assert isinstance(method, ExplicitRungeKutta)
        rates = hoisted(lambda t, state, args: system.rates(t, state), start.t, start.state, None)
        return Accompanied(method, rates, start.parameters)

    def integral(self, outcome: Outcome) -> Parameters:
        return outcome.state.integral


class Reverse(NamedTuple):
    """How the reverse ODE is solved, and the parameters' integral computed."""

    integrator: Integrator
    quadrature: AbstractQuadrature

    def to(self, system: AbstractReverseSystem, start: ReverseState, t: Scalar) -> ReverseState:
        """Integrate backward to t. After a failure there is nothing to integrate, and values mean nothing."""
        field = hoisted(system.field, start.t, start.state, None)
        problem = Problem(field, None, None, start.state, start.t, t)
        integrator = self.integrator.restarted(start.h)
        method = self.quadrature.method(integrator.method.with_jacobian(system.jacobian), system, start)
        integrator = dataclasses.replace(integrator, method=method)
        outcome = integrator(problem, self.quadrature.recorders(system, start), start.status == Status.SUCCESS)
        report, state = outcome.report, integrator.solver.output(outcome.state)
        h = jnp.where(report.stats.accepted > 0, jnp.abs(report.h), start.h)
        there = start._replace(t=t, state=state, parameters=self.quadrature.integral(outcome), h=h)
        return there.failing(report.failed, report.status, report.reached)


def over_stages(integrator: Integrator, problem: Problem) -> AbstractQuadrature:
    """The quadrature over the stages of the reverse method, in the way that suits the problem."""
    solver = integrator.solver
    if _pays_along_stages(problem, solver):
        return AlongStages()

    def recorder(system: AbstractReverseSystem, start: ReverseState) -> QuadratureRecorder:
        return QuadratureRecorder(solver.quadrature, system.integral, start.parameters, start.state, notes=1)

    return AfterSteps(recorder)


def _pays_along_stages(problem: Problem, solver: AbstractSolver) -> bool:
    """Whether parameters' derivatives are best taken at every stage, with the state's; by sizes alone.

    For a network of three products a stage takes nine: for its value, its derivative with respect to the state, and that
    with respect to the parameters. From nodes it takes 13, since the nodes are linearised anew; but one set of parameters'
    derivatives is written for a step, not one for every stage. Measured on one core of a CPU, the time of a gradient along
    the stages in that from nodes, with adaptive steps of Tsit5 and fixed ones of RK4, for networks of three layers:

        width      64    128   256          512   1,024
        samples    128   64    8      32    256   2      8      32     128
        adaptive   0.70        0.88   0.77  0.73  1.27   1.15   0.83   0.74
        of a step  34          0.67   2.7   9.9   0.046  0.18   0.73   2.9
        fixed            0.66  0.84   0.69        1.21   1.20   0.78   0.69
        of a step        5.7   0.45   1.8         0.03   0.12   0.49   1.9

    where the last row of each has the bytes of a step's linearisations in those of the parameters: it pays from a third on.
    With a state of vectors it does in any case (0.70 to 1.01 for widths of 256 to 2,048): the derivatives are then products
    of vectors, which XLA computes and sums up over the stages in one kernel (0.59 to 0.83 in 16 and 64 lanes). Where the
    field multiplies no matrices, XLA may compute one stage again inside others: 0.7 to 2.2 for rings of cells and for
    Lotka-Volterra.
    """
    if not isinstance(solver, ExplicitRungeKutta) or not problem.multiplies_matrices:
        return False
    if problem.multiplies_vectors:
        return True
    of_step = KeepLinearisations().bytes_of_step(problem, solver, interpolated=False)
    return 3 * of_step >= tree.size_in_bytes(problem.parameters)


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
    solver, steps = forward.method if solver is None else solver, forward.grid_steps
    if controller is None and steps is not None:
        controller, max_steps = ConstantStepSize(dt=jnp.abs(way.problem.t1 - way.problem.t0) / steps), steps + 1
    return Integrator(solver, forward.controller if controller is None else controller, None, max_steps)
