"""What is known of lanes while a program is traced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import lotka_volterra

import adjoint_jax as aj
from adjoint_jax import kernels
from adjoint_jax.lanes import apart, are_lanes, in_lanes, put, put_block, slots_first
from adjoint_jax.saveat import Rows

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


def test_writing_at_an_index_that_lanes_share_is_no_scatter():
    def filled(x):
        rows = jnp.zeros((5, 2)), jnp.zeros(5, jnp.int32)
        return jax.lax.fori_loop(0, 5, lambda i, r: slots_first(put(r, i, (i * x, i.astype(jnp.int32)))), rows)

    xs = jnp.stack([X[:2], X[1:]])
    assert "scatter" not in jax.jit(jax.vmap(filled)).lower(xs).as_text()
    for lanes in (jax.vmap(filled), jax.jit(jax.vmap(filled))):
        values, counts = lanes(xs)
        np.testing.assert_array_equal(values, xs[:, None] * np.arange(5.0)[None, :, None])
        np.testing.assert_array_equal(counts, [np.arange(5)] * 2)
    slopes = jax.vmap(jax.jacfwd(lambda x: filled(x)[0]))(xs)
    np.testing.assert_array_equal(slopes, np.stack([np.arange(5.0)[:, None, None] * np.eye(2)] * 2))


def test_writing_at_an_index_of_each_lane():
    rows = jax.vmap(lambda i, x: put(jnp.zeros(3), i, x))(jnp.arange(3), X)
    np.testing.assert_array_equal(rows, np.diag(X))
    shared = jax.vmap(lambda i: put_block(jnp.zeros(3), i, jnp.ones(2)))(jnp.arange(2))
    np.testing.assert_array_equal(shared, [[1, 1, 0], [0, 1, 1]])


@pytest.mark.parametrize("direction", [1.0, -1.0])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 100])
def test_rows_up_to_a_time(count, direction):
    """One time by bisection, those of lanes by looking at all rows; with repetitions, and with times on rows."""
    ts = direction * np.sort(np.random.default_rng(count).integers(0, 40, count) / 4)
    times = direction * np.arange(-1, 42) / 4
    rows, expected = Rows(jnp.asarray(ts), None), [np.sum(direction * ts <= direction * now) for now in times]
    until = jax.jit(lambda now: rows.until(now, jnp.array(direction)))
    np.testing.assert_array_equal([until(now) for now in times], expected)
    np.testing.assert_array_equal(jax.vmap(lambda now: rows.until(now, jnp.array(direction)))(times), expected)


def test_a_slot_of_all_lanes_lies_together():
    compiled = jax.jit(jax.vmap(lambda x: slots_first(put(jnp.zeros(7), jnp.int32(2), x)) + 1)).lower(X).compile()
    assert "f64[3,7]{0,1}" in compiled.as_text()


def rotated(x, p):
    return jax.lax.fori_loop(0, 3, lambda i, x: put(x, i % 2, jnp.sin(x[1]) * p[0]) + p * x, x)


def same(function):
    return function


def chosen(function):
    return in_lanes(function, function)


def blockwise(function):
    return lambda *operands: kernels.in_blocks(function, *operands)


@pytest.mark.parametrize("how", [same, chosen, blockwise])
def test_second_derivatives_within_scan(how):
    """With a derivative of its own, as a solve has. JAX before 0.12 loses rules there."""

    @jax.custom_vjp
    def function(x, p):
        return how(rotated)(x, p)

    def backward(kept, cotangent):
        return how(lambda x, p, g: jax.vjp(rotated, x, p)[1](g))(*kept, cotangent)

    function.defvjp(lambda x, p: how(lambda x, p: (rotated(x, p), (x, p)))(x, p), backward)

    def hessian(of):
        def total(p):
            return jnp.sum(jax.lax.map(lambda x: of(jnp.stack([x, 2 * x]), p), X) ** 2)

        return jax.jit(jax.hessian(total))(jnp.array([0.3, 0.4]))

    ours, expected = hessian(function), hessian(rotated)
    np.testing.assert_allclose(ours, expected, rtol=1e-13)


def test_second_derivatives_of_solves_within_scan():
    """Of the sum of exp(-2 w k) over factors w: that of 4 w^2 exp(-2 w k)."""
    factors = jnp.array([0.5, 1.0, 2.0])

    def total(k):
        def end(factor):
            options = {"controller": aj.PIDController(1e-9, 1e-9), "throw": False}
            return aj.solve(lambda t, y, k: -factor * k * y, 0.0, 1.0, jnp.ones(1), k, **options).ys[0]

        return jnp.sum(jax.lax.map(end, factors) ** 2)

    ours = jax.jit(jax.hessian(total))(jnp.array(0.7))
    np.testing.assert_allclose(ours, jnp.sum(4 * factors**2 * jnp.exp(-1.4 * factors)), rtol=1e-6)


def test_no_lanes_at_all():
    lanes = dict.fromkeys("abcd", jnp.zeros(0))
    value, gradient = jax.jit(jax.vmap(jax.value_and_grad(lambda rates: saved(rates, jnp.ones((30, 2))))))(lanes)
    assert value.shape == gradient["a"].shape == (0,)


def saved(rates, weights, t1=40.0):
    """A sum over 30 save times within some 700 steps, of which each lane rejects others."""
    ts = jnp.linspace(0.0, t1, 30)
    options = {"controller": aj.PIDController(1e-9, 1e-9), "saveat": aj.SaveAt(ts), "throw": False}
    return jnp.sum(weights * aj.solve(lotka_volterra, 0.0, t1, jnp.array([2.0, 0.5]), rates, **options).ys ** 2)


@pytest.mark.parametrize("number", [4, 5, pytest.param(11, marks=[pytest.mark.slow])])
def test_lanes_in_blocks(number, monkeypatch):
    """Of at most four, the last filled up. Every block goes its own way, and its gradient after it; in forward mode too,
    where one of both may have tangents alone."""
    monkeypatch.setattr(kernels, "LANES_TOGETHER", 4)
    scales = jnp.linspace(0.6, 1.7, number)
    lanes, weights = dict.fromkeys("abcd", scales), jnp.linspace(0.5, 1.5, 60).reshape(30, 2)
    gradient = jax.grad(saved)

    def along_weights(rates):
        return jax.jvp(lambda w: gradient(rates, w), (weights,), (jnp.cos(weights),))

    expected = jax.jit(lambda lanes: jax.lax.map(lambda rates: gradient(rates, weights), lanes))(lanes)
    moved = jax.jit(lambda lanes: jax.lax.map(lambda rates: gradient(rates, jnp.cos(weights)), lanes))(lanes)
    for ours, theirs in zip(jax.jit(jax.vmap(along_weights))(lanes), (expected, moved), strict=True):
        for name in lanes:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6)


@pytest.mark.parametrize("what", ["t1", "steps", "dense"])
def test_solve_and_gradient_agree_on_blocks_whatever_is_saved(what, monkeypatch):
    monkeypatch.setattr(kernels, "LANES_TOGETHER", 4)

    def loss(rates):
        options = {"controller": aj.PIDController(1e-9, 1e-9), "saveat": aj.SaveAt(**{what: True}), "throw": False}
        solution = aj.solve(lotka_volterra, 0.0, 40.0, jnp.array([2.0, 0.5]), rates, max_steps=2048, **options)
        ys = jax.vmap(solution.evaluate)(jnp.linspace(1.0, 39.0, 7)) if what == "dense" else solution.ys
        return jnp.sum(jnp.where(jnp.isfinite(ys), ys, 0.0) ** 2) / (1 + solution.stats.accepted)

    lanes = {name: jnp.linspace(0.6, 1.7, 11) for name in "abcd"}
    ours = jax.jit(jax.vmap(jax.grad(loss)))(lanes)
    expected = jax.jit(lambda lanes: jax.lax.map(jax.grad(loss), lanes))(lanes)
    for name in lanes:
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-5)


def outputs(rates, adjoint=aj.DiscreteAdjoint()):
    """Six numbers, within some 100 steps."""
    options = {"controller": aj.PIDController(1e-6, 1e-6), "saveat": aj.SaveAt(jnp.linspace(0.0, 7.0, 3)), "throw": False}
    return aj.solve(lotka_volterra, 0.0, 7.0, jnp.array([2.0, 0.5]), rates, adjoint=adjoint, **options).ys.ravel()


DERIVATIVES = {
    "lanes of cotangents": jax.jacrev(outputs),
    "lanes of tangents": jax.jacfwd(functools.partial(outputs, adjoint=aj.ForwardMode())),
    "lanes of lanes": jax.vmap(jax.grad(lambda rates: jnp.sum(outputs(rates) ** 2))),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_lanes_within_lanes_in_blocks(name, monkeypatch):
    """A derivative has lanes that the solve had not, in blocks of their own: on the way back they read what the solve has
    recorded, in blocks of the lanes around them."""
    monkeypatch.setattr(kernels, "LANES_TOGETHER", 4)
    of_one, scales = DERIVATIVES[name], jnp.linspace(0.6, 1.7, 6)
    if name == "lanes of lanes":
        scales = scales[:, None] * jnp.linspace(0.9, 1.1, 3)
    lanes = dict.fromkeys("abcd", scales)
    ours = jax.jit(jax.vmap(of_one))(lanes)
    expected = jax.jit(lambda lanes: jax.lax.map(of_one, lanes))(lanes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ours, expected)
