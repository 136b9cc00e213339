"""An explicit Runge-Kutta method that integrates something else along its stages."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from adjoint_jax import tree
from adjoint_jax.hoisting import Function
from adjoint_jax.interpolation import Interpolant
from adjoint_jax.problem import Interval, Problem
from adjoint_jax.quadrature import Nodes
from adjoint_jax.solvers.explicit_runge_kutta import ExplicitRungeKutta
from adjoint_jax.solvers.solver import AbstractSolver, Step
from adjoint_jax.tree import Arrays, Scalar

LOOPED_BYTES = 2**22
"""Of an integral of products of vectors: a larger one is read and written too often where long steps are loops over stages,
but once a step where they are written out, as XLA sums up such products in one kernel. Measured with Tsit5 on a CPU, the
time of `BacksolveAdjoint`'s gradient in loops in that of one written out, and that to build it, for 8 to 48 layers with
normalised inputs: on vectors with 0.13 to 0.5 MiB of parameters 0.36 to 0.8 and 0.3 to 0.55; with 8, 16 and 40 MiB 1.1 to
1.9 and 0.4 to 0.55. On matrices with 0.13 to 40 MiB 0.45 to 1.2, and 0.4 to 1.1."""


class Along(NamedTuple):
    """y, and the integral along it so far; or their derivatives."""

    y: Arrays
    integral: Arrays


class Accompanied(AbstractSolver):
    """A method whose every stage evaluates the field and an integrand together, for where the two share work.

    What the method gives for a further state whose derivative is the integrand is the integral's sum over its stages:
    no more than its `quadrature`, since nothing depends on the integral. So the integral is carried from step to step, but
    is no part of y, of the error estimate, or of what must be finite for the integration to go on. The stages of the
    integral that the method would compute are not used, and XLA removes them; a long step, a loop over its stages, adds up
    as it goes. The first stage of a step is never taken over from the step before, which knows the field there, but not the
    integrand.

    - `rates`: (t, y, args) -> the field and the integrand.
    - `so_far`: the integral at t0.
    """

    method: ExplicitRungeKutta
    rates: Function
    so_far: Arrays

    @property
    def order(self) -> int:
        return self.method.order

    @property
    def error_order(self) -> int | None:
        return self.method.error_order

    @property
    def dense_degree(self) -> int:
        return self.method.dense_degree

    @property
    def extra_stages(self) -> int:
        return self.method.extra_stages

    def evaluations(self, *, estimated: bool, interpolated: bool) -> int:
        return len(self.method.stages_needed(estimated=estimated, interpolated=interpolated))

    def start(self, problem: Problem) -> Along:
        return Along(problem.y0, self.so_far)

    def output(self, state: Along) -> Arrays:
        return state.y

    def is_finite(self, state: Along) -> Bool[Array, ""]:
        return tree.all_finite(state.y)

    def step(self, problem: Problem, interval: Interval, state: Along, first: Arrays | None) -> Step:
        del first
        if self._is_long(problem):
            return self._step_in_a_loop(interval, state)
        stored = problem.stored

        def together(t: Scalar, state: Along, args: PyTree[Any]) -> Along:
            rates = self.rates(t, state.y, args)
            return Along(stored(rates.y), rates.integral)

        step = self.method.step(problem.of_field(together), interval, state, None)
        error = None if step.error is None else step.error.y
        return step._replace(stages=tuple(stage.y for stage in step.stages), error=error)

    def _is_long(self, problem: Problem) -> bool:
        if problem.multiplies_vectors and tree.size_in_bytes(self.so_far) > LOOPED_BYTES:
            return False
        return self.method.is_long(problem.of_field(self.rates))

    def _step_in_a_loop(self, interval: Interval, state: Along) -> Step:
        h, tableau = interval.end - interval.start, self.method.tableau
        weights = h * jnp.asarray(tableau.b, h.dtype)

        def evaluate(i: Array, t: Scalar, y: Arrays, integral: Arrays) -> tuple[Arrays, Arrays]:
            rates = self.rates(t, y, None)
            with_more = tree.add(integral, tree.scale(weights[i], rates.integral))
            return rates.y, tree.where(weights[i] != 0, with_more, integral)

        stages, integral = self.method.stage_loop(interval, state.y, [], tableau.stages, evaluate, state.integral)
        step = self.method.step_of(interval, state.y, tree.unstack(stages, tableau.stages))
        return step._replace(before=state, after=Along(step.after, integral))

    def blank_step(self, t: Scalar, state: Along) -> Step:
        return self.method.blank_step(t, state.y)._replace(before=state, after=state)

    def with_dense_stages(self, problem: Problem, step: Step) -> Step:
        dense = self.method.with_dense_stages(problem, step._replace(before=step.before.y))
        return step._replace(stages=dense.stages)

    def interpolant(self, step: Step) -> Interpolant:
        return self.method.interpolant(step._replace(before=step.before.y))

    def quadrature(self, step: Step) -> Nodes:
        return self.method.quadrature(step._replace(before=step.before.y))
