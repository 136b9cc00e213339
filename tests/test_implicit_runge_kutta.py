"""Diagonally implicit methods: their tableaus, orders, stiff problems with published solutions, gradients and lanes."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import compare, jit, measure, problem, rows_measure
from test_orders import T0, T1, exact, field, observed_order
from test_tableaus import Conditions

import adjoint_jax as aj

METHODS = {"Kvaerno3": (aj.Kvaerno3(), 3, 3), "KenCarp4": (aj.KenCarp4(), 4, 3), "Kvaerno5": (aj.Kvaerno5(), 5, 4)}
each_method = pytest.mark.parametrize("name", METHODS)


# Tableaus


def conditions(tableau):
    return Conditions(types.SimpleNamespace(a=tableau.rows, dense_a=(), stages=tableau.stages))


def implicit_part(tableau):
    """The implicit stages' coefficients of the explicit slope, and of their own."""
    a = np.array([row + (0.0,) * (tableau.stages - len(row)) for row in tableau.rows])
    return a[1:, 0], a[1:, 1:]


@each_method
def test_order_conditions(name):
    solver, order, dense_order = METHODS[name]
    tableau = solver.tableau
    assert (tableau.name, solver.order, solver.error_order, tableau.dense_order) == (name, order, order - 1, dense_order)
    weights = np.array(tableau.rows[-1])
    conditions(tableau).assert_order(weights, order)
    conditions(tableau).assert_order(weights - tableau.error, order - 1)
    conditions(tableau).assert_order(tableau.dense, dense_order)


@each_method
def test_l_stability(name):
    """The stability function R(z) = 1 + z b (I - z A)^-1 1 is zero at infinity, and at most one on the imaginary axis."""
    tableau = METHODS[name][0].tableau
    column, rest = implicit_part(tableau)
    assert np.linalg.solve(rest, column)[-1] == pytest.approx(0.0, abs=1e-14)
    a = np.array([row + (0.0,) * (tableau.stages - len(row)) for row in tableau.rows])
    for z in 1j * np.logspace(-2, 6, 300):
        stages = np.linalg.solve(np.eye(len(a)) - z * a, np.ones(len(a)))
        assert abs(1 + z * a[-1] @ stages) <= 1 + 1e-9


@each_method
def test_dense_output_is_bounded_for_infinitely_stiff_components(name):
    tableau = METHODS[name][0].tableau
    column, rest = implicit_part(tableau)
    dense = np.array(tableau.dense)
    np.testing.assert_allclose(dense[0], np.linalg.solve(rest, column) @ dense[1:], atol=2e-13)


def test_dense_output_ends_with_the_last_slope():
    dense = np.array(aj.Kvaerno5().tableau.dense)
    slope = dense @ np.arange(1, dense.shape[1] + 1)
    np.testing.assert_allclose(slope, np.eye(len(dense))[-1], atol=1e-13)


BACKWARD_TRAPEZOIDAL = {
    "name": "test",
    "order": 2,
    "gamma": 0.5,
    "a": ((), (0.5,)),
    "c": (0.0, 1.0),
    "error": (0.5, -0.5),
    "error_order": 1,
    "dense": ((1.0, -0.5), (0.0, 0.5)),
    "dense_order": 2,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"c": (0.0,)}, "c must have one entry per stage"),
        ({"a": ((), (0.5, 0.5))}, "must have i entries"),
        ({"gamma": 0.4}, "its c is 1.0"),
        ({"c": (0.0, 0.9), "gamma": 0.4}, "must be at the step's end"),
        ({"error": (0.5, 0.5)}, "error must sum to 0"),
        ({"dense": ((1.0, -0.5), (0.0, 0.4))}, "dense weights end in"),
    ],
)
def test_invalid_tableaus_are_refused(changes, message):
    aj.ESDIRKTableau(**BACKWARD_TRAPEZOIDAL)
    with pytest.raises(ValueError, match=f"^ESDIRKTableau 'test': .*{message}"):
        aj.ESDIRKTableau(**(BACKWARD_TRAPEZOIDAL | changes))


# Orders


