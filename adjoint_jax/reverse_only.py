"""Values that have derivatives in reverse mode alone.

JAX refuses forward mode through `jax.custom_vjp` with an error that names no remedy. Both modes begin with tangents; only
where they are evaluated, lowered or computed in lanes is it known that they will not be transposed. So the tangent of such
a value is an operation that can be transposed, and nothing else, which takes a primitive: `jax.extend.core` and
`jax.interpreters` are used here and in `kernels`.
"""

from typing import Any, TypeVar

import equinox as eqx
import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from adjoint_jax import tree

Values = TypeVar("Values")


def reverse_only(values: Values, remedy: str) -> Values:
    """The values; differentiating them in forward mode raises `TypeError` with the remedy, when it is traced or lowered."""

    def marked(leaf: Any) -> Any:
        is_concerned = tree.is_traced(leaf) and eqx.is_inexact_array(leaf)
        return _identity_p.bind(leaf, remedy=remedy) if is_concerned else leaf

    return jax.tree.map(marked, values)


def gradient_in_reverse(inputs: Values) -> Values:
    """The inputs of a solve with a derivative of its own."""
    return reverse_only(
        inputs,
        "Forward-mode derivatives of a solve, as of jax.jvp, jax.jacfwd or jax.linearize, need adjoint=ForwardMode(): the "
        "other adjoints are reverse mode. Forward mode over reverse mode, as jax.jvp(jax.grad(loss), (x,), (v,)) or "
        "jax.hessian(loss), works with all of them.",
    )


def _with_tangent(primals: Any, tangents: Any, *, remedy: str) -> tuple[Any, Any]:
    """The value is not marked again: what is derived in reverse may be derived forward then."""
    (value,), (tangent,) = primals, tangents
    return value, tangent if isinstance(tangent, ad.Zero) else _tangent_p.bind(tangent, remedy=remedy)


def _refused(*operands: Any, remedy: str) -> Any:
    del operands
    raise TypeError(remedy)


def _in_lanes(operands: Any, axes: Any, *, remedy: str) -> tuple[Any, Any]:
    return _identity_p.bind(*operands, remedy=remedy), axes[0]


def _same(operand: Any, *, remedy: str) -> Any:
    del remedy
    return operand


_identity_p = Primitive("adjoint_jax_reverse_only")
_identity_p.def_impl(_same)
_identity_p.def_abstract_eval(_same)
batching.primitive_batchers[_identity_p] = _in_lanes
ad.primitive_jvps[_identity_p] = _with_tangent
mlir.register_lowering(_identity_p, mlir.lower_fun(_same, multiple_results=False))

_tangent_p = Primitive("adjoint_jax_tangent_of_reverse_only")
_tangent_p.def_impl(_refused)
_tangent_p.def_abstract_eval(_same)
batching.primitive_batchers[_tangent_p] = _refused
ad.deflinear2(_tangent_p, lambda cotangent, operand, *, remedy: [cotangent])
mlir.register_lowering(_tangent_p, _refused)
