"""Gradients of every adjoint with respect to every input, against true solutions and against hand-written loops.

`DiscreteAdjoint` is also held to the derivative, to rounding, of the same method on the same grid written out as a plain
`lax.scan`; derivatives with respect to times are those of the flow there too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import HEUN_HERMITE, LOTKA_VOLTERRA, compare, jit, lotka_volterra, measure, on_grid, problem, rows_measure

import adjoint_jax as aj

TIGHT = aj.PIDController(rtol=1e-10, atol=1e-11)
ADJOINTS = {
    "discrete": aj.DiscreteAdjoint(),
    "checkpoints": aj.DiscreteAdjoint(checkpoints=3),
    "backsolve": aj.BacksolveAdjoint(),
    "backsolve_other": aj.BacksolveAdjoint(aj.Dopri8(), aj.PIDController(rtol=1e-11, atol=1e-12, pcoeff=0.0, icoeff=1.0)),
}
SETTINGS = {
    "tight": {"controller": TIGHT, "max_steps": 1024},
    "rk4": {"controller": aj.FixedSteps(400), "solver": aj.RK4()},
    "constant": {"controller": aj.ConstantStepSize(0.013), "solver": aj.Dopri5(), "max_steps": 512},
}


def solve(case, inputs, **options):
    field, args = case.make(inputs["theta"])
    return aj.solve(field, inputs["t0"], inputs["t1"], inputs["y0"], args, **options)


def gradient(loss, inputs):
    return jit(jax.grad(loss, allow_int=True))(inputs)


@functools.cache
def reference(name):
    """The gradient of `rows_measure` of the true solution at y0, ts, y1."""
    case = problem(name)

    def loss(inputs):
        states = jax.vmap(lambda t: case.flow(inputs, t))(jnp.append(inputs["ts"], inputs["t1"]))
        ys = jax.tree.map(lambda y, rest: jnp.concatenate([y[None], rest]), inputs["y0"], states)
        return rows_measure(ys)

    return gradient(loss, case.inputs)


@pytest.mark.parametrize(
    ("name", "adjoint", "setting"),
    [
        ("backward", "checkpoints", "rk4"),
        ("mixed", "backsolve", "rk4"),
        ("forced", "discrete", "constant"),
    ],
)
def test_gradients_of_the_true_solution(name, adjoint, setting):
    """On given grids and with constant steps (adaptive ones are in the contract), with respect to y0, parameters, t0, t1
    and every save time, t0 and t1 and a repeated one among them."""
    case = problem(name)

    def loss(inputs):
        saveat = aj.SaveAt(inputs["ts"], t0=True, t1=True)
        return rows_measure(solve(case, inputs, saveat=saveat, adjoint=ADJOINTS[adjoint], **SETTINGS[setting]).ys)

    compare(gradient(loss, case.inputs), reference(name), 3e-7)


# All kinds of observations


def observations(inputs):
    """Every kind of `SaveAt`, `inputs` in it."""

    def fn(t, y, args):
        return {"sum": inputs["weight"] * jnp.sin(t * y[0]), "state": y * args["damping"] * t}

    ts = inputs["ts"]
    return {
        "t1": aj.SaveAt(t1=True),
        "ts": aj.SaveAt(ts),
        "ends": aj.SaveAt(ts[1:3], t0=True, t1=True),
        "fn": aj.SaveAt(ts, t0=True, t1=True, fn=fn),
        "steps": aj.SaveAt(steps=True, t0=True),
        "dense": aj.SaveAt(dense=True),
    }


def losses(solution, taus):
    values = {kind: rows_measure(ys) for kind, ys in solution.ys.items() if ys is not None}
    if "dense" in solution.ys:
        values["dense"] = rows_measure(solution.evaluate(taus))
    return values


def observed_problem():
    case = problem("forced")
    taus = jnp.array([0.2, 0.55, 1.3, 2.2])
    return case._replace(inputs={**case.inputs, "weight": jnp.array(1.7), "taus": taus})


@pytest.mark.parametrize("adjoint", ["discrete"])
def test_several_observations_at_once(adjoint):
    """Each with a loss of its own, whose gradient holds nothing of the others."""
    case = observed_problem()
    options = {"adjoint": ADJOINTS[adjoint], "controller": TIGHT, "max_steps": 256}

    def outcome(inputs):
        saveat = observations(inputs)
        del saveat["steps"]
        return losses(solve(case, inputs, saveat=saveat, **options), inputs["taus"])

    def expected(inputs):
        fn = observations(inputs)["fn"].fn
        _, args = case.make(inputs["theta"])
        t0, t1, ts = (inputs[key] for key in ("t0", "t1", "ts"))

        def rows(times):
            return jax.vmap(lambda t: case.flow(inputs, t))(times)

        start, inner, y1 = inputs["y0"][None], rows(ts), rows(t1[None])
        whole = jnp.concatenate([start, inner, y1])
        all_times = jnp.concatenate([t0[None], ts, t1[None]])
        return {
            "t1": rows_measure(y1),
            "ts": rows_measure(inner),
            "ends": rows_measure(jnp.concatenate([start, inner[1:3], y1])),
            "fn": rows_measure(jax.vmap(lambda t, y: fn(t, y, args))(all_times, whole)),
            "dense": rows_measure(rows(inputs["taus"])),
        }

    got, wanted = jit(jax.jacrev(outcome))(case.inputs), jit(jax.jacrev(expected))(case.inputs)
    # At a time where two steps meet, and inside of them, the interpolant has its own slope.
    dense = got["dense"].pop("taus"), wanted["dense"].pop("taus")
    compare(*dense, 1e-5)
    compare(got, wanted, 1e-6)


SOLVERS = {"rk4": aj.RK4(), "bosh3": aj.Bosh3(), "dense stages": HEUN_HERMITE}
IRREGULAR = np.array([0.2, 0.3, 0.75, 0.9, 1.5, 1.55, 2.0, 2.2])


@pytest.mark.parametrize(
    ("solver", "adjoint", "grid"),
    [
        ("rk4", aj.DiscreteAdjoint(checkpoints=1), "times"),
        pytest.param("bosh3", aj.DiscreteAdjoint(checkpoints=3), "times", marks=[pytest.mark.slow]),
        ("dense stages", aj.DiscreteAdjoint(checkpoints=2), "steps"),
    ],
)
def test_discrete_adjoint_is_exact_on_a_given_grid(solver, adjoint, grid):
    """Equal to JAX's derivative of the same steps written out, and to the flow's derivative in times, to rounding."""
    case, solver = observed_problem(), SOLVERS[solver]
    times = IRREGULAR if grid == "times" else np.append(0.2 + 2.0 * (np.arange(7) / 7), 2.2)
    controller = aj.StepTo(times) if grid == "times" else aj.FixedSteps(7)

    def outcome(inputs):
        saveat = observations(inputs)
        return losses(solve(case, inputs, saveat=saveat, controller=controller, solver=solver, adjoint=adjoint), taus)

    taus = case.inputs["taus"]
    got = jit(jax.jacrev(outcome))(case.inputs)
    for kind in got:
        got[kind].pop("taus")
    compare(got, exact_gradients(case, solver.tableau, times), 1e-12)


def exact_gradients(case, tableau, grid):
    """Gradients of every kind of observation: through plain loops for states, by the contract's formulas for times."""
    ts, taus = np.asarray(case.inputs["ts"]), np.asarray(case.inputs["taus"])

    def rows(trajectory, times):
        return [trajectory.at(t) for t in times]

    def outcome(inputs, nudges):
        """`nudges` moves saved rows along the flow: how a derivative in a time acts."""
        field, args = case.make(inputs["theta"])
        fn = observations(inputs)["fn"].fn
        trajectory = on_grid(tableau, lambda t, y: field(t, y, args), grid, inputs["y0"])

        def along(t, y, nudge):
            return y + nudge * jax.lax.stop_gradient(field(t, y, args))

        t0, t1 = inputs["t0"], inputs["t1"]
        end = along(t1, trajectory.ys[-1], nudges["t1"])
        inner = [along(t, y, nudge) for t, y, nudge in zip(ts, rows(trajectory, ts), nudges["ts"], strict=True)]
        start = inputs["y0"]
        times = [t0, *(t + nudge for t, nudge in zip(ts, nudges["ts"], strict=True)), t1 + nudges["t1"]]
        observed = [fn(t, y, args) for t, y in zip(times, [start, *inner, end], strict=True)]
        stacked = {
            "t1": end[None],
            "ts": jnp.stack(inner),
            "ends": jnp.stack([start, *inner[1:3], end]),
            "fn": jax.tree.map(lambda *leaves: jnp.stack(leaves), *observed),
            "steps": jnp.concatenate([trajectory.ys[:-1], end[None]]),
            "dense": jnp.stack(rows(trajectory, taus)),
        }
        return {kind: rows_measure(ys) for kind, ys in stacked.items()}

    nudges = {"t1": jnp.zeros(()), "ts": jnp.zeros(ts.shape)}
    inputs = {key: value for key, value in case.inputs.items() if key != "taus"}
    both = jit(jax.jacrev(outcome, (0, 1)))(inputs, nudges)
    gradients, in_times = ({kind: pair[i] for kind, pair in both.items()} for i in (0, 1))
    starts, slope = gradients_of_start()
    for kind, gradient in gradients.items():
        through_flow = np.asarray(gradient["y0"]) - starts.get(kind, 0.0)
        gradient["t1"] = in_times[kind]["t1"]
        gradient["ts"] = in_times[kind]["ts"]
        gradient["t0"] = np.asarray(gradient["t0"]) - np.sum(through_flow * slope)
    return gradients


