"""The contract of gradients: every adjoint, on every kind of problem, with respect to every input, for every observation.

A loss is a weighted sum of functions of the row at t0, of those at ts, of that at t1, and of the cost. The weights and the
tolerance are inputs of the program, so that each pair of an adjoint and a problem is compiled once, whatever is observed.
The references are the derivatives of true solutions. Much of the matrix, and most of what it gives in lanes and without
jit, is for `pytest -m slow`.
"""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from problems import PROBLEMS, compare, jit, measure, problem, running_cost

import adjoint_jax as aj

METHODS = {
    "discrete": (aj.Heun(), aj.DiscreteAdjoint()),
    "checkpoints": (aj.Heun(), aj.DiscreteAdjoint(checkpoints=3)),
    "reversible": (aj.Reversible(aj.Heun()), aj.ReversibleAdjoint()),
    "backsolve": (aj.Heun(), aj.BacksolveAdjoint()),
    "interpolating": (aj.Heun(), aj.InterpolatingAdjoint()),
    "gauss": (aj.Heun(), aj.GaussAdjoint()),
}
UNSTABLE = {("heat", "backsolve"), ("heat", "reversible")}
"""What cannot be: the reversed flow and the reversible method are unstable. They have tests of their own."""
SAME_AS_CHECKPOINTS = {(name, "discrete") for name in PROBLEMS if name != "lotka_volterra"}
"""Any number of checkpoints gives the same gradient: tested below."""
LONG = {"complex", "forced", "network", "mixed", "heat"}
"""Problems that take long to compile."""
MATRIX = [
    pytest.param(name, method, marks=[pytest.mark.slow] if name in LONG else [])
    for name in PROBLEMS
    for method in METHODS
    if (name, method) not in UNSTABLE | SAME_AS_CHECKPOINTS
]
ROWS = 7
RANDOM = np.random.default_rng(7).uniform(0.5, 1.5, ROWS + 1) * np.array([1, -1, 1, 1, -1, 1, 1, 1])


def observing(*places):
    weights = np.zeros(ROWS + 1)
    weights[list(places)] = RANDOM[list(places)]
    return weights


OBSERVED = {
    "everything": RANDOM,
    "terminal": observing(6),
    "ends": observing(0, 6),
    "ts": observing(1, 2, 3, 4, 5),
    "cost": observing(7),
}
"""Weights of the rows at t0, at ts (which are t0, two times, the latter again, and t1) and at t1, and of the cost."""


def contract_problem(name):
    case = problem(name)
    return case._replace(inputs={**case.inputs, "price": jnp.array(0.8)})


def total(weights, ys, cost):
    return jnp.dot(weights, jnp.append(jax.vmap(measure)(ys, jnp.arange(1.0 * ROWS)), cost))


def loss(case, solver, adjoint, inputs, weights, tolerance):
    field, args = case.make(inputs["theta"])
    solution = aj.solve(
        field,
        inputs["t0"],
        inputs["t1"],
        inputs["y0"],
        args,
        solver=solver,
        controller=aj.PIDController(rtol=tolerance, atol=tolerance),
        saveat=aj.SaveAt(inputs["ts"], t0=True, t1=True),
        adjoint=adjoint,
        running_cost=running_cost(inputs["price"]),
        max_steps=16384,
        throw=False,
    )
    return total(weights, solution.ys, solution.cost)


def true_loss(case, inputs, weights):
    """The cost by Gauss-Legendre quadrature along the true solution."""
    t0, t1 = inputs["t0"], inputs["t1"]
    points, quadrature = np.polynomial.legendre.leggauss(40)
    nodes = t0 + (t1 - t0) * (1 + points) / 2
    states = jax.vmap(lambda t: case.flow(inputs, t))(jnp.concatenate([inputs["ts"], t1[None], nodes]))
    ys = jax.tree.map(lambda y, rest: jnp.concatenate([y[None], rest[: ROWS - 1]]), inputs["y0"], states)
    along = jax.tree.map(lambda leaf: leaf[ROWS - 1 :], states)
    _, args = case.make(inputs["theta"])
    rates = jax.vmap(running_cost(inputs["price"]), (0, 0, None))(nodes, along, args)
    return total(weights, ys, (t1 - t0) / 2 * jnp.dot(quadrature, rates))


@functools.cache
def true_gradient(name):
    case = contract_problem(name)
    program = jit(jax.grad(functools.partial(true_loss, case)))
    return {observed: program(case.inputs, weights) for observed, weights in OBSERVED.items()}


@functools.cache
def gradient_program(name, method):
    case = contract_problem(name)
    program = jit(jax.grad(functools.partial(loss, case, *METHODS[method])))
    return lambda observed, tolerance: program(case.inputs, OBSERVED[observed], tolerance)


