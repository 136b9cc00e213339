"""What is read off traced programs."""

import jax
import jax.numpy as jnp
import pytest

from adjoint_jax.hoisting import PRODUCTS, contains

Y = jnp.ones((3, 3))


@jax.custom_jvp
def squared(y):
    return y @ y


squared.defjvp(lambda primals, tangents: (squared(*primals), primals[0] @ tangents[0] + tangents[0] @ primals[0]))


@pytest.mark.parametrize(
    ("function", "multiplies"),
    [
        (lambda y: y @ y, True),
        (jax.jit(lambda y: jnp.sin(y @ y)), True),
        (lambda y: jax.lax.cond(y[0, 0] > 0, lambda y: y @ y, lambda y: y, y), True),
        (lambda y: jax.lax.fori_loop(0, 3, lambda _, y: y @ y, y), True),
        (lambda y: jnp.convolve(y[0], y[1]), True),
        (squared, True),
        (jax.jit(lambda y: jnp.tanh(y) * jnp.roll(y, 1) + jnp.sum(y)), False),
    ],
)
def test_products_of_matrices_are_found_wherever_they_are(function, multiplies):
    assert contains(jax.make_jaxpr(function)(Y).jaxpr, PRODUCTS) is multiplies
