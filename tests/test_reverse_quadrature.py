"""The parameters' integral of the continuous adjoints: from nodes of accepted steps, or along the stages."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import Program

import adjoint_jax as aj
from adjoint_jax.adjoints import reverse_ode
from adjoint_jax.integrate import Integrator
from adjoint_jax.problem import Problem
from adjoint_jax.solvers.accompanied import Accompanied, Along

STEPS = 50
CONTROLLERS = {"fixed": aj.FixedSteps(STEPS), "adaptive": aj.PIDController(1e-9, 1e-9)}
ADJOINTS = {
    "backsolve": aj.BacksolveAdjoint(),
    "backsolve, so many steps": aj.BacksolveAdjoint(controller=aj.FixedSteps(2 * STEPS)),
    "interpolating": aj.InterpolatingAdjoint(),
}


def network(t, y, args):
    (first, second), shift = args, jnp.sin(t)
    return {"a": jnp.tanh(y["a"] @ first + shift) @ second - y["b"], "b": y["a"] * y["b"]}


def running_cost(t, y, args):
    return jnp.sum((y["a"] @ args[0]) ** 2) * t


def inputs(samples, width, dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(0), 3)
    matrices = (3, width), (width, 3)
    args = tuple(0.4 * jax.random.normal(key, shape, dtype) for key, shape in zip(keys, matrices, strict=False))
    y = jax.random.normal(keys[2], (samples, 3), dtype)
    return {"a": y, "b": 0.1 * y}, args


def loss(args, y0, adjoint, controller, solver=None):
    """Of rows inside, of the end, and of a cost."""
    saveat = aj.SaveAt(jnp.array([0.3, 0.8]), t1=True)
    options = {"adjoint": adjoint, "controller": controller, "saveat": saveat, "running_cost": running_cost}
    solution = aj.solve(network, 0.0, 1.0, y0, args, solver=solver or aj.Tsit5(), **options)
    return solution.cost + sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(solution.ys))


def gradient(adjoint, controller, along, monkeypatch):
    monkeypatch.setattr(reverse_ode, "_pays_along_stages", lambda problem, solver: along)
    y0, args = inputs(4, 5)
    return jax.jit(jax.grad(functools.partial(loss, adjoint=adjoint, controller=controller), (0, 1)))(args, y0)


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_along_the_stages_it_is_what_the_nodes_give(adjoint, controller, monkeypatch):
    """The same numbers added up in another order; on the same steps, as the integral is no part of the error norm."""
    chosen = ADJOINTS[adjoint], CONTROLLERS[controller]
    along, after = (gradient(*chosen, way, monkeypatch) for way in (True, False))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13), along, after)


@pytest.mark.parametrize("adjoint", ["backsolve", "interpolating"])
def test_along_the_stages_it_is_the_derivative_of_the_solution(adjoint, monkeypatch):
    """By forward mode, through no reverse ODE at all."""
    found = gradient(ADJOINTS[adjoint], CONTROLLERS["adaptive"], True, monkeypatch)
    y0, args = inputs(4, 5)
    of_solution = functools.partial(loss, adjoint=aj.ForwardMode(), controller=CONTROLLERS["adaptive"])
    expected = jax.jacfwd(of_solution, (0, 1))(args, y0)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8), found, expected)


@pytest.mark.parametrize("solver", [aj.RK4(), aj.Dopri5(), aj.Bosh3()])
@pytest.mark.parametrize("lanes", [False, True])
def test_an_accompanied_method_integrates_as_its_quadrature_does(solver, lanes):
    """A method whose last stage is the next step's first, too; and on the same adaptive steps."""
    controller = aj.FixedSteps(20) if solver.error_order is None else aj.PIDController(1e-6, 1e-6)

    def field(t, y, args):
        return -y * jnp.cos(t)

    def by_quadrature(y0):
        square = {"running_cost": lambda t, y, args: y**2}
        solution = aj.solve(field, 0.0, 2.0, y0, solver=solver, controller=controller, **square)
        return solution.cost, solution.stats.accepted

    def along(y0):
        method = Accompanied(solver, lambda t, y, args: Along(field(t, y, None), y**2), jnp.zeros(()))
        problem = Problem(field, None, None, y0, jnp.zeros(()), jnp.array(2.0))
        outcome = Integrator(method, controller.prepare(jnp.float64), None, 4096)(problem, [], jnp.array(True))
        return outcome.state.integral, outcome.report.stats.accepted

    y0 = jnp.array([1.0, 2.0, 30.0])
    (found, steps), (cost, of_cost) = (jax.vmap(f)(y0) if lanes else f(y0[0]) for f in (along, by_quadrature))
    np.testing.assert_allclose(found, cost, rtol=1e-13)
    np.testing.assert_array_equal(steps, of_cost)