def errors(got, expected, slope):
    """Of every input's gradient, relative to its largest entry; for t0, to the terms of <dJ/dy0, dy/dt>, which dJ/dt0 holds
    and which may cancel each other."""

    def leaves(key):
        return [
            (np.asarray(a), np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (got[key], expected[key])), strict=True)
        ]

    def error(pairs, scale):
        return max((np.max(np.abs(a - b), initial=0.0) for a, b in pairs), default=0.0) / (scale + 1e-3)

    scales = {key: max((np.max(np.abs(b), initial=0.0) for _, b in leaves(key)), default=0.0) for key in expected}
    of_t0 = [np.sum(np.abs(a * f)) for a, f in zip(*map(jax.tree.leaves, (expected["y0"], slope)), strict=True)]
    scales["t0"] = max(scales["t0"], *of_t0)
    return {key: error(leaves(key), scales[key]) for key in expected}


LARGEST = 300
"""An error in tolerances: global errors are sums of local ones, and derivatives of them."""


@pytest.mark.parametrize(("name", "method"), MATRIX)
def test_gradients_of_all_that_is_observed(name, method):
    """With respect to y0, leaves of the field, args, values that field and cost close over, t0, t1, and each of ts."""
    case, gradient = contract_problem(name), gradient_program(name, method)
    field, args = case.make(case.inputs["theta"])
    slope = field(case.inputs["t0"], case.inputs["y0"], args)

    def worst(observed, tolerance):
        return max(errors(gradient(observed, tolerance), true_gradient(name)[observed], slope).values())

    for observed in OBSERVED:
        assert worst(observed, 1e-6) < LARGEST * 1e-6, observed
    tight = worst("everything", 1e-8)
    assert tight < LARGEST * 1e-8
    assert tight < worst("everything", 1e-5) / 100


# What the matrix leaves out: no wrong number, but a failure that says what is the matter


@pytest.mark.parametrize(
    ("solver", "adjoint", "status"),
    [
        (aj.Tsit5(), aj.BacksolveAdjoint(), "REVERSE_DRIFT"),  # no state is saved on the way
        (aj.Reversible(aj.Heun()), aj.ReversibleAdjoint(), "MAX_STEPS_REACHED"),  # already forward: tiny steps are stable
        (aj.Reversible(aj.Heun(), 0.5), aj.ReversibleAdjoint(), "REVERSE_DRIFT"),  # rounding errors double in a step
    ],
)
def test_gradients_of_the_heat_equation_that_cannot_be(solver, adjoint, status):
    case = contract_problem("heat")

    def gradient(throw):
        def loss(theta):
            options = {"solver": solver, "adjoint": adjoint, "throw": throw}
            return aj.solve(*case.make(theta)[:1], 0.0, 1.5, case.inputs["y0"], theta, **options).ys.sum()

        return jax.block_until_ready(jit(jax.grad(loss))(case.inputs["theta"]))

    assert np.isnan(gradient(throw=False))
    with pytest.raises((aj.SolveError, jax.errors.JaxRuntimeError), match=status):
        gradient(throw=True)


# The same derivative by forward mode


def forward_gradient(fn, inputs):
    """`jax.grad` by forward mode: in JAX's convention, df/dx - i df/dy for a complex input x + i y."""
    parts = jax.tree.map(lambda leaf: (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,), inputs)

    def whole(part):
        return part[0] + 1j * part[1] if len(part) == 2 else part[0]

    def is_part(node):
        return isinstance(node, tuple) and all(isinstance(one, jax.Array) for one in node)

    flat, unravel = jax.flatten_util.ravel_pytree(parts)
    derivative = jax.jacfwd(lambda flat: fn(jax.tree.map(whole, unravel(flat), is_leaf=is_part)))(flat)
    return jax.tree.map(lambda part: jnp.conj(whole(part)), unravel(derivative), is_leaf=is_part)


@pytest.mark.parametrize(
    ("name", "method"),
    [("forced", "discrete"), ("complex", "checkpoints"), ("backward", "reversible")],
)
def test_exact_adjoints_equal_forward_mode_to_rounding(name, method):
    case, solver = contract_problem(name), METHODS[method][0]

    @jit
    def forward(inputs, weights, tolerance):
        return forward_gradient(lambda i: loss(case, solver, aj.ForwardMode(), i, weights, tolerance), inputs)

    for observed in ("everything", "cost"):
        expected = forward(case.inputs, OBSERVED[observed], 1e-4)
        compare(gradient_program(name, method)(observed, 1e-4), expected, 1e-10, observed)


