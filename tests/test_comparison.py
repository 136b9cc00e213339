"""`compare_adjoints` measures what it says, reports failures and advises by the data; `reconstruction_error` foretells."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adjoint_jax as aj
from adjoint_jax.diagnostics import (
    AdjointComparison,
    AdjointRow,
    Counts,
    LeafError,
    Measurement,
    Reference,
    compare_adjoints,
    reconstruction_error,
)

STEPS = 10
DISCRETE = [aj.DiscreteAdjoint()]
EULER = {"solver": aj.Euler(), "controller": aj.FixedSteps(2)}
RK4 = {"solver": aj.RK4(), "controller": aj.FixedSteps(STEPS)}
INPUTS = {"k": jnp.array([1.0, 0.5]), "y0": jnp.array([1.0, 2.0])}


def decay(t, y, args):
    return -args * y


def on_grid(inputs, adjoint):
    return jnp.sum(aj.solve(decay, 0.0, 1.0, inputs["y0"], inputs["k"], adjoint=adjoint, **RK4).ys ** 2)


def exact(inputs):
    return jnp.sum((inputs["y0"] * jnp.exp(-inputs["k"])) ** 2)


# What is measured


@functools.cache
def compared():
    adjoints = {
        "all kept": aj.DiscreteAdjoint(),
        "backsolve": aj.BacksolveAdjoint(),
        "forward": aj.ForwardMode(),
        "impossible": aj.ReversibleAdjoint(),
    }
    return compare_adjoints(on_grid, INPUTS, adjoints, reference=exact, repeats=1)


def test_errors_are_those_against_an_analytic_reference():
    value, gradient = jax.value_and_grad(lambda inputs: on_grid(inputs, aj.DiscreteAdjoint()))(INPUTS)
    true = jax.grad(exact)(INPUTS)
    differences = {name: np.linalg.norm(gradient[name] - true[name]) for name in INPUTS}
    sizes = {name: np.linalg.norm(true[name]) for name in INPUTS}
    for name in ("all kept", "forward"):
        measured = compared()[name].measured
        assert measured.value == pytest.approx(float(value), rel=1e-12)
        assert measured.error == pytest.approx(np.hypot(*differences.values()) / np.hypot(*sizes.values()), rel=1e-6)
        for leaf, key in zip(measured.leaves, INPUTS, strict=True):
            assert leaf.path == f"inputs['{key}']"
            assert leaf.absolute == pytest.approx(differences[key], rel=1e-6)
            assert leaf.relative == pytest.approx(differences[key] / sizes[key], rel=1e-6)


def test_counts_are_those_of_the_method():
    """Four stages a step. Transposing a step linearises its stages, whose last value nothing needs, and pulls back each;
    backsolve solves the same number of steps of the same method again; forward mode carries four tangents along."""
    stages = 4 * STEPS
    rows = {name: compared()[name].measured for name in ("all kept", "backsolve", "forward")}
    assert {row.forward for row in rows.values()} == {Counts(stages, 0, 0)}
    assert rows["all kept"].backward == Counts(3 * STEPS, stages, stages)
    assert rows["backsolve"].backward == Counts(stages, stages, stages)
    assert rows["forward"].backward == Counts(0, 4 * stages, 4 * stages)


@pytest.mark.slow
def test_forward_counts_are_those_of_the_statistics():
    """Rejected steps and the first step's estimate included; two lanes count twice."""
    options = {"solver": aj.Bosh3(), "controller": aj.PIDController(rtol=1e-4, atol=1e-6)}

    def loss(y0, adjoint):
        return jnp.sum(jax.vmap(lambda y: aj.solve(pulse, 0.0, 2.0, y, adjoint=adjoint, **options).ys)(y0))

    def pulse(t, y, args):
        return jnp.exp(-50 * (t - 1) ** 2) - y

    stats = aj.solve(pulse, 0.0, 2.0, 1.0, **options).stats
    assert stats.rejected > 0
    measured = compare_adjoints(loss, jnp.ones(2), [aj.DiscreteAdjoint()], repeats=1)["DiscreteAdjoint()"].measured
    assert measured.forward.evaluations == 2 * int(stats.evaluations)
    assert measured.backward.parameter_products == 0


def test_costs_are_measured():
    for row in compared().rows[:3]:
        assert min(row.measured[3:6]) > 0
        assert row.measured.temporary_bytes > 0


def test_counts_at_save_times_in_forward_mode():
    """Two evaluations to step; besides, three rows move with their times, which nobody differentiates."""

    def loss(k, adjoint):
        ts = jnp.array([0.2, 0.5, 0.9])
        return jnp.sum(aj.solve(decay, 0.0, 1.0, 1.0, k, saveat=aj.SaveAt(ts), adjoint=adjoint, **EULER).ys)

    measured = compare_adjoints(loss, jnp.array(0.3), [aj.ForwardMode()], repeats=1)["ForwardMode()"].measured
    assert measured.error < 1e-12
    assert measured.forward.evaluations == 2
    assert measured.backward == Counts(0, 2, 2)


