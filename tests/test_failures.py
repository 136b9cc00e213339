"""Solves that cannot succeed: statuses, errors, bad arguments, and lanes that fail beside lanes that do not."""

import functools
import inspect
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adjoint_jax as aj
from adjoint_jax import Status
from adjoint_jax.integrate import Integrator, Stretch
from adjoint_jax.problem import Problem
from adjoint_jax.recorders import AbstractRecorder

TS = np.array([0.1, 0.25, 0.4, 0.9, 2.5])
"""Of the problems below, those that stop do so between 0.4 and 0.9 or later; nothing in them reaches 2.5 but the end."""


def decay(t, y, args):
    return -y


def nan_after_half(t, y, args):
    return jnp.where(t > 0.5, jnp.nan, -y)


def blow_up(t, y, args):
    """From 2: y = 1 / (1/2 - t), with a pole at 1/2."""
    return y**2


def leaves_its_domain(t, y, args):
    """sqrt(y) falls in a straight line, with y = 0 crossed at 2 - 0.2 ln 11 if started at 1."""
    return -jnp.sqrt(y) - 0.1


def infinite_at_start(t, y, args):
    return 1 / t + 0 * y


def jump_at_half(t, y, args):
    return jnp.where(t > 0.5, 1e3, 0.0) * jnp.ones_like(y)


CROSSING = 2 - 0.2 * np.log(11)
PID = aj.PIDController(rtol=1e-6, atol=1e-8)
CASES = {
    # name: field, y0, options, statuses, the time at which it ends, its closed form before
    "nan field": (nan_after_half, 1.0, {"controller": PID}, {Status.NON_FINITE}, 0.5, lambda t: np.exp(-t)),
    "pole": (
        blow_up, 2.0, {"controller": PID}, {Status.NON_FINITE, Status.STEP_SIZE_UNDERFLOW}, 0.5, lambda t: 1 / (0.5 - t)
    ),
    "sqrt": (leaves_its_domain, 1.0, {"controller": PID}, {Status.NON_FINITE}, CROSSING, None),
    "infinite at t0": (infinite_at_start, 1.0, {"controller": PID}, {Status.NON_FINITE}, 0.0, None),
    "dtmin": (
        jump_at_half,
        1.0,
        {"controller": aj.PIDController(rtol=1e-6, atol=1e-8, dtmin=1e-3, dtmax=0.05)},
        {Status.STEP_SIZE_UNDERFLOW},
        0.5,
        lambda t: np.ones_like(t),
    ),
    "constant steps": (
        nan_after_half, 1.0, {"controller": aj.ConstantStepSize(0.01)}, {Status.NON_FINITE}, 0.5, lambda t: np.exp(-t)
    ),
    "fixed steps": (
        nan_after_half, 1.0, {"controller": aj.FixedSteps(300)}, {Status.NON_FINITE}, 0.5, lambda t: np.exp(-t)
    ),
    "max_steps": (
        decay,
        1.0,
        {"controller": aj.PIDController(dtmax=0.05), "max_steps": 10},
        {Status.MAX_STEPS_REACHED},
        0.5,
        lambda t: np.exp(-t),
    ),
    "max_steps of constant steps": (
        decay,
        1.0,
        {"controller": aj.ConstantStepSize(0.05), "max_steps": 10},
        {Status.MAX_STEPS_REACHED},
        0.5,
        lambda t: np.exp(-t),
    ),
    "float32": (
        decay, np.float32(1.0), {"controller": aj.PIDController(1e-12, 1e-12)}, {Status.TOLERANCE_TOO_SMALL}, 0.0, None
    ),
}  # fmt: skip
EVERYTHING = (aj.SaveAt(TS, t0=True), aj.SaveAt(t1=True), aj.SaveAt(steps=True), aj.SaveAt(dense=True))
each_case = pytest.mark.parametrize("name", CASES)


