"""Arithmetic on pytrees, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adjoint_jax import tree


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
@pytest.mark.parametrize(("count", "size"), [(0, 3), (1, 2**17), (7, 3), (7, 2**17), (tree.MOST_SUMMED + 1, 2**15)])
def test_contractions_are_those_of_numpy(count, size, dtype):
    """Of small rows, of large ones, of none and of many; and their derivatives."""
    random = np.random.default_rng(0)
    weights, rows = random.normal(size=count), random.normal(size=(count, size)).astype(dtype)
    if dtype == np.complex128:
        rows = rows * (1 + 2j)
    contracted = tree.contract(jnp.asarray(weights), {"leaf": jnp.asarray(rows)})["leaf"]
    assert contracted.dtype == dtype
    scale = np.finfo(dtype).eps * (1 + np.abs(rows).sum(axis=0).max(initial=0) * np.abs(weights).max(initial=0))
    np.testing.assert_allclose(contracted, np.tensordot(weights, rows, 1), rtol=0, atol=scale)
    pulled = jax.vjp(lambda rows: tree.contract(jnp.asarray(weights), rows), jnp.asarray(rows))[1](jnp.ones(size, dtype))[0]
    np.testing.assert_allclose(pulled, weights[:, None] * np.ones(size), rtol=1e-6)


@pytest.mark.parametrize(("bytes_of_row", "reduces"), [(tree.LARGE_ROW_BYTES - 8, True), (tree.LARGE_ROW_BYTES, False)])
def test_large_rows_are_not_reduced(bytes_of_row, reduces):
    program = jax.make_jaxpr(tree.contract)(jnp.ones(7), jnp.ones((7, bytes_of_row // 8)))
    assert ("reduce_sum" in {equation.primitive.name for equation in program.jaxpr.eqns}) is reduces


def test_rows_and_blocks():
    rows, indices = jnp.arange(6.0).reshape(3, 2), jnp.array([2, 0, 7])
    np.testing.assert_array_equal(tree.take_rows(rows, indices), rows[np.array([2, 0, 2])])
    np.testing.assert_array_equal(tree.take_rows(rows[1:2], indices), rows[np.array([1, 1, 1])])
    numbers = np.arange(20)
    np.testing.assert_array_equal(jax.vmap(lambda n: tree.quotient(n, 7))(numbers), numbers // 7)
    np.testing.assert_array_equal(jax.vmap(lambda n: tree.remainder(n, 7))(numbers), numbers % 7)
    np.testing.assert_array_equal(jax.vmap(lambda n: tree.blocks(n, 7))(numbers), np.ceil(numbers / 7))
