"""What a comparison of adjoints finds, and how it reads."""

import enum
from dataclasses import dataclass
from typing import Any, NamedTuple

from adjoint_jax.adjoints.adjoint import AbstractAdjoint
from adjoint_jax.adjoints.backsolve import BacksolveAdjoint
from adjoint_jax.adjoints.discrete import DiscreteAdjoint
from adjoint_jax.adjoints.forward_mode import ForwardMode
from adjoint_jax.adjoints.interpolating import AbstractInterpolatingAdjoint
from adjoint_jax.adjoints.reversible import ReversibleAdjoint
from adjoint_jax.diagnostics.comparison_plot import Point, plot
from adjoint_jax.diagnostics.counting import Counts
from adjoint_jax.diagnostics.table import BYTES, SECONDS, aligned, with_unit


class LeafError(NamedTuple):
    """The error of one leaf, in the Euclidean norm: absolute, and relative to the leaf that it should be.

    The relative error of what should be zero is 0 if it is zero, and else infinite. `path` is where the leaf is, as
    `jax.tree_util.keystr` writes it.
    """

    path: str
    absolute: float
    relative: float


class Reference(enum.Enum):
    """What the gradients were compared with."""

    GIVEN = "the reference that was given"
    DISCRETE = (
        "DiscreteAdjoint's gradient of the same loss, exact for the computed solution; the error of the solve is not seen"
    )


class Measurement(NamedTuple):
    """What one adjoint gives, and what it costs.

    - `error`: of the gradient, all leaves together, in the Euclidean norm, relative to the reference. `leaves`: one by one.
    - `value`: the loss, as it is computed with the gradient.
    - `seconds`: the run time of loss and gradient, the median of warm calls. `trace_seconds`, `compile_seconds`: tracing
      and lowering; compilation.
    - `temporary_bytes`: what XLA plans to allocate besides inputs and outputs; None where the platform does not say.
    - `forward`, `backward`: what loss and gradient do with the vector field: the program of the loss alone, and what that
      of the gradient does more. None if they were not counted.
    """

    error: float
    leaves: tuple[LeafError, ...]
    value: float
    seconds: float
    trace_seconds: float
    compile_seconds: float
    temporary_bytes: int | None
    forward: Counts | None
    backward: Counts | None


@dataclass(frozen=True)
class AdjointRow:
    """One adjoint: either measured, or failed for a reason."""

    name: str
    adjoint: AbstractAdjoint
    outcome: Measurement | str

    @property
    def measured(self) -> Measurement | None:
        """What was measured, unless it failed."""
        return None if isinstance(self.outcome, str) else self.outcome

    @property
    def failure(self) -> str | None:
        """Why it failed, if it did."""
        return self.outcome if isinstance(self.outcome, str) else None


class Measured(NamedTuple):
    """A row that was measured."""

    row: AdjointRow
    cost: Measurement


@dataclass(frozen=True)
class AdjointComparison:
    """Adjoints side by side; `str(comparison)` is a table with a recommendation.

    - `rows`: in the order in which the adjoints were given.
    - `reference`: what the gradients were compared with.
    - `good_enough`: the relative error of a gradient that the recommendation accepts.
    - `input_bytes`: the size of what is differentiated.
    """

    rows: tuple[AdjointRow, ...]
    reference: Reference
    good_enough: float
    input_bytes: int

    def __getitem__(self, name: str) -> AdjointRow:
        """The row of this name. Raises `KeyError` if there is none."""
        return {row.name: row for row in self.rows}[name]

    @property
    def best(self) -> AdjointRow | None:
        """The recommended row: the most accurate of those that take little more than the fastest that is good enough."""
        good = self._good
        if not good:
            return None
        fastest = min(one.cost.seconds for one in good)
        return min((one for one in good if one.cost.seconds <= _AS_FAST * fastest), key=lambda one: one.cost.error).row

    @property
    def recommendation(self) -> str:
        """What to use and why, what to use if memory is short, and what is wrong with the others: a sentence a line."""
        best = next((one for one in self._good if one.row is self.best), None)
        if best is None:
            advice = [f"No adjoint here gives a gradient with a relative error of at most {self.good_enough:.0e}."]
        else:
            advice = [self._praise(best), *self._products(best), *self._memory(best)]
        return "\n".join([*advice, *self._warnings()])

    def plot(self, target: Any) -> Any:
        """Draw error against run time, one point an adjoint, its area the temporary memory; failed ones are listed.

        `target`: the path of a picture to write, or matplotlib axes to draw on. Returns the axes. Raises `ImportError` if
        matplotlib is missing.
        """
        points = [
            Point(_legend(one, cost), 1e3 * cost.seconds, cost.error, cost.temporary_bytes or 0)
            for one, cost in self._measured
        ]
        failures = [f"{row.name} failed: {_headline(row.failure)}" for row in self.rows if row.failure is not None]
        return plot(points, failures, self.good_enough, target)

    def __str__(self) -> str:
        table = aligned([_HEADER, *(_cells(row, self.good_enough) for row in self.rows)])
        return "\n".join([*table, "", f"Errors are relative to {self.reference.value}.", self.recommendation])

    @property
    def _measured(self) -> list[Measured]:
        return [Measured(row, row.measured) for row in self.rows if row.measured is not None]

    @property
    def _good(self) -> list[Measured]:
        return [one for one in self._measured if one.cost.error <= self.good_enough]

    def _praise(self, best: Measured) -> str:
        cost, good = best.cost, self._good
        facts = f"{with_unit(cost.seconds, SECONDS)}, relative error {cost.error:.1e}"
        if len(good) == 1:
            return f"Use {best.row.name} ({facts}): no other gradient is good enough."
        fastest = min(good, key=lambda one: one.cost.seconds)
        if fastest.row is best.row:
            return f"Use {best.row.name} ({facts}): the fastest that is good enough."
        return f"Use {best.row.name} ({facts}): hardly slower than {fastest.row.name}, and more accurate."

    def _products(self, best: Measured) -> list[str]:
        """What spares the parameters' products, where there is much to be spared."""
        usual = next((one for one in self._good if isinstance(one.row.adjoint, DiscreteAdjoint)), None)
        if usual is None or best.cost.backward is None or usual.cost.backward is None:
            return []
        ours, theirs = best.cost.backward.parameter_products, usual.cost.backward.parameter_products
        if ours * _FEW > theirs or isinstance(best.row.adjoint, ForwardMode):
            return []
        return [f"It takes {ours} vjps with respect to the parameters, {usual.row.name} takes {theirs}."]

    def _memory(self, best: Measured) -> list[str]:
        """What needs much less memory than the best, if anything does; or how to come to need less."""
        used = best.cost.temporary_bytes
        if used is None or used <= max(_SMALL_BYTES, _FEW * self.input_bytes):
            return []
        sparing = min(self._good, key=lambda one: one.cost.temporary_bytes or 0)
        spared = sparing.cost.temporary_bytes or 0
        if spared * _MUCH <= used:
            sizes = f"{with_unit(spared, BYTES)} instead of {with_unit(used, BYTES)}"
            slower = sparing.cost.seconds / best.cost.seconds
            return [f"If memory is short, use {sparing.row.name}: {sizes}, for {slower:.1f} times the time."]
        if isinstance(best.row.adjoint, DiscreteAdjoint) and best.row.adjoint.checkpoints is None:
            return [f"If {with_unit(used, BYTES)} are too much, try DiscreteAdjoint(checkpoints=k) with a small k."]
        return []

    def _warnings(self) -> list[str]:
        """What failed, and what is off by too much, each with what is known of its kind."""
        lines = [f"{row.name} fails: {row.failure}" for row in self.rows if row.failure is not None]
        for row, cost in self._measured:
            if cost.error > self.good_enough:
                hints = [hint for kind, hint in _INACCURATE.items() if isinstance(row.adjoint, kind)]
                lines.append(" ".join([f"{row.name} is off by {cost.error:.1e}.", *hints]))
        return lines