# What fails


def test_what_an_adjoint_cannot_do_is_a_row():
    row = compared()["impossible"]
    assert row.measured is None
    assert row.failure.startswith("ReversibleAdjoint needs a reversible solver")
    assert "impossible fails: ReversibleAdjoint needs a reversible solver" in compared().recommendation


def test_a_drift_is_a_row_that_says_so():
    """Even of a loss that does not want to know."""

    def loss(y0, adjoint):
        return jnp.sum(aj.solve(decay, 0.0, 1.0, y0, 50.0, solver=aj.Bosh3(), adjoint=adjoint, throw=False).ys)

    gradient = jnp.full(1, jnp.exp(-50.0))
    comparison = compare_adjoints(loss, jnp.ones(1), [aj.BacksolveAdjoint()], reference=gradient, repeats=1, count=False)
    assert comparison.rows[0].failure.startswith("REVERSE_DRIFT at t = 0")
    assert "failed: REVERSE_DRIFT" in str(comparison)
    assert "the reversed flow is unstable" in comparison.recommendation
    assert comparison.best is None


def test_a_loss_that_is_not_finite():
    def loss(x, _):
        return jnp.log(x)

    with pytest.raises(ValueError, match="reference, or its gradient, is not finite"):
        compare_adjoints(loss, jnp.array(-1.0), [aj.DiscreteAdjoint()], count=False)
    comparison = compare_adjoints(loss, jnp.array(-1.0), [aj.DiscreteAdjoint()], reference=jnp.array(1.0))
    assert comparison.rows[0].failure == "the loss is not finite"


# How it is asked for


def test_options_of_a_solve_may_come_with_an_adjoint():
    def loss(k, options):
        return jnp.sum(aj.solve(decay, 0.0, 1.0, jnp.ones(1), k, controller=aj.FixedSteps(4), **options).ys)

    methods = [{"adjoint": aj.DiscreteAdjoint(checkpoints=2), "solver": aj.Heun()}]
    comparison = compare_adjoints(loss, jnp.array(0.3), methods, repeats=1, count=False)
    assert comparison.reference is Reference.DISCRETE
    assert comparison["DiscreteAdjoint(checkpoints=2)"].measured.error < 1e-12
    assert comparison.rows[0].measured.forward is None
    assert "exact for the computed solution" in str(comparison)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"adjoints": []}, ValueError, "There is no adjoint"),
        ({"adjoints": [aj.Tsit5()]}, TypeError, "pytrees with one adjoint in each"),
        ({"adjoints": [aj.GaussAdjoint(), aj.GaussAdjoint()]}, ValueError, r"Several adjoints are called GaussAdjoint\(\)"),
        ({"inputs": 1.0}, ValueError, "hold no real or complex floating-point array"),
        ({"good_enough": 0.0}, ValueError, "good_enough must be positive"),
        ({"repeats": 0}, ValueError, "repeats must be a positive integer"),
        ({"reference": 3.0, "inputs": INPUTS}, TypeError, "reference must be a function of the inputs, or a gradient"),
        ({"reference": jnp.ones(2)}, ValueError, "reference must have the shapes of the inputs"),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "loss": lambda x, _: jnp.sum(jax.tree.leaves(x)[0]),
        "inputs": jnp.ones(1),
        "adjoints": [aj.DiscreteAdjoint()],
    }
    with pytest.raises(error, match=message):
        compare_adjoints(**{**arguments, "count": False, "repeats": 1, **change})


# How it reads


def made(name, adjoint, *, error=1e-6, seconds=1e-3, memory=2**26, products=100):
    counts = Counts(100, 0, 0), Counts(200, 100, products)
    leaves = (LeafError("inputs", error, error),)
    return AdjointRow(name, adjoint, Measurement(error, leaves, 1.0, seconds, 0.1, 0.2, memory, *counts))


def advice(*rows):
    return AdjointComparison(rows, Reference.GIVEN, 1e-3, 1024).recommendation


def test_the_table():
    table, _, advice = str(compared()).partition("\n\n")
    header, *rows = table.splitlines()
    assert header.split("  ")[0] == "adjoint"
    assert [row.split("  ")[0] for row in rows] == ["all kept", "backsolve", "forward", "impossible"]
    assert "40 + 30" in rows[0]
    assert "160 jvp" in rows[2]
    assert [row.endswith("  ok") for row in rows] == [True, True, True, False]
    assert advice.startswith("Errors are relative to the reference that was given.\nUse ")


