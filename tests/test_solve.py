"""Forward solves against closed forms and SciPy: accuracy, odeint, what is saved, states, dtypes, controllers, counts."""

import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg

import adjoint_jax as aj

TIGHT = aj.PIDController(rtol=1e-10, atol=1e-12)


def oscillator(t, y, omega):
    """y = (cos, -omega sin) of omega t from (1, 0)."""
    return jnp.stack([y[1], -(omega**2) * y[0]])


def oscillation(t, omega=1.0):
    t = np.asarray(t)
    return np.stack([np.cos(omega * t), -omega * np.sin(omega * t)], axis=-1)


START = np.array([1.0, 0.0])


def fetched(solution):
    """With NumPy arrays, whose slices need no compilation."""
    return jax.tree.map(np.asarray, solution)


@jax.jit
def evaluated(solution, all_times):
    """The dense output at each of several arrays of times, in one compilation."""
    return [solution.evaluate(times) for times in all_times]


# Accuracy


def lotka_volterra(xp, t, y):
    x, z = y
    return xp.stack([1.1 * x - 0.4 * x * z, 0.1 * x * z - 0.4 * z])


def van_der_pol(xp, t, y):
    x, v = y
    return xp.stack([v, 5.0 * (1 - x**2) * v - x])


def kepler(xp, t, y):
    """Eccentricity 0.6, started at the pericentre."""
    cubed = (y[0] ** 2 + y[1] ** 2) ** 1.5
    return xp.stack([y[2], y[3], -y[0] / cubed, -y[1] / cubed])


def arenstorf(xp, t, y):
    """The restricted three-body problem of Hairer, Nørsett and Wanner, II.0."""
    mu = 0.012277471
    x, z, u, v = y
    d1 = ((x + mu) ** 2 + z**2) ** 1.5
    d2 = ((x - 1 + mu) ** 2 + z**2) ** 1.5
    du = x + 2 * v - (1 - mu) * (x + mu) / d1 - mu * (x - 1 + mu) / d2
    return xp.stack([u, v, du, z - 2 * u - (1 - mu) * z / d1 - mu * z / d2])


