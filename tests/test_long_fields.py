"""Fields of many operations: their steps are loops over stages, and their programs are derived and lowered but once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import Program
from problems import HEUN_HERMITE

import adjoint_jax as aj
from adjoint_jax.diagnostics import memory_plan
from adjoint_jax.solvers import accompanied, explicit_runge_kutta, rosenbrock

LAYERS, WIDTH = 8, 3
RANDOM = np.random.default_rng(0)
WEIGHTS = RANDOM.normal(size=(LAYERS, WIDTH, WIDTH)) / 5
Y0 = RANDOM.normal(size=WIDTH)
TS = np.array([0.1, 0.55, 0.9])
CASES = {
    "adaptive": {"controller": aj.PIDController(1e-6, 1e-6)},
    "few checkpoints": {"controller": aj.PIDController(1e-6, 1e-6), "adjoint": aj.DiscreteAdjoint(checkpoints=1)},
    "rows": {"controller": aj.PIDController(1e-6, 1e-6), "saveat": aj.SaveAt(TS)},
    "dense stages": {"controller": aj.PIDController(1e-6, 1e-6), "saveat": aj.SaveAt(TS), "solver": HEUN_HERMITE},
    "grid": {"controller": aj.FixedSteps(7), "solver": aj.RK4()},
    "stages kept": {"controller": aj.FixedSteps(7), "adjoint": aj.DiscreteAdjoint(keep=aj.KeepStages())},
    "linearisations kept": {"controller": aj.FixedSteps(7), "adjoint": aj.DiscreteAdjoint(keep=aj.KeepLinearisations())},
    "linearisations kept of few": {
        "controller": aj.PIDController(1e-6, 1e-6, jump_ts=(0.3,)),
        "saveat": aj.SaveAt(TS),
        "running_cost": lambda t, y, weights: jnp.sum(y**2) * weights[0, 0, 0],
        "adjoint": aj.DiscreteAdjoint(checkpoints=1, keep=aj.KeepLinearisations(4096)),
    },
    "linearisations kept with dense stages": {
        "controller": aj.PIDController(1e-6, 1e-6),
        "saveat": aj.SaveAt(TS),
        "solver": HEUN_HERMITE,
        "adjoint": aj.DiscreteAdjoint(keep=aj.KeepLinearisations()),
    },
    "backsolve": {"controller": aj.PIDController(1e-6, 1e-6), "adjoint": aj.BacksolveAdjoint()},
    "backsolve on a grid": {"controller": aj.FixedSteps(7), "solver": aj.RK4(), "adjoint": aj.BacksolveAdjoint()},
    "interpolating": {"controller": aj.PIDController(1e-6, 1e-6), "adjoint": aj.InterpolatingAdjoint()},
    "gauss": {"controller": aj.PIDController(1e-6, 1e-6), "adjoint": aj.GaussAdjoint()},
    "stiff": {"controller": aj.PIDController(1e-6, 1e-6), "saveat": aj.SaveAt(TS), "solver": aj.Rodas5P()},
    "stiff on a grid": {"controller": aj.FixedSteps(7), "solver": aj.Rosenbrock23()},
    "Krylov": {"controller": aj.FixedSteps(7), "solver": aj.Rosenbrock23(jacobian=aj.KrylovJacobian(rtol=1e-14))},
    "mass": {
        "controller": aj.FixedSteps(7),
        "solver": aj.Rodas4(),
        "mass_matrix": np.array([[2.0, 0.3, 0.0], [0.0, 1.0, -0.4], [0.0, 0.0, 0.5]]),
        "running_cost": lambda t, y, weights: jnp.sum(y**2) * weights[0, 0, 0],
    },
    "reversible": {
        "controller": aj.FixedSteps(7),
        "solver": aj.Reversible(aj.Bosh3()),
        "adjoint": aj.ReversibleAdjoint(),
    },
}

LONG = ("Krylov", "mass")


@pytest.fixture
def loops(monkeypatch):
    count_as_long(monkeypatch)


def count_as_long(monkeypatch):
    """Every step of two stages or more."""
    for methods in (explicit_runge_kutta, rosenbrock):
        monkeypatch.setattr(methods, "WRITTEN_OUT_OPERATIONS", LAYERS)


def layers(t, y, weights):
    z = y
    for i in range(LAYERS):
        z = z + jnp.tanh(z @ weights[i])
    return jnp.cos(t) * (z - y)


def loss(case, y0, weights, t0, t1):
    if "mass_matrix" in CASES[case]:
        t0, t1 = jax.lax.stop_gradient((t0, t1))
    solution = aj.solve(layers, t0, t1, y0, weights, throw=False, **CASES[case])
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves((solution.ys, solution.cost)))


def gradients(case, dtype=np.float64):
    arguments = [jnp.asarray(value, dtype) for value in (Y0, WEIGHTS, 0.0, 1.0)]
    return jax.jit(jax.value_and_grad(lambda *given: loss(case, *given), argnums=(0, 1, 2, 3)))(*arguments)


def compare(found, expected, rtol):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * (1 + np.abs(b).max()))


@pytest.mark.parametrize(
    ("case", "dtype", "rtol"),
    [
        *(pytest.param(case, np.float64, 1e-11, marks=[pytest.mark.slow] if case in LONG else []) for case in CASES),
        ("rows", np.float32, 1e-4),
        pytest.param("stiff", np.float32, 1e-4, marks=[pytest.mark.slow]),
    ],
)
def test_gradients_are_those_of_steps_that_are_written_out(case, dtype, rtol, monkeypatch):
    monkeypatch.setattr(rosenbrock, "WRITTEN_OUT_OPERATIONS", 10**4)
    expected = gradients(case, dtype)
    count_as_long(monkeypatch)
    compare(gradients(case, dtype), expected, rtol)


@pytest.mark.parametrize("case", ["adaptive", "stiff"])
def test_forward_mode_agrees(case, loops):
    def end(weights):
        return aj.solve(layers, 0.0, 1.0, Y0, weights, adjoint=aj.ForwardMode(), **CASES[case]).ys

    direction = jnp.asarray(RANDOM.normal(size=WEIGHTS.shape))
    ys, along = jax.jit(lambda w: jax.jvp(end, (w,), (direction,)))(jnp.asarray(WEIGHTS))
    gradient = gradients(case)[1][1]
    np.testing.assert_allclose(jnp.sum(2 * ys * along), jnp.sum(gradient * direction), rtol=1e-11)


@pytest.mark.parametrize("case", ["adaptive", "stiff"])
def test_in_lanes_a_failure_stays_in_its_lane(case, loops):
    y0 = jnp.stack([jnp.asarray(Y0), jnp.full(WIDTH, jnp.nan), 2 * jnp.asarray(Y0)])

    def gradient(y0):
        return jax.grad(lambda w: loss(case, y0, w, 0.0, 1.0))(jnp.asarray(WEIGHTS))

    together = jax.jit(jax.vmap(gradient))(y0)
    assert jnp.isnan(together[1]).all()
    np.testing.assert_allclose(together[0], gradients(case)[1][1], rtol=0, atol=1e-11)
    np.testing.assert_allclose(together[2], jax.jit(gradient)(y0[2]), rtol=0, atol=1e-11)


def copies(case):
    """How many of the field a compiled program holds."""
    computations = Program(lowered(case).compile()).computations.values()
    return sum(i.operation == "tanh" for instructions in computations for i in instructions) / LAYERS


def test_compiled_programs_hold_few_copies_of_a_long_field(loops):
    """Two for the first step's size, one for the first slope of steps that are taken again; and one each for the steps, for
    those taken again, for the stages of the transposed step, and for their linearisations, which would be six, written out.
    For Rodas5P one each for Jacobians, derivatives with respect to time, and those of derivatives along the stages as well:
    26, written out.
    """
    assert copies("adaptive") <= 7
    assert copies("stiff") <= 9


@pytest.mark.parametrize("case", ["backsolve", "interpolating"])
def test_continuous_adjoints_hold_few_copies_of_a_long_field(case, loops, monkeypatch):
    """One for the stages of the reverse method, which would be six or seven, written out, as they are for large integrals
    of products of vectors."""
    in_loops = copies(case)
    monkeypatch.setattr(accompanied, "LOOPED_BYTES", 0)
    assert copies(case) >= in_loops + 5


def test_an_integrand_that_is_not_finite_where_it_has_no_weight_is_left_out(monkeypatch):
    """t^p has no derivative with respect to p at t = 0, where the last stage of Bosh3's last step backward is."""

    def final(power):
        def field(t, y, power):
            return layers(t, y, WEIGHTS) + jnp.exp(power * jnp.log(t))

        case = {"solver": aj.Bosh3(), "controller": aj.PIDController(1e-6, 1e-6), "adjoint": aj.BacksolveAdjoint()}
        return jnp.sum(aj.solve(field, 0.0, 1.0, Y0, power, throw=False, **case).ys)

    written_out = jax.jit(jax.grad(final))(2.0)
    count_as_long(monkeypatch)
    in_loops = jax.jit(jax.grad(lambda power: final(power)))(2.0)
    assert jnp.isfinite(written_out)
    np.testing.assert_allclose(in_loops, written_out, rtol=1e-9)


@pytest.mark.parametrize("case", ["adaptive", "rows", "backsolve"])
def test_a_field_is_lowered_a_few_times_however_often_it_is_called(case):
    """Itself, its linearisation, and each of them again where some of its results are not needed: some twenty calls."""
    assert lowered(case).as_text().count("stablehlo.tanh") <= 6 * LAYERS


def lowered(case):
    return jax.jit(jax.grad(lambda w: loss(case, Y0, w, 0.0, 1.0))).lower(jnp.asarray(WEIGHTS))


def test_linearisations_of_a_long_field_are_not_kept_by_default(monkeypatch):
    """They are known to pay for short ones alone."""
    y0, weights = jnp.asarray(Y0), jnp.asarray(np.tile(WEIGHTS, (10, 1, 1)))

    def layer(t, y, weights):
        return jnp.tanh(y @ weights[0])

    def kept():
        plan = memory_plan(layer, 0.0, 1.0, y0, weights, solver=aj.RK4(), controller=aj.FixedSteps(7))
        return plan.memory.kept[0].what

    assert kept() == "linearisations"
    monkeypatch.setattr(explicit_runge_kutta, "WRITTEN_OUT_OPERATIONS", 4)
    assert kept() == "states"