@functools.cache
def gradients_of_start():
    """What the row saved by `t0=True` contributes, which is y0 itself at any t0: its gradients; and the slope there."""
    case = observed_problem()
    field, args = case.make(case.inputs["theta"])
    fn = observations(case.inputs)["fn"].fn

    def outcome(y0):
        row = measure(y0)
        return {"ends": row, "steps": row, "fn": measure(fn(case.inputs["t0"], y0, args))}

    both = jit(lambda y0: (jax.jacrev(outcome)(y0), field(case.inputs["t0"], y0, args)))(case.inputs["y0"])
    return jax.tree.map(np.asarray, both)


def taken_grid(t0, steps):
    """The grid of a solve, from its save after every step. It must come from the program whose derivative is checked:
    in another one, rounding may lead to other steps."""
    steps = np.asarray(steps)
    return np.append(t0, steps[~np.isnan(steps)])


@pytest.mark.parametrize("adjoint", [aj.DiscreteAdjoint(), aj.DiscreteAdjoint(checkpoints=4)])
def test_discrete_adjoint_is_exact_on_the_grid_it_chose(adjoint):
    case, solver = problem("lotka_volterra"), aj.Tsit5()
    ts = np.asarray(case.inputs["ts"])

    def loss(inputs):
        saveat = aj.SaveAt(jnp.asarray(ts), t1=True), aj.SaveAt(steps=True)
        solution = solve(case, inputs, saveat=saveat, solver=solver, adjoint=adjoint, max_steps=64)
        return rows_measure(solution.ys[0]), solution.ts[1]

    got, steps = jit(jax.grad(loss, has_aux=True))(case.inputs)
    grid = taken_grid(0.0, steps)
    assert 5 < len(grid) < 60

    def expected(inputs):
        trajectory = on_grid(solver.tableau, lambda t, y: lotka_volterra(t, y, inputs["theta"]), grid, inputs["y0"])
        return rows_measure(jnp.stack([*(trajectory.at(t) for t in ts), trajectory.ys[-1]]))

    wanted = gradient(expected, case.inputs)
    compare({key: got[key] for key in ("y0", "theta")}, {key: wanted[key] for key in ("y0", "theta")}, 1e-11)


