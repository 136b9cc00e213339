"""Every example of the expositions of the adjoint method that the project starts from, reproduced."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from problems import compare, jit

import adjoint_jax as aj

TIGHT = {"controller": aj.PIDController(rtol=1e-10, atol=1e-11)}
ADJOINTS = {"discrete": aj.DiscreteAdjoint(), "backsolve": aj.BacksolveAdjoint()}
both = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)


# "The Adjoint Method for Neural ODE's"


def test_euler_chain_of_three_steps_by_hand():
    """z_{n+1} = z_n + h tanh(w z_n + b), L = z_3^2 / 2: back through the chain with pencil and paper."""
    w, b, z0, h = 0.7, -0.2, 1.1, 1 / 3
    zs = [z0]
    for _ in range(3):
        zs.append(zs[-1] + h * np.tanh(w * zs[-1] + b))
    a, in_w, in_b = zs[3], 0.0, 0.0
    for z in (zs[2], zs[1], zs[0]):
        slope = 1 - np.tanh(w * z + b) ** 2
        in_w += a * h * slope * z
        in_b += a * h * slope
        a = a * (1 + h * slope * w)

    def loss(z0, w, b):
        options = {"solver": aj.Euler(), "controller": aj.FixedSteps(3)}
        z = aj.solve(lambda t, z, args: jnp.tanh(args[0] * z + args[1]), 0.0, 1.0, z0, (w, b), **options).ys[0]
        return 0.5 * z**2

    np.testing.assert_allclose(jit(jax.grad(loss, (0, 1, 2)))(z0, w, b), (a, in_w, in_b), rtol=1e-14)


def test_backsolve_recomputes_the_state_backward_in_time():
    """Reversing time brings z(t1) back to z(0), and the gradient needs no stored state: no output of the forward pass but
    z(t1) enters it, so it stays right for a state that only backward integration can know."""

    def field(t, z, args):
        return jnp.stack([z[1], -jnp.sin(z[0])]) * args

    z0 = np.array([1.0, 0.5])
    z1 = np.asarray(aj.solve(field, 0.0, 2.0, z0, 1.3, **TIGHT).ys)[0]
    np.testing.assert_allclose(np.asarray(aj.solve(field, 2.0, 0.0, z1, 1.3, **TIGHT).ys)[0], z0, rtol=1e-8)

    def loss(z0, args, adjoint):
        return jnp.sum(jnp.sin(aj.solve(field, 0.0, 2.0, z0, args, adjoint=adjoint, **TIGHT).ys))

    got, wanted = (jit(jax.grad(functools.partial(loss, adjoint=each), (0, 1)))(z0, 1.3) for each in ADJOINTS.values())
    compare(got, wanted, 1e-7)


@both
def test_lagrangian_with_running_and_terminal_cost(adjoint):
    """x' = p x, J = integral of x^2 / 2 + x(T)^2: the running cost is a state of its own. The multiplier solves
    lambda' = -lambda p + x with lambda(T) = -2 x(T), and dJ/dx0 = -lambda(0), dJ/dp = -integral of lambda x."""
    p, x0, end = 0.4, 1.5, 1.2

    def field(t, state, p):
        x, _ = state
        return p * x, 0.5 * x**2

    def objective(x0, p, end):
        x, cost = aj.solve(field, 0.0, end, (x0, 0.0), p, adjoint=adjoint, **TIGHT).ys
        return cost[0] + x[0] ** 2

    growth = np.exp(2 * p * end)

    def multiplier(t):
        """By variation of constants, lambda(t) = -2 x(T) e^{p(T-t)} - x0 integral from t to T of e^{p(s-t)} e^{ps} ds."""
        return -2 * x0 * np.exp(p * (2 * end - t)) - x0 * np.exp(-p * t) * (growth - np.exp(2 * p * t)) / (2 * p)

    t = np.linspace(0.0, end, 20001)
    in_p = -np.trapezoid(multiplier(t) * x0 * np.exp(p * t), t)
    x1 = x0 * np.exp(p * end)
    hamiltonian = 0.5 * x1**2 + 2 * x1 * p * x1
    got = jit(jax.grad(objective, (0, 1, 2)))(x0, p, end)
    np.testing.assert_allclose(got, (-multiplier(0.0), in_p, hamiltonian), rtol=1e-7)


