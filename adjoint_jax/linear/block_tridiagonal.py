"""Block tridiagonal matrices: as few steps one after the other as there are blocks, for devices that are slow at those."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adjoint_jax.linear.band import Band
from adjoint_jax.linear.jacobian import AbstractInverse

SMALLEST_BLOCK = 16
"""Matrices are divided into blocks at least as large as this: fewer steps one after the other."""


class BlockTridiagonal(AbstractInverse):
    """The inverse of a block tridiagonal matrix with rows (A_k, B_k, C_k), which is (D + A) (1 + G), each factor with two
    diagonals of blocks:

        D_k = B_k - A_k G_{k-1},        G_k = D_k^-1 C_k.

    There is pivoting within blocks, not between them.
    """

    below: Float[Array, "blocks block block"]
    """A."""
    inverses: Float[Array, "blocks block block"]
    """The inverses of D."""
    above: Float[Array, "blocks block block"]
    """G."""

    @staticmethod
    def of(band: Band) -> "BlockTridiagonal":
        block = max(band.lower, band.upper, min(len(band.rows), SMALLEST_BLOCK))

        def next_row(g: Array, row: list[Array]) -> tuple[Array, tuple[Array, Array]]:
            a, b, c = row
            inverse = jnp.linalg.inv(b - a @ g)
            return inverse @ c, (inverse, inverse @ c)

        parts = [_blocks(band, block, offset) for offset in (-1, 0, 1)]
        inverses, above = jax.lax.scan(next_row, jnp.zeros_like(parts[0][0]), parts)[1]
        return BlockTridiagonal(parts[0], inverses, above)

    def times(self, right: Float[Array, " n"]) -> Float[Array, " n"]:
        """(D + A) z = r from the first row to the last, then (1 + G) x = z from the last to the first."""

        def down(z: Array, row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            a, inverse, r = row
            z = inverse @ (r - a @ z)
            return z, z

        def up(x: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
            g, z = row
            x = z - g @ x
            return x, x

        blocks = self._divided(right)
        z = jax.lax.scan(down, jnp.zeros_like(blocks[0]), (self.below, self.inverses, blocks))[1]
        x = jax.lax.scan(up, jnp.zeros_like(blocks[0]), (self.above, z), reverse=True)[1]
        return x.reshape(-1)[: len(right)]

    def transposed_times(self, right: Float[Array, " n"]) -> Float[Array, " n"]:
        """(1 + G)^T w = r from the first row to the last, then (D + A)^T x = w from the last to the first. Each row's block
        in G or A meets the next row's unknown, so it goes along with the carry."""

        def down(carried: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
            g, r = row
            w = r - carried
            return g.T @ w, w

        def up(carried: Array, row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            a, inverse, w = row
            x = inverse.T @ (w - carried)
            return a.T @ x, x

        blocks = self._divided(right)
        zero = jnp.zeros_like(blocks[0])
        w = jax.lax.scan(down, zero, (self.above, blocks))[1]
        x = jax.lax.scan(up, zero, (self.below, self.inverses, w), reverse=True)[1]
        return x.reshape(-1)[: len(right)]

    def _divided(self, right: Float[Array, " n"]) -> Float[Array, "blocks block"]:
        return jnp.pad(right, (0, self.below.shape[0] * self.below.shape[1] - len(right))).reshape(self.below.shape[:2])


def _blocks(band: Band, block: int, offset: int) -> Float[Array, "blocks block block"]:
    """The blocks beside the diagonal by the offset; the matrix goes on as the identity."""
    n = len(band.rows)
    rows = np.arange(-(-n // block) * block).reshape(-1, block, 1)
    columns = rows[:, :1] + offset * block + np.arange(block)
    diagonal = columns - rows + band.lower
    inside = (rows < n) & (columns < n) & (columns >= 0) & (diagonal >= 0) & (diagonal < band.width)
    entries = band.rows[np.minimum(rows, n - 1), np.clip(diagonal, 0, band.width - 1)]
    return jnp.where(inside, entries, (rows == columns) & (rows >= n))