# Convergence of the continuous adjoint


def test_backsolve_converges_with_its_tolerance():
    case = problem("lotka_volterra")

    def error(tolerance):
        def loss(inputs):
            adjoint = aj.BacksolveAdjoint(controller=aj.PIDController(rtol=tolerance, atol=tolerance))
            return rows_measure(solve(case, inputs, saveat=saveat, adjoint=adjoint, **SETTINGS["tight"]).ys)

        saveat = aj.SaveAt(case.inputs["ts"], t0=True, t1=True)
        theta = jax.grad(loss)(case.inputs)["theta"]
        return jnp.stack([jnp.abs(theta[key] - exact[key]) for key in "abcd"]).max()

    @jit
    def all_errors(tolerances):
        return jax.lax.map(error, tolerances)

    exact = reference("lotka_volterra")["theta"]
    errors = np.asarray(all_errors(np.array([1e-3, 1e-5, 1e-7, 1e-9])))
    assert errors[0] > 1e-5, "A loose tolerance must show, or the tolerance is not the reverse solve's."
    assert np.all(errors[1:] < errors[:-1] / 8)
    assert errors[-1] < 1e-6


# Jumps of the field


@pytest.mark.parametrize("adjoint", ["discrete", "backsolve"])
def test_gradients_across_a_jump(adjoint):
    """y' = -k y before 0.6, y' = b - k y after it."""

    def field(t, y, args):
        return -args["k"] * y + jnp.where(t < 0.6, 0.0, args["b"])

    def loss(inputs):
        args, t1, ts = inputs
        controller = aj.PIDController(rtol=1e-10, atol=1e-12, jump_ts=[0.6])
        options = {"controller": controller, "adjoint": ADJOINTS[adjoint], "max_steps": 128}
        return rows_measure(aj.solve(field, 0.0, t1, jnp.array([2.0]), args, saveat=aj.SaveAt(ts, t1=True), **options).ys)

    def exact(inputs):
        args, t1, ts = inputs
        k, b = args["k"], args["b"]
        t = jnp.append(ts, t1)
        behind = jnp.where(t > 0.6, b / k * (1 - jnp.exp(-k * (t - 0.6))), 0.0)
        return rows_measure((2.0 * jnp.exp(-k * t) + behind)[:, None])

    inputs = {"k": jnp.array(0.9), "b": jnp.array(1.5)}, jnp.array(1.3), jnp.array([0.2, 0.9])
    compare(gradient(loss, inputs), gradient(exact, inputs), 1e-7)


