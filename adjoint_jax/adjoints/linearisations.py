"""Keeping the linearisations of stages, as plain backpropagation does; and, where that pays, gathering what many stages say
of the parameters' derivatives before it is computed."""

from typing import ClassVar, NamedTuple

import jax
from jaxtyping import Array

from adjoint_jax import tree
from adjoint_jax.adjoints.adjoint import Inputs
from adjoint_jax.adjoints.gathering import AbstractGathering, AtOnce, Together, steps_together
from adjoint_jax.adjoints.keep import BUDGET_OF_LANE, AbstractKeep, AbstractRungeKuttaKeep, KeepStates
from adjoint_jax.integrate import Integrator
from adjoint_jax.lanes import are_lanes
from adjoint_jax.problem import Interval, Parameters, Problem
from adjoint_jax.solvers.explicit_runge_kutta import ExplicitRungeKutta, summed
from adjoint_jax.solvers.linearisation import Linearisation
from adjoint_jax.solvers.solver import AbstractSolver, Pullback, Step, StepOutputs, pullback_at
from adjoint_jax.tree import Arrays, Scalar

STEPS_OF_SEGMENT, SMALL_SEGMENT, MANY_PARAMETERS = 10, 2**22, 2**20
"""Of adaptive integrations: the steps of a segment; bytes that their linearisations may take in any case; and bytes from
which on parameters are many."""
MOST_ARRAYS = 8
"""Of a stage's linearisation: more take longer to compile, and save no time."""


class Linearisations(NamedTuple):
    """A state, and what the pullbacks of a step's stages keep that varies from stage to stage, one stage after the other:
    those of the field alone and, if there is a running cost, those of both. Which of them is wanted, only the way back
    knows: a cost that the loss does not use must have no effect, even where its derivative is not finite."""

    state: Arrays
    of_field: list[list[Array]]
    of_both: list[list[Array]]

    def of(self, problem: Problem) -> list[list[Array]]:
        """Those of the problem's rates: with its running cost, if it has one."""
        return self.of_field if problem.running_cost is None else self.of_both


class HandedOn(NamedTuple):
    """What a step takes over: its first stage, and what the pullback there keeps, as of each in `Linearisations`."""

    slope: Arrays
    of_field: list[Array]
    of_both: list[Array]


class LinearisingRungeKutta(ExplicitRungeKutta):
    """A method whose last stage is the next step's first, and which hands on its linearisation, too."""

    def step(self, problem: Problem, interval: Interval, state: Arrays, first: HandedOn | None) -> Step:
        if first is None:
            return super().step(problem, interval, state, None)
        return super().step(problem, interval, state, first.slope)._replace(taken_over=first)

    def handed_on(self, problem: Problem, t: Scalar, state: Arrays, slope: Arrays) -> HandedOn:
        def residuals(problem: Problem) -> list[Array]:
            return Linearisation(problem).residuals(jax.tree.leaves(pullback_at(problem, t, state)[1]))

        of_both = [] if problem.running_cost is None else residuals(problem)
        return HandedOn(slope, residuals(problem.without_cost()), of_both)


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

    def method(self, solver: AbstractSolver) -> AbstractSolver:
        runge_kutta = self.runge_kutta(solver)
        return LinearisingRungeKutta(runge_kutta.tableau) if solver.reuses_last_stage else solver

    def of(self, problem: Problem, solver: AbstractSolver, step: Step, *, interpolated: bool) -> Linearisations:
        runge_kutta, known = self.runge_kutta(solver), step.taken_over
        stages = step.stages[: runge_kutta.stages_that_matter(interpolated=interpolated)]

        def residuals(problem: Problem, of_first: list[list[Array]]) -> list[list[Array]]:
            linear = Linearisation(problem)
            pullbacks = runge_kutta.pullbacks(problem, step.interval, step.before, stages, first=len(of_first))
            return [*of_first, *(linear.residuals(jax.tree.leaves(pullback)) for pullback in pullbacks)]

        of_field = residuals(problem.without_cost(), [] if known is None else [known.of_field])
        of_both = []
        if problem.running_cost is not None:
            of_both = residuals(problem, [] if known is None else [known.of_both])
        return Linearisations(step.before, of_field, of_both)

    def shapes(self, problem: Problem, solver: AbstractSolver, *, interpolated: bool) -> Linearisations:
        stages = self.runge_kutta(solver).stages_that_matter(interpolated=interpolated)

        def kept(problem: Problem) -> list[list[Array]]:
            linear = Linearisation(problem)
            return [linear.residuals(linear.anywhere)] * stages

        def linearisations() -> Linearisations:
            of_both = [] if problem.running_cost is None else kept(problem)
            return Linearisations(solver.start(problem), kept(problem.without_cost()), of_both)

        return jax.eval_shape(linearisations)

    def state(self, kept: Linearisations) -> Arrays:
        return kept.state

    def chunk(self, problem: Problem, solver: AbstractSolver, *, interpolated: bool) -> int:
        stages = self.runge_kutta(solver).stages_that_matter(interpolated=interpolated)
        return steps_together(stages, self.bytes_of_step(problem, solver, interpolated=interpolated))

    def gathering(self, problem: Problem, solver: AbstractSolver, *, interpolated: bool) -> AbstractGathering:
        linear, runge_kutta = Linearisation(problem), self.runge_kutta(solver)
        stages = runge_kutta.stages_that_matter(interpolated=interpolated)

        def pullbacks(interval: Interval, kept: Linearisations) -> list[Pullback]:
            del interval
            return [linear.pullback(linear.leaves(residuals)) for residuals in kept.of(problem)]

        def transposed(interval: Interval, kept: Linearisations, cotangent: StepOutputs) -> tuple[Arrays, Parameters]:
            of_stages = pullbacks(interval, kept)
            return summed(runge_kutta.transposed_from_pullbacks(problem, interval, of_stages, cotangent))

        together = Together(problem, runge_kutta, stages, pullbacks)
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
    if are_too_few or solver.is_long(problem, solver.stages_that_matter(interpolated=interpolated)):
        return KeepStates()
    linearisations = KeepLinearisations().shapes(problem, solver, interpolated=interpolated)
    of_step = tree.size_in_bytes(linearisations)
    if len(linearisations.of_field[0]) > MOST_ARRAYS or of_step > of_parameters:
        return KeepStates()
    of_segment = STEPS_OF_SEGMENT * of_step if grid_steps is None else grid_steps * of_step
    budget = max(of_parameters, SMALL_SEGMENT) if grid_steps is None else BUDGET_OF_LANE
    return KeepLinearisations(of_segment) if of_segment <= budget else KeepStates()