@each_method
def test_global_order_of_steps_and_dense_output(name):
    solver, order, dense_order = METHODS[name]
    off_grid = np.linspace(T0, T1, 60)[1:-1]

    @jit
    def run(dt):
        options = {"solver": solver, "controller": aj.ConstantStepSize(dt), "max_steps": 128}
        return aj.solve(field, T0, T1, exact(np.array(T0)), saveat=(aj.SaveAt(t1=True), aj.SaveAt(off_grid)), **options).ys

    results = [run((T1 - T0) / steps) for steps in (36, 72)]
    at_end = [np.abs(ys[0][0] - exact(np.array(T1))).max() for ys in results]
    inside = [np.abs(ys[1] - exact(off_grid)).max() for ys in results]
    assert at_end[-1] > 1e-13
    assert observed_order(at_end, 2)[0] == pytest.approx(order, abs=0.4)
    assert -0.4 < observed_order(inside, 2)[0] - min(order, dense_order + 1) < 0.9


@each_method
def test_order_in_the_stiff_limit_is_that_of_the_stages(name):
    """Prothero and Robinson's problem y' = -(y - sin t) / eps + cos t. For steps far above eps the order falls to two, that
    of the stages; but the error has a factor eps."""
    solver = METHODS[name][0]

    @jit
    def error(dt, eps):
        options = {"solver": solver, "controller": aj.ConstantStepSize(dt), "max_steps": 64}
        y1 = aj.solve(lambda t, y, eps: (jnp.sin(t) - y) / eps + jnp.cos(t), 0.3, 2.3, jnp.sin(0.3), eps, **options).ys[0]
        return jnp.abs(y1 - jnp.sin(2.3))

    for eps in (1e-4, 1e-6):
        errors = [error(dt, eps) for dt in (0.1, 0.05)]
        assert observed_order(errors, 2)[0] == pytest.approx(2, abs=0.3)
        assert errors[0] < 1e-3 * eps


# Stiff problems


def robertson(t, y, rates):
    a, b, c = y
    first, second, third = rates[0] * a, rates[1] * b * c, rates[2] * b * b
    return jnp.stack([second - first, first - second - third, third])


RATES = jnp.array([0.04, 1e4, 3e7])
START = jnp.array([1.0, 0.0, 0.0])
ROBERTSON = {
    40.0: (0.7158270687193941, 0.9185534764557338e-5, 0.2841637457458413),
    1e4: (0.107300429, 0.480016697e-6, 0.892699091),
    1e11: (0.2083340149701255e-7, 0.8333360770334713e-13, 0.9999999791665050),
}
"""At t = 40 from HW II, at 1e11 from the IVP test set, at 1e4 from SciPy's Radau with rtol = 1e-12."""


@pytest.mark.parametrize(("name", "errors"), [("Kvaerno3", (1e-3, 1e-5)), ("Kvaerno5", (1e-5, 1e-6))])
def test_robertson(name, errors):
    @jit
    def run(t1, rtol):
        options = {"solver": METHODS[name][0], "controller": aj.PIDController(rtol, 1e-4 * rtol)}
        solution = aj.solve(robertson, 0.0, t1, START, RATES, throw=False, **options)
        return solution.ys[0], solution.stats

    for rtol, error in zip((1e-4, 1e-6), errors, strict=True):
        for t1 in (40.0, 1e4):
            y1, stats = run(t1, rtol)
            np.testing.assert_allclose(y1, ROBERTSON[t1], rtol=error)
            assert stats.rejected <= 5
            assert stats.evaluations < 16 * stats.accepted


def test_robertson_to_equilibrium():
    controller = aj.PIDController(1e-7, 1e-17)
    y1 = aj.solve(robertson, 0.0, 1e11, START, RATES, solver=aj.Kvaerno5(), controller=controller).ys[0]
    np.testing.assert_allclose(y1, ROBERTSON[1e11], rtol=2e-4)


def test_van_der_pol():
    """mu = 1000, in the scaling of the IVP test set, with its solution."""

    def vdp(t, y, eps):
        return jnp.stack([y[1], ((1 - y[0] ** 2) * y[1] - y[0]) / eps])

    @jit
    def run(rtol):
        options = {"solver": aj.Kvaerno5(), "controller": aj.PIDController(rtol, rtol)}
        return aj.solve(vdp, 0.0, 2.0, jnp.array([2.0, 0.0]), 1e-6, throw=False, **options).ys[0]

    for rtol, error in ((1e-4, 5e-4), (1e-6, 2e-5)):
        np.testing.assert_allclose(run(rtol), [1.706167732170483, -0.8928097010247975], rtol=error)


# Iterations


