"""Directional derivatives from values alone, each with an estimate of its own error.

Central differences D(h) = (L(x + h v) - L(x - h v)) / 2h have an expansion in even powers of h, which Neville's table
extrapolates to h = 0 (Ridders 1982, "Accurate computation of F'(x) and F'(x) F''(x)"; Press et al., "Numerical Recipes",
5.7). Ridders takes the entry that agrees best with its two parents. Among many entries some agree by luck: here an entry
must agree with its coarser neighbour of the same order too, and its error includes what becomes of the values' noise.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

RUNGS = 12
Estimates = Float[np.ndarray, "*batch"]
Rungs = Float[np.ndarray, "*batch rungs"]


class Derivative(NamedTuple):
    """Numerical derivatives and the errors they confess; infinite errors where too few values are finite."""

    value: Estimates
    uncertainty: Estimates


class Values(NamedTuple):
    """Values of a function at x + h v and x - h v for every rung h of a ladder, and at x itself."""

    ahead: Rungs
    behind: Rungs
    centre: Float[np.ndarray, "*batch"]


def ladder(epsilon: float, largest: float | None) -> Float[np.ndarray, " rungs"]:
    """Step sizes in geometric progression, descending, in units of the size of x.

    Differences extrapolated m times have errors of the order of h^(2m + 2) from truncation and epsilon / h from rounding,
    which balance at h = epsilon^(1 / (2m + 3)). By default the ladder begins at m = 3; at its end, h = epsilon^(1 / 2), the
    bend of any reasonable function is lost in rounding errors, so that these can be seen.
    """
    coarsest = math.pow(epsilon, 1 / 9) if largest is None else largest
    return np.geomspace(coarsest, coarsest * math.pow(epsilon, 7 / 18), RUNGS)


def differentiate(values: Values, steps: Float[np.ndarray, " rungs"], epsilon: float) -> Derivative:
    """The derivative at h = 0: of all entries of Neville's table the one with the smallest error.

    `epsilon` is the relative rounding error of the values.
    """
    ratio = steps[0] / steps[1]
    with np.errstate(invalid="ignore", over="ignore"):
        column = (values.ahead - values.behind) / (2 * steps)
        noise = _noise(values, ratio, epsilon)[..., None] / steps
        candidates = []
        for order in range(1, steps.size - 1):
            weight = 1 / (ratio ** (2 * order) - 1)
            finer, coarser = column[..., 1:], column[..., :-1]
            column = finer + weight * (finer - coarser)
            noise = noise[..., 1:] + weight * (noise[..., 1:] + noise[..., :-1])
            candidates.append(_graded(column, finer, coarser, noise))
    table = Derivative(*(np.concatenate(part, axis=-1) for part in zip(*candidates, strict=True)))
    return _most_certain(table)


def _graded(column: Rungs, finer: Rungs, coarser: Rungs, noise: Rungs) -> Derivative:
    """A column's entries with their errors; not the first, which has no coarser neighbour."""
    entries = column[..., 1:]
    others = finer[..., 1:], coarser[..., 1:], column[..., :-1]
    disagreement = np.max([np.abs(entries - other) for other in others], axis=0)
    return Derivative(entries, disagreement + noise[..., 1:])


def _most_certain(table: Derivative) -> Derivative:
    errors = np.where(np.isfinite(table.uncertainty), table.uncertainty, np.inf)
    best = np.argmin(errors, axis=-1)[..., None]
    return Derivative(*(np.take_along_axis(part, best, axis=-1)[..., 0] for part in (table.value, errors)))


def _noise(values: Values, ratio: float, epsilon: float) -> Estimates:
    """The size of whatever in the values is no smooth function of h, but at least their rounding error.

    Second differences L(x + h v) - 2 L(x) + L(x - h v) know nothing of the slope. They have an expansion in h^2, h^4, …:
    what remains on the finest rungs when these two are eliminated is noise. So is a jump or a kink of L at x.
    """
    remainder = values.ahead + values.behind - 2 * values.centre[..., None]
    for power in (2, 4):
        remainder = remainder[..., 1:] - remainder[..., :-1] / ratio**power
    finest = np.abs(remainder[..., -4:])
    size = np.max(finest, axis=-1, initial=0.0, where=np.isfinite(finest))
    return np.maximum(size, epsilon * np.abs(values.centre))
