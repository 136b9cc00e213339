"""`check_gradients` finds what is wrong, names it, and says so where it cannot tell."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adjoint_jax as aj
from adjoint_jax.diagnostics import GradientError, Verdict, check_gradients, gradient_report
from adjoint_jax.diagnostics.finite_differences import Values, differentiate, ladder

X = jnp.array([0.3, -1.2, 0.8])


@jax.custom_vjp
def times(factor, x):
    """x, whose gradient is multiplied by a factor."""
    return x


times.defvjp(lambda factor, x: (x, factor), lambda factor, g: (jnp.zeros_like(factor), factor * g))


def verdicts(report):
    return {one.path: one.verdict for one in report.leaves}


# Gradients of solves


class Pendulum(eqx.Module):
    """With friction that a small layer makes of the state."""

    friction: eqx.nn.Linear
    length: jax.Array
    power: int = 2

    def __call__(self, t, y, args):
        slow = -self.friction(jnp.tanh(y) ** self.power)[0]
        return jnp.stack([y[1], slow * y[1] - jnp.sin(y[0]) / self.length])


def swing(inputs):
    """A loss of the pendulum's end, on a fixed grid: as smooth as the field."""
    options = {"solver": aj.Heun(), "controller": aj.FixedSteps(8), "adjoint": aj.DiscreteAdjoint()}
    solution = aj.solve(inputs["field"], 0.0, 1.5, inputs["y0"], throw=False, **options)
    return jnp.sum(jnp.sin(solution.ys))


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_right_gradient_of_a_solve(dtype):
    field = Pendulum(eqx.nn.Linear(2, 1, key=jax.random.key(1), dtype=dtype), jnp.asarray(0.7, dtype))
    inputs = {"field": field, "y0": jnp.array([1.0, 0.2], dtype), "count": 3}
    aj.diagnostics.check_gradients(swing, inputs)
    report = gradient_report(swing, inputs, seed=1)
    assert report.ok
    assert list(verdicts(report)) == [
        "inputs['field'].friction.weight",
        "inputs['field'].friction.bias",
        "inputs['field'].length",
        "inputs['y0']",
    ]
    digits = 1e-9 if dtype == jnp.float64 else 1e-3
    assert all(0 < one.uncertainty < digits and one.relative_error < digits for one in report.leaves)


# Wrong gradients


def polynomial(inputs):
    right, off = inputs["right"], times(jnp.asarray(1.01, inputs["off"].dtype), inputs["off"])
    return jnp.sum(jnp.exp(right) * off[0]) + jnp.prod(off) ** 3


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_one_leaf_off_by_a_percent_is_named(dtype):
    inputs = {"right": X.astype(dtype), "off": jnp.array([2.0, 0.9], dtype)}
    with pytest.raises(GradientError, match=r"WRONG. Worst: inputs\['off'\], relative error") as raised:
        check_gradients(polynomial, inputs)
    report = raised.value.report
    assert verdicts(report) == {"inputs['off']": Verdict.WRONG, "inputs['right']": Verdict.RIGHT}
    assert report.worst.path == "inputs['off']"
    assert report.worst.gradient == pytest.approx(1.01 * report.worst.numerical, rel=1e-3)
    assert [one.path for one in report.wrong] == ["inputs['off']", "all leaves"]
    assert gradient_report(polynomial, inputs, rtol=0.05).ok


def test_entries_that_change_places():
    @jax.custom_vjp
    def swapped(x):
        return x

    swapped.defvjp(lambda x: (x, None), lambda _, g: (g[::-1],))
    assert gradient_report(lambda x: jnp.dot(swapped(x), jnp.array([1.0, 2.0])), X[:2]).wrong


def test_missing_and_infinite_gradients():
    missing = gradient_report(lambda x: jnp.sum(jax.lax.stop_gradient(x["a"]) * x["b"]), {"a": X, "b": X + 1})
    assert verdicts(missing) == {"inputs['a']": Verdict.WRONG, "inputs['b']": Verdict.RIGHT}
    assert missing.worst.gradient == 0.0
    infinite = gradient_report(lambda x: jnp.sum(times(jnp.asarray(jnp.inf), x["a"]) * x["b"]), {"a": X, "b": X + 1})
    assert verdicts(infinite) == {"inputs['a']": Verdict.WRONG, "inputs['b']": Verdict.RIGHT}
    assert infinite.worst.relative_error == np.inf


def test_a_leaf_without_influence_is_right():
    report = gradient_report(lambda x: jnp.sum(x["used"]), {"used": X, "unused": X, "empty": jnp.zeros((2, 0))})
    assert report.ok
    assert report.leaves[1].numerical == 0.0


def test_large_steps_that_leave_the_domain_are_left_out():
    check_gradients(lambda x: jnp.sum(jnp.log(x)), jnp.array([1.0, 1e-3]))


def test_complex_leaves():
    """Derivatives are Re(g v) with g = dL/dx - i dL/dy; the conjugate of that is wrong."""
    z = X + 1j * X[::-1]

    def loss(inputs, conjugate=lambda z: z):
        return jnp.abs(jnp.sum(conjugate(inputs["z"]) ** 3)) * inputs["x"]

    @jax.custom_vjp
    def conjugated(z):
        return z

    conjugated.defvjp(lambda z: (z, None), lambda _, g: (g.conj(),))
    inputs = {"z": z, "x": jnp.array(2.0)}
    assert gradient_report(loss, inputs).ok
    found = verdicts(gradient_report(lambda inputs: loss(inputs, conjugated), inputs))
    assert found == {"inputs['z']": Verdict.WRONG, "inputs['x']": Verdict.RIGHT}