@each_case
def test_a_failure_is_a_status_with_its_time_and_nan_only_behind_it(name):
    field, y0, options, statuses, end, exact = CASES[name]
    solution = aj.solve(field, 0.0, 3.0, y0, saveat=EVERYTHING, throw=False, **options)
    dense = np.asarray(solution.evaluate(TS))
    solution = jax.tree.map(np.asarray, solution)
    rows, final, steps, _ = solution.ys
    assert Status(int(solution.status)) in statuses
    assert solution.t_end == pytest.approx(end, abs=0.011)
    assert solution.t_end <= end + 1e-3
    assert np.isnan(final).all()
    reached = np.concatenate([[True], solution.t_end >= TS])
    np.testing.assert_array_equal(np.isnan(rows), ~reached)
    assert rows[0] == y0
    accepted = int(solution.stats.accepted)
    np.testing.assert_array_equal(np.isnan(steps), np.arange(len(steps)) >= accepted)
    np.testing.assert_array_equal(np.isnan(solution.ts[2]), np.arange(len(steps)) >= accepted)
    assert accepted == 0 or solution.ts[2][accepted - 1] == solution.t_end
    np.testing.assert_array_equal(np.isnan(dense), ~reached[1:])
    if exact is not None:
        assert reached.sum() == 4
        np.testing.assert_allclose(rows[1:4], exact(TS[:3]), rtol=1e-5)
        np.testing.assert_allclose(dense[:3], exact(TS[:3]), rtol=1e-5)


REMEDIES = {
    "nan field": "NaN or infinite",
    "pole": "singularity|blows up",
    "sqrt": "sqrt or log",
    "infinite at t0": "division by zero",
    "dtmin": "jump_ts",
    "constant steps": "NaN or infinite",
    "fixed steps": "NaN or infinite",
    "max_steps": "Raise max_steps",
    "max_steps of constant steps": "Raise max_steps",
    "float32": "float64 state",
}


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("sqrt", "constant steps")])
def test_throw_raises_an_error_that_names_time_steps_and_remedy(name):
    field, y0, options, statuses, *_ = CASES[name]
    report = aj.solve(field, 0.0, 3.0, y0, saveat=EVERYTHING, throw=False, **options)
    with pytest.raises(aj.SolveError, match=REMEDIES[name]) as caught:
        aj.solve(field, 0.0, 3.0, y0, saveat=EVERYTHING, **options)
    message = str(caught.value)
    assert any(message.startswith(status.name) for status in statuses)
    assert f"at t = {float(report.t_end):.9g}" in message
    assert f"{report.stats.accepted} accepted" in message
    assert f"{report.stats.rejected} rejected" in message
    assert "throw=False" in message


def message_of_a_failed_run(function, *arguments):
    """JAX raises what a callback raised as either of these, the more often the first."""

    def run():
        jax.block_until_ready(function(*arguments))
        jax.effects_barrier()

    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="SolveError") as caught:
        run()
    return str(caught.value)


def test_throw_within_jit_raises_a_runtime_error_with_the_same_message():
    @jax.jit
    def end(t1):
        return aj.solve(nan_after_half, 0.0, t1, 1.0, controller=PID).ys[0]

    message = message_of_a_failed_run(end, 3.0)
    assert "NON_FINITE at t = 0." in message
    assert "accepted" in message
    assert "shorter steps did not help" in message
    np.testing.assert_allclose(end(0.4), np.exp(-0.4), rtol=1e-5)


@pytest.mark.parametrize(("tolerance", "status"), [(1e-6, Status.SUCCESS), (1e-9, Status.TOLERANCE_TOO_SMALL)])
def test_leaves_are_resolved_in_their_own_precision(tolerance, status):
    y0, controller = (np.float32(1.0), np.float64(1.0)), aj.PIDController(tolerance, tolerance)

    def decays(t, y, args):
        return jax.tree.map(jnp.negative, y)

    assert aj.solve(decays, 0.0, 1.0, y0, controller=controller, throw=False).status == status


def test_a_tolerance_that_is_no_number_is_no_tolerance():
    """Whatever the error is: here there is none."""

    def status(rtol):
        controller = aj.PIDController(rtol, 1e-6)
        return aj.solve(lambda t, y, args: jnp.zeros_like(y), 0.0, 1.0, 1.0, controller=controller, throw=False).status

    assert jax.jit(status)(jnp.nan) != Status.SUCCESS == jax.jit(status)(1e-6)


