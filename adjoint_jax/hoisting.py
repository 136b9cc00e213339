"""Functions as pytrees that hold every array they close over, so that derivatives have no other road to take."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from adjoint_jax.tree import Arrays, Scalar

Function = Callable[[Scalar, PyTree[Any], PyTree[Any]], PyTree[Any]]
"""Of a time, a state and args."""


class Hoisted(eqx.Module):
    """A function of (t, y, args), traced once; its leaves are the arrays that it closes over.

    (`equinox.filter_closure_convert` does the same, but compares all arguments with the first ones in every call, and so
    refuses those that `jax.shard_map` computes.)
    """

    arrays: list[Any]
    jaxpr: Any = eqx.field(static=True)
    structure: Any = eqx.field(static=True)

    def __call__(self, t: Scalar, y: Arrays, args: PyTree[Any]) -> PyTree[Array]:
        inputs = jax.tree.leaves(eqx.filter((t, y, args), eqx.is_array))
        outputs = jax.core.eval_jaxpr(self.jaxpr, self.arrays, *inputs)
        return jax.tree.unflatten(self.structure, [jnp.asarray(output) for output in outputs])


def hoisted(function: Function, t: Scalar, y: Arrays, args: PyTree[Any]) -> Hoisted:
    """The function, traced for arguments like these. What is no array in args is static."""
    dynamic, static = eqx.partition((t, y, args), eqx.is_array)

    def traced(dynamic: PyTree[Any]) -> PyTree[Any]:
        return function(*eqx.combine(dynamic, static))

    closed, shapes = jax.make_jaxpr(traced, return_shape=True)(dynamic)
    return Hoisted(closed.consts, closed.jaxpr, jax.tree.structure(shapes))