# Lanes


def test_lanes_are_judged_one_by_one():
    lanes = {"x": X[:, None] * jnp.arange(1.0, 6.0), "shared": jnp.array(0.5), "which": jnp.arange(5)}

    def loss(inputs):
        wrong = jnp.select([inputs["which"] == 3, inputs["which"] == 1], [1.5, 1.1], 1.0)
        return jnp.sum(jnp.sin(times(wrong, inputs["x"]))) * inputs["shared"]

    report = gradient_report(loss, lanes, in_axes={"x": 1, "shared": None, "which": 0}, batch_size=7)
    assert [(one.path, one.lane) for one in report.leaves] == [
        (f"inputs['{name}']", lane) for name in ("shared", "x") for lane in range(5)
    ]
    assert {(one.path, one.lane) for one in report.wrong} == {(p, i) for p in ("inputs['x']", "all leaves") for i in (1, 3)}
    assert report.worst.lane == 3
    assert "inputs['x'] is wrong in lanes 3, 1" in str(report)


# What finite differences cannot tell


def noisy(x):
    return jnp.sum(jnp.sin(x)) + 1e-4 * jax.lax.stop_gradient(jnp.sin(1e9 * jnp.sum(x)))


def test_noise_is_undecided():
    report = gradient_report(noisy, X)
    assert not report.ok
    assert not report.wrong
    assert [one.verdict for one in report.undecided] == [Verdict.UNDECIDED] * 2
    assert all(abs(one.gradient - one.numerical) < one.uncertainty < 1.0 for one in report.leaves)
    with pytest.raises(AssertionError, match=r"too noisy to tell .*\n.*larger rtol"):
        check_gradients(noisy, X)
    check_gradients(noisy, X, allow_undecided=True)
    check_gradients(noisy, X, rtol=0.5)
    with pytest.raises(GradientError, match="WRONG"):
        check_gradients(lambda x: noisy(times(jnp.asarray(2.0), x)), X, allow_undecided=True)


def test_a_kink_is_undecided():
    report = gradient_report(lambda x: jnp.sum(jnp.maximum(x, 0.0)), jnp.zeros(2))
    assert report.undecided == report.leaves + report.together


@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-3])
def test_the_uncertainty_is_honest(noise):
    """Of 2000 derivatives none is off by more than it confesses, and none confesses much more than there is."""
    rng, epsilon = np.random.default_rng(0), float(np.finfo(np.float64).eps)
    x, steps = rng.uniform(0.0, 3.0, 2000), ladder(epsilon, None)

    def values(x):
        return np.exp(np.sin(2 * x)) + noise * rng.normal(size=x.shape)

    found = differentiate(Values(values(x[:, None] + steps), values(x[:, None] - steps), values(x)), steps, epsilon)
    exact = 2 * np.cos(2 * x) * np.exp(np.sin(2 * x))
    assert np.all(np.abs(found.value - exact) <= found.uncertainty)
    assert np.median(found.uncertainty) <= 1e-11 + 1e4 * noise


# How it is asked for


@pytest.mark.parametrize("batch_size", [None, 5])
def test_batches_change_nothing(batch_size):
    wanted = gradient_report(noisy, X)
    got = gradient_report(noisy, X, batch_size=batch_size)
    for one, other in zip(got.leaves, wanted.leaves, strict=True):
        assert one.gradient == pytest.approx(other.gradient, rel=1e-12)
        assert abs(one.numerical - other.numerical) < one.uncertainty + other.uncertainty


def test_the_table():
    report = gradient_report(polynomial, {"right": X, "off": X[:2]})
    headline, blank, header, *rows = str(report).splitlines()
    assert headline.startswith("The gradient is WRONG. Worst: inputs['off'], relative error 1.0e-02.")
    assert blank == ""
    assert header.split() == ["leaf", "lane", "gradient", "numerical", "uncertainty", "relative", "error", "verdict"]
    assert [row.split()[-1] for row in rows] == ["wrong", "right", "wrong"]
    assert len({row.rindex("  ") for row in (header, *rows)}) == 1


@pytest.mark.parametrize(
    ("loss", "inputs", "options", "error", "message"),
    [
        (lambda x: x, X, {}, TypeError, r"must return a real floating-point scalar, got f64\[3\]"),
        (lambda x: 1j * x[0], X, {}, TypeError, r"must return a real floating-point scalar, got c128\[\]"),
        (lambda x: (x[0], x), X, {}, TypeError, "must return a real floating-point scalar, got"),
        (lambda x: 1, X, {}, TypeError, "must return a real floating-point scalar, got 1"),
        (lambda x: x, {"a": 1.0, "b": jnp.arange(3)}, {}, ValueError, "Python floats are left as they are"),
        (lambda x: jnp.log(x[1]), X, {}, ValueError, "loss at the inputs is not finite: there"),
        (jnp.log, X, {"in_axes": 0}, ValueError, r"not finite in lanes \[1\]"),
        (jnp.sum, X, {"directions": 0}, ValueError, "directions must be a positive integer, got 0"),
        (jnp.sum, X, {"batch_size": -1}, ValueError, "batch_size must be a positive integer, got -1"),
        (jnp.sum, X, {"rtol": 0.0}, ValueError, "rtol must be positive, got 0.0"),
        (jnp.sum, X, {"largest_step": float("nan")}, ValueError, "largest_step must be positive, got nan"),
    ],
)
def test_errors(loss, inputs, options, error, message):
    with pytest.raises(error, match=message):
        check_gradients(loss, inputs, **options)
