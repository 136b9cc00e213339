"""Running costs against closed forms: values, orders, dtypes, edges. Their gradients are in the contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import compare, jit

import adjoint_jax as aj

TIGHT = {"controller": aj.PIDController(rtol=1e-9, atol=1e-11)}
ADJOINTS = {
    "discrete": aj.DiscreteAdjoint(),
    "checkpoints": aj.DiscreteAdjoint(checkpoints=2),
    "reversible": aj.ReversibleAdjoint(),
    "backsolve": aj.BacksolveAdjoint(),
    "interpolating": aj.InterpolatingAdjoint(),
    "gauss": aj.GaussAdjoint(),
}


def solver_for(adjoint):
    return aj.Reversible(aj.Bosh3()) if isinstance(adjoint, aj.ReversibleAdjoint) else aj.Bosh3()


def decay(t, y, rate):
    return -rate * y


def square(t, y, rate):
    return y**2


def energy(rate, t0, t1, y0):
    """The integral of y^2 of an exponential decay."""
    return y0**2 * (1 - jnp.exp(-2 * rate * (t1 - t0))) / (2 * rate)


# Values


@pytest.mark.parametrize("controller", [TIGHT["controller"], aj.ConstantStepSize(0.003), aj.FixedSteps(500)])
@pytest.mark.parametrize("t1", [1.7, -0.6])
def test_the_cost_of_a_decay(controller, t1):
    """Backward in time, the integral has the other sign."""
    solution = aj.solve(decay, 0.2, t1, 1.5, 0.8, controller=controller, running_cost=square)
    assert solution.cost.shape == ()
    assert np.sign(solution.cost) == np.sign(t1 - 0.2)
    np.testing.assert_allclose(solution.cost, energy(0.8, 0.2, t1, 1.5), rtol=1e-7)


def test_no_running_cost_gives_no_cost():
    assert aj.solve(decay, 0.0, 1.0, 1.0, 1.0).cost is None


def test_the_cost_of_no_time_is_zero():
    for controller in (aj.PIDController(), aj.FixedSteps(3)):
        assert aj.solve(decay, 0.4, 0.4, 1.0, 1.0, running_cost=square, controller=controller).cost == 0.0


METHODS = (aj.Euler(), aj.Midpoint(), aj.Heun(), aj.Ralston(), aj.Bosh3(), aj.RK4(), aj.Dopri5(), aj.Tsit5(), aj.Vern7())
METHODS += (aj.Reversible(aj.Bosh3()), aj.ReversibleHeun(), aj.AsynchronousLeapfrog())


@pytest.mark.parametrize("solver", METHODS, ids=lambda solver: type(solver).__name__)
def test_the_cost_has_the_order_of_the_method(solver):
    """y = exp(sin t), and the integral of y + t dy/dt, which is t y."""

    def cost(steps):
        options = {"solver": solver, "controller": aj.FixedSteps(steps)}
        return float(aj.solve(field, 0.3, 2.7, solution(0.3), running_cost=change_of_product, **options).cost)

    def field(t, y, args):
        return jnp.cos(t) * y

    def change_of_product(t, y, args):
        return y + t * jnp.cos(t) * y

    def solution(t):
        return np.exp(np.sin(t))

    exact = 2.7 * solution(2.7) - 0.3 * solution(0.3)
    steps = {1: 200, 2: 80, 3: 50, 4: 40, 5: 12, 7: 12}[solver.order]
    coarse, fine = (abs(cost(n) - exact) for n in (steps, 2 * steps))
    assert fine > 1e-13
    assert -0.4 < np.log2(coarse / fine) - solver.order < 0.9


def test_pytrees_and_complex_costs():
    """The cost has the structure of what `running_cost` returns; z = exp(i w t)."""

    def cost(t, y, w):
        return {"pair": (y["z"], t * y["x"]), "constant": 2.0, "none": None}

    def field(t, y, w):
        return {"z": 1j * w * y["z"], "x": jnp.zeros(3)}

    y0 = {"z": jnp.array([1.0 + 0j]), "x": jnp.array([1.0, 2.0, 3.0])}
    got = aj.solve(field, 0.0, 1.3, y0, 2.1, running_cost=cost, **TIGHT).cost
    exact = {
        "pair": (np.array([(np.exp(2.1j * 1.3) - 1) / 2.1j]), 1.3**2 / 2 * np.array([1.0, 2.0, 3.0])),
        "constant": 2.6,
        "none": None,
    }
    assert got["pair"][0].dtype == np.complex128
    compare(got, exact, 1e-8)


def test_a_float32_state_has_float32_costs():
    """With x64 enabled and float64 times in the cost."""

    def cost(t, y, rate):
        return {"real": t * y, "complex": 1j * t * y, "number": 1.0}

    def loss(y0):
        return aj.solve(decay, 0.0, 1.0, y0, 0.8, running_cost=cost).cost["real"]

    y0 = jnp.float32(1.5)
    got = aj.solve(decay, 0.0, 1.0, y0, 0.8, running_cost=cost).cost
    assert jax.tree.map(lambda leaf: leaf.dtype.name, got) == {
        "real": "float32",
        "complex": "complex64",
        "number": "float32",
    }
    assert jax.grad(loss)(y0).dtype == np.float32


@pytest.mark.parametrize("rate", [1, jnp.array([1, 2]), True])
def test_costs_that_are_no_floating_point_numbers_raise(rate):
    with pytest.raises(TypeError, match=r"running_cost.*must return floating-point numbers"):
        aj.solve(decay, 0.0, 1.0, 1.0, 1.0, running_cost=lambda t, y, args: rate)


def test_a_cost_changes_nothing_of_the_solution():
    """It is outside of the error estimate."""
    rough = {"controller": aj.PIDController(rtol=1e-3, atol=1e-3), "saveat": aj.SaveAt(steps=True)}
    with_cost = aj.solve(decay, 0.0, 4.0, 1.5, 0.8, running_cost=lambda t, y, a: 1e6 * jnp.sin(40 * t), **rough)
    without = aj.solve(decay, 0.0, 4.0, 1.5, 0.8, **rough)
    np.testing.assert_allclose(with_cost.ys, without.ys, rtol=1e-7)
    assert with_cost.stats.accepted == without.stats.accepted
    assert with_cost.stats.evaluations == without.stats.evaluations


# Failures


def explosion(t, y, rate):
    return rate * y**2


def test_the_cost_of_a_failed_solve_is_nan():
    for controller in (aj.PIDController(), aj.ConstantStepSize(0.01)):
        solution = aj.solve(explosion, 0.0, 2.0, 1.0, 1.0, controller=controller, running_cost=square, throw=False)
        assert solution.status != aj.Status.SUCCESS
        assert np.isnan(solution.cost)


@pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)
def test_a_failed_lane_leaves_costs_and_gradients_of_the_others_alone(adjoint):
    """y = 1 / (1 / y0 - rate t), and the integral of y^2 is the change of y over rate; y0 = 1 explodes before t1."""
    y0s, fine = jnp.array([0.2, 1.0, -1.0]), np.array([0, 2])

    def cost(y0, rate):
        options = {"solver": solver_for(adjoint), "adjoint": adjoint, "throw": False, "max_steps": 512}
        controller = aj.PIDController(rtol=1e-7, atol=1e-9)
        return aj.solve(explosion, 0.0, 2.0, y0, rate, controller=controller, running_cost=square, **options).cost

    def used(rate):
        costs = jax.vmap(cost, (0, None))(y0s, rate)
        return jnp.where(jnp.isnan(costs), 0.0, costs).sum(), costs

    def exact(rate):
        return ((1 / (1 / y0s[fine] - 2.0 * rate) - y0s[fine]) / rate).sum()

    gradient, costs = jit(jax.grad(used, has_aux=True))(1.0)
    assert np.isnan(costs).tolist() == [False, True, False]
    np.testing.assert_allclose(costs[fine].sum(), exact(1.0), rtol=1e-5)
    np.testing.assert_allclose(gradient, jax.grad(exact)(1.0), rtol=1e-5)


# Gradients


def test_forward_mode_of_the_cost():
    def loss(inputs):
        rate, t0, t1, y0 = inputs
        return aj.solve(decay, t0, t1, y0, rate, running_cost=square, adjoint=aj.ForwardMode(), **TIGHT).cost

    inputs = tuple(map(jnp.array, (0.8, 0.2, 1.1, 1.5)))
    compare(jax.jacfwd(loss)(inputs), jax.grad(lambda inputs: energy(*inputs))(inputs), 1e-7)


@pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)
def test_a_cost_that_is_not_used_has_no_effect_on_gradients(adjoint):
    """Not even where its own derivative is infinite."""

    def loss(inputs):
        rate, y0 = inputs
        options = {"solver": solver_for(adjoint), "adjoint": adjoint, "running_cost": singular, "max_steps": 256}
        return aj.solve(decay, 0.0, 1.0, y0, rate, **options).ys[0]

    def singular(t, y, rate):
        return jnp.sqrt(y - y) + jnp.inf * rate

    inputs = jnp.array(0.8), jnp.array(1.5)
    exact = jax.grad(lambda inputs: inputs[1] * jnp.exp(-inputs[0]))(inputs)
    compare(jit(jax.grad(loss))(inputs), exact, 1e-4)
