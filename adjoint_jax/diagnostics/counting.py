"""Counts of what the gradient of a solve does with the vector field, as the compiled program executes it.

An adjoint is handed the problem that it solves: `CountingAdjoint` hands on the same problem with a field that is counted.
So nothing of the user's has to be wrapped, and programs that are not counted have no trace of it.
"""

import functools
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, PyTree

from adjoint_jax import tree
from adjoint_jax.adjoints.adjoint import AbstractAdjoint, Inputs, Run, Saved
from adjoint_jax.adjoints.forward_mode import ForwardMode
from adjoint_jax.integrate import Report
from adjoint_jax.problem import Split, VectorField
from adjoint_jax.tree import Arrays, Scalar


class Counts(NamedTuple):
    """How often something was executed; the lanes of a `vmap` count one by one.

    - `evaluations`: the vector field, where its value is used; of a `Split`, each of its parts.
    - `state_products`: its vector-Jacobian product with respect to y, or its Jacobian-vector product in forward mode.
    - `parameter_products`: the same with respect to its own arrays and `args`, of all of them at once.
    """

    evaluations: int
    state_products: int
    parameter_products: int


class Counter:
    """Counts calls from compiled programs. Callbacks may come from several threads."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def __call__(self, t: Array, finite: Array) -> np.ndarray:
        """Count the lanes of a batched call."""
        del t
        with self._lock:
            self.count += math.prod(finite.shape)
        return np.ones(finite.shape, bool)


class Tally:
    """The counters of one program."""

    def __init__(self) -> None:
        self.evaluations, self.state_products, self.parameter_products = Counter(), Counter(), Counter()

    @property
    def counts(self) -> Counts:
        """What was counted; only what has finished, so wait for the program's results first."""
        return Counts(self.evaluations.count, self.state_products.count, self.parameter_products.count)


class CountingAdjoint(AbstractAdjoint):
    """Another adjoint, with a tally of what it does with the vector field. A reverse integration that fails raises,
    whatever `throw` says: the tally is for diagnosis."""

    adjoint: AbstractAdjoint
    tally: Tally = eqx.field(static=True)

    def prepare(self, dtype: DTypeLike) -> "CountingAdjoint":
        return CountingAdjoint(self.adjoint.prepare(dtype), self.tally)

    def solve(self, inputs: Inputs, run: Run) -> tuple[Saved, Report]:
        problem = inputs.problem
        mark = pushed_forward if isinstance(self.adjoint, ForwardMode) else pulled_back

        def counted(field: VectorField) -> VectorField:
            return CountedField(field, self.tally, mark)

        field = problem.vector_field
        counting = field.mapped(counted) if isinstance(field, Split) else counted(field)
        problem = eqx.tree_at(lambda p: p.vector_field, problem, counting, is_leaf=lambda x: x is field)
        return self.adjoint.solve(Inputs(problem, inputs.requests), run._replace(throw=True))


Mark = Callable[[Counter, Scalar, Arrays], Arrays]


class CountedField(eqx.Module):
    """A field with marks on its inputs, through which derivatives pass, and on its value. `mark`: `pulled_back` or
    `pushed_forward`."""

    field: VectorField
    tally: Tally = eqx.field(static=True)
    mark: Mark = eqx.field(static=True)

    def __call__(self, t: Scalar, y: Arrays, args: PyTree[Any]) -> Arrays:
        parameters, rest = eqx.partition((self.field, args), eqx.is_inexact_array)
        if jax.tree.leaves(parameters):
            parameters = self.mark(self.tally.parameter_products, t, parameters)
        field, args = eqx.combine(parameters, rest)
        y = self.mark(self.tally.state_products, t, y)
        return _evaluated(self.tally.evaluations, t, field(t, y, args))


def _noted(counter: Counter, t: Scalar, values: Arrays) -> Arrays:
    """The values, counted if, and only if, the program uses them: the callback is pure, so it dies with its result. It is
    shown something of t and of the values, so that it sees every axis over which `vmap` maps either."""
    shape = jax.ShapeDtypeStruct((), bool)
    counted = jax.pure_callback(counter, shape, t, tree.all_finite(values), vmap_method="broadcast_all")
    return tree.map(lambda leaf: jnp.where(counted, leaf, jnp.zeros_like(leaf)), values)


def _along(t: Scalar, values: Arrays) -> Arrays:
    """The values, mapped over by `vmap` wherever t is: a value and its tangent must agree on that."""
    return tree.map(lambda leaf: jnp.where(jnp.isnan(t), leaf, leaf), values)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _evaluated(counter: Counter, t: Scalar, values: Arrays) -> Arrays:
    """The values, counted; their derivatives are not."""
    return _noted(counter, t, values)


@_evaluated.defjvp
def _evaluated_jvp(counter: Counter, primals: Any, tangents: Any) -> tuple[Arrays, Arrays]:
    return _evaluated(counter, *primals), _along(primals[0], tangents[1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def pushed_forward(counter: Counter, t: Scalar, values: Arrays) -> Arrays:
    """The values, whose tangents are counted."""
    del counter
    return _along(t, values)


@pushed_forward.defjvp
def _pushed_forward_jvp(counter: Counter, primals: Any, tangents: Any) -> tuple[Arrays, Arrays]:
    return pushed_forward(counter, *primals), _noted(counter, primals[0], tangents[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def pulled_back(counter: Counter, t: Scalar, values: Arrays) -> Arrays:
    """The values, whose cotangents are counted."""
    del counter
    return _along(t, values)


def _pulled_back_forward(counter: Counter, t: Scalar, values: Arrays) -> tuple[Arrays, Scalar]:
    return pulled_back(counter, t, values), t


def _pulled_back_backward(counter: Counter, t: Scalar, cotangent: Arrays) -> tuple[Scalar, Arrays]:
    return jnp.zeros_like(t), _noted(counter, t, cotangent)


pulled_back.defvjp(_pulled_back_forward, _pulled_back_backward)
