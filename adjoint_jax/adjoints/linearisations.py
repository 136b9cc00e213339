"""Keeping the linearisations of stages, as plain backpropagation does; and, where that pays, gathering what many stages say
of the parameters' derivatives before it is computed."""

import functools
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from adjoint_jax import tree
from adjoint_jax.adjoints.adjoint import Inputs
from adjoint_jax.adjoints.gathering import AbstractGathering, AtOnce, Together, steps_together
from adjoint_jax.adjoints.keep import BUDGET_OF_LANE, AbstractKeep, AbstractRungeKuttaKeep, KeepStates
from adjoint_jax.integrate import Integrator
from adjoint_jax.kernels import stored_alone
from adjoint_jax.lanes import are_lanes
from adjoint_jax.problem import Interval, Parameters, Problem
from adjoint_jax.solvers.explicit_runge_kutta import ExplicitRungeKutta, Stage, summed
from adjoint_jax.solvers.linearisation import Linearisation
from adjoint_jax.solvers.solver import AbstractSolver, Pullback, Step, StepOutputs
from adjoint_jax.solvers.tableau import ButcherTableau
from adjoint_jax.tree import Arrays, Scalar

STEPS_OF_SEGMENT, SMALL_SEGMENT, MANY_PARAMETERS = 10, 2**22, 2**20
"""Of adaptive integrations: the steps of a segment; bytes that their linearisations may take in any case; and bytes from
which on parameters are many."""
MOST_ARRAYS = 8
"""Of a stage's linearisation: more take longer to compile, and save no time."""


class Residuals(NamedTuple):
    """What a pullback keeps that varies from point to point: that of the field alone and, if there is a running cost, that
    of both. Which of them is wanted, only the way back knows: a cost that the loss does not use must have no effect, even
    where its derivative is not finite."""

    of_field: list[Array]
    of_both: list[Array]

    def of(self, problem: Problem) -> list[Array]:
        """Those of the problem's rates: with its running cost, if it has one."""
        return self.of_field if problem.running_cost is None else self.of_both


class Linearisations(NamedTuple):
    """A state, and what the pullbacks of a step's stages keep: one stage after the other; or, of long steps, stacked."""

    state: Arrays
    stages: list[Residuals] | Residuals

    def at(self, i: int | Array) -> Residuals:
        """Those of one stage."""
        return self.stages[i] if isinstance(self.stages, list) else tree.take(self.stages, jnp.asarray(i))


class LinearisingRungeKutta(ExplicitRungeKutta):
    """A method that notes the linearisation of the field at its stages; and, if there is a running cost, that of both."""

    of_field: Linearisation = eqx.field(static=True)
    of_both: Linearisation | None = eqx.field(static=True)

    @staticmethod
    def of(problem: Problem, tableau: ButcherTableau) -> "LinearisingRungeKutta":
        of_both = None if problem.running_cost is None else Linearisation(problem)
        return LinearisingRungeKutta(tableau, Linearisation(problem.without_cost()), of_both)

    def is_long(self, problem: Problem) -> bool:
        """As where steps are transposed, whatever program stands for the field where they are taken."""
        del problem
        return super().is_long(self.of_field.problem)

    def evaluated(self, problem: Problem, t: Scalar, y: Arrays) -> Stage:
        del problem
        rates, of_field = self.of_field.at(t, y)
        of_both = [] if self.of_both is None else self.of_both.at(t, y)[1]
        return Stage(rates.y, stored_alone(Residuals(of_field, of_both)))

    def step(self, problem: Problem, interval: Interval, state: Arrays, first: Stage | None) -> Step:
        known = [] if first is None else [first]
        stages, noted = self.stages(problem, interval, state, known, self.tableau.stages)
        return self.step_of(interval, state, stages)._replace(noted=noted)

    def taken_over(self, problem: Problem, t: Scalar, state: Arrays, slope: Arrays) -> Stage:
        return Stage(slope, self.evaluated(problem, t, state).noted)

    def handed_on(self, step: Step) -> Stage:
        return self._stages_of(step)[self.tableau.stages - 1]

    def with_dense_stages(self, problem: Problem, step: Step) -> Step:
        count = self.tableau.stages + self.extra_stages
        stages, noted = self.stages(problem, step.interval, step.before, self._stages_of(step), count)
        return step._replace(stages=tuple(stages), noted=noted)

    def with_blank_stages(self, step: Step) -> Step:
        stages = self._stages_of(step)
        noted = [stage.noted for stage in stages] + [tree.zeros_like(stages[0].noted)] * self.extra_stages
        return super().with_blank_stages(step)._replace(noted=noted if isinstance(step.noted, list) else tree.stack(noted))

    def _stages_of(self, step: Step) -> list[Stage]:
        count = len(step.stages)
        noted = step.noted if isinstance(step.noted, list) else tree.unstack(step.noted, count)
        return [Stage(*pair) for pair in zip(step.stages, noted, strict=True)]


