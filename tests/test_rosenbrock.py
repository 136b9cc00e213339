"""Rosenbrock methods: their tableaus' order conditions and stability, stiff problems, and the transposed step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import compare, jit
from test_tableaus import count, density, rooted_trees

import adjoint_jax as aj

METHODS = (aj.Rosenbrock23, aj.Rodas4, aj.Rodas5P)
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)


# The tableaus, in the form k_i = h f(y + sum alpha_ij k_j) + h J sum gamma_ij k_j, y+ = y + sum b_i k_i, where u = Gamma k


class Classical:
    """alpha, Gamma and the weights of k, from a tableau for u."""

    def __init__(self, tableau):
        def lower(rows):
            return np.array([row + (0.0,) * (len(rows) - len(row)) for row in rows])

        self.tableau, stages = tableau, len(tableau.m)
        self.gamma = np.linalg.inv(np.eye(stages) / tableau.gamma - lower(tableau.c))
        self.alpha = lower(tableau.a) @ self.gamma
        self.beta = self.alpha + self.gamma

    def weights(self, of_u):
        return np.asarray(of_u).T @ self.gamma

    def elementary(self, tree):
        """Hairer and Wanner, section IV.7: a vertex with one child has a row of beta, one with more a row of alpha."""
        matrix = self.beta if len(tree) == 1 else self.alpha
        return np.prod([matrix @ self.elementary(child) for child in tree], axis=0) * np.ones(len(self.beta))

    def violation(self, of_u, order):
        """Of the conditions of one order. The weights of u are numbers, or polynomials in s."""
        weights, worst = self.weights(of_u), 0.0
        for tree in rooted_trees(order):
            got = weights @ self.elementary(tree)
            wanted = 1 / density(tree) * (np.arange(1, np.size(got) + 1) == order if np.ndim(got) else 1)
            worst = max(worst, np.max(np.abs(got - wanted)))
        assert all(count(tree) == order for tree in rooted_trees(order))
        return worst


@each_method
def test_order_conditions(method):
    """Coefficients are published with 13 to 16 digits, and some are of size 100."""
    tableau = method().tableau
    classical = Classical(tableau)
    embedded = np.subtract(tableau.m, tableau.error)
    for weights, order in ((tableau.m, tableau.order), (tableau.dense, tableau.dense_order)):
        assert all(classical.violation(weights, lower) < 2e-12 for lower in range(1, order + 1))
        assert classical.violation(weights, order + 1) > 1e-5
    assert all(classical.violation(embedded, lower) < 2e-12 for lower in range(1, tableau.error_order + 1))
    np.testing.assert_allclose(classical.alpha.sum(1), tableau.alpha, atol=1e-13)
    np.testing.assert_allclose(classical.gamma.sum(1), tableau.gammas, atol=1e-12)


@each_method
def test_steps_damp_what_decays_infinitely_fast(method):
    """R(z) = 1 + z b^T (I - z B)^-1 1 is 1 - b^T B^-1 1 at infinity, and at most one in the left half-plane."""
    tableau = method().tableau
    classical = Classical(tableau)
    b, ones = classical.weights(tableau.m), np.ones(len(tableau.m))
    assert abs(1 - b @ np.linalg.solve(classical.beta, ones)) < 1e-10
    for z in 1j * np.logspace(-3, 4, 200):
        assert abs(1 + z * b @ np.linalg.solve(np.eye(len(b)) - z * classical.beta, ones)) < 1 + 1e-9


def test_wrong_tableaus_are_refused():
    tableau = aj.Rosenbrock23().tableau
    with pytest.raises(ValueError, match="one entry per stage"):
        dataclasses.replace(tableau, alpha=(0.0,))
    with pytest.raises(ValueError, match="row i of a and of c"):
        dataclasses.replace(tableau, a=((), (), ()))
    with pytest.raises(ValueError, match="dense weights end in"):
        dataclasses.replace(tableau, dense=((1.0, 0.0), (0.0, 0.0), (0.0, 0.0)))


# Orders


def prothero_robinson(t, y, rate):
    """y' = rate (y - cos t) - sin t, with the solution cos t."""
    return rate * (y - jnp.cos(t)) - jnp.sin(t)


