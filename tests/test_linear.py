"""Jacobians and the systems with them, against dense matrices; reaction and diffusion with each of them."""

import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import Program
from problems import compare, jit

import adjoint_jax as aj
from adjoint_jax.linear import banded as of_bands
from adjoint_jax.linear.band import FEW_LANES, VECTORISED_WIDTH, Band, BandFactors
from adjoint_jax.linear.block_tridiagonal import BlockTridiagonal
from adjoint_jax.linear.dense import INVERTED, NARROW, VECTORISED, Inverted, _inverse, inverted
from adjoint_jax.linear.jacobian import ravel
from adjoint_jax.linear.sparse import coloured
from adjoint_jax.problem import Problem

RANDOM = np.random.default_rng(5)


def linear_field(t, y, matrix):
    """Linear in the real numbers of the state; complex leaves are mixed with their conjugates."""
    flat, unravel = ravel(y)
    return unravel((1 + t) * matrix @ flat)


def banded(n, lower, upper):
    rows, columns = np.indices((n, n))
    inside = (rows - columns <= lower) & (columns - rows <= upper)
    return np.where(inside, RANDOM.normal(size=(n, n)), 0.0)


def problem(matrix, y, mass=None):
    t = jnp.array(0.5)
    return Problem(linear_field, None, jnp.asarray(matrix), y, t, t, None if mass is None else jnp.asarray(mass))


DENSE = {n: RANDOM.normal(size=(n, n)) for n in (1, 2, 3, 4, 7, 16, INVERTED, 30)}
BANDS = [(1, 0, 0), (5, 1, 1), (33, 1, 1), (40, 3, 1), (48, 0, 2), (50, 20, 17), (64, 2, 2)]
JACOBIANS = [(aj.DenseJacobian(), matrix) for matrix in DENSE.values()]
JACOBIANS += [(aj.DenseJacobian(lambda t, y, matrix: (1 + t) * matrix), DENSE[7])]
JACOBIANS += [(aj.BandedJacobian(lower, upper), banded(n, lower, upper)) for n, lower, upper in BANDS]
JACOBIANS += [(aj.SparseJacobian(sparse != 0), sparse) for sparse in (banded(30, 2, 1)[:, ::-1], DENSE[3])]
JACOBIANS += [(aj.KrylovJacobian(rtol=1e-12, restart=30), DENSE[30])]


@pytest.mark.parametrize("massive", [False, True])
@pytest.mark.parametrize(
    ("jacobian", "matrix"), JACOBIANS, ids=[f"{type(j).__name__} {len(m)} {i}" for i, (j, m) in enumerate(JACOBIANS)]
)
def test_systems_and_their_transposes(jacobian, matrix, massive):
    n, g = len(matrix), jnp.array(0.13)
    mass = np.where(matrix != 0, 2.0 + RANDOM.normal(size=(n, n)) / n, 0.0) if massive else None
    y, right = jnp.asarray(RANDOM.normal(size=(2, n)))

    @jit
    def both(right):
        inverse = jacobian.inverse(problem(matrix, y, mass), jnp.array(0.5), y, g)
        return inverse.solve(right), inverse.solve_transposed(right)

    solved, solved_transposed = both(right)
    whole = (np.eye(n) if mass is None else mass) - 0.13 * 1.5 * matrix
    np.testing.assert_allclose(solved, np.linalg.solve(whole, right), rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(solved_transposed, np.linalg.solve(whole.T, right), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 5, 13, INVERTED])
