"""How large an error may be, and errors in units of that."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from adjoint_jax import tree
from adjoint_jax.lanes import flat
from adjoint_jax.tree import Arrays, Scalar


def rms_norm(scaled: Arrays) -> Scalar:
    """The root mean square over all entries of all leaves."""
    leaves = jax.tree.leaves(scaled)
    count = sum(leaf.size for leaf in leaves)
    total = sum((jnp.sum(jnp.square(leaf)) for leaf in leaves), start=jnp.zeros(()))
    return jnp.sqrt(total / max(count, 1))


class AbstractTolerance(eqx.Module):
    """A measure of errors."""

    @abc.abstractmethod
    def ratio(self, error: Arrays, y0: Arrays, y1: Arrays) -> Scalar:
        """The size of an error of y, where y goes from y0 to y1; one is what is tolerated."""


class Tolerance(AbstractTolerance):
    """`norm(error / (atol + rtol * max(abs(y0), abs(y1))))`, with tolerances like y or prefixes of it."""

    rtol: PyTree[Any]
    atol: PyTree[Any]
    norm: Callable[[PyTree[Any]], Scalar] = eqx.field(static=True, default=rms_norm)

    @property
    def is_uniform(self) -> bool:
        """Whether it is the same for all entries of y, however they are arranged."""
        numbers = jax.tree_util.all_leaves((self.rtol, self.atol))
        return numbers and self.norm is rms_norm and jnp.ndim(self.rtol) == jnp.ndim(self.atol) == 0

    def ratio(self, error: Arrays, y0: Arrays, y1: Arrays) -> Scalar:
        rtol, atol = _broadcast_prefix("rtol", self.rtol, y0), _broadcast_prefix("atol", self.atol, y0)
        if self.is_uniform:
            error, y0, y1 = flat((error, y0, y1))

        def scaled(e: Array, a: Array, b: Array, r: ArrayLike, s: ArrayLike) -> Array:
            dtype = tree.real_dtype(a.dtype)
            scale = jnp.asarray(s, dtype) + jnp.asarray(r, dtype) * jnp.maximum(jnp.abs(a), jnp.abs(b))
            return jnp.where((e == 0) & (scale == 0), 0, jnp.abs(e) / scale)

        return jnp.asarray(self.norm(tree.map(scaled, error, y0, y1, rtol, atol)))


class Rounding(AbstractTolerance):
    """A thousand rounding errors of the largest entry of y."""

    def ratio(self, error: Arrays, y0: Arrays, y1: Arrays) -> Scalar:
        largest = [jnp.max(jnp.abs(leaf), initial=0.0) for leaf in jax.tree.leaves((y0, y1))]
        size = jnp.max(jnp.stack([jnp.zeros(()), *largest]))

        def scaled(e: Array) -> Array:
            scale = (1e3 * jnp.finfo(e.dtype).eps * size).astype(tree.real_dtype(e.dtype))
            return jnp.where((e == 0) & (scale == 0), 0, jnp.abs(e) / scale)

        return rms_norm(tree.map(scaled, error))


def _broadcast_prefix(name: str, prefix: PyTree[Any], full: Arrays) -> PyTree[Any]:
    try:
        return jax.tree.map(lambda value, subtree: jax.tree.map(lambda _: value, subtree), prefix, full)
    except ValueError as error:
        raise ValueError(
            f"PIDController({name}) must be a number or a pytree like y0 (or a prefix of it): got structure "
            f"{jax.tree.structure(prefix)} for a state of structure {jax.tree.structure(full)}."
        ) from error
