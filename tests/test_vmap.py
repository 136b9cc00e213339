"""Under vmap every lane is the solve that it would be alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adjoint_jax as aj


def field(t, y, mu):
    """van der Pol, with a forcing so that t0 matters."""
    return jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0] + 0.1 * jnp.sin(t)])


BASE = {
    "y0": np.array([1.0, 0.5]),
    "mu": np.array(1.0),
    "t0": np.array(0.0),
    "t1": np.array(3.0),
    "ts": np.array([0.2, 0.9, 0.9, 1.9]),
    "rtol": np.array(1e-6),
}
LANES = {
    "y0": np.array([[1.0, 0.5], [0.1, -2.0], [3.0, 0.0]]),
    "mu": np.array([0.5, 4.0, 1.0]),
    "t0": np.array([0.0, -1.0, 0.15]),
    "t1": np.array([3.0, 2.0, 7.0]),
    "ts": np.array([[0.2, 0.9, 0.9, 1.9], [0.0, 0.0, 0.1, 0.2], [2.5, 2.9, 2.95, 3.0]]),
    "rtol": np.array([1e-3, 1e-6, 1e-8]),
}
CONTROLLERS = {
    "adaptive": lambda rtol: aj.PIDController(rtol, rtol),
    "jumps": lambda rtol: aj.PIDController(rtol, rtol, jump_ts=np.array([0.5, 1.0])),
    "constant": lambda rtol: aj.ConstantStepSize(0.04),
    "fixed": lambda rtol: aj.FixedSteps(70),
}


def everything(inputs, controller="adaptive", solver=aj.Tsit5()):
    """All kinds of saved output, the dense one at a few times, and the counts."""
    t0, t1, ts = inputs["t0"], inputs["t1"], inputs["ts"]
    saveat = {
        "ends": aj.SaveAt(t0=True, t1=True),
        "ts": aj.SaveAt(ts, t1=True),
        "steps": aj.SaveAt(steps=True, t0=True),
        "dense": aj.SaveAt(dense=True),
        "fn": (
            aj.SaveAt(ts, fn=lambda t, y, mu: {"product": t * mu * y[0]}),
            aj.SaveAt(t1=True, fn=lambda t, y, mu: y.sum()),
        ),
    }
    solution = aj.solve(
        field,
        t0,
        t1,
        inputs["y0"],
        inputs["mu"],
        solver=solver,
        controller=CONTROLLERS[controller](inputs["rtol"]),
        saveat=saveat,
        max_steps=300,
        throw=False,
    )
    inside = solution.evaluate(t0 + (t1 - t0) * jnp.linspace(0.0, 1.0, 7))
    return solution.ts, solution.ys, inside, solution.stats, solution.status, solution.t_end


@pytest.fixture(scope="module")
def single():
    return jax.jit(everything, static_argnums=1)


def assert_close(actual, expected):
    """To rounding, but for where adaptive steps end: their error estimates are differences of nearly equal numbers."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        tolerance = 1e-6 if "steps" in jax.tree_util.keystr(path) else 1e-11
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def lane_of(tree, lane):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[lane], tree)


@pytest.mark.parametrize("names", [("y0",), ("mu",), ("t0", "t1"), ("ts",), ("rtol",)], ids="-".join)
def test_lanes_equal_single_solves(single, names):
    inputs = BASE | {name: LANES[name] for name in names}
    axes = {name: 0 if name in names else None for name in BASE}
    together = jax.jit(jax.vmap(everything, in_axes=(axes,)))(inputs)
    np.testing.assert_array_equal(together[4], 0)
    for lane in range(3):
        alone = single(BASE | {name: LANES[name][lane] for name in names}, "adaptive")
        assert jax.tree.map(int, lane_of(together[3], lane)) == jax.tree.map(int, alone[3])
        assert_close(lane_of(together, lane), alone)


@pytest.mark.parametrize("controller", ["jumps", pytest.param("constant", marks=[pytest.mark.slow]), "fixed"])
def test_lanes_of_every_controller_equal_single_solves(single, controller):
    inputs = BASE | {name: LANES[name] for name in ("y0", "mu", "t0", "t1")}
    inputs["ts"] = np.array([0.2, 0.9, 0.9, 1.9])
    axes = {name: 0 if name in ("y0", "mu", "t0", "t1") else None for name in BASE}
    together = jax.jit(jax.vmap(lambda i: everything(i, controller), in_axes=(axes,)))(inputs)
    np.testing.assert_array_equal(together[4], 0)
    for lane in range(3):
        alone = single(BASE | {name: LANES[name][lane] for name in ("y0", "mu", "t0", "t1")}, controller)
        assert_close(lane_of(together, lane), alone)