# Transformations


def lane_loss(y0, theta, adjoint, **options):
    saveat = aj.SaveAt(jnp.array([0.5, 1.0]), t1=True)
    return rows_measure(aj.solve(lotka_volterra, 0.0, 1.5, y0, theta, saveat=saveat, adjoint=adjoint, **options).ys)


LANES = jnp.array([[1.2, 2.0], [0.1, 0.2], [6.0, 3.0]])


def test_gradients_inside_of_a_scan():
    """What single gradients give (`vmap` and lanes are in the contract)."""
    loss = functools.partial(lane_loss, adjoint=aj.DiscreteAdjoint(), solver=aj.Heun(), max_steps=1024)
    single = jit(jax.grad(loss, (0, 1)))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(single(y0, LOTKA_VOLTERRA) for y0 in LANES))

    def scanned(lanes, theta):
        def body(theta, y0):
            return theta, jax.grad(loss, (0, 1))(y0, theta)

        return jax.lax.scan(body, theta, lanes)[1]

    compare(jit(scanned)(LANES, LOTKA_VOLTERRA), stacked, 1e-10)


@pytest.mark.parametrize("adjoint", ["discrete", "backsolve"])
def test_gradients_with_constants(adjoint):
    """As with all inputs traced, where theta is a constant of the trace."""
    options = {"adjoint": ADJOINTS[adjoint], "controller": aj.FixedSteps(5), "solver": aj.Heun()}
    loss = functools.partial(lane_loss, **options)
    traced = jit(jax.grad(loss))(LANES[0], LOTKA_VOLTERRA)
    compare(jit(jax.grad(lambda y0: loss(y0, LOTKA_VOLTERRA)))(LANES[0]), traced, 1e-13)


def test_gradients_with_a_time_per_lane():
    """Each lane ends, and observes, at times of its own, and some lanes run backward."""
    case = problem("forced")

    def loss(t1, tau, inputs):
        saveat = aj.SaveAt(tau[None], t1=True)
        return rows_measure(solve(case, inputs | {"t1": t1}, saveat=saveat, controller=TIGHT, max_steps=128).ys)

    def expected(t1, tau, inputs):
        return rows_measure(jnp.stack([case.flow(inputs, t) for t in (tau, t1)]))

    def in_lanes(fn):
        inputs = {key: value for key, value in case.inputs.items() if key not in ("t1", "ts")}
        return jit(jax.vmap(jax.grad(fn, (0, 1, 2)), (0, 0, None)))(t1s, taus, inputs)

    t1s, taus = jnp.array([2.2, 0.2, -0.9]), jnp.array([0.7, 0.2, -0.3])
    compare(in_lanes(loss), in_lanes(expected), 1e-7)


