"""Stacks of many scalars, in one kernel.

A system of twenty equations, each written by itself, ends in a stack of twenty scalars. XLA fuses a stack with what
computes its parts on CPU if there are few; of a longer one, every part is a kernel of its own, in each stage of every step.
Selections among the parts fuse however many they are.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from adjoint_jax.hoisting import CALLS, Hoisted, computed, hoisted, interpreted
from adjoint_jax.tree import Arrays, Scalar

MOST_FUSED = 8
"""Parts of a stack that XLA fuses."""
MOST_SELECTED = 64
"""Parts of a stack for which selections, whose number is its square, take less time than kernels."""


def with_selections(function: Hoisted, t: Scalar, y: Arrays, args: PyTree[Any]) -> Hoisted:
    """The function of (t, y, args), with selections for long stacks of scalars if it has any."""
    if not _has_long_stacks(function.jaxpr):
        return function
    evaluate = functools.partial(_evaluated, function.jaxpr)
    return hoisted(functools.partial(function.evaluated, evaluate), t, y, args)


def _has_long_stacks(jaxpr: Any) -> bool:
    """Also in functions that it calls, and nothing with a derivative of its own, which would be lost."""
    if any(equation.primitive.name.startswith("custom_") for equation in jaxpr.eqns):
        return False
    return any(_is_long_stack(equation) or _calls_long_stacks(equation) for equation in jaxpr.eqns)


def _calls_long_stacks(equation: Any) -> bool:
    return equation.primitive.name in CALLS and _has_long_stacks(equation.params["jaxpr"].jaxpr)


def _is_long_stack(equation: Any) -> bool:
    is_stack = equation.primitive.name in ("stack", "concatenate") and MOST_FUSED < len(equation.invars) <= MOST_SELECTED
    return is_stack and all(part.aval.size == 1 for part in equation.invars)


def _evaluated(jaxpr: Any, constants: Sequence[Any], *inputs: Any) -> list[Any]:
    return interpreted(jaxpr, [*constants, *inputs], _outputs)


def _outputs(equation: Any, operands: list[Any]) -> Sequence[Any]:
    """What an equation computes."""
    if _is_long_stack(equation):
        return [_selected(operands).reshape(equation.outvars[0].aval.shape)]
    if _calls_long_stacks(equation):
        closed = equation.params["jaxpr"]
        return _evaluated(closed.jaxpr, closed.consts, *operands)
    return computed(equation, operands)


def _selected(parts: Sequence[Array]) -> Array:
    """One after the other along one axis."""
    index, first = jnp.arange(len(parts)), jnp.reshape(parts[0], ())
    row = jnp.broadcast_to(first, index.shape)
    for i, part in enumerate(parts[1:], 1):
        row = jnp.where(index == i, jnp.reshape(part, ()), row)
    return row
