"""Gradients where something is missing, degenerate, failed or not allowed: right, zero, NaN or an error, never a number
that only looks right."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import compare, jit, on_grid, rows_measure

import adjoint_jax as aj

ADJOINTS = {"discrete": aj.DiscreteAdjoint(), "backsolve": aj.BacksolveAdjoint()}
both = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)
GRID = {"solver": aj.RK4(), "controller": aj.FixedSteps(64)}


def decay(t, y, args):
    return -args * y


def decayed(theta, t0, t, y0):
    return y0 * jnp.exp(-theta * (t - t0))


def gradient(loss, *point):
    """Of a scalar, with respect to everything; one compilation."""
    return jit(jax.grad(loss, tuple(range(len(point)))))(*point)


# Times that coincide


@both
@pytest.mark.parametrize("options", [GRID, {}], ids=["grid", "adaptive"])
def test_no_time_at_all(adjoint, options):
    """With t0 == t1 every row is y0, and times still move rows along the flow."""

    def loss(y0, theta, t0, t1, ts):
        saveat = aj.SaveAt(ts, t0=True, t1=True)
        return rows_measure(aj.solve(decay, t0, t1, y0, theta, saveat=saveat, adjoint=adjoint, **options).ys)

    def exact(y0, theta, t0, t1, ts):
        rows = [y0, *(decayed(theta, t0, t, y0) for t in ts), decayed(theta, t0, t1, y0)]
        return rows_measure(jnp.stack(rows))

    point = jnp.array([2.0, -1.0]), jnp.array(0.8), jnp.array(1.5), jnp.array(1.5), jnp.array([1.5, 1.5])
    compare(gradient(loss, *point), gradient(exact, *point), 1e-12)


@functools.cache
def gradients_at_repeated_times(adjoint):
    """Of the rows of solves and of their closed form, as functions of everything."""

    def loss(y0, theta, t0, t1, ts):
        saveat = aj.SaveAt(ts), aj.SaveAt(ts[3:4])
        many, one = aj.solve(decay, t0, t1, y0, theta, saveat=saveat, adjoint=adjoint, **GRID).ys
        return rows_measure(many) + 2 * rows_measure(one)

    def exact(y0, theta, t0, t1, ts):
        many = jax.vmap(lambda t: decayed(theta, t0, t, y0))(ts)
        return rows_measure(many) + 2 * rows_measure(many[3:4])

    return jit(lambda *point: tuple(jax.grad(fn, (0, 1, 2, 3, 4))(*point) for fn in (loss, exact)))


@both
@pytest.mark.parametrize("t1", [2.0, -1.0])
def test_save_times_on_steps_and_repeated(adjoint, t1):
    """At t0, at t1, twice on the same boundary of two steps, twice inside of a step, and a single one."""
    fractions = np.array([0.0, 0.0, 0.25, 0.25, 0.4, 0.4, 1.0, 1.0])
    got, wanted = gradients_at_repeated_times(adjoint)(np.array([2.0, -1.0]), 0.8, 0.0, t1, t1 * fractions)
    # Its own grid has eight steps of RK4 between two observations, wherever those are.
    compare(got, wanted, 5e-6 if isinstance(adjoint, aj.BacksolveAdjoint) else 1e-7)


def test_a_time_passed_twice_gets_the_sum():
    """odeint's t0 is ts[0] and its t1 is ts[-1]: the first row is y0 whatever the time."""

    def loss(ts):
        return rows_measure(
            aj.odeint(decay, jnp.array([2.0]), ts, jnp.array(0.8), controller=GRID["controller"], solver=aj.RK4())
        )

    def exact(ts):
        rows = [jnp.array([2.0]), *(decayed(0.8, ts[0], t, jnp.array([2.0])) for t in ts[1:])]
        return rows_measure(jnp.stack(rows))

    ts = jnp.array([0.3, 0.7, 1.2])
    compare(gradient(loss, ts), gradient(exact, ts), 1e-7)


@both
def test_explicit_time_of_fn_at_the_last_of_steps(adjoint):
    """SaveAt(steps=True): the last row is at t1 and moves with it, through the state and through fn's own t."""

    def loss(t1):
        saveat = aj.SaveAt(steps=True, fn=lambda t, y, args: t * y)
        ys = aj.solve(decay, 0.0, t1, jnp.array([2.0]), jnp.array(0.8), saveat=saveat, adjoint=adjoint, **GRID).ys
        return ys[-1, 0] ** 2

    t1 = 1.5
    expected = 8 * t1 * (1 - 0.8 * t1) * np.exp(-1.6 * t1)  # of (2 t exp(-0.8 t))^2
    assert gradient(loss, t1)[0] == pytest.approx(expected, rel=1e-6)


