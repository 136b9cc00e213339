"""Small systems in scalars: programs written out compute what they computed, and solves in scalars are solves in arrays."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import jit

import adjoint_jax as aj
from adjoint_jax.adjoints.adjoint import Inputs, Run
from adjoint_jax.adjoints.componentwise import solve_in_scalars
from adjoint_jax.hoisting import hoisted
from adjoint_jax.integrate import Integrator
from adjoint_jax.lanes import in_lanes
from adjoint_jax.problem import Problem
from adjoint_jax.saveat import Requests
from adjoint_jax.scalars import Components, written_out
from adjoint_jax.tolerance import rms_norm

MATRIX = jnp.array([[0.3, -1.0, 0.2], [0.5, 0.1, -0.4], [0.0, 0.7, -0.2]])
Y = jnp.array([0.7, -0.4, 1.3])
ARGS = {"k": jnp.array([0.6, 1.4]), "order": jnp.array([2, 0, 1]), "name": "three"}


def elementwise(t, y, args):
    x = jnp.where(y > 0, jnp.tanh(y), y**2) / (1 + args["k"][0])
    return jnp.clip(x, -0.5, 0.9) * jnp.sin(t) + jnp.maximum(y, 0.1) ** args["k"][1] - jnp.abs(y)


def moving(t, y, args):
    first, *rest = y
    parts = jnp.stack([rest[0], first * t, jnp.concatenate([y[::-1], y[1:2]])[2]])
    return jnp.roll(parts, 1) + y[jnp.array([2, 0, 1])] + jnp.broadcast_to(args["k"][1], 3) + y.reshape(1, 3)[0, :]


def contracting(t, y, args):
    return MATRIX @ y + jnp.outer(y, y) @ jnp.eye(3)[1] * jnp.sum(y) - jnp.max(y) * jnp.prod(args["k"]) + y @ MATRIX


def in_another_precision(t, y, args):
    product = jnp.dot(y.astype(jnp.float32), y.astype(jnp.float32), preferred_element_type=jnp.float64)
    return y * product.astype(y.dtype)


def of_pytrees(t, y, args):
    return {"x": y["x"] * args["k"].sum() - y["z"], "z": jnp.linalg.norm(y["x"]) * t}


@pytest.mark.parametrize(
    ("field", "y"),
    [
        (elementwise, Y),
        (moving, Y),
        (contracting, Y),
        (in_another_precision, Y),
        (of_pytrees, {"x": Y, "z": jnp.array(0.5)}),
    ],
    ids=["elementwise", "moving", "contracting", "in another precision", "pytrees"],
)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_a_program_written_out_computes_the_same(field, y, dtype):
    t, y = jnp.asarray(0.3, dtype), jax.tree.map(lambda leaf: leaf.astype(dtype), y)
    args = {**ARGS, "k": ARGS["k"].astype(dtype)}
    function = hoisted(field, t, y, args)
    program = written_out(function, t, y, args, in_lanes=False, in_blocks=False)
    assert program is not None
    assert all(v.aval.shape == () for equation in program.jaxpr.eqns for v in equation.outvars)
    state, closed, own = (
        Components.of(v) for v in (y, *(eqx.filter(v, eqx.is_inexact_array) for v in (function.arrays, args)))
    )

    def in_scalars(t, y, args):
        parameters = (eqx.filter(v, eqx.is_inexact_array) for v in (function.arrays, args))
        entries = tuple(components.apart(v) for components, v in zip((closed, own), parameters, strict=True))
        return state.joined(program(t, state.apart(y), entries))

    def gradient(field):
        def total(t, y, k):
            return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(field(t, y, {**args, "k": k})))

        return jax.grad(total, argnums=(0, 1, 2))(t, y, args["k"])

    tolerance = 50 * jnp.finfo(dtype).eps
    for ours, theirs in ((in_scalars(t, y, args), field(t, y, args)), (gradient(in_scalars), gradient(field))):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def index_from_the_state(t, y, args):
    return y[jnp.argmax(y)] * y


def loop(t, y, args):
    return jax.lax.fori_loop(0, 3, lambda i, x: 0.5 * x, y)


def solving(t, y, args):
    return jnp.linalg.solve(MATRIX, y)


def custom_derivative(t, y, args):
    return jax.nn.relu(y)


def sum_of_nothing(t, y, args):
    return y + jnp.sum(y[3:])


@pytest.mark.parametrize("field", [index_from_the_state, loop, solving, custom_derivative, sum_of_nothing])
def test_what_is_no_arithmetic_is_left_in_arrays(field):
    t = jnp.array(0.3)
    assert written_out(hoisted(field, t, Y, ARGS), t, Y, ARGS, in_lanes=False, in_blocks=False) is None


class Oscillator(eqx.Module):
    """Van der Pol's, forced, with a leaf and args, its state in arrays of different shapes."""

    stiffness: jax.Array

    def __call__(self, t, y, args):
        x, v = y["x"][0], y["v"]
        return {"x": v[None], "v": args["mu"][0] * (1 - x**2) * v - self.stiffness * x + args["mu"][1] * jnp.sin(t)}