_AS_FAST = 1.2
"""Run times within this factor are taken as equal."""
_MUCH, _FEW = 4, 1.5
_SMALL_BYTES = 2**20
"""Nobody is short of that much memory."""

_OF_THE_SOLVE = (
    "Exact for the computed solution, so this is how the solve depends on its inputs: tighten its tolerances. On a stiff "
    "problem steps at the limit of stability may amplify what the solution does not contain: take InterpolatingAdjoint."
)
_INACCURATE: dict[type[AbstractAdjoint], str] = {
    BacksolveAdjoint: (
        "If tighter tolerances do not help, the reversed flow loses the state (see reconstruction_error): give it "
        "checkpoints, or take another."
    ),
    AbstractInterpolatingAdjoint: (
        "Tighten the tolerances, its own or those of the solve; on a given grid its error is that of the dense output: "
        "take more steps, or DiscreteAdjoint."
    ),
    ReversibleAdjoint: (
        "Reversible methods are unstable where there is damping, and their inverse enlarges rounding errors from step to "
        "step: take another method with DiscreteAdjoint; without damping fewer steps, a coupling nearer to 1, or float64."
    ),
    DiscreteAdjoint: _OF_THE_SOLVE,
    ForwardMode: _OF_THE_SOLVE,
}

_HEADER = (
    "adjoint",
    "error",
    "worst leaf",
    "time",
    "trace",
    "compile",
    "memory",
    "evaluations",
    "vjps y",
    "vjps args",
    "result",
)


def _cells(row: AdjointRow, good_enough: float) -> tuple[str, ...]:
    cost = row.measured
    if cost is None:
        return (row.name, *["-"] * (len(_HEADER) - 2), f"failed: {_headline(row.failure or '')}")
    worst = max(leaf.relative for leaf in cost.leaves)
    times = [with_unit(time, SECONDS) for time in (cost.seconds, cost.trace_seconds, cost.compile_seconds)]
    memory = "-" if cost.temporary_bytes is None else with_unit(cost.temporary_bytes, BYTES)
    counts = ["-"] * 3
    if cost.forward is not None and cost.backward is not None:
        kind = " jvp" if isinstance(row.adjoint, ForwardMode) else ""
        products = [f"{count}{kind}" for count in cost.backward[1:]]
        counts = [f"{cost.forward.evaluations} + {cost.backward.evaluations}", *products]
    return row.name, f"{cost.error:.1e}", f"{worst:.1e}", *times, memory, *counts, _verdict(cost, good_enough)


def _verdict(cost: Measurement, good_enough: float) -> str:
    return "ok" if cost.error <= good_enough else "inaccurate"


def _headline(reason: str) -> str:
    """The status or the first clause of a reason."""
    first = reason.split(" at t = ")[0].split(": ")[0].split(", ")[0]
    return first if len(first) <= _LONGEST else f"{first[:_LONGEST]}…"


_LONGEST = 60


def _legend(row: AdjointRow, cost: Measurement) -> str:
    memory = "" if cost.temporary_bytes is None else f", {with_unit(cost.temporary_bytes, BYTES)}"
    return f"{row.name}{memory}{'' if cost.error else ', no error'}"