def test_the_recommendation_changes_with_the_data():
    discrete, gauss = made("discrete", aj.DiscreteAdjoint()), made("gauss", aj.GaussAdjoint(), error=1e-4)
    assert advice(discrete, gauss).startswith(
        "Use discrete (1 ms, relative error 1.0e-06): the fastest that is good enough."
    )
    faster = made("gauss", aj.GaussAdjoint(), error=1e-4, seconds=2e-4, products=20)
    assert advice(discrete, faster).startswith("Use gauss (200 µs, relative error 1.0e-04): the fastest")
    assert "It takes 20 vjps with respect to the parameters, discrete takes 100." in advice(discrete, faster)
    hardly = made("gauss", aj.GaussAdjoint(), error=1e-4, seconds=9e-4)
    assert "discrete (1 ms, relative error 1.0e-06): hardly slower than gauss, and more accurate." in advice(
        discrete, hardly
    )


def test_the_recommendation_knows_memory():
    discrete, gauss = made("discrete", aj.DiscreteAdjoint()), made("gauss", aj.GaussAdjoint())
    assert "If 64 MiB are too much, try DiscreteAdjoint(checkpoints=k)" in advice(discrete, gauss)
    sparing = made("back", aj.BacksolveAdjoint(), seconds=3e-3, memory=2**20)
    assert "If memory is short, use back: 1 MiB instead of 64 MiB, for 3.0 times the time." in advice(discrete, sparing)
    assert "memory" not in advice(made("discrete", aj.DiscreteAdjoint(), memory=2**15), sparing)


def test_the_recommendation_knows_what_is_wrong():
    off = made("back", aj.BacksolveAdjoint(), error=0.3)
    assert advice(off).startswith(
        "No adjoint here gives a gradient with a relative error of at most 1e-03.\nback is off by"
    )
    assert "the reversed flow loses the state" in advice(off)
    assert advice(off, made("discrete", aj.DiscreteAdjoint())).startswith(
        "Use discrete (1 ms, relative error 1.0e-06): no other"
    )
    assert "inaccurate" in str(AdjointComparison((off,), Reference.GIVEN, 1e-3, 1024))


def test_the_picture(tmp_path, monkeypatch):
    axes = compared().plot(tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    labels = [text.get_text().partition(",")[0] for text in axes.get_legend().get_texts()]
    assert labels == ["all kept", "backsolve", "forward", "good enough"]
    axes.clear()
    assert compared().plot(axes) is axes
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"adjoint_jax\[examples\]"):
        compared().plot("somewhere.png")


# Forward and back


def oscillator(t, y, args):
    return {"x": y["v"], "v": -y["x"]}


def test_an_oscillator_comes_back():
    found = reconstruction_error(oscillator, 0.0, 6.0, {"x": 1.0, "v": 0.0})
    assert [leaf.path for leaf in found.leaves] == ["['v']", "['x']"]
    assert found.relative < 1e-4
    assert found.reversible
    assert found.stiff is False
    assert "BacksolveAdjoint() is an option" in str(found)
    assert found.forward.accepted == int(aj.solve(oscillator, 0.0, 6.0, {"x": 1.0, "v": 0.0}).stats.accepted)


def test_a_decay_does_not():
    found = reconstruction_error(decay, 0.0, 1.0, jnp.ones(2), 50.0)
    assert found.relative > 1e3
    assert not found.reversible
    assert "the reversed flow is unstable" in str(found)
    assert "BacksolveAdjoint() will fail or be wrong" in str(found)


def test_stability_limits_the_steps_of_a_stiff_problem():
    found = reconstruction_error(lambda t, y, args: -300.0 * (y - jnp.cos(t)), 0.0, 1.0, 1.0)
    assert found.stiff
    assert "looks stiff" in str(found)
    assert found.relative == np.inf or found.relative > 1e3


def test_a_given_grid_is_walked_back():
    grid = {"solver": aj.RK4(), "controller": aj.StepTo(np.linspace(0.0, 1.0, 20) ** 2)}
    found = reconstruction_error(decay, 0.0, 1.0, 1.0, 0.5, **grid)
    assert found.forward == found.backward
    assert 0 < found.absolute < 1e-6
    assert found.stiff is None


def test_reconstruction_errors():
    with pytest.raises(TypeError, match="takes no option saveat, throw"):
        reconstruction_error(decay, 0.0, 1.0, 1.0, 0.5, throw=False, saveat=aj.SaveAt(t1=True))
    with pytest.raises(aj.SolveError, match="MAX_STEPS_REACHED"):
        reconstruction_error(decay, 0.0, 1.0, 1.0, 0.5, max_steps=1)
