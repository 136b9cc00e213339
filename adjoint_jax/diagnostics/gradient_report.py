"""What a check of gradients finds, and how it reads."""

import enum
from dataclasses import dataclass
from typing import NamedTuple

from adjoint_jax.diagnostics.table import aligned


class Verdict(enum.IntEnum):
    """What finite differences say of a gradient, in the order of severity."""

    RIGHT = 0
    UNDECIDED = 1
    WRONG = 2


class Comparison(NamedTuple):
    """The directional derivative of one leaf in one lane, in that of the random directions where it is worst.

    - `path`: where the leaf is, as `jax.tree_util.keystr` writes it behind "inputs".
    - `lane`: the index of the lane, or None without lanes.
    - `gradient`, `numerical`, `uncertainty`: the derivative by the gradient, by finite differences, and the error that
      these confess.
    - `relative_error`: of the gradient, relative to its size for such directions (not to the derivative along this
      direction, which may vanish) or to the numerical derivative, whichever is larger.
    """

    path: str
    lane: int | None
    gradient: float
    numerical: float
    uncertainty: float
    relative_error: float
    verdict: Verdict

    @property
    def severity(self) -> tuple[Verdict, float]:
        """What is worse compares as greater."""
        return self.verdict, self.relative_error


@dataclass(frozen=True)
class GradientReport:
    """Every leaf of every lane against finite differences; `str(report)` is a table with the worst lane of each leaf.

    - `leaves`: one comparison for each leaf and lane, in directions that move this leaf alone.
    - `together`: one comparison for each lane, in directions that move all leaves.
    """

    leaves: tuple[Comparison, ...]
    together: tuple[Comparison, ...]

    @property
    def ok(self) -> bool:
        """Whether everything was found right."""
        return not self.wrong and not self.undecided

    @property
    def wrong(self) -> tuple[Comparison, ...]:
        """What differs from finite differences by more than the tolerance and their uncertainty."""
        return self._with_verdict(Verdict.WRONG)

    @property
    def undecided(self) -> tuple[Comparison, ...]:
        """Where the uncertainty of finite differences leaves open whether the gradient is right."""
        return self._with_verdict(Verdict.UNDECIDED)

    @property
    def worst(self) -> Comparison:
        """The worst leaf; the comparison of all leaves together only if it alone is not right."""
        leaf, whole = (max(some, key=lambda one: one.severity) for some in (self.leaves, self.together))
        return whole if whole.verdict > leaf.verdict else leaf

    def raise_if_wrong(self, *, allow_undecided: bool = False) -> None:
        """Raise `GradientError`, with the table, if anything is wrong, or undecided unless that is allowed."""
        if self.wrong or (self.undecided and not allow_undecided):
            raise GradientError(self)

    def __str__(self) -> str:
        paths = dict.fromkeys(one.path for one in self._all)
        worst = [max((one for one in self._all if one.path == path), key=lambda one: one.severity) for path in paths]
        return "\n".join([self._headline(), "", *aligned([_HEADER, *map(_cells, worst)]), *self._lanes()])

    @property
    def _all(self) -> tuple[Comparison, ...]:
        return self.leaves + self.together

    def _with_verdict(self, verdict: Verdict) -> tuple[Comparison, ...]:
        return tuple(one for one in self._all if one.verdict == verdict)

    def _headline(self) -> str:
        if self.ok:
            return "The gradient agrees with finite differences."
        lane = "" if self.worst.lane is None else f" in lane {self.worst.lane}"
        worst = f"Worst: {self.worst.path}{lane}, relative error {self.worst.relative_error:.1e}."
        if self.wrong:
            return f"The gradient is WRONG. {worst}"
        return (
            f"The gradient is UNDECIDED: finite differences are too noisy to tell whether it is right. {worst}\n"
            "Make the loss smoother (a tighter tolerance, a fixed grid), or ask for less (a larger rtol)."
        )

    def _lanes(self) -> list[str]:
        """For each leaf the lanes that are not right, the worst first."""
        lines = []
        for verdict in (Verdict.WRONG, Verdict.UNDECIDED):
            found = [one for one in self._with_verdict(verdict) if one.lane is not None]
            for path in dict.fromkeys(one.path for one in found):
                lanes = sorted((one for one in found if one.path == path), key=lambda one: -one.relative_error)
                lines.append(f"{path} is {verdict.name.lower()} in {_listed([str(one.lane) for one in lanes])}")
        return lines


class GradientError(AssertionError):
    """A gradient that is wrong, or of which finite differences cannot tell; the message is the table of `report`."""

    def __init__(self, report: GradientReport):
        super().__init__(f"\n{report}")
        self.report = report


_HEADER = ("leaf", "lane", "gradient", "numerical", "uncertainty", "relative error", "verdict")
_LISTED = 10


def _cells(one: Comparison) -> tuple[str, ...]:
    lane = "-" if one.lane is None else str(one.lane)
    derivatives = f"{one.gradient:.8g}", f"{one.numerical:.8g}"
    return one.path, lane, *derivatives, f"{one.uncertainty:.1e}", f"{one.relative_error:.1e}", one.verdict.name.lower()


def _listed(lanes: list[str]) -> str:
    more = f" and {len(lanes) - _LISTED} more" if len(lanes) > _LISTED else ""
    return f"lane{'s' if len(lanes) > 1 else ''} {', '.join(lanes[:_LISTED])}{more}"