# Transformations


TOLERANCE = 1e-6
EVERY_METHOD = METHODS | {"forward mode": (aj.Heun(), aj.ForwardMode())}
QUICK = {("linear", "checkpoints")}
EVERY_PAIR = [
    pytest.param(name, method, marks=[] if (name, method) in QUICK else [pytest.mark.slow])
    for name in PROBLEMS
    for method in EVERY_METHOD
    if (name, method) not in UNSTABLE
]


def neighbour(inputs):
    """Other parameters and another initial state, at the same times."""
    return {
        key: value if key in ("t0", "t1", "ts") else jax.tree.map(lambda leaf: 1.3 * leaf, value)
        for key, value in inputs.items()
    }


@functools.cache
def true_gradients_in_lanes(name):
    case = contract_problem(name)
    gradient = jit(jax.vmap(jax.grad(functools.partial(true_loss, case))))
    return gradient(lanes_of(case.inputs), WEIGHTS)


def lanes_of(inputs):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), inputs, neighbour(inputs))


WEIGHTS = np.stack([OBSERVED["everything"], OBSERVED["ts"]])


@pytest.mark.parametrize(("name", "method"), EVERY_PAIR)
def test_every_gradient_under_every_transformation(name, method):
    """vmap of grad and grad of vmap, of lanes that differ in all but times; and grad without jit."""
    case, expected = contract_problem(name), true_gradients_in_lanes(name)
    value = functools.partial(loss, case, *EVERY_METHOD[method])

    def gradient(value, inputs):
        return forward_gradient(value, inputs) if method == "forward mode" else jax.grad(value)(inputs)

    def alone(inputs, weights):
        return gradient(lambda inputs: value(inputs, weights, TOLERANCE), inputs)

    def of_sum(inputs, weights):
        return gradient(lambda inputs: jnp.sum(jax.vmap(value, (0, 0, None))(inputs, weights, TOLERANCE)), inputs)

    lanes = lanes_of(case.inputs)
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], (lanes, expected)) for i in range(2))
    vmap_of_grad, grad_of_vmap = jit(jax.vmap(alone))(lanes, WEIGHTS), jit(of_sum)(lanes, WEIGHTS)
    compare(grad_of_vmap, vmap_of_grad, 1e-9)
    compare(alone(case.inputs, WEIGHTS[0]), jax.tree.map(lambda leaf: leaf[0], vmap_of_grad), 1e-9)
    for i, (inputs, truth) in enumerate((first, second)):
        field, args = case.make(inputs["theta"])
        slope = field(inputs["t0"], inputs["y0"], args)
        got = jax.tree.map(lambda leaf, i=i: leaf[i], vmap_of_grad)
        assert max(errors(got, truth, slope).values()) < LARGEST * TOLERANCE


# Checkpoints that divide what remains again and again


def ring(t, y, rate):
    """Thirty-two oscillators, each driven by its neighbour: states so large that segments are short."""
    x, v = y.reshape(2, -1)
    return jnp.concatenate([rate * v, -rate * jnp.sin(x) + 0.1 * jnp.sin(t) * jnp.roll(x, 1)])


RING = jnp.sin(jnp.arange(64.0))


def ring_loss(checkpoints, controller, rate, y0):
    options = {"adjoint": aj.DiscreteAdjoint(checkpoints=checkpoints), "solver": aj.Heun(), "max_steps": 1024}
    solution = aj.solve(ring, 0.0, 2.0, y0, rate, controller=controller, saveat=aj.SaveAt(jnp.array([0.3, 1.9])), **options)
    return measure(solution.ys), solution.stats.accepted


@functools.cache
def ring_gradients(checkpoints, grid):
    """Of one solve in 400 steps, or of lanes that choose their own."""
    controller = aj.FixedSteps(400) if grid else aj.PIDController(rtol=1e-5, atol=1e-5)
    gradient = jax.grad(functools.partial(ring_loss, checkpoints, controller), (0, 1), has_aux=True)
    return jit(gradient if grid else jax.vmap(gradient, (0, None)))(3.0 if grid else jnp.array([0.4, 3.0, 1.0]), RING)


@pytest.mark.parametrize("checkpoints", [1, 3])
@pytest.mark.parametrize("grid", [True, False], ids=["given grid", "adaptive lanes"])
def test_any_number_of_checkpoints_gives_the_same_gradient(checkpoints, grid):
    expected, steps = ring_gradients(None, grid)
    assert np.max(steps) > 300
    assert grid or np.min(steps) < np.max(steps) / 3
    compare(ring_gradients(checkpoints, grid)[0], expected, 1e-12)
