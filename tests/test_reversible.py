"""Reversible methods: orders, inverses, stability, counts; and that `ReversibleAdjoint` is `DiscreteAdjoint` with them."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from problems import LOTKA_VOLTERRA, compare, jit, lotka_volterra, rows_measure

import adjoint_jax as aj
from adjoint_jax.problem import Interval, Problem

SOLVERS = {
    "Reversible(Bosh3)": aj.Reversible(aj.Bosh3()),
    "Reversible(RK4, 0.9)": aj.Reversible(aj.RK4(), 0.9),
    "ReversibleHeun": aj.ReversibleHeun(),
    "AsynchronousLeapfrog": aj.AsynchronousLeapfrog(),
    "AsynchronousLeapfrog(0.9)": aj.AsynchronousLeapfrog(0.9),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def field(t, y, args):
    """With the solution (sin 2t, cos t)."""
    u, v = y
    du = 2 * jnp.cos(2 * t) + u * v - jnp.sin(2 * t) * jnp.cos(t)
    dv = -jnp.sin(t) - (u - jnp.sin(2 * t)) - 0.3 * (v**3 - jnp.cos(t) ** 3)
    return jnp.stack([du, dv])


def exact(t):
    return np.stack([np.sin(2 * t), np.cos(t)], axis=-1)


def linear(t, y, eigenvalue):
    return eigenvalue * y


# Orders


ORDERS = {
    aj.Reversible(aj.Heun()): (2, 2),
    aj.Reversible(aj.Bosh3()): (3, 3),
    aj.Reversible(aj.Tsit5(), 0.99): (5, 5),
    aj.ReversibleHeun(): (2, 2),
    aj.AsynchronousLeapfrog(): (2, 2),
}


@pytest.mark.parametrize(("solver", "orders"), ORDERS.items(), ids=lambda value: str(value).replace("tableau=", "")[:40])
def test_orders_of_steps_and_of_dense_output(solver, orders):
    """A dense output of order q has errors of order q + 1 between steps, whose own are of the method's order."""
    inside = np.linspace(0.3, 2.3, 191)[1:-1]
    errors = []
    for steps in (30, 60) if orders[0] == 5 else (80, 160):
        saveat = (aj.SaveAt(steps=True), aj.SaveAt(inside))
        options = {"solver": solver, "controller": aj.FixedSteps(steps), "saveat": saveat}
        solution = aj.solve(field, 0.3, 2.3, exact(0.3), **options)
        grid = np.linspace(0.3, 2.3, steps + 1)[1:]
        errors.append((np.abs(solution.ys[0] - exact(grid)).max(), np.abs(solution.ys[1] - exact(inside)).max()))
    observed = np.log2(np.divide(*errors))
    assert solver.order == orders[0]
    assert np.min(errors) > 1e-12
    assert np.all(observed > np.array(orders) - 0.4), observed
    assert np.all(observed < np.array(orders) + 0.9), observed


def test_the_order_of_the_damped_leapfrog():
    solver, errors = aj.AsynchronousLeapfrog(0.8), []
    for steps in (80, 160):
        y1 = aj.solve(field, 0.3, 2.3, exact(0.3), solver=solver, controller=aj.FixedSteps(steps)).ys[0]
        errors.append(np.abs(y1 - exact(2.3)).max())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(solver.order, abs=0.4)


# Inverses


@each_solver
@pytest.mark.parametrize("h", [0.1, -0.1], ids=["forward", "backward"])
def test_the_inverse_of_a_step_gives_its_state_back(solver, h):
    t, y0 = jnp.array(0.4), jnp.array([0.7, -1.2])
    problem = Problem(field, None, None, y0, t, t + 1.0)
    start = solver.start(problem)
    interval = Interval(t, t + h, t, t + h)
    # A second step, from a state that is in general position.
    first = solver.step(problem, interval, start, None).after
    after = Interval(t + h, t + 2 * h, t + h, t + 2 * h)
    second = solver.step(problem, after, first, None).after
    assert max(np.max(np.abs(a - b)) for a, b in zip(second, first, strict=True)) > 1e-3
    compare(solver.inverse(problem, after, second), first, 1e-14)
    compare(solver.inverse(problem, interval, first), start, 1e-14)


