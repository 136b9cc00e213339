"""What a controller is: the choice of the grid on which a method steps."""

import abc
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, PyTree

from adjoint_jax import tree
from adjoint_jax.ends import AbstractEnds
from adjoint_jax.problem import Interval, Problem
from adjoint_jax.solvers.solver import AbstractSolver, Step
from adjoint_jax.tolerance import Tolerance
from adjoint_jax.tree import Arrays, Scalar


class Proposal(NamedTuple):
    """The next step size (signed), what the controller remembers, and the field evaluations spent on finding it."""

    h: Scalar
    memory: PyTree[Any]
    evaluations: int


class Trial(NamedTuple):
    """An attempted step as it is judged: its size and the one proposed, which may have passed a time to stop at (both
    signed); its error in parts of the tolerance; and the factor for the next size, if the method chooses it."""

    size: Scalar
    proposal: Scalar
    ratio: Scalar
    factor: Scalar | None


class Verdict(NamedTuple):
    """Whether an attempted step is accepted, whether it was finite, and what to try next."""

    accepted: Bool[Array, ""]
    finite: Bool[Array, ""]
    h: Scalar
    memory: PyTree[Any]


class AbstractController(eqx.Module):
    """Chooses the steps. Either all at once (`AbstractGrid`) or one after the other (`AbstractStepSize`)."""

    @abc.abstractmethod
    def prepare(self, dtype: DTypeLike) -> "AbstractController":
        """The same controller with arrays for its numbers, times in the given dtype.

        Raises `ValueError` for numbers that make no sense.
        """

    @property
    def given_times(self) -> Any:
        """Times given by the user that must run from t0 to t1, or None."""
        return None

    @property
    def tolerance(self) -> Tolerance | None:
        """The tolerance of the error estimate, which methods that iterate follow; None without one."""
        return None

    @property
    def grid_steps(self) -> int | None:
        """The number of steps of the grid, or None if they depend on the solution."""
        return None

    def grid(self, t0: Scalar, t1: Scalar) -> AbstractEnds | None:
        """The ends of all steps from t0 to t1, or None if they depend on the solution."""
        del t0, t1
        return None

    def on_pairs(self) -> "AbstractController":
        """The same control for pairs of states."""
        return self

    def interval(self, start: Scalar, end: Scalar) -> Interval:
        """The step from start to end, with the times at which the field stands for its two ends."""
        return Interval(start, end, start, end)


class AbstractGrid(AbstractController):
    """A controller whose grid is known before the solution is."""

    @property
    @abc.abstractmethod
    def grid_steps(self) -> int:
        """The number of steps."""

    @abc.abstractmethod
    def grid(self, t0: Scalar, t1: Scalar) -> AbstractEnds:
        """The ends of all steps, the first t0 and the last t1."""


class AbstractStepSize(AbstractController):
    """A controller that proposes one step at a time and stops exactly at the times where the field jumps or kinks."""

    adapts: ClassVar[bool] = False
    """Whether it can be told a first step size."""

    jump_ts: eqx.AbstractVar[Any]

    @abc.abstractmethod
    def first(self, problem: Problem, solver: AbstractSolver, slope: Arrays, dt0: Scalar | None) -> Proposal:
        """The first step size; `slope` is the field at t0."""

    @abc.abstractmethod
    def ratio(self, solver: AbstractSolver, step: Step) -> Scalar:
        """The error of a step in parts of the tolerance."""

    @abc.abstractmethod
    def judge(self, solver: AbstractSolver, trial: Trial, memory: PyTree[Any]) -> Verdict:
        """Accept or reject an attempted step."""

    @abc.abstractmethod
    def smallest(self, t: Scalar) -> Scalar:
        """The step size at t below which the integration gives up."""

    @abc.abstractmethod
    def unresolvable(self, y: Arrays) -> Bool[Array, ""]:
        """Whether the tolerances ask for more digits than the state's dtype has."""

    def next_stop(self, t: Scalar, t1: Scalar) -> Scalar:
        """The next time after t that a step must not pass."""
        if self.jump_ts is None:
            return t1
        ahead = jnp.where((self.jump_ts - t) * (t1 - t) > 0, jnp.abs(self.jump_ts - t), jnp.inf)
        nearest = jnp.argmin(ahead)
        return jnp.where(ahead[nearest] < jnp.abs(t1 - t), self.jump_ts[nearest], t1)

    def jumps_at(self, t: Scalar) -> Bool[Array, ""]:
        """Whether the field jumps at t. Only called where `jump_ts` is given."""
        return jnp.any(self.jump_ts == t)

    def interval(self, start: Scalar, end: Scalar) -> Interval:
        if self.jump_ts is None:
            return Interval(start, end, start, end)
        first = jnp.where(self.jumps_at(start), nudge(start, end), start)
        last = jnp.where(self.jumps_at(end), nudge(end, start), end)
        return Interval(start, end, first, last)


def nudge(t: Scalar, towards: Scalar) -> Scalar:
    """The floating-point number next to t; as a function of t it has slope one."""
    return t + jax.lax.stop_gradient(jnp.nextafter(t, towards) - t)


def canonical_jumps(jump_ts: Any, dtype: DTypeLike) -> Float[Array | np.ndarray, " jumps"] | None:
    """The jump times as an array, None if there are none. Raises `ValueError` unless they are one-dimensional."""
    if jump_ts is None or np.size(jump_ts) == 0:
        return None
    jump_ts = tree.as_array(jump_ts, dtype)
    if jump_ts.ndim != 1:
        raise ValueError(f"jump_ts must be a one-dimensional array of times, got shape {jump_ts.shape}.")
    return jump_ts


def not_negative(name: str, value: Any, dtype: DTypeLike | None = None) -> Array | np.ndarray:
    """The value as an array. Raises `ValueError` if it is known to be negative or NaN."""
    if not tree.is_traced(value) and not np.all(np.asarray(value) >= 0):
        raise ValueError(f"{name} must not be negative, got {value}.")
    return tree.as_array(value, jnp.result_type(float) if dtype is None else dtype)


def positive(name: str, value: Any, dtype: DTypeLike) -> Array | np.ndarray:
    """The value as an array. Raises `ValueError` if it is known not to be positive."""
    if not tree.is_traced(value) and not np.all(np.asarray(value) > 0):
        raise ValueError(f"{name} must be positive, got {value}.")
    return tree.as_array(value, dtype)
