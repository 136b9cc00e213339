"""The adjoint of Chen et al.: the state is integrated backward together with its adjoint."""

import operator
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from adjoint_jax import tree
from adjoint_jax.adjoints.adjoint import Inputs, relative_distance
from adjoint_jax.adjoints.continuous import AbstractContinuousAdjoint, Final, Swept, preceded_by_t0
from adjoint_jax.adjoints.memory import Kept, Memory
from adjoint_jax.adjoints.reverse_ode import (
    AbstractReverseSystem,
    Adjoint,
    Observations,
    Reverse,
    ReverseState,
    over_stages,
    prepared,
    reverse_integrator,
)
from adjoint_jax.adjoints.trail import Way
from adjoint_jax.controllers.controller import AbstractController, positive
from adjoint_jax.integrate import Integrator
from adjoint_jax.linear.dense import DenseJacobian
from adjoint_jax.linear.jacobian import AbstractJacobian
from adjoint_jax.problem import Problem
from adjoint_jax.recorders import AbstractRecorder, RowRecorder
from adjoint_jax.saveat import Rows
from adjoint_jax.solution import Status
from adjoint_jax.solvers.solver import AbstractSolver
from adjoint_jax.tree import Arrays, Scalar


class BacksolveAdjoint(AbstractContinuousAdjoint):
    """The continuous adjoint with the state recomputed backward in time (Chen, Rubanova, Bettencourt and Duvenaud, "Neural
    ordinary differential equations", NeurIPS 2018, appendix B).

    State and adjoint are integrated together from t1 to t0, each step controlled by its error estimate. The state is reset
    to what was saved at every save time, where the adjoint jumps. Parameters are a quadrature outside of the ODE state and
    of its error norm. The adjoint is linear and is solved for cotangents scaled to at most one, so that tolerances do not
    depend on the scale of the loss.

    - `solver`, `controller`: the method and controller of the reverse integration, by default the forward ones; where the
      forward grid is given, steps of its mean size. A `FixedSteps(n)` takes n steps between two observations. Tolerances
      given as pytrees are like y, and hold for state and adjoint alike.
    - `checkpoints`: so many further times, evenly spread from t0 to t1, at which the state is saved and reset.
    - `max_drift`: the guard against a reversed flow that is unstable. Where the state is reset, and at t0, the state that
      was recomputed is compared with the saved one: if in any leaf their difference (root mean square over the entries)
      exceeds `max_drift` times the largest size of this leaf at these times, the gradient is NaN and, with `throw=True`,
      an error is raised. `jnp.inf` turns the guard off.

    Memory: O(1) in the number of steps, O(number of save times + checkpoints). The gradient differs from the exact
    derivative of the computed solution by O(tolerance), and is right only where the reversed flow is stable: on dissipative
    problems use `InterpolatingAdjoint` or `GaussAdjoint`. If the reverse integration fails, the gradient is NaN, and
    with `throw=True` an error is raised.
    """

    solver: AbstractSolver | None = None
    controller: AbstractController | None = None
    checkpoints: int = eqx.field(static=True, default=0, converter=operator.index)
    max_drift: Any = 0.01

    def __check_init__(self) -> None:
        if self.checkpoints < 0:
            raise ValueError(f"BacksolveAdjoint(checkpoints=...) must not be negative, got {self.checkpoints}.")

    def prepare(self, dtype: DTypeLike) -> "BacksolveAdjoint":
        controller = None if self.controller is None else prepared(self.controller, "BacksolveAdjoint", dtype)
        max_drift = positive("BacksolveAdjoint(max_drift)", self.max_drift, dtype)
        return BacksolveAdjoint(self.solver, controller, self.checkpoints, max_drift)

    def recorders(self, integrator: Integrator, inputs: Inputs) -> list[AbstractRecorder]:
        if self.checkpoints == 0:
            return []
        problem = inputs.problem
        return [RowRecorder(Rows(self._checkpoint_times(problem), None), problem, integrator.solver)]

    def memory(self, way: Way, records: Sequence[Any]) -> Memory:
        del way
        return Memory.of(*(Kept.rows("checkpoints", record.rows) for record in records))

    def _checkpoint_times(self, problem: Problem) -> Float[Array, " checkpoints"]:
        fractions = jnp.arange(1, self.checkpoints + 1) / (self.checkpoints + 1)
        return problem.t0 + (problem.t1 - problem.t0) * fractions.astype(problem.t0.dtype)

    def resets(self, way: Way, records: Sequence[Any]) -> list[Observations]:
        times = self._checkpoint_times(way.problem)
        return [Observations(times, record.rows, tree.zeros_like(record.rows)) for record in records]

    def sweep(self, way: Way, records: Sequence[Any], observations: Observations, final: Final) -> Swept:
        del records
        observations = preceded_by_t0(way.problem, observations)
        integrator = reverse_integrator(way, self.solver, self.controller)
        integrator = eqx.tree_at(lambda i: i.controller, integrator, integrator.controller.on_pairs())
        reverse, system = Reverse(integrator, over_stages(integrator, way.problem)), _Backward(way.problem, final.cost)
        sizes = jax.vmap(tree.root_mean_squares)(observations.states)
        largest = tree.map(lambda some, last: jnp.maximum(jnp.max(some), last), sizes, tree.root_mean_squares(final.y))

        def to_observation(state: ReverseState, observation: Observations) -> tuple[ReverseState, None]:
            before, state = state.t, reverse.to(system, state, observation.times)
            y, a = state.state
            drift = relative_distance(y, observation.states, largest)
            lost = (before != observation.times) & ~(drift <= self.max_drift) & tree.any_nonzero((a, final.cost))
            state = state.failing(lost, Status.REVERSE_DRIFT, observation.times)
            return state._replace(state=(observation.states, tree.add(a, observation.cotangents))), None

        h = jnp.abs(way.report.reached - way.problem.t0) / jnp.maximum(way.report.stats.accepted, 1)
        start = ReverseState.beginning(final.t, (final.y, final.a), final.parameters, h)
        end = jax.lax.scan(to_observation, start, observations, reverse=True)[0]
        a, parameters = tree.unknown_if(end.status != Status.SUCCESS, (end.state[1], end.parameters))
        return Swept(a, parameters, end.status, end.failure)


class _Backward(AbstractReverseSystem):
    """The reverse ODE for y and a together."""

    problem: Problem
    cost: Arrays

    def adjoint(self, t: Scalar, state: tuple[Arrays, Arrays]) -> Adjoint:
        del t
        return Adjoint(*state)

    def velocity(self, rates: Adjoint) -> tuple[Arrays, Arrays]:
        return rates.y, rates.a

    def jacobian(self, forward: AbstractJacobian) -> AbstractJacobian:
        """That of both together, which has no structure."""
        del forward
        return DenseJacobian()
