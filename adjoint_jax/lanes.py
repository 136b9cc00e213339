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
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Int, PyTree

from adjoint_jax.tree import Arrays, is_traced


def with_rule(function: Callable[..., Any], rule: Callable[..., tuple[Any, Any]]) -> Callable[..., Any]:
    """A function with a rule for lanes where operands differ between them, as `jax.custom_batching.custom_vmap` has it.

    Loops within `scan` lose derivatives of one's own when JAX before 0.12 differentiates them twice. Then those of
    `custom_vmap` take their place, which ask for a rule where only tangents differ: so of the function as it is."""
    ruled = jax.custom_batching.custom_vmap(function)

    @ruled.def_vmap
    def _(axis_size: int, in_batched: list[Any], *operands: Any) -> tuple[Any, Any]:
        if any(jax.tree.leaves(in_batched)):
            return rule(axis_size, in_batched, *operands)
        results = function(*operands)
        return results, jax.tree.map(lambda _: False, results)

    return ruled


def _over_lanes(reduce: Callable[..., Array]) -> Callable[[Array], Array]:
    def rule(axis_size: int, in_batched: list[Any], value: Array) -> tuple[Array, bool]:
        """Of no lanes at all: zero, or false."""
        del in_batched
        return reduced(reduce(value, axis=0) if axis_size else jnp.zeros(value.shape[1:], value.dtype)), False

    reduced = with_rule(lambda value: value, rule)
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
    return _unchanged(_with_own_value, values)


def slots_first(buffers: PyTree[Any]) -> PyTree[Any]:
    """The same buffers. Under `vmap`, which makes lanes the first axis, what all lanes hold in one slot still lies together
    in the memory of a CPU, so that a slot is written and read as a whole."""
    return _unchanged(_with_slots_first, buffers)