def other_norm(error):
    """The default norm under another name, for which a system is left in arrays."""
    return rms_norm(error)


LANES = {
    "x": jnp.array([[0.5], [1.5], [0.1]]),
    "v": jnp.array([0.0, -0.4, 1.0]),
    "mu": jnp.array([[0.5, 1.5], [1.0, 0.2], [2.0, 0.1]]),
    "stiffness": jnp.array([1.0, 0.8, 1.5]),
    "t0": jnp.array([0.0, 0.1, -0.2]),
    "t1": jnp.array([2.0, 2.5, 3.0]),
    "ts": jnp.array([[0.2, 0.9, 0.9, 1.9], [0.4, 0.5, 2.1, 2.5], [-0.2, 0.0, 1.0, 2.9]]),
}
WEIGHTS = jnp.array([0.7, -0.3, 0.5, 1.1])


def solve(inputs, norm, adjoint=aj.DiscreteAdjoint(), saveat=aj.SaveAt(t1=True)):
    return aj.solve(
        Oscillator(inputs["stiffness"]),
        inputs["t0"],
        inputs["t1"],
        {"x": inputs["x"], "v": inputs["v"]},
        {"mu": inputs["mu"], "kind": "van der Pol"},
        controller=aj.PIDController(1e-7, 1e-7, norm=norm),
        max_steps=100,
        adjoint=adjoint,
        saveat=saveat,
    )


def everything(inputs, norm):
    """A loss of all that can be saved; and all of that."""
    ts = inputs["ts"]
    fn = aj.SaveAt(ts, fn=lambda t, y, args: t * y["x"] * args["mu"])
    saveat = {"rows": aj.SaveAt(ts, t1=True), "fn": fn, "steps": aj.SaveAt(steps=True), "dense": aj.SaveAt(dense=True)}
    solution = solve(inputs, norm, saveat=saveat)
    inside = solution.evaluate(inputs["t0"] + 1.1)
    steps = jnp.nansum(solution.ys["steps"]["x"])
    rows = solution.ys["rows"]["x"][:4, 0] @ WEIGHTS + jnp.sum(WEIGHTS @ solution.ys["fn"]) + solution.ys["rows"]["v"][-1]
    return rows + steps + inside["v"], (solution.ys, inside, solution.stats)


def last(inputs, norm, adjoint):
    y1 = solve(inputs, norm, adjoint).ys
    return y1["x"].sum() + y1["v"].sum() ** 2


def all_close(ours, theirs, tolerance):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_lanes_in_scalars_are_lanes_in_arrays():
    def of(norm):
        return jit(jax.vmap(jax.value_and_grad(lambda inputs: everything(inputs, norm), has_aux=True)))(LANES)

    all_close(of(rms_norm), of(other_norm), 1e-9)


def test_checkpoints_of_lanes_in_scalars():
    def of(norm, adjoint):
        return jit(jax.vmap(jax.grad(lambda inputs: last(inputs, norm, adjoint))))(LANES)

    all_close(of(rms_norm, aj.DiscreteAdjoint(checkpoints=3)), of(other_norm, aj.DiscreteAdjoint()), 1e-9)


def test_lanes_with_a_tolerance_for_each_leaf():
    """Tolerances like the state have no meaning for its entries: such systems stay in arrays."""

    def last_x(lane):
        y0, rtol = {"x": lane["x"], "v": lane["v"]}, {"x": 1e-8, "v": 1e-6}
        field, args = Oscillator(lane["stiffness"]), {"mu": lane["mu"]}
        return aj.solve(field, 0.0, 1.0, y0, args, controller=aj.PIDController(rtol, 1e-8)).ys["x"][0, 0]

    lanes = jit(jax.vmap(last_x))(LANES)
    single = [jit(last_x)(jax.tree.map(lambda leaf, i=i: leaf[i], LANES)) for i in range(3)]
    np.testing.assert_allclose(lanes, single, rtol=1e-12)