@pytest.mark.parametrize(
    ("solver", "growth"),
    [
        (aj.Reversible(aj.RK4(), 0.9), 1 / 0.9),
        (aj.Reversible(aj.RK4(), 0.5), 2.0),
        (aj.Reversible(aj.RK4(), 1.0), 1.0),
        (aj.AsynchronousLeapfrog(0.8), 1 / 0.6),
        (aj.AsynchronousLeapfrog(), 1.0),
        (aj.ReversibleHeun(), 1.0),
    ],
    ids=["coupling 0.9", "coupling 0.5", "coupling 1", "damping 0.8", "no damping", "Heun"],
)
def test_growth_of_rounding_errors_on_the_way_back(solver, growth):
    """The largest factor from step to step, for a field of zero: the inverse is linear there."""
    y0, t = jnp.zeros(1), jnp.array(0.0)
    problem = Problem(lambda t, y, args: 0.0 * y, None, None, y0, t, t + 1.0)
    interval = Interval(t, t + 0.01, t, t + 0.01)
    flat, unravel = jax.flatten_util.ravel_pytree(solver.start(problem))

    def inverse(state):
        return jax.flatten_util.ravel_pytree(solver.inverse(problem, interval, unravel(state)))[0]

    eigenvalues = np.abs(np.linalg.eigvals(jax.jacfwd(inverse)(flat)))
    assert np.max(eigenvalues) == pytest.approx(growth, rel=1e-6)


# Stability


def ends(solver, eigenvalue, steps, h=0.1):
    options = {"solver": solver, "controller": aj.FixedSteps(steps), "throw": False}
    return float(np.abs(aj.solve(linear, 0.0, h * steps, jnp.array(1.0 + 0j), eigenvalue, **options).ys[0]))


@pytest.mark.parametrize("solver", [aj.ReversibleHeun(), aj.AsynchronousLeapfrog()], ids=["Heun", "leapfrog"])
def test_stability_on_the_imaginary_axis_alone(solver):
    """For h times the eigenvalue between -i and i; a decay that Heun's method follows explodes."""
    assert ends(solver, 9.5j, 4000) < 5
    assert ends(solver, 10.5j, 400) > 1e6
    assert ends(aj.Heun(), -10.0, 400) < 1e-12
    assert ends(solver, -10.0, 400) > 1e6
    assert ends(solver, -0.5, 4000) > 1e6


def test_damping_gives_the_leapfrog_a_region_of_stability():
    assert ends(aj.AsynchronousLeapfrog(0.7), -2.0, 4000) < 1e-12
    assert ends(aj.AsynchronousLeapfrog(1.0), -2.0, 400) > 1e6


def test_the_difference_of_the_pair_is_damped_by_the_coupling():
    """Where the field is zero."""
    solver, y0, t = aj.Reversible(aj.RK4(), 0.8), jnp.array([1.0]), jnp.array(0.0)
    interval = Interval(t, t + 0.1, t, t + 0.1)
    still = Problem(linear, None, jnp.array(0.0), y0, t, t + 1.0)
    pair = solver.start(still)._replace(z=y0 + 1e-3)
    for n in range(1, 4):
        pair = solver.step(still, interval, pair, None).after
        np.testing.assert_allclose(pair.y - pair.z, -1e-3 * 0.8**n, rtol=1e-10)


