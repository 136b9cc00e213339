"""The method that finds out whether the problem is stiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import compare, jit

import adjoint_jax as aj

START = jnp.array([2.0, 0.0])


def van_der_pol(t, y, mu):
    return jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


def end(solver, adjoint, mu, t1, tolerance=1e-5):
    controller = aj.PIDController(rtol=tolerance, atol=1e-2 * tolerance)
    options = {"controller": controller, "adjoint": adjoint, "max_steps": 2**15, "throw": False}
    return aj.solve(van_der_pol, 0.0, t1, START, mu, solver=solver, **options)


@functools.cache
def solved(method, in_lanes):
    program = functools.partial(end, method(), aj.DiscreteAdjoint())
    return jit(jax.vmap(program, (0, 0)) if in_lanes else program)


def test_where_nothing_is_stiff_it_is_the_explicit_method():
    got, explicit = (solved(method, False)(1.0, 15.0) for method in (aj.AutoSolver, aj.Tsit5))
    np.testing.assert_allclose(got.ys, explicit.ys, rtol=1e-12)
    assert (got.stats.accepted, got.stats.rejected) == (explicit.stats.accepted, explicit.stats.rejected)


def test_where_the_problem_is_stiff_it_takes_the_steps_of_the_implicit_method():
    """Relaxation oscillations: slow stretches, which an explicit method could not pass, between jumps."""
    got, implicit = (solved(method, False)(1000.0, 2000.0) for method in (aj.AutoSolver, aj.Rodas5P))
    assert got.stats.steps < 1.3 * implicit.stats.steps
    np.testing.assert_allclose(got.ys[0], implicit.ys[0], rtol=1e-4)
    fewer, many = (solved(method, False)(50.0, 100.0).stats.steps for method in (aj.AutoSolver, aj.Tsit5))
    assert fewer < many / 3


def test_lanes_have_their_own_method():
    mus, ends = jnp.array([1.0, 1000.0, 50.0]), jnp.array([15.0, 900.0, 100.0])
    got = solved(aj.AutoSolver, True)(mus, ends)
    for lane, alone in enumerate(map(solved(aj.AutoSolver, False), mus, ends)):
        np.testing.assert_allclose(got.ys[lane], alone.ys, rtol=1e-8)
        assert got.stats.accepted[lane] == alone.stats.accepted


def loss(adjoint, mu, t1):
    solution = aj.solve(
        van_der_pol,
        0.0,
        t1,
        START,
        mu,
        solver=aj.AutoSolver(),
        controller=aj.PIDController(rtol=1e-6, atol=1e-8),
        saveat=aj.SaveAt(jnp.array([0.5, 0.8, 0.9]) * t1),
        adjoint=adjoint,
        running_cost=lambda t, y, mu: y[0] ** 2 / mu,
    )
    return jnp.dot(solution.ys[:, 0], jnp.array([1.0, -2.0, 0.5])) + solution.cost


@functools.cache
def gradient(kind):
    if kind is aj.ForwardMode:
        return jit(jax.jacfwd(functools.partial(loss, kind())))
    return jit(jax.grad(functools.partial(loss, kind())))


@pytest.mark.parametrize("mu", [pytest.param(1.0, marks=[pytest.mark.slow]), 200.0])
def test_gradients(mu):
    """Each step is transposed by the method that took it."""
    t1 = 0.8 * mu if mu > 1 else 5.0
    expected = gradient(aj.ForwardMode)(mu, t1)
    compare(gradient(aj.DiscreteAdjoint)(mu, t1), expected, 1e-8)