def test_inverses_by_elimination(n):
    """Of matrices that need pivots, in two precisions, in lanes that need different ones; derivatives are -X dM X."""
    matrix = RANDOM.normal(size=(n, n)) * 10.0 ** RANDOM.uniform(-3, 3, size=(n, 1))
    hollow = np.roll(np.diag(np.arange(1.0, n + 1)), 1, axis=0) + np.triu(RANDOM.normal(size=(n, n)), 2)
    lanes, single = np.stack([matrix, hollow, matrix[::-1], np.eye(n)]), np.float32(hollow)
    found = jit(jax.vmap(inverted))(lanes)
    for one, inverse in zip(lanes, found, strict=True):
        bound = 20 * n * np.finfo(float).eps * np.linalg.cond(one)
        expected = np.linalg.inv(one)
        np.testing.assert_allclose(inverse, expected, rtol=0, atol=bound * np.abs(expected).max())
        np.testing.assert_array_equal(inverse, jit(inverted)(one))
        np.testing.assert_array_equal(inverse, jit(functools.partial(inverted, columns=n + 3))(one))
    assert jit(inverted)(single).dtype == np.float32
    np.testing.assert_allclose(jit(inverted)(single) @ single, np.eye(n), atol=1e-4)
    inverse, along = jit(lambda: jax.jvp(inverted, (jnp.asarray(hollow),), (jnp.asarray(matrix),)))()
    expected = -inverse @ matrix @ inverse
    np.testing.assert_allclose(along, expected, rtol=1e-8, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("n", [NARROW, INVERTED])
def test_dense_systems_in_lanes_and_their_derivatives(n):
    """Rows are filled up alone, above a size, and not in lanes: the solutions are the same, and their derivatives."""
    matrix, right, direction = RANDOM.normal(size=(n, n)), jnp.asarray(RANDOM.normal(size=n)), RANDOM.normal(size=(n, n))

    def solved(g, matrix):
        y = jnp.ones(n)
        return aj.DenseJacobian().inverse(problem(matrix, y), jnp.array(0.5), y, g).solve(right)

    def both(g):
        return jax.jvp(functools.partial(solved, g), (jnp.asarray(matrix),), (jnp.asarray(direction),))

    gs = jnp.array([0.02, -0.13])
    together = jit(jax.vmap(both))(gs)
    for i, g in enumerate(gs):
        whole = np.eye(n) - float(g) * 1.5 * matrix
        x = np.linalg.solve(whole, right)
        expected = x, np.linalg.solve(whole, float(g) * 1.5 * direction @ x)
        for found in (jit(both)(g), tuple(leaf[i] for leaf in together)):
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.abs(b).max())


@pytest.mark.parametrize("matrix", [np.zeros((3, 3)), np.ones((2, 2)), np.diag([1.0, np.nan])])
def test_there_is_no_inverse_of_a_singular_matrix(matrix):
    assert not np.isfinite(inverted(jnp.asarray(matrix))).all()


def band_of(matrix, lower, upper):
    rows = np.arange(len(matrix))[:, None]
    columns = rows + np.arange(-lower, upper + 1)
    inside = (columns >= 0) & (columns < len(rows))
    return Band(jnp.where(inside, matrix[rows, np.clip(columns, 0, len(rows) - 1)], 0), lower, upper)


