"""Losses and their inputs, as the diagnostics take them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from adjoint_jax.tree import Arrays, Scalar


def real_scalar(value: Any) -> Scalar:
    """What a loss returned. Raises `TypeError` if that is no real floating-point scalar."""
    if not (eqx.is_array_like(value) and jnp.ndim(value) == 0 and jnp.issubdtype(jnp.result_type(value), jnp.floating)):
        raise TypeError(f"loss(inputs) must return a real floating-point scalar, got {eqx.tree_pformat(value)}.")
    return jnp.asarray(value)


def differentiable(arrays: Arrays) -> dict[str, Array]:
    """The differentiable leaves, by where they are. Raises `ValueError` if there is none."""
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(arrays, eqx.is_inexact_array))
    if not leaves:
        raise ValueError(
            "inputs hold no real or complex floating-point array to differentiate (Python floats are left as they are: "
            "write jnp.asarray(1.0) for 1.0)."
        )
    return {f"inputs{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves}
