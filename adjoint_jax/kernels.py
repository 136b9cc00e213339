"""Programs of small arrays as single kernels on a CPU.

XLA:CPU runs a compiled program operation by operation, at 40 to 100 ns each, which is most of the time that a small solve
takes: a step of Tsit5 in two components is 0.1 us of arithmetic in 40 operations. Loops whose bodies touch less than a
kilobyte it compiles whole, control flow and all, to one function instead: it marks them by a frontend attribute of a call
(`small_while_loop_hoisting_pass.cc` in XLA). A call that comes with that attribute is compiled so whatever its size. XLA
marks larger loops by itself since the version in JAX 0.12.

Such a function cannot call what needs a run-time: libraries of linear algebra, callbacks, other devices. So a program is
looked through first, and where it is lowered, the one place that knows the platform and the number of devices, is decided
whether it is marked: that takes a primitive. `jax.extend.core` and `jax.interpreters` are used here alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from adjoint_jax import tree
from adjoint_jax.hoisting import programs_of

_ATTRIBUTES = {"inlineable": "false", "xla_cpu_small_call": "true"}

SINCE, BEFORE = (0, 7), (0, 13)
"""The versions of JAX for which this was tested. Others run small programs operation by operation, or XLA knows better."""
MOST_ENTRIES = 2048
"""Of any array that is computed in a loop: where arrays are larger, operations take longer than starting them, and
XLA:CPU shares them among its threads."""
MOST_LANES = 512
"""Lanes of a `vmap` that are one kernel: with 256, a Lotka-Volterra gradient takes half the time, with 1,024 as long."""
MOST_SUMMED = 2048
"""Entries of an array that is reduced: XLA:CPU gives floating-point reductions of some more to a library."""
MOST_OPERATIONS = 4000
"""Of a program: the time that LLVM takes for a function grows faster than its length."""

_ARITHMETIC = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp complex conj convert_element_type copy copy_p
    cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p
    logistic lt max min mul ne neg nextafter not or pow real reduce_precision rem round rsqrt select_n sign sin sinh sqrt
    square stop_gradient sub tan tanh xor
"""
_SHAPES = """
    argmax argmin broadcast_in_dim concatenate expand_dims gather iota optimization_barrier pad reduce_and reduce_max
    reduce_min reduce_or reduce_prod reduce_sum reshape rev slice split squeeze stack transpose unstack
"""
_PARTS = "dynamic_slice dynamic_update_slice"
"""What reads or writes parts of arrays, which may be large."""
_CONTROL = "closed_call cond custom_jvp_call custom_vjp_call custom_vmap_call jit pjit scan while"
_OF_ANY_SIZE = frozenset((*_PARTS.split(), *_CONTROL.split()))
_ALLOWED = frozenset((*_ARITHMETIC.split(), *_SHAPES.split(), *_OF_ANY_SIZE))


class _Program:
    """A traced function, with those of its constants that are known now; the others are its first operands."""

    def __init__(self, jaxpr: Any, constants: Sequence[Any]):
        self.jaxpr = jaxpr
        self.known = [None if tree.is_traced(constant) else constant for constant in constants]

    def __call__(self, *operands: Any) -> list[Any]:
        left = iter(operands)
        constants = [next(left) if constant is None else constant for constant in self.known]
        return jax.core.eval_jaxpr(self.jaxpr, constants, *left)


def in_one_kernel(function: Callable[..., Any], *operands: Any) -> Any:
    """`function(*operands)`, on a single CPU as one kernel, if it is a program of small arrays that can be one. Lanes of a
    `vmap` are one kernel together, if they are few.

    Forward-mode derivatives and programs on several devices are compiled in the usual way."""
    return _in_one_kernel(function, operands, MOST_ENTRIES)


def _in_one_kernel(function: Callable[..., Any], operands: Sequence[Any], most_entries: int) -> Any:
    traced, known = eqx.partition(tuple(operands), tree.is_traced)
    leaves, structure = jax.tree.flatten(traced)
    results = []

    def flat(*leaves: Array) -> list[Array]:
        outputs = function(*eqx.combine(jax.tree.unflatten(structure, leaves), known))
        arrays, rest = eqx.partition(outputs, eqx.is_array)
        results.append((jax.tree.structure(arrays), rest))
        return jax.tree.leaves(arrays)

    closed = jax.make_jaxpr(flat)(*leaves)
    program, inputs = _Program(closed.jaxpr, closed.consts), [*filter(tree.is_traced, closed.consts), *leaves]
    suits = _suits(closed.jaxpr, inputs, most_entries)
    outputs = _kernel_p.bind(*inputs, program=program) if suits else program(*inputs)
    structure, rest = results[0]
    return eqx.combine(jax.tree.unflatten(structure, outputs), rest)