def test_a_parameter_without_a_derivative_spoils_nothing_else():
    """The integral is no part of what must be finite for the reverse integration to go on."""
    y0, args = inputs(4, 5)

    def end(args, root):
        def field(t, y, args):
            return {"a": network(t, y, args)["a"] + 0.0 * jnp.sqrt(root), "b": y["b"]}

        options = {"controller": aj.FixedSteps(5), "solver": aj.RK4(), "adjoint": aj.BacksolveAdjoint(max_drift=jnp.inf)}
        return jnp.sum(aj.solve(field, 0.0, 1.0, y0, args, **options).ys["a"])

    of_args, of_root = jax.grad(end, (0, 1))(args, 0.0)
    assert np.isnan(of_root)
    assert all(np.all(np.isfinite(leaf)) for leaf in of_args)


def test_hessian_vector_product_along_the_stages():
    y0, args = inputs(4, 5)

    def slope(adjoint, args):
        return jax.grad(functools.partial(loss, adjoint=adjoint, controller=aj.FixedSteps(30)))(args, y0)

    direction = jax.tree.map(jnp.cos, args)
    found, expected = (
        jax.jvp(functools.partial(slope, adjoint), (args,), (direction,))[1]
        for adjoint in (aj.BacksolveAdjoint(), aj.DiscreteAdjoint())
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8), found, expected)


def matrix_products(samples, widths):
    """In the program of the gradient of a network on so many samples, by RK4 on a given grid."""
    shapes = list(itertools.pairwise(widths))
    y0 = jnp.ones((samples, widths[0]) if samples else widths[0], jnp.float32)

    def field(t, y, args):
        for matrix in args:
            y = jnp.tanh(y @ matrix)
        return y

    def end(args):
        options = {"controller": aj.FixedSteps(10), "solver": aj.RK4(), "adjoint": aj.BacksolveAdjoint()}
        return jnp.sum(aj.solve(field, 0.0, 1.0, y0, args, throw=False, **options).ys)

    program = Program(jax.jit(jax.grad(end)).lower([jnp.ones(shape, jnp.float32) for shape in shapes]).compile())
    return sum(instruction.operation == "dot" for instruction in program.all())


@pytest.mark.parametrize(("samples", "width", "along"), [(64, 16, True), (2, 1024, False), (64, 1024, True)])
def test_the_choice_follows_sizes(samples, width, along, monkeypatch):
    """A batch of few samples and many parameters is best served by one derivative for all nodes."""
    chosen = matrix_products(samples, (4, width, width, 4))
    monkeypatch.setattr(reverse_ode, "_pays_along_stages", lambda problem, solver: along)
    assert chosen == matrix_products(samples, (4, width, width, 4))
    monkeypatch.setattr(reverse_ode, "_pays_along_stages", lambda problem, solver: not along)
    assert chosen != matrix_products(samples, (4, width, width, 4))


def test_a_stage_on_the_way_back_is_linearised_once():
    """A layer takes a product for its value, one for the state's derivative, one for the parameters'. A step of RK4 forward
    stands in the program twice, once to find where a state is no longer finite."""
    forward, back = 2 * 4 * 3, 4 * 9
    assert back <= matrix_products(64, (4, 16, 16, 4)) <= forward + back