# Things that are not there


@both
def test_no_state(adjoint):
    def loss(t1, theta):
        solution = aj.solve(lambda t, y, args: {}, 0.0, t1, {}, theta, adjoint=adjoint, **GRID)
        assert solution.ys == {}
        return t1 * theta + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(solution.ys))

    assert jax.grad(loss, (0, 1))(2.0, 3.0) == (3.0, 2.0)


@both
def test_a_leaf_without_entries(adjoint):
    def loss(y0):
        y1 = aj.solve(lambda t, y, args: {"a": -y["a"], "b": y["b"]}, 0.0, 1.0, y0, adjoint=adjoint, **GRID).ys
        return jnp.sum(y1["a"] ** 2) + jnp.sum(y1["b"])

    (in_y0,) = gradient(loss, {"a": jnp.array([1.5]), "b": jnp.zeros((0, 3))})
    np.testing.assert_allclose(in_y0["a"], 3.0 * np.exp(-2.0), rtol=1e-8)
    assert in_y0["b"].shape == (0, 3)


class Plain(eqx.Module):
    """A field without parameters."""

    def __call__(self, t, y, args):
        return -(y**3)


@both
def test_field_without_parameters_and_empty_args(adjoint):
    def loss(field, y0, args):
        return jnp.sum(aj.solve(field, 0.0, 1.0, y0, args, adjoint=adjoint, **GRID).ys)

    y0 = np.array([0.5, 1.0])
    in_field, in_y0, in_args = gradient(loss, Plain(), y0, ())
    np.testing.assert_allclose(in_y0, (1 + 2 * y0**2) ** -1.5, rtol=1e-6)
    assert jax.tree.leaves((in_field, in_args)) == []


@both
@pytest.mark.parametrize("saveat", [aj.SaveAt(t1=True), aj.SaveAt(np.array([0.5, 1.0]))], ids=["t1", "ts"])
def test_args_that_are_no_numbers(adjoint, saveat):
    """Integers, keys, booleans, strings, functions and None travel along; the arrays beside them get their gradients."""

    def field(t, y, args):
        noise = jax.random.normal(args["key"], y.shape)
        assert args["name"] == "decay"
        return args["rates"][args["index"]] * args["function"](y) + jnp.where(args["flag"], noise, 0.0)

    def loss(rates):
        args = {
            "rates": rates,
            "index": jnp.array(1),
            "key": jax.random.key(0),
            "flag": jnp.array(False),
            "name": "decay",
            "function": jnp.negative,
            "none": None,
        }
        return jnp.sum(aj.solve(field, 0.0, 1.0, jnp.array([2.0]), args, saveat=saveat, adjoint=adjoint, **GRID).ys[-1])

    np.testing.assert_allclose(gradient(loss, np.array([5.0, 0.7]))[0], [0.0, -2.0 * np.exp(-0.7)], rtol=1e-7)


def test_integer_arguments_of_an_allow_int_gradient():
    """A key and an integer that are inputs of the derivative get JAX's float0."""

    def loss(args):
        index, rate = args
        return jnp.sum(
            aj.solve(lambda t, y, a: -a[1] * y * (a[0] > 0), 0.0, 1.0, jnp.array([2.0]), (index, rate), **GRID).ys
        )

    index, rate = jit(jax.grad(loss, allow_int=True))((jnp.array(3), jnp.array(0.7)))
    assert index.dtype == jax.dtypes.float0
    assert rate == pytest.approx(-2.0 * np.exp(-0.7), rel=1e-7)


def test_unused_inputs_get_zeros():
    def loss(y0, unused, t0):
        solution = aj.solve(lambda t, y, args: jnp.ones_like(y), t0, 1.0, y0, unused, saveat=aj.SaveAt(t0=True), **GRID)
        return jnp.sum(solution.ys)

    assert gradient(loss, np.array([2.0]), 3.0, 0.0) == (1.0, 0.0, 0.0)


# Failures


def explosive(t, y, args):
    """y' = theta y^2: infinite at t = 1 / (theta y0)."""
    return args * y**2


def exact_explosive(y0, theta, t):
    return y0 / (1 - theta * y0 * t)


LANES = jnp.array([0.5, 5.0, 0.2])  # the second one explodes at 0.25
FAILING = {
    "adaptive": {"controller": aj.PIDController(rtol=1e-9, atol=1e-9), "max_steps": 128},
    "grid": {"controller": aj.FixedSteps(40), "solver": aj.RK4()},
}