def _suits(jaxpr: Any, inputs: Sequence[Array], most_entries: int) -> bool:
    if jaxpr.effects or not all(leaf.size for leaf in inputs) or _length(jaxpr) > MOST_OPERATIONS:
        return False
    return _can_be_a_kernel(jaxpr, None, most_entries)


def _can_be_a_kernel(jaxpr: Any, limit: int | None, in_loops: int) -> bool:
    """Whether all its operations can be part of a kernel, and their results are within the limit, or that in loops."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name not in _ALLOWED and not _stays_where_it_is(equation):
            return False
        if name.startswith("reduce_") and equation.invars[0].aval.size > MOST_SUMMED and _is_of_floats(equation):
            return False
        largest = max((variable.aval.size for variable in equation.outvars), default=0)
        if limit is not None and name not in _OF_ANY_SIZE and largest > limit:
            return False
        within = in_loops if name in ("scan", "while") else limit
        if not all(_can_be_a_kernel(called, within, in_loops) for called in programs_of(equation)):
            return False
    return True


def _stays_where_it_is(equation: Any) -> bool:
    """Whether it puts something on the device where the program runs, as older versions of JAX do with NumPy's arrays."""
    return equation.primitive.name == "device_put" and all(device is None for device in equation.params["devices"])


def _is_of_floats(equation: Any) -> bool:
    return jnp.issubdtype(equation.invars[0].aval.dtype, jnp.inexact)


def _length(jaxpr: Any) -> int:
    return sum(1 + sum(map(_length, programs_of(equation))) for equation in jaxpr.eqns)


def _evaluated(*operands: Any, program: _Program) -> list[Any]:
    return program(*operands)


def _marked(*operands: Any, program: _Program) -> list[Any]:
    """The program as a call with the attributes, given to the operation that makes a value.

    XLA ends the process where such a function does not use one of its arguments. So something of each becomes a result, and
    no argument may be a constant, which would be put in its place."""

    @jax.jit
    def call(*operands: Any) -> tuple[list[Any], Array]:
        firsts = (jnp.ravel(operand)[0].real.astype(jnp.float32) for operand in operands)
        return program(*operands), sum(firsts, start=jnp.zeros((), jnp.float32))

    results, used = call(*jax.lax.optimization_barrier(operands))
    set_xla_metadata(used, **_ATTRIBUTES)
    return results


def _lowered_on_cpu(context: Any, *operands: Any, program: _Program) -> Any:
    is_alone = getattr(context.module_context.axis_context, "num_devices", None) == 1
    is_tested = SINCE <= jax.__version_info__[:2] < BEFORE
    function = _marked if is_alone and is_tested else _evaluated
    return mlir.lower_fun(function, multiple_results=True)(context, *operands, program=program)


def _in_lanes(operands: Sequence[Any], axes: Sequence[Any], *, program: _Program) -> tuple[list[Any], list[int]]:
    number = next(operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None)
    lanes = jax.vmap(program, tuple(axes))
    results = lanes(*operands) if number > MOST_LANES else _in_one_kernel(lanes, operands, number * MOST_ENTRIES)
    return results, [0] * len(results)


def _derivative(primals: Sequence[Any], tangents: Sequence[Any], *, program: _Program) -> tuple[list[Any], list[Any]]:
    is_moving = [not isinstance(tangent, ad.Zero) for tangent in tangents]

    def moved(*moving: Any) -> list[Any]:
        left = iter(moving)
        return program(*(next(left) if moves else primal for primal, moves in zip(primals, is_moving, strict=True)))

    moving, along = ([v for v, moves in zip(values, is_moving, strict=True) if moves] for values in (primals, tangents))
    return jax.jvp(moved, moving, along)


_kernel_p = Primitive("adjoint_jax_kernel")
_kernel_p.multiple_results = True
_kernel_p.def_impl(_evaluated)
_kernel_p.def_abstract_eval(lambda *operands, program: [variable.aval for variable in program.jaxpr.outvars])
batching.primitive_batchers[_kernel_p] = _in_lanes
ad.primitive_jvps[_kernel_p] = _derivative
mlir.register_lowering(_kernel_p, mlir.lower_fun(_evaluated, multiple_results=True))
mlir.register_lowering(_kernel_p, _lowered_on_cpu, platform="cpu")
