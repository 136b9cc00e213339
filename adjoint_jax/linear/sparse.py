"""Jacobians of which most entries are known to be zero: as many forward derivatives as columns that must be told apart.

Columns without an entry in a common row share a colour, and all columns of one colour are found with one forward
derivative: A. R. Curtis, M. J. D. Powell and J. K. Reid, "On the estimation of sparse Jacobian matrices", IMA J. Appl.
Math. 13 (1974).
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from adjoint_jax.linear.dense import Factorised
from adjoint_jax.linear.jacobian import AbstractInverse, AbstractJacobian, ravel
from adjoint_jax.linear.mass import mass_of
from adjoint_jax.problem import Problem
from adjoint_jax.tree import Arrays, Scalar

PROBE = 1e-3
"""By how much the product of a Jacobian with a vector may differ from that of the entries that were said to be there."""


class SparseJacobian(AbstractJacobian):
    """A Jacobian with known zeros: as many forward derivatives as its columns have colours, and direct solves with the
    whole matrix.

    - `sparsity`: a NumPy array of shape (n, n) for a state of n real numbers (of all leaves in the order of
      `jax.flatten_util.ravel_pytree`), true where df_i/dy_j may differ from zero.

    If the Jacobian has entries elsewhere, the solve fails with `Status.NON_FINITE`, rather than lose its accuracy.
    Raises `ValueError` for another shape.
    """

    sparsity: Any = eqx.field(static=True, converter=lambda sparsity: _Pattern(np.asarray(sparsity, bool)))

    def inverse(self, problem: Problem, t: Scalar, y: Arrays, g: Scalar) -> AbstractInverse:
        flat, _ = ravel(y)
        pattern = self.sparsity.entries
        if pattern.shape != (flat.size, flat.size):
            raise ValueError(
                f"SparseJacobian(sparsity) must have the shape {(flat.size, flat.size)}, for a state of {flat.size} real "
                f"numbers, got {pattern.shape}."
            )
        places = Places.of(pattern)
        entries = compressed(problem, t, y, coloured(pattern), places)
        jacobian = jnp.zeros(pattern.shape, flat.dtype).at[np.arange(flat.size)[:, None], places.columns].add(entries)
        return Factorised(*jax.scipy.linalg.lu_factor(mass_of(problem, flat) - g.astype(flat.dtype) * jacobian))


class _Pattern:
    """An array that can be compared as a whole, so that it may be static."""

    def __init__(self, entries: Bool[np.ndarray, "..."]):
        self.entries = entries

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Pattern) and np.array_equal(self.entries, other.entries)

    def __hash__(self) -> int:
        return hash((self.entries.shape, self.entries.tobytes()))

    def __repr__(self) -> str:
        return f"{np.count_nonzero(self.entries)} entries of {self.entries.shape}"


def coloured(pattern: Bool[np.ndarray, "n n"]) -> Int[np.ndarray, " n"]:
    """A colour for each column, so that columns of one colour have no row in common: the first that is free."""
    colours = np.zeros(len(pattern), int)
    taken: list[np.ndarray] = []
    for column in range(len(pattern)):
        free = (k for k, rows in enumerate(taken) if not np.any(rows & pattern[:, column]))
        colour = next(free, len(taken))
        if colour == len(taken):
            taken.append(np.zeros(len(pattern), bool))
        taken[colour] = taken[colour] | pattern[:, column]
        colours[column] = colour
    return colours


class Places(NamedTuple):
    """The columns in which each row of a matrix may have entries; rows of fewer go on with places that are none."""

    columns: Int[np.ndarray, "n places"]
    are_some: Bool[np.ndarray, "n places"]

    @staticmethod
    def of(pattern: Bool[np.ndarray, "n n"]) -> "Places":
        longest = np.max(np.sum(pattern, axis=1), initial=0)
        columns = np.argsort(~pattern, axis=1, kind="stable")[:, :longest]
        return Places(columns, np.take_along_axis(pattern, columns, axis=1))


def compressed(
    problem: Problem, t: Scalar, y: Arrays, colours: Int[np.ndarray, " n"], places: Places
) -> Float[Array, "n places"]:
    """The entries of the Jacobian, zero in places that are none; NaN if it has an entry elsewhere, which shows in its
    product with a vector of arbitrary numbers. No column has an entry in a row that another of its colour has."""
    flat, unravel = ravel(y)
    probe = np.random.default_rng(0).uniform(0.5, 1.5, len(flat)) * np.where(np.arange(len(flat)) % 2, 1, -1)
    seeds = np.concatenate([np.arange(np.max(colours, initial=-1) + 1)[:, None] == colours, probe[None]])
    pushforward = jax.linearize(lambda flat: ravel(problem.field(t, unravel(flat)))[0], flat)[1]
    products = jax.vmap(pushforward)(jnp.asarray(seeds, flat.dtype))
    entries = jnp.where(places.are_some, products[colours[places.columns], np.arange(len(flat))[:, None]], 0)
    terms = entries * jnp.asarray(probe, flat.dtype)[places.columns]
    size = jnp.maximum(jnp.sum(jnp.abs(terms), axis=1), jnp.abs(products[-1]))
    elsewhere = jnp.any(jnp.abs(products[-1] - jnp.sum(terms, axis=1)) > PROBE * size)
    return jnp.where(elsewhere, jnp.nan, entries)
