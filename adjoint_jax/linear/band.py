"""Matrices with a band of entries along the diagonal, and their solution row by row."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from adjoint_jax import tree
from adjoint_jax.kernels import in_a_small_kernel
from adjoint_jax.lanes import put, with_rule
from adjoint_jax.linear.jacobian import AbstractInverse


class Band(eqx.Module):
    """The entries of a matrix that is zero outside of its band: A[i, i - lower + c] is `rows[i, c]`, which is zero where
    that is no column."""

    rows: Float[Array, "n width"]
    lower: int = eqx.field(static=True)
    upper: int = eqx.field(static=True)

    @property
    def width(self) -> int:
        return self.lower + self.upper + 1

    def times(self, right: Float[Array, " n"]) -> Float[Array, " n"]:
        """The matrix times a vector."""
        padded = jnp.pad(right, (self.lower, self.upper))
        return jnp.sum(self.rows * padded[np.arange(len(right))[:, None] + np.arange(self.width)], axis=1)


class BandFactors(AbstractInverse):
    """The inverse of a matrix with a band, by Gaussian elimination with partial pivoting (G. H. Golub and C. F. Van Loan,
    "Matrix Computations", section 4.3.5).

    When column k is eliminated, the rows that have an entry there are k to k + lower, the window, whose other entries are
    in the lower + upper columns behind it, wherever rows were exchanged. The one with the largest entry becomes row k of U;
    the others, less their multiples of it, and the next row of the band are the window of column k + 1. Windows move along
    the band in loops of plain arithmetic, so that on a CPU each is one kernel.

    Derivatives are those of the solution of A x = r, dx = A^-1 (dr - dA x), whatever was done to find it.
    """

    band: Band
    factors: "_Factors"

    @staticmethod
    def of(band: Band) -> "BandFactors":
        return BandFactors(band, _factors(jax.lax.stop_gradient(band)))

    def times(self, right: Float[Array, " n"]) -> Float[Array, " n"]:
        return jax.lax.custom_linear_solve(self.band.times, right, self._solved, self._solved_transposed)

    def transposed_times(self, right: Float[Array, " n"]) -> Float[Array, " n"]:
        product = jax.linear_transpose(self.band.times, right)
        return jax.lax.custom_linear_solve(lambda x: product(x)[0], right, self._solved_transposed, self._solved)

    def _solved(self, product: Any, right: Array) -> Array:
        del product
        return in_a_small_kernel(_solved, self.factors, right)

    def _solved_transposed(self, product: Any, right: Array) -> Array:
        del product
        return in_a_small_kernel(_solved_transposed, self.factors, right)


class _Factors(NamedTuple):
    """Rows of U from the diagonal on, with the inverse of the entry there; the multiples of row k in the other rows of its
    window; and the place in its window of the row that became row k of U."""

    upper: Float[Array, "n width"]
    multiples: Float[Array, "n lower"]
    exchanged: Int[Array, " n"]


FEW_LANES, VECTORISED_WIDTH = 16, 9
"""In so many lanes, or more if bands are wider than that, matrices are factorised one after the other. Factors of 1,000
rows take 0.055 ms with three diagonals, 0.09 with 9, 0.27 with 33; of 8 matrices in vectors 0.8, 1.3 and 4, of 64 2.2, 5
and 55."""


def _factors(band: Band) -> _Factors:
    def of_lanes(axis_size: int, in_batched: list[Any], bands: Band) -> tuple[_Factors, Any]:
        del in_batched
        one_by_one = axis_size <= FEW_LANES or bands.width > VECTORISED_WIDTH
        factors = jax.lax.map(alone, bands) if one_by_one else jax.vmap(_factorised)(bands)
        return factors, jax.tree.map(lambda _: True, factors)

    def alone(band: Band) -> _Factors:
        return in_a_small_kernel(_factorised, band)

    return with_rule(alone, of_lanes)(band)


def _factorised(band: Band) -> _Factors:
    """Column by column. Rows of the band begin where the window does, but for the first ones, which begin before it."""
    lower, width = band.lower, band.width
    rows = jnp.pad(band.rows, ((0, 2 * lower + 2), (0, 0)))
    places = np.arange(lower + 1)
    skewed = np.arange(width) + lower - places[:, None]
    first = jnp.where(skewed < width, rows[places[:, None], np.minimum(skewed, width - 1)], 0)

    def eliminate(window: Array, next_row: Array) -> tuple[Array, _Factors]:
        largest = jnp.argmax(jnp.abs(window[:, 0])).astype(jnp.int32)
        row = tree.take(window, largest)
        others = _exchanged(window, largest)[1:]
        inverse = 1 / row[0]
        multiples = others[:, 0] * inverse
        left = jnp.pad((others - multiples[:, None] * row)[:, 1:], ((0, 0), (0, 1)))
        return jnp.concatenate([left, next_row[None]]), _Factors(jnp.append(inverse, row[1:]), multiples, largest)

    return jax.lax.scan(eliminate, first, rows[lower + 1 : lower + 1 + len(band.rows)])[1]


def _exchanged(window: Array, place: Int[Array, ""]) -> Array:
    """The window with its first row in that place, where nothing is said of the first place."""
    places = jnp.arange(len(window)).reshape(-1, *[1] * (window.ndim - 1))
    return jnp.where(places == place, window[0], window)


def _solved(factors: _Factors, right: Float[Array, " n"]) -> Float[Array, " n"]:
    """In place: from the first row to the last with the multiples, then from the last to the first with U."""
    upper, multiples, exchanged = factors
    n, width, lower = *upper.shape, multiples.shape[1]

    def down(k: Array, x: Array) -> Array:
        window, place = jax.lax.dynamic_slice(x, (k,), (lower + 1,)), tree.take(exchanged, k)
        z = tree.take(window, place)
        others = _exchanged(window, place)[1:] - tree.take(multiples, k) * z
        return jax.lax.dynamic_update_slice(x, jnp.append(z, others), (k,))

    def up(reversed_index: Array, x: Array) -> Array:
        k = n - 1 - reversed_index
        window, u = jax.lax.dynamic_slice(x, (k,), (width,)), tree.take(upper, k)
        return put(x, k, (window[0] - jnp.sum(u[1:] * window[1:])) * u[0])

    x = jax.lax.fori_loop(0, n, down, jnp.pad(right, (0, width)))
    return jax.lax.fori_loop(0, n, up, x)[:n]


def _solved_transposed(factors: _Factors, right: Float[Array, " n"]) -> Float[Array, " n"]:
    """In place: from the first row to the last with the transpose of U, then from the last to the first with those of what
    was done to rows."""
    upper, multiples, exchanged = factors
    n, width, lower = *upper.shape, multiples.shape[1]

    def down(k: Array, x: Array) -> Array:
        window, u = jax.lax.dynamic_slice(x, (k,), (width,)), tree.take(upper, k)
        w = window[0] * u[0]
        return jax.lax.dynamic_update_slice(x, jnp.append(w, window[1:] - u[1:] * w), (k,))

    def up(reversed_index: Array, x: Array) -> Array:
        k = n - 1 - reversed_index
        window, place = jax.lax.dynamic_slice(x, (k,), (lower + 1,)), tree.take(exchanged, k)
        window = jnp.append(window[0] - jnp.sum(tree.take(multiples, k) * window[1:]), window[1:])
        first = tree.take(window, place)
        return jax.lax.dynamic_update_slice(x, jnp.append(first, _exchanged(window, place)[1:]), (k,))

    x = jax.lax.fori_loop(0, n, down, jnp.pad(right, (0, width)))
    return jax.lax.fori_loop(0, n, up, x)[:n]
