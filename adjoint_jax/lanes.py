"""Decisions that all lanes of a `vmap` take together, and computations that are others in lanes.

Under `vmap`, a `while_loop` whose predicate has a value per lane selects every loop-carried buffer per lane in every
iteration, and a buffer index that has a value per lane turns a slice update into a scatter. The loops of this package
therefore ask whether *any* lane goes on, and keep one record index for all lanes. Without `vmap` these reductions are
identities.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from adjoint_jax.tree import is_traced


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


def apart(values: PyTree[Any]) -> PyTree[Any]:
    """The same, but under `vmap` with a value of its own in every lane for each of them, if there is for any.

    JAX finds by repetition which values of a loop differ between lanes: those that it starts with, then those that these
    make differ, and so on, with all loops within every time. Where all do from the start, once is enough."""
    leaves, structure = jax.tree.flatten(values)
    return jax.tree.unflatten(structure, _apart(leaves))


@jax.custom_jvp
def _apart(leaves: list[Any]) -> list[Any]:
    return _with_own_values(leaves)


@_apart.defjvp
def _apart_tangents(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """By themselves: lanes may differ in tangents alone. Integers have none."""
    (leaves,), (dots,) = primals, tangents
    moving = iter(_apart([dot for dot in dots if dot.dtype != jax.dtypes.float0]))
    return _apart(leaves), [dot if dot.dtype == jax.dtypes.float0 else next(moving) for dot in dots]


@jax.custom_batching.custom_vmap
def _with_own_values(leaves: list[Any]) -> list[Any]:
    return leaves


@_with_own_values.def_vmap
def _own_values(axis_size: int, in_batched: list[Any], leaves: list[Any]) -> tuple[list[Any], Any]:
    lanes = [
        leaf if is_batched else jnp.broadcast_to(leaf, (axis_size, *jnp.shape(leaf)))
        for leaf, is_batched in zip(leaves, in_batched[0], strict=True)
    ]
    return lanes, [True] * len(lanes)


def are_lanes(values: PyTree[Any]) -> bool:
    """Whether a `vmap` is seen at work on any of the values here. One outside of a `jit` around here is not seen: then this
    becomes part of a program of one lane, whose lanes are computed later."""
    seen = []

    @jax.custom_batching.custom_vmap
    def one(leaves: list[Any]) -> list[Any]:
        return leaves

    @one.def_vmap
    def lanes(axis_size: int, in_batched: list[Any], leaves: list[Any]) -> tuple[list[Any], Any]:
        del axis_size
        seen.append(True)
        return leaves, in_batched[0]

    one([jax.lax.stop_gradient(leaf) for leaf in jax.tree.leaves(values) if is_traced(leaf)])
    return bool(seen)


def in_lanes(of_one: Callable[..., Any], of_lanes: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is the second under `vmap`, and otherwise the first. They must return the same, of the same types,
    and depend on traced values through their arguments alone. It has forward-mode derivatives."""

    def function(*operands: Any) -> Any:
        arrays, static = eqx.partition(operands, eqx.is_array)
        leaves, structure = jax.tree.flatten(arrays)
        structures = []

        def flat(of: Callable[..., Any]) -> Callable[..., list[Any]]:
            def of_leaves(*leaves: Any) -> list[Any]:
                results = of(*eqx.combine(jax.tree.unflatten(structure, leaves), static))
                structures.append(jax.tree.structure(results))
                return jax.tree.leaves(results)

            return of_leaves

        results = _flat_in_lanes(flat(of_one), flat(of_lanes))(*leaves)
        return jax.tree.unflatten(structures[0], results)

    return function


def _flat_in_lanes(of_one: Callable[..., list[Any]], of_lanes: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """`in_lanes` for functions of arrays. Its derivative is chosen in the same way: the one that `custom_vmap` has takes no
    notice of lanes in which values differ and their tangents do not."""

    @jax.custom_batching.custom_vmap
    def chosen(*leaves: Any) -> list[Any]:
        return of_one(*leaves)

    @chosen.def_vmap
    def rule(axis_size: int, in_batched: list[bool], *leaves: Any) -> tuple[list[Any], list[bool]]:
        axes = tuple(0 if batched else None for batched in in_batched)
        results = jax.vmap(of_lanes, axes, axis_size=axis_size)(*leaves)
        return results, [True] * len(results)

    @jax.custom_jvp
    def function(*leaves: Any) -> list[Any]:
        return chosen(*leaves)

    @function.defjvp
    def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        of_one_dot, of_lanes_dot = (functools.partial(_tangents, of) for of in (of_one, of_lanes))
        return function(*primals), in_lanes(of_one_dot, of_lanes_dot)(primals, tangents)

    return function


def _tangents(function: Callable[..., list[Any]], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> list[Any]:
    """By themselves: lanes may differ in tangents alone, as in `jax.jacfwd`."""
    return jax.jvp(function, primals, tangents)[1]


def once_for_lanes(wanted: Bool[Array, ""], values: PyTree[Array]) -> PyTree[Array]:
    """The values, if they are wanted in any lane. With lanes, they are computed once and stored, however many operations
    use them: XLA's fusion would compute them anew in each of these."""
    return _once_for_lanes(any_lane(wanted), values)


def _stored(wanted: Bool[Array, ""], values: PyTree[Array]) -> PyTree[Array]:
    return jax.lax.cond(wanted, lambda: values, lambda: jax.tree.map(jnp.zeros_like, values))


_once_for_lanes = in_lanes(lambda wanted, values: values, _stored)
