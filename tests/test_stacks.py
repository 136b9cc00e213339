"""Long stacks of scalars as selections: the same values and derivatives, in fewer kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adjoint_jax as aj
from adjoint_jax.hoisting import hoisted
from adjoint_jax.stacks import MOST_FUSED, MOST_SELECTED, with_selections

EQUATIONS = 12


def chain(t, y, args):
    """Reactions in a chain, every equation by itself."""
    flows = [rate * y[i] * jnp.cos(t) for i, rate in enumerate(args)]
    return [before - after for before, after in zip([0.0, *flows], flows, strict=False)]


def stacked(t, y, args):
    return jnp.stack([jnp.asarray(entry, y.dtype) for entry in chain(t, y, args)])


def as_array(t, y, args):
    return jnp.array(chain(t, y, args))


@jax.jit
def jitted(t, y, args):
    return stacked(t, y, args)


def as_matrix(t, y, args):
    return jnp.concatenate([jnp.reshape(entry, (1, 1)) for entry in stacked(t, y, args)], axis=1)[0]


def of_parts(t, y, args):
    return {"parts": stacked(t, y["parts"], args), "rest": -y["rest"]}


def inputs(dtype=np.float64):
    random = np.random.default_rng(0)
    y, rates = random.uniform(0.5, 1.5, (2, EQUATIONS))
    return jnp.asarray(0.3, dtype), jnp.asarray(y, dtype), jnp.asarray(rates, dtype)


def names(jaxpr):
    """Of the primitives of a program, also in what it calls."""
    called = [value.jaxpr for equation in jaxpr.eqns for value in equation.params.values() if hasattr(value, "jaxpr")]
    return {equation.primitive.name for equation in jaxpr.eqns}.union(*map(names, called))


@pytest.mark.parametrize("field", [stacked, as_array, jitted, as_matrix])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_and_derivatives_are_those_of_the_stack(field, dtype):
    t, y, rates = inputs(dtype)
    selecting = with_selections(hoisted(field, t, y, rates), t, y, rates)
    for derive in (lambda f: f, jax.jacfwd, jax.jacrev):
        for of in (lambda f: lambda y: f(t, y, rates), lambda f: lambda rates: f(t, y, rates)):
            wanted, got = derive(of(field))(y), derive(of(selecting))(y)
            assert got.dtype == wanted.dtype == dtype
            np.testing.assert_allclose(got, wanted, rtol=4 * np.finfo(dtype).eps, atol=np.finfo(dtype).eps)
    assert not {"concatenate", "stack"} & names(jax.make_jaxpr(selecting)(t, y, rates).jaxpr)


@pytest.mark.parametrize("length", [MOST_FUSED, MOST_SELECTED + 1])
def test_short_and_very_long_stacks_stay(length):
    t, y = jnp.zeros(()), jnp.ones(length)
    function = hoisted(lambda t, y, args: jax.lax.concatenate([2 * y[i : i + 1] for i in range(length)], 0), t, y, None)
    assert with_selections(function, t, y, None) is function


def test_stacks_of_rows_stay():
    t, y = jnp.zeros(()), jnp.ones((EQUATIONS, 100))
    function = hoisted(lambda t, y, args: jnp.stack([2 * y[i] for i in range(EQUATIONS)]), t, y, None)
    assert with_selections(function, t, y, None) is function


def test_stacks_of_unequal_parts_stay():
    """Twelve parts of twelve entries in all."""
    t, y = jnp.zeros(()), jnp.ones(EQUATIONS)
    parts = [(0, 0), (0, 2), *((i, i + 1) for i in range(2, EQUATIONS))]
    function = hoisted(lambda t, y, args: jax.lax.concatenate([2 * y[a:b] for a, b in parts], 0), t, y, None)
    assert with_selections(function, t, y, None) is function
    np.testing.assert_array_equal(function(t, y, None), 2.0)


def test_derivatives_of_their_own_are_kept():
    @jax.custom_jvp
    def twice(x):
        return 2 * x

    twice.defjvp(lambda primals, tangents: (twice(*primals), 100 * tangents[0]))
    t, y = jnp.zeros(()), jnp.ones(EQUATIONS)
    function = hoisted(lambda t, y, args: jnp.stack([twice(y[i]) for i in range(EQUATIONS)]), t, y, None)
    assert with_selections(function, t, y, None) is function


def solution(field, y0, rates):
    saveat = aj.SaveAt(np.linspace(0.0, 1.0, 4))
    return aj.solve(field, 0.0, 1.0, y0, rates, solver=aj.Rodas5P(), saveat=saveat).ys


def test_solves_and_gradients_are_the_same():
    _, y, rates = inputs()

    def loss(rates, field):
        y0 = {"parts": y, "rest": jnp.ones(3)}
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(solution(field, y0, rates)))

    def vectorised(t, y, args):
        flows = args * y["parts"] * jnp.cos(t)
        return {"parts": jnp.concatenate([jnp.zeros(1), flows[:-1]]) - flows, "rest": -y["rest"]}

    got, wanted = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(rates, f) for f in (of_parts, vectorised))
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-12)
    np.testing.assert_allclose(got[1], wanted[1], rtol=1e-9)


def kernels(field, y, rates):
    def run(y, rates):
        return solution(field, y, rates)

    return jax.jit(run).lower(y, rates).compile().as_text().count(" fusion(")


def test_a_solve_is_fewer_kernels():
    """In the loop over a step's stages, and wherever else the field is evaluated: one for each of its equations."""
    _, y, rates = inputs()

    same = jax.custom_jvp(lambda x: x)
    same.defjvps(lambda tangent, result, x: tangent)

    def kept(t, y, args):
        """No selections are made where something has a derivative of its own."""
        return stacked(t, same(y), args)

    assert kernels(stacked, y, rates) <= kernels(kept, y, rates) - 3 * EQUATIONS