@both
@pytest.mark.parametrize("options", FAILING.values(), ids=FAILING)
def test_a_masked_failed_lane_gives_zero_to_what_is_shared(adjoint, options):
    """Shared theta, t0, t1 and save times get what the good lanes say, and nothing of the lane that exploded."""

    def rows(y0, shared):
        theta, t0, t1, ts = shared
        saveat = aj.SaveAt(ts, t1=True)
        return aj.solve(explosive, t0, t1, y0[None], theta, saveat=saveat, adjoint=adjoint, throw=False, **options)

    def loss(y0s, shared):
        solution = jax.vmap(rows, (0, None))(y0s, shared)
        ys = jnp.where(solution.status[:, None, None] == aj.Status.SUCCESS, solution.ys, 0.0)
        return jnp.sum(jnp.sin(ys)), solution.status

    def exact(y0s, shared):
        theta, t0, t1, ts = shared
        times = jnp.append(ts, t1)
        return sum(jnp.sum(jnp.sin(exact_explosive(y0s[lane], theta, times - t0))) for lane in (0, 2))

    shared = jnp.array(1.0), jnp.array(0.0), jnp.array(1.0), jnp.array([0.1, 0.6])
    got, status = jit(jax.grad(loss, (0, 1), has_aux=True))(LANES, shared)
    assert status[1] != aj.Status.SUCCESS, "This test needs a lane that fails."
    compare(got, gradient(exact, LANES, shared), 1e-6)


@both
@pytest.mark.parametrize("options", FAILING.values(), ids=FAILING)
def test_a_failed_lane_that_is_used_gives_nan(adjoint, options):
    """NaN in everything the failed lane touches; the gradients of the other lanes are those of single solves."""

    def loss(y0, theta):
        y1 = aj.solve(explosive, 0.0, 1.0, y0[None], theta, adjoint=adjoint, throw=False, **options).ys
        return jnp.sum(jnp.sin(y1))

    def exact(y0, theta):
        return jnp.sin(exact_explosive(y0, theta, 1.0))

    got, wanted = (np.stack(jit(jax.vmap(jax.grad(fn, (0, 1)), (0, None)))(LANES, 1.0), axis=-1) for fn in (loss, exact))
    assert np.isnan(got[1]).all()
    for lane in (0, 2):
        compare(tuple(got[lane]), tuple(wanted[lane]), 1e-6)


def explosive_network(t, y, args):
    """The same in every entry; and a product of matrices, so that no solve is one kernel."""
    theta, weights = args
    return theta * y**2 + y @ weights


@both
@pytest.mark.parametrize("options", FAILING.values(), ids=FAILING)
def test_a_failed_solve_by_itself(adjoint, options):
    """One number of it asked for: NaN in everything. None: zeros, and what else the loss is made of."""

    def loss(y0, args, is_asked):
        solution = aj.solve(explosive_network, 0.0, 1.0, y0, args, adjoint=adjoint, throw=False, **options)
        asked = jnp.where(is_asked, solution.ys[0, 1, 0], 0.0)
        return asked + jnp.sum(jnp.sin(y0)) + args[0]

    y0, args = jnp.full((2, 3), 5.0), (jnp.array(1.0), jnp.zeros((3, 3)))
    of_solve = jit(jax.grad(loss, (0, 1)))
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(of_solve(y0, args, True)))
    compare(of_solve(y0, args, False), (jnp.cos(y0), (1.0, jnp.zeros((3, 3)))), 1e-12)


@both
def test_rows_before_a_failure_have_gradients(adjoint):
    """What was reached is differentiable: the rows of a lane that explodes later."""

    def loss(y0, theta, ts):
        options = FAILING["adaptive"] | {"throw": False, "adjoint": adjoint}
        ys = aj.solve(explosive, 0.0, 1.0, y0[None], theta, saveat=aj.SaveAt(ts), **options).ys
        return jnp.sum(jnp.sin(jnp.where(jnp.isnan(ys), 0.0, ys))), ys

    def exact(y0, theta, ts):
        return jnp.sum(jnp.sin(exact_explosive(y0, theta, ts[:2])))

    point = jnp.array(5.0), jnp.array(1.0), jnp.array([0.05, 0.15, 0.7])
    got, ys = jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*point)
    assert np.isnan(ys[2, 0])
    assert np.all(np.isfinite(ys[:2]))
    compare(got, gradient(exact, *point), 1e-6)


@both
def test_max_steps_reached_gives_nan(adjoint):
    def loss(y0, theta):
        y1 = aj.solve(decay, 0.0, 100.0, y0, theta, adjoint=adjoint, max_steps=5, throw=False).ys
        return jnp.sum(y1**2)

    y0, theta = gradient(loss, np.array([2.0, 1.0]), 0.8)
    assert np.all(np.isnan(y0))
    assert np.isnan(theta)