@pytest.mark.parametrize("tolerance", [1e-5, 1e-7])
def test_an_adaptive_solve_of_a_decay_is_right_or_fails(tolerance):
    """y = exp(-25 t) + exp(-t) of two decays: both components together."""
    options = {"solver": aj.Reversible(aj.Bosh3()), "controller": aj.PIDController(tolerance, tolerance), "throw": False}
    solution = aj.solve(linear, 0.0, 1.5, jnp.array([1.0, 1.0]), jnp.array([-25.0, -1.0]), **options)
    error = np.abs(solution.ys[0] - np.exp(1.5 * np.array([-25.0, -1.0]))).max()
    assert solution.status != aj.Status.SUCCESS or error < 1000 * tolerance


def test_a_gradient_whose_inverse_loses_all_digits_is_guarded():
    """A thousand steps, on each of which the inverse enlarges rounding errors by 1 / 0.9."""

    def loss(rate):
        options = {"solver": aj.Reversible(aj.RK4(), 0.9), "controller": aj.FixedSteps(1000)}
        return aj.solve(linear, 0.0, 1.0, 1.0, rate, adjoint=aj.ReversibleAdjoint(), throw=False, **options).ys[0]

    gradient = jax.grad(loss)(0.8)
    assert np.isnan(gradient) or gradient == pytest.approx(np.exp(0.8), rel=1e-6)


# Gradients


THREE = np.array([0.3, 0.3, 1.1])
CONTROLLERS = {
    "fixed": aj.FixedSteps(37),
    "adaptive": aj.PIDController(rtol=1e-5, atol=1e-5),
    "jumps": aj.PIDController(rtol=1e-5, atol=1e-5, jump_ts=[0.5]),
}


def jumping(t, y, args):
    return lotka_volterra(t, y, args) + jnp.where(t < 0.5, 0.3, 0.0)


@pytest.mark.parametrize(
    ("solver", "controller", "t1"),
    [
        pytest.param("Reversible(Bosh3)", "jumps", 1.5, marks=[pytest.mark.slow]),
        pytest.param("Reversible(RK4, 0.9)", "fixed", -1.5, marks=[pytest.mark.slow]),
        ("ReversibleHeun", "adaptive", -1.5),
        ("AsynchronousLeapfrog(0.9)", "fixed", -1.5),
    ],
)
def test_gradients_equal_those_of_the_discrete_adjoint(solver, controller, t1):
    """With rows, the final state and a cost, with respect to everything."""
    vector_field = jumping if controller == "jumps" else lotka_volterra

    def loss(inputs, adjoint):
        t0, t1, ts, y0, theta = inputs
        options = {"solver": SOLVERS[solver], "controller": CONTROLLERS[controller], "max_steps": 1024, "adjoint": adjoint}
        saveat = aj.SaveAt(ts, t0=True, t1=True)
        solution = aj.solve(
            vector_field, t0, t1, y0, theta, saveat=saveat, running_cost=lambda t, y, a: t * a["a"] * y[0] * y[1], **options
        )
        return rows_measure(solution.ys) + solution.cost

    def gradient(adjoint):
        return jit(jax.grad(lambda inputs: loss(inputs, adjoint)))(inputs)

    inputs = jnp.array(0.0), jnp.array(t1), jnp.array(np.sign(t1) * THREE), jnp.array([1.2, 2.0]), LOTKA_VOLTERRA
    compare(gradient(aj.ReversibleAdjoint()), gradient(aj.DiscreteAdjoint()), 1e-9 if "0.9" in solver else 1e-11)


def test_gradients_in_lanes_that_take_different_numbers_of_steps():
    def loss(y0, adjoint):
        options = {"solver": SOLVERS["Reversible(Bosh3)"], "controller": CONTROLLERS["adaptive"], "adjoint": adjoint}
        solution = aj.solve(lotka_volterra, 0.0, 1.5, y0, LOTKA_VOLTERRA, max_steps=512, **options)
        return rows_measure(solution.ys), solution.stats.accepted

    def gradients(adjoint):
        return jit(jax.vmap(jax.grad(lambda y0: loss(y0, adjoint), has_aux=True)))(lanes)

    lanes = jnp.array([[1.2, 2.0], [0.1, 0.2], [6.0, 3.0]])
    (got, steps), (expected, _) = gradients(aj.ReversibleAdjoint()), gradients(aj.DiscreteAdjoint())
    assert len(set(steps.tolist())) == 3
    compare(got, expected, 1e-11)