def end(y0, mu, t1):
    """By a method whose steps start with a slope of their own, unlike those of the tests above."""
    return aj.solve(field, 0.0, t1, y0, mu, solver=aj.Heun(), controller=aj.PIDController(1e-5, 1e-5)).ys[0]


def test_lanes_may_run_in_opposite_directions_and_not_at_all():
    """y(t) = exp(-t) whatever the direction; ts of its own for each lane."""
    t1 = np.array([2.0, -2.0, 0.0, 30.0])
    ts = t1[:, None] * np.array([0.0, 0.3, 0.3, 1.0])

    @jax.jit
    @jax.vmap
    def run(t1, ts):
        controller = aj.PIDController(1e-9, 1e-12)
        saveat = (aj.SaveAt(ts), aj.SaveAt(dense=True))
        solution = aj.solve(lambda t, y, args: -y, 0.0, t1, 1.0, controller=controller, saveat=saveat, throw=False)
        return solution.ys[0], solution.evaluate(ts), solution.status, solution.t_end

    rows, dense, status, t_end = run(t1, ts)
    np.testing.assert_array_equal(status, 0)
    np.testing.assert_array_equal(t_end, t1)
    np.testing.assert_allclose(rows, np.exp(-ts), rtol=1e-6, atol=1e-10)
    np.testing.assert_allclose(dense, np.exp(-ts), rtol=1e-6, atol=1e-10)


def test_nested_vmap_jit_of_vmap_and_vmap_of_jit_agree():
    y0, mu, t1 = LANES["y0"], np.array([0.5, 2.0]), np.array(1.5)
    compiled = jax.jit(end)
    alone = np.array([[compiled(y, m, t1) for m in mu] for y in y0])
    over_mu = jax.vmap(end, in_axes=(None, 0, None))
    nested = jax.vmap(over_mu, in_axes=(0, None, None))
    inner_jit = jax.vmap(jax.vmap(compiled, in_axes=(None, 0, None)), in_axes=(0, None, None))
    swapped = jax.vmap(jax.vmap(end, in_axes=(0, None, None)), in_axes=(None, 0, None), out_axes=1)
    for function in (nested, jax.jit(nested), inner_jit, jax.jit(swapped)):
        np.testing.assert_allclose(function(y0, mu, t1), alone, rtol=1e-11, atol=1e-11)


def test_a_scan_around_a_solve_is_a_loop_of_solves():
    """Chained solves of length 0.5 reach where one solve of length 2 does."""

    @jax.jit
    def chained(y0):
        def advance(y, t0):
            solution = aj.solve(field, t0, t0 + 0.5, y, 1.0, controller=aj.PIDController(1e-10, 1e-10))
            return solution.ys[0], solution.stats.accepted

        return jax.lax.scan(advance, y0, 0.5 * jnp.arange(4))

    direct = aj.solve(field, 0.0, 2.0, BASE["y0"], 1.0, controller=aj.PIDController(1e-10, 1e-10)).ys[0]
    y1, accepted = chained(BASE["y0"])
    np.testing.assert_allclose(y1, direct, atol=1e-8)
    assert (np.asarray(accepted) > 1).all()
    lanes, _ = jax.vmap(chained)(LANES["y0"])
    np.testing.assert_allclose(lanes[0], direct, atol=1e-8)


def test_a_solve_within_cond_and_while():
    def run(y0, wanted):
        return jax.lax.cond(wanted, lambda y: end(y, 1.0, 1.0), lambda y: y, y0)

    y0 = LANES["y0"]
    wanted = np.array([True, False, True])
    ys = jax.jit(jax.vmap(run))(y0, wanted)
    np.testing.assert_array_equal(ys[1], y0[1])
    np.testing.assert_allclose(ys[0], end(y0[0], 1.0, 1.0), rtol=1e-11)


def test_pytree_lanes_with_their_own_axes():
    y0 = {"a": np.arange(6.0).reshape(2, 3), "b": np.array([1.0 + 1j, 2.0, 3.0j])}

    def last(y, rate):
        solution = aj.solve(lambda t, y, rate: jax.tree.map(lambda leaf: -rate * leaf, y), 0.0, 1.0, y, rate)
        return jax.tree.map(lambda leaf: leaf[0], solution.ys)

    rates = np.array([0.5, 1.0, 2.0])
    ys = jax.vmap(last, in_axes=({"a": 1, "b": 0}, 0), out_axes={"a": 1, "b": 0})(y0, rates)
    np.testing.assert_allclose(ys["a"], y0["a"] * np.exp(-rates), rtol=1e-4)
    np.testing.assert_allclose(ys["b"], y0["b"] * np.exp(-rates), rtol=1e-4)
