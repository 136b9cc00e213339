"""Small initial value problems, and solutions and derivatives of them that owe nothing to the package.

`flow` is the true solution (the classical Runge-Kutta method on a fine grid, or a closed form), an ordinary JAX function
of everything. `on_grid` is any explicit Runge-Kutta method on a given grid, written out. JAX differentiates both.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np

import adjoint_jax as aj

FINE = 512


def jit(fn):
    """`jax.jit` that compiles in less time: these programs run for less time than XLA spends on optimising them."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


class Case(NamedTuple):
    """A problem as a function of `theta`, a pytree of arrays: `make(theta)` gives the vector field and args."""

    make: Callable[[Any], tuple[Callable, Any]]
    inputs: dict[str, Any]
    exact: Callable[[dict[str, Any], Any], Any] | None = None

    def flow(self, inputs, t):
        """The state at t."""
        if self.exact is not None:
            return self.exact(inputs, t)
        field, args = self.make(inputs["theta"])
        return flow(lambda t, y: field(t, y, args), inputs["t0"], inputs["y0"], t)


def axpy(h, k, y):
    return jax.tree.map(lambda k, y: y + (h * k).astype(y.dtype), k, y)


def flow(field, t0, y0, t, n=FINE):
    """y(t), from y(t0) = y0, by n steps of the classical Runge-Kutta method; differentiable in t0 and t too."""
    h = (t - t0) / n

    def step(y, i):
        s = t0 + i * h
        k1 = field(s, y)
        k2 = field(s + h / 2, axpy(h / 2, k1, y))
        k3 = field(s + h / 2, axpy(h / 2, k2, y))
        k4 = field(s + h, axpy(h, k3, y))
        return jax.tree.map(lambda y, a, b, c, d: y + (h / 6) * (a + 2 * b + 2 * c + d), y, k1, k2, k3, k4), None

    return jax.lax.scan(step, y0, jnp.arange(n))[0]


class OnGrid(NamedTuple):
    """States at all times of a grid, and the interpolants' coefficients of all steps."""

    grid: np.ndarray
    ys: Any
    coefficients: Any

    def at(self, t):
        """The dense output at a constant time. A time on the grid belongs to the step before."""
        direction = np.sign(self.grid[-1] - self.grid[0])
        i = max(0, int(np.searchsorted(self.grid * direction, float(t) * direction, side="left")) - 1)
        s = (float(t) - self.grid[i]) / (self.grid[i + 1] - self.grid[i])

        def evaluate(y, q):
            return y[i] + jnp.tensordot(s ** np.arange(1, q.shape[1] + 1), q[i], 1)

        return jax.tree.map(evaluate, self.ys, self.coefficients)


def on_grid(tableau, field, grid, y0):
    """The method of a tableau on a grid of constant times, without any of the package's loops."""
    grid = np.asarray(grid)
    rows, nodes = tableau.a + tableau.dense_a, tableau.c + tableau.dense_c

    def step(y, interval):
        start, end = interval
        h = end - start
        stages = []

        def weighted(weights):
            """h times the sum of weighted stages; for each of several sets of weights, if they are columns."""
            used = stages[: len(weights)]
            return jax.tree.map(lambda *ks: h * jnp.tensordot(np.transpose(weights), jnp.stack(ks), 1), *used)

        for row, node in zip(rows, nodes, strict=True):
            state = axpy(1.0, weighted(row), y) if row else y
            stages.append(field(start + node * h, state))
        return axpy(1.0, weighted(tableau.b), y), (y, weighted(tableau.dense))

    y1, (ys, coefficients) = jax.lax.scan(step, y0, (jnp.asarray(grid[:-1]), jnp.asarray(grid[1:])))
    return OnGrid(grid, jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), ys, y1), coefficients)


def measure(y, k=0.0):
    """A nonlinear function of a state, different for every row k."""
    total = 0.0
    for i, leaf in enumerate(jax.tree.leaves(y)):
        parts = jnp.stack([leaf.real, 1.3 * leaf.imag]) if jnp.iscomplexobj(leaf) else leaf
        weights = jnp.arange(1, parts.size + 1).reshape(parts.shape) / parts.size
        total = total + jnp.sum(weights * (jnp.sin(parts + 0.3 * i + 0.7 * k) + 0.25 * (1 + k) * parts**2)).real
    return total