PERIOD = 17.0652165601579625588917206249
PROBLEMS = {
    "lotka_volterra": (lotka_volterra, [10.0, 5.0], 20.0, aj.Tsit5(), 1e-7),
    "van_der_pol": (van_der_pol, [2.0, 0.0], 12.0, aj.Dopri5(), 1e-5),
    "kepler": (kepler, [0.4, 0.0, 0.0, 2.0], 20.0, aj.Vern7(), 1e-6),
    "arenstorf": (arenstorf, [0.994, 0.0, 0.0, -2.00158510637908252240537862224], PERIOD, aj.Dopri8(), 1e-4),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_adaptive_solutions_agree_with_scipy(name):
    field, y0, t1, solver, bound = PROBLEMS[name]
    ts = np.linspace(0.0, t1, 41)
    reference = scipy.integrate.solve_ivp(
        lambda t, y: field(np, t, y), (0.0, t1), y0, "DOP853", ts, rtol=1e-13, atol=1e-14
    ).y.T
    options = {"rtol": 1e-10, "atol": 1e-12, "solver": solver, "max_steps": 20_000}
    ys = np.asarray(aj.odeint(lambda t, y, args: field(jnp, t, y), np.array(y0), ts, **options))
    assert np.abs(ys - reference).max() < bound
    if name == "arenstorf":
        np.testing.assert_allclose(ys[-1][:2], y0[:2], atol=1e-5)
    if name == "kepler":
        energy = (ys[:, 2] ** 2 + ys[:, 3] ** 2) / 2 - 1 / np.hypot(ys[:, 0], ys[:, 1])
        np.testing.assert_allclose(energy, -0.5, atol=1e-8)


ADAPTIVE = (aj.Midpoint, aj.Heun, aj.Ralston, aj.Bosh3, aj.Dopri5, aj.Tsit5, aj.Vern7, aj.Dopri8)


@pytest.mark.parametrize("method", ADAPTIVE, ids=lambda method: method.__name__)
def test_the_error_falls_with_the_tolerance(method):
    """Error per step control: errors roughly proportional to the tolerance, and near it."""
    tolerances = np.array([1e-3, 1e-5, 1e-7])

    @jax.jit
    @jax.vmap
    def end(tolerance):
        controller = aj.PIDController(rtol=tolerance, atol=tolerance)
        solution = aj.solve(oscillator, 0.0, 6.0, START, 2.0, solver=method(), controller=controller, max_steps=50_000)
        return solution.ys[0], solution.stats.accepted

    ys, accepted = end(tolerances)
    errors = np.abs(np.asarray(ys) - oscillation(6.0, 2.0)).max(axis=-1)
    accepted = np.asarray(accepted)
    assert (errors < 300 * tolerances).all(), errors
    assert errors[2] < errors[1] / 5 < errors[0] / 25
    assert accepted[0] < accepted[1] < accepted[2]


def test_a_linear_system_agrees_with_its_matrix_exponential():
    matrix = np.random.default_rng(0).normal(size=(5, 5))
    y0 = np.random.default_rng(1).normal(size=5)
    y1 = aj.solve(lambda t, y, a: a @ y, 0.0, 1.5, y0, matrix, controller=TIGHT).ys[0]
    np.testing.assert_allclose(y1, scipy.linalg.expm(1.5 * matrix) @ y0, rtol=1e-8)


def test_euler_is_exactly_the_compound_interest_formula():
    options = {"solver": aj.Euler(), "controller": aj.FixedSteps(100)}
    end = aj.solve(lambda t, z, theta: theta * z, 0.0, 1.0, 1.0, 1.0, **options).ys[0]
    assert end == pytest.approx((1 + 1 / 100) ** 100, rel=1e-13)
    assert round(float(end), 4) == 2.7048
    matrix, y0 = np.array([[0.0, 1.0], [-2.0, -0.3]]), np.array([1.0, 0.5])
    y1 = aj.solve(
        lambda t, z, a: a @ z, 0.0, 2.0, y0, matrix, solver=aj.Euler(), controller=aj.ConstantStepSize(dt=0.1)
    ).ys[0]
    np.testing.assert_allclose(y1, np.linalg.matrix_power(np.eye(2) + 0.1 * matrix, 20) @ y0, rtol=1e-12)


# odeint


@jax.jit
def odeint_oscillation(ts):
    return aj.odeint(oscillator, START, ts, 1.0, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "ts",
    [[0.0, 0.5, 1.0, 4.0], [0.0, 0.0, 2.0, 2.0], [0.0, 1.0, 1.0, 1.0], [0.0, -1.0, -2.0, -2.5], [0.0, 0.0, 0.0, 0.0]],
    ids=["ascending", "repeated", "thrice", "descending", "constant"],
)
def test_odeint_has_a_row_for_each_time(ts):
    ts = np.array(ts)
    ys = odeint_oscillation(ts)
    np.testing.assert_array_equal(ys[0], START)
    np.testing.assert_allclose(ys, oscillation(ts), atol=1e-7)


def test_odeint_starts_anywhere_and_takes_one_time():
    ts = np.array([2.0, 1.0, -1.0])
    ys = aj.odeint(oscillator, oscillation(2.0), ts, 1.0, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(ys, oscillation(ts), atol=1e-7)
    np.testing.assert_array_equal(aj.odeint(oscillator, START, np.array([3.0]), 1.0), START[None])


@pytest.mark.parametrize("kind", [list, tuple], ids=lambda kind: kind.__name__)
def test_times_may_be_a_sequence(kind):
    ts = kind([0.0, 0.5, 1.0])
    np.testing.assert_allclose(aj.odeint(oscillator, START, ts, 1.0), oscillation(np.array(ts)), atol=1e-4)
    solution = aj.solve(oscillator, 0, 1, START, 1.0, saveat=aj.SaveAt(ts))
    np.testing.assert_allclose(solution.ys, oscillation(np.array(ts)), atol=1e-4)


# SaveAt


INNER = np.array([0.0, 0.3, 0.3, 1.7, 4.99, 5.0])


@pytest.fixture(scope="module")
def saved():
    """Everything that can be saved, from one solve."""
    scale = jnp.array(2.0)
    saveat = {
        "t0": aj.SaveAt(t0=True),
        "t1": aj.SaveAt(t1=True),
        "ts": aj.SaveAt(INNER),
        "all": aj.SaveAt(INNER[1:3], t0=True, t1=True),
        "steps": aj.SaveAt(steps=True, t0=True),
        "dense": aj.SaveAt(dense=True),
        "fn": (
            aj.SaveAt(INNER, fn=lambda t, y, omega: {"sum": y.sum() * scale, "count": jnp.int32(7), "t": t + omega}),
            aj.SaveAt(t1=True, fn=lambda t, y, omega: y[0]),
            aj.SaveAt(steps=True, fn=lambda t, y, omega: t * y),
        ),
    }
    return fetched(aj.solve(oscillator, 0.0, 5.0, START, 1.0, controller=TIGHT, saveat=saveat, max_steps=300))


@pytest.mark.parametrize(("kind", "ts"), [("t0", [0.0]), ("t1", [5.0]), ("ts", INNER), ("all", [0.0, 0.3, 0.3, 5.0])])
def test_saved_rows_are_the_solution_at_their_times(saved, kind, ts):
    np.testing.assert_array_equal(saved.ts[kind], ts)
    np.testing.assert_allclose(saved.ys[kind], oscillation(ts), atol=1e-8)


def test_saved_steps_are_padded_and_counted(saved):
    count = int(saved.stats.accepted) + 1
    ts, ys = saved.ts["steps"], saved.ys["steps"]
    assert ts.shape == (301,)
    assert ys.shape == (301, 2)
    assert 10 < count < 301
    assert np.isnan(ts[count:]).all()
    assert np.isnan(ys[count:]).all()
    assert (np.diff(ts[:count]) > 0).all()
    assert (ts[0], ts[count - 1]) == (0.0, 5.0)
    np.testing.assert_allclose(ys[:count], oscillation(ts[:count]), atol=1e-8)
    np.testing.assert_array_equal(ys[count - 1], saved.ys["t1"][0])


def test_dense_output_covers_the_interval_and_nothing_else(saved):
    assert saved.ts["dense"] is None
    assert saved.ys["dense"] is None
    ts = np.linspace(0.0, 5.0, 57)
    outside = np.array([-0.1, 5.1, np.nextafter(5.0, 6.0), -1e-300, np.nan])
    table, inner, start, end, nothing, steps = evaluated(
        saved, (ts.reshape(19, 3), INNER, 0.0, 5.0, outside, saved.ts["steps"])
    )
    assert table.shape == (19, 3, 2)
    np.testing.assert_allclose(np.reshape(table, (57, 2)), oscillation(ts), atol=1e-7)
    np.testing.assert_allclose(inner, saved.ys["ts"], rtol=1e-13, atol=1e-15)
    np.testing.assert_array_equal(start, START)
    np.testing.assert_allclose(end, saved.ys["t1"][0], rtol=1e-13)
    assert np.isnan(nothing).all()
    np.testing.assert_allclose(steps, saved.ys["steps"], rtol=1e-12, atol=1e-14)  # NaN where there are no steps


def test_fn_is_applied_to_every_kind_of_row(saved):
    rows, end, steps = saved.ys["fn"]
    np.testing.assert_allclose(rows["sum"], 2 * saved.ys["ts"].sum(axis=-1), atol=1e-14)
    np.testing.assert_array_equal(rows["count"], np.full(6, 7, np.int32))
    assert rows["count"].dtype == np.int32
    np.testing.assert_allclose(rows["t"], INNER + 1)
    np.testing.assert_array_equal(end, saved.ys["t1"][:, 0])
    count = int(saved.stats.accepted)
    expected = saved.ts["steps"][1 : count + 1, None] * saved.ys["steps"][1 : count + 1]
    np.testing.assert_allclose(steps[:count], expected, rtol=1e-14)
    assert np.isnan(steps[count:]).all()


def test_evaluate_needs_dense_output():
    solution = aj.solve(oscillator, 0.0, 1.0, START, 1.0)
    with pytest.raises(ValueError, match=r"SaveAt\(dense=True\)"):
        solution.evaluate(0.5)


def test_few_saves_over_many_steps():
    ts = np.array([0.01, 50.0, 199.99])
    controller = aj.PIDController(rtol=1e-8, atol=1e-10)
    solution = aj.solve(oscillator, 0.0, 200.0, START, 1.0, controller=controller, saveat=aj.SaveAt(ts))
    assert solution.stats.accepted > 1000
    np.testing.assert_allclose(solution.ys, oscillation(ts), atol=2e-5)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("grid", [False, True])
def test_hundreds_of_saves_in_few_steps(grid, backward):
    """Clustered, repeated, and more in one step than any block or segment holds."""
    ts = np.sort(np.concatenate([np.linspace(0.0, 4.0, 200), np.full(70, 1.0), np.linspace(2.0, 2.001, 231)]))
    ts = -ts if backward else ts
    controller = aj.FixedSteps(9) if grid else aj.PIDController(rtol=1e-8, atol=1e-10)
    solution = aj.solve(oscillator, 0.0, ts[-1], START, 1.0, solver=aj.Vern7(), controller=controller, saveat=aj.SaveAt(ts))
    assert solution.stats.accepted <= 20
    assert solution.status == aj.Status.SUCCESS
    np.testing.assert_allclose(solution.ys, oscillation(ts), atol=1e-6)


@pytest.mark.parametrize("steps", [1, 63, 64, 65, 131])
def test_rows_of_a_fixed_grid_whatever_its_length(steps):
    """Grids run in segments; rows in every one of them, at its ends too."""
    grid = np.linspace(0.0, 1.0, steps + 1)
    ts = np.sort(np.concatenate([grid, grid[:-1] + 0.4 / steps]))
    saveat = (aj.SaveAt(ts), aj.SaveAt(steps=True, t0=True))
    solver = aj.Euler()
    solution = aj.solve(lambda t, y, a: y, 0.0, 1.0, 1.0, solver=solver, controller=aj.FixedSteps(steps), saveat=saveat)
    powers = (1 + 1 / steps) ** np.arange(steps + 1)
    np.testing.assert_allclose(solution.ts[1], grid, rtol=1e-14)
    np.testing.assert_allclose(solution.ys[1], powers, rtol=1e-12)
    # Euler's dense output is the straight line between two steps.
    np.testing.assert_allclose(solution.ys[0], np.interp(ts, grid, powers), rtol=1e-12)
    assert solution.stats.accepted == steps


# States


def test_pytree_states_keep_their_structure_shapes_and_dtypes():
    y0 = {
        "matrix": np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        "pair": (1.5, np.array([0.5], np.float32)),
        "nothing": np.zeros((0, 3)),
        "complex": np.array([1.0 + 2.0j]),
        "none": None,
    }
    rates = {"matrix": -1.0, "pair": (0.5, -0.3), "nothing": 1.0, "complex": 2.0j, "none": None}

    def field(t, y, rates):
        return jax.tree.map(lambda rate, leaf: rate * leaf, rates, y)

    ts = np.array([0.0, 0.7, 2.0])
    saveat = (aj.SaveAt(ts), aj.SaveAt(steps=True), aj.SaveAt(dense=True), aj.SaveAt(t1=True))
    solution = aj.solve(field, 0.0, 2.0, y0, rates, controller=aj.PIDController(1e-6, 1e-8), saveat=saveat, max_steps=500)
    rows, steps, _, end = fetched(solution.ys)
    (at_one_time,) = evaluated(solution, (0.7,))
    assert jax.tree.structure(rows) == jax.tree.structure(y0)
    for rate, start, row, step, last, value in zip(
        *map(jax.tree.leaves, (rates, y0, rows, steps, end, at_one_time)), strict=True
    ):
        start = np.asarray(start)
        assert row.dtype == step.dtype == last.dtype == value.dtype == start.dtype
        assert row.shape == (3, *start.shape)
        assert step.shape == (500, *start.shape)
        assert value.shape == start.shape
        exact = start * np.exp(rate * ts).reshape(-1, *[1] * start.ndim)
        tolerance = 1e-5
        np.testing.assert_allclose(row, exact, rtol=tolerance)
        np.testing.assert_allclose(last[0], exact[2], rtol=tolerance)
        np.testing.assert_allclose(value, exact[1], rtol=tolerance)


@pytest.mark.parametrize("controller", [aj.PIDController(), aj.FixedSteps(3), aj.ConstantStepSize(0.4)], ids=type)
@pytest.mark.parametrize("y0", [(), {"a": np.zeros((0,))}, None], ids=["empty", "size 0", "none"])
def test_empty_states_are_solved_too(y0, controller):
    saveat = (aj.SaveAt(np.array([0.5])), aj.SaveAt(steps=True), aj.SaveAt(t1=True))
    solution = aj.solve(lambda t, y, args: y, 0.0, 1.0, y0, controller=controller, saveat=saveat, max_steps=50)
    assert solution.status == aj.Status.SUCCESS
    assert jax.tree.structure(solution.ys[0]) == jax.tree.structure(y0)
    assert all(leaf.shape == (1, 0) for leaf in jax.tree.leaves(solution.ys[0]))


@pytest.mark.parametrize("solver", [aj.Rodas5P, aj.Kvaerno5, aj.BDF])
@pytest.mark.parametrize(
    "jacobian",
    [aj.DenseJacobian(), aj.BandedJacobian(1, 1), aj.SparseJacobian(np.zeros((0, 0))), aj.KrylovJacobian()],
    ids=type,
)
def test_empty_states_have_linear_systems_too(jacobian, solver):
    def end(y0, rate):
        return jnp.sum(aj.solve(lambda t, y, rate: rate * y, 0.0, 1.0, y0, rate, solver=solver(jacobian)).ys)

    value, (of_y0, of_rate) = jax.value_and_grad(end, (0, 1))(jnp.zeros((2, 0)), -1.0)
    assert value == of_rate == 0
    assert of_y0.shape == (2, 0)


def test_a_complex_state_rotates():
    y0 = np.array([1.0 + 1.0j, 2.0])
    ts = np.linspace(0.0, 3.0, 7)
    ys = aj.odeint(lambda t, y, rate: rate * y, y0, ts, np.array([1.0j, -0.5 + 2.0j]), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(ys, y0 * np.exp(ts[:, None] * np.array([1.0j, -0.5 + 2.0j])), atol=1e-7)
    single = np.asarray(aj.solve(lambda t, y, args: 1j * y, 0.0, 1.0, np.complex64(1.0)).ys)
    assert single.dtype == np.complex64
    np.testing.assert_allclose(single[0], np.exp(1j), atol=1e-4)


def test_a_real_field_may_drive_a_complex_state():
    y1 = aj.solve(lambda t, y, args: jnp.cos(t) * jnp.ones(()), 0.0, 1.0, 1.0j, controller=TIGHT).ys[0]
    np.testing.assert_allclose(y1, np.sin(1.0) + 1j, atol=1e-9)


# Dtypes


SEEN = set()


def dtype_noting_oscillator(t, y, omega):
    SEEN.add(y.dtype)
    return oscillator(t, y, omega) + 0 * t  # float64 where time is


@pytest.mark.parametrize("time", [float, np.float64, np.float32], ids=["python", "float64", "float32"])
def test_a_float32_state_stays_float32(time):
    y0 = np.array([1.0, 0.0], np.float32)
    ts = [time(0.5), time(1.0)] if time is float else np.array([0.5, 1.0], time)
    saveat = (aj.SaveAt(ts), aj.SaveAt(steps=True), aj.SaveAt(dense=True), aj.SaveAt(t1=True))
    solution = aj.solve(dtype_noting_oscillator, time(0.0), time(1.0), y0, 1.0, saveat=saveat, max_steps=40)
    assert {np.dtype(np.float32)} == SEEN
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(solution.ys))
    assert jax.eval_shape(solution.evaluate, 0.5).dtype == np.float32
    expected = np.float32 if time is np.float32 else np.float64
    assert solution.t_end.dtype == expected
    assert all(leaf.dtype == expected for leaf in jax.tree.leaves(solution.ts))
    np.testing.assert_allclose(solution.ys[0], oscillation([0.5, 1.0]), atol=1e-4)


def test_a_float64_state_may_run_on_float32_times():
    solution = aj.solve(oscillator, np.float32(0.0), np.float32(1.0), START, 1.0, controller=TIGHT)
    assert (solution.ys.dtype, solution.t_end.dtype) == (np.float64, np.float32)
    np.testing.assert_allclose(solution.ys[0], oscillation(1.0), atol=1e-6)


def exponential(t, y, rate):
    return -rate * y


@pytest.mark.parametrize("scale", [1e8, 1e-12])
@pytest.mark.parametrize("time", [np.float64, np.float32], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("state", [np.float64, np.float32], ids=lambda dtype: dtype.__name__)
def test_long_and_tiny_time_scales(scale, time, state):
    saveat = aj.SaveAt(np.array([0.25, 0.5, 1.0], time) * time(scale))
    solution = aj.solve(exponential, time(0.0), time(scale), state(1.0), state(2 / scale), saveat=saveat, throw=False)
    assert solution.status == aj.Status.SUCCESS
    np.testing.assert_allclose(solution.ys, np.exp([-0.5, -1.0, -2.0]), rtol=3e-5)
    assert solution.stats.steps < 40


def test_a_float64_time_far_from_zero_resolves_what_a_float32_state_needs():
    """Ten seconds at t = 1e8, where neighbouring float32 times are eight apart."""
    solution = aj.solve(oscillator, 1e8, 1e8 + 10.0, START.astype(np.float32), np.float32(1.0))
    np.testing.assert_allclose(solution.ys[0], oscillation(10.0), atol=1e-3)


def test_without_x64_everything_is_float32():
    code = """
import jax, numpy as np, adjoint_jax as aj
field = lambda t, y, omega: jax.numpy.stack([y[1], -omega**2 * y[0]])
ts = np.linspace(0.0, 3.0, 5)
saveat = (aj.SaveAt(ts), aj.SaveAt(dense=True), aj.SaveAt(steps=True))
solution = aj.solve(field, 0.0, 3.0, np.array([1.0, 0.0]), 1.0, saveat=saveat, max_steps=50)
assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves((solution.ts, solution.ys, solution.t_end)))
assert np.abs(solution.ys[0][:, 0] - np.cos(ts)).max() < 1e-3
assert np.abs(solution.evaluate(1.0)[0] - np.cos(1.0)) < 1e-3
fixed = aj.solve(field, 0, 3, np.array([1.0, 0.0]), 1.0, controller=aj.FixedSteps(30), solver=aj.RK4())
assert fixed.ys.dtype == np.float32 and np.abs(fixed.ys[0][0] - np.cos(3.0)) < 1e-4
assert not jax.config.jax_enable_x64
print("done")
"""
    outcome = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        env={**os.environ, "JAX_ENABLE_X64": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert outcome.stdout == "done\n", outcome.stderr


# Time


@pytest.mark.parametrize("controller", [TIGHT, aj.FixedSteps(60), aj.ConstantStepSize(0.05)], ids=type)
def test_backward_integration_undoes_forward_integration(controller):
    def pendulum(t, y, args):
        return jnp.stack([y[1], jnp.sin(t) - jnp.sin(y[0])])

    @jax.jit
    def run(t0, t1, y0):
        ts = jnp.linspace(t0, t1, 5)
        saveat = (aj.SaveAt(t1=True), aj.SaveAt(ts), aj.SaveAt(steps=True), aj.SaveAt(dense=True))
        solution = aj.solve(pendulum, t0, t1, y0, solver=aj.Vern7(), controller=controller, saveat=saveat, max_steps=200)
        return solution.ys, solution.ts, solution.evaluate(ts), solution.stats

    def rhs(t, y):
        return [y[1], np.sin(t) - np.sin(y[0])]

    times = np.linspace(1.0, 4.0, 5)
    reference = scipy.integrate.solve_ivp(rhs, (1.0, 4.0), START, "DOP853", times, rtol=1e-12, atol=1e-12).y.T
    (end, rows, _, _), *_ = fetched(run(1.0, 4.0, START))
    np.testing.assert_allclose(rows, reference, atol=1e-8)
    (back, rows, steps, _), (_, _, times, _), dense, stats = fetched(run(4.0, 1.0, end[0]))
    np.testing.assert_allclose(back[0], START, atol=1e-8)
    np.testing.assert_allclose(rows, reference[::-1], atol=1e-8)
    np.testing.assert_allclose(dense, reference[::-1], atol=1e-8)
    count = int(stats.accepted)
    assert (np.diff(times[:count]) < 0).all()
    assert times[count - 1] == 1.0
    np.testing.assert_array_equal(steps[count - 1], back[0])


@pytest.mark.parametrize(
    "controller", [aj.PIDController(), aj.FixedSteps(4), aj.ConstantStepSize(0.1), aj.StepTo([2.0, 2.0])], ids=type
)
def test_an_interval_of_no_length_returns_y0(controller):
    saveat = (aj.SaveAt(t1=True), aj.SaveAt(np.array([2.0, 2.0]), t0=True), aj.SaveAt(dense=True))
    solution = aj.solve(oscillator, 2.0, 2.0, START, 1.0, controller=controller, saveat=saveat)
    assert solution.status == aj.Status.SUCCESS
    assert solution.t_end == 2.0
    np.testing.assert_array_equal(solution.ys[0], START[None])
    np.testing.assert_array_equal(solution.ys[1], np.stack([START] * 3))
    at_2, behind = evaluated(solution, (2.0, 2.1))
    np.testing.assert_array_equal(at_2, START)
    assert np.isnan(behind).all()


# Controllers


def test_tolerances_may_be_pytrees():
    """The slow leaf's tolerance decides only about the slow leaf."""

    def field(t, y, args):
        return {"fast": jnp.stack([y["fast"][1], -100 * y["fast"][0]]), "slow": -y["slow"]}

    y0 = {"fast": START, "slow": np.array([1.0])}

    def run(rtol, atol):
        solution = fetched(aj.solve(field, 0.0, 1.0, y0, controller=aj.PIDController(rtol, atol)))
        return solution.stats.accepted, abs(solution.ys["fast"][0, 0] - np.cos(10.0))

    tight, tight_error = run(1e-8, 1e-10)
    same, _ = run({"fast": 1e-8, "slow": 1e-8}, 1e-10)
    loose, loose_error = run({"fast": 1e-2, "slow": 1e-8}, {"fast": 1e-2, "slow": 1e-10})
    per_entry, entry_error = run({"fast": np.array([1e-8, 1e-8]), "slow": 1e-1}, {"fast": 1e-10, "slow": 1e-1})
    assert tight == same
    assert loose < tight / 2
    assert tight_error < 1e-6 < loose_error
    assert entry_error < 1e-6
    assert abs(int(per_entry) - int(tight)) < tight / 4
    with pytest.raises(ValueError, match=r"rtol.*pytree like y0"):
        run({"fast": 1e-8}, 1e-10)


def solved_steps(*arguments, **options):
    """The solution with a row for each step, and the step sizes."""
    solution = fetched(aj.solve(*arguments, saveat=STEPS, **options))
    return solution, np.diff(solution.ts[: solution.stats.accepted + 1])


STEPS = aj.SaveAt(t0=True, steps=True)


def test_dtmax_bounds_every_step():
    controller = aj.PIDController(rtol=1e-2, atol=1e-2, dtmax=0.21)
    solution, sizes = solved_steps(oscillator, 0.0, 5.0, START, 0.3, controller=controller)
    assert sizes.max() <= 0.21 * 1.0011  # the documented stretch of a step that would end just before t1
    assert solution.stats.accepted >= 24
    _, unbounded = solved_steps(oscillator, 0.0, 5.0, START, 0.3, controller=aj.PIDController(1e-2, 1e-2))
    assert unbounded.max() > 0.5


def test_dt0_is_the_first_step():
    for dt0, t1 in ((1e-3, 2.0), (1e-3, -2.0), (0.01, 2.0)):
        solution, sizes = solved_steps(oscillator, 0.0, t1, START, 1.0, dt0=dt0)
        assert abs(sizes[0]) == pytest.approx(dt0)
        np.testing.assert_allclose(solution.ys[solution.stats.accepted], oscillation(t1), atol=1e-3)
    too_large, _ = solved_steps(oscillator, 0.0, 20.0, START, 1.0, dt0=15.0)
    assert too_large.stats.rejected > 0
    np.testing.assert_allclose(too_large.ys[too_large.stats.accepted], oscillation(20.0), atol=1e-2)


def test_a_custom_norm_decides():
    seen = []

    def first_only(scaled):
        seen.append(jax.tree.map(jnp.shape, scaled))
        return scaled[0]

    def field(t, y, args):
        return jnp.stack([-y[0], 50 * jnp.cos(50 * t)])

    start = np.array([1.0, 0.0])
    solution = aj.solve(field, 0.0, 2.0, start, controller=aj.PIDController(1e-6, 1e-8, norm=first_only))
    reference = aj.solve(lambda t, y, args: -y, 0.0, 2.0, np.array([1.0]), controller=aj.PIDController(1e-6, 1e-8))
    everything = aj.solve(field, 0.0, 2.0, start, controller=aj.PIDController(1e-6, 1e-8))
    assert set(seen) == {(2,)}
    assert solution.stats.accepted == reference.stats.accepted
    assert everything.stats.accepted > 3 * solution.stats.accepted


def test_the_default_norm_is_the_root_mean_square():
    tree = {"a": jnp.array([3.0, 4.0]), "b": (jnp.array([[0.0]]), jnp.array(12.0))}
    assert aj.rms_norm(tree) == pytest.approx(np.sqrt((9 + 16 + 144) / 4))


def test_pid_coefficients_and_limits_are_heeded():
    """Growth from a tiny first step is factor_max a step; shrinking from a huge one factor_min."""
    controller = aj.PIDController(1e-6, 1e-8, factor_max=3.0)
    _, sizes = solved_steps(oscillator, 0.0, 2.0, START, 1.0, controller=controller, dt0=1e-6)
    np.testing.assert_allclose(sizes[1:6] / sizes[:5], 3.0, rtol=1e-6)
    # An integral controller (P = D = 0) with r its error ratio: factor = safety * r^(-icoeff / (order + 1)).
    counts = [
        int(aj.solve(oscillator, 0.0, 20.0, START, 1.0, controller=aj.PIDController(1e-6, 1e-8, **options)).stats.accepted)
        for options in ({"pcoeff": 0.0, "icoeff": 1.0}, {"pcoeff": 0.0, "icoeff": 1.0, "safety": 0.45})
    ]
    assert counts[1] == pytest.approx(2 * counts[0], rel=0.15)


SWITCHES = np.array([0.7, 2.0])
SIDES = {"right": np.array(True), "left": np.array(False)}
each_side = pytest.mark.parametrize("right", SIDES.values(), ids=SIDES)


def switched(t, y, right):
    """A forcing that jumps up at 0.7 and down at 2; `right` tells which value it has at the jump itself."""
    after = (t > SWITCHES) | (right & (t == SWITCHES))
    return -y + jnp.where(after[0] & ~after[1], 3.0, 0.0)


def only_switched(t, y, right):
    return switched(t, 0 * y, right)


def switched_solution(t):
    t = np.asarray(t)
    on = 3 + (np.exp(-0.7) - 3) * np.exp(-(t - 0.7))
    at_2 = 3 + (np.exp(-0.7) - 3) * np.exp(-1.3)
    return np.where(t < 0.7, np.exp(-t), np.where(t < 2.0, on, at_2 * np.exp(-(t - 2.0))))


@each_side
@pytest.mark.parametrize("solver", [aj.Tsit5(), aj.Heun(), aj.Vern7()], ids=lambda solver: type(solver).__name__)
def test_jumps_are_stepped_onto_and_seen_from_both_sides(solver, right):
    ts = np.array([0.3, 0.7, 1.1, 2.0, 2.7, 3.0])
    tolerance = 1e-6 if solver.order == 2 else 1e-9
    saveat = (aj.SaveAt(ts), STEPS)

    def run(**options):
        controller = aj.PIDController(tolerance, tolerance, **options)
        return aj.solve(switched, 0.0, 3.0, 1.0, right, solver=solver, controller=controller, saveat=saveat, max_steps=8000)

    solution, blind = run(jump_ts=SWITCHES[::-1]), run()
    assert set(SWITCHES) <= set(np.asarray(solution.ts[1]))
    bound = 1e-4 if solver.order == 2 else 2e-8
    np.testing.assert_allclose(solution.ys[0], switched_solution(ts), atol=bound)
    assert solution.stats.rejected <= 5
    assert solution.stats.rejected < blind.stats.rejected


def test_jump_times_may_be_a_list():
    controller = aj.PIDController(1e-9, 1e-9, jump_ts=[0.7, 2.0])
    solution = aj.solve(only_switched, 0.0, 3.0, 0.0, SIDES["right"], solver=aj.Heun(), controller=controller)
    assert solution.ys[0] == pytest.approx(3.9, abs=1e-12)


@each_side
def test_a_jump_is_no_reason_for_small_steps(right):
    """y' = 0, then 3, then 0: exact for any method that never mixes the two sides, however large the step."""
    for t0, t1, exact in ((0.0, 3.0, 3.9), (3.0, 0.0, -3.9), (0.7, 2.0, 3.9), (2.0, 0.7, -3.9), (2.0, 3.0, 0.0)):
        controller = aj.PIDController(1e-9, 1e-9, jump_ts=SWITCHES)
        solution = aj.solve(only_switched, t0, t1, 0.0, right, controller=controller, dt0=5.0)
        assert solution.ys[0] == pytest.approx(exact, abs=1e-12)
        assert solution.stats.rejected == 0
        assert solution.stats.accepted == {3.0: 3}.get(abs(t1 - t0), 1)


def test_constant_steps_stop_at_jumps_too():
    controller = aj.ConstantStepSize(0.5, jump_ts=SWITCHES)
    solution = fetched(aj.solve(only_switched, 0.0, 3.0, 0.0, SIDES["right"], controller=controller, saveat=STEPS))
    count = int(solution.stats.accepted) + 1
    np.testing.assert_allclose(solution.ts[:count], [0.0, 0.5, 0.7, 1.2, 1.7, 2.0, 2.5, 3.0], atol=1e-14)
    assert solution.ys[count - 1] == pytest.approx(3.9, abs=1e-12)


def test_constant_steps_end_with_a_shorter_one():
    def growth(t, y, args):
        return y

    controller = aj.ConstantStepSize(dt=0.3)
    solution = fetched(
        aj.solve(growth, 0.0, 1.0, 1.0, solver=aj.Euler(), controller=controller, saveat=STEPS, max_steps=10)
    )
    np.testing.assert_allclose(solution.ts[:5], [0.0, 0.3, 0.6, 0.9, 1.0], atol=1e-14)
    assert solution.ys[4] == pytest.approx(1.3**3 * 1.1, rel=1e-13)
    assert np.isnan(solution.ts[5:]).all()
    backward = aj.solve(growth, 1.0, 0.0, 1.0, solver=aj.Euler(), controller=controller)
    assert backward.ys[0] == pytest.approx(0.7**3 * 0.9, rel=1e-13)


@pytest.mark.parametrize("t1", [1.0, -1.0])
def test_the_three_ways_to_a_uniform_grid_agree(t1):
    controllers = (aj.ConstantStepSize(dt=0.1), aj.FixedSteps(10), aj.StepTo(np.linspace(0.0, t1, 11)))
    ends = []
    for controller in controllers:
        solution = aj.solve(oscillator, 0.0, t1, START, 2.0, solver=aj.RK4(), controller=controller)
        assert (solution.stats.accepted, solution.stats.rejected) == (10, 0)
        ends.append(solution.ys[0])
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-13)
    np.testing.assert_allclose(ends[0], ends[2], rtol=1e-13)
    np.testing.assert_allclose(ends[0], oscillation(t1, 2.0), atol=1e-3)


def test_step_to_takes_the_given_steps():
    grid = np.array([0.0, 0.1, 0.4, 0.45, 1.0])
    solution = aj.solve(
        lambda t, y, a: t * y, 0.0, 1.0, 1.0, solver=aj.Euler(), controller=aj.StepTo(grid), saveat=aj.SaveAt(steps=True)
    )
    np.testing.assert_array_equal(solution.ts, grid[1:])
    np.testing.assert_allclose(solution.ys, np.cumprod(1 + np.diff(grid) * grid[:-1]), rtol=1e-13)


# Stats


class Counted:
    """A field that counts how often its value is really computed."""

    def __init__(self):
        self.calls = 0

    def _slope(self, t, y):
        self.calls += 1
        return np.asarray(-y + np.cos(3 * t))

    def __call__(self, t, y, args):
        return jax.pure_callback(self._slope, jax.ShapeDtypeStruct(y.shape, y.dtype), t, y, vmap_method="sequential")


SPARSE = np.array([0.05, 0.051, 2.9])
SOLVERS = (aj.Euler(), aj.Heun(), aj.Bosh3(), aj.RK4(), aj.Tsit5(), aj.Vern7(), aj.Dopri8())
COUNTED = [
    (solver, controller, saveat)
    for solver in SOLVERS
    for controller in ("adaptive", "dt0", "constant", "jumps", "fixed")
    for saveat in ("t1", "ts")
    if not (controller in ("adaptive", "dt0", "jumps") and solver.error_order is None)
    and (controller == "adaptive" or type(solver) in (aj.Euler, aj.Heun, aj.Tsit5, aj.Vern7))
    and (saveat == "t1" or controller in ("adaptive", "fixed"))
]


@pytest.mark.parametrize(
    ("solver", "controller", "saveat"), COUNTED, ids=[f"{type(s).__name__}-{c}-{a}" for s, c, a in COUNTED]
)
def test_evaluations_are_counted_exactly(solver, controller, saveat):
    field = Counted()
    controllers = {
        "constant": aj.ConstantStepSize(0.4),
        "jumps": aj.PIDController(1e-3, 1e-3, jump_ts=SWITCHES),
        "fixed": aj.FixedSteps(7),
    }
    solution = aj.solve(
        field,
        0.0,
        3.0,
        np.array([1.0, 2.0]),
        solver=solver,
        controller=controllers.get(controller, aj.PIDController(1e-3, 1e-3)),
        saveat=aj.SaveAt(t1=True) if saveat == "t1" else aj.SaveAt(SPARSE),
        dt0=2.0 if controller == "dt0" else None,
    )
    jax.block_until_ready(solution.ys)
    assert solution.stats.steps == solution.stats.accepted + solution.stats.rejected
    if controller == "dt0" and solver.order > 2:
        assert solution.stats.rejected > 0
    assert int(solution.stats.evaluations) == field.calls


# Recompilation


class Traced(eqx.Module):
    """A field that notes when it is traced."""

    log: list = eqx.field(static=True, default_factory=list)

    def __call__(self, t, y, rate):
        self.log.append(None)
        return -rate * y

    def __hash__(self):
        return id(self.log)

    def __eq__(self, other):
        return self is other


def test_new_tolerances_times_and_first_steps_recompile_nothing():
    field = Traced()

    def run(rtol, t1, dt0, rate, y0, ts):
        controller = aj.PIDController(rtol=rtol, atol=rtol, dtmax=t1, safety=0.8 + rtol)
        return aj.solve(field, t1 - 1.0, t1, y0, rate, controller=controller, dt0=dt0, saveat=aj.SaveAt(ts))

    run(1e-4, 1.0, 0.1, np.array(1.0), np.array(1.0), np.array([0.5, 0.7]))
    traces = len(field.log)
    assert traces > 0
    for i in range(1, 4):
        ts = i + np.array([0.5, 0.7])
        rtol = 10.0 ** -(i + 3)
        ys = run(rtol, 1.0 + i, 0.1 / i, np.array(1.0 + i), np.array(2.0 * i), ts).ys
        np.testing.assert_allclose(ys, 2.0 * i * np.exp(-(1.0 + i) * (ts - i)), rtol=30 * rtol)
    assert len(field.log) == traces
    run(1e-4, 1, 0.1, np.array(1.0), np.array([1.0]), np.array([0.5, 0.7]))  # a new shape
    assert len(field.log) > traces


def test_a_new_constant_step_or_grid_of_the_same_length_recompiles_nothing():
    for controllers in (
        (aj.ConstantStepSize(0.1), aj.ConstantStepSize(0.25), aj.ConstantStepSize(0.5)),
        (aj.StepTo([0.0, 0.2, 1.0]), aj.StepTo([0.0, 0.5, 1.0])),
    ):
        field, counts = Traced(), []
        for controller in controllers:
            aj.solve(field, 0.0, 1.0, 1.0, np.array(1.0), controller=controller)
            counts.append(len(field.log))
        assert counts[0] > 0
        assert len(set(counts)) == 1


def test_one_jitted_function_serves_all_values():
    field = Traced()

    @jax.jit
    def end(rtol, t0, t1, dt0):
        return aj.solve(field, t0, t1, 1.0, 1.0, controller=aj.PIDController(rtol, rtol), dt0=dt0).ys[0]

    first = end(1e-5, 0.0, 1.0, 0.1)
    traces = len(field.log)
    second = end(1e-8, 2.0, 1.0, 0.01)
    assert len(field.log) == traces
    np.testing.assert_allclose([first, second], [np.exp(-1.0), np.exp(1.0)], rtol=1e-4)