def test_linear_equations_take_one_iteration_a_stage_once_the_rate_is_known():
    """Two in the first implicit stage, which finds out."""
    stages = aj.Kvaerno5().tableau.stages
    options = {"solver": aj.Kvaerno5(), "controller": aj.PIDController(1e-6, 1e-8), "dt0": 0.01}
    stats = aj.solve(lambda t, y, args: -100.0 * y, 0.0, 1.0, jnp.ones(3), **options).stats
    assert stats.evaluations <= (stages + 1) * stats.steps


def test_a_tighter_iteration_on_request():
    def run(newton):
        options = {"solver": aj.Kvaerno3(newton=newton), "controller": aj.PIDController(1e-3, 1e-6)}
        return aj.solve(robertson, 0.0, 40.0, START, RATES, **options)

    loose, tight = run(aj.SimplifiedNewton()), run(aj.SimplifiedNewton(rtol=1e-10, atol=1e-14))
    assert loose.stats.evaluations / loose.stats.accepted < 0.8 * tight.stats.evaluations / tight.stats.accepted
    np.testing.assert_allclose(loose.ys, tight.ys, rtol=1e-3)


@pytest.mark.parametrize(("changes", "message"), [({"rtol": 1e-3}, "both"), ({"max_iterations": 0}, "at least one")])
def test_iterations_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        aj.SimplifiedNewton(**changes)


def square(t, y, args):
    """Blows up at t = 1 / y0; an implicit step beyond has equations without a solution."""
    return args * y**2


@pytest.mark.parametrize("controller", [aj.FixedSteps(2), aj.ConstantStepSize(0.5), aj.PIDController()])
def test_equations_without_a_solution_fail_clearly(controller):
    options = {"solver": aj.Kvaerno3(), "controller": controller, "throw": False}
    solution = aj.solve(square, 0.0, 3.0, jnp.ones(1), 1.0, **options)
    assert solution.status in (aj.Status.NON_FINITE, aj.Status.STEP_SIZE_UNDERFLOW, aj.Status.MAX_STEPS_REACHED)
    assert jnp.isnan(solution.ys).all()
    assert solution.t_end < 1.5


def test_the_message_names_the_iteration():
    with pytest.raises(aj.SolveError, match="the iteration could not solve: on a given grid, take shorter steps"):
        aj.solve(square, 0.0, 3.0, jnp.ones(1), 1.0, solver=aj.Kvaerno3(), controller=aj.FixedSteps(2))


# Gradients


def solve(case, inputs, **options):
    vector_field, args = case.make(inputs["theta"])
    return aj.solve(vector_field, inputs["t0"], inputs["t1"], inputs["y0"], args, **options)


def loss_of(case, **options):
    def loss(inputs):
        saveat = (aj.SaveAt(t1=True), aj.SaveAt(inputs["ts"]))

        def cost(t, y, args):
            return jnp.cos(t) * measure(y)

        solution = solve(case, inputs, saveat=saveat, running_cost=cost, **options)
        return rows_measure(solution.ys[1]) + measure(solution.ys[0]) + solution.cost

    return loss


@pytest.mark.parametrize(
    ("name", "case", "controller"),
    [
        ("Kvaerno3", "mixed", aj.FixedSteps(7)),
        pytest.param("KenCarp4", "complex", aj.FixedSteps(7), marks=[pytest.mark.slow]),
    ],
)
def test_the_transposed_step_is_exact(name, case, controller):
    """`DiscreteAdjoint` against forward sensitivities, whatever the tolerance of the iterations, in a random direction of
    all inputs."""
    case, options = problem(case), {"solver": METHODS[name][0], "controller": controller, "max_steps": 64}
    reverse = jit(jax.grad(loss_of(case, **options), allow_int=True))(case.inputs)
    loss = loss_of(case, adjoint=aj.ForwardMode(), **options)
    keys = iter(jax.random.split(jax.random.key(0), 32))
    direction = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape, x.dtype), case.inputs)
    forward = jit(lambda d: jax.jvp(loss, (case.inputs,), (d,))[1])(direction)
    pairs = zip(jax.tree.leaves(reverse), jax.tree.leaves(direction), strict=True)
    assert float(sum(jnp.sum(g * d).real for g, d in pairs)) == pytest.approx(float(forward), rel=1e-12)


def stiff_loss(y0, rates, adjoint, rtol=1e-7):
    options = {"solver": aj.Kvaerno5(), "controller": aj.PIDController(rtol, rtol * 1e-4), "adjoint": adjoint}
    ys = aj.odeint(robertson, y0, jnp.array([0.0, 0.3, 40.0]), rates, max_steps=256, **options)
    return jnp.sum(jnp.array([1.0, 1e4, 1.0]) * ys**2)


