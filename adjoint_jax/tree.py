"""Arithmetic on pytrees of arrays. Leaves stay apart: nothing here ravels a state into one vector.

Sums and products are `jax.lax`'s where there is nothing to convert: those of `jax.numpy` are the same operations, but take
two to four times as long to trace.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, DTypeLike, Float, Inexact, Int, PyTree

Arrays = PyTree[Array]
"""A pytree whose leaves are arrays."""
Shapes = PyTree[Array | np.ndarray | jax.ShapeDtypeStruct]
"""A pytree whose leaves have shapes and dtypes, with or without values."""
Scalar = Float[Array, ""]
"""A real number: a time, a step size, a norm."""

map = jax.tree.map


def add(*trees: Arrays) -> Arrays:
    """Leafwise sum."""

    def plus(a: Any, b: Any) -> Any:
        return jax.lax.add(a, b) if _are_alike(a, b) else a + b

    return map(lambda *leaves: functools.reduce(plus, leaves), *trees)


def scale(factor: ArrayLike, tree: Arrays) -> Arrays:
    """Leafwise product with a scalar, in each leaf's own dtype."""

    def scaled(leaf: Array) -> Array:
        if not is_traced(leaf) or jnp.iscomplexobj(leaf):
            return _cast(factor, leaf) * leaf
        own = np.asarray(factor, leaf.dtype) if isinstance(factor, float) else _cast(factor, leaf)
        return jax.lax.mul(own, leaf)

    return map(scaled, tree)


def where(predicate: Bool[Array, ""], yes: Arrays, no: Arrays) -> Arrays:
    """Leafwise selection."""

    def select(a: ArrayLike, b: ArrayLike) -> Array:
        is_plain = jnp.ndim(predicate) == 0 and _are_alike(a, b)
        return jax.lax.select(predicate, a, b) if is_plain else jnp.where(predicate, a, b)

    return map(select, yes, no)


def weighted_sum(weights: Sequence[float], trees: Sequence[Arrays]) -> Arrays:
    """`sum(w * tree)` over the non-zero weights, which are Python floats and leave no trace when they are zero or one."""
    terms = [tree if weight == 1.0 else scale(weight, tree) for weight, tree in zip(weights, trees, strict=True) if weight]
    return add(*terms) if terms else zeros_like(trees[0])


LARGE_ROW_BYTES = 2**17
MOST_SUMMED = 32
"""From rows of this size on, and up to so many of them, a contraction is a chain of sums: XLA:CPU hands reductions of
large arrays to a slow library. Measured on gradients of a ring of cells: with reductions, those of rows of 128 to 512 KiB
take 1.7 to 2.4 times as long; with chains, those of rows of 96 bytes to 64 KiB take 1.1 to 2.3 times as long."""


def contract(weights: Float[Array, " n"], stacked: Arrays) -> Arrays:
    """`sum(weights[i] * stacked[i])` over the leading axis of every leaf: as multiply and reduce, which fuses, or as a
    chain of sums."""

    def leaf_contract(leaf: Array) -> Array:
        own, count = weights.astype(real_dtype(leaf.dtype)), leaf.shape[0]
        if 0 < count <= MOST_SUMMED and leaf.size * leaf.dtype.itemsize >= count * LARGE_ROW_BYTES:
            return functools.reduce(operator.add, [own[i] * leaf[i] for i in range(count)])
        return jnp.sum(own.reshape(-1, *[1] * (leaf.ndim - 1)) * leaf, axis=0)

    return map(leaf_contract, stacked)


def keep_rows(predicate: Bool[Array, " rows"], stacked: Arrays) -> Arrays:
    """The rows for which the predicate holds, zero in place of the others."""
    return map(lambda leaf: jnp.where(predicate.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0), stacked)


def zeros_like(tree: Shapes) -> Arrays:
    """Zeros with the shapes and dtypes of `tree`."""
    return map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def buffer(length: int, like: Shapes, fill: float = 0.0) -> Arrays:
    """A buffer of `length` rows, each like `like`."""
    return map(lambda leaf: jnp.full((length, *leaf.shape), fill, leaf.dtype), like)


def take_block(rows: Arrays, index: Int[Array, ""], length: int) -> Arrays:
    """`rows[index : index + length]`, the index clamped so that the block lies inside."""
    return map(lambda many: jax.lax.dynamic_slice_in_dim(many, index, length, 0, allow_negative_indices=False), rows)


def take(rows: Arrays, index: Int[Array, ""]) -> Arrays:
    """`rows[index]`, the index clamped to the buffer."""
    return map(lambda block: jax.lax.squeeze(block, (0,)), take_block(rows, index, 1))


def take_rows(rows: Arrays, indices: Int[Array, " n"]) -> Arrays:
    """`rows[indices]`, the indices clamped to the buffer: a single row whatever they are."""

    def taken(many: Array) -> Array:
        if many.shape[0] == 1:
            return jnp.broadcast_to(many, (*indices.shape, *many.shape[1:]))
        return jnp.take(many, indices, axis=0, mode="clip")

    return map(taken, rows)


