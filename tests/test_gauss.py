"""The parameters' quadrature of `GaussAdjoint`: its rules, and the control of its own error."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

import adjoint_jax as aj
from adjoint_jax.quadrature import gauss_legendre, kronrod

RULES = {"gauss 1": (gauss_legendre(1), 1), "gauss 3": (gauss_legendre(3), 5), "kronrod": (kronrod(), 11)}


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_exact_for_polynomials_of_their_degree(rule):
    (points, weights), degree = RULES[rule]
    for power in range(degree + 1):
        np.testing.assert_allclose(weights @ points**power, 1 / (power + 1), rtol=1e-14)
    assert abs(weights @ points ** (degree + 1) * (degree + 2) - 1) > 1e-8


def test_kronrod_contains_the_points_of_gauss():
    np.testing.assert_allclose(kronrod().points[1::2], gauss_legendre(3).points, atol=1e-15)


def swift(t, y, theta):
    """The parameter's part varies 400 times as fast as y and a do, and is too small for any error estimate to see."""
    return -0.1 * y + 1e-6 * theta * jnp.cos(40 * t)


@eqx.filter_jit
@eqx.filter_grad
def gradient(theta, adjoint):
    controller = aj.PIDController(1e-5, 1e-5)
    return jnp.sum(aj.solve(swift, 0.0, 10.0, jnp.array([1.0]), theta, controller=controller, adjoint=adjoint).ys)


def test_the_quadrature_controls_its_own_error():
    """Where the reverse ODE's steps are far too long for the parameters' integrand, only a rule with an error estimate of
    its own is right; its tolerance is met."""
    theta = jnp.array(1.0)
    exact = quad(lambda t: np.exp(-0.1 * (10 - t)) * np.cos(40 * t) * 1e-6, 0, 10, limit=1000, epsabs=1e-20)[0]
    largest = 1e-6 / 40
    assert abs(gradient(theta, aj.GaussAdjoint()) - exact) > 0.5 * abs(exact)
    assert abs(gradient(theta, aj.GaussAdjoint(rtol=1e-3)) - exact) < 1e-3 * largest
    assert abs(gradient(theta, aj.GaussAdjoint(rtol=1e-6)) - exact) < 1e-6 * largest


def test_bad_options():
    with pytest.raises(ValueError, match="nodes"):
        aj.GaussAdjoint(nodes=0)
    with pytest.raises(ValueError, match="leave nodes out"):
        aj.GaussAdjoint(nodes=3, rtol=1e-3)
    with pytest.raises(ValueError, match=r"rtol.* positive"):
        gradient(jnp.array(1.0), aj.GaussAdjoint(rtol=-1e-3))
    with pytest.raises(ValueError, match="checkpoints"):
        aj.GaussAdjoint(checkpoints=0)