@pytest.mark.parametrize("throw", [True, False])
def test_reverse_integration_that_fails(throw):
    """The reverse solve has no steps left: an error, or NaN; not the gradient as far as it came."""

    def loss(y0):
        adjoint = aj.BacksolveAdjoint(controller=aj.PIDController(rtol=1e-13, atol=1e-13))
        return jnp.sum(aj.solve(decay, 0.0, 30.0, y0, 1.0, adjoint=adjoint, max_steps=64, throw=throw).ys)

    if throw:
        with pytest.raises(Exception, match=r"MAX_STEPS_REACHED at t = .* in the reverse integration"):
            gradient(loss, np.array([2.0]))
    else:
        assert np.isnan(gradient(loss, np.array([2.0]))[0])


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_reverse_integration_of_which_nothing_is_asked_does_not_raise(weight):
    """As in a lane that the loss has masked out: zero, although the state cannot be integrated backward."""

    def loss(y0, theta, weight):
        solution = aj.solve(decay, 0.0, 2.0, y0, theta, adjoint=aj.BacksolveAdjoint(), max_steps=64)
        return weight * jnp.sum(solution.ys)

    if weight:
        with pytest.raises(Exception, match="in the reverse integration"):
            gradient(loss, np.array([1.0]), 30.0, weight)
    else:
        compare(gradient(loss, np.array([1.0]), 30.0, weight)[:2], (np.zeros(1), 0.0), 0.0)


@both
def test_throw_under_jit(adjoint):
    """Gradients of a solve that succeeds are those without throw; one that fails raises from within."""

    def loss(y0, theta, throw):
        options = FAILING["adaptive"] | {"adjoint": adjoint, "throw": throw}
        return jnp.sum(aj.solve(explosive, 0.0, 1.0, y0[None], theta, **options).ys)

    throwing = jax.jit(jax.grad(lambda y0, theta: loss(y0, theta, True), (0, 1)))
    compare(throwing(0.5, 1.0), jax.jit(jax.grad(lambda y0, theta: loss(y0, theta, False), (0, 1)))(0.5, 1.0), 1e-8)
    with pytest.raises(Exception, match=r"at t = 0\.1"):
        jax.block_until_ready(throwing(5.5, 1.0))


# What cannot be differentiated says so


NOT_DIFFERENTIABLE = {
    "rtol": lambda x, adjoint: {"controller": aj.PIDController(rtol=1e-3 * x), "adjoint": adjoint},
    "jump_ts": lambda x, adjoint: {"controller": aj.PIDController(jump_ts=jnp.stack([0.5 * x])), "adjoint": adjoint},
    "dt": lambda x, adjoint: {"controller": aj.ConstantStepSize(0.1 * x), "adjoint": adjoint},
    "dt0": lambda x, adjoint: {"dt0": 0.1 * x, "adjoint": adjoint},
    "StepTo": lambda x, adjoint: {"controller": aj.StepTo(jnp.stack([0.0, 0.4 * x, 1.0])), "adjoint": adjoint},
    "tolerance of the adjoint": lambda x, adjoint: {
        "adjoint": aj.BacksolveAdjoint(controller=aj.PIDController(rtol=1e-3 * x))
    },
}


@pytest.mark.parametrize("name", NOT_DIFFERENTIABLE)
def test_derivatives_of_constants_raise(name):
    """A TypeError that names the thing and the remedy; with the remedy it works."""

    def loss(x, guard):
        options = NOT_DIFFERENTIABLE[name](guard(x), aj.DiscreteAdjoint())
        return jnp.sum(aj.solve(decay, 0.0, 1.0, jnp.array([2.0]), x, max_steps=64, **options).ys)

    with pytest.raises(TypeError, match=r"(?i)(toleranc|dt0|time).*stop_gradient"):
        jax.grad(lambda x: loss(x, lambda x: x))(1.0)
    value = jax.grad(lambda x: loss(x, jax.lax.stop_gradient))(1.0)
    assert value == pytest.approx(-2.0 * np.exp(-1.0), rel=0.1)


FAMILY = {
    **{name: (adjoint, aj.RK4()) for name, adjoint in ADJOINTS.items()},
    "interpolating": (aj.InterpolatingAdjoint(), aj.RK4()),
    "gauss": (aj.GaussAdjoint(), aj.RK4()),
    "reversible": (aj.ReversibleAdjoint(), aj.Reversible(aj.RK4())),
}


