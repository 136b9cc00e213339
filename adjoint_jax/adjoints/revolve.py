"""Where checkpoints go, and how often that makes segments of steps be taken again.

Where there are fewer checkpoints than segments, segments are stepped through again, from the last checkpoint before them.
Let N(c, r) be the largest number of segments behind a checkpoint of which, with c more checkpoints that are free, none is
taken more than r times. Setting one of these means to step through what lies before it once more, so

    N(c, r) = N(c, r - 1) + N(c - 1, r),   N(0, r) = r,   N(c, 0) = 0:   N(c, r) = (c + r)! / ((c + 1)! (r - 1)!).

On the way forward checkpoints are set for nothing: k of them serve N(k - 1, r) + ... + N(0, r) segments, the first term
those behind the first checkpoint, which find all others free when their turn comes. On a given grid they stand so. Where
the number of steps is not known, they are spread evenly: when there is no room for another one, every second is dropped.
On the way back, those that have become free divide the stretch behind the last one. After A. Griewank and A. Walther,
"Algorithm 799: Revolve", ACM Transactions on Mathematical Software 26 (2000).
"""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int


def reversible_segments(checkpoints: int, segments: int) -> Int[np.ndarray, "checkpoints repetitions"]:
    """N(c, r), cut off at the number of segments."""
    counts = [[min(math.comb(c + r, c + 1), segments) for r in range(segments + 1)] for c in range(checkpoints)]
    return np.array(counts, np.int32)


def division(reversible: Any, free: Any, stretch: Any) -> Any:
    """Where in a stretch of segments the first of `free` checkpoints goes, for the numbers of `reversible_segments`. All
    of it in NumPy, or in JAX."""
    repetitions = (reversible[free] >= stretch).argmax()
    return (stretch - reversible[free - 1, repetitions]).clip(1)


def places(checkpoints: int, segments: int) -> list[int]:
    """The segments at whose starts checkpoints stand from the beginning, for a known number of segments, of which the last
    needs none."""

    def served(count: int, repetitions: int) -> int:
        return math.comb(count + repetitions, count) - 1

    least = next(r for r in itertools.count(1) if served(checkpoints, r) >= segments - 1)
    found = [0]
    while len(found) < checkpoints and found[-1] < segments - 2:
        behind = served(checkpoints - len(found), least)
        found.append(max(found[-1] + 1, segments - 1 - behind))
    return found


class Repetitions(NamedTuple):
    """How often steps are taken again on the way back: on the mean, and those that it befalls most often."""

    mean: float
    most: int


def repetitions(checkpoints: int, segments: int, *, known: bool) -> Repetitions:
    """For so many segments, if their number is `known`; else for any number up to that many: worst off is the largest
    number, or that behind which every second checkpoint is dropped for the last time."""
    if segments == 1:
        return Repetitions(0.0, 0)
    if known:
        counts = [_taken_again(checkpoints, segments, places(checkpoints, segments))]
    else:
        full = checkpoints * 2 ** max(0, int(math.log2(segments / checkpoints)))
        counts = [_taken_again(checkpoints, n, _even(checkpoints, n)) for n in {segments, min(full, segments)}]
    return Repetitions(max(float(np.mean(count)) for count in counts), max(int(np.max(count)) for count in counts))


def _even(checkpoints: int, segments: int) -> list[int]:
    stride = 1
    while (segments - 1) // stride >= checkpoints:
        stride *= 2
    return list(range(0, segments, stride))


def _taken_again(checkpoints: int, segments: int, stack: list[int]) -> Int[np.ndarray, " segments"]:
    """How often each segment is taken again, as `Tape.walk_back` does it, with checkpoints that stand there first."""
    reversible, taken = reversible_segments(checkpoints, segments), np.zeros(segments, int)
    for index in reversed(range(segments)):
        while stack[-1] < index and len(stack) < checkpoints:
            start, free = stack[-1], checkpoints - len(stack)
            stack = [*stack, start + int(division(reversible, free, np.int32(index + 1 - start)))]
            taken[start : stack[-1]] += 1
        if index < segments - 1:
            taken[stack[-1] : index + 1] += 1
        stack = [place for place in stack if place < index]
    return taken