@pytest.mark.parametrize("solver", [aj.Tsit5(), aj.RK4()], ids=["Tsit5", "RK4"])
def test_the_adjoint_needs_a_reversible_solver(solver):
    def loss(y0):
        controller = aj.FixedSteps(3)
        return aj.solve(
            linear, 0.0, 1.0, y0, -1.0, solver=solver, controller=controller, adjoint=aj.ReversibleAdjoint()
        ).ys[0]

    with pytest.raises(TypeError, match=r"needs a reversible solver, such as Reversible\((Tsit5|ExplicitRungeKutta|RK4)"):
        jax.grad(loss)(1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: aj.Reversible(aj.Tsit5(), 0.0), "coupling"),
        (lambda: aj.Reversible(aj.Tsit5(), 1.1), "coupling"),
        (lambda: aj.AsynchronousLeapfrog(0.5), "damping"),
        (lambda: aj.AsynchronousLeapfrog(1.1), "damping"),
    ],
)
def test_couplings_and_dampings_out_of_range_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Counts


class Counted:
    """A field that counts how often its value is really computed."""

    def __init__(self):
        self.calls = 0

    def _slope(self, t, y):
        self.calls += 1
        return np.asarray(-0.3 * y + np.cos(3 * t))

    def __call__(self, t, y, args):
        return jax.pure_callback(self._slope, jax.ShapeDtypeStruct(y.shape, y.dtype), t, y, vmap_method="sequential")


COUNTED = {
    "adaptive": aj.PIDController(1e-3, 1e-3),
    "jumps": aj.PIDController(1e-3, 1e-3, jump_ts=[0.7, 1.9]),
    "constant": aj.ConstantStepSize(0.4),
    "fixed": aj.FixedSteps(7),
}


@pytest.mark.parametrize(
    "solver", [aj.Reversible(aj.Bosh3()), aj.Reversible(aj.Vern7()), aj.ReversibleHeun(), aj.AsynchronousLeapfrog()]
)
@pytest.mark.parametrize("controller", COUNTED)
@pytest.mark.parametrize("saveat", [aj.SaveAt(t1=True), aj.SaveAt(np.array([0.05, 2.9]))], ids=["t1", "ts"])
def test_evaluations_are_counted_exactly(solver, controller, saveat):
    counted = Counted()
    options = {"solver": solver, "controller": COUNTED[controller], "saveat": saveat}
    solution = aj.solve(counted, 0.0, 3.0, np.array([1.0, 2.0]), **options)
    jax.block_until_ready(solution.ys)
    assert int(solution.stats.evaluations) == counted.calls


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", [aj.InterpolatingAdjoint()], ids=type)
def test_dense_output_through_continuous_adjoints(adjoint):
    """They start the method anew at every step: the gradient is that of the exact adjoint, up to the method's error."""

    def loss(inputs, adjoint):
        options = {"solver": SOLVERS["Reversible(Bosh3)"], "controller": aj.PIDController(1e-7, 1e-7), "max_steps": 512}
        saveat = aj.SaveAt(dense=True)
        solution = aj.solve(lotka_volterra, 0.0, 1.5, inputs[0], inputs[1], saveat=saveat, adjoint=adjoint, **options)
        return jnp.sum(solution.evaluate(0.7) * jnp.array([1.0, -0.3]))

    gradient = jit(jax.grad(loss))
    inputs = jnp.array([1.2, 2.0]), LOTKA_VOLTERRA
    compare(gradient(inputs, adjoint), gradient(inputs, aj.DiscreteAdjoint()), 1e-5)