def cubed(y0, adjoint, solver):
    options = {"adjoint": adjoint, "solver": solver, "controller": aj.FixedSteps(64)}
    return jnp.sum(aj.solve(decay, 0.0, 1.0, y0, 0.8, **options).ys ** 3)


@pytest.mark.parametrize(("adjoint", "solver"), FAMILY.values(), ids=FAMILY)
def test_reverse_over_reverse_raises_with_the_remedy_which_works(adjoint, solver):
    y0 = jnp.array([2.0])
    with pytest.raises(RuntimeError, match=r"jax\.jacfwd\(jax\.grad\(loss\)\)"):
        jax.grad(lambda y0: jax.grad(cubed)(y0, adjoint, solver)[0])(y0)
    second = jit(jax.jacfwd(jax.grad(cubed)))(y0, adjoint, solver)
    np.testing.assert_allclose(second, [6 * y0 * np.exp(-2.4)], rtol=1e-6)


@pytest.mark.parametrize(("adjoint", "solver"), FAMILY.values(), ids=FAMILY)
def test_forward_mode_raises_with_the_remedy_which_works(adjoint, solver):
    y0 = jnp.array([2.0])

    def forward(adjoint):
        return jax.jvp(lambda y0: cubed(y0, adjoint, solver), (y0,), (jnp.ones(1),))[1]

    in_forward_mode = (
        forward,
        jax.jit(forward, static_argnums=0),
        lambda adjoint: jax.jacfwd(cubed)(y0, adjoint, solver),
        lambda adjoint: jax.linearize(lambda y0: cubed(y0, adjoint, solver), y0)[1](y0),
    )
    for derivative in in_forward_mode:
        with pytest.raises(TypeError, match=r"need adjoint=ForwardMode\(\)"):
            derivative(adjoint)
    assert forward(aj.ForwardMode()) == pytest.approx(12 * np.exp(-2.4), rel=1e-6)


def test_reverse_over_reverse_of_small_systems_raises_too():
    def loss(rate):
        return aj.solve(decay, 0.0, 1.0, 2.0, rate).ys[0]

    with pytest.raises(RuntimeError, match=r"jax\.jacfwd\(jax\.grad\(loss\)\)"):
        jax.grad(jax.grad(loss))(0.8)


def test_reverse_mode_through_forward_mode_raises_with_the_remedy():
    with pytest.raises(RuntimeError, match=r"DiscreteAdjoint\(\)"):
        jax.grad(cubed)(jnp.array([2.0]), aj.ForwardMode(), aj.RK4())


# The scale of the loss


def test_backsolve_does_not_depend_on_the_scale_of_the_loss():
    """Its tolerances hold for a cotangent scaled to one: no digits are lost below atol."""

    def loss(y0, theta, scale):
        adjoint = aj.BacksolveAdjoint(controller=aj.PIDController(rtol=1e-6, atol=1e-6))
        saveat = aj.SaveAt(np.array([0.4, 0.9]), t1=True)
        ys = aj.solve(lambda t, y, args: jnp.sin(args * y), 0.0, 2.0, y0, theta, saveat=saveat, adjoint=adjoint).ys
        return scale * jnp.sum(ys**2)

    scaled_gradient = jit(jax.grad(loss, (0, 1)))
    y0, theta = np.array([0.5, -1.0]), 0.8
    one = scaled_gradient(y0, theta, 1.0)
    for scale in (1e-8, 1e12, 1e-30, -1.0):
        rescaled = jax.tree.map(lambda g, s=scale: np.asarray(g) / s, scaled_gradient(y0, theta, scale))
        compare(rescaled, one, 1e-10)
    assert np.all(np.asarray(scaled_gradient(y0, theta, 0.0)[0]) == 0)


def test_gradients_of_a_step_that_ends_on_its_own_start():
    """A grid whose times repeat: steps of no length change nothing."""
    times = np.array([0.0, 0.0, 0.3, 0.3, 1.0, 1.0])

    def loss(y0, theta):
        options = {
            "controller": aj.StepTo(times),
            "solver": aj.Tsit5(),
            "saveat": aj.SaveAt(np.array([0.0, 0.3, 0.5, 1.0])),
        }
        return rows_measure(aj.solve(decay, 0.0, 1.0, y0, theta, **options).ys)

    def expected(y0, theta):
        trajectory = on_grid(aj.Tsit5().tableau, lambda t, y: -theta * y, [0.0, 0.3, 1.0], y0)
        return rows_measure(jnp.stack([trajectory.at(t) for t in (0.0, 0.3, 0.5, 1.0)]))

    point = jnp.array([2.0, 0.5]), jnp.array(0.8)
    compare(gradient(loss, *point), gradient(expected, *point), 1e-12)
