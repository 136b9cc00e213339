"""Jacobians with a band of entries along the diagonal, as discretised partial differential equations have them."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adjoint_jax.lanes import on_one_cpu
from adjoint_jax.linear.band import Band, BandFactors
from adjoint_jax.linear.block_tridiagonal import BlockTridiagonal
from adjoint_jax.linear.dense import DenseJacobian
from adjoint_jax.linear.jacobian import AbstractInverse, AbstractJacobian, ravel
from adjoint_jax.linear.sparse import Places, compressed
from adjoint_jax.problem import Problem
from adjoint_jax.tree import Arrays, Scalar

WIDEST = 65
"""The largest width of bands that are solved row by row on a CPU. Factors of 1,000 rows and one solution take 0.05 and 0.02
ms with three diagonals, 0.2 and 0.06 with 17, 0.7 and 0.08 with 65; in blocks 0.6 and 0.12, 0.7 and 0.12, 1.2 and 0.13."""


class BandedJacobian(AbstractJacobian):
    """A Jacobian of which df_i/dy_j is zero unless -upper <= i - j <= lower: lower + upper + 1 forward derivatives, and
    direct solves with the band alone.

    - `lower`, `upper`: the number of diagonals below and above the main one, for the entries of y in the order of
      `jax.flatten_util.ravel_pytree`. Interleave the species of a reaction-diffusion system, so that the band is narrow.

    Narrow bands are solved row by row on a CPU, with partial pivoting. Wide ones, and all on other devices, are divided
    into blocks of at least the band's width; there is pivoting within blocks, not between them. If Jacobian or mass matrix
    have entries outside of the band, the solve fails with `Status.NON_FINITE`, rather than lose its accuracy.
    """

    lower: int = eqx.field(static=True)
    upper: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        if min(self.lower, self.upper) < 0:
            raise ValueError(f"BandedJacobian(lower, upper) must not be negative, got {self.lower} and {self.upper}.")

    def inverse(self, problem: Problem, t: Scalar, y: Arrays, g: Scalar) -> AbstractInverse:
        n = ravel(y)[0].size
        if n == 0:
            return DenseJacobian().inverse(problem, t, y, g)
        band = self._band(problem, t, y, g, n)
        return BandFactors.of(band) if on_one_cpu() and band.width <= WIDEST else BlockTridiagonal.of(band)

    def _band(self, problem: Problem, t: Scalar, y: Arrays, g: Scalar, n: int) -> Band:
        """M - g J."""
        lower, upper = (max(1, min(diagonals, n - 1)) for diagonals in (self.lower, self.upper))
        rows = np.arange(n)[:, None]
        columns = rows - lower + np.arange(lower + upper + 1)
        inside = (columns >= 0) & (columns < n) & (rows - columns <= self.lower) & (columns - rows <= self.upper)
        columns = np.clip(columns, 0, n - 1)
        colours = np.arange(n) % (self.lower + self.upper + 1)
        jacobian = compressed(problem, t, y, colours, Places(columns, inside))
        if problem.mass is None:
            mass = inside & (rows == columns)
        else:
            mass = _within(problem.mass.astype(jacobian.dtype), Places(columns, inside))
        return Band(mass - g.astype(jacobian.dtype) * jacobian, lower, upper)


def _within(mass: Float[Array, "n n"], places: Places) -> Float[Array, "n places"]:
    """The entries in these places; NaN if there are others."""
    entries = jnp.where(places.are_some, mass[np.arange(len(mass))[:, None], places.columns], 0)
    return jnp.where(jnp.sum(mass != 0) != jnp.sum(entries != 0), jnp.nan, entries)
