"""What is kept of a step for its transposition: more memory, or more evaluations on the way back."""

import abc
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax

from adjoint_jax import tree
from adjoint_jax.hoisting import varying_results
from adjoint_jax.problem import Interval, Parameters, Problem
from adjoint_jax.solvers.explicit_runge_kutta import ExplicitRungeKutta
from adjoint_jax.solvers.solver import AbstractSolver, Pullback, Step, StepOutputs, pullback_at
from adjoint_jax.tree import Arrays

BUDGET, BUDGET_OF_LANE = 2**27, 2**24
"""Bytes of all states of a given grid that are kept unless the user says otherwise: by a single problem, and in every lane
of a `vmap`, of which a thousand may each keep so much.

More of them save a second pass over the steps, a fifth of a gradient's time. Measured with RK4 on a network 32-128-128-32,
64 samples, 10,000 steps, one core of a CPU: 16.3 s with 2.7 MB, 13.0 s with 83 MB; `jax.checkpoint` around every step of a
scan takes 13.2 s and 82 MB. `KeepLinearisations` with 4 to 19 MB: 17.3 to 17.9 s.
"""


class AbstractKeep(eqx.Module):
    """A choice of what to keep of every step."""

    what: ClassVar[str]
    """What is kept, in one word."""

    @abc.abstractmethod
    def budget(self, *, in_lanes: bool) -> int:
        """All steps of a given grid are kept if they take no more bytes than this."""

    @abc.abstractmethod
    def segment(self, steps: int, bytes_of_step: int) -> int:
        """The number of steps that are kept at a time, where that of a segment would be `steps`."""

    @abc.abstractmethod
    def of(self, problem: Problem, solver: AbstractSolver, step: Step, *, interpolated: bool) -> Any:
        """What is kept of a step. `interpolated`: whether the loss may depend on the step's interpolant."""

    @abc.abstractmethod
    def state(self, kept: Any) -> Arrays:
        """The method's state before the step, or before many."""

    @abc.abstractmethod
    def transposed(
        self, problem: Problem, solver: AbstractSolver, interval: Interval, kept: Any, cotangent: StepOutputs
    ) -> tuple[Arrays, Parameters]:
        """The transposed step."""


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

    def segment(self, steps: int, bytes_of_step: int) -> int:
        del bytes_of_step
        return steps

    def of(self, problem: Problem, solver: AbstractSolver, step: Step, *, interpolated: bool) -> Arrays:
        return step.before

    def state(self, kept: Arrays) -> Arrays:
        return kept

    def transposed(
        self, problem: Problem, solver: AbstractSolver, interval: Interval, kept: Arrays, cotangent: StepOutputs
    ) -> tuple[Arrays, Parameters]:
        return solver.transposed_step(problem, interval, kept, cotangent)


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

    def state(self, kept: Stages) -> Arrays:
        return kept.state

    def transposed(
        self, problem: Problem, solver: AbstractSolver, interval: Interval, kept: Stages, cotangent: StepOutputs
    ) -> tuple[Arrays, Parameters]:
        return self.runge_kutta(solver).transposed_from_stages(problem, interval, *kept, cotangent)


class Linearisations(NamedTuple):
    """A state, and what the pullbacks of a step's stages keep that varies from stage to stage: those of the field alone
    and, if there is a running cost, those of both. Which of them is wanted, only the way back knows: a cost that the loss
    does not use must have no effect, even where its derivative is not finite."""

    state: Arrays
    of_field: tuple[list[Arrays], ...]
    of_both: tuple[list[Arrays], ...]


