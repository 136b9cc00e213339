"""Where checkpoints go, and how often that makes segments of steps be taken again.

Where there are fewer checkpoints than segments, they are first spread evenly: when there is no room for another one, every
second is dropped. On the way back, those that have become free divide the stretch behind the last one so that no segment of
it is stepped through more often than it must: with c free checkpoints, r repetitions suffice for

    beta(c, r) = (c + r)! / (c! r!) = beta(c, r - 1) + beta(c - 1, r)

segments, the first term before a new checkpoint and the second behind it. A. Griewank and A. Walther, "Algorithm 799:
Revolve", ACM Transactions on Mathematical Software 26 (2000).
"""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int


def reversible_segments(checkpoints: int, segments: int) -> Int[np.ndarray, "checkpoints segments"]:
    """beta(c, r) for c free checkpoints and r repetitions, cut off at the number of segments."""
    counts = [[min(math.comb(c + r, c), segments) for r in range(segments)] for c in range(checkpoints)]
    return np.array(counts, np.int32)


def division(reversible: Any, free: Any, stretch: Any) -> Any:
    """Where in a stretch of segments the first of `free` checkpoints goes, for the numbers of `reversible_segments`. All
    of it in NumPy, or in JAX."""
    repetitions = (reversible[free] >= stretch).argmax()
    return (stretch - reversible[free - 1, repetitions]).clip(1)


class Repetitions(NamedTuple):
    """How often steps are taken again on the way back: on the mean, and those that it befalls most often."""

    mean: float
    most: int


def repetitions(checkpoints: int, segments: int) -> Repetitions:
    """For any number of segments up to that many. Worst off is the largest number, or that behind which every second
    checkpoint is dropped for the last time."""
    if segments == 1:
        return Repetitions(0.0, 0)
    reversible = reversible_segments(checkpoints, segments)
    full = checkpoints * 2 ** max(0, int(math.log2(segments / checkpoints)))
    counts = [_taken_again(checkpoints, count, reversible) for count in {segments, min(full, segments)}]
    return Repetitions(max(float(np.mean(count)) for count in counts), max(int(np.max(count)) for count in counts))


def _taken_again(checkpoints: int, segments: int, reversible: np.ndarray) -> Int[np.ndarray, " segments"]:
    """How often each segment is taken again, as `Tape.walk_back` does it."""
    stride = 1
    while (segments - 1) // stride >= checkpoints:
        stride *= 2
    stack, taken = list(range(0, segments, stride)), np.zeros(segments, int)
    for index in reversed(range(segments)):
        while stack[-1] < index and len(stack) < checkpoints:
            start, free = stack[-1], checkpoints - len(stack)
            stack.append(start + int(division(reversible, free, np.int32(index + 1 - start))))
            taken[start : stack[-1]] += 1
        taken[stack[-1] : index] += 1
        taken[index] += index < segments - 1
        stack = [place for place in stack if place < index]
    return taken
