"""Reductions over the lanes of a `vmap`, for decisions that all lanes take together.

Under `vmap`, a `while_loop` whose predicate has a value per lane selects every loop-carried buffer per lane in every
iteration, and a buffer index that has a value per lane turns a slice update into a scatter. The loops of this package
therefore ask whether *any* lane goes on, and keep one record index for all lanes. Without `vmap` these functions are
identities.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def _over_lanes(reduce: Callable[..., Array]) -> Callable[[Array], Array]:
    @jax.custom_batching.custom_vmap
    def reduced(value: Array) -> Array:
        return value

    @reduced.def_vmap
    def rule(axis_size, in_batched, value):
        del axis_size, in_batched
        return reduced(reduce(value, axis=0)), False

    return reduced


_any = _over_lanes(jnp.any)
_max = _over_lanes(jnp.max)
_min = _over_lanes(jnp.min)


def any_lane(predicate: Bool[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """Whether the predicate holds in at least one lane: the same value in all lanes. Several predicates in one array are
    one reduction: where lanes are distributed over devices, each reduction is a message."""
    return _any(predicate)


def max_lane(value: Int[Array, ""]) -> Int[Array, ""]:
    """The largest value of all lanes: the same value in all lanes."""
    return _max(value)


def min_lane(value: Int[Array, ""]) -> Int[Array, ""]:
    """The smallest value of all lanes: the same value in all lanes."""
    return _min(value)
