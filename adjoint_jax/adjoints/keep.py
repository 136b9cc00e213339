"""What is kept of a step for its transposition: more memory, or more evaluations on the way back."""

import abc
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax

from adjoint_jax import tree
from adjoint_jax.adjoints.gathering import AbstractGathering, AtOnce
from adjoint_jax.kernels import stored_in_lanes
from adjoint_jax.problem import Interval, Parameters, Problem
from adjoint_jax.solvers.explicit_runge_kutta import ExplicitRungeKutta
from adjoint_jax.solvers.solver import AbstractSolver, Step, StepOutputs
from adjoint_jax.tree import Arrays, Shapes

BUDGET, BUDGET_OF_LANE = 2**27, 2**24
"""Bytes of all states of a given grid that are kept unless the user says otherwise: by a single problem, and in every lane
of a `vmap`, of which a thousand may each keep so much.

More of them save a second pass over the steps, a fifth of a gradient's time. Measured with RK4 on a network 32-128-128-32,
64 samples, 10,000 steps, one core of a CPU: 16.3 s with 2.7 MB, 13.0 s with 83 MB; `jax.checkpoint` around every step of a
scan takes 13.2 s and 82 MB. `KeepLinearisations` with 4 to 19 MB: 17.3 to 17.9 s.
"""


class AbstractMemo(eqx.Module):
    """What is kept of every step."""

    what: ClassVar[str]
    """What that is, in one word."""
    interpolates: ClassVar[bool] = False
    """Whether it needs the stages of the dense output."""

    def segment(self, steps: int, bytes_of_step: int) -> int:
        """The number of steps that are kept at a time, where that of a segment would be `steps`."""
        del bytes_of_step
        return steps

    def method(self, problem: Problem, solver: AbstractSolver) -> AbstractSolver:
        """The method to take steps with: the same, or one that notes what is kept of them."""
        del problem
        return solver

    @abc.abstractmethod
    def of(self, problem: Problem, solver: AbstractSolver, step: Step, *, interpolated: bool) -> Any:
        """What is kept of a step. `interpolated`: whether the loss may depend on the step's interpolant."""

    @abc.abstractmethod
    def shapes(self, problem: Problem, solver: AbstractSolver, *, interpolated: bool) -> Any:
        """The shapes and dtypes of what is kept of a step."""

    def bytes_of_step(self, problem: Problem, solver: AbstractSolver, *, interpolated: bool) -> int:
        """Bytes that are kept of a step."""
        return tree.size_in_bytes(self.shapes(problem, solver, interpolated=interpolated))

    def chunk(self, solver: AbstractSolver, bytes_of_step: int, *, interpolated: bool) -> int:
        """The number of steps that are best looked at at a time, if it matters."""
        del solver, bytes_of_step, interpolated
        return 1


class Polynomial(NamedTuple):
    """A step's interpolant without its times; or many, along a leading axis."""

    y0: Arrays
    coefficients: Arrays


class KeepInterpolants(AbstractMemo):
    """Keep each step's interpolant: where that is all that is wanted on the way back, no stage is computed again."""

    what: ClassVar[str] = "interpolants"
    interpolates: ClassVar[bool] = True

    def of(self, problem: Problem, solver: AbstractSolver, step: Step, *, interpolated: bool) -> Polynomial:
        interpolant = stored_in_lanes(solver.interpolant(stored_in_lanes(step)))
        return Polynomial(interpolant.y0, interpolant.coefficients)

    def shapes(self, problem: Problem, solver: AbstractSolver, *, interpolated: bool) -> Polynomial:
        return jax.eval_shape(lambda: Polynomial(problem.y0, tree.buffer(solver.dense_degree, problem.y0)))


class AbstractKeep(AbstractMemo):
    """A choice of what to keep of every step for its transposition."""

    @abc.abstractmethod
    def budget(self, *, in_lanes: bool) -> int:
        """All steps of a given grid are kept if they take no more bytes than this."""

    @abc.abstractmethod
    def state(self, kept: Any) -> Arrays:
        """The method's state before the step, or before many."""

    @abc.abstractmethod
    def gathering(self, problem: Problem, solver: AbstractSolver, *, interpolated: bool) -> AbstractGathering:
        """How steps are transposed, and derivatives with respect to the parameters are gathered."""


