"""Mass matrices: M dy/dt = f(t, y), where M may be singular."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import compare, jit
from test_rosenbrock import AT_40, RATES, SIZES, START, WEIGHTS, robertson

import adjoint_jax as aj


def conserved(t, y, rates):
    """Robertson's problem with the conservation of mass in place of the last equation."""
    return robertson(t, y, rates).at[2].set(y.sum() - 1)


LAST_IS_ALGEBRAIC = np.diag([1.0, 1.0, 0.0])


def conserved_end(solver, adjoint, rates, tolerance, y0=START, **options):
    controller = aj.PIDController(rtol=tolerance, atol=tolerance * jnp.asarray(SIZES) * 1e-2)
    options = {"solver": solver, "adjoint": adjoint, "mass_matrix": LAST_IS_ALGEBRAIC, "controller": controller} | options
    return aj.solve(conserved, 0.0, 40.0, y0, rates, **options)


@pytest.mark.parametrize("method", [aj.Rosenbrock23, aj.Rodas4, aj.Rodas5P])
def test_a_differential_algebraic_equation(method):
    solution = jit(lambda tolerance: conserved_end(method(), aj.DiscreteAdjoint(), RATES, tolerance).ys[0])
    for tolerance in (1e-4, 1e-6):
        np.testing.assert_allclose(solution(tolerance) / SIZES, AT_40 / SIZES, rtol=10 * tolerance)


def test_gradients_of_a_differential_algebraic_equation():
    """Those of forward mode through the same steps, and those of the differential equation with the same solution."""

    def loss(adjoint, rates):
        return jnp.dot(conserved_end(aj.Rodas4(), adjoint, rates, 1e-7).ys[0], WEIGHTS)

    def of_ode(rates):
        controller = aj.PIDController(rtol=1e-7, atol=1e-9 * jnp.asarray(SIZES))
        return jnp.dot(
            aj.solve(robertson, 0.0, 40.0, START, rates, solver=aj.Rodas4(), controller=controller).ys[0], WEIGHTS
        )

    got = jit(jax.grad(functools.partial(loss, aj.DiscreteAdjoint())))(RATES)
    compare(got, jit(jax.jacfwd(functools.partial(loss, aj.ForwardMode())))(RATES), 1e-8)
    compare(got, jit(jax.grad(of_ode))(RATES), 1e-4)


MASS = np.array([[2.0, 0.5], [0.1, -1.0]])


def turning(t, y, rate):
    return {"x": rate * y["v"] * jnp.cos(t), "v": -(y["x"] ** 3) - rate * t * y["v"]}


def with_mass(t, y, rate):
    """The same with M on the left. The leaves of y come in the order v, x."""
    rates = turning(t, y, rate)
    both = jnp.asarray(MASS) @ jnp.stack([rates["v"], rates["x"]])
    return {"v": both[0], "x": both[1]}


@pytest.mark.slow
def test_a_mass_matrix_that_can_be_inverted_changes_nothing():
    """Rosenbrock methods are invariant under a constant change of equations, to rounding: steps, values and gradients."""

    def loss(field, mass, y0, rate):
        options = {"solver": aj.Rodas4(), "saveat": aj.SaveAt(jnp.array([0.3, 1.1, 1.8])), "dt0": 0.01, "mass_matrix": mass}
        options["running_cost"] = lambda t, y, rate: rate * y["x"] * y["v"] * t
        solution = aj.solve(field, 0.2, 1.8, y0, rate, controller=aj.PIDController(1e-5, 1e-7), **options)
        return solution.cost + jnp.sum(solution.ys["x"] * jnp.array([1.0, 2.0, 3.0]))

    y0 = {"x": jnp.array(1.0), "v": jnp.array(-0.4)}
    plain, massive = (
        jit(jax.value_and_grad(functools.partial(loss, *case), (0, 1)))(y0, 1.7)
        for case in ((turning, None), (with_mass, MASS))
    )
    compare(massive, plain, 1e-10)


def test_an_inconsistent_start_is_named():
    with pytest.raises(ValueError, match=r"weights \[0. 0. 1.\] must vanish at t0, and is 0.1"):
        conserved_end(aj.Rodas5P(), aj.DiscreteAdjoint(), RATES, 1e-4, START.at[2].set(0.1))


def test_an_inconsistent_lane_fails_alone():
    """Known at run time: the status of the lane, whose gradient is NaN; the others are as ever."""

    def end(y0):
        solution = conserved_end(aj.Rodas4(), aj.DiscreteAdjoint(), RATES, 1e-4, y0, throw=False)
        return solution.ys[0][0], solution.status

    starts = jnp.stack([START, START.at[2].set(0.1), jnp.array([0.9, 0.0, 0.1])])
    (values, status), gradients = jit(jax.vmap(jax.value_and_grad(end, has_aux=True)))(starts)
    assert status.tolist() == [aj.Status.SUCCESS, aj.Status.INCONSISTENT, aj.Status.SUCCESS]
    assert np.isfinite(values).tolist() == [True, False, True]
    assert np.isfinite(gradients).all(axis=1).tolist() == [True, False, True]
    np.testing.assert_allclose(values[0], AT_40[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": aj.Tsit5()}, ValueError, "use Rodas5P"),
        ({"mass_matrix": np.eye(2)}, ValueError, r"shape \(3, 3\).* got \(2, 2\)"),
        ({"mass_matrix": 1j * np.eye(3)}, TypeError, "must be real"),
    ],
)
def test_wrong_mass_matrices_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        conserved_end(
            **{"solver": aj.Rodas5P(), "adjoint": aj.DiscreteAdjoint(), "rates": RATES, "tolerance": 1e-4} | options
        )


def test_what_has_no_derivative_is_refused():
    def end(t1, mass, adjoint):
        options = {"solver": aj.Rodas4(), "mass_matrix": mass, "adjoint": adjoint}
        return aj.solve(conserved, 0.0, t1, START, RATES, **options).ys[0, 0]

    for argument in (0, 1):
        with pytest.raises(TypeError, match="constants of the derivative"):
            jax.grad(end, argument)(1.0, jnp.asarray(LAST_IS_ALGEBRAIC), aj.DiscreteAdjoint())
    with pytest.raises(ValueError, match=r"use DiscreteAdjoint\(\)"):
        jax.grad(lambda rates: jnp.sum(conserved_end(aj.Rodas4(), aj.GaussAdjoint(), rates, 1e-4).ys))(RATES)