@pytest.mark.parametrize(("n", "lower", "upper"), [(1, 1, 1), (2, 1, 1), (33, 1, 1), (40, 3, 1), (48, 1, 2), (50, 20, 17)])
@pytest.mark.parametrize("method", [BandFactors, BlockTridiagonal])
def test_bands(method, n, lower, upper):
    """In lanes and one by one, in two precisions."""
    lanes = jnp.stack([banded(n, lower, upper) + 4 * jnp.eye(n) for _ in range(2)])
    rights = RANDOM.normal(size=(2, n))

    def both(matrix, right):
        inverse = method.of(band_of(matrix, lower, upper))
        return inverse.times(right), inverse.transposed_times(right)

    one, found = jit(both), jit(jax.vmap(both))(lanes, rights)
    for matrix, right, solved, transposed in zip(lanes, rights, *found, strict=True):
        for a, b in ((solved, np.linalg.solve(matrix, right)), (transposed, np.linalg.solve(matrix.T, right))):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)
        alone = one(matrix, right)
        np.testing.assert_allclose(alone, (solved, transposed), rtol=1e-11, atol=1e-12)
        single = one(*map(jnp.float32, (matrix, right)))
        assert {leaf.dtype for leaf in single} == {np.dtype(np.float32)}
        np.testing.assert_allclose(single, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("lower", [1, 2, 5])
def test_rows_of_a_band_are_exchanged(lower):
    """Nothing stands on the diagonal, and rows differ in size: as accurate as with the whole matrix."""
    n = 61
    matrix = banded(n, lower, 1)
    matrix[np.arange(1, n), np.arange(n - 1)] = 3.0
    np.fill_diagonal(matrix, 1e-12)
    matrix *= 10.0 ** RANDOM.uniform(-3, 3, size=(n, 1))
    x, inverse = RANDOM.normal(size=n), BandFactors.of(band_of(matrix, lower, 1))
    assert np.any(inverse.factors.exchanged > 0)
    for solved, whole in ((inverse.times, matrix), (inverse.transposed_times, matrix.T)):
        right = whole @ x
        error = np.abs(np.asarray(solved(jnp.asarray(right))) - x).max()
        assert error <= 100 * np.abs(np.linalg.solve(whole, right) - x).max() + 1e-13


@pytest.mark.parametrize(("number", "lower"), [(3, 1), (FEW_LANES + 1, 1), (FEW_LANES + 1, VECTORISED_WIDTH)])
def test_bands_in_lanes(number, lower):
    """Few or wide ones are factorised one after the other, others in vectors. Lanes need different pivots; one has no
    inverse, which no other lane notices."""
    n = 24
    matrices = np.stack([banded(n, lower, 1) + np.diag(np.linspace(0.0, 3.0, n)) for _ in range(number)])
    matrices[1] = 0.0
    right = jnp.asarray(RANDOM.normal(size=n))

    def solved(matrix):
        inverse = BandFactors.of(band_of(matrix, lower, 1))
        return inverse.times(right), inverse.transposed_times(right)

    found = zip(*jit(jax.vmap(solved))(jnp.asarray(matrices)), strict=True)
    for i, (matrix, (x, transposed)) in enumerate(zip(matrices, found, strict=True)):
        if i == 1:
            assert not np.isfinite(x).any()
            assert not np.isfinite(transposed).any()
        else:
            bound = 1e-10 * np.linalg.cond(matrix)
            for a, b in ((x, np.linalg.solve(matrix, right)), (transposed, np.linalg.solve(matrix.T, right))):
                np.testing.assert_allclose(a, b, rtol=0, atol=bound * np.abs(b).max())


def test_the_matrix_is_not_copied_in_steps_of_the_elimination():
    """Nor is the factor of a product computed anew for every row."""
    n = 20

    def product(matrix, x):
        return Inverted(_inverse(matrix)).times(jnp.sin(x))

    computations = Program(jax.jit(product).lower(jnp.eye(n), jnp.ones(n)).compile()).computations.values()
    of_matrix = [i.operation for c in computations for i in c if i.shape.startswith(f"f64[{n},{VECTORISED}]")]
    assert "fusion" in of_matrix
    assert "copy" not in of_matrix
    operations = [{i.operation for i in computation} for computation in computations]
    assert any("sine" in of_one for of_one in operations)
    assert not any({"reduce", "sine"} <= of_one for of_one in operations)


@pytest.mark.parametrize("transform", [lambda f: f, jit])
def test_derivatives_of_solutions_with_bands(transform):
    """dx = A^-1 (dr - dA x), forward and in reverse."""
    n, lower, upper = 9, 2, 1
    matrix, dots = banded(n, lower, upper) + 3 * np.eye(n), banded(n, lower, upper)
    right, right_dot, weights = RANDOM.normal(size=(3, n))
    band, band_dot = band_of(matrix, lower, upper), band_of(dots, lower, upper)
    for transposed in (False, True):

        def solved(rows, right, transposed=transposed):
            inverse = BandFactors.of(Band(rows, lower, upper))
            return inverse.transposed_times(right) if transposed else inverse.times(right)

        a, a_dot = (matrix.T, dots.T) if transposed else (matrix, dots)
        x = np.linalg.solve(a, right)
        expected = np.linalg.solve(a, right_dot - a_dot @ x)
        moved = transform(lambda *dots, solved=solved: jax.jvp(solved, (band.rows, right), dots))
        compare(moved(band_dot.rows, right_dot), (x, expected), 1e-10)
        pulled = transform(lambda weights, solved=solved: jax.vjp(solved, band.rows, right)[1](weights))
        rows_bar, right_bar = pulled(weights)
        np.testing.assert_allclose(jnp.vdot(rows_bar, band_dot.rows) + right_bar @ right_dot, weights @ expected, rtol=1e-9)


def test_how_bands_are_solved_depends_on_width_and_device(monkeypatch):
    def inverse(width):
        jacobian = aj.BandedJacobian(width // 2, width // 2)
        return type(jacobian.inverse(problem(np.eye(80), jnp.ones(80)), jnp.array(0.5), jnp.ones(80), jnp.array(0.1)))

    assert [inverse(width) for width in (3, of_bands.WIDEST, of_bands.WIDEST + 2)] == [BandFactors] * 2 + [BlockTridiagonal]
    monkeypatch.setattr(of_bands, "on_one_cpu", lambda: False)
    assert inverse(3) is BlockTridiagonal


def test_bands_take_memory_for_the_band_alone():
    n = 20_000

    def solved(y):
        return aj.BandedJacobian(1, 1).inverse(diffusion, jnp.array(0.5), y, jnp.array(0.1)).times(y)

    t, y = jnp.array(0.5), jnp.ones(n)
    diffusion = Problem(lambda t, y, args: jnp.pad(y, 1)[2:] - 2 * y + jnp.pad(y, 1)[:-2], None, None, y, t, t)
    tracemalloc.start()
    compiled = jax.jit(solved).lower(y).compile()
    traced, analysis = tracemalloc.get_traced_memory()[1], compiled.memory_analysis()
    tracemalloc.stop()
    assert traced + analysis.temp_size_in_bytes < n**2 / 20
    x = np.asarray(compiled(y))
    residual = 1.2 * x - 0.1 * (np.pad(x, 1)[2:] + np.pad(x, 1)[:-2]) - 1
    np.testing.assert_allclose(residual, 0, atol=1e-12)


@pytest.mark.parametrize("jacobian", [aj.DenseJacobian(), aj.BandedJacobian(6, 6), aj.KrylovJacobian(rtol=1e-12)])
def test_states_of_several_kinds(jacobian):
    """The transpose is that of JAX: the pairing of tangents and cotangents is kept, for complex leaves too."""
    y = {"a": jnp.array([1.0 + 2j, 0.3j]), "b": jnp.ones((3, 1))}
    inverse = jacobian.inverse(problem(DENSE[7], y), jnp.array(0.5), y, jnp.array(0.2))
    tangent, cotangent = ({"a": jnp.array([0.2 - k, 1j * k]), "b": k * jnp.arange(3.0)[:, None]} for k in (1.3, 0.7))

    def pairing(c, t):
        return sum(jnp.sum(a * b).real for a, b in zip(*map(jax.tree.leaves, (c, t)), strict=True))

    solved = inverse.solve(tangent)
    assert jax.tree.map(jnp.shape, solved) == jax.tree.map(jnp.shape, y)
    assert jax.tree.map(jnp.result_type, solved) == jax.tree.map(jnp.result_type, y)
    np.testing.assert_allclose(pairing(cotangent, solved), pairing(inverse.solve_transposed(cotangent), tangent), rtol=1e-9)


def test_colours():
    assert len(set(coloured(banded(50, 2, 1) != 0))) == 4
    assert len(set(coloured(np.eye(9, dtype=bool)))) == 1
    arrow = np.eye(9, dtype=bool)
    arrow[0] = arrow[:, 0] = True
    assert len(set(coloured(arrow))) == 9


@pytest.mark.parametrize(
    ("jacobian", "where"),
    [
        (aj.BandedJacobian(1, 1), "jacobian"),
        (aj.BandedJacobian(1, 1), "mass"),
        (aj.SparseJacobian(banded(30, 1, 1) != 0), "jacobian"),  # which stands beside any mass matrix
    ],
)
def test_entries_elsewhere_are_noticed(jacobian, where):
    matrix, mass, y = banded(30, 1, 1), np.eye(30), jnp.ones(30)
    (matrix if where == "jacobian" else mass)[20, 4] = 0.1
    inverse = jacobian.inverse(problem(matrix, y, mass), jnp.array(0.5), y, jnp.array(0.1))
    assert np.isnan(inverse.solve(y)).any()


def test_the_error_of_a_solve_names_a_band_that_is_too_narrow():
    with pytest.raises(aj.SolveError, match="outside of the band or pattern"):
        aj.solve(lambda t, y, args: -y - y[::-1], 0.0, 1.0, jnp.arange(4.0), solver=aj.Rodas5P(aj.BandedJacobian(0, 0)))


def test_wrong_structures_are_refused():
    y = jnp.ones(3)
    for jacobian, message in (
        (aj.SparseJacobian(np.eye(2)), r"shape \(3, 3\)"),
        (aj.DenseJacobian(lambda t, y, args: jnp.eye(2)), r"shape \(3, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            jacobian.inverse(problem(DENSE[3], y), jnp.array(0.5), y, jnp.array(0.1))
    with pytest.raises(ValueError, match="negative"):
        aj.BandedJacobian.__check_init__(type("Fields", (), {"lower": -1, "upper": 0}))


@pytest.mark.parametrize("method", [aj.Rodas5P, aj.Kvaerno3, aj.BDF, aj.AutoSolver])
def test_what_is_no_jacobian_is_refused(method):
    """As it is told where annotations are not checked."""
    fields = type(method.__name__, (), {"jacobian": "dense"})()
    with pytest.raises(TypeError, match=method.__name__ + r"\(jacobian=...\) must be DenseJacobian\(\).* got 'dense'"):
        method.__check_init__(fields)


# Reaction and diffusion


NODES = 12


def brusselator(t, y, rates):
    """Two interleaved species with diffusion between fixed ends (Hairer and Wanner, section IV.1)."""
    u, v = y.reshape(NODES, 2).T
    diffusion = rates[0] * (NODES + 1) ** 2

    def spread(w, end):
        padded = jnp.concatenate([jnp.full(1, end), w, jnp.full(1, end)])
        return diffusion * (padded[2:] - 2 * w + padded[:-2])

    production = u**2 * v - rates[1] * u
    return jnp.stack([1 - u + production + spread(u, 1.0), -production + spread(v, 3.0)], axis=1).reshape(-1)


X = np.arange(1, NODES + 1) / (NODES + 1)
Y0 = np.stack([1 + np.sin(2 * np.pi * X), np.full(NODES, 3.0)], axis=1).reshape(-1)
STRUCTURES = {
    "dense": aj.DenseJacobian(),
    "banded": aj.BandedJacobian(2, 2),
    "krylov": aj.KrylovJacobian(rtol=1e-12, restart=24),
}


@functools.cache
def reaction_and_diffusion(structure):
    def end(rates, y0):
        options = {"solver": aj.Rosenbrock23(STRUCTURES[structure]), "controller": aj.PIDController(1e-4, 1e-6)}
        solution = aj.solve(brusselator, 0.0, 2.0, y0, rates, **options)
        return jnp.dot(solution.ys[0], jnp.cos(jnp.arange(2.0 * NODES))), solution.stats.accepted

    return jit(jax.value_and_grad(end, (0, 1), has_aux=True))(jnp.array([0.02, 4.0]), jnp.asarray(Y0))


@pytest.mark.parametrize("structure", ["banded", pytest.param("krylov", marks=[pytest.mark.slow])])
def test_structures_change_no_solution_and_no_gradient(structure):
    compare(reaction_and_diffusion(structure), reaction_and_diffusion("dense"), 1e-6 if structure == "krylov" else 1e-9)


def test_reaction_and_diffusion_against_an_explicit_method():
    controller = aj.PIDController(1e-7, 1e-9)
    exact = aj.solve(brusselator, 0.0, 2.0, jnp.asarray(Y0), jnp.array([0.02, 4.0]), controller=controller).ys[0]
    (got, steps), _ = reaction_and_diffusion("dense")
    np.testing.assert_allclose(got, exact @ np.cos(np.arange(2.0 * NODES)), rtol=1e-3)
    assert steps < 150


# The reverse ODE has the same Jacobian, transposed


LOWER_BAND = np.triu(np.tril(np.sin(np.arange(36.0)).reshape(6, 6), 1), -2) - 20.0 * np.diag(np.arange(1.0, 7.0))


def driven(t, y, rate):
    """A band of one diagonal above and two below; not linear, and not autonomous."""
    return rate * (LOWER_BAND @ y) + 0.3 * jnp.sin(t + y)


def driven_jac(t, y, rate):
    return rate * jnp.asarray(LOWER_BAND) + 0.3 * jnp.diag(jnp.cos(t + y))


@pytest.mark.parametrize(
    "adjoint",
    [
        pytest.param(aj.InterpolatingAdjoint(), id="interpolating", marks=pytest.mark.slow),
        pytest.param(aj.GaussAdjoint(), id="gauss", marks=pytest.mark.slow),
    ],
)
def test_continuous_adjoints_use_the_structure(adjoint):
    """A Jacobian of the user's, and a band that is not symmetric, against the whole one and against a tighter solve."""

    def gradient(jacobian, adjoint, rtol):
        def loss(y0, rate):
            options = {"solver": aj.Rodas5P(jacobian), "controller": aj.PIDController(rtol, rtol), "adjoint": adjoint}
            return jnp.sum(jnp.sin(jnp.arange(6.0) + aj.solve(driven, 0.0, 2.0, y0, rate, **options).ys[0]))

        return jit(jax.grad(loss, (0, 1)))(jnp.cos(jnp.arange(6.0)), 1.1)

    whole = gradient(aj.DenseJacobian(), adjoint, 1e-7)
    compare(gradient(aj.DenseJacobian(driven_jac), adjoint, 1e-7), whole, 1e-8)
    compare(gradient(aj.BandedJacobian(2, 1), adjoint, 1e-7), whole, 1e-8)
    compare(whole, gradient(aj.DenseJacobian(), aj.DiscreteAdjoint(), 1e-10), 1e-5)


@pytest.mark.parametrize("solver", [pytest.param(aj.Rodas5P, marks=[pytest.mark.slow]), aj.Kvaerno5])
def test_continuous_adjoints_of_complex_states(solver):
    """Cotangents of complex numbers are paired with tangents without a conjugate, also in the transposed systems."""

    def gradient(adjoint):
        def loss(z0, rate):
            options = {"solver": solver(), "controller": aj.PIDController(1e-9, 1e-9), "adjoint": adjoint}
            z = aj.solve(lambda t, z, rate: rate * z - 0.3 * z * jnp.abs(z) ** 2, 0.0, 2.0, z0, rate, **options).ys[0]
            return jnp.sum(z.real - 2.0 * z.imag + jnp.abs(z) ** 2)

        return jit(jax.grad(loss, (0, 1)))(jnp.array([0.8 + 0.3j, -0.4 + 0.9j]), jnp.array([-0.4 + 3.0j, -20.0 + 1.0j]))

    compare(gradient(aj.InterpolatingAdjoint()), gradient(aj.DiscreteAdjoint()), 1e-6)
