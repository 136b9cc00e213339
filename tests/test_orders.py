"""Observed orders of convergence, of every method and of its dense output."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adjoint_jax as aj

METHODS = (aj.Euler, aj.Midpoint, aj.Heun, aj.Ralston, aj.Bosh3, aj.RK4, aj.Dopri5, aj.Tsit5, aj.Vern7, aj.Dopri8)
ORDERS = {
    "Euler": (1, 1),
    "Midpoint": (2, 2),
    "Heun": (2, 2),
    "Ralston": (2, 2),
    "Bosh3": (3, 3),
    "RK4": (4, 3),
    "Dopri5": (5, 4),
    "Tsit5": (5, 4),
    "Vern7": (7, 7),
    "Dopri8": (8, 7),
}
"""Of the step and of its dense output."""
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
T0, T1 = 0.3, 2.3


def slope(xp, t, u, v):
    """Nonlinear, coupled and explicit in time, with the solution u = sin 2t, v = cos t."""
    sin, cos = xp.sin, xp.cos
    du = 2 * cos(2 * t) + u * v - sin(2 * t) * cos(t) + 4 * (v - cos(t))
    dv = -sin(t) - v**3 + cos(t) ** 3 - 4 * (xp.exp(u) - xp.exp(sin(2 * t)))
    return xp.stack([du, dv])


def field(t, y, args):
    return slope(jnp, t, *y)


def exact(t):
    return np.stack([np.sin(2 * t), np.cos(t)], axis=-1)


def observed_order(errors, ratio):
    """Slope of log error over log step, between neighbours."""
    errors = np.asarray(errors)
    return np.log(errors[:-1] / errors[1:]) / np.log(ratio)


GRIDS = {1: (256, 512), 2: (64, 128), 3: (48, 96), 4: (48, 96), 5: (48, 96), 7: (20, 40), 8: (12, 24)}
"""Numbers of steps, so that errors are asymptotic and above rounding."""


@each_method
def test_global_order_of_steps_and_dense_output(method):
    solver, name = method(), method.__name__
    assert (solver.order, solver.tableau.dense_order) == ORDERS[name]
    y0 = exact(np.array(T0))
    at_steps, inside = [], []
    off_grid = np.linspace(T0, T1, 334)[1:-1]
    for steps in GRIDS[solver.order]:
        saveat = (aj.SaveAt(steps=True), aj.SaveAt(off_grid))
        solution = aj.solve(field, T0, T1, y0, solver=solver, controller=aj.FixedSteps(steps), saveat=saveat)
        grid = np.linspace(T0, T1, steps + 1)[1:]
        at_steps.append(np.abs(solution.ys[0] - exact(grid)).max())
        inside.append(np.abs(solution.ys[1] - exact(off_grid)).max())
    assert at_steps[-1] > 1e-13
    (order,), (dense_order,) = observed_order(at_steps, 2), observed_order(inside, 2)
    assert -0.4 < order - solver.order < 0.9
    # A dense output of order q has local errors of order q + 1, between steps whose errors have the method's order.
    assert -0.4 < dense_order - min(solver.order, solver.tableau.dense_order + 1) < 0.9


SIZES = {1: 0.05, 2: 0.05, 3: 0.05, 4: 0.05, 5: 0.05, 7: 0.05, 8: 0.1}


@each_method
def test_local_order_of_a_step_and_of_its_dense_output(method):
    solver = method()

    @jax.jit
    @jax.vmap
    def one_step(h):
        ts = T0 + h * jnp.array([0.13, 0.37, 0.61, 0.83])
        saveat = (aj.SaveAt(t1=True), aj.SaveAt(ts))
        y0 = jnp.asarray(exact(np.array(T0)))
        solution = aj.solve(field, T0, T0 + h, y0, solver=solver, controller=aj.FixedSteps(1), saveat=saveat)
        return ts, *solution.ys

    h = SIZES[solver.order] / 2.0 ** np.arange(2)
    ts, y1, rows = one_step(h)
    step_errors = np.abs(y1[:, 0] - exact(T0 + h)).max(axis=-1)
    dense_errors = np.abs(rows - exact(np.asarray(ts))).max(axis=(-1, -2))
    assert min(step_errors[-1], dense_errors[-1]) > 5e-15
    assert observed_order(step_errors, 2)[0] == pytest.approx(solver.order + 1, abs=0.5)
    assert observed_order(dense_errors, 2)[0] == pytest.approx(solver.tableau.dense_order + 1, abs=0.5)


KUTTA3 = aj.ButcherTableau(
    name="Kutta's third-order method",
    order=3,
    a=((), (0.5,), (-1.0, 2.0)),
    b=(1 / 6, 2 / 3, 1 / 6),
    c=(0.0, 0.5, 1.0),
    dense=((1.0, -3 / 2, 2 / 3), (0.0, 2.0, -4 / 3), (0.0, -1 / 2, 2 / 3)),
    dense_order=2,
    b_error=(1 / 6, -1 / 3, 1 / 6),
    error_order=2,
)


def kutta3_by_hand(steps):
    h, y = (T1 - T0) / steps, exact(np.array(T0))
    for t in T0 + h * np.arange(steps):
        k1 = slope(np, t, *y)
        k2 = slope(np, t + h / 2, *(y + h / 2 * k1))
        k3 = slope(np, t + h, *(y + h * (2 * k2 - k1)))
        y = y + h / 6 * (k1 + 4 * k2 + k3)
    return y


@functools.cache
def custom_tableau_end(steps):
    solver = aj.ExplicitRungeKutta(KUTTA3)
    return aj.solve(field, T0, T1, exact(np.array(T0)), solver=solver, controller=aj.FixedSteps(steps)).ys[0]


def test_a_custom_tableau_is_the_method_it_says():
    np.testing.assert_allclose(custom_tableau_end(20), kutta3_by_hand(20), rtol=1e-13)


def test_a_custom_tableau_has_its_order():
    errors = [np.abs(custom_tableau_end(steps) - exact(np.array(T1))).max() for steps in (80, 160)]
    assert observed_order(errors, 2)[0] == pytest.approx(3, abs=0.3)


def test_a_custom_tableau_adapts_and_interpolates():
    ts = np.linspace(T0, T1, 23)
    ys = aj.odeint(field, exact(np.array(T0)), ts, solver=aj.ExplicitRungeKutta(KUTTA3), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(ys, exact(ts), atol=3e-6)
    assert np.abs(ys - exact(ts)).max() > 1e-12