class KeepStates(AbstractKeep):
    """Keep the state before each step. On the way back, a step's stages are computed again: as many evaluations and as many
    pullbacks as the step has stages.

    - `bytes`: the states of all steps of a given grid are kept if they take no more bytes than this (in every lane of a
      `vmap`), so that no step is taken again; else those of one segment, and checkpoints. By default 128 MiB, and 16 MiB in
      every lane where a `vmap` is seen: one outside of a `jit` around `solve` is not.
    """

    what: ClassVar[str] = "states"

    bytes: int | None = eqx.field(static=True, default=None)

    def budget(self, *, in_lanes: bool) -> int:
        return (BUDGET_OF_LANE if in_lanes else BUDGET) if self.bytes is None else self.bytes

    def of(self, problem: Problem, solver: AbstractSolver, step: Step, *, interpolated: bool) -> Arrays:
        return step.before

    def shapes(self, problem: Problem, solver: AbstractSolver, *, interpolated: bool) -> Shapes:
        return jax.eval_shape(lambda: solver.start(problem))

    def state(self, kept: Arrays) -> Arrays:
        return kept

    def gathering(self, problem: Problem, solver: AbstractSolver, *, interpolated: bool) -> AbstractGathering:
        def transposed(interval: Interval, kept: Arrays, cotangent: StepOutputs) -> tuple[Arrays, Parameters]:
            return solver.transposed_step(problem, interval, kept, cotangent)

        return AtOnce(transposed)


class AbstractRungeKuttaKeep(AbstractKeep):
    """Keeps what explicit Runge-Kutta methods compute on the way: as many steps at a time as fit in so many bytes."""

    bytes: int = eqx.field(static=True, default=2**26)

    def budget(self, *, in_lanes: bool) -> int:
        del in_lanes
        return self.bytes

    def segment(self, steps: int, bytes_of_step: int) -> int:
        return max(1, min(steps, self.bytes // bytes_of_step))

    def runge_kutta(self, solver: AbstractSolver) -> ExplicitRungeKutta:
        """The solver. Raises `TypeError` for one of another kind."""
        if not isinstance(solver, ExplicitRungeKutta):
            raise TypeError(
                f"{type(self).__name__} is for explicit Runge-Kutta methods, got {type(solver).__name__}: use KeepStates()."
            )
        return solver


class Stages(NamedTuple):
    """A state, and the stages of a step from it on which the loss may depend."""

    state: Arrays
    stages: tuple[Arrays, ...]


class KeepStages(AbstractRungeKuttaKeep):
    """Keep the state before each step and its stages, so that all stages of a step are linearised independently of one
    another. For explicit Runge-Kutta methods.

    - `bytes`: as many steps are kept at a time as fit in so many bytes; earlier ones are taken again from checkpoints.
    """

    what: ClassVar[str] = "stages"

    def of(self, problem: Problem, solver: AbstractSolver, step: Step, *, interpolated: bool) -> Stages:
        count = self.runge_kutta(solver).stages_that_matter(interpolated=interpolated)
        return Stages(step.before, step.stages[:count])

    def shapes(self, problem: Problem, solver: AbstractSolver, *, interpolated: bool) -> Stages:
        count = self.runge_kutta(solver).stages_that_matter(interpolated=interpolated)
        return jax.eval_shape(lambda: Stages(problem.y0, (problem.y0,) * count))

    def state(self, kept: Stages) -> Arrays:
        return kept.state

    def gathering(self, problem: Problem, solver: AbstractSolver, *, interpolated: bool) -> AbstractGathering:
        runge_kutta = self.runge_kutta(solver)

        def transposed(interval: Interval, kept: Stages, cotangent: StepOutputs) -> tuple[Arrays, Parameters]:
            return runge_kutta.transposed_from_stages(problem, interval, *kept, cotangent)

        return AtOnce(transposed)
