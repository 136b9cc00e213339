"""Backward differentiation formulas of variable order: formulas, dense output, stiff problems, gradients and lanes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import compare, jit, problem
from test_implicit_runge_kutta import RATES, ROBERTSON, START, loss_of, robertson

import adjoint_jax as aj
from adjoint_jax.interpolation import Interpolant
from adjoint_jax.problem import Interval, Problem
from adjoint_jax.solvers import bdf


@pytest.mark.parametrize("order", range(1, bdf.MAX_ORDER + 1))
def test_a_step_and_its_interpolant_are_exact_for_polynomials(order):
    """From differences of t^order, with the size changed on the way: a formula of order k is exact for degree k."""

    def polynomial(t):
        return 1 + (t - 0.3) ** order

    def slope(t, y, args):
        return jnp.full_like(y, order) * (t - 0.3) ** (order - 1) - 3.0 * (y - polynomial(t))

    h, size = 0.2, 0.13
    states = polynomial(1.0 - h * np.arange(bdf.MAX_ORDER + 3))
    table = [np.diff(states[::-1], j)[-1] for j in range(bdf.MAX_ORDER + 3)]
    number = functools.partial(jnp.asarray, dtype=float)
    first, *higher = jnp.array(table)[:, None]
    before = bdf.Differences(first, jnp.stack(higher), number(h), number(order), number(0))
    times = number(1.0), number(1.0 + size)
    step = aj.BDF().step(Problem(slope, None, None, jnp.ones(1), *times), Interval(*times, *times), before, None)
    np.testing.assert_allclose(step.after.y, polynomial(1.0 + size), rtol=1e-12)
    np.testing.assert_allclose(step.error, 0.0, atol=1e-12)
    interpolant = aj.BDF().interpolant(step)
    assert isinstance(interpolant, Interpolant)
    for t in (1.0, 1.04, 1.1, 1.0 + size):
        np.testing.assert_allclose(interpolant.evaluate(number(t)), polynomial(t), rtol=1e-12)


def test_robertson():
    @jit
    def run(t1, rtol):
        options = {"solver": aj.BDF(), "controller": aj.PIDController(rtol, 1e-4 * rtol)}
        saveat = (aj.SaveAt(t1=True), aj.SaveAt(jnp.array([40.0])))
        solution = aj.solve(robertson, 0.0, t1, START, RATES, throw=False, saveat=saveat, **options)
        return solution.ys, solution.stats

    for rtol, error in ((1e-4, 1e-3), (1e-7, 2e-5)):
        for t1 in (40.0, 1e4):
            (y1, inside), stats = run(t1, rtol)
            np.testing.assert_allclose(y1[0], ROBERTSON[t1], rtol=error)
            np.testing.assert_allclose(inside[0], ROBERTSON[40.0], rtol=error)
            assert stats.evaluations < 3 * stats.steps


def test_the_order_rises():
    """A smooth problem at a tight tolerance takes far fewer steps than with order two."""

    def rotation(t, y, args):
        return jnp.stack([y[1], -y[0]])

    options = {"solver": aj.BDF(), "controller": aj.PIDController(1e-8, 1e-10)}
    solution = aj.solve(rotation, 0.0, 6.0, jnp.array([0.0, 1.0]), **options)
    np.testing.assert_allclose(solution.ys[0], [np.sin(6.0), np.cos(6.0)], atol=2e-6)
    assert 100 < solution.stats.accepted < 500


@pytest.mark.slow
@pytest.mark.parametrize(("case", "controller"), [("backward", aj.PIDController(1e-4, 1e-6))])
def test_gradients_are_exact_for_the_computed_solution(case, controller):
    """`DiscreteAdjoint` against forward sensitivities in a random direction of all inputs."""
    case, options = problem(case), {"solver": aj.BDF(), "controller": controller, "max_steps": 128}
    reverse = jit(jax.grad(loss_of(case, **options), allow_int=True))(case.inputs)
    loss = loss_of(case, adjoint=aj.ForwardMode(), **options)
    keys = iter(jax.random.split(jax.random.key(0), 32))
    direction = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape, x.dtype), case.inputs)
    forward = jit(lambda d: jax.jvp(loss, (case.inputs,), (d,))[1])(direction)
    pairs = zip(jax.tree.leaves(reverse), jax.tree.leaves(direction), strict=True)
    assert float(sum(jnp.sum(g * d).real for g, d in pairs)) == pytest.approx(float(forward), rel=1e-10)


@pytest.mark.slow
def test_gradients_of_a_stiff_problem_agree():
    def loss(rates, adjoint):
        options = {"solver": aj.BDF(), "controller": aj.PIDController(1e-7, 1e-11), "adjoint": adjoint}
        ys = aj.odeint(robertson, START, jnp.array([0.0, 0.3, 40.0]), rates, max_steps=512, **options)
        return jnp.sum(jnp.array([1.0, 1e4, 1.0]) * ys**2)

    discrete = jit(jax.grad(functools.partial(loss, adjoint=aj.DiscreteAdjoint())))(RATES)
    interpolating = jit(jax.grad(functools.partial(loss, adjoint=aj.InterpolatingAdjoint(aj.Rodas5P()))))(RATES)
    compare(RATES * interpolating, RATES * discrete, 2e-4)


@pytest.mark.slow
def test_lanes():
    """Lanes of different stiffness, one of which blows up: the others have the values and gradients of single solves."""

    def loss(rate):
        options = {"solver": aj.BDF(), "controller": aj.PIDController(1e-4, 1e-6), "max_steps": 128, "throw": False}
        y0 = {"a": jnp.ones(2), "b": (jnp.array(0.5),)}

        def field(t, y, rate):
            return {"a": rate * y["a"] ** 2 + jnp.cos(t), "b": (-y["b"][0] * y["a"][0],)}

        solution = aj.solve(field, 0.0, 2.0, y0, rate, **options)
        return jnp.where(solution.status == 0, jnp.sum(solution.ys["a"]) + solution.ys["b"][0][0], 0.0), solution.stats

    one = jit(jax.value_and_grad(loss, has_aux=True))
    rates = jnp.array([-0.5, 3.0, -2000.0])
    (values, stats), gradients = jit(jax.vmap(jax.value_and_grad(loss, has_aux=True)))(rates)
    for lane in (0, 2):
        (value, counts), gradient = one(rates[lane])
        np.testing.assert_allclose((values[lane], gradients[lane]), (value, gradient), rtol=1e-10)
        assert jax.tree.map(lambda leaf, lane=lane: int(leaf[lane]), stats) == jax.tree.map(int, counts)
    assert (values[1], gradients[1]) == (0.0, 0.0)
