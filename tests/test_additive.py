"""Fields in two parts: additive methods take one of them explicitly, all others their sum."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import compare, jit, measure, problem, rows_measure
from stiff_problems import PROBLEMS
from test_orders import T0, T1, exact, field, observed_order

import adjoint_jax as aj
from adjoint_jax.diagnostics.counting import CountingAdjoint, Tally


def split(field, part=0.3):
    """The same field in two parts, neither of which is a multiple of it."""

    def explicit(t, y, args):
        return jax.tree.map(lambda f, y: part * f + jnp.sin(3 * y), field(t, y, args), y)

    def implicit(t, y, args):
        return jax.tree.map(lambda f, y: (1 - part) * f - jnp.sin(3 * y), field(t, y, args), y)

    return aj.Split(explicit, implicit)


# The method


def matrices():
    solver = aj.KenCarp4()
    explicit, implicit = (
        np.array([row + (0.0,) * (6 - len(row)) for row in rows]) for rows in (solver.explicit, solver.tableau.rows)
    )
    return np.array(solver.tableau.c), implicit[-1], (explicit, implicit)


def assert_coupled_order(weights, order, s=1.0):
    """Sums over all trees up to the order, every inner vertex of either part: weights of shape (stages,), at s."""
    c, _, parts = matrices()
    trees = [(np.ones(6), 1, 1.0), (c, 2, 1 / 2), (c**2, 3, 1 / 3), (c**3, 4, 1 / 4)]
    trees += [(a @ c, 3, 1 / 6) for a in parts]
    trees += [(c * (a @ c), 4, 1 / 8) for a in parts] + [(a @ c**2, 4, 1 / 12) for a in parts]
    trees += [(a @ b @ c, 4, 1 / 24) for a, b in itertools.product(parts, parts)]
    for vector, size, expected in trees:
        if size <= order:
            np.testing.assert_allclose(weights @ vector, expected * s**size, atol=1e-13)


def test_coupled_order_conditions():
    c, b, (explicit, _) = matrices()
    tableau = aj.KenCarp4().tableau
    np.testing.assert_allclose(explicit.sum(1), c, atol=1e-14)
    assert_coupled_order(b, 4)
    assert_coupled_order(b - np.array(tableau.error), 3)
    for s in (0.3, 0.8):
        assert_coupled_order(np.array(tableau.dense) @ s ** np.arange(1, 4), 3, s)


def test_global_order_of_steps_and_dense_output():
    off_grid = np.linspace(T0, T1, 60)[1:-1]

    @jit
    def run(dt):
        options = {"solver": aj.KenCarp4(), "controller": aj.ConstantStepSize(dt), "max_steps": 128}
        saveat = (aj.SaveAt(t1=True), aj.SaveAt(off_grid))
        return aj.solve(split(field), T0, T1, exact(np.array(T0)), saveat=saveat, **options).ys

    results = [run((T1 - T0) / steps) for steps in (36, 72)]
    at_end = [np.abs(ys[0][0] - exact(np.array(T1))).max() for ys in results]
    inside = [np.abs(ys[1] - exact(off_grid)).max() for ys in results]
    assert observed_order(at_end, 2)[0] == pytest.approx(4, abs=0.4)
    assert 3.6 < observed_order(inside, 2)[0] < 4.9


@pytest.mark.slow
def test_stiffness_of_the_implicit_part_does_not_limit_steps():
    """Diffusion by a banded Jacobian, reaction explicitly: as few steps and the same solution as with all of it implicit,
    where an explicit method needs many."""
    case = PROBLEMS["brusselator_64"]()
    args = jnp.array([3.0, 0.2])

    def diffusion(t, y, args):
        still = jnp.array([0.0, 1.0]) * args
        return case.field(t, y, still) - reaction(t, y, still)

    def reaction(t, y, args):
        u, v = y[0::2], y[1::2]
        du = 1.0 + u * u * v - (args[0] + 1.0) * u
        return jnp.stack([du, args[0] * u - u * u * v], axis=1).reshape(-1)

    def solved(vector_field, solver, rtol=1e-5):
        options = {"controller": aj.PIDController(rtol, rtol), "solver": solver}
        return jit(lambda args: aj.solve(vector_field, 0.0, 2.0, jnp.asarray(case.y0), args, **options))(args)

    banded = aj.BandedJacobian(2, 2)
    both = solved(aj.Split(reaction, diffusion), aj.KenCarp4(banded))
    whole, explicit = solved(case.field, aj.KenCarp4(banded)), solved(case.field, aj.Tsit5())
    precise = solved(case.field, aj.Rodas5P(banded), 1e-9)
    assert np.abs(both.ys - precise.ys).max() < 1e-3
    assert both.stats.accepted < 2 * whole.stats.accepted
    assert both.stats.accepted < explicit.stats.accepted / 5


def test_evaluations_of_both_parts_are_counted():
    case = problem("forced")
    vector_field, args = case.make(case.inputs["theta"])
    tally = Tally()
    options = {"solver": aj.KenCarp4(), "controller": aj.PIDController(1e-5, 1e-5)}
    adjoint = CountingAdjoint(aj.ForwardMode(), tally)
    solution = jit(lambda y0: aj.solve(split(vector_field), 0.2, 2.2, y0, args, adjoint=adjoint, **options))(
        case.inputs["y0"]
    )
    jax.block_until_ready(solution.ys)
    jacobians_and_starts = tally.counts.evaluations - solution.stats.evaluations
    assert abs(jacobians_and_starts) <= 4


# What is not additive


def test_to_all_other_methods_it_is_the_sum():
    case = problem("mixed")
    vector_field, args = case.make(case.inputs["theta"])

    def run(vector_field, solver):
        options = {"solver": solver, "controller": aj.PIDController(1e-6, 1e-6)}
        return jit(lambda y0: aj.solve(vector_field, 0.1, 1.4, y0, args, **options).ys)(case.inputs["y0"])

    for solver in (aj.Tsit5(), aj.Kvaerno3()):
        compare(run(split(vector_field), solver), run(vector_field, solver), 1e-12)


def test_bad_parts_are_refused():
    with pytest.raises(TypeError, match=r"Split\(explicit=...\) must be callable"):
        aj.Split.__check_init__(type("Parts", (), {"explicit": 3, "implicit": field})())
    with pytest.raises(ValueError, match="row i must have i entries"):
        aj.KenCarp4(explicit=((), (0.5,)))
    with pytest.raises(ValueError, match="must return the shapes of y0"):
        aj.solve(aj.Split(lambda t, y, args: y[:1], field), 0.0, 1.0, jnp.ones(2), solver=aj.KenCarp4())


# Gradients


@pytest.mark.parametrize(
    "name", ["forced", *(pytest.param(name, marks=[pytest.mark.slow]) for name in ("mixed", "complex"))]
)
def test_gradients(name):
    """With respect to what both parts use and close over, of states and of a cost: to rounding those of forward mode, and
    close to those of the true solution."""
    case = problem(name)

    def loss(inputs, adjoint):
        vector_field, args = case.make(inputs["theta"])
        solution = aj.solve(
            split(vector_field),
            inputs["t0"],
            inputs["t1"],
            inputs["y0"],
            args,
            solver=aj.KenCarp4(),
            controller=aj.PIDController(1e-8, 1e-8),
            saveat=aj.SaveAt(inputs["ts"]),
            adjoint=adjoint,
            running_cost=lambda t, y, args: measure(y),
        )
        return rows_measure(solution.ys) + solution.cost

    def true_loss(inputs):
        ys = jax.vmap(lambda t: case.flow(inputs, t))(inputs["ts"])
        points, weights = np.polynomial.legendre.leggauss(30)
        nodes = inputs["t0"] + (inputs["t1"] - inputs["t0"]) * (1 + points) / 2
        along = jax.vmap(lambda t: measure(case.flow(inputs, t)))(nodes)
        return rows_measure(ys) + (inputs["t1"] - inputs["t0"]) / 2 * jnp.dot(weights, along)

    direction = jax.tree.map(
        lambda leaf: jnp.cos(1.0 + jnp.arange(leaf.size).reshape(leaf.shape)).astype(leaf.dtype), case.inputs
    )
    got = jit(jax.grad(lambda i: loss(i, aj.DiscreteAdjoint())))(case.inputs)
    forward = jit(lambda i: jax.jvp(lambda i: loss(i, aj.ForwardMode()), (i,), (direction,))[1])(case.inputs)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(direction), strict=True)
    assert float(sum(jnp.sum(a * b).real for a, b in pairs)) == pytest.approx(float(forward), rel=1e-9)
    compare(got, jit(jax.grad(true_loss))(case.inputs), 3e-5)