class KeepLinearisations(AbstractRungeKuttaKeep):
    """Keep the state before each step and the linearisation of the field at its stages, as plain backpropagation does: the
    way back evaluates no field, only pullbacks. Of what a pullback keeps, what does not depend on time and state (weights
    of a network, say) is kept once. For explicit Runge-Kutta methods; with a running cost, about twice as much is kept.

    - `bytes`: as many steps are kept at a time as fit in so many bytes; earlier ones are taken again from checkpoints.
    """

    what: ClassVar[str] = "linearisations"

    def of(self, problem: Problem, solver: AbstractSolver, step: Step, *, interpolated: bool) -> Linearisations:
        runge_kutta = self.runge_kutta(solver)
        stages = step.stages[: runge_kutta.stages_that_matter(interpolated=interpolated)]

        def residuals(problem: Problem) -> tuple[list[Arrays], ...]:
            varies = _varying(problem)
            pullbacks = runge_kutta.pullbacks(problem, step.interval, step.before, stages)
            pairs = (zip(jax.tree.leaves(pullback), varies, strict=True) for pullback in pullbacks)
            return tuple([leaf for leaf, kept in leaves if kept] for leaves in pairs)

        of_both = () if problem.running_cost is None else residuals(problem)
        return Linearisations(step.before, residuals(problem.without_cost()), of_both)

    def state(self, kept: Linearisations) -> Arrays:
        return kept.state

    def transposed(
        self, problem: Problem, solver: AbstractSolver, interval: Interval, kept: Linearisations, cotangent: StepOutputs
    ) -> tuple[Arrays, Parameters]:
        varies, anywhere = _varying(problem), pullback_at(problem, problem.t0, problem.y0)[1]
        leaves, structure = jax.tree.flatten(anywhere)

        def restored(residuals: list[Arrays]) -> Pullback:
            own = iter(residuals)
            return jax.tree.unflatten(structure, [next(own) if k else leaf for leaf, k in zip(leaves, varies, strict=True)])

        pullbacks = [restored(residuals) for residuals in (kept.of_field if problem.running_cost is None else kept.of_both)]
        return self.runge_kutta(solver).transposed_from_pullbacks(problem, interval, pullbacks, cotangent)


def _varying(problem: Problem) -> list[bool]:
    """Which of the arrays that a pullback keeps depend on the time and the state at which it was taken.

    Read off the traced program."""

    def residuals(point: tuple[Arrays, ...], parameters: Parameters) -> list[Arrays]:
        return jax.tree.leaves(pullback_at(problem.at(parameters), *point)[1])

    point = problem.t0, problem.y0
    program = jax.make_jaxpr(residuals)(point, problem.parameters).jaxpr
    coordinates = len(jax.tree.leaves(point))
    return varying_results(program, [i < coordinates for i in range(len(program.invars))])


def suitable_keep(problem: Problem, solver: AbstractSolver, grid_steps: int | None, *, interpolated: bool) -> AbstractKeep:
    """Linearisations where that pays, otherwise states; by sizes alone. `grid_steps`: None without a given grid.

    It pays where an evaluation is bound by reading parameters: where the linearisations of a step, which must be written
    and read, are no larger than the parameters, which every stage reads. And where no memory is reserved, or filled again,
    for nothing: where the number of steps is known and all of them fit in. And where stages are written out: for a long
    field, they would be what takes longest to compile.

    Measured on a CPU, the time of a gradient by linearisations in that by states: 0.7 to 1.3 for networks on 1 to 16 points
    with layers of 256 and 1,024, fixed steps (0.8 to 1.0 with the points as lanes of a `vmap`, whose number is not seen
    here); 1.2 to 1.8 where linearisations are larger than parameters, 0.8 to 2.9 with adaptive steps. `KeepStages` was
    never clearly the fastest.
    """
    if grid_steps is None or not isinstance(solver, ExplicitRungeKutta):
        return KeepStates()
    if solver.is_long(problem, solver.stages_that_matter(interpolated=interpolated)):
        return KeepStates()
    keep = KeepLinearisations(BUDGET_OF_LANE)
    of_step = bytes_kept(keep, problem, solver, interpolated=interpolated)
    pays = of_step <= tree.size_in_bytes(problem.parameters) and grid_steps * of_step <= keep.bytes
    return keep if pays else KeepStates()


def bytes_kept(keep: AbstractKeep, problem: Problem, solver: AbstractSolver, *, interpolated: bool) -> int:
    """Bytes that are kept of one step."""
    return tree.size_in_bytes(shapes_kept(keep, problem, solver, interpolated=interpolated))


def shapes_kept(keep: AbstractKeep, problem: Problem, solver: AbstractSolver, *, interpolated: bool) -> Any:
    """The shapes and dtypes of what is kept of one step."""

    def kept() -> Any:
        step = solver.blank_step(problem.t0, solver.start(problem))
        return keep.of(problem, solver, step, interpolated=interpolated)

    return jax.eval_shape(kept)