def test_throw_under_vmap_names_the_lane():
    @jax.jit
    @jax.vmap
    def end(y0):
        return aj.solve(blow_up, 0.0, 1.0, y0, controller=PID).ys[0]

    np.testing.assert_allclose(end(np.array([0.5, 0.4, 0.25])), [1.0, 2 / 3, 1 / 3], rtol=1e-5)
    message = message_of_a_failed_run(end, np.array([0.5, 2.0, 0.25]))
    assert "lane 1 of (3,) at t = 0.5" in message


# Times known only at run time


@jax.jit
def rows_at(t0, t1, ts):
    return aj.solve(decay, t0, t1, 1.0, saveat=(aj.SaveAt(ts), aj.SaveAt(t1=True)), throw=False)


@pytest.mark.parametrize(
    ("t0", "t1", "ts"),
    [
        (0.0, 1.0, [0.0, 0.5, 1.5]),
        (0.0, 1.0, [-0.1, 0.5, 1.0]),
        (0.0, 1.0, [0.5, 0.2, 1.0]),
        (0.0, 1.0, [0.0, np.nan, 1.0]),
        (0.0, 1.0, [np.nan, 0.5, 1.0]),
        (1.0, 0.0, [0.0, 0.5, 1.0]),
        (0.0, np.nan, [0.0, 0.0, 0.0]),
        (np.nan, 1.0, [0.0, 0.5, 1.0]),
        (0.0, np.inf, [0.0, 0.5, 1.0]),
    ],
)
def test_bad_traced_times_are_a_status(t0, t1, ts):
    solution = rows_at(t0, t1, np.array(ts))
    assert solution.status == Status.INVALID_TIMES
    assert solution.stats.steps == 0
    assert np.isnan(solution.ys[1]).all()
    assert np.isnan(solution.ys[0][np.array(ts) != t0]).all()


def test_good_traced_times_are_fine():
    solution = rows_at(1.0, 0.0, np.array([1.0, 0.5, 0.0]))
    assert solution.status == Status.SUCCESS
    np.testing.assert_allclose(solution.ys[0], np.exp([0.0, 0.5, 1.0]), rtol=1e-4)


def test_bad_traced_times_raise_at_run_time():
    ys = jax.jit(lambda ts: aj.odeint(decay, 1.0, ts))
    np.testing.assert_allclose(ys(np.array([0.0, 1.0, 2.0])), np.exp([0.0, -1.0, -2.0]), rtol=1e-4)
    message = message_of_a_failed_run(ys, np.array([0.0, 3.0, 2.0]))
    assert "INVALID_TIMES" in message
    assert "not monotone" in message


@jax.jit
def status_on_grid(grid):
    return aj.solve(decay, 0.0, 1.0, 1.0, controller=aj.StepTo(grid), throw=False).status


@pytest.mark.parametrize(
    "grid", [[0.0, 0.3, 0.5, 0.9], [0.1, 0.3, 0.5, 1.0], [0.0, 0.7, 0.5, 1.0], [0.0, 0.3, np.nan, 1.0]]
)
def test_a_bad_traced_grid_is_a_status(grid):
    assert status_on_grid(np.array(grid)) == Status.INVALID_TIMES


# Bad arguments: the error says what was given and what was expected


def solve(field=decay, t0=0.0, t1=1.0, y0=np.ones(2), args=None, **options):
    """Without the run-time annotation checks of the tests, which would answer first."""
    return inspect.unwrap(aj.solve)(field, t0, t1, y0, args, **options)


