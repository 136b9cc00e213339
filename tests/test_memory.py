"""Memory of gradients, as XLA plans it: `temp_size_in_bytes` of compiled programs, nothing is timed or run."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

import adjoint_jax as aj

SIZE = 4096
STATE = 4 * SIZE  # bytes


def field(t, y, args):
    return jnp.sin(args * y) - 0.1 * y


def temporary_bytes(loss, size=SIZE):
    y0, args = jax.ShapeDtypeStruct((size,), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(y0, args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@functools.cache
def states(adjoint, controller, max_steps=4096, solver=aj.RK4(), size=SIZE):
    """Memory of a gradient in states."""

    def loss(y0, args):
        options = {"solver": solver, "controller": controller, "adjoint": adjoint, "max_steps": max_steps}
        return jnp.sum(aj.solve(field, 0.0, 1.0, y0, args, throw=False, **options).ys)

    return temporary_bytes(loss, size) / (4 * size)


WORK = 64  # states that the stages of a step and its transpose may take


def test_store_everything_exceeds_the_budget_that_adjoints_keep():
    """The demonstration of the source documents: 1,000 steps, a budget of 200 states."""

    def loss(y0, args):
        def step(y, _):
            h = 1e-3
            k1 = field(0.0, y, args)
            k2 = field(0.0, y + h / 2 * k1, args)
            k3 = field(0.0, y + h / 2 * k2, args)
            k4 = field(0.0, y + h * k3, args)
            return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

        return jnp.sum(jax.lax.scan(step, y0, None, length=1000)[0])

    budget = 200
    assert temporary_bytes(loss) / STATE > 1000 > budget
    assert states(aj.BacksolveAdjoint(), aj.FixedSteps(1000)) < budget
    assert states(aj.DiscreteAdjoint(checkpoints=32), aj.FixedSteps(1000)) < budget


def test_backsolve_memory_is_flat():
    few, some, many = (states(aj.BacksolveAdjoint(), aj.FixedSteps(n)) for n in (100, 1000, 10_000))
    assert few < WORK
    assert some <= few + 1
    assert many <= few + 1


REVERSIBLE = {
    "Reversible": aj.Reversible(aj.RK4()),
    "ReversibleHeun": aj.ReversibleHeun(),
    "AsynchronousLeapfrog": aj.AsynchronousLeapfrog(),
}


@pytest.mark.parametrize("solver", REVERSIBLE.values(), ids=REVERSIBLE)
def test_reversible_memory_is_flat(solver):
    few, some, many = (states(aj.ReversibleAdjoint(), aj.FixedSteps(n), solver=solver) for n in (100, 1000, 10_000))
    assert few < WORK
    assert some <= few + 1
    assert many <= few + 1


@pytest.mark.parametrize("adjoint", [aj.InterpolatingAdjoint(), aj.GaussAdjoint()], ids=["interpolating", "gauss"])
def test_interpolating_memory_grows_with_the_square_root(adjoint):
    """A state at the start of every segment; the states and interpolants, of four states each, of the steps of one."""
    for steps in (100, 1000, 10_000):
        assert states(adjoint, aj.FixedSteps(steps)) < (1 + 1 + 4) * math.sqrt(steps) + WORK


def test_forward_mode_memory_is_flat():
    """Of one derivative: the state and its tangent, whatever the number of steps."""

    def taken(steps):
        def end(args):
            options = {"solver": aj.RK4(), "controller": aj.FixedSteps(steps), "adjoint": aj.ForwardMode()}
            return aj.solve(field, 0.0, 1.0, jnp.ones(SIZE, jnp.float32), args, throw=False, **options).ys

        derivative = jax.jit(jax.jacfwd(end)).lower(jax.ShapeDtypeStruct((), jnp.float32)).compile()
        return derivative.memory_analysis().temp_size_in_bytes / STATE

    few, some, many = (taken(steps) for steps in (100, 1000, 10_000))
    assert few < WORK
    assert some <= few + 1
    assert many <= few + 1


def test_default_memory_of_small_states_keeps_them_all():
    """Up to 128 MiB of them: about 8,000 of this size."""
    assert 8000 <= states(aj.DiscreteAdjoint(), aj.FixedSteps(8000)) < 8000 + 2 * WORK


@pytest.mark.parametrize("steps", [100, 1000, 10_000])
def test_few_checkpoints_and_one_segment(steps):
    """Three checkpoints and a segment of the square root of all steps, of which XLA may keep a second copy."""
    bound = 2 * (3 + math.sqrt(steps)) + WORK
    assert states(aj.DiscreteAdjoint(checkpoints=3), aj.FixedSteps(steps)) < bound


def test_default_memory_of_large_states_grows_with_the_square_root():
    """Above 128 MiB: 8,192 states and more of this size. Below, all states are kept."""
    assert 100 <= states(aj.DiscreteAdjoint(), aj.FixedSteps(100)) < 100 + 2 * WORK
    many, more = (states(aj.DiscreteAdjoint(), aj.FixedSteps(n)) for n in (10_000, 40_000))
    assert many < 3 * math.sqrt(10_000) + WORK
    assert more < 3 * math.sqrt(40_000) + WORK


@pytest.mark.parametrize("checkpoints", [10, 100, 1000])
def test_checkpoints_bound_memory(checkpoints):
    """About as many states as checkpoints, and one segment. XLA may keep a second copy of either."""
    bound = 2 * (checkpoints + 10_000 / checkpoints) + WORK
    assert states(aj.DiscreteAdjoint(checkpoints=checkpoints), aj.FixedSteps(10_000)) < bound


ADAPTIVE = aj.PIDController(rtol=1e-3, atol=1e-6)


def test_adaptive_memory_does_not_follow_max_steps():
    """16 times as many allowed steps, at most about four times the states; all of it beneath 3 sqrt(max_steps)."""
    few, many = (states(aj.DiscreteAdjoint(), ADAPTIVE, n, aj.Tsit5()) for n in (4096, 65_536))
    assert few < 3 * math.sqrt(4096) + WORK
    assert many < 3 * math.sqrt(65_536) + WORK
    assert many < 5 * few


@pytest.mark.parametrize("lanes", [1, 64])
def test_no_buffer_of_small_lanes_is_as_long_as_max_steps(lanes):
    """Where every number counts not even a time for every step that would be allowed is kept."""

    def loss(rates, max_steps):
        options = {"controller": ADAPTIVE, "adjoint": aj.DiscreteAdjoint(), "max_steps": max_steps}
        ts = jnp.linspace(0.0, 10.0, 16)
        return jnp.sum(
            aj.solve(lotka_volterra, 0.0, 10.0, jnp.ones(2), rates, saveat=aj.SaveAt(ts), throw=False, **options).ys
        )

    def taken(max_steps):
        rates = jnp.ones((lanes, 4))
        gradient = jax.jit(jax.vmap(jax.grad(functools.partial(loss, max_steps=max_steps)))).lower(rates).compile()
        return gradient.memory_analysis().temp_size_in_bytes / lanes

    few, many = taken(2**12), taken(2**16)
    assert many < 5 * few
    assert many < 2**16


def lotka_volterra(t, y, rates):
    prey, predators = y
    return jnp.stack([rates[0] * prey - rates[1] * prey * predators, rates[3] * prey * predators - rates[2] * predators])


def test_adaptive_backsolve_memory_is_flat():
    few, many = (states(aj.BacksolveAdjoint(), ADAPTIVE, n, aj.Tsit5()) for n in (4096, 65_536))
    assert few < 2 * WORK
    assert many <= few + 1


# Cost of many parameters


def reverse_counts(parameters):
    """Flops of one call of the compiled gradient, loops counted once; and of one vjp of the field."""

    def wide(t, y, args):
        hidden = jnp.tanh(args["in"] @ y)
        return args["out"] @ hidden

    width = parameters // 4
    args = {"in": jax.ShapeDtypeStruct((width, 2), jnp.float32), "out": jax.ShapeDtypeStruct((2, width), jnp.float32)}
    y0 = jax.ShapeDtypeStruct((2,), jnp.float32)

    def loss(y0, args):
        options = {"adjoint": aj.BacksolveAdjoint(), "solver": aj.Tsit5(), "throw": False}
        return jnp.sum(aj.solve(wide, 0.0, 1.0, y0, args, **options).ys)

    def vjp(y0, args):
        return jax.vjp(lambda y, a: wide(0.0, y, a), y0, args)[1](y0)

    def cost(fn):
        analysis = jax.jit(fn).lower(y0, args).compile().cost_analysis()
        return analysis["flops"], analysis["bytes accessed"]

    return cost(jax.grad(loss, (0, 1))), cost(vjp)


def test_backsolve_cost_of_many_parameters_is_that_of_the_vjps():
    """A 2-state field with 50,000 parameters and one with 48: the difference is that of some vjps of the field for every
    stage (two programs, forward and reverse, seven stages, first steps), and no work on an ODE state of 50,000 entries: its
    stage sums and error norm alone would be 21 products and sums for every parameter and step."""
    (many, _), (many_vjp, _) = reverse_counts(50_000)
    (few, _), (few_vjp, _) = reverse_counts(48)
    vjps = (many - few) / (many_vjp - few_vjp)
    assert vjps < 40


def test_a_transposed_step_holds_no_more_than_backpropagation_does():
    """One step at a time is no loop: XLA takes what does not change out of a loop, which would be the linearisations of
    all stages, held at once. Against `jax.checkpoint` around every step and around every segment of a scan."""
    keys, shapes, steps = jax.random.split(jax.random.key(0), 3), ((32, 128), (128, 128), (128, 32)), 100
    weights = tuple(jax.random.normal(key, shape, jnp.float32) / 8 for key, shape in zip(keys, shapes, strict=True))
    y0 = jnp.ones((64, 32), jnp.float32)

    def network(t, y, weights):
        return jnp.tanh(jnp.tanh(y @ weights[0]) @ weights[1]) @ weights[2]

    def ours(weights):
        adjoint = aj.DiscreteAdjoint(checkpoints=10)
        options = {"solver": aj.RK4(), "controller": aj.FixedSteps(steps), "adjoint": adjoint, "throw": False}
        return jnp.sum(aj.solve(network, 0.0, 1.0, y0, weights, **options).ys)

    def bare(weights):
        def step(y, _):
            h = 1 / steps
            k1 = network(0.0, y, weights)
            k2 = network(0.0, y + h / 2 * k1, weights)
            k3 = network(0.0, y + h / 2 * k2, weights)
            return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + network(0.0, y + h * k3, weights)), None

        @jax.checkpoint
        def segment(y, _):
            return jax.lax.scan(jax.checkpoint(step), y, length=10)[0], None

        return jnp.sum(jax.lax.scan(segment, y0, length=10)[0])

    taken, least = (
        jax.jit(jax.grad(f)).lower(weights).compile().memory_analysis().temp_size_in_bytes for f in (ours, bare)
    )
    assert taken <= 1.05 * least
