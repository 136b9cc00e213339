"""Derivatives with respect to many parameters, computed of the stages of several steps together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import Program
from problems import compare, jit

import adjoint_jax as aj
from adjoint_jax.adjoints.gathering import AtOnce, Together
from adjoint_jax.problem import Problem, hoist

WIDE = 40
generator = np.random.default_rng(0)
Y0 = jnp.asarray(generator.normal(size=3))
WEIGHTS = {
    "in": generator.normal(size=(3, WIDE)) / 2,
    "bias": generator.normal(size=WIDE),
    "inner": generator.normal(size=(WIDE, WIDE)) / WIDE,
    "out": generator.normal(size=(WIDE, 3)) / WIDE,
    "scale": np.array(0.7),
    "unused": generator.normal(size=5),
}
WEIGHTS = jax.tree.map(jnp.asarray, WEIGHTS)


def perceptron(t, y, w):
    """Weights used twice, one parameter in every equation, one in none, and the time."""
    hidden = jnp.tanh(y @ w["in"] + jnp.sin(t) * w["bias"])
    return w["scale"] * (jax.nn.silu(hidden @ w["inner"] @ w["inner"]) @ w["out"])


def of_no_state(t, y, w):
    """What its pullback keeps is the same everywhere."""
    return jnp.ones(3) @ w["in"] @ w["out"]


def in_a_loop(t, y, w):
    hidden = jax.lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ w["inner"]), y @ w["in"])
    return hidden @ w["out"]


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1e-3, 1e-3),))


def with_a_pullback_of_its_own(t, y, w):
    return clipped(jnp.tanh(clipped(y @ w["in"]) @ w["inner"])) @ w["out"]


def convolution(t, y, w):
    image = jnp.tanh(y @ w["in"]).reshape(1, 5, 8, 1)
    kernel = w["inner"][:9, :4].reshape(3, 3, 1, 4)
    dimensions = jax.lax.conv_dimension_numbers(image.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    filtered = jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
    return jnp.sum(jnp.tanh(filtered), axis=-1).ravel() @ w["out"]


FIELDS = {
    "perceptron": (perceptron, Together),
    "convolution": (convolution, Together),
    "of no state": (of_no_state, Together),
    "in a loop": (in_a_loop, AtOnce),
    "with a pullback of its own": (with_a_pullback_of_its_own, AtOnce),
}
KEEP = aj.KeepLinearisations()


@pytest.mark.parametrize("name", FIELDS)
def test_where_the_second_half_of_a_pullback_is_linear_and_smaller_than_parameters(name):
    field, kind = FIELDS[name]
    zero = jnp.zeros(())
    problem = Problem(hoist(field, zero, Y0, WEIGHTS), None, WEIGHTS, Y0, zero, zero + 1)
    assert isinstance(KEEP.gathering(problem, aj.RK4(), interpolated=False), kind)
    batch = jnp.tile(Y0, (50, 1))
    many = Problem(hoist(perceptron, zero, batch, WEIGHTS), None, WEIGHTS, batch, zero, zero + 1)
    assert isinstance(KEEP.gathering(many, aj.RK4(), interpolated=False), AtOnce)


GRID = {"solver": aj.RK4(), "controller": aj.FixedSteps(11)}
ADAPTIVE = {"controller": aj.PIDController(1e-4, 1e-4), "saveat": aj.SaveAt(np.array([0.0, 0.3, 0.31, 2.0]))}
"""With rejected steps."""


def loss(y0, weights, scale, field, keep, options):
    solution = aj.solve(field, 0.0, 2.0, y0 * scale, weights, adjoint=aj.DiscreteAdjoint(keep=keep), **options)
    return sum(map(jnp.sum, jax.tree.leaves((solution.ys**2, solution.cost))))


def effort(t, y, w):
    return jnp.sum(jnp.tanh(y @ w["in"]) @ w["inner"]) ** 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("perceptron", GRID),
        ("convolution", GRID),
        ("of no state", GRID),
        pytest.param("in a loop", GRID, marks=[pytest.mark.slow]),
        ("with a pullback of its own", GRID),
        ("perceptron", ADAPTIVE),
        ("perceptron", {**GRID, "running_cost": effort}),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
@pytest.mark.parametrize("bytes", [2**24, pytest.param(2**15, marks=[pytest.mark.slow])])
def test_gradients_are_those_from_states(name, options, bytes):
    """The smaller number: a few steps are kept at a time, others are taken again."""
    field = FIELDS[name][0]

    def gradient(keep):
        of_inputs = jax.grad(functools.partial(loss, field=field, keep=keep, options=options), (0, 1, 2))
        return jit(of_inputs)(Y0, WEIGHTS, jnp.ones(()))

    got, expected = gradient(aj.KeepLinearisations(bytes)), gradient(aj.KeepStates())
    compare(got, expected, 1e-11)


def test_lanes_and_one_that_fails():
    """A lane whose field is not finite has no effect on others, in values and in gradients."""

    def field(t, y, w):
        return perceptron(t, y, w) / jnp.where(jnp.abs(y[0]) > 100, 0.0, 1.0)

    def gradients(keep):
        options = {**ADAPTIVE, "throw": False}
        one = jax.value_and_grad(functools.partial(loss, field=field, keep=keep, options=options), (0, 1))
        return jit(jax.vmap(lambda scale: one(Y0, WEIGHTS, scale)))(jnp.array([1.0, 1e6, -2.0]))

    got, expected = gradients(KEEP), gradients(aj.KeepStates())
    assert np.isnan(got[0][1])
    compare(*(jax.tree.map(lambda leaf: leaf[np.array([0, 2])], of_all) for of_all in (got, expected)), 1e-10)


def test_single_precision_and_complex_numbers():
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.complex128) * (1 + 0.3j), WEIGHTS)

    def turning(t, y, w):
        return jnp.tanh(y @ w["in"]) @ w["inner"] @ w["out"]

    def measured(weights, y0, keep):
        adjoint = aj.DiscreteAdjoint(keep=keep)
        return jnp.sum(jnp.abs(aj.solve(turning, 0.0, 1.0, y0, weights, adjoint=adjoint, **GRID).ys) ** 2)

    for w, y0, rtol in ((weights, Y0 + 0j, 1e-11), (jax.tree.map(jnp.float32, WEIGHTS), jnp.float32(Y0), 1e-4)):
        got, expected = (jit(jax.grad(functools.partial(measured, keep=keep)))(w, y0) for keep in (KEEP, aj.KeepStates()))
        compare(got, expected, rtol)


def test_products_of_matrices_instead_of_products_of_vectors():
    """In the compiled gradient of a network on one sample, nothing in the loop over steps is as large as the weights; once
    for some steps there is one product for every layer, the sum itself or an addition to it."""
    width, steps = 64, 24
    weights = [jnp.ones((3, width)) / 3, jnp.ones((width, width)) / width, jnp.ones((width, 3)) / width]

    def final(weights):
        def field(t, y, w):
            return jnp.tanh(jnp.tanh(y @ w[0]) @ w[1]) @ w[2]

        return jnp.sum(aj.solve(field, 0.0, 1.0, Y0, weights, solver=aj.RK4(), controller=aj.FixedSteps(steps)).ys)

    program = Program(jax.jit(jax.grad(final)).lower(weights).compile())
    of_weights = f"[{width},{width}]"
    products = [i for i in program.all() if i.operation == "dot" and of_weights in i.shape]
    assert len(products) == 2
    assert sum(sum(i.name == product.name for i in body) for body in program.loops().values() for product in products) == 2
    for name, body in program.loops().items():
        computed = [i for i in body if i.shape.startswith(f"f64{of_weights}") and i.operation != "get-tuple-element"]
        assert bool(computed) == any(i.name == products[0].name for i in body), name


def test_forward_mode_of_the_gradient():
    def product(keep):
        gradient = jax.grad(functools.partial(loss, field=perceptron, keep=keep, options=GRID), (0, 1))
        direction = jax.tree.map(jnp.cos, (Y0, WEIGHTS))
        return jit(lambda: jax.jvp(lambda y0, w: gradient(y0, w, jnp.ones(())), (Y0, WEIGHTS), direction)[1])()

    compare(product(KEEP), product(aj.KeepStates()), 1e-10)
