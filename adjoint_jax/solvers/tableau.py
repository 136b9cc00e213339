"""Butcher tableaus: explicit Runge-Kutta methods as data."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

Row = tuple[float, ...]


def padded(rows: Sequence[Row]) -> Float[np.ndarray, "stages stages"]:
    """Rows below a diagonal as a square matrix, filled up with zeros."""
    return np.array([row + (0.0,) * (len(rows) - len(row)) for row in rows])


@dataclasses.dataclass(frozen=True)
class ButcherTableau:
    r"""An explicit Runge-Kutta method with its error estimate and its dense output.

    One step of size $h$ from $(t, y)$ is

    $$k_i = f\Big(t + c_i h,\; y + h \sum_{j<i} a_{ij} k_j\Big), \qquad y^+ = y + h \sum_i b_i k_i.$$

    The error estimate is $h \sum_i e_i k_i$ with $e = b - \hat b$, the difference from an embedded method. The dense
    output at $t + s h$, $0 \le s \le 1$, is $y + h \sum_i \beta_i(s) k_i$ with polynomials $\beta_i(s) = \sum_{p \ge 1}
    d_{ip} s^p$; it may use stages of its own, which are evaluated only for steps inside which something is saved.

    A method whose last stage is the next step's first (the last row of `a` equals `b`) is recognised as
    first-same-as-last.

    Raises `ValueError` if shapes disagree, a row of `a` does not sum to `c`, `b` does not sum to one, `b_error` not to
    zero, or the dense output does not end in the step's own result.
    """

    name: str
    order: int
    """Order of `b`."""
    a: tuple[Row, ...]
    """Stage coefficients: row i has i entries, so the first row is `()`."""
    b: Row
    c: Row
    dense: tuple[Row, ...]
    """`dense[i][p - 1]` is the coefficient of s^p in the weight of stage i; stages of the step first, then `dense_a`'s."""
    dense_order: int
    """Order of the dense output: its local error is O(h^(dense_order + 1))."""
    b_error: Row | None = None
    """`b` minus the embedded weights, or None for a method without error estimate."""
    error_order: int | None = None
    """Order of the embedded method."""
    dense_a: tuple[Row, ...] = ()
    """Rows of the stages that only the dense output needs; row i has `stages + i` entries."""
    dense_c: Row = ()

    def __post_init__(self) -> None:
        stages, total = len(self.b), len(self.b) + len(self.dense_c)
        rows, nodes = self.a + self.dense_a, self.c + self.dense_c
        self._require(len(self.a) == len(self.c) == stages, "a, b and c must have one entry per stage")
        self._require(len(self.dense_a) == len(self.dense_c), "dense_a and dense_c must have equal lengths")
        self._require(
            all(len(row) == i for i, row in enumerate(rows)), "row i of a (then dense_a) must have i entries (explicit)"
        )
        self._require(len(self.dense) == total, f"dense must have {total} rows, one per stage and dense stage")
        self._require(len({len(row) for row in self.dense}) == 1, "all rows of dense must have equal lengths")
        self._require((self.b_error is None) == (self.error_order is None), "b_error and error_order go together")
        self._require(self.b_error is None or len(self.b_error) == stages, "b_error must have one entry per stage")
        for row, node in zip(rows, nodes, strict=True):
            self._require(_close(row, node), f"a row of a sums to {math.fsum(row)}, but its c is {node}")
        self._require(_close(self.b, 1.0), f"b sums to {math.fsum(self.b)}, expected 1")
        self._require(self.b_error is None or _close(self.b_error, 0.0), "b_error must sum to 0")
        for row, weight in zip(self.dense, self.b + (0.0,) * len(self.dense_c), strict=True):
            self._require(_close(row, weight), f"dense weights end in {math.fsum(row)} at s = 1, expected b = {weight}")

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"ButcherTableau {self.name!r}: {message}.")

    @property
    def stages(self) -> int:
        """Number of stages of the step itself."""
        return len(self.b)

    @property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is the field at the step's end."""
        return self.stages > 1 and self.a[-1] == self.b[:-1] and self.b[-1] == 0.0 and self.c[-1] == 1.0


def _close(row: Row, total: float) -> bool:
    return abs(math.fsum(row) - total) <= 1e-12 * (1.0 + math.fsum(map(abs, row)))