@pytest.mark.slow
def test_lanes_of_lanes_and_second_derivatives():
    def curvature(inputs, norm):
        tangent = {
            name: jnp.ones_like(leaf) if name in ("x", "mu") else jnp.zeros_like(leaf) for name, leaf in inputs.items()
        }
        gradient = jax.grad(lambda inputs: last(inputs, norm, aj.DiscreteAdjoint()))
        return jax.jvp(gradient, (inputs,), (tangent,))[1]["stiffness"]

    pairs = jax.tree.map(lambda leaf: jnp.stack([leaf[:2], leaf[1:]]), LANES)
    nested = jit(jax.vmap(jax.vmap(lambda inputs: curvature(inputs, rms_norm))))(pairs)
    single = jit(jax.vmap(lambda inputs: curvature(inputs, other_norm)))(LANES)
    np.testing.assert_allclose(nested, jnp.stack([single[:2], single[1:]]), rtol=1e-7, atol=1e-7)


def lotka_volterra(t, y, p):
    return jnp.stack([p[0] * y[0] - p[1] * y[0] * y[1], -p[2] * y[1] + p[3] * y[0] * y[1]])


def ring(t, y, p):
    return jnp.roll(y, 1) - y


def expensive(t, y, p):
    return jnp.sin(jnp.exp(jnp.cos(jnp.tanh(y)))) * p[:2]


@pytest.mark.parametrize(
    ("field", "size", "controller", "solver", "small"),
    [
        (lotka_volterra, 2, aj.PIDController(1e-6, 1e-6), aj.Tsit5(), True),
        (lotka_volterra, 2, aj.FixedSteps(10), aj.RK4(), True),
        (lotka_volterra, 2, aj.PIDController(1e-6, 1e-6, norm=other_norm), aj.Tsit5(), False),
        (lotka_volterra, 2, aj.PIDController(1e-6, jnp.array([1e-6, 1e-8])), aj.Tsit5(), False),
        (lotka_volterra, 2, aj.PIDController([1e-6], 1e-6), aj.Tsit5(), False),
        (lotka_volterra, 2, aj.PIDController(1e-6, 1e-6), aj.Rodas5P(), False),
        (ring, 8, aj.PIDController(1e-6, 1e-6), aj.Tsit5(), True),
        (ring, 9, aj.PIDController(1e-6, 1e-6), aj.Tsit5(), False),
        (expensive, 2, aj.PIDController(1e-6, 1e-6), aj.Tsit5(), False),
    ],
)
def test_which_systems_are_small(field, size, controller, solver, small):
    times, y0, p = (jnp.array(0.0), jnp.array(1.0)), jnp.ones(size), jnp.array([1.5, 1.0, 3.0, 1.0])
    problem = Problem(hoisted(field, times[0], y0, p), None, p, y0, *times)
    inputs = Inputs(problem, Requests((), states=False, dense=False))
    run = Run(Integrator(solver, controller.prepare(jnp.float64), None, 100), jnp.array(True), False)
    assert (solve_in_scalars(inputs, run, aj.DiscreteAdjoint()) is not None) == small


def test_a_function_for_one_and_a_function_for_lanes():
    function = in_lanes(lambda x, y: (x + y, jnp.zeros(())), lambda x, y: (x + y, jnp.ones(())))
    one, x = jnp.array(1.0), jnp.arange(3.0)
    assert function(one, one) == (2.0, 0.0)
    total, chosen = jax.vmap(function, (0, None))(x, one)
    np.testing.assert_array_equal(total, x + 1)
    np.testing.assert_array_equal(chosen, jnp.ones(3))
    derivative = jax.vmap(lambda x: jax.jvp(lambda x: function(x * x, one)[0], (x,), (one,))[1])(x)
    np.testing.assert_array_equal(derivative, 2 * x)
    np.testing.assert_array_equal(jax.jacfwd(lambda x: function(x, one)[0] ** 2)(x), np.diag(2 * (x + 1)))