def test_the_adjoint_along_the_trajectory_is_minus_the_multiplier():
    """a(t) = dJ/dx(t): starting later from the same trajectory gives the adjoint there."""
    p, x0, end = 0.4, 1.5, 1.2

    def objective(x, t):
        return aj.solve(lambda t, x, p: p * x, t, end, x, p, **TIGHT).ys[0] ** 2

    ts = np.array([0.0, 0.5, 1.2])
    multiplier = -2 * x0 * np.exp(p * (2 * end - ts))
    adjoint = jit(jax.vmap(jax.grad(objective)))(x0 * np.exp(p * ts), ts)
    np.testing.assert_allclose(adjoint, -multiplier, rtol=1e-8)


# The thread on the initial value of the adjoint


@both
def test_several_observations_jump(adjoint):
    """z' = A z, L = sum of <w_i, z(t_i)>: a(t0) is the sum of expm(A (t_i - t0))^T w_i, and the last time's w is what the
    adjoint starts from."""
    matrix = np.array([[-0.1, 2.0], [-2.0, -0.1]])
    ts, weights = np.array([0.0, 0.4, 1.0, 1.0, 1.7]), np.arange(10.0).reshape(5, 2) - 4
    z0 = np.array([1.0, -2.0])

    def loss(z0, matrix):
        return jnp.sum(
            weights * aj.odeint(lambda t, z, args: args @ z, z0, ts, matrix, rtol=1e-11, atol=1e-12, adjoint=adjoint)
        )

    in_z0, in_matrix = map(np.asarray, jit(jax.grad(loss, (0, 1)))(z0, matrix))
    wanted = sum(scipy.linalg.expm(matrix * t).T @ w for t, w in zip(ts, weights, strict=True))
    np.testing.assert_allclose(in_z0, wanted, rtol=1e-8)
    for index in np.ndindex(2, 2):
        unit = np.zeros((2, 2))
        unit[index] = 1.0
        rows = [scipy.linalg.expm_frechet(matrix * t, unit * t, compute_expm=False) @ z0 for t in ts]
        assert in_matrix[index] == pytest.approx(np.sum(weights * np.array(rows)), rel=1e-8)


def test_linear_system_against_expm():
    matrix = np.random.default_rng(0).normal(size=(4, 4))
    z0 = np.arange(1.0, 5.0)
    options = {"solver": aj.Dopri8(), "controller": aj.PIDController(rtol=1e-12, atol=1e-12)}
    z1 = np.asarray(aj.solve(lambda t, z, args: args @ z, 0.5, 2.0, z0, matrix, **options).ys)[0]
    np.testing.assert_allclose(z1, scipy.linalg.expm(1.5 * matrix) @ z0, rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 7, 64])
def test_euler_on_a_linear_system_is_a_matrix_power(steps):
    """Value (I + (t1 - t0) / N A)^N z0, and gradients of it, to rounding."""
    matrix, z0 = np.array([[-0.3, 2.0, 0.0], [-2.0, -0.3, 0.5], [0.1, 0.0, -1.0]]), np.array([1.0, -0.5, 2.0])
    w, h = np.array([0.3, -1.0, 2.0]), 1.6 / steps
    step = np.eye(3) + h * matrix

    def loss(z0, matrix):
        options = {"solver": aj.Euler(), "controller": aj.FixedSteps(steps)}
        z1 = aj.solve(lambda t, z, args: args @ z, 0.4, 2.0, z0, matrix, **options).ys[0]
        return z1 @ w, z1

    (in_z0, in_matrix), z1 = jit(jax.grad(loss, (0, 1), has_aux=True))(z0, matrix)
    np.testing.assert_allclose(z1, np.linalg.matrix_power(step, steps) @ z0, rtol=1e-12)
    np.testing.assert_allclose(in_z0, np.linalg.matrix_power(step.T, steps) @ w, rtol=1e-12)
    powers = [np.linalg.matrix_power(step, n) for n in range(steps)]
    wanted = sum(h * np.outer(powers[steps - 1 - n].T @ w, powers[n] @ z0) for n in range(steps))
    np.testing.assert_allclose(in_matrix, wanted, rtol=1e-11, atol=1e-12)