BAD = {
    "integer state": (lambda: solve(y0=np.arange(3)), TypeError, ["int", "floating-point"]),
    "Python integer": (lambda: solve(y0={"a": 1.0, "b": 1}), TypeError, ["'b'", "int", "1.0 for 1"]),
    "bool": (lambda: solve(y0=np.array(True)), TypeError, ["bool", "floating-point"]),
    "text state": (lambda: solve(y0="one"), TypeError, ["y0", "one"]),
    "shape": (lambda: solve(lambda t, y, a: y[:1]), ValueError, ["(2,)", "(1,)", "shape"]),
    "scalar for vector": (lambda: solve(lambda t, y, a: jnp.sum(y)), ValueError, ["(2,)", "()"]),
    "structure": (lambda: solve(lambda t, y, a: (y, y)), TypeError, ["structure", "PyTreeDef(*)", "PyTreeDef((*, *))"]),
    "no return": (lambda: solve(lambda t, y, a: None), TypeError, ["structure", "None"]),
    "complex for real": (lambda: solve(lambda t, y, a: 1j * y), TypeError, ["complex128", "float64", "make y0 complex"]),
    "too late": (lambda: solve(saveat=aj.SaveAt(np.array([0.5, 1.5]))), ValueError, ["ts", "1.5", "t1 = 1.0"]),
    "too early": (lambda: solve(saveat=aj.SaveAt(np.array([-0.5, 0.5]))), ValueError, ["ts", "-0.5", "t0 = 0.0"]),
    "turning": (lambda: solve(saveat=aj.SaveAt(np.array([0.6, 0.5]))), ValueError, ["sorted", "0.6", "direction"]),
    "wrong direction": (
        lambda: solve(t0=1.0, t1=0.0, saveat=aj.SaveAt(np.array([0.1, 0.5]))), ValueError, ["sorted", "direction"]
    ),
    "nan time": (lambda: solve(saveat=aj.SaveAt(np.array([0.1, np.nan]))), ValueError, ["ts", "nan"]),
    "2-D ts": (lambda: solve(saveat=aj.SaveAt(np.ones((2, 1)))), ValueError, ["one-dimensional", "(2, 1)"]),
    "scalar ts": (lambda: solve(saveat=aj.SaveAt(0.5)), ValueError, ["one-dimensional", "()"]),
    "empty ts": (lambda: solve(saveat=aj.SaveAt(np.zeros(0))), ValueError, ["at least one", "(0,)"]),
    "odeint empty": (lambda: aj.odeint(decay, 1.0, np.zeros(0)), ValueError, ["odeint", "(0,)"]),
    "odeint scalar": (lambda: aj.odeint(decay, 1.0, 3.0), ValueError, ["one-dimensional", "()"]),
    "odeint turning": (lambda: aj.odeint(decay, 1.0, np.array([0.0, 2.0, 1.0, 3.0])), ValueError, ["sorted", "2."]),
    "odeint saveat": (
        lambda: aj.odeint(decay, 1.0, np.array([0.0, 1.0]), saveat=aj.SaveAt(t1=True)), ValueError, ["saveat", "solve"]
    ),
    "vector t1": (lambda: solve(t1=np.array([1.0, 2.0])), ValueError, ["t1", "scalar", "(2,)", "vmap"]),
    "infinite t1": (lambda: solve(t1=np.inf), ValueError, ["finite", "inf"]),
    "nan t0": (lambda: solve(t0=np.nan), ValueError, ["finite", "nan"]),
    "complex t0": (lambda: solve(t0=1j), (TypeError, ValueError), ["t0", "complex"]),
    "negative rtol": (lambda: solve(controller=aj.PIDController(rtol=-1e-3)), ValueError, ["rtol", "-0.001", "negative"]),
    "negative atol": (lambda: solve(controller=aj.PIDController(atol={"a": -1.0})), ValueError, ["atol", "-1.0"]),
    "nan rtol": (lambda: solve(controller=aj.PIDController(rtol=np.nan)), ValueError, ["rtol", "nan"]),
    "dtmin": (lambda: solve(controller=aj.PIDController(dtmin=0.0)), ValueError, ["dtmin", "positive", "0.0"]),
    "dt": (lambda: solve(controller=aj.ConstantStepSize(-0.1)), ValueError, ["dt", "positive", "-0.1"]),
    "2-D jumps": (
        lambda: solve(controller=aj.PIDController(jump_ts=np.ones((1, 2)))), ValueError, ["jump_ts", "(1, 2)"]
    ),
    "solver class": (lambda: solve(solver=aj.Tsit5), TypeError, ["solver", "instance", "Tsit5(...)"]),
    "controller class": (lambda: solve(controller=aj.PIDController), TypeError, ["controller", "PIDController(...)"]),
    "saveat class": (lambda: solve(saveat=aj.SaveAt), TypeError, ["saveat", "SaveAt(...)"]),
    "adjoint class": (lambda: solve(adjoint=aj.DiscreteAdjoint), TypeError, ["adjoint", "DiscreteAdjoint(...)"]),
    "solver name": (lambda: solve(solver="Tsit5"), TypeError, ["solver", "'Tsit5'", "Tsit5()"]),
    "bare tableau": (lambda: solve(solver=aj.Tsit5().tableau), TypeError, ["solver", "ExplicitRungeKutta"]),
    "controller number": (lambda: solve(controller=0.1), TypeError, ["controller", "0.1"]),
    "saveat times": (lambda: solve(saveat=np.array([0.5])), TypeError, ["saveat", "SaveAt(ts)"]),
    "no estimate": (lambda: solve(solver=aj.Euler()), ValueError, ["Euler", "error estimate", "ConstantStepSize"]),
    "dt0 and grid": (lambda: solve(controller=aj.FixedSteps(3), dt0=0.1), ValueError, ["dt0", "FixedSteps"]),
    "dt0 and dt": (lambda: solve(controller=aj.ConstantStepSize(0.1), dt0=0.1), ValueError, ["dt0", "ConstantStepSize"]),
    "negative dt0": (lambda: solve(dt0=-0.1), ValueError, ["dt0", "-0.1", "positive"]),
    "zero dt0": (lambda: solve(dt0=0.0), ValueError, ["dt0", "0.0", "positive"]),
    "not callable": (lambda: solve(field=3.0), TypeError, ["vector_field", "callable", "3.0"]),
    "two parameters": (lambda: solve(field=lambda t, y: -y), TypeError, ["vector_field(t, y, args)", "(t, y)"]),
    "no steps": (lambda: solve(max_steps=0), ValueError, ["max_steps", "positive", "0"]),
    "float max_steps": (lambda: solve(max_steps=10.0), ValueError, ["max_steps", "integer", "10.0"]),
    "no fixed steps": (lambda: aj.FixedSteps(0), ValueError, ["FixedSteps", "at least one", "0"]),
    "float fixed steps": (lambda: aj.FixedSteps(2.5), TypeError, ["float", "integer"]),
    "short grid": (lambda: solve(controller=aj.StepTo([0.0])), ValueError, ["StepTo", "two", "(1,)"]),
    "wrong grid": (lambda: solve(controller=aj.StepTo([0.0, 0.5])), ValueError, ["StepTo", "t1 = 1.0", "0.5"]),
    "turning grid": (lambda: solve(controller=aj.StepTo([0.0, 0.7, 0.5, 1.0])), ValueError, ["StepTo", "sorted", "0.7"]),
    "nothing saved": (lambda: aj.SaveAt(), ValueError, ["saves nothing", "ts, t0, t1"]),
    "steps and ts": (lambda: aj.SaveAt(np.ones(1), steps=True), ValueError, ["steps=True", "two SaveAts"]),
    "steps and t1": (lambda: aj.SaveAt(steps=True, t1=True), ValueError, ["twice"]),
    "dense fn": (lambda: aj.SaveAt(dense=True, fn=lambda t, y, a: y), ValueError, ["fn", "evaluate"]),
    "tolerance tree": (
        lambda: solve(lambda t, y, a: y, y0=(1.0, 2.0), controller=aj.PIDController(rtol=(1e-3, 1e-3, 1e-3))),
        ValueError,
        ["rtol", "pytree like y0", "PyTreeDef((*, *))"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_errors_that_say_what_was_given_and_expected(name):
    call, kind, words = BAD[name]
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


# Lanes that fail beside lanes that do not


def lane_field(t, y, lane):
    """A kind for every lane: fine, NaN from some time on, blowing up, fast and so out of steps."""
    kind, rate = lane
    good = jnp.stack([y[1], -(rate**2) * y[0]])
    nan = jnp.where(t > 0.5, jnp.nan, good)
    pole = jnp.stack([y[0] ** 2 + 1, y[1]]) * 2
    return jnp.select([kind == 0, kind == 1, kind == 2], [good, nan, pole])


KINDS = np.array([0, 1, 0, 2, 0, 0])
RATES = np.array([1.0, 1.0, 3.0, 1.0, 200.0, 0.5])
EXPECTED = np.array(
    [Status.SUCCESS, Status.NON_FINITE, Status.SUCCESS, Status.NON_FINITE, Status.MAX_STEPS_REACHED, Status.SUCCESS]
)
LANE_TS = np.array([0.0, 0.2, 0.4, 1.0, 2.0])


def lane_solution(kind, rate, controller):
    saveat = (aj.SaveAt(LANE_TS), aj.SaveAt(t1=True), aj.SaveAt(steps=True), aj.SaveAt(dense=True))
    y0 = jnp.array([1.0, 0.0])
    solution = aj.solve(
        lane_field, 0.0, 2.0, y0, (kind, rate), controller=controller, saveat=saveat, max_steps=150, throw=False
    )
    inside = jnp.linspace(0.0, 2.0, 9)
    return solution.ts, solution.ys, solution.evaluate(inside), solution.stats, solution.status, solution.t_end


@pytest.mark.parametrize(
    "controller", [aj.PIDController(1e-6, 1e-8), aj.FixedSteps(100), aj.ConstantStepSize(0.025)], ids=type
)
def test_a_failing_lane_touches_no_other(controller):
    # Where a lane fails, adaptive steps follow from rounding errors, which XLA's newer emitters make alike in both: those
    # that conftest.py has turned off, where there is a choice.
    adapts = isinstance(controller, aj.PIDController)
    turned_off = adapts and "fusion_emitters" in os.environ["XLA_FLAGS"]
    jit = functools.partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": True} if turned_off else None)
    solution = functools.partial(lane_solution, controller=controller)
    single = jit(solution)
    lanes = jit(jax.vmap(solution))
    together = jax.tree.map(np.asarray, lanes(KINDS, RATES))

    def by_itself(lane):
        return jax.tree.map(lambda leaf: leaf[0], lanes(KINDS[lane : lane + 1], RATES[lane : lane + 1]))

    good = np.flatnonzero(EXPECTED == Status.SUCCESS)
    status = together[4]
    np.testing.assert_array_equal(status[good], Status.SUCCESS)
    assert status[1] == Status.NON_FINITE
    if adapts:
        assert status[3] != Status.SUCCESS
        assert status[4] == Status.MAX_STEPS_REACHED
    for lane in range(len(KINDS)):
        alone = single(KINDS[lane], RATES[lane]) if lane in good else by_itself(lane)
        mine = jax.tree.map(lambda leaf: leaf[lane], together)  # noqa: B023
        if lane in good:
            _, ys, dense, stats, *_ = mine
            np.testing.assert_allclose(ys[0][:, 0], np.cos(RATES[lane] * LANE_TS), atol=2e-4)
            assert not any(np.isnan(leaf).any() for leaf in (ys[0], ys[1], dense))
            assert jax.tree.map(int, stats) == jax.tree.map(int, alone[3])
        # A failing lane ends in the rounding errors of its step sizes, and so do the places where a good one steps. So it
        # is compared with a lane by itself, which is computed in the same operations.
        rtol = 1e-12 if lane in good else 1e-5
        loose = max(rtol, 1e-7)
        for (path, a), b in zip(jax.tree.leaves_with_path(mine), jax.tree.leaves(alone), strict=True):
            is_step = [getattr(key, "idx", None) for key in path][:2] in ([0, 2], [1, 2])
            tolerance = loose if is_step else rtol
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=f"lane {lane}, {path}")


@pytest.mark.parametrize(
    ("controller", "dt0"), [(PID, 1e-20), (aj.PIDController(dtmax=1e-20), None), (aj.ConstantStepSize(1e-20), None)]
)
def test_a_step_that_does_not_change_the_time_is_the_end(controller, dt0):
    """It is exact, and the next one would be too."""
    solution = aj.solve(decay, 1.0, 2.0, 1.0, controller=controller, dt0=dt0, throw=False)
    assert solution.status == Status.STEP_SIZE_UNDERFLOW
    assert solution.t_end == 1.0
    assert (solution.stats.accepted, solution.stats.rejected) == (0, 1)


def fails_at_its_end(t, y, args):
    rate, end = args
    return jnp.where(t > end, jnp.nan, -rate * y)


STEEPNESS = np.array([1e8, 1e-9])


def exploding(adjoint, steepness):
    """y(t0) and y(0.3) of dense output: with a first step of 1 a steep lane explodes in its first attempt."""
    solution = aj.solve(
        lambda t, y, k: -k * y**9,
        0.0,
        1.0,
        jnp.array([2.0]),
        steepness,
        dt0=1.0,
        controller=aj.PIDController(1e-6, 1e-6),
        saveat=(aj.SaveAt(dense=True), aj.SaveAt(np.array([0.0, 1e-9, 0.5]))),
        adjoint=adjoint,
        throw=False,
    )
    return jnp.concatenate([solution.evaluate(jnp.array([0.0, 0.3]))[:, 0], solution.ys[1][:, 0]])


@pytest.mark.parametrize("adjoint", [aj.DiscreteAdjoint(), aj.InterpolatingAdjoint(), aj.GaussAdjoint()], ids=type)
def test_a_step_that_explodes_in_one_lane_and_is_repeated_leaves_nothing_behind(adjoint):
    values = functools.partial(exploding, adjoint)
    lanes = jax.jit(jax.vmap(values))(STEEPNESS)
    np.testing.assert_array_equal(lanes[:, 0], 2.0)
    np.testing.assert_allclose(lanes[0], (2.0**-8 + 8 * 1e8 * np.array([0.0, 0.3, 0.0, 1e-9, 0.5])) ** (-1 / 8), rtol=1e-4)

    def some(steepness):
        return jnp.sum(values(steepness)[2:])

    together, single = (jax.jit(wrapped) for wrapped in (jax.vmap(jax.grad(some)), jax.grad(some)))
    np.testing.assert_allclose(together(STEEPNESS), [single(k) for k in STEEPNESS], rtol=1e-5)


def test_gradients_of_lanes_where_steps_are_taken_again_behind_failures():
    """One lane cannot start, one fails in the first segment of steps, one in a later one; their steps are chosen again in
    lockstep. What each saved before its end has the gradient of a closed form."""
    ts, starts = jnp.array([1.1, 1.7, 2.9]), jnp.array([1e-20, 1e-3, 1e-3, 1e-3])
    ends, reached = jnp.array([5.0, 1.2, 2.4, 5.0]), jnp.array([0, 1, 2, 3])
    options = {"controller": aj.PIDController(1e-9, 1e-9, dtmax=2e-3), "throw": False}

    def loss(rate, end, dt0, reached):
        solution = aj.solve(fails_at_its_end, 1.0, 3.0, 1.0, (rate, end), dt0=dt0, saveat=aj.SaveAt(ts), **options)
        return jnp.sum(jnp.where(jnp.arange(3) < reached, solution.ys, 0.0)), solution.stats.accepted

    rates = jnp.array([0.5, 1.0, 1.5, 2.0])
    ours, accepted = jax.jit(jax.vmap(jax.grad(loss, has_aux=True)))(rates, ends, starts, reached)
    exact = -(ts - 1.0) * jnp.exp(-rates[:, None] * (ts - 1.0))
    expected = jnp.sum(jnp.where(jnp.arange(3) < reached[:, None], exact, 0.0), axis=1)
    assert accepted[0] == 0 < accepted[1] < 256 < accepted[2] < accepted[3]
    np.testing.assert_allclose(ours, expected, rtol=1e-7)


class FirstMark(AbstractRecorder):
    """Records where an integration starts."""

    def start(self, problem, layout, mark):
        return mark

    def note(self, step, accepted):
        return ()

    def write(self, record, place, notes):
        return record


def test_steps_are_not_taken_again_for_ever():
    """Told that an integration came further than it can, and of more steps than there are, it fails no more often than it
    may attempt steps."""
    integrator = Integrator(aj.Tsit5(), PID.prepare(jnp.float64), None, 256)
    problem = Problem(nan_after_half, None, (), jnp.ones(()), jnp.zeros(()), jnp.ones(()))
    outcome = integrator(problem, [FirstMark()], jnp.array(True))
    stretch = Stretch(jnp.int32(0), jnp.int32(1000), 8, jnp.array(0.9))
    again = jax.jit(lambda mark: integrator.again(problem, mark, stretch, None, None)[0])(outcome.records[0])
    assert outcome.report.status == Status.NON_FINITE
    assert 0.49 < again.choice.t <= 0.5
