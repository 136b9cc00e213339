"""Ratios of two contestants' costs at equal error.

Equal tolerances do not give equal errors. What a peer would have taken for our error is read off its curve of time against
error: of its measurements those are kept that no other beats in both; between the two on both sides of our error, the
logarithm of time is interpolated linearly in the logarithm of error. Nothing is extrapolated. A peer that is nowhere as
accurate counts with its most accurate time, which flatters it, as long as its error is within three times ours, and beyond
that not at all; one that is everywhere more accurate counts with its fastest. Both are marked.
"""

import enum
import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.cases import EVERY_PEER, Quality, Want
from benchmarks.results import Measurement, apart, timed


class Reading(enum.Enum):
    """How the peer's cost at our error was found."""

    MEASURED = ""
    """Between measurements, or exactly on one."""
    LESS_ACCURATE = "worse"
    """The peer is less accurate at all of its tolerances."""
    MORE_ACCURATE = "better"
    """The peer is more accurate at all of its tolerances."""


class Cost(NamedTuple):
    """What something costs, and how that was found."""

    value: float
    reading: Reading


class Verdict(NamedTuple):
    """A wanted ratio, what was measured, and the peer that it was measured against."""

    want: Want
    ratio: float
    against: str
    reading: Reading

    @property
    def holds(self) -> bool:
        return self.ratio <= self.want.ratio


class Point(NamedTuple):
    """An error and the milliseconds that it took."""

    error: float
    milliseconds: float


LEAST_ERROR = 1e-16
SAME = 1.1
"""Errors whose ratio is smaller are not told apart."""
FAR = 3.0
"""A peer whose smallest error is more than so many times ours is not compared."""


def front(measurements: Iterable[Measurement]) -> list[Point]:
    """The points that no other beats in both error and time, from the most accurate to the fastest."""
    points = sorted(
        Point(max(m.error, LEAST_ERROR), m.milliseconds)
        for m in measurements
        if m.error is not None and m.milliseconds is not None
    )
    kept: list[Point] = []
    for point in points:
        if not kept or point.milliseconds < kept[-1].milliseconds:
            kept.append(point)
    return kept


def time_at(error: float, points: list[Point]) -> Cost:
    """The time that the contestant with these points would take for this error."""
    error = max(error, LEAST_ERROR)
    best, fastest = points[0], points[-1]
    if error <= best.error:
        return Cost(best.milliseconds, Reading.MEASURED if best.error < SAME * error else Reading.LESS_ACCURATE)
    if error >= fastest.error:
        return Cost(fastest.milliseconds, Reading.MEASURED if error < SAME * fastest.error else Reading.MORE_ACCURATE)
    low, high = next((a, b) for a, b in itertools.pairwise(points) if a.error <= error <= b.error)
    weight = math.log(error / low.error) / math.log(high.error / low.error)
    return Cost(low.milliseconds ** (1 - weight) * high.milliseconds**weight, Reading.MEASURED)


def time_ratio(ours: Measurement, theirs: Iterable[Measurement]) -> Cost | None:
    """Our time over theirs at our error, if both were measured and they come close to it."""
    points = front(theirs)
    if not points or ours.error is None or ours.milliseconds is None:
        return None
    if points[0].error > FAR * max(ours.error, LEAST_ERROR):
        return None
    cost = time_at(ours.error, points)
    return Cost(ours.milliseconds / cost.value, cost.reading)


def verdict(want: Want, measurements: Iterable[Measurement]) -> Verdict | None:
    """What came of something wanted; None if it was not measured, or no peer comes close to our error."""
    measured = [m for m in measurements if m.problem is None]
    own = [m for m in measured if (m.case, m.contestant, m.tolerance) == (want.case, want.ours, want.tolerance)]
    others = [m for m in measured if m.case == (want.than_in or want.case) and _counts(m, want)]
    if want.quality is Quality.IMPORT:
        seconds = [m.milliseconds / 1e3 for m in own if m.milliseconds is not None]
        return Verdict(want, seconds[0], "a limit in seconds", Reading.MEASURED) if seconds else None
    ratios = []
    for name in {m.contestant for m in others}:
        cost = _ratio(want, own, [m for m in others if m.contestant == name])
        if cost is not None:
            ratios.append(Verdict(want, cost.value, name, cost.reading))
    return max(ratios, key=lambda v: v.ratio, default=None)


def _counts(measurement: Measurement, want: Want) -> bool:
    if want.against == EVERY_PEER:
        return measurement.role == "peer"
    return measurement.contestant in want.against


def _ratio(want: Want, own: list[Measurement], theirs: list[Measurement]) -> Cost | None:
    if want.quality is Quality.TIME:
        ours = timed(own)
        return time_ratio(ours[0], timed(theirs)) if ours else None
    ours, others = ([_amount(m, want.quality) for m in apart(side)] for side in (own, theirs))
    if not ours or not others or ours[0] is None or others[0] is None:
        return None
    return Cost(ours[0] / max(others[0], 1e-9), Reading.MEASURED)


def _amount(measurement: Measurement, quality: Quality) -> float | None:
    return measurement.build if quality is Quality.BUILD else measurement.planned_bytes