# "Neural ODEs and the Adjoint Method", a course chapter


@both
def test_growth(adjoint):
    """f = theta z, z0 = 1, L = z(1)^2 / 2: dL/dtheta = e^{2 theta}."""

    def loss(theta):
        return 0.5 * aj.solve(lambda t, z, args: args * z, 0.0, 1.0, 1.0, theta, adjoint=adjoint, **TIGHT).ys[0] ** 2

    thetas = np.array([-1.0, 0.0, 1.0])
    np.testing.assert_allclose(jit(jax.vmap(jax.grad(loss)))(thetas), np.exp(2 * thetas), rtol=1e-8)


@both
def test_rotation_with_two_frequencies(adjoint):
    """f = [theta1 y, -theta2 x]: x and y are cosines and sines of sqrt(theta1 theta2) t."""

    def field(t, z, theta):
        return jnp.stack([theta[0] * z[1], -theta[1] * z[0]])

    def loss(theta, z0):
        return jnp.sum(jnp.array([1.0, -2.0]) * aj.solve(field, 0.0, 1.5, z0, theta, adjoint=adjoint, **TIGHT).ys[0])

    def exact(theta, z0):
        omega = jnp.sqrt(theta[0] * theta[1])
        cosine, sine = jnp.cos(1.5 * omega), jnp.sin(1.5 * omega)
        x = z0[0] * cosine + theta[0] / omega * z0[1] * sine
        y = z0[1] * cosine - theta[1] / omega * z0[0] * sine
        return x - 2 * y

    point = np.array([1.3, 0.6]), np.array([0.7, -1.2])
    got, wanted = (jit(jax.grad(fn, (0, 1)))(*point) for fn in (loss, exact))
    compare(got, wanted, 1e-8)


@both
def test_saturating_growth(adjoint):
    """f = tanh(theta z): sinh(theta z(t)) = sinh(theta z0) e^{theta t}."""

    def loss(theta, z0, t1):
        return (
            0.5 * aj.solve(lambda t, z, args: jnp.tanh(args * z), 0.0, t1, z0, theta, adjoint=adjoint, **TIGHT).ys[0] ** 2
        )

    def exact(theta, z0, t1):
        return 0.5 * (jnp.arcsinh(jnp.sinh(theta * z0) * jnp.exp(theta * t1)) / theta) ** 2

    point = 0.8, 0.5, 1.4
    got, wanted = (jit(jax.grad(fn, (0, 1, 2)))(*point) for fn in (loss, exact))
    compare(got, wanted, 1e-8)


def growth_gradient(adjoint, **options):
    """dL/dtheta at theta = 1, and z(1), of z' = theta z, L = z(1)^2 / 2."""

    def loss(theta):
        z1 = aj.solve(lambda t, z, args: args * z, 0.0, 1.0, 1.0, theta, adjoint=adjoint, **options).ys[0]
        return 0.5 * z1**2, z1

    return map(float, jit(jax.grad(loss, has_aux=True))(1.0))


def test_euler_demonstration_prints_its_figures():
    """100 steps and theta = 1: z(1) = 2.7048 and, exactly for these steps, dL/dtheta = 7.2436; true: 2.7183, 7.3891."""
    options = {"solver": aj.Euler(), "controller": aj.FixedSteps(100)}
    gradient, z1 = growth_gradient(aj.DiscreteAdjoint(), **options)
    assert f"{z1:.4f}" == "2.7048"
    assert f"{gradient:.4f}" == "7.2436"
    assert gradient == pytest.approx(1.01**199, rel=1e-13)


