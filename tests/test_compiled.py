"""A guard against slower programs that needs no clock: the kernels of compiled loops, and the evaluations of a gradient.

Bounds are a little above what there is. What needs more of either had better gain something by it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import Program
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


@functools.cache
def kernels(stepping, quantity, lanes):
    """Kernels in the innermost loop that has most of them, and in all loops."""
    function = functools.partial(solve, stepping=stepping, adjoint=aj.DiscreteAdjoint())
    function = jax.grad(function) if quantity == "gradient" else function
    many = jax.tree.map(lambda leaf: jnp.linspace(0.9, 1.1, 256) * leaf, PARAMETERS)
    compiled = jax.jit(jax.vmap(function) if lanes else function).lower(many if lanes else PARAMETERS).compile()
    counts = Program(compiled).kernels().values()
    return max(counts), sum(counts)


@pytest.mark.parametrize(
    ("stepping", "quantity", "lanes", "in_one", "in_all"),
    [
        ("adaptive", "forward", False, 45, 85),
        ("adaptive", "gradient", False, 47, 185),
        ("adaptive", "forward", True, 55, 120),
        ("adaptive", "gradient", True, 58, 245),
        ("given grid", "forward", False, 10, 16),
        ("given grid", "gradient", False, 21, 64),
    ],
)
def test_kernels_of_loops(stepping, quantity, lanes, in_one, in_all):
    most, total = kernels(stepping, quantity, lanes)
    assert most <= in_one
    assert total <= in_all


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