def quotient(number: Int[Array, ""], size: int | Int[Array, ""]) -> Int[Array, ""]:
    """`number // size`, of numbers that are not negative: without what `//` does for signs."""
    return jax.lax.div(number, jnp.asarray(size, number.dtype))


def remainder(number: Int[Array, ""], size: int | Int[Array, ""]) -> Int[Array, ""]:
    """`number % size`, of numbers that are not negative."""
    return jax.lax.rem(number, jnp.asarray(size, number.dtype))


def blocks(number: Int[Array, ""], size: int) -> Int[Array, ""]:
    """How many blocks of some size hold so many rows."""
    return quotient(number + (size - 1), size)


def stack(trees: Sequence[Arrays]) -> Arrays:
    """Trees stacked along a new leading axis."""
    return map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(stacked: Arrays, count: int) -> list[Arrays]:
    """The `count` trees along the leading axis."""
    return [map(lambda leaf, i=i: leaf[i], stacked) for i in range(count)]


def pairing(cotangent: Arrays, tangent: Arrays) -> Inexact[Array, ""]:
    """The pairing <cotangent, tangent> in JAX's convention (real part, no conjugate): the cotangent of a real scalar
    along which the tree moves with velocity `tangent`. Nothing comes of a cotangent that is zero, even where the tangent
    is not finite."""
    leaves = zip(jax.tree.leaves(cotangent), jax.tree.leaves(tangent), strict=True)
    products = [jnp.sum(jnp.where(a == 0, 0, a * b).real) for a, b in leaves]
    return functools.reduce(operator.add, products, jnp.zeros(()))


def all_finite(tree: Arrays) -> Bool[Array, ""]:
    """Whether no entry is NaN or infinite."""
    return functools.reduce(operator.and_, [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)], jnp.array(True))


def root_mean_squares(tree: Arrays) -> PyTree[Scalar]:
    """The root mean square over the entries of each leaf."""
    return map(lambda leaf: jnp.sqrt(jnp.sum(jnp.square(jnp.abs(leaf))) / max(leaf.size, 1)), tree)


def unknown_if(predicate: Bool[Array, ""], tree: Arrays) -> Arrays:
    """The same, or NaN in place of all real and complex numbers: by an addition, which takes no longer than a choice, and
    half as long to compile."""
    unknown = jnp.where(predicate, jnp.nan, 0.0)

    def known_or_not(leaf: Array) -> Array:
        is_number = jnp.issubdtype(leaf.dtype, jnp.inexact)
        return jax.lax.add(leaf, jax.lax.convert_element_type(unknown, leaf.dtype)) if is_number else leaf

    return map(known_or_not, tree)


def any_nonzero(tree: Arrays) -> Bool[Array, ""]:
    """Whether any entry is not zero."""
    return functools.reduce(operator.or_, [jnp.any(leaf != 0) for leaf in jax.tree.leaves(tree)], jnp.array(False))


def is_traced(*values: Any) -> bool:
    """Whether the value of any of them is known only when the program runs."""
    return any(isinstance(value, Tracer) for value in values)


def is_staged() -> bool:
    """Whether what is computed here becomes part of a program, rather than being computed at once."""
    return is_traced(jnp.add(0, 1))


def as_array(value: Any, dtype: DTypeLike) -> Array | np.ndarray:
    """The value with the given dtype; in NumPy if it is known, which costs an eager caller nothing."""
    return jnp.asarray(value, dtype) if is_traced(value) else np.asarray(value, dtype)


def as_jax(values: PyTree[Any]) -> PyTree[Any]:
    """The same with JAX's arrays for NumPy's, and for those that JAX itself makes of constants in derivatives."""

    def is_foreign(leaf: Any) -> bool:
        return hasattr(leaf, "dtype") and not isinstance(leaf, jax.Array)

    return map(lambda leaf: jnp.asarray(leaf) if is_foreign(leaf) else leaf, values)


def as_times(times: Any) -> Any:
    """Lists and tuples of times as arrays; anything else as it is."""
    if not isinstance(times, list | tuple):
        return times
    return jnp.asarray(times) if is_traced(*times) else np.asarray(times)


def size_in_bytes(tree: PyTree[Any]) -> int:
    """Bytes of all leaves together, from their shapes and dtypes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def real_dtype(dtype: DTypeLike) -> Any:
    """The dtype of the absolute value."""
    return jnp.finfo(dtype).dtype


def _are_alike(a: Any, b: Any) -> bool:
    """Whether an operation on both needs no conversion, and is part of a program."""
    return isinstance(a, Tracer) and isinstance(b, Tracer) and a.shape == b.shape and a.dtype == b.dtype


def _cast(factor: ArrayLike, leaf: Array) -> Array | float:
    return factor if isinstance(factor, float) else jax.lax.convert_element_type(factor, real_dtype(leaf.dtype))
