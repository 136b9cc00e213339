"""Solutions and gradients of the stiff problems of the literature, against references to many digits.

One program for each problem serves all tolerances: its loss weighs states at several times, and its derivatives are with
respect to all rate constants and the initial state.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import compare, flow, jit
from stiff_problems import PROBLEMS, brusselator, reference

import adjoint_jax as aj

TOLERANCES = (1e-4, 1e-6, 1e-8)
LARGEST = dict.fromkeys(("robertson_1e4", "robertson_1e8", "robertson_dae_1e4", "hires", "pollu", "e5_1e5"), 20) | {
    "orego": 200
}
"""Errors in tolerances."""
LONG = {"pollu", "hires", "orego"}
ILL_CONDITIONED = {"van_der_pol_1000": ((1e-6, 1e-7, 1e-9), 1e6), "van_der_pol_100000": ((1e-9, 1e-10, 1e-11), 1e10)}
"""Tolerances, and errors in tolerances. Where these oscillators jump, the state's errors are multiplied by mu in the slope,
and once more in its derivatives: CVODES's adjoint at its tightest tolerances is off by 2e-4 and by 0.65."""


@functools.cache
def program(name):
    problem, path = PROBLEMS[name](), reference(name).path

    def loss(logs, y0, rtol):
        """Rates come as logarithms of the factors by which they differ from the published ones."""
        solution = aj.solve(
            problem.field,
            problem.t0,
            problem.t1,
            y0,
            jnp.asarray(problem.args) * jnp.exp(logs),
            solver=aj.Rodas5P(),
            controller=aj.PIDController(rtol=rtol, atol=1e-2 * rtol * jnp.asarray(problem.scale)),
            saveat=aj.SaveAt(jnp.asarray(path.ts)),
            mass_matrix=problem.mass,
            max_steps=2**15,
        )
        return jnp.sum(path.weights * solution.ys), solution.stats

    return jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def errors(name, rtol):
    """Of the value, and of the derivatives with respect to logarithms of rates and to y0 in parts of the largest."""
    problem, path = PROBLEMS[name](), reference(name).path
    (value, _), (logs, y0) = program(name)(jnp.zeros(problem.args.shape), jnp.asarray(problem.y0), rtol)
    of_logs = path.args * problem.args
    size = max(1e-3 * abs(path.value), np.max(np.abs(of_logs)), np.max(np.abs(path.y0 * problem.y0)))
    off = [np.max(np.abs(logs - of_logs)), np.max(np.abs((y0 - path.y0) * problem.y0))]
    return abs(value - path.value) / abs(path.value), max(off) / size


def check(name, tolerances, largest):
    values, gradients = zip(*(errors(name, rtol) for rtol in tolerances), strict=True)
    for rtol, value, gradient in zip(tolerances, values, gradients, strict=True):
        assert value < min(largest, 200) * rtol
        assert gradient < largest * rtol
    assert gradients[2] < gradients[0] / 30


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in LARGEST])
def test_values_and_gradients(name):
    check(name, TOLERANCES, LARGEST[name])


@pytest.mark.parametrize("name", ILL_CONDITIONED)
def test_values_and_gradients_of_relaxation_oscillations(name):
    check(name, *ILL_CONDITIONED[name])


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "t1", "steps"), [(64, 10.0, 4096), (512, 0.5, 8192)])
def test_values_and_gradients_of_reaction_and_diffusion(nodes, t1, steps):
    """With a band for the Jacobian; against the classical Runge-Kutta method in steps so short that it is stable."""
    problem = brusselator(nodes, t1)
    weights = np.cos(np.arange(2 * nodes)) / nodes
    point = jnp.asarray(problem.args), jnp.asarray(problem.y0)

    def loss(args, y0, rtol):
        options = {"solver": aj.Rodas5P(aj.BandedJacobian(*problem.bandwidth)), "controller": aj.PIDController(rtol, rtol)}
        return weights @ aj.solve(problem.field, 0.0, t1, y0, args, **options).ys[0]

    def true_loss(args, y0):
        return weights @ flow(lambda t, y: problem.field(t, y, args), 0.0, y0, t1, steps)

    gradient = jit(jax.value_and_grad(loss, (0, 1)))
    expected = jit(jax.value_and_grad(true_loss, (0, 1)))(*point)
    for rtol in (1e-5, 1e-7):
        compare(gradient(*point, rtol), expected, 100 * rtol)
