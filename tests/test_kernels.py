"""Programs of small arrays in one kernel: which are, that they compute the same, and that nothing else is affected."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import Program
from problems import jit, lotka_volterra

import adjoint_jax as aj
from adjoint_jax.kernels import MOST_ENTRIES, MOST_LANES, in_a_small_kernel, in_one_kernel, stored, stored_in_lanes

X, W = jnp.linspace(0.1, 0.7, 5), jnp.array([0.3, -0.2, 0.9, 0.4, 0.1])


def damped(x, w, unused):
    """Loops within loops, a choice, a reduction, a buffer."""
    del unused

    def step(i, carry):
        x, total, buffer = carry
        x = jax.lax.while_loop(lambda y: jnp.max(jnp.abs(y)) > 1.0, lambda y: 0.5 * y, x + w * jnp.sin(total))
        x = jax.lax.cond(total > 2.0, lambda y: -y, lambda y: y, x)
        return x, total + jnp.sum(x**2), jax.lax.dynamic_update_index_in_dim(buffer, x, i, 0)

    return jax.lax.fori_loop(0, 40, step, (x, jnp.zeros(()), jnp.zeros((40, 5))))


def in_kernel(x, w, unused=jnp.ones((2, 3))):
    return in_one_kernel(damped, x, w, unused)


def plain(x, w, unused=jnp.ones((2, 3))):
    return damped(x, w, unused)


def marked(function, *operands, kernel=False):
    """How many calls of a compiled program are to stay calls; or those of them that are to be single kernels, without those
    that are parts of larger ones."""
    program = Program(jax.jit(function).lower(*operands).compile())
    calls = [(name, i) for name, body in program.computations.items() for i in body if i.operation == "call"]
    calls = [(name, call) for name, call in calls if 'inlineable="false"' in call.rest]
    kernels = [(name, call) for name, call in calls if 'small_call="true"' in call.rest]
    within = set().union(*(program.reached(name) for _, call in kernels for name in call.called))
    return sum(name not in within for name, _ in kernels) if kernel else len(calls)


def agree(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)


def test_a_program_of_small_arrays_is_one_kernel():
    assert marked(in_kernel, X, W) == 1
    program = Program(jax.jit(in_kernel).lower(X, W).compile())
    assert len(program.loops()) >= 2
    agree(jit(in_kernel)(X, W), jit(plain)(X, W))


def test_what_is_known_when_it_is_traced_is_no_argument():
    scale = jnp.array([2.0, 3.0])
    agree(jit(lambda x: in_one_kernel(lambda a, b: a * b, x, scale))(X[:2]), X[:2] * scale)
    assert in_one_kernel(lambda a, b: (a + 1, b, "text"), 1.0, None)[1:] == (None, "text")


def test_arguments_that_are_not_used_or_constant():
    """XLA ends the process where a kernel does not use one of its arguments."""

    def scaled(x):
        constants = jnp.asarray(2.0), jnp.zeros(3), jnp.asarray(0), jnp.asarray(True)
        return in_one_kernel(lambda x, unused, factor, *rest: (factor * x, rest[1]), x, x + 1, *constants)

    agree(jit(scaled)(X), (2 * X, 0))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jax.lax.fori_loop(0, 3, lambda i, y: in_kernel(y, W)[0] + x, x),
        lambda x: jax.lax.scan(lambda y, _: (in_kernel(y, W)[0] + x, y), x, length=3),
        lambda x: jax.lax.map(lambda s: in_kernel(s * x, W)[0], jnp.arange(3.0)),
        lambda x: jax.lax.cond(x[0] > 0, lambda y: in_kernel(y, W)[0], lambda y: y, x),
        lambda x: jax.checkpoint(lambda y: in_kernel(y, W)[0])(x),
    ],
    ids=["fori_loop", "scan", "map", "cond", "checkpoint"],
)
def test_kernels_within_other_programs(function, monkeypatch):
    ours = jit(function)(X)
    monkeypatch.setitem(globals(), "in_kernel", plain)
    agree(ours, jit(function)(X))


def test_lanes_are_a_kernel_together_and_tangents_another():
    xs = X * jnp.arange(1.0, 4.0)[:, None]
    moved = jnp.cos(W)

    def along(function):
        return lambda x, w: jax.jvp(lambda w: function(x, w), (w,), (moved,))

    def in_lanes(function):
        return jax.vmap(function, (0, None))

    def both(function):
        return lambda xs, w: jax.jvp(in_lanes(function), (xs, w), (xs, moved))

    for transform, operands, kernels in (
        (in_lanes, (xs, W), 1),
        (along, (X, W), 2),
        (lambda function: jax.jacfwd(function, argnums=1), (X, W), 1),
        (lambda function: in_lanes(along(function)), (xs, W), 2),
        (both, (xs, W), 2),
        (lambda function: lambda x, w: jax.linearize(lambda w: function(x, w)[0], w)[1](moved), (X, W), 1),
    ):
        assert marked(transform(in_kernel), *operands) == kernels
        agree(jit(transform(in_kernel))(*operands), transform(plain)(*operands))


def test_values_that_are_no_numbers_have_tangents_of_none():
    def counted(x):
        count, total = in_one_kernel(lambda x: jax.lax.fori_loop(0, 3, lambda i, c: (c[0] + i, c[1] * x), (0, x)), x)
        return total * count

    agree(jax.jit(lambda x: jax.jvp(counted, (x,), (jnp.ones(5),)))(X), (3 * X**4, 12 * X**3))


def test_tangents_without_loops_are_compiled_in_the_usual_way():
    """As part of what they are in: a kernel by itself would only keep XLA from joining them with it."""
    assert marked(lambda x: jax.jvp(lambda x: in_one_kernel(lambda x: jnp.sin(x) * x, x), (x,), (x,)), X) == 0


@pytest.mark.parametrize(("store", "alone"), [(stored_in_lanes, 0), (stored, 1)])
def test_what_is_stored_comes_from_a_call(store, alone):
    """And so do its derivatives."""

    def twice(x):
        sine, name = store((jnp.sin(x), "sine"))
        assert name == "sine"
        return sine * jnp.cos(sine), sine

    def expected(x):
        return jnp.sin(x) * jnp.cos(jnp.sin(x)), jnp.sin(x)

    def pulled_back(x):
        return jax.vjp(twice, x)[1]((x, x))

    xs = X * jnp.arange(1.0, 4.0)[:, None]
    for function, calls in ((twice, 1), (lambda x: jax.jvp(twice, (x,), (x,)), 2), (pulled_back, 2)):
        assert marked(jax.vmap(function), xs) == calls
        assert marked(function, X) == alone * calls
    for transform in (lambda f: f, jax.vmap, lambda f: jax.vmap(jax.vmap(f)), lambda f: jax.vmap(jax.jacfwd(f))):
        agree(jit(transform(twice))(xs), transform(expected)(xs))
        agree(transform(twice)(xs), transform(expected)(xs))
    pulled = (jax.jit(lambda g, f=f: jax.vjp(jax.vmap(f), xs)[1](g)) for f in (twice, expected))
    agree(*(pull((xs, xs)) for pull in pulled))


def test_scalars_of_few_lanes_are_stored():
    def doubled(x):
        return stored((2.0 * x, X[0]))

    few, many = jnp.arange(4.0), jnp.arange(MOST_LANES + 1.0)
    assert marked(jax.vmap(doubled), few) == marked(jax.vmap(doubled), few[:, None]) == 1
    assert marked(jax.vmap(doubled), many) == marked(doubled, few[0]) == 0
    for xs in (few, many):
        agree(jit(jax.vmap(doubled))(xs), (2.0 * xs, jnp.full(len(xs), X[0])))


ELEMENTARY = [jnp.tanh, jnp.exp2, jnp.log2, jnp.sqrt, jnp.arctan, jax.nn.sigmoid, jax.nn.softplus, jax.nn.gelu, jax.nn.silu]


@pytest.mark.parametrize("function", ELEMENTARY, ids=lambda function: function.__name__)
def test_derivatives_of_elementary_functions_are_part_of_a_kernel(function):
    """Whatever operations a version of JAX has for them."""
    assert marked(lambda x: in_one_kernel(jax.grad(lambda v: jnp.sum(function(v))), x), X) == 1


def solving(x):
    return jnp.linalg.solve(jnp.outer(x, x) + jnp.eye(5), x)


def calling_back(x):
    return jax.pure_callback(lambda v: v, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def scattering(x):
    return x.at[jnp.argsort(x)].add(1.0)


def large(x):
    return jax.lax.fori_loop(0, 3, lambda i, y: jnp.sin(y), jnp.ones(MOST_ENTRIES + 1) * x[0])


@pytest.mark.parametrize("function", [lambda x: jnp.outer(x, x) @ x, solving, calling_back, scattering, large])
def test_what_needs_more_than_a_kernel_is_left_as_it_is(function):
    assert marked(lambda x: in_one_kernel(function, x), X) == 0
    agree(jit(lambda x: in_one_kernel(function, x))(X), function(X))


ADJOINTS = [aj.DiscreteAdjoint(), aj.GaussAdjoint(), aj.InterpolatingAdjoint(), aj.BacksolveAdjoint()]
RATES = {"a": jnp.array(1.5), "b": jnp.array(1.0), "c": jnp.array(3.0), "d": jnp.array(1.0)}


def loss(rates, adjoint):
    saveat = aj.SaveAt(np.linspace(0.0, 5.0, 12))
    return jnp.sum(aj.solve(lotka_volterra, 0.0, 5.0, jnp.ones(2), rates, saveat=saveat, adjoint=adjoint, throw=False).ys)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda adjoint: type(adjoint).__name__)
def test_small_solves_and_their_gradients_are_kernels(adjoint):
    gradient = functools.partial(jax.grad(loss), adjoint=adjoint)
    assert marked(functools.partial(loss, adjoint=adjoint), RATES, kernel=True) == 1
    assert marked(gradient, RATES, kernel=True) == 2


def test_constants_that_a_program_returns_are_arrays_if_it_is_no_kernel():
    """On JAX 0.7, the gradient of a solve with a mass matrix, whose count of records is a constant, ended in an error."""

    def results(x):
        return in_one_kernel(lambda x: (jnp.linalg.svd(x)[1], jnp.zeros((), jnp.int32)), x)

    are_arrays = []
    jax.jit(lambda x: are_arrays.extend(isinstance(result, jax.Array) for result in results(x)))(jnp.eye(2))
    assert are_arrays == [True, True]


@pytest.mark.parametrize("solver", [aj.Rodas5P(), aj.Kvaerno5(), aj.BDF()], ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("n", [2, 7])
def test_small_stiff_solves_and_their_gradients_are_kernels(n, solver):
    """With the linear systems in them. A step of Rodas5P in seven components is a loop over stages."""

    def end(rates):
        def decay(t, y, rates):
            changes = [100 * (y[i - 1] - y[i]) / (i + y[i] ** 2) for i in range(1, n)]
            return jnp.stack([-rates["a"] * y[0] + 0.1 * y[1] ** 2, *changes])

        return aj.solve(decay, 0.0, 5.0, jnp.ones(n), rates, solver=solver, throw=False).ys[0, 0]

    assert marked(end, RATES, kernel=True) == 1
    assert marked(jax.grad(end), RATES, kernel=True) == 2


@pytest.mark.parametrize("solver", [aj.Rodas5P, aj.Kvaerno5, aj.BDF])
def test_so_are_those_with_bands(solver):
    def end(rates):
        def diffusion(t, y, rates):
            padded = jnp.pad(y, 1)
            return 30 * rates["a"] * (padded[2:] - 2 * y + padded[:-2]) - y**3

        jacobian = aj.BandedJacobian(1, 1)
        return aj.solve(diffusion, 0.0, 1.0, jnp.arange(8.0), rates, solver=solver(jacobian), throw=False).ys[0, 0]

    assert marked(end, RATES, kernel=True) == 1
    assert marked(jax.grad(end), RATES, kernel=True) == 2


def test_a_small_kernel_is_part_of_a_larger_one_and_plain_in_lanes_and_derivatives():
    def whole(x, w):
        return in_one_kernel(lambda x, w: 2 * in_a_small_kernel(damped, jnp.cos(x), w, jnp.ones((2, 3)))[0], x, w)

    def alone(x, w):
        return in_a_small_kernel(damped, x, w, jnp.ones((2, 3)))

    lanes = jnp.stack([X, 2 * X, -X])
    assert marked(alone, X, W, kernel=True) == marked(whole, X, W, kernel=True) == 1
    assert marked(jax.vmap(alone, (0, None)), lanes, W) == 0
    assert marked(lambda: jax.jvp(alone, (X, W), (W, X))[1]) == 0
    agree(jit(alone)(X, W), jit(plain)(X, W))
    agree(jit(whole)(X, W), 2 * jit(plain)(jnp.cos(X), W)[0])
    agree(jit(jax.vmap(whole, (0, None)))(lanes, W), jnp.stack([whole(x, W) for x in lanes]))
    agree(jit(jax.vmap(alone, (None, 0)))(X, lanes), jit(jax.vmap(plain, (None, 0)))(X, lanes))
    agree(jit(lambda: jax.jvp(alone, (X, W), (W, X)))(), jit(lambda: jax.jvp(plain, (X, W), (W, X)))())
    agree(
        jit(lambda: jax.jvp(lambda x: alone(x, W), (X,), (W,)))(), jit(lambda: jax.jvp(lambda x: plain(x, W), (X,), (W,)))()
    )


def along(function, rates):
    return jax.jvp(function, (rates,), (jax.tree.map(jnp.cos, rates),))


@pytest.mark.parametrize(
    ("derivative", "kernels"),
    [
        (jax.jacfwd(functools.partial(loss, adjoint=aj.ForwardMode())), 1),
        (functools.partial(along, functools.partial(loss, adjoint=aj.ForwardMode())), 2),
        (functools.partial(along, jax.grad(functools.partial(loss, adjoint=aj.DiscreteAdjoint()))), 4),
    ],
    ids=["jacfwd", "jvp", "Hessian-vector product"],
)
def test_derivatives_in_forward_mode_are_kernels(derivative, kernels):
    """Those of values and of tangents, of the solve and of the way back."""
    assert marked(derivative, RATES, kernel=True) == kernels


def test_in_a_training_loop_a_solve_gives_what_it_gives_alone():
    def step(rates):
        return jax.tree.map(lambda p, g: p - 1e-3 * g, rates, jax.grad(loss)(rates, ADJOINTS[0]))

    trained = jit(lambda rates: jax.lax.fori_loop(0, 2, lambda i, r: step(r), rates))(RATES)
    agree(trained, jit(step)(jit(step)(RATES)))