def _unchanged(rule: Callable[[int, Any, bool], tuple[Any, bool]], values: PyTree[Any]) -> PyTree[Any]:
    """The same values, to each of which a rule for lanes applies: from their number, the value, and whether it differs
    between them, to both of the latter. To their tangents it applies by themselves: lanes may differ in tangents alone.
    Integers have none."""

    def changed(axis_size: int, in_batched: list[Any], leaves: list[Any]) -> tuple[list[Any], list[bool]]:
        pairs = [rule(axis_size, leaf, batched) for leaf, batched in zip(leaves, in_batched[0], strict=True)]
        return [leaf for leaf, _ in pairs], [batched for _, batched in pairs]

    of_lanes = with_rule(lambda leaves: leaves, changed)

    @jax.custom_jvp
    def same(leaves: list[Any]) -> list[Any]:
        return of_lanes(leaves)

    @same.defjvp
    def tangents(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
        (leaves,), (dots,) = primals, tangents
        moving = iter(same([dot for dot in dots if dot.dtype != jax.dtypes.float0]))
        return same(leaves), [dot if dot.dtype == jax.dtypes.float0 else next(moving) for dot in dots]

    leaves, structure = jax.tree.flatten(values)
    return jax.tree.unflatten(structure, same(leaves))


def _with_own_value(axis_size: int, leaf: Any, is_batched: bool) -> tuple[Any, bool]:
    return leaf if is_batched else jnp.broadcast_to(leaf, (axis_size, *jnp.shape(leaf))), True


def _with_slots_first(axis_size: int, leaf: Any, is_batched: bool) -> tuple[Any, bool]:
    del axis_size
    if is_batched and leaf.ndim > 1 and is_traced(leaf) and on_one_cpu():
        leaf = with_layout_constraint(leaf, Layout((1, 0, *range(2, leaf.ndim))))
    return leaf, is_batched


def put(rows: Arrays, index: Int[Array, ""], row: Arrays) -> Arrays:
    """`rows` with `rows[index] = row`."""
    return put_block(rows, index, jax.tree.map(lambda leaf: leaf[None], row))


def put_block(rows: Arrays, index: Int[Array, ""], block: Arrays) -> Arrays:
    """`rows` with `rows[index : index + len(block)] = block`.

    Under `vmap` an index that all lanes share stays one, and this a slice update. JAX would make it a scatter, which reads
    what it writes to and looks where that lies."""
    leaves, structure = jax.tree.flatten(rows)
    return jax.tree.unflatten(structure, _put_block(leaves, index, jax.tree.leaves(block)))


@jax.custom_jvp
def _put_block(rows: list[Any], index: Array, block: list[Any]) -> list[Any]:
    return _put_in_lanes(rows, index, block)


@_put_block.defjvp
def _put_tangents(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """In the usual way, which has a transpose."""
    (rows, index, block), (rows_dot, _, block_dot) = primals, tangents
    pairs = list(zip(rows_dot, block_dot, strict=True))
    moving = [pair for pair in pairs if pair[0].dtype != jax.dtypes.float0]
    moved = iter(_updated([dot for dot, _ in moving], index, [of_block for _, of_block in moving]))
    return _put_block(rows, index, block), [dot if dot.dtype == jax.dtypes.float0 else next(moved) for dot in rows_dot]


def _updated(rows: list[Any], index: Array, block: list[Any]) -> list[Any]:
    return [_put_slice(leaf, part, index, 0) for leaf, part in zip(rows, block, strict=True)]


def _put_slice(rows: Any, block: Any, index: Array, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(rows, block, index, axis, allow_negative_indices=False)


def _slices_put(
    axis_size: int, in_batched: list[Any], rows: list[Any], index: Array, block: list[Any]
) -> tuple[list[Any], list[bool]]:
    rows_batched, index_batched, block_batched = in_batched
    if index_batched:
        axes = tuple(jax.tree.map(lambda batched: 0 if batched else None, in_batched))
        return jax.vmap(_updated, axes, axis_size=axis_size)(rows, index, block), [True] * len(rows)

    def put_leaf(leaf: Any, part: Any, leaf_batched: bool, part_batched: bool) -> Any:
        if not (leaf_batched or part_batched):
            return _put_slice(leaf, part, index, 0)
        leaf, part = (_with_own_value(axis_size, *given)[0] for given in ((leaf, leaf_batched), (part, part_batched)))
        return _put_slice(leaf, part, index, 1)

    batched = [of_leaf or of_part for of_leaf, of_part in zip(rows_batched, block_batched, strict=True)]
    return [put_leaf(*given) for given in zip(rows, block, rows_batched, block_batched, strict=True)], batched


_put_in_lanes = with_rule(_updated, _slices_put)


def on_one_cpu() -> bool:
    """Whether what is traced here is computed by a single CPU: the only device there is, or each of several by itself, in
    `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    is_apart = bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)
    return jax.default_backend() == "cpu" and (jax.device_count() == 1 or is_apart)


def flat(values: Arrays) -> Arrays:
    """The same without shapes, for what is done entry by entry: LLVM writes a loop over a short axis out within one over a
    long axis, which takes as long to compile as ten others. Where values may be distributed over devices, they stay as they
    are."""
    if not on_one_cpu():
        return values
    return jax.tree.map(lambda leaf: leaf.reshape(-1) if leaf.ndim > 1 else leaf, values)


def shaped(values: PyTree[Any], like: PyTree[Any]) -> PyTree[Any]:
    """The same in the shapes of others."""
    return jax.tree.map(lambda leaf, other: jnp.reshape(leaf, other.shape), values, like)


def differ_between_devices(values: PyTree[Any]) -> bool:
    """Whether `jax.shard_map` follows which values differ between devices, and says so of any of these: in their types, as
    `vma` or, in newer versions of JAX, as `mat.varying`."""
    types = [jax.typeof(leaf) for leaf in jax.tree.leaves(values) if is_traced(leaf)]
    return any(getattr(of, "vma", None) or getattr(getattr(of, "mat", None), "varying", None) for of in types)


def are_lanes(values: PyTree[Any]) -> bool:
    """Whether a `vmap` is seen at work on any of the values here. One outside of a `jit` around here is not seen: then this
    becomes part of a program of one lane, whose lanes are computed later."""
    seen = []

    def lanes(axis_size: int, in_batched: list[Any], leaves: list[Any]) -> tuple[list[Any], Any]:
        del axis_size
        seen.append(True)
        return leaves, in_batched[0]

    with_rule(lambda leaves: leaves, lanes)(
        [jax.lax.stop_gradient(leaf) for leaf in jax.tree.leaves(values) if is_traced(leaf)]
    )
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

    def rule(axis_size: int, in_batched: list[bool], *leaves: Any) -> tuple[list[Any], list[bool]]:
        axes = tuple(0 if batched else None for batched in in_batched)
        results = jax.vmap(of_lanes, axes, axis_size=axis_size)(*leaves)
        return results, [True] * len(results)

    chosen = with_rule(of_one, rule)

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
