"""What is known of lanes while a program is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import lotka_volterra

import adjoint_jax as aj
from adjoint_jax.lanes import apart, are_lanes

X = jnp.arange(1.0, 4.0)


def noticed(transformed):
    """Whether lanes are seen where a function squares a number."""
    answers = []

    def square(x):
        answers.append(are_lanes({"x": x, "n": 3}))
        return x**2

    transformed(square)(X if transformed is not jax.grad else 2.0)
    return answers


@pytest.mark.parametrize(
    ("transformed", "expected"),
    [
        (lambda f: f, False),
        (jax.jit, False),
        (jax.grad, False),
        (jax.vmap, True),
        (lambda f: jax.jit(jax.vmap(f)), True),
        (lambda f: jax.vmap(jax.grad(f)), True),
        (lambda f: jax.vmap(jax.jit(f)), False),
    ],
    ids=["plain", "jit", "grad", "vmap", "jit of vmap", "vmap of grad", "vmap of jit"],
)
def test_lanes_are_seen_unless_a_jit_hides_them(transformed, expected):
    assert noticed(transformed) == [expected]


def test_own_values_are_the_same_values():
    def shifted(x):
        own, shared, count = apart((x, jnp.ones(2), jnp.int32(7)))
        return own * shared, count

    values, counts = jax.vmap(shifted)(X)
    np.testing.assert_array_equal(values, X[:, None] * np.ones((1, 2)))
    np.testing.assert_array_equal(counts, [7, 7, 7])


def test_derivatives_of_own_values():
    """In forward mode, where lanes differ in tangents alone."""

    def twice(x):
        own, _, still = apart((x, jnp.int32(1), jnp.zeros(2)))
        return jnp.concatenate([own * own, still])

    expected = np.concatenate([2 * np.diag(X), np.zeros((2, 3))])
    np.testing.assert_array_equal(jax.jacfwd(twice)(X), expected)
    np.testing.assert_array_equal(jax.vmap(jax.jacfwd(twice))(jnp.stack([X, X]))[1], expected)


def test_lanes_that_are_not_seen_have_the_same_gradients():
    """Over more steps than those of one segment: seen lanes choose their steps again, others know all times."""

    def solve(rates):
        options = {"controller": aj.PIDController(1e-9, 1e-9), "throw": False}
        return aj.solve(lotka_volterra, 0.0, 40.0, jnp.array([2.0, 0.5]), rates, **options)

    def loss(rates):
        return jnp.sum(solve(rates).ys ** 2)

    lanes = {name: jnp.array([1.0, 1.2, 0.8]) for name in "abcd"}
    assert jnp.all(jax.jit(jax.vmap(solve))(lanes).stats.accepted > 256)
    seen, not_seen = jax.jit(jax.vmap(jax.grad(loss)))(lanes), jax.vmap(jax.jit(jax.grad(loss)))(lanes)
    one = jax.jit(jax.grad(loss))({name: rates[1] for name, rates in lanes.items()})
    for name in lanes:
        np.testing.assert_allclose(seen[name], not_seen[name], rtol=1e-12)
        np.testing.assert_allclose(seen[name][1], one[name], rtol=1e-9)