# Second derivatives


def second_order(loss, point, direction):
    return jax.jvp(jax.grad(loss), (point,), (direction,))[1]


DIRECTION = (jnp.array([0.3, -0.7]), {"a": 0.5, "b": -0.2, "c": 0.1, "d": 0.9})


def test_hessian_vector_products_of_the_discrete_adjoint_are_exact():
    """Against forward over forward through the same steps written out, for three lanes with a grid each."""
    solver = aj.Bosh3()
    saveat = aj.SaveAt(jnp.array([0.5, 1.0]), t1=True), aj.SaveAt(steps=True)
    tangent = jax.tree.map(jnp.asarray, DIRECTION)

    def loss(point):
        y0, theta = point
        solution = aj.solve(lotka_volterra, 0.0, 1.5, y0, theta, solver=solver, saveat=saveat, max_steps=256)
        return rows_measure(solution.ys[0]), solution.ts[1]

    def product(y0):
        gradient = jax.grad(loss, has_aux=True)
        return jax.jvp(gradient, ((y0, LOTKA_VOLTERRA),), (tangent,), has_aux=True)[1:]

    got, all_steps = jit(jax.vmap(product))(LANES)
    for lane, y0 in enumerate(LANES):
        grid = taken_grid(0.0, all_steps[lane])

        def expected(point, grid=grid):
            y0, theta = point
            trajectory = on_grid(solver.tableau, lambda t, y: lotka_volterra(t, y, theta), grid, y0)
            return rows_measure(jnp.stack([trajectory.at(0.5), trajectory.at(1.0), trajectory.ys[-1]]))

        wanted = jit(lambda p, v, f=expected: jax.jvp(jax.jacfwd(f), (p,), (v,))[1])((y0, LOTKA_VOLTERRA), tangent)
        compare(jax.tree.map(lambda leaf, lane=lane: leaf[lane], got), wanted, 1e-10, f"lane {lane}")


@pytest.mark.slow
def test_hessian_vector_products_of_backsolve():
    options = {"solver": aj.Bosh3(), "controller": aj.PIDController(rtol=1e-9, atol=1e-10), "max_steps": 8192}

    def loss(point):
        return lane_loss(*point, aj.BacksolveAdjoint(), **options)

    def product(y0):
        return second_order(loss, (y0, LOTKA_VOLTERRA), tangent)

    def true_loss(point):
        y0, theta = point
        case = problem("lotka_volterra")
        inputs = {"theta": theta, "y0": y0, "t0": jnp.array(0.0)}
        return rows_measure(jnp.stack([case.flow(inputs, t) for t in (0.5, 1.0, 1.5)]))

    tangent = jax.tree.map(jnp.asarray, DIRECTION)
    got = jit(jax.vmap(product))(LANES[:2])
    wanted = jit(jax.vmap(lambda y0: second_order(true_loss, (y0, LOTKA_VOLTERRA), tangent)))(LANES[:2])
    compare(got, wanted, 1e-6)


# Precision


@pytest.mark.parametrize("adjoint", ["discrete", "backsolve"])
def test_gradients_of_a_float32_state_are_float32(adjoint):
    """With x64 enabled and Python numbers for times, which stay float64."""

    def loss(point, ts):
        y0, theta = point
        saveat = aj.SaveAt(ts, t0=True, t1=True)
        options = {"controller": aj.PIDController(rtol=1e-5, atol=1e-6), "adjoint": ADJOINTS[adjoint], "max_steps": 128}
        return rows_measure(aj.solve(lotka_volterra, 0.0, 3.0, y0, theta, saveat=saveat, **options).ys)

    point = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (jnp.array([1.2, 2.0]), LOTKA_VOLTERRA))
    ts = problem("lotka_volterra").inputs["ts"]
    (y0, theta), in_ts = jit(jax.grad(loss, (0, 1)))(point, ts)
    assert {leaf.dtype for leaf in jax.tree.leaves((y0, theta))} == {np.dtype("float32")}
    assert in_ts.dtype == ts.dtype
    exact = reference("lotka_volterra")
    compare({"y0": y0, "theta": theta, "ts": in_ts}, {key: exact[key] for key in ("y0", "theta", "ts")}, 3e-4)
