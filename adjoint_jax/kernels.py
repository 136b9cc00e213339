"""Programs of small arrays as single kernels on a CPU.

XLA:CPU runs a compiled program operation by operation, at 40 to 100 ns each, which is most of the time that a small solve
takes: a step of Tsit5 in two components is 0.1 us of arithmetic in 40 operations. Loops whose bodies touch less than a
kilobyte it compiles whole, control flow and all, to one function instead: it marks them by a frontend attribute of a call
(`small_while_loop_hoisting_pass.cc` in XLA). A call that comes with that attribute is compiled so whatever its size. XLA
marks larger loops by itself since the version in JAX 0.12.

Such a function cannot call what needs a run-time: libraries of linear algebra, callbacks, other devices. So a program is
looked through first, and where it is lowered, the one place that knows the platform and the number of devices, is decided
whether it is marked: that takes a primitive. `jax.extend.core` and `jax.interpreters` are used here and in `reverse_only`.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from adjoint_jax import tree
from adjoint_jax.hoisting import contains, operations, programs_of
from adjoint_jax.lanes import on_one_cpu, with_rule

_ALONE = {"inlineable": "false"}
_SMALL = {"xla_cpu_small_call": "true"}

SINCE, BEFORE = (0, 7), (0, 13)
"""The versions of JAX for which this was tested. Others run small programs operation by operation, or XLA knows better."""
MOST_ENTRIES = 2048
"""Of any array that is computed in a loop: where arrays are larger, operations take longer than starting them, and
XLA:CPU shares them among its threads."""
MOST_LANES = 512
"""Lanes of a `vmap` that are one kernel: with 256, a Lotka-Volterra gradient takes half the time, with 1,024 as long."""
LANES_TOGETHER = 128
"""Lanes of a block. Measured with 4,096 Lotka-Volterra solves, one core, in blocks of 128, 256, 512 and all together: 25,
27, 32 and 45 ms, their gradients 93, 104, 121 and 119 ms. All together are no faster on two cores."""
MOST_SUMMED = 2048
"""Entries of an array that is reduced: XLA:CPU gives floating-point reductions of some more to a library."""
MOST_OPERATIONS = 4000
"""Of a program: the time that LLVM takes for a function grows faster than its length."""

_ARITHMETIC = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp complex conj convert_element_type copy
    copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma log
    log1p log2 logistic lt max min mul ne neg nextafter not one_minus_square or pow real reduce_precision rem round
    rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh xor
"""
_SHAPES = """
    argmax argmin broadcast_in_dim concatenate cumprod expand_dims gather iota layout_constraint optimization_barrier pad
    reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reshape rev slice split squeeze stack transpose
    unstack
"""
_PARTS = "dynamic_slice dynamic_update_slice"
"""What reads or writes parts of arrays, which may be large."""
_CONTROL = """
    adjoint_jax_small_kernel adjoint_jax_stored closed_call cond custom_jvp_call custom_linear_solve custom_vjp_call
    custom_vmap_call jit pjit scan while
"""
_LOOPS = frozenset(("scan", "while"))
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
        return tree.as_jax(jax.core.eval_jaxpr(self.jaxpr, constants, *left))


def in_one_kernel(function: Callable[..., Any], *operands: Any) -> Any:
    """`function(*operands)`, on a single CPU as one kernel, if it is a program of small arrays that can be one. Lanes of a
    `vmap` are one kernel together, if they are few.

    Forward-mode derivatives of a program with loops are another kernel; those of others and programs on several devices are
    compiled in the usual way."""
    traced = _Traced.of(function, operands)
    if not _suits(traced.program.jaxpr, MOST_ENTRIES):
        return traced.results(traced.program(*traced.inputs))
    return traced.by(_kernel_p)


def in_a_small_kernel(function: Callable[..., Any], *operands: Any) -> Any:
    """`function(*operands)`, on a single CPU as one kernel, or as part of a larger one that it is computed in. Lanes of a
    `vmap` and derivatives outside of such are compiled in the usual way."""
    traced = _Traced.of(function, operands)
    if not all(operand.size for operand in traced.inputs):
        return traced.results(traced.program(*traced.inputs))
    return traced.results(_small_kernel_p.bind(*traced.inputs, program=traced.program))


def in_blocks(function: Callable[..., Any], *operands: Any) -> Any:
    """`function(*operands)`. Under `vmap` lanes are computed block by block, so that on a CPU what a block holds stays in
    the cache, and lanes of one block do not wait for those of another.

    Lanes decide together within a block alone (see `lanes`). So of two functions, one of which reads what the other has
    recorded, both must be computed so, or neither."""
    traced = _Traced.of(function, operands)
    return traced.results(_blockwise(traced.program)(*traced.inputs))