def test_euler_demonstration_continuous_adjoint():
    """At tight tolerances the continuous adjoint gives the true 7.3891; discretised by n steps of Euler it converges to
    that with order one, and for 100 steps it is not the discrete adjoint's 7.2436."""
    gradient, z1 = growth_gradient(aj.BacksolveAdjoint(), **TIGHT)
    assert f"{z1:.4f}" == "2.7183"
    assert f"{gradient:.4f}" == "7.3891"

    def error(n):
        gradient, _ = growth_gradient(aj.BacksolveAdjoint(), solver=aj.Euler(), controller=aj.FixedSteps(n))
        return abs(gradient - np.exp(2.0))

    errors = [error(n) for n in (100, 200, 400)]
    assert abs(np.exp(2.0) - errors[0] - 7.2436) > 1e-3
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2.0, rtol=0.05)


@both
def test_continuous_reverse_behind_a_coarse_forward(adjoint):
    """A tight reverse solve starts from z(1) of Euler's 100 steps: only the discrete adjoint knows 7.2436."""
    reverse = aj.BacksolveAdjoint(aj.Tsit5(), aj.PIDController(rtol=1e-10, atol=1e-10))
    discrete = isinstance(adjoint, aj.DiscreteAdjoint)
    options = {"solver": aj.Euler(), "controller": aj.FixedSteps(100)}
    gradient, z1 = growth_gradient(adjoint if discrete else reverse, **options)
    # a(t) = z(1) e^{1 - t} and the backward z(t) = z(1) e^{t - 1}: their product is z(1)^2 all along.
    assert gradient == pytest.approx(1.01**199 if discrete else z1**2, rel=1e-9)


class SmallNetwork(eqx.Module):
    """2-16-2 with tanh."""

    mlp: eqx.nn.MLP

    def __call__(self, t, y, args):
        return self.mlp(y)


