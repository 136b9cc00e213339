"""Jacobians with a band of entries along the diagonal, as discretised partial differential equations have them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adjoint_jax.linear.jacobian import AbstractInverse, AbstractJacobian, ravel
from adjoint_jax.linear.sparse import compressed
from adjoint_jax.problem import Problem
from adjoint_jax.tree import Arrays, Scalar

SMALLEST_BLOCK = 16
"""Matrices are divided into blocks at least as large as this: fewer steps one after the other."""


class BandedJacobian(AbstractJacobian):
    """A Jacobian of which df_i/dy_j is zero unless -upper <= i - j <= lower: lower + upper + 1 forward derivatives, and
    direct solves with the band alone.

    - `lower`, `upper`: the number of diagonals below and above the main one, for the entries of y in the order of
      `jax.flatten_util.ravel_pytree`. Interleave the species of a reaction-diffusion system, so that the band is narrow.

    The matrix is divided into blocks of the band's width; there is pivoting within blocks, not between them. If Jacobian or
    mass matrix have entries outside of the band, the solve fails with `Status.NON_FINITE`, rather than lose its accuracy.
    """

    lower: int = eqx.field(static=True)
    upper: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        if min(self.lower, self.upper) < 0:
            raise ValueError(f"BandedJacobian(lower, upper) must not be negative, got {self.lower} and {self.upper}.")

    def inverse(self, problem: Problem, t: Scalar, y: Arrays, g: Scalar) -> "BlockTridiagonal":
        flat, _ = ravel(y)
        n, width = len(flat), self.lower + self.upper + 1
        rows, columns = np.indices((n, n))
        band = (rows - columns <= self.lower) & (columns - rows <= self.upper)
        colours = np.arange(n) % width
        jacobian = compressed(problem, t, y, colours, band)
        block = max(self.lower, self.upper, min(n, SMALLEST_BLOCK))
        parts = [self._blocks(problem, g, jacobian, block, offset) for offset in (-1, 0, 1)]
        return BlockTridiagonal.factorised(*parts)

    def _blocks(
        self, problem: Problem, g: Scalar, jacobian: Float[Array, "colours n"], block: int, offset: int
    ) -> Float[Array, "blocks block block"]:
        """The blocks of M - g J beside the diagonal by the offset; the matrix goes on as the identity."""
        n, width = jacobian.shape[1], self.lower + self.upper + 1
        rows = np.arange(-(-n // block) * block).reshape(-1, block, 1)
        columns = rows[:, :1] + offset * block + np.arange(block)
        inside = (rows < n) & (columns < n) & (columns >= 0)
        in_band = inside & (rows - columns <= self.lower) & (columns - rows <= self.upper)
        at = np.broadcast_to(np.clip(rows, 0, n - 1), in_band.shape), np.clip(columns, 0, n - 1) + 0 * rows
        entries = jnp.where(in_band, g.astype(jacobian.dtype) * jacobian[at[1] % width, at[0]], 0)
        if problem.mass is None:
            return (rows == columns) - entries
        mass = problem.mass.astype(jacobian.dtype)[at]
        outside = jnp.any(jnp.where(inside & ~in_band, mass, 0) != 0)
        return jnp.where(outside, jnp.nan, jnp.where(inside, mass, rows == columns) - entries)


class BlockTridiagonal(AbstractInverse):
    """The inverse of a block tridiagonal matrix with rows (A_k, B_k, C_k), which is (D + A) (1 + G), each factor with two
    diagonals of blocks:

        D_k = B_k - A_k G_{k-1},        G_k = D_k^-1 C_k.
    """

    below: Float[Array, "blocks block block"]
    """A."""
    inverses: Float[Array, "blocks block block"]
    """The inverses of D."""
    above: Float[Array, "blocks block block"]
    """G."""

    @staticmethod
    def factorised(
        a: Float[Array, "blocks block block"], b: Float[Array, "blocks block block"], c: Float[Array, "blocks block block"]
    ) -> "BlockTridiagonal":
        def next_row(g: Array, row: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
            a, b, c = row
            inverse = jnp.linalg.inv(b - a @ g)
            return inverse @ c, (inverse, inverse @ c)

        inverses, above = jax.lax.scan(next_row, jnp.zeros_like(b[0]), (a, b, c))[1]
        return BlockTridiagonal(a, inverses, above)

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
