"""Quadratures over a step."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adjoint_jax import tree
from adjoint_jax.interpolation import Interpolant
from adjoint_jax.problem import Problem
from adjoint_jax.tree import Arrays, Scalar


class Nodes(NamedTuple):
    """A quadrature over one step: the integral of g(t, y(t)) is the sum of weights[i] * g(times[i], states[i])."""

    times: Float[Array, "*steps nodes"]
    states: Arrays
    weights: Float[Array, "*steps nodes"]

    def flattened(self) -> "Nodes":
        """Nodes of many steps as those of one."""
        shape = self.times.shape
        return tree.map(lambda leaf: leaf.reshape(math.prod(shape), *leaf.shape[len(shape) :]), self)


def cost_of(problem: Problem, nodes: Nodes) -> Arrays:
    """The integral of the running cost over one step, or over many along leading axes of the nodes; () without one.
    Nodes of no weight count as nothing, whatever the cost there."""
    if problem.running_cost is None:
        return ()
    times, states, weights = nodes.flattened()
    rates = jax.vmap(problem.rates)(times, states).cost
    return tree.contract(weights, tree.keep_rows(weights != 0, rates))


class Rule(NamedTuple):
    """A quadrature rule on [0, 1]."""

    points: Float[np.ndarray, " nodes"]
    weights: Float[np.ndarray, " nodes"]

    def on(self, interpolant: Interpolant, begin: Scalar, end: Scalar) -> Nodes:
        """Its nodes between two times, with the states of an interpolant."""
        times = begin + (end - begin) * jnp.asarray(self.points, begin.dtype)
        states = jax.vmap(interpolant.evaluate)(times)
        return Nodes(times, states, (end - begin) * jnp.asarray(self.weights, begin.dtype))

    def over(self, interpolant: Interpolant) -> Nodes:
        """Its nodes on the whole step of an interpolant."""
        return self.on(interpolant, interpolant.start, interpolant.end)


def gauss_legendre(count: int) -> Rule:
    """The Gauss-Legendre rule, exact for polynomials of degree 2 count - 1."""
    points, weights = np.polynomial.legendre.leggauss(count)
    return Rule((1 + points) / 2, weights / 2)


def kronrod() -> Rule:
    """Kronrod's extension of the three-point rule: four more points, exact for polynomials of degree 11.

    The points are the zeros of Legendre's polynomial P_3 and of Stieltjes' polynomial E_4 = x^4 - 10/9 x^2 + 155/891; the
    weights follow from exactness. A. S. Kronrod, "Nodes and weights of quadrature formulas" (1965).
    """
    stieltjes = np.sqrt(np.roots([1.0, -10 / 9, 155 / 891]))
    outer = np.concatenate([stieltjes, [np.sqrt(3 / 5)]])
    points = np.sort(np.concatenate([outer, -outer, [0.0]]))
    moments = [0.0 if degree % 2 else 2.0 / (degree + 1) for degree in range(7)]
    return Rule((1 + points) / 2, np.linalg.solve(np.vander(points, increasing=True).T, moments) / 2)