@both
def test_sine_by_a_small_network_trained_with_either_adjoint(adjoint):
    """odeint with RK4 on 10 times, mean squared error against a sine, Adam: one argument switches the adjoint."""
    ts = np.linspace(0.0, 2.0, 10)
    target = np.stack([np.sin(ts), np.cos(ts)], axis=-1)
    model = SmallNetwork(eqx.nn.MLP(2, 2, 16, 1, jnp.tanh, key=jax.random.key(0), dtype=jnp.float64))
    options = {"solver": aj.RK4(), "controller": aj.StepTo(ts)}

    def loss(model, adjoint):
        return jnp.mean((aj.odeint(model, target[0], ts, adjoint=adjoint, **options) - target) ** 2)

    optimiser = optax.adam(3e-2)

    @eqx.filter_jit
    def train(model, adjoint):
        arrays, static = eqx.partition(model, eqx.is_inexact_array)

        def step(carry, _):
            arrays, state = carry
            value, gradient = jax.value_and_grad(lambda a: loss(eqx.combine(a, static), adjoint))(arrays)
            updates, state = optimiser.update(gradient, state)
            return (optax.apply_updates(arrays, updates), state), (value, gradient)

        (arrays, _), (values, gradients) = jax.lax.scan(step, (arrays, optimiser.init(arrays)), None, length=150)
        return values, jax.tree.map(lambda leaf: leaf[0], gradients)

    values, first = train(model, adjoint)
    assert values[0] > 0.1
    assert values[-1] < 0.01 * values[0]

    def plain(arrays):
        """RK4 written out."""
        f = eqx.combine(arrays, eqx.filter(model, eqx.is_inexact_array, inverse=True)).mlp
        h, y, rows = ts[1] - ts[0], target[0], [target[0]]
        for _ in range(9):
            k1 = f(y)
            k2 = f(y + h / 2 * k1)
            k3 = f(y + h / 2 * k2)
            k4 = f(y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            rows.append(y)
        return jnp.mean((jnp.stack(rows) - target) ** 2)

    wanted = jit(jax.grad(plain))(eqx.filter(model, eqx.is_inexact_array))
    compare(first, wanted, 1e-11 if isinstance(adjoint, aj.DiscreteAdjoint) else 5e-3)


# "Neural Ordinary Differential Equations", a note


@both
def test_augmented_state_gradients_at_once(adjoint):
    """dL/dz0, dL/dt0, dL/dt1 and dL/dtheta from one reverse solve, of z' = theta z cos t."""

    def loss(z0, t0, t1, theta):
        z = aj.solve(lambda t, z, args: args * z * jnp.cos(t), t0, t1, z0, theta, adjoint=adjoint, **TIGHT).ys[0]
        return jnp.sum(jnp.sin(z))

    def exact(z0, t0, t1, theta):
        return jnp.sum(jnp.sin(z0 * jnp.exp(theta * (jnp.sin(t1) - jnp.sin(t0)))))

    point = jnp.array([1.0, -0.6]), jnp.array(0.3), jnp.array(2.1), jnp.array(0.7)
    got, wanted = (jit(jax.grad(fn, (0, 1, 2, 3)))(*point) for fn in (loss, exact))
    compare(got, wanted, 1e-8)


@pytest.mark.parametrize(
    ("forward", "reverse"),
    [
        ((aj.Dopri8(), aj.FixedSteps(10)), (aj.Bosh3(), aj.PIDController(rtol=1e-7, atol=1e-8))),
        ((aj.Vern7(), aj.PIDController(rtol=1e-10, atol=1e-10)), (aj.RK4(), aj.FixedSteps(100))),
        ((aj.Tsit5(), aj.PIDController(rtol=1e-9, atol=1e-9)), (aj.Midpoint(), aj.ConstantStepSize(0.0005))),
    ],
    ids=["grid-adaptive", "adaptive-grid", "adaptive-constant"],
)
def test_one_solver_forward_and_another_backward(forward, reverse):
    """The black boxes need not know of each other."""

    def loss(z0, theta):
        options = {"solver": forward[0], "controller": forward[1], "adjoint": aj.BacksolveAdjoint(*reverse)}
        ys = aj.solve(
            lambda t, z, args: jnp.tanh(args * z), 0.0, 1.4, z0, theta, saveat=aj.SaveAt(np.array([0.5, 1.4])), **options
        ).ys
        return jnp.sum(ys**2)

    def exact(z0, theta):
        return sum((jnp.arcsinh(jnp.sinh(theta * z0) * jnp.exp(theta * t)) / theta) ** 2 for t in (0.5, 1.4))

    got, wanted = (jit(jax.grad(fn, (0, 1)))(0.5, 0.8) for fn in (loss, exact))
    compare(got, wanted, 1e-6)


def test_parameter_gradients_by_vector_jacobian_products_only():
    """The reverse solve never asks for more than one vjp of the field at a time: a field that only has a vjp, of which
    neither a Jacobian nor a jvp can be taken, is enough."""

    @jax.custom_vjp
    def product(matrix, z):
        return matrix @ z

    def backward(residuals, g):
        matrix, z = residuals
        return jnp.outer(g, z), matrix.T @ g

    product.defvjp(lambda matrix, z: (matrix @ z, (matrix, z)), backward)
    matrix, z0 = np.array([[-0.1, 2.0], [-2.0, -0.1]]), np.array([1.0, -2.0])

    def loss(matrix, adjoint):
        return jnp.sum(aj.solve(lambda t, z, args: product(args, z), 0.0, 1.0, z0, matrix, adjoint=adjoint, **TIGHT).ys)

    wanted = jit(jax.grad(lambda matrix: jnp.sum(jax.scipy.linalg.expm(matrix) @ z0)))(matrix)
    for adjoint in ADJOINTS.values():
        got = jit(jax.grad(functools.partial(loss, adjoint=adjoint)))(matrix)
        np.testing.assert_allclose(got, wanted, rtol=1e-7)
