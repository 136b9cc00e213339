"""Programs in two halves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adjoint_jax.halves import Halves

W, X, V = (jnp.asarray(np.random.default_rng(seed).normal(size=shape)) for seed, shape in enumerate([(3, 4), 3, 4]))


def pulled(weights, x, cotangent):
    """What a layer's pullback does: of x, which is wanted at once, and of the weights; all linear in the cotangent."""
    inner = jax.jit(lambda c: jnp.cos(x @ weights) * c)(cotangent)
    return weights @ inner, jnp.outer(x, inner), cotangent, jnp.zeros(())


def halves(function, in_first, given, *operands):
    return Halves.of(jax.make_jaxpr(function)(*operands), in_first, given)


def layer():
    return halves(pulled, [True, False, False, False], [True, True, False], W, X, V)


def test_both_halves_together_are_the_program():
    (of_x,), passed = layer().first([W, X, V])
    expected = pulled(W, X, V)
    for got, want in zip([of_x, *layer().second([W, X, None], passed)], expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-14)


def test_what_is_passed_on_is_what_the_second_half_needs():
    """The cotangent itself, and that inside; not the cosine, which depends on what both are given alone; and no product of
    a column and a row, which nothing in the first half needs."""
    assert [variable.aval.shape for variable in layer().passed] == [(4,), (4,)]
    first, second = layer().equations
    names = [[equation.primitive.name for equation in half] for half in (first, second)]
    assert "cos" in names[0]
    assert "cos" not in names[1]
    assert (3, 4) not in [equation.outvars[0].aval.shape for equation in first]


def test_what_the_second_half_computes_of_given_operands_is_not_passed_on():
    def function(x, c):
        scaled = jnp.exp(x) * c
        return jnp.sum(scaled), jnp.exp(x) * c[::-1]

    two = halves(function, [True, False], [True, False], X, X)
    (total,), passed = two.first([X, X])
    assert len(passed) == 1
    assert passed[0] is X
    np.testing.assert_allclose(two.second([X, None], passed)[0], jnp.exp(X) * X[::-1])
    np.testing.assert_allclose(total, jnp.sum(jnp.exp(X) * X))


@pytest.mark.parametrize("in_first", [True, False])
def test_one_half_may_be_empty(in_first):
    two = halves(lambda x, c: (x * c, 2 * c), [in_first] * 2, [True, False], X, X)
    first, passed = two.first([X, X])
    results = first if in_first else two.second([X, None], passed)
    assert (len(first), len(passed)) == (2 * in_first, not in_first)
    np.testing.assert_allclose(results, (X * X, 2 * X))