def in_blocks_of_kernels(function: Callable[..., Any], *operands: Any) -> Any:
    """`in_blocks` of a function that is one kernel, or has some; of another just the function: nothing would be gained, and
    in forward mode values would be computed apart from tangents, and with them."""
    traced = _Traced.of(function, operands)
    has_kernels = contains(traced.program.jaxpr, frozenset((_kernel_p.name,)))
    return traced.results((_blockwise(traced.program) if has_kernels else traced.program)(*traced.inputs))


def _blockwise(program: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    def rule(axis_size: int, in_batched: list[bool], *inputs: Any) -> tuple[list[Any], list[bool]]:
        """Lanes of lanes are in blocks, too, of which a block has all: `jax.jacrev` within a `vmap` reads, in lanes of
        cotangents within those of the `vmap`, what these alone have recorded."""
        lanes = _Lanes(axis_size, tuple(in_batched))
        results = lanes.in_blocks(_blockwise(lanes.of(program)), inputs)
        return results, [True] * len(results)

    of_lanes = with_rule(lambda *inputs: program(*inputs), rule)

    @jax.custom_jvp
    def function(*inputs: Any) -> list[Any]:
        return of_lanes(*inputs)

    @function.defjvp
    def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
        """By itself: lanes may differ in tangents alone."""
        return function(*primals), in_blocks(lambda *given: jax.jvp(program, *given)[1], primals, tangents)

    return function


def is_told() -> bool:
    """Whether XLA is told what to store and what to compile as one kernel: on a single CPU, with the versions of JAX for
    which that was tested."""
    return on_one_cpu() and SINCE <= jax.__version_info__[:2] < BEFORE


def stored(values: Any) -> Any:
    """The same values. On a single CPU each is computed on its own and stored: XLA's fusion would compute it anew in every
    operation that uses it, with all from which it is computed, and within one that writes into a buffer, not in vectors.

    Scalars are, in lanes of a `vmap`, if there are so few that they are one kernel. Of more, what is stored lies further
    away than it takes to compute it anew: the gradient of 10,000 Lorenz lanes would take a third longer."""
    if any(jnp.ndim(value) for value in jax.tree.leaves(eqx.filter(values, tree.is_traced))):
        return _stored(values, _Storing(alone=True, most_lanes=None))
    return _stored(values, _Storing(alone=False, most_lanes=MOST_LANES))


def stored_alone(values: Any) -> Any:
    """`stored` outside of lanes of a `vmap`."""
    return _stored(values, _Storing(alone=True, most_lanes=0))


def stored_in_lanes(values: Any) -> Any:
    """`stored` in lanes of a `vmap`, however many there are and whatever the values are."""
    return _stored(values, _Storing(alone=False, most_lanes=None))


class _Storing(NamedTuple):
    """When values are stored: also where there are no lanes; and of how many lanes at most."""

    alone: bool
    most_lanes: int | None

    def applies(self, lanes: int | None) -> bool:
        return self.alone if lanes is None else self.most_lanes is None or lanes <= self.most_lanes


def _stored(values: Any, when: _Storing) -> Any:
    traced, known = eqx.partition(values, tree.is_traced)
    leaves, structure = jax.tree.flatten(traced)
    same = _stored_p.bind(*leaves, lanes=None, when=when) if leaves else []
    return eqx.combine(jax.tree.unflatten(structure, same), known)


class _Traced(NamedTuple):
    """A call: the program, its operands that are known only when it runs, and what the function returns, where arrays stand
    for those that the program computes."""

    program: _Program
    inputs: list[Any]
    structure: Any
    rest: Any

    @staticmethod
    def of(function: Callable[..., Any], operands: Sequence[Any]) -> "_Traced":
        traced, known = eqx.partition(tuple(operands), tree.is_traced)
        leaves, structure = jax.tree.flatten(traced)
        returned = []

        def flat(*leaves: Any) -> list[Any]:
            outputs = function(*eqx.combine(jax.tree.unflatten(structure, leaves), known))
            arrays, rest = eqx.partition(outputs, eqx.is_array)
            returned.append((jax.tree.structure(arrays), rest))
            return jax.tree.leaves(arrays)

        closed = jax.make_jaxpr(flat)(*leaves)
        inputs = [*filter(tree.is_traced, closed.consts), *leaves]
        return _Traced(_Program(closed.jaxpr, closed.consts), inputs, *returned[0])

    def by(self, primitive: Primitive) -> Any:
        """What the function returns, computed by a primitive of this module."""
        return self.results(primitive.bind(*self.inputs, program=self.program, lanes=None))

    def results(self, outputs: Sequence[Any]) -> Any:
        """What the function returns, given what the program does."""
        return eqx.combine(jax.tree.unflatten(self.structure, outputs), self.rest)


def _suits(jaxpr: Any, most_entries: int) -> bool:
    if (
        jaxpr.effects
        or not all(v.aval.size for v in (*jaxpr.constvars, *jaxpr.invars))
        or operations(jaxpr) > MOST_OPERATIONS
    ):
        return False
    return _can_be_a_kernel(jaxpr, None, most_entries)


def _can_be_a_kernel(jaxpr: Any, limit: int | None, in_loops: int) -> bool:
    """Whether all its operations can be part of a kernel, and their results are within the limit, or that in loops."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name not in _ALLOWED and not (_stays_where_it_is(equation) or _writes_one_part(equation)):
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


def _writes_one_part(equation: Any) -> bool:
    """Whether it is a slice update, as it is written in lanes."""
    return equation.primitive.name == "scatter" and math.prod(equation.invars[1].aval.shape[:-1]) == 1


def _is_of_floats(equation: Any) -> bool:
    return _is_inexact(equation.invars[0].aval)


class _Lanes(NamedTuple):
    """Lanes of a program: how many, and which operands have a value in each, along their first axis."""

    number: int
    differ: tuple[bool, ...]

    def of(self, program: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        """The program for any number of lanes."""
        return jax.vmap(program, tuple(0 if differs else None for differs in self.differ))

    def operands_of_one(self, operands: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
        """Their shapes and dtypes in one lane."""
        pairs = zip(operands, self.differ, strict=True)
        return [jax.ShapeDtypeStruct(operand.shape[differs:], operand.dtype) for operand, differs in pairs]

    def in_blocks(self, program: Callable[..., list[Any]], operands: Sequence[Any]) -> list[Any]:
        """A program for any number of lanes, for all of these, in blocks of equal size, the last one filled up with copies
        of the last lane."""
        blocks = -(-self.number // LANES_TOGETHER)
        if blocks <= 1:
            return program(*operands)
        size = -(-self.number // blocks)

        def cut(operand: Any) -> Array:
            more = blocks * size - self.number
            last = jnp.broadcast_to(operand[-1], (more, *operand.shape[1:]))
            return jnp.concatenate([operand, last]).reshape(blocks, size, *operand.shape[1:])

        def block(own: list[Any]) -> list[Any]:
            return program(*_replaced(operands, self.differ, own))

        results = jax.lax.map(block, [cut(o) for o, differs in zip(operands, self.differ, strict=True) if differs])
        return [result.reshape(-1, *result.shape[2:])[: self.number] for result in results]

    @staticmethod
    def seen(operands: Sequence[Any], axes: Sequence[Any]) -> "tuple[list[Any], _Lanes]":
        """Operands with lanes first, and what `vmap` knows of them."""
        pairs = list(zip(operands, axes, strict=True))
        number = next(operand.shape[axis] for operand, axis in pairs if axis is not None)
        first = [operand if axis is None else jnp.moveaxis(operand, axis, 0) for operand, axis in pairs]
        return first, _Lanes(number, tuple(axis is not None for axis in axes))


def _results(*operands: Any, program: _Program, lanes: _Lanes | None) -> list[Any]:
    """Their shapes and dtypes."""
    of_one = [variable.aval for variable in program.jaxpr.outvars]
    return of_one if lanes is None else [aval.update(shape=(lanes.number, *aval.shape)) for aval in of_one]


def _evaluated(*operands: Any, program: _Program, lanes: _Lanes | None) -> list[Any]:
    return program(*operands) if lanes is None else lanes.of(program)(*operands)


def _marked(*operands: Any, program: _Program) -> list[Any]:
    """The program as a call with the attributes, given to the operation that makes a value.

    XLA ends the process where such a function does not use one of its arguments. So something of each becomes a result, and
    no argument may be a constant, which would be put in its place."""

    @jax.jit
    def call(*operands: Any) -> tuple[list[Any], Array]:
        return program(*operands), functools.reduce(
            jax.lax.add, map(_first_entry, operands), jax.lax.full((), 0.0, jnp.float32)
        )

    results, used = call(*jax.lax.optimization_barrier(operands))
    set_xla_metadata(used, **_ALONE, **_SMALL)
    return results


def _first_entry(operand: Any) -> Array:
    """The first number of an array, in single precision: by operations that are traced in no time."""
    number = operand
    if operand.ndim:
        number = jax.lax.reshape(jax.lax.slice(operand, (0,) * operand.ndim, (1,) * operand.ndim), ())
    return jax.lax.convert_element_type(jax.lax.real(number) if jnp.iscomplexobj(number) else number, jnp.float32)


def _kernel(*operands: Any, program: _Program, lanes: _Lanes | None) -> list[Any]:
    if lanes is None:
        return _marked(*operands, program=program)
    closed = jax.make_jaxpr(lanes.of(program))(*operands)
    suits = lanes.number <= MOST_LANES and _suits(closed.jaxpr, lanes.number * MOST_ENTRIES)
    together = _Program(closed.jaxpr, closed.consts)
    return _marked(*operands, program=together) if suits else together(*operands)


def _derivative(
    primals: Sequence[Any], tangents: Sequence[Any], *, program: _Program, lanes: _Lanes | None
) -> tuple[list[Any], list[Any]]:
    """Where tangents pass through loops, by programs of their own: what lanes differ in may be tangents alone, as in
    `jax.jacfwd`, and values may be wanted before tangents are known, as in `jax.linearize`. What they need of the values
    they compute again, which takes less time than all operations that are not parts of a kernel."""
    moves = [not isinstance(tangent, ad.Zero) for tangent in tangents]
    along = list(compress(tangents, moves))
    of_tangents = _TangentProgram.of(program, lanes, moves, primals)
    if of_tangents is None:
        return _derivative_in_the_usual_way(primals, along, moves, program, lanes)
    results = _kernel_p.bind(*primals, program=program, lanes=lanes)
    dots = iter(_kernel_p.bind(*primals, *along, program=of_tangents.program, lanes=of_tangents.lanes))
    return results, [next(dots) if _is_inexact(r) else np.zeros(r.shape, jax.dtypes.float0) for r in results]


def _derivative_in_the_usual_way(
    primals: Sequence[Any], along: Sequence[Any], moves: Sequence[bool], program: _Program, lanes: _Lanes | None
) -> tuple[list[Any], list[Any]]:
    def moved(*moving: Any) -> list[Any]:
        return _evaluated(*_replaced(primals, moves, moving), program=program, lanes=lanes)

    return jax.jvp(moved, list(compress(primals, moves)), along)


class _TangentProgram(NamedTuple):
    """The program that computes the tangents of another's inexact results, from its operands and the tangents of those that
    move; and its lanes."""

    program: _Program
    lanes: _Lanes | None

    @staticmethod
    def of(
        program: _Program, lanes: _Lanes | None, moves: Sequence[bool], primals: Sequence[Any]
    ) -> "_TangentProgram | None":
        """None where it would not be a kernel."""
        if not is_told() or not contains(program.jaxpr, _LOOPS) or (lanes is not None and lanes.number > MOST_LANES):
            return None

        def dots(primals: Sequence[Any], along: Sequence[Any]) -> list[Any]:
            def moved(*moving: Any) -> list[Any]:
                return list(filter(_is_inexact, program(*_replaced(primals, moves, moving))))

            return jax.jvp(moved, list(compress(primals, moves)), along)[1]

        of_one = list(primals) if lanes is None else lanes.operands_of_one(primals)
        closed = jax.make_jaxpr(dots)(of_one, list(compress(of_one, moves)))
        if not _suits(closed.jaxpr, MOST_ENTRIES):
            return None
        together = lanes and lanes._replace(differ=(*lanes.differ, *compress(lanes.differ, moves)))
        return _TangentProgram(_Program(closed.jaxpr, closed.consts), together)


def _replaced(values: Sequence[Any], are_replaced: Sequence[bool], others: Iterable[Any]) -> list[Any]:
    left = iter(others)
    return [next(left) if is_replaced else value for value, is_replaced in zip(values, are_replaced, strict=True)]


def _is_inexact(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.inexact)


def _takes_attributes(context: Any) -> bool:
    """Whether what XLA is told of a call is known to be heeded: by one device, or by each of several of its own part of a
    `jax.shard_map`, in these versions."""
    around = context.module_context.axis_context
    in_parts = getattr(around, "manual_axes", frozenset())
    is_alone = set(in_parts) == set(around.mesh.axis_names) if in_parts else getattr(around, "num_devices", None) == 1
    return is_alone and SINCE <= jax.__version_info__[:2] < BEFORE


def _register(primitive: Primitive, everywhere: Callable[..., list[Any]], on_cpu: Callable[..., list[Any]]) -> None:
    """What the primitive is, and what it is on a single CPU."""

    def lowered_on_cpu(context: Any, *operands: Any, **parameters: Any) -> Any:
        function = on_cpu if _takes_attributes(context) else everywhere
        return mlir.lower_fun(function, multiple_results=True)(context, *operands, **parameters)

    primitive.multiple_results = True
    primitive.def_impl(everywhere)
    mlir.register_lowering(primitive, mlir.lower_fun(everywhere, multiple_results=True))
    mlir.register_lowering(primitive, lowered_on_cpu, platform="cpu")


def _kernel_in_lanes(
    operands: Sequence[Any], axes: Sequence[Any], *, program: _Program, lanes: _Lanes | None
) -> tuple[list[Any], list[int]]:
    operands, seen = _Lanes.seen(operands, axes)
    if lanes is not None:
        closed = jax.make_jaxpr(lanes.of(program))(*seen.operands_of_one(operands))
        program = _Program(closed.jaxpr, closed.consts)
    results = _kernel_p.bind(*operands, program=program, lanes=seen)
    return results, [0] * len(results)


_kernel_p = Primitive("adjoint_jax_kernel")
_kernel_p.def_abstract_eval(_results)
batching.primitive_batchers[_kernel_p] = _kernel_in_lanes
ad.primitive_jvps[_kernel_p] = _derivative
_register(_kernel_p, _evaluated, _kernel)


def _small_kernel_in_lanes(
    operands: Sequence[Any], axes: Sequence[Any], *, program: _Program
) -> tuple[list[Any], list[int]]:
    results = jax.vmap(program, tuple(axes))(*operands)
    return results, [0] * len(results)


def _derivative_of_small_kernel(
    primals: Sequence[Any], tangents: Sequence[Any], *, program: _Program
) -> tuple[list[Any], list[Any]]:
    moves = [not isinstance(tangent, ad.Zero) for tangent in tangents]
    return _derivative_in_the_usual_way(primals, list(compress(tangents, moves)), moves, program, None)


_small_kernel_p = Primitive("adjoint_jax_small_kernel")
_small_kernel_p.def_abstract_eval(lambda *operands, program: [variable.aval for variable in program.jaxpr.outvars])
batching.primitive_batchers[_small_kernel_p] = _small_kernel_in_lanes
ad.primitive_jvps[_small_kernel_p] = _derivative_of_small_kernel
_register(_small_kernel_p, lambda *operands, program: program(*operands), _marked)


def _same(*values: Any, lanes: int | None, when: _Storing) -> list[Any]:
    del lanes, when
    return list(values)


@jax.jit
def _passed_on(*values: Any) -> list[Any]:
    return list(values)


def _apart(*values: Any, lanes: int | None, when: _Storing) -> list[Any]:
    """The values as they come from a call, which does nothing with them: XLA is told not to write it out where it is
    called, so that what it passes on is stored."""
    if not when.applies(lanes):
        return list(values)
    results = _passed_on(*values)
    set_xla_metadata(results[0], **_ALONE)
    return results


def _stored_together(
    values: Sequence[Any], axes: Sequence[Any], *, lanes: int | None, when: _Storing
) -> tuple[list[Any], list[Any]]:
    values, seen = _Lanes.seen(values, axes)
    together = seen.number * (lanes or 1)
    return _stored_p.bind(*values, lanes=together, when=when), [0 if differ else None for differ in seen.differ]


def _stored_tangents(values: Sequence[Any], tangents: Sequence[Any], **parameters: Any) -> tuple[list[Any], list[Any]]:
    """Derivatives are stored, too: by themselves, as lanes may differ in them alone."""
    return _stored_p.bind(*values, **parameters), _stored_if_any(tangents, **parameters)


def _stored_cotangents(cotangents: Sequence[Any], *values: Any, **parameters: Any) -> list[Any]:
    del values
    return _stored_if_any(cotangents, **parameters)


def _stored_if_any(derivatives: Sequence[Any], **parameters: Any) -> list[Any]:
    moving = [derivative for derivative in derivatives if not isinstance(derivative, ad.Zero)]
    left = iter(_stored_p.bind(*moving, **parameters) if moving else [])
    return [derivative if isinstance(derivative, ad.Zero) else next(left) for derivative in derivatives]


_stored_p = Primitive("adjoint_jax_stored")
_stored_p.def_abstract_eval(_same)
batching.primitive_batchers[_stored_p] = _stored_together
ad.primitive_jvps[_stored_p] = _stored_tangents
ad.primitive_transposes[_stored_p] = _stored_cotangents
_register(_stored_p, _same, _apart)
