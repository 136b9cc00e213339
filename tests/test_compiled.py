"""A guard against slower programs that needs no clock: the kernels of compiled loops, and the evaluations of a gradient.

Bounds are a little above what there is. What needs more of either had better gain something by it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import FREE, Program
from problems import lotka_volterra

import adjoint_jax as aj
from adjoint_jax.diagnostics.counting import CountingAdjoint, Counts, Tally

PARAMETERS = {"a": jnp.array(1.5), "b": jnp.array(1.0), "c": jnp.array(3.0), "d": jnp.array(1.0)}
TS = np.linspace(0.0, 10.0, 100)
STEPPING = {
    "adaptive": {"controller": aj.PIDController(1e-6, 1e-6), "saveat": aj.SaveAt(TS)},
    "given grid": {"controller": aj.FixedSteps(1000), "solver": aj.RK4()},
}


def solve(parameters, stepping, adjoint):
    y0 = jnp.ones(2)
    return jnp.mean(
        aj.solve(lotka_volterra, 0.0, 10.0, y0, parameters, adjoint=adjoint, throw=False, **STEPPING[stepping]).ys ** 2
    )


def kernels(stepping, quantity, lanes):
    """Kernels in the innermost loop that has most of them, and in all loops."""
    counts = program(stepping, quantity, lanes).kernels().values()
    return max(counts), sum(counts)


@functools.cache
def program(stepping, quantity, lanes):
    function = functools.partial(solve, stepping=stepping, adjoint=aj.DiscreteAdjoint())
    function = jax.grad(function) if quantity == "gradient" else function
    many = jax.tree.map(lambda leaf: jnp.linspace(0.9, 1.1, 256) * leaf, PARAMETERS)
    return Program(jax.jit(jax.vmap(function) if lanes else function).lower(many if lanes else PARAMETERS).compile())


def test_a_small_solve_is_cheap():
    """The client of XLA:CPU runs programs that it takes for fewer than 1,000 operations without a change of threads, which
    costs as much as this solve with its 100 save times. It counts what a loop repeats once: so nothing but loops may be as
    long as there are rows."""

    def rows(parameters):
        return aj.solve(lotka_volterra, 0.0, 10.0, jnp.ones(2), parameters, throw=False, **STEPPING["adaptive"]).ys

    assert 0 < Program(jax.jit(rows).lower(PARAMETERS).compile()).operations < 1000


@pytest.mark.parametrize("quantity", ["forward", "gradient"])
def test_more_steps_of_a_given_grid_are_no_more_operations(quantity):
    """Counted in the same way: no operation is as long as there are steps, and the solve by itself is cheap."""

    def end(parameters, steps):
        controller = aj.FixedSteps(steps)
        y0 = jnp.ones(2)
        return aj.solve(
            lotka_volterra, 0.0, 10.0, y0, parameters, solver=aj.RK4(), controller=controller, throw=False
        ).ys.sum()

    function = jax.grad(end) if quantity == "gradient" else end
    few, many = (
        Program(jax.jit(function, static_argnums=1).lower(PARAMETERS, steps).compile()).operations for steps in (1000, 4000)
    )
    assert 0 < few == many
    assert quantity == "gradient" or few < 1000


@pytest.mark.parametrize(
    ("stepping", "quantity", "lanes", "in_one", "in_all"),
    [
        ("adaptive", "forward", False, 42, 88),
        ("adaptive", "gradient", False, 44, 198),
        ("adaptive", "forward", True, 70, 205),
        ("adaptive", "gradient", True, 93, 528),
        ("given grid", "forward", False, 9, 23),
        ("given grid", "gradient", False, 23, 60),
    ],
)
def test_kernels_of_loops(stepping, quantity, lanes, in_one, in_all):
    """Lanes are computed in scalars, and what several kernels need is computed by one of its own: so there are more, but
    none is a loop over pairs of numbers, and none computes what another has."""
    most, total = kernels(stepping, quantity, lanes)
    assert most <= in_one
    assert total <= in_all


def elementwise(t, y, weights):
    return jnp.roll(y, 1) * weights[0] - y * (1 - y * y)


def residual(t, y, weights):
    return y * y - (y * y) @ weights


STORING = {
    "adaptive": {"controller": aj.PIDController(1e-6, 1e-6)},
    "given grid": {"controller": aj.FixedSteps(1000), "solver": aj.RK4()},
    "forward mode": {"controller": aj.FixedSteps(1000), "solver": aj.RK4(), "adjoint": aj.ForwardMode()},
}


@pytest.mark.parametrize(
    ("field", "case", "size", "bound"),
    [
        (elementwise, "adaptive", 300, 190),
        (elementwise, "given grid", 300, 126),
        (elementwise, "forward mode", 300, 213),
        (elementwise, "forward mode", 2200, 93),
        (residual, "adaptive", 300, 280),
        (residual, "given grid", 300, 106),
        (residual, "forward mode", 300, 68),
    ],
)
def test_nothing_is_computed_again_for_every_use(field, case, size, bound):
    """Multiplications in a compiled derivative. Where stages, or their cotangents or tangents, are not stored, XLA fuses
    what computes one into all that use it, and there are 1.4 to 2.5 times as many. In forward mode values that are kernels
    are computed apart from tangents, and with them."""

    def loss(weights):
        y0 = jnp.linspace(-1.0, 1.0, size)
        return jnp.sum(aj.solve(field, 0.0, 1.0, y0, weights, throw=False, **STORING[case]).ys ** 2)

    def along(weights):
        return jax.jvp(loss, (weights,), (weights,))[1]

    derivative = along if case == "forward mode" else jax.grad(loss)
    computations = Program(jax.jit(derivative).lower(jnp.eye(size)).compile()).computations.values()
    assert sum(i.operation == "multiply" for computation in computations for i in computation) <= bound


@pytest.mark.parametrize(("quantity", "loops"), [("forward", 1), ("gradient", 2)])
def test_arrays_in_the_loops_over_steps_are_small(quantity, loops):
    """Forward and transposed. XLA:CPU takes twice as long for the kernels of a loop in which an array is larger (see
    `recorders`). Where steps are taken again, what is kept of each is written where it belongs at once."""
    compiled = program("adaptive", quantity, False)
    kernels, largest = compiled.kernels(), compiled.largest_arrays()
    assert sum(kernels[name] >= 20 and largest[name] <= 512 for name in kernels) == loops


@pytest.mark.parametrize(
    ("samples", "controller", "solver", "keep", "bound", "loops"),
    [
        ((64,), aj.PIDController(1e-6, 1e-6), aj.Tsit5(), aj.KeepStates(), 81, 5),
        ((64,), aj.FixedSteps(500), aj.RK4(), aj.KeepStates(), 52, 3),
        ((), aj.PIDController(1e-6, 1e-6), aj.Tsit5(), aj.KeepLinearisations(), 92, 6),
    ],
    ids=["adaptive", "grid", "one sample"],
)
def test_different_kernels_of_a_network(samples, controller, solver, keep, bound, loops):
    """They are most of the time that a gradient takes to compile: every kernel takes as long, equal ones are compiled once.
    So states of stages are the same where steps are taken, taken again, and transposed; what is written down of stages is
    what was computed for them, and nothing is computed of which nobody asks: of a loss of y1, how far a solve on a given
    grid came that failed, which takes a loop."""
    how = {"controller": controller, "solver": solver, "adjoint": aj.DiscreteAdjoint(keep=keep)}

    def loss(weights):
        def field(t, y, weights):
            return jnp.tanh(y @ weights[0]) @ weights[1]

        return jnp.sum(aj.solve(field, 0.0, 1.0, jnp.ones((*samples, 16)), weights, throw=False, **how).ys ** 2)

    weights = [jnp.ones((16, 48)), jnp.ones((48, 16))]
    program = Program(jax.jit(jax.grad(loss)).lower(weights).compile())
    assert program.different_kernels() <= bound
    assert sum(i.operation == "while" for i in program.all()) == loops


LARGE = 65_536


@pytest.mark.parametrize(("quantity", "in_one", "in_all", "copies"), [("forward", 11, 11, 0), ("gradient", 14, 43, 5)])
def test_passes_over_large_states(quantity, in_one, in_all, copies):
    """Kernels of loop bodies that read or write a whole state of many cells: an attempted step is one for each of its six
    new stages, whose combination and evaluation are one, and five more; the transposed step, of a linear field, is one
    for each combination of cotangents and one for each pullback, and two more."""

    def end(y0):
        def ring(t, y, args):
            return 0.5 * jnp.roll(y, 1) - y

        return jnp.sum(aj.solve(ring, 0.0, 1.0, y0, controller=aj.PIDController(1e-6, 1e-6), throw=False).ys ** 2)

    compiled = Program(jax.jit(jax.grad(end) if quantity == "gradient" else end).lower(jnp.ones(LARGE)).compile())
    passes = [[i for i in body if i.operation not in FREE | {"call"}] for body in compiled.loops().values()]
    large = [[i for i in body if i.largest_array >= 8 * LARGE] for body in passes]
    assert max(map(len, large)) <= in_one
    assert sum(map(len, large)) <= in_all
    assert sum(i.operation == "copy" for body in large for i in body) <= copies


@pytest.mark.parametrize(
    ("stepping", "adjoint", "bounds"),
    [
        ("adaptive", aj.DiscreteAdjoint(), Counts(1150, 640, 640)),
        ("adaptive", aj.GaussAdjoint(), Counts(1280, 990, 420)),
        ("adaptive", aj.BacksolveAdjoint(), Counts(1660, 1060, 900)),
        ("given grid", aj.DiscreteAdjoint(), Counts(7000, 4000, 4000)),
    ],
)
def test_evaluations_of_a_gradient(stepping, adjoint, bounds):
    tally = Tally()
    gradient = jax.jit(jax.grad(functools.partial(solve, stepping=stepping, adjoint=CountingAdjoint(adjoint, tally))))
    jax.block_until_ready(gradient(PARAMETERS))
    for name, count, bound in zip(Counts._fields, tally.counts, bounds, strict=True):
        assert 0 < count <= bound, name


@pytest.mark.parametrize(("keep", "again"), [(aj.KeepStates(), 5), (aj.KeepLinearisations(), 0)])
def test_no_evaluation_is_one_too_many(keep, again):
    """Two for the first step size, six for every step; and those of earlier stages on the way back, if linearisations are
    not kept. Where all steps are in one segment, none for steps that are taken again."""
    tally = Tally()

    def loss(weights):
        options = {
            "controller": aj.PIDController(1e-4, 1e-4),
            "adjoint": CountingAdjoint(aj.DiscreteAdjoint(keep=keep), tally),
        }
        solution = aj.solve(lambda t, y, w: jnp.tanh(y @ w[0]) @ w[1] - y, 0.0, 1.0, jnp.ones(16), weights, **options)
        return jnp.sum(solution.ys**2), solution.stats

    weights = [jnp.ones((16, 128)) / 16, jnp.ones((128, 16)) / 64]
    stats = jax.block_until_ready(jax.jit(jax.grad(loss, has_aux=True))(weights)[1])
    steps = int(stats.accepted)
    assert stats.rejected == 0
    assert tally.counts == Counts(2 + (6 + again) * steps, 6 * steps, 6 * steps)


def evaluations(saveat):
    """Of the vector field, in one gradient."""
    tally = Tally()
    options = {"controller": aj.PIDController(1e-6, 1e-6), "adjoint": CountingAdjoint(aj.DiscreteAdjoint(), tally)}

    @jax.jit
    @jax.grad
    def gradient(parameters):
        return jnp.sum(aj.solve(lotka_volterra, 0.0, 10.0, jnp.ones(2), parameters, saveat=saveat, **options).ys)

    jax.block_until_ready(gradient(PARAMETERS))
    return tally.counts.evaluations


def test_an_observable_takes_evaluations_only_where_it_is_saved():
    """For the interpolants of one chunk of steps, at most."""
    ts = np.array([5.0])
    more = evaluations(aj.SaveAt(ts, fn=lambda t, y, args: y**2)) - evaluations(aj.SaveAt(ts))
    assert 0 < more <= 8 * 7


def loops_of_gradient(field):
    def end(matrix):
        solver, controller = aj.Tsit5(), aj.FixedSteps(20)
        adjoint = aj.DiscreteAdjoint(keep=aj.KeepStates())
        return jnp.sum(
            aj.solve(field, 0.0, 1.0, jnp.ones(12), matrix, solver=solver, controller=controller, adjoint=adjoint).ys
        )

    return len(Program(jax.jit(jax.grad(end)).lower(0.1 * jnp.ones((12, 12))).compile()).loops())


def test_stages_are_a_loop_on_the_way_back_only_where_evaluations_fuse():
    """One loop for the states of the stages, one for their pullbacks; none where the field multiplies matrices."""
    assert loops_of_gradient(lambda t, y, a: jnp.tanh(a[0] * y)) == loops_of_gradient(lambda t, y, a: jnp.tanh(a @ y)) + 2


def gated(t, y, weights):
    inner, outer = weights
    return jnp.tanh(y @ inner) * jnp.sin(y) - (y * y) @ outer


@pytest.mark.parametrize(
    "adjoint",
    [
        aj.DiscreteAdjoint(keep=aj.KeepStates()),
        aj.DiscreteAdjoint(keep=aj.KeepStages()),
        aj.BacksolveAdjoint(),
        aj.InterpolatingAdjoint(),
    ],
    ids=["discrete", "discrete, stages", "backsolve", "interpolating"],
)
def test_entries_of_products_of_vectors_are_products_and_nothing_else(adjoint):
    """The derivative with respect to a matrix that multiplies a vector is a product of two vectors. XLA would fuse it with
    what these are computed from, and compute that anew for every entry: the gradient would take four times as long."""
    size = 200

    def loss(weights):
        y0 = jnp.linspace(-1.0, 1.0, size)
        return jnp.sum(aj.solve(gated, 0.0, 1.0, y0, weights, adjoint=adjoint, throw=False).ys ** 2)

    program = Program(jax.jit(jax.grad(loss)).lower([jnp.eye(size), jnp.ones((size, size)) / size]).compile())
    kernels = [name for i in program.all() if i.operation == "fusion" for name in i.called]
    products = [k for k in kernels if any(i.operation == "multiply" and i.size == size**2 for i in program.computations[k])]
    assert products
    for kernel in products:
        assert not {i.operation for i in program.computations[kernel]} & {"tanh", "sine", "cosine"}