@functools.cache
def stiff_gradient():
    return jit(jax.grad(functools.partial(stiff_loss, adjoint=aj.DiscreteAdjoint()), argnums=(0, 1)))(START, RATES)


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", [aj.InterpolatingAdjoint()], ids=["interpolating"])
def test_continuous_adjoints_of_a_stiff_problem(adjoint):
    gradient = jit(jax.grad(functools.partial(stiff_loss, adjoint=adjoint), argnums=(0, 1)))(START, RATES)
    compare(RATES * gradient[1], RATES * stiff_gradient()[1], 1e-4)


def test_the_gradient_of_a_stiff_problem():
    """Against differences of tight solves."""
    value = jit(lambda rates: stiff_loss(START, rates, aj.DiscreteAdjoint(), rtol=1e-9))
    for i in range(3):
        change = 1e-4 * RATES[i] * jnp.eye(3)[i]
        difference = (value(RATES + change) - value(RATES - change)) / 2e-4
        assert float(RATES[i] * stiff_gradient()[1][i]) == pytest.approx(float(difference), rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_hessian_vector_products():
    """Forward over reverse against forward over forward: iterations are never differentiated."""
    case = problem("lotka_volterra")
    options = {"solver": aj.Kvaerno3(), "controller": aj.FixedSteps(5)}
    inputs = case.inputs | {"t0": 0.0, "t1": 1.0, "ts": jnp.array([0.5])}

    def loss(y0, adjoint):
        return loss_of(case, adjoint=adjoint, **options)(inputs | {"y0": y0})

    y0, v = inputs["y0"], jnp.array([0.6, -1.0])
    reverse = jit(lambda y: jax.jvp(jax.grad(lambda y: loss(y, aj.DiscreteAdjoint())), (y,), (v,))[1])(y0)
    along = functools.partial(loss, adjoint=aj.ForwardMode())
    forward = jit(lambda y: jax.jvp(lambda y: jax.jvp(along, (y,), (v,))[1], (y,), (v,))[1])(y0)
    assert float(v @ reverse) == pytest.approx(float(forward), rel=1e-11)


def test_single_precision():
    rates, y0 = RATES.astype(jnp.float32), START.astype(jnp.float32)

    def loss(rates):
        options = {"solver": aj.Kvaerno3(), "controller": aj.PIDController(1e-4, 1e-8), "max_steps": 256}
        return jnp.sum(aj.solve(robertson, 0.0, 40.0, y0, rates, **options).ys ** 2)

    value, gradient = jit(jax.value_and_grad(loss))(rates)
    assert value.dtype == gradient.dtype == jnp.float32
    expected = np.sum(np.square(ROBERTSON[40.0]))
    assert value == pytest.approx(expected, rel=1e-3)
    double = jit(jax.grad(loss))(RATES)
    np.testing.assert_allclose(RATES * gradient, RATES * double, rtol=1e-2)


# Lanes


def test_a_failing_lane_leaves_the_others_alone():
    """Lanes of different stiffness, one of which blows up: the others have the values and gradients of single solves."""

    def loss(rate):
        options = {"solver": aj.Kvaerno3(), "controller": aj.PIDController(1e-5, 1e-7), "max_steps": 64, "throw": False}
        solution = aj.solve(lambda t, y, a: a * y**2 + jnp.cos(t), 0.0, 2.0, jnp.ones(2), rate, **options)
        return jnp.where(solution.status == 0, jnp.sum(solution.ys), 0.0), solution.stats

    one = jit(jax.value_and_grad(loss, has_aux=True))
    rates = jnp.array([-0.5, 3.0, -2000.0])
    (values, stats), gradients = jit(jax.vmap(jax.value_and_grad(loss, has_aux=True)))(rates)
    for lane in (0, 2):
        (value, counts), gradient = one(rates[lane])
        np.testing.assert_allclose((values[lane], gradients[lane]), (value, gradient), rtol=1e-11)
        assert jax.tree.map(lambda leaf, lane=lane: int(leaf[lane]), stats) == jax.tree.map(int, counts)
    assert (values[1], gradients[1]) == (0.0, 0.0)


def test_no_time_to_integrate():
    solution = aj.solve(robertson, 1.0, 1.0, START, RATES, solver=aj.Kvaerno5(), saveat=aj.SaveAt(t1=True))
    np.testing.assert_array_equal(solution.ys[0], START)
