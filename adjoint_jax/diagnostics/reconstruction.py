"""`reconstruction_error`: whether the state can be computed backward, as `BacksolveAdjoint` does."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from adjoint_jax import tree
from adjoint_jax.adjoints.backsolve import BacksolveAdjoint
from adjoint_jax.controllers.controller import AbstractController
from adjoint_jax.controllers.grids import StepTo
from adjoint_jax.controllers.step_sizes import PIDController
from adjoint_jax.problem import VectorField
from adjoint_jax.solution import Solution, Status
from adjoint_jax.solve import solve
from adjoint_jax.solvers.methods import Tsit5
from adjoint_jax.solvers.solver import AbstractSolver


class Attempts(NamedTuple):
    """The steps of one integration, and how it ended."""

    accepted: int
    rejected: int
    status: Status

    @property
    def steps(self) -> int:
        """All that were attempted."""
        return self.accepted + self.rejected


class Miss(NamedTuple):
    """How far one leaf misses y0, as a root mean square over its entries: absolute, and relative to the larger of its
    sizes at t0 and t1. `path` is where the leaf is, as `jax.tree_util.keystr` writes it. Infinite if it was not reached."""

    path: str
    absolute: float
    relative: float


class Loosened(NamedTuple):
    """What tolerances `LOOSER` times as large make of the forward integration: its steps, and how many times fewer they
    would be if accuracy alone decided."""

    attempts: Attempts
    expected_ratio: float


@dataclass(frozen=True)
class Reconstruction:
    """The way from y(t0) to y(t1) and back; `str(reconstruction)` says it in words.

    - `leaves`: how far each leaf of the state misses y0.
    - `forward`, `backward`: the steps of both ways.
    - `loosened`: the forward integration at looser tolerances; None for a solve that has none.
    - `max_drift`: the relative miss that `BacksolveAdjoint` takes, unless told otherwise.
    """

    leaves: tuple[Miss, ...]
    forward: Attempts
    backward: Attempts
    loosened: Loosened | None
    max_drift: float

    @property
    def absolute(self) -> float:
        """The largest absolute miss of a leaf."""
        return max(leaf.absolute for leaf in self.leaves)

    @property
    def relative(self) -> float:
        """The largest relative miss of a leaf."""
        return max(leaf.relative for leaf in self.leaves)

    @property
    def reversible(self) -> bool:
        """Whether the state can be computed backward well enough for `BacksolveAdjoint` without checkpoints."""
        return self.relative <= self.max_drift

    @property
    def stiff(self) -> bool | None:
        """Whether stability, not accuracy, chooses the step sizes: the definition of stiffness for an explicit method.

        With an error estimate of order k - 1, tolerances that are `LOOSER` times as large need LOOSER^(1/k) times fewer
        steps; steps that are as long as stability allows do not get fewer. Whichever of these two ratios is nearer, on a
        logarithmic scale, is taken for the case. None if that cannot be told: without tolerances, or from fewer than
        `FEWEST` steps, of which the first ones are too large a part.
        """
        if self.loosened is None or self.forward.steps < FEWEST:
            return None
        return self.forward.steps / max(self.loosened.attempts.steps, 1) < self.loosened.expected_ratio**0.5

    def __str__(self) -> str:
        ways = f"{_told(self.forward)} forward, {_told(self.backward)} backward"
        return "\n".join([f"Forward and back: {ways}.", self._verdict(), *self._stiffness()])

    def _verdict(self) -> str:
        worst = max(self.leaves, key=lambda leaf: leaf.relative)
        miss = f"y0{worst.path} is missed by {worst.absolute:.2g} ({worst.relative:.2g} of its size)"
        if self.backward.status != Status.SUCCESS:
            return f"The way back fails ({self.backward.status.name}): the reversed flow is unstable. {_UNSTABLE}"
        if self.reversible:
            return f"{miss}: the state can be computed backward, BacksolveAdjoint() is an option."
        return f"{miss}: the reversed flow is unstable, or the tolerances are too loose. {_UNSTABLE}"

    def _stiffness(self) -> list[str]:
        if not self.stiff or self.loosened is None:
            return []
        return [
            f"The problem looks stiff: with tolerances {LOOSER:.0f} times as large the steps are "
            f"{self.loosened.attempts.steps} instead of {self.forward.steps}, so stability limits them, not accuracy. "
            "What such steps amplify, and the solution does not contain, DiscreteAdjoint() may amplify: use "
            "InterpolatingAdjoint()."
        ]


LOOSER = 100.0
FEWEST = 16
_UNSTABLE = (
    "BacksolveAdjoint() will fail or be wrong: give it checkpoints, or use InterpolatingAdjoint() or, if the problem is "
    "not stiff, DiscreteAdjoint()."
)


def reconstruction_error(
    vector_field: VectorField, t0: Any, t1: Any, y0: PyTree[Any], args: PyTree[Any] = None, **options: Any
) -> Reconstruction:
    """Solve from t0 to t1 and back, and say how far that misses y0: the sign, before any gradient is computed, that
    `BacksolveAdjoint` will fail; and whether the problem is stiff for the solver.

    Arguments are those of `solve`, of which `options` may be `solver`, `controller`, `dt0` and `max_steps`. Both ways have
    the same options; a grid that is given is walked back. With a controller that has tolerances, a third solve with looser
    ones looks for stiffness. A reversible solver is not undone here: that is what `ReversibleAdjoint` does.

    Runs eagerly: not for use inside of `jax.jit`. Raises `SolveError` if t1 is not reached, `TypeError` for other options,
    and what `solve` raises. Where the way back fails, nothing is raised: that is a result.
    """
    unknown = options.keys() - {"solver", "controller", "dt0", "max_steps"}
    if unknown:
        raise TypeError(f"reconstruction_error takes no option {', '.join(sorted(unknown))}.")
    controller = options.pop("controller", PIDController())

    def to(end: Any, start: Any, y: Any, controller: AbstractController, throw: bool) -> Solution:
        return solve(vector_field, start, end, y, args, controller=controller, throw=throw, **options)

    there = to(t1, t0, y0, controller, True)
    y1 = tree.map(lambda leaf: leaf[0], there.ys)
    back = to(t0, t1, y1, _reversed(controller), False)
    loosened = None
    if isinstance(controller, PIDController):
        loose = to(t1, t0, y0, _loosened(controller), False)
        loosened = Loosened(_attempts(loose), _expected_ratio(options.get("solver", Tsit5())))
    misses = jax.tree_util.tree_map_with_path(_miss, y0, tree.map(lambda leaf: leaf[0], back.ys), y1)
    leaves = tuple(jax.tree.leaves(misses, is_leaf=lambda node: isinstance(node, Miss)))
    return Reconstruction(leaves, _attempts(there), _attempts(back), loosened, BacksolveAdjoint().max_drift)


def _miss(path: Any, wanted: Any, got: Array, at_t1: Array) -> Miss:
    absolute, size = _size(got - wanted), max(_size(wanted), _size(at_t1))
    if not np.isfinite(absolute):
        return Miss(jax.tree_util.keystr(path), np.inf, np.inf)
    return Miss(jax.tree_util.keystr(path), absolute, absolute / size if size else 0.0)


def _size(leaf: Any) -> float:
    """The root mean square, of numbers whose squares may be too large too."""
    largest = float(np.max(np.abs(leaf), initial=0.0))
    return largest * float(np.sqrt(np.mean(np.abs(leaf / largest) ** 2))) if 0 < largest < np.inf else largest


def _attempts(solution: Solution) -> Attempts:
    stats = solution.stats
    return Attempts(int(stats.accepted), int(stats.rejected), Status(int(solution.status)))


def _told(attempts: Attempts) -> str:
    return f"{attempts.accepted} accepted and {attempts.rejected} rejected steps"


def _reversed(controller: AbstractController) -> AbstractController:
    return controller if controller.given_times is None else StepTo(jnp.flip(jnp.asarray(controller.given_times)))


def _loosened(controller: PIDController) -> PIDController:
    def looser(tolerance: PyTree[Any]) -> PyTree[Any]:
        return jax.tree.map(lambda one: LOOSER * one, tolerance)

    return dataclasses.replace(controller, rtol=looser(controller.rtol), atol=looser(controller.atol))


def _expected_ratio(solver: AbstractSolver) -> float:
    assert solver.error_order is not None  # Without an error estimate the first solve has failed.
    return LOOSER ** (1 / (solver.error_order + 1))