@each_method
def test_orders_of_values_dense_output_and_cost(method):
    def field(t, y, a):
        return jnp.stack([y[0] * jnp.cos(t) * a, jnp.sin(y[0] * y[1]) - t * y[1]])

    def run(solver, controller):
        inner = jnp.linspace(0.01, 1.99, 200)
        options = {"saveat": aj.SaveAt(inner, t1=True), "running_cost": lambda t, y, a: t * y[0] ** 2}
        solution = aj.solve(field, 0.0, 2.0, jnp.array([1.0, 0.5]), 1.3, solver=solver, controller=controller, **options)
        return np.asarray(solution.ys[-1]), np.asarray(solution.ys[:-1]), np.asarray(solution.cost)

    tableau, exact = method().tableau, run(aj.Vern7(), aj.PIDController(rtol=1e-12, atol=1e-12))
    coarse, fine = (
        [np.max(np.abs(got - true)) for got, true in zip(run(method(), aj.FixedSteps(steps)), exact, strict=True)]
        for steps in (40, 80)
    )
    expected = (tableau.order, min(tableau.order, tableau.dense_order + 1), min(tableau.order, tableau.dense_order + 1))
    for observed, order in zip(np.log2(np.divide(coarse, fine)), expected, strict=True):
        assert observed > order - 0.25


@pytest.mark.parametrize(
    ("method", "order"), [(aj.Rosenbrock23, 2), (aj.Rodas4, 1), (aj.Rodas5P, 3)], ids=("Rosenbrock23", "Rodas4", "Rodas5P")
)
def test_orders_where_the_problem_is_stiff(method, order):
    """Prothero and Robinson's problem. The errors of Rodas4 and Rodas5P are h and h^3 divided by the stiffness: of lower
    order than elsewhere, and yet far below those of Rosenbrock23."""
    times = jnp.linspace(0.4, 2.0, 5)

    @jit
    def error(dt):
        options = {"solver": method(), "controller": aj.ConstantStepSize(dt), "saveat": aj.SaveAt(times)}
        ys = aj.solve(prothero_robinson, 0.0, 2.0, jnp.array(1.0), -1e5, **options).ys
        return jnp.max(jnp.abs(ys - jnp.cos(times)))

    assert np.log2(error(0.05) / error(0.025)) == pytest.approx(order, abs=0.15)
    assert error(0.05) < 2e-4 if method is aj.Rosenbrock23 else error(0.05) < 1e-8


# Stiff problems


def robertson(t, y, rates):
    slow, fast, square = rates
    a, b, c = y
    forward, backward, pair = slow * a, fast * b * c, square * b * b
    return jnp.stack([backward - forward, forward - backward - pair, pair])


RATES = jnp.array([0.04, 1e4, 3e7])
START = jnp.array([1.0, 0.0, 0.0])
AT_40 = np.array([0.7158270688, 9.185534765e-6, 0.2841637457])
"""Robertson's problem at t = 40: Hairer and Wanner, section IV.10, to ten digits."""
SIZES = np.array([1.0, 1e-5, 1.0])
WEIGHTS = np.array([1.0, 2.0, 3.0]) / SIZES


def robertson_end(solver, adjoint, y0, rates, tolerance, t1=40.0):
    controller = aj.PIDController(rtol=tolerance, atol=tolerance * jnp.asarray(SIZES) * 1e-2)
    return aj.solve(robertson, 0.0, t1, y0, rates, solver=solver, controller=controller, adjoint=adjoint, max_steps=8192)


@each_method
def test_robertson(method):
    solution = jit(lambda tolerance: robertson_end(method(), aj.DiscreteAdjoint(), START, RATES, tolerance))
    for tolerance, most_steps in ((1e-4, 150), (1e-6, 1000)):
        got = solution(tolerance)
        np.testing.assert_allclose(got.ys[0] / SIZES, AT_40 / SIZES, rtol=10 * tolerance)
        assert got.stats.accepted < most_steps
        assert abs(np.sum(got.ys[0]) - 1) < 1e-12


ADJOINTS = {
    "discrete": aj.DiscreteAdjoint(),
    "interpolating": aj.InterpolatingAdjoint(),
}


@functools.cache
def robertson_gradient(name):
    def loss(rates, y0, tolerance):
        return jnp.sum(
            robertson_end(aj.Rodas4(), ADJOINTS[name], y0, rates, tolerance).ys[0] / SIZES * jnp.array([1, 2, 3])
        )

    return jit(jax.grad(loss, (0, 1)))


@functools.cache
def robertson_forward():
    def loss(rates, y0, tolerance):
        return jnp.dot(robertson_end(aj.Rodas4(), aj.ForwardMode(), y0, rates, tolerance).ys[0], WEIGHTS)

    return jit(jax.jacfwd(loss, (0, 1)))


@pytest.mark.parametrize("name", ADJOINTS)
def test_gradients_of_a_stiff_problem(name):
    """The exact adjoints equal forward mode; the continuous ones come near the limit as the tolerance falls."""
    exact = name == "discrete"
    tolerance = 1e-6
    expected = robertson_forward()(RATES, START, tolerance if exact else 1e-8)
    compare(robertson_gradient(name)(RATES, START, tolerance), expected, 1e-8 if exact else 1e-3)
