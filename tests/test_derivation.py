"""What need not be kept with other results, since it follows from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adjoint_jax as aj
from adjoint_jax import derivation
from adjoint_jax.derivation import Derivation
from adjoint_jax.diagnostics import memory_plan
from adjoint_jax.hoisting import computed, results_of
from adjoint_jax.problem import Problem, hoist
from adjoint_jax.solvers.linearisation import Linearisation
from adjoint_jax.solvers.solver import pullback_at

X, Y = (jnp.asarray(np.random.default_rng(seed).normal(size=4)) for seed in range(2))
W, V = (jnp.asarray(np.random.default_rng(seed).normal(size=(4, 4))) / 2 for seed in range(2, 4))


def normalised(h):
    return (h - h.mean()) / jnp.sqrt(h.var() + 1e-5)


FIELDS = {
    "tanh": lambda t, y, w: jnp.tanh(jnp.tanh(y @ w[0]) @ w[1]),
    "gelu": lambda t, y, w: jax.nn.gelu(y @ w[0]) @ w[1],
    "silu": lambda t, y, w: jax.nn.silu(jnp.cos(t) * y @ w[0]) @ w[1],
    "softplus": lambda t, y, w: jax.nn.softplus(y @ w[0]) @ w[1],
    "relu": lambda t, y, w: jax.nn.relu(y @ w[0]) @ w[1],
    "normalised": lambda t, y, w: jnp.tanh(normalised(y) @ w[0]) @ w[1],
    "gated": lambda t, y, w: jnp.tanh(y @ w[0]) * jnp.sin(y) - (y * y) @ w[1],
    "squared weights": lambda t, y, w: jnp.tanh(y @ (w[0] * w[0])) * w[1][0] ** 3,
    "loop": lambda t, y, w: jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ w[0]), y * t) @ w[1],
}


def derived(function, *operands, known=()):
    """The program, what it keeps and the equations that lead to the rest. `known`: the positions of known operands."""
    program = jax.make_jaxpr(function)(*operands).jaxpr
    return program, Derivation.of(program, [program.invars[i] for i in known])


def restored(function, *operands, known=()):
    """All results, of which only those that are kept are known, besides the known operands."""
    program, (kept, equations) = derived(function, *operands, known=known)
    results = function(*operands)
    values = {program.invars[i]: operands[i] for i in known} | {program.outvars[i]: results[i] for i in kept}
    return results_of(equations, values, program.outvars, computed)


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (lambda x, y: (jnp.tanh(x), 1 - jnp.tanh(x)), [0, 1]),
        (lambda x, y: (z := jnp.tanh(x), 1 - z), [0]),
        (lambda x, y: (1 - (z := jnp.tanh(x)), z), [1]),
        (lambda x, y: (z := jnp.exp(x), jnp.log(z), (z * z - 1) * z), [0, 1]),
        (lambda x, y: (z := jnp.exp(x), z, 2 * z, 3 * (2 * z)), [0]),
        (lambda x, y: (x, y, x * y, x + y + 1), [0, 1]),
        (lambda x, y: (x * y, jnp.exp(x * y)), [0, 1]),
        (lambda x, y: (x, jnp.broadcast_to(x[None], (3, 4)), jnp.sum(x)), [0, 2]),
        (lambda x, y: (x > 0, jnp.where(x > 0, x, 0)), [0, 1]),
        (lambda x, y: (jnp.ones(3), x), [1]),
    ],
)
def test_kept_is_what_the_others_do_not_follow_from(function, kept):
    assert derived(function, X, Y)[1].kept == kept
    for got, expected in zip(restored(function, X, Y), function(X, Y), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_what_follows_from_known_operands_is_not_kept():
    def function(x, y):
        z = jnp.exp(x)
        return y, x * y, z, z * y

    assert derived(function, X, Y, known=[1])[1].kept == [1, 2]
    for got, expected in zip(restored(function, X, Y, known=[1]), function(X, Y), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_long_derivations_are_none():
    def function(x, y):
        z = x
        for _ in range(derivation.MOST_EQUATIONS):
            z = z * y
        return x, y, z, z * y

    assert derived(function, X, Y)[1].kept == [0, 1]
    program, (kept, _) = derived(lambda x, y: (x, y, function(x, y)[3]), X, Y)
    assert kept == [0, 1, 2], program


def test_long_chains_are_given_up_soon():
    """A chain of squares has two ways from every link to the one before, 2^200 in all."""

    def function(x, y):
        for _ in range(200):
            x = x * x
        return y, x

    assert derived(function, X, Y)[1].kept == [0, 1]


def linearised(name):
    """The linearisation of a field, and all that it keeps at some point."""
    weights, t = [W, V], jnp.asarray(0.3)
    problem = Problem(hoist(FIELDS[name], t, X, weights), None, weights, X, t, t + 1)
    return Linearisation(problem), jax.tree.leaves(pullback_at(problem, t + 0.5, Y)[1])


@pytest.mark.parametrize("name", FIELDS)
def test_all_that_a_pullback_keeps_follows_from_its_residuals(name):
    linear, leaves = linearised(name)
    for got, expected in zip(linear.leaves(linear.residuals(leaves)), leaves, strict=True):
        assert isinstance(got, jax.Array)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ["tanh", "gelu", "silu", "normalised", "gated"])
def test_residuals_are_fewer_than_all_that_varies(name):
    linear, leaves = linearised(name)
    assert len(linear.residuals(leaves)) < sum(linear.varies)


def test_of_layers_their_values_alone_are_kept():
    """And the state before the step, and that of the stage; of no tanh one minus its square."""
    keep, adjoint = {"solver": aj.Euler(), "controller": aj.FixedSteps(1)}, aj.DiscreteAdjoint(keep=aj.KeepLinearisations())
    plan = memory_plan(FIELDS["tanh"], 0.0, 1.0, X, [W, V], adjoint=adjoint, **keep)
    assert plan.memory.kept[0].each == 4 * X.nbytes
