"""The reverse adjoint ODE, solved as an ODE: what the continuous adjoints share.

With a(t) = dJ/dy(t), between observations,

    da/dt = -(df/dy)^T a,        a(t_i^-) = a(t_i^+) + dJ/dy(t_i),        dJ/dtheta = integral of (df/dtheta)^T a dt.

The last is a quadrature: it feeds nothing, so it is no part of the ODE's state and of its error norm. It is summed up with
the weights of the reverse method over the stages of accepted steps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from adjoint_jax import tree
from adjoint_jax.integrate import Integrator
from adjoint_jax.problem import Problem
from adjoint_jax.recorders import AbstractRecorder, Layout, Place
from adjoint_jax.solution import Status
from adjoint_jax.solvers.explicit_runge_kutta import ExplicitRungeKutta, Step
from adjoint_jax.tree import Arrays, Scalar


class Observations(NamedTuple):
    """What the loss says directly of the states at some times, ordered from t0 on."""

    times: Float[Array, " observations"]
    states: Arrays
    cotangents: Arrays


class ReverseState(NamedTuple):
    """Where the sweep stands: the time, y and a there, dJ/dparameters so far, and the next step size."""

    t: Scalar
    y: Arrays
    a: Arrays
    parameters: PyTree[Any]
    h: Scalar


class _StageNote(NamedTuple):
    """The stages of one reverse step: times, states, and a times the quadrature's weights; and whether it was taken."""

    times: Float[Array, " stages"]
    ys: Arrays
    weighted: Arrays
    taken: Bool[Array, ""]


class QuadratureRecorder(AbstractRecorder):
    """Adds up the integral of (df/dtheta)^T a over accepted steps of the pair (y, a), one batched vjp for each step."""

    problem: Problem
    solver: ExplicitRungeKutta
    so_far: PyTree[Any]

    @property
    def longest_chunk(self) -> int:
        return 1

    def start(self, problem: Problem, layout: Layout) -> PyTree[Any]:
        del problem, layout
        return self.so_far

    def note(self, step: Step, accepted: Bool[Array, ""]) -> _StageNote:
        times, (ys, cotangents), weights = self.solver.quadrature(step)
        weights = jnp.where(accepted, -weights, 0.0)
        y, a = tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(times), *leaf.shape)), step.y0)
        ys, cotangents = tree.where(accepted, (ys, cotangents), (y, a))
        return _StageNote(times, ys, jax.vmap(tree.scale)(weights, cotangents), accepted)

    def write(self, record: PyTree[Any], place: Place, notes: _StageNote) -> PyTree[Any]:
        del place
        stages = notes.times.size
        times, ys, weighted = tree.map(
            lambda leaf: leaf.reshape(stages, *leaf.shape[2:]), (notes.times, notes.ys, notes.weighted)
        )

        def fields(parameters: PyTree[Any]) -> Arrays:
            return jax.vmap(lambda t, y: self.problem.field_at(t, y, parameters))(times, ys)

        gradient = jax.vjp(fields, self.problem.parameters)[1](weighted)[0]
        return tree.add(record, tree.where(jnp.any(notes.taken), gradient, tree.zeros_like(gradient)))


def reverse_to(problem: Problem, integrator: Integrator, state: ReverseState, t: Scalar) -> ReverseState:
    """Integrate y, a and the quadrature backward to t. NaN in a and the quadrature if t could not be reached."""

    def pair_field(t: Scalar, pair: tuple[Arrays, Arrays], args: PyTree[Any]) -> tuple[Arrays, Arrays]:
        del args
        y, a = pair
        dy, pullback = jax.vjp(lambda y: problem.field(t, y), y)
        return dy, tree.scale(-1.0, pullback(a)[0])

    pair_problem = Problem(pair_field, None, (state.y, state.a), state.t, t)
    quadrature = QuadratureRecorder(problem, integrator.solver, state.parameters)
    outcome = integrator.restarted(state.h)(pair_problem, [quadrature], jnp.array(True))
    failed = outcome.report.status != Status.SUCCESS
    y, a = outcome.y
    a, parameters = tree.map(lambda leaf: jnp.where(failed, jnp.nan, leaf), (a, outcome.records[0]))
    h = jnp.where(outcome.report.stats.accepted > 0, jnp.abs(outcome.report.h), state.h)
    return ReverseState(t, y, a, parameters, h)


def sweep(
    problem: Problem, integrator: Integrator, observations: Observations, state: ReverseState
) -> tuple[Arrays, PyTree[Any]]:
    """dJ/dy(t0) and dJ/dparameters, from the state at the time reached. y is reset to what is known of it at every
    observation."""

    def to_observation(state: ReverseState, observation: Observations) -> tuple[ReverseState, None]:
        state = reverse_to(problem, integrator, state, observation.times)
        return state._replace(y=observation.states, a=tree.add(state.a, observation.cotangents)), None

    if len(observations.times):
        state = jax.lax.scan(to_observation, state, observations, reverse=True)[0]
    state = reverse_to(problem, integrator, state, problem.t0)
    return state.a, state.parameters
