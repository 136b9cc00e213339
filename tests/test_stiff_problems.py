"""The stiff problems are those that were published, and the stored references belong to them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from stiff_problems import PROBLEMS, REFERENCES, StiffProblem, reference, robertson

REFERENCED = sorted(json.loads(REFERENCES.read_text()))


def lsoda(problem: StiffProblem, args: np.ndarray, rtol: float) -> np.ndarray:
    """y(t1) by SciPy's LSODA on the problem's JAX field."""
    field, jacobian = jax.jit(problem.field), jax.jit(jax.jacfwd(problem.field, 1))
    solution = scipy.integrate.solve_ivp(
        lambda t, y: np.asarray(field(t, y, args)),
        (problem.t0, problem.t1),
        problem.y0,
        method="LSODA",
        rtol=rtol,
        atol=1e-2 * rtol * problem.scale,
        jac=lambda t, y: np.asarray(jacobian(t, y, args)),
    )
    assert solution.success, solution.message
    return solution.y[:, -1]


@pytest.mark.parametrize(
    "name", ["van_der_pol_scaled", "robertson_40", "robertson_1e11", "hires", "orego", "pollu", "e5_1e5"]
)
def test_published_end_values(name):
    """Another solver reaches them on the field."""
    problem = PROBLEMS[name]()
    np.testing.assert_allclose(lsoda(problem, problem.args, 1e-7), problem.end, rtol=2e-5, atol=1e-3 * problem.scale)


def test_stored_solutions_are_the_published_ones():
    """The references, which were computed from the same fields, agree to nearly all digits."""
    for name in REFERENCED:
        problem, stored = PROBLEMS[name](), reference(name)
        assert stored.ts[-1] == problem.t1
        if problem.end is not None:
            np.testing.assert_allclose(stored.ys[-1], problem.end, rtol=10.0 ** (1 - problem.digits))


@pytest.mark.parametrize("name", PROBLEMS)
def test_field_is_its_rows(name):
    """One text for all libraries, and its fast form, at a state that is not special; shapes of all parts fit."""
    problem = PROBLEMS[name]()
    n = problem.y0.size
    y = problem.y0 + problem.scale * np.random.default_rng(0).uniform(0.1, 1.0, size=n)
    rows, field = problem.rows(0.3, y, problem.args), jax.jit(problem.field)(0.3, jnp.asarray(y), jnp.asarray(problem.args))
    assert field.shape == (n,)
    np.testing.assert_allclose(field, np.asarray(rows), rtol=1e-12, atol=1e-12 * np.abs(field).max())
    if problem.bandwidth is not None and n <= 128:
        below, above = problem.bandwidth
        jacobian = np.asarray(jax.jit(jax.jacfwd(problem.field, 1))(0.3, jnp.asarray(y), jnp.asarray(problem.args)))
        np.testing.assert_array_equal(jacobian, np.triu(np.tril(jacobian, above), -below))


@pytest.mark.parametrize("name", REFERENCED)
def test_losses_are_consistent(name):
    """The value of each stored loss is that of the stored solution; derivatives have the shapes of their inputs."""
    problem, stored = PROBLEMS[name](), reference(name)
    for loss in (stored.end, stored.path):
        rows = stored.ys[-len(loss.ts) :]
        assert loss.value == pytest.approx(np.sum(loss.weights * rows), rel=1e-14)
        assert loss.args.shape == problem.args.shape
        assert loss.y0.shape == problem.y0.shape
        assert loss.digits >= (7 if name == "van_der_pol_100000" else 10)


@pytest.mark.parametrize("name", ["robertson_40", "hires"])
def test_reference_gradients_by_differences(name):
    """A central difference of another solver's values, in a random direction of all parameters."""
    problem, stored, step = PROBLEMS[name](), reference(name).end, 1e-3
    direction = problem.args * np.random.default_rng(1).normal(size=problem.args.size)
    ahead, behind = (lsoda(problem, problem.args + sign * step * direction, 1e-9) for sign in (1, -1))
    difference = np.sum(stored.weights * (ahead - behind)) / (2 * step)
    assert difference == pytest.approx(stored.args @ direction, abs=1e-4 * np.max(np.abs(stored.args * direction)))


def test_dae_is_the_ode():
    """The conserved sum makes the two forms of Robertson's reactions one, derivatives along it included."""
    ode, dae = reference("robertson_1e4"), reference("robertson_dae_1e4")
    np.testing.assert_allclose(dae.ys, ode.ys, rtol=1e-9)
    np.testing.assert_allclose(dae.end.args, ode.end.args, rtol=1e-8)
    np.testing.assert_allclose(dae.end.y0, [ode.end.y0[0] - ode.end.y0[2], ode.end.y0[1] - ode.end.y0[2], 0.0], rtol=1e-8)


def test_prothero_robinson_has_its_closed_form():
    """It satisfies the equation, with and without a transient."""
    problem = PROBLEMS["prothero_robinson"]()
    for offset, t in ((0.0, 0.7), (0.5, 1e-4)):
        y0, args = jnp.asarray(problem.y0 + offset), jnp.asarray(problem.args)
        y, dy = jax.jvp(lambda t: problem.exact(t, y0, args), (t,), (1.0,))  # noqa: B023
        np.testing.assert_allclose(dy, problem.field(t, y, args), rtol=1e-9)
    assert robertson(1e8).scale < robertson(1e4).scale
