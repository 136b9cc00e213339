"""How what steps say of the parameters' derivatives is gathered: step by step, or of the stages of many steps together.

dJ/dparameters is a sum over all stages that feeds nothing back. For a network on one sample, every term of it is as large
as all weights, a product of a column and a row; many of them together are one product of two matrices.
"""

import abc
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from adjoint_jax import tree
from adjoint_jax.kernels import stored_alone
from adjoint_jax.lanes import put
from adjoint_jax.problem import Interval, Parameters, Rates
from adjoint_jax.solvers.explicit_runge_kutta import ExplicitRungeKutta, Gather
from adjoint_jax.solvers.linearisation import InHalves, Linearisation, Said
from adjoint_jax.solvers.solver import Pullback, StepOutputs
from adjoint_jax.tree import Arrays

STAGES_TOGETHER, BYTES_TOGETHER = 32, 2**21
"""Stages that are gathered before their sum is computed, and bytes of what is kept of them.

A product of 6 columns and 6 rows of 1,024 numbers takes 0.15 ms on two cores, of 24 and 24 0.20, of 48 and 48 0.31; six
products of a column and a row, 0.20."""


def steps_together(stages: int, bytes_of_step: int) -> int:
    """How many steps of so many stages are gathered together: a power of two."""
    steps = min(STAGES_TOGETHER // stages, BYTES_TOGETHER // max(1, bytes_of_step))
    return 1 << max(0, steps.bit_length() - 1)


class AbstractGathering(abc.ABC):
    """How steps are transposed, and what they say of dJ/dparameters is gathered over the steps of a chunk."""

    @abc.abstractmethod
    def begun(self, zeros: Parameters, unknown: Bool[Array, ""]) -> Any:
        """What all chunks say, of which there were none: zeros, or NaN if it is unknown."""

    @abc.abstractmethod
    def opened(self, so_far: Any, steps: int) -> Any:
        """What was gathered of no step yet, of a chunk of so many, and of the chunks before."""

    @abc.abstractmethod
    def transposed(self, interval: Interval, kept: Any, cotangent: StepOutputs) -> tuple[Arrays, Any]:
        """The transposed step: dJ/dstate, and what it says of dJ/dparameters."""

    @abc.abstractmethod
    def entered(self, gathered: Any, index: Int[Array, ""], said: Any, taken: Bool[Array, ""]) -> Any:
        """With what a step says, if it was taken: which step of the chunk that is."""

    @abc.abstractmethod
    def closed(self, gathered: Any) -> Any:
        """What all chunks say, with that one."""

    @abc.abstractmethod
    def ended(self, so_far: Any) -> Parameters:
        """dJ/dparameters."""


class AtOnce(AbstractGathering):
    """Added up step by step."""

    def __init__(self, transposed: Callable[[Interval, Any, StepOutputs], tuple[Arrays, Parameters]]):
        self._transposed = transposed

    def begun(self, zeros: Parameters, unknown: Bool[Array, ""]) -> Parameters:
        return tree.unknown_if(unknown, zeros)

    def opened(self, so_far: Parameters, steps: int) -> Parameters:
        del steps
        return so_far

    def transposed(self, interval: Interval, kept: Any, cotangent: StepOutputs) -> tuple[Arrays, Parameters]:
        return self._transposed(interval, kept, cotangent)

    def entered(self, gathered: Parameters, index: Int[Array, ""], said: Parameters, taken: Bool[Array, ""]) -> Parameters:
        return tree.add(gathered, tree.where(taken, said, tree.zeros_like(said)))

    def closed(self, gathered: Parameters) -> Parameters:
        return gathered

    def ended(self, so_far: Parameters) -> Parameters:
        return so_far


class _Sum(NamedTuple):
    """dJ/dparameters; whether they are zero, since nothing was added yet; and whether they are unknown, whatever is added.

    NaN is put in the place of unknown ones in the end, so that zeros depend on nothing and can be written while steps are
    taken."""

    parameters: Parameters
    are_zero: Bool[Array, ""]
    are_unknown: Bool[Array, ""]


class _Gathered(NamedTuple):
    """What the chunks before say, and what was said in a chunk: by step and stage."""

    so_far: _Sum
    said: Said


class Together(AbstractGathering):
    """Computed of all stages of a chunk of steps together. `linear`: the pullback of the rates. `pullback`: that of a
    step's stage, from what is kept of the step."""

    def __init__(
        self,
        linear: Linearisation,
        solver: ExplicitRungeKutta,
        stages: int,
        pullback: Callable[[Any, int | Array], Pullback],
    ):
        self._problem, self._solver, self._stages, self._pullback = linear.problem, solver, stages, pullback
        self._halves = InHalves(linear)
        self._stacked = Gather(tree.stack, self._nothing, put)

    def _nothing(self) -> Said:
        """What no stage has said yet, stacked."""
        return tree.buffer(self._stages, self._halves.said)

    @property
    def pays(self) -> bool:
        """Whether what is passed on within a step is no larger than the parameters, of which every step would make one
        addition."""
        of_step = self._stages * tree.size_in_bytes(self._halves.said.passed)
        return self._halves.is_linear and of_step <= tree.size_in_bytes(self._problem.parameters)

    def begun(self, zeros: Parameters, unknown: Bool[Array, ""]) -> _Sum:
        return _Sum(zeros, jnp.array(True), unknown)

    def opened(self, so_far: _Sum, steps: int) -> _Gathered:
        return _Gathered(so_far, tree.buffer(steps, self._nothing()))

    def transposed(self, interval: Interval, kept: Any, cotangent: StepOutputs) -> tuple[Arrays, Said]:
        """What goes into a pullback and what it says is stored: XLA would compute it anew where it is written down, and a
        vector once more where a matrix is multiplied by it."""

        def pull(pullback: Pullback, cotangent: Rates) -> tuple[Arrays, Said]:
            of_y, said = self._halves.first(pullback, stored_alone(cotangent))
            return of_y, stored_alone(said)

        def first_half(i: int | Array) -> Callable[[Rates], tuple[Arrays, Said]]:
            return functools.partial(pull, self._pullback(kept, i))

        return self._solver.transposed_from_linearisations(
            self._problem, interval, self._stages, first_half, cotangent, self._stacked
        )

    def entered(self, gathered: _Gathered, index: Int[Array, ""], said: Said, taken: Bool[Array, ""]) -> _Gathered:
        return gathered._replace(said=put(gathered.said, index, tree.where(taken, said, tree.zeros_like(said))))

    def closed(self, gathered: _Gathered) -> _Sum:
        """The first sum takes the place of zeros: to add it to them takes as long as to compute it."""
        in_a_row = tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), gathered.said)

        def sum_alone(so_far: Parameters) -> Parameters:
            del so_far
            return self._halves.sum_of_second(in_a_row)

        def added(so_far: Parameters) -> Parameters:
            return tree.add(so_far, self._halves.sum_of_second(in_a_row))

        parameters, are_zero, are_unknown = gathered.so_far
        parameters = jax.lax.cond(are_zero, sum_alone, added, parameters)
        return _Sum(parameters, jnp.zeros_like(are_zero), are_unknown)

    def ended(self, so_far: _Sum) -> Parameters:
        def unknown(parameters: Parameters) -> Parameters:
            return tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), parameters)

        return jax.lax.cond(so_far.are_unknown, unknown, lambda parameters: parameters, so_far.parameters)