@jax.jit
def rows_measure(ys):
    """`measure` of every row, summed."""
    return jnp.sum(jax.vmap(measure)(ys, jnp.arange(jax.tree.leaves(ys)[0].shape[0], dtype=float)))


def compare(got, expected, rtol, where=""):
    """Every leaf agrees, relative to the largest entry of the leaf."""
    got_leaves, structure = jax.tree_util.tree_flatten_with_path(got)
    expected_leaves, expected_structure = jax.tree.flatten(expected)
    assert jax.tree.structure(got) == expected_structure, structure
    for (path, a), b in zip(got_leaves, expected_leaves, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape, (where, path, a.shape, b.shape)
        scale = np.max(np.abs(b), initial=0.0) + 1e-3
        error = np.max(np.abs(a - b), initial=0.0) / scale
        assert error <= rtol, f"{where}{jax.tree_util.keystr(path)}: relative error {error:.2e} > {rtol:.0e}\n{a}\n{b}"


def running_cost(price):
    """Depends on the time, on the state, on args, and on a value that it closes over."""

    def cost(t, y, args):
        leaves = [leaf for leaf in jax.tree.leaves(args) if eqx.is_inexact_array(leaf)]
        return price * (1 + 0.3 * sum(jnp.sum(leaf.real) for leaf in leaves)) * jnp.cos(t) * measure(y)

    return cost


def times(t0, *inner, t1):
    """Save times: at t0, inside (one of them twice), at t1."""
    return jnp.array([t0, *inner, inner[-1], t1])


# Problems


def _linear():
    matrix = jnp.array([[-0.5, 2.0, 0.1], [-2.0, -0.3, 0.4], [0.2, 0.0, -0.8]])

    def exact(inputs, t):
        return jax.scipy.linalg.expm((t - inputs["t0"]) * inputs["theta"]) @ inputs["y0"]

    inputs = {"theta": matrix, "y0": jnp.array([1.0, -0.5, 2.0]), "t0": 0.3, "t1": 1.9, "ts": times(0.3, 0.7, 1.1, t1=1.9)}
    return Case(lambda theta: (lambda t, y, args: args @ y, theta), inputs, exact)


def lotka_volterra(t, y, args):
    x, z = y
    return jnp.stack([args["a"] * x - args["b"] * x * z, -args["c"] * z + args["d"] * x * z])


LOTKA_VOLTERRA = {"a": jnp.array(1.1), "b": jnp.array(0.6), "c": jnp.array(0.9), "d": jnp.array(0.5)}


def _lotka_volterra():
    inputs = {
        "theta": LOTKA_VOLTERRA,
        "y0": jnp.array([1.2, 2.0]),
        "t0": 0.0,
        "t1": 3.0,
        "ts": times(0.0, 0.5, 2.0, t1=3.0),
    }
    return Case(lambda theta: (lotka_volterra, theta), inputs)


def _backward():
    inputs = {
        "theta": LOTKA_VOLTERRA,
        "y0": jnp.array([1.2, 2.0]),
        "t0": 2.0,
        "t1": -0.5,
        "ts": times(2.0, 1.0, 0.3, t1=-0.5),
    }
    return Case(lambda theta: (lotka_volterra, theta), inputs)


class Pendulum(eqx.Module):
    """A driven pendulum, whose parameters come by all roads: its own leaves, args, and closed-over values."""

    stiffness: Any
    drive: Callable

    def __call__(self, t, y, args):
        return jnp.stack([y[1], -self.stiffness * jnp.sin(y[0]) - args["damping"] * y[1] + self.drive(t)])


def _forced():
    def make(theta):
        def drive(t):
            return theta["amplitude"] * jnp.cos(theta["frequency"] * t)

        return Pendulum(theta["stiffness"], drive), {"damping": theta["damping"], "count": 3}

    theta = {"amplitude": 0.7, "frequency": 1.9, "stiffness": 2.1, "damping": 0.3}
    inputs = {"theta": theta, "y0": jnp.array([0.8, -0.4]), "t0": 0.2, "t1": 2.2, "ts": times(0.2, 0.9, 1.6, t1=2.2)}
    return Case(make, inputs)


class Network(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, t, y, args):
        return self.mlp(jnp.append(y, jnp.sin(t))) - 0.2 * y


def _network():
    mlp = eqx.nn.MLP(3, 2, 5, 1, jnp.tanh, key=jax.random.key(3), dtype=jnp.float64)
    arrays, static = eqx.partition(mlp, eqx.is_array)
    inputs = {"theta": arrays, "y0": jnp.array([0.5, -1.0]), "t0": 0.0, "t1": 1.5, "ts": times(0.0, 0.4, 1.1, t1=1.5)}
    return Case(lambda theta: (Network(eqx.combine(theta, static)), None), inputs)


def _heat():
    """Sixteen points: eigenvalues down to -87, over a time of 1.5."""
    n = 16
    laplacian = jnp.asarray((np.eye(n, k=1) + np.eye(n, k=-1) - 2 * np.eye(n)) * (n + 1) ** 2 / 13.0)

    def field(t, y, args):
        return args * (laplacian @ y)

    def exact(inputs, t):
        return jax.scipy.linalg.expm((t - inputs["t0"]) * inputs["theta"] * laplacian, max_squarings=24) @ inputs["y0"]

    y0 = jnp.asarray(np.sin(np.arange(1, n + 1)))
    inputs = {"theta": jnp.array(1.0), "y0": y0, "t0": 0.0, "t1": 1.5, "ts": times(0.0, 0.02, 0.5, t1=1.5)}
    return Case(lambda theta: (field, theta), inputs, exact)


def _complex():
    """Stuart and Landau's oscillator."""

    def field(t, z, args):
        return (args["rate"] - jnp.abs(z) ** 2) * z + 0.2 * jnp.sin(t)

    theta = {"rate": jnp.array([0.8 + 2.0j, 0.5 - 1.0j])}
    y0 = jnp.array([0.3 + 0.2j, -0.7 + 0.1j])
    inputs = {"theta": theta, "y0": y0, "t0": 0.0, "t1": 1.5, "ts": times(0.0, 0.4, 1.1, t1=1.5)}
    return Case(lambda theta: (field, theta), inputs)


def _mixed():
    """A state of several shapes."""

    def field(t, y, args):
        mean = jnp.mean(y["matrix"])
        return {
            "matrix": jnp.tanh(args[0] @ y["matrix"]) - y["pair"][0],
            "pair": (y["pair"][1] * mean, jnp.stack([jnp.sin(t) * y["pair"][0].sum()])),
        }

    y0 = {
        "matrix": jnp.arange(6.0).reshape(2, 3) / 5,
        "pair": (jnp.array([0.4]), jnp.array([-0.6])),
    }
    theta = [jnp.array([[0.2, -1.0], [0.7, 0.1]])]
    inputs = {"theta": theta, "y0": y0, "t0": 0.1, "t1": 1.4, "ts": times(0.1, 0.5, 0.9, t1=1.4)}
    return Case(lambda theta: (field, theta), inputs)


def _arrays(case):
    return case._replace(inputs=jax.tree.map(jnp.asarray, case.inputs))


PROBLEMS = {
    "linear": _linear,
    "lotka_volterra": _lotka_volterra,
    "backward": _backward,
    "forced": _forced,
    "network": _network,
    "heat": _heat,
    "complex": _complex,
    "mixed": _mixed,
}


def problem(name):
    return _arrays(PROBLEMS[name]())


HEUN_HERMITE = aj.ExplicitRungeKutta(
    aj.ButcherTableau(
        name="Heun with Hermite's interpolant",
        order=2,
        a=((), (1.0,)),
        b=(0.5, 0.5),
        c=(0.0, 1.0),
        dense=((1.0, -0.5, 0.0), (0.0, 1.5, -1.0), (0.0, -1.0, 1.0)),
        dense_order=2,
        b_error=(-0.5, 0.5),
        error_order=1,
        dense_a=((0.5, 0.5),),
        dense_c=(1.0,),
    )
)
"""A small method whose dense output needs a stage of its own."""