class KeepLinearisations(AbstractRungeKuttaKeep):
    """Keep the state before each step and the linearisation of the field at its stages, as plain backpropagation does: the
    way back evaluates no field, only pullbacks. Of what a pullback keeps, what does not depend on time and state (weights
    of a network, say) is kept once, and what follows from the rest by a few additions and multiplications not at all: of a
    layer with tanh its value. For explicit Runge-Kutta methods; with a running cost, about twice as much is kept.

    Where few points meet many parameters, as in a network on one sample, the parameters' derivatives are computed for the
    stages of several steps together: products of matrices instead of as many products of vectors.

    - `bytes`: as many steps are kept at a time as fit in so many bytes; earlier ones are taken again from checkpoints.
    """

    what: ClassVar[str] = "linearisations"

    def method(self, problem: Problem, solver: AbstractSolver) -> AbstractSolver:
        return LinearisingRungeKutta.of(problem, self.runge_kutta(solver).tableau)

    def of(self, problem: Problem, solver: AbstractSolver, step: Step, *, interpolated: bool) -> Linearisations:
        count = self.runge_kutta(solver).stages_that_matter(interpolated=interpolated)
        if isinstance(step.noted, list):
            return Linearisations(step.before, step.noted[:count])
        return Linearisations(step.before, tree.map(lambda stacked: stacked[:count], step.noted))

    def shapes(self, problem: Problem, solver: AbstractSolver, *, interpolated: bool) -> Linearisations:
        runge_kutta = self.runge_kutta(solver)
        count = runge_kutta.stages_that_matter(interpolated=interpolated)

        def residuals(problem: Problem) -> list[Array]:
            linear = Linearisation(problem)
            return linear.residuals(linear.anywhere)

        def linearisations() -> Linearisations:
            of_both = [] if problem.running_cost is None else residuals(problem)
            one = Residuals(residuals(problem.without_cost()), of_both)
            stages = tree.buffer(count, one) if runge_kutta.is_long(problem) else [one] * count
            return Linearisations(solver.start(problem), stages)

        return jax.eval_shape(linearisations)

    def state(self, kept: Linearisations) -> Arrays:
        return kept.state

    def chunk(self, solver: AbstractSolver, bytes_of_step: int, *, interpolated: bool) -> int:
        return steps_together(self.runge_kutta(solver).stages_that_matter(interpolated=interpolated), bytes_of_step)

    def gathering(self, problem: Problem, solver: AbstractSolver, *, interpolated: bool) -> AbstractGathering:
        linear, runge_kutta = Linearisation(problem), self.runge_kutta(solver)
        stages = runge_kutta.stages_that_matter(interpolated=interpolated)

        def pullback(kept: Linearisations, i: int | Array) -> Pullback:
            return linear.pullback(linear.leaves(kept.at(i).of(problem)))

        def transposed(interval: Interval, kept: Linearisations, cotangent: StepOutputs) -> tuple[Arrays, Parameters]:
            return runge_kutta.transposed_from_linearisations(
                problem, interval, stages, functools.partial(pullback, kept), cotangent, summed(problem)
            )

        together = Together(linear, runge_kutta, stages, pullback)
        return together if together.pays else AtOnce(transposed)


def suitable_keep(inputs: Inputs, integrator: Integrator) -> AbstractKeep:
    """Linearisations where that pays, otherwise states; by sizes alone.

    It pays where an evaluation is bound by reading parameters: where the linearisations of a step, a few arrays which must
    be written and read, are no larger than the parameters, which every stage reads. And where little memory is reserved, or
    filled again, for nothing: where all steps of a given grid fit in; or, with adaptive steps, where parameters are so many
    that what takes longer to compile is worth it, and a few steps take no more than they do, or than is small in any case.

    Measured on a CPU, the time of a gradient by linearisations in that by states: networks on 1 to 16 points with layers of
    32 to 1,024, 16 to 256 steps of RK4: 1.02 for 32 on one point, 0.85 to 0.89 for 64 and 128, 0.5 to 0.96 for more. With
    Tsit5, 4 to 8 adaptive steps: 1.05 to 1.1 for 64, 0.83 to 1.0 for 128, 0.5 to 0.9 for more; and 0.2 to 0.8 s more to
    compile. Layers with normalised inputs, of which three times as many arrays are kept: 0.9 to 1.2, and 0.5 to 4 s more.
    In 8 to 64 lanes of a `vmap`: 1.0 to 1.5, and several times the memory.
    """
    problem, solver, interpolated = inputs.problem, integrator.solver, inputs.requests.interpolated
    if not isinstance(solver, ExplicitRungeKutta) or are_lanes(inputs):
        return KeepStates()
    grid_steps, of_parameters = integrator.grid_steps, tree.size_in_bytes(problem.parameters)
    are_too_few = grid_steps is None and of_parameters < MANY_PARAMETERS
    if are_too_few or solver.is_long(problem):
        return KeepStates()
    linearisations = KeepLinearisations().shapes(problem, solver, interpolated=interpolated)
    of_step = tree.size_in_bytes(linearisations)
    if len(linearisations.at(0).of_field) > MOST_ARRAYS or of_step > of_parameters:
        return KeepStates()
    of_segment = STEPS_OF_SEGMENT * of_step if grid_steps is None else grid_steps * of_step
    budget = max(of_parameters, SMALL_SEGMENT) if grid_steps is None else BUDGET_OF_LANE
    return KeepLinearisations(of_segment) if of_segment <= budget else KeepStates()
