"""What `DiscreteAdjoint` keeps of every step: all choices give the same gradient, for more memory or more evaluations."""

import types

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from problems import HEUN_HERMITE, compare, jit

import adjoint_jax as aj

KEEPS = {
    "few states": aj.KeepStates(bytes=2000),
    "stages": aj.KeepStages(),
    "linearisations": aj.KeepLinearisations(),
    "few stages": aj.KeepStages(bytes=2000),
    "few linearisations": aj.KeepLinearisations(bytes=8000),
}
generator = np.random.default_rng(0)
WEIGHTS = generator.normal(size=(2, 6, 6)) / 3
Y0 = generator.normal(size=(4, 6))
TS = np.array([0.0, 0.4, 0.41, 1.7])


JUMP = 0.9


def network(t, y, weights):
    first, second = weights
    return jnp.tanh(jnp.where(t < JUMP, 1.0, -0.7) * jnp.sin(t) * y @ first) @ second


def effort(t, y, weights):
    return jnp.mean(jnp.square(y)) * weights[0, 0, 0]


def loss(y0, weights, adjoint, solver, controller):
    solution = aj.solve(
        network,
        0.0,
        2.0,
        y0,
        weights,
        solver=solver,
        controller=controller,
        saveat=aj.SaveAt(TS, t1=True),
        adjoint=adjoint,
        running_cost=effort,
    )
    return jnp.sum(solution.ys**2) + solution.cost


@eqx.filter_jit
def gradient(*arguments):
    return jax.flatten_util.ravel_pytree(jax.grad(loss, (0, 1))(*arguments))[0]


STEPPING = {
    "grid": (aj.RK4(), aj.FixedSteps(30)),
    "adaptive with dense stages": (HEUN_HERMITE, aj.PIDController(1e-3, 1e-3)),
    "grid, first stages taken over": (aj.Bosh3(), aj.FixedSteps(25)),
    "adaptive, first stages taken over": (aj.Tsit5(), aj.PIDController(1e-4, 1e-4, jump_ts=np.array([JUMP]))),
}
"""Where first stages are taken over from the step before, so are their linearisations, but not behind a jump."""


@pytest.fixture(scope="module")
def by_states():
    adjoint = aj.DiscreteAdjoint(keep=aj.KeepStates())
    return {name: gradient(Y0, WEIGHTS, adjoint, *stepping) for name, stepping in STEPPING.items()}


@pytest.mark.parametrize(
    ("keep", "stepping"),
    [
        ("stages", "grid"),
        ("linearisations", "grid"),
        pytest.param("few linearisations", "grid", marks=[pytest.mark.slow]),
        ("linearisations", "adaptive with dense stages"),
        ("linearisations", "grid, first stages taken over"),
        ("linearisations", "adaptive, first stages taken over"),
        ("few linearisations", "adaptive, first stages taken over"),
        pytest.param("few stages", "adaptive with dense stages", marks=[pytest.mark.slow]),
    ],
)
def test_the_gradient_does_not_depend_on_what_is_kept(keep, stepping, by_states):
    got = gradient(Y0, WEIGHTS, aj.DiscreteAdjoint(keep=KEEPS[keep]), *STEPPING[stepping])
    np.testing.assert_allclose(got, by_states[stepping], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("keep", ["stages", "linearisations"])
def test_a_cost_that_is_not_used_has_no_effect(keep):
    """Not even where its own derivative is infinite."""

    def loss(y0, weights, keep, cost):
        options = {"solver": aj.RK4(), "controller": aj.FixedSteps(5), "running_cost": cost}
        return jnp.sum(aj.solve(network, 0.0, 2.0, y0, weights, adjoint=aj.DiscreteAdjoint(keep=keep), **options).ys ** 2)

    def cost(t, y, weights):
        return jnp.sum(jnp.sin(y @ weights[0]) * jnp.exp(t * y) + jnp.sqrt(y - y))

    gradients = jit(lambda: [jax.grad(loss, (0, 1))(Y0, WEIGHTS, KEEPS[keep], one) for one in (cost, None)])()
    compare(*gradients, 1e-12)


def compiled(keep, solver):
    def final(y0, weights):
        adjoint = aj.DiscreteAdjoint(keep=keep)
        return jnp.sum(aj.solve(network, 0.0, 2.0, y0, weights, solver=solver, controller=GRID, adjoint=adjoint).ys)

    return jax.jit(jax.grad(final, (0, 1))).lower(Y0[:1], WEIGHTS).compile()


GRID = aj.FixedSteps(30)


@pytest.mark.parametrize(("solver", "stages"), [(aj.RK4(), 4), (aj.Tsit5(), 6)])
def test_linearisations_are_computed_once_and_weights_not_kept_with_them(solver, stages):
    """The field's hyperbolic tangents in the compiled loops: those of the stages forward and, unless their linearisations
    are kept, as many on the way back. What is kept of every stage is of the size of the state, and weights are larger."""
    states, linearisations = compiled(aj.KeepStates(), solver), compiled(aj.KeepLinearisations(), solver)
    assert states.as_text().count(" tanh(") == linearisations.as_text().count(" tanh(") + stages
    more = linearisations.memory_analysis().temp_size_in_bytes - states.memory_analysis().temp_size_in_bytes
    assert GRID.n * stages * Y0[:1].nbytes < more < GRID.n * stages * WEIGHTS.nbytes / 2


def test_other_methods_have_states_alone():
    solver = aj.Reversible(aj.RK4())
    with pytest.raises(TypeError, match=r"KeepStages .* Reversible: use KeepStates\(\)"):
        jax.grad(loss)(Y0, WEIGHTS, aj.DiscreteAdjoint(keep=aj.KeepStages()), solver, GRID)


def checked(kind, **fields):
    """The check of a module's own, without the run-time annotation checks of the tests, which would answer first."""
    kind.__check_init__(types.SimpleNamespace(**fields))


@pytest.mark.parametrize("wrong", ["stages", aj.KeepStages])
def test_wrong_choices_of_what_to_keep(wrong):
    with pytest.raises(TypeError, match=r"DiscreteAdjoint\(keep=...\) must be KeepStates\(\)"):
        checked(aj.DiscreteAdjoint, checkpoints=None, keep=wrong)


@pytest.mark.parametrize("wrong", [0, 2.5])
def test_wrong_numbers_of_checkpoints(wrong):
    for kind in (aj.DiscreteAdjoint, aj.InterpolatingAdjoint):
        with pytest.raises(ValueError, match=rf"checkpoints=...\) must be a positive integer, or None, got {wrong}"):
            checked(kind, checkpoints=wrong, keep=aj.KeepStates())
