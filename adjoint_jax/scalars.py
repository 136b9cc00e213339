"""Programs of few numbers, written out in scalars.

A system of two or three equations is a few dozen additions and multiplications. As arrays of two or three numbers it is
mostly slices and concatenations: kernels that cost more than the arithmetic, and in lanes of a `vmap` loops over a last
axis of two or three. In scalars nothing of that is left, and in lanes every operation is one loop over all of them.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from adjoint_jax import tree
from adjoint_jax.hoisting import CALLS, Hoisted, hoisted, interpreted
from adjoint_jax.tree import Arrays, Scalar

Grid = np.ndarray
"""An array of objects, each of them a scalar: what stands for an array in a program that is written out."""

CHEAP, DEAR = 1, 16
COSTS = {
    **dict.fromkeys(("abs", "add", "and", "conj", "convert_element_type", "eq", "ge", "gt", "imag", "integer_pow"), CHEAP),
    **dict.fromkeys(("is_finite", "le", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "real", "select_n"), CHEAP),
    **dict.fromkeys(("sign", "square", "stop_gradient", "sub"), CHEAP),
    **dict.fromkeys(("acos", "asin", "atan", "atan2", "cbrt", "ceil", "clamp", "complex", "cos", "cosh", "div"), DEAR),
    **dict.fromkeys(("erf", "exp", "exp2", "expm1", "floor", "log", "log1p", "logistic", "pow", "rem", "round"), DEAR),
    **dict.fromkeys(("rsqrt", "sin", "sinh", "sqrt", "tan", "tanh"), DEAR),
}
"""Operations that are done entry by entry, and about how many additions cost as much."""
MOVES = frozenset({"broadcast_in_dim", "dynamic_slice", "gather", "reshape", "rev", "slice", "squeeze", "transpose"})
"""Operations that only choose among the entries of their first operand."""
IN_NUMPY: dict[str, Callable[[Grid, dict[str, Any]], Grid]] = {
    "reshape": lambda grid, parameters: grid.reshape(parameters["new_sizes"]),
    "slice": lambda grid, parameters: grid[
        tuple(
            map(slice, parameters["start_indices"], parameters["limit_indices"], parameters["strides"] or [1] * grid.ndim)
        )
    ],
    "squeeze": lambda grid, parameters: grid.squeeze(parameters["dimensions"]),
}
"""Those that nearly every program has, as functions of the operand and the operation's parameters: JAX would compile a
program for each, at 10 to 20 ms."""
FOLDS = {"reduce_sum": jax.lax.add, "reduce_prod": jax.lax.mul, "reduce_max": jax.lax.max, "reduce_min": jax.lax.min}
"""Operations that combine the entries along some axes."""
MOST_ENTRIES = 256
"""Of any array in a program that is written out."""


class Components(NamedTuple):
    """The structure and the shapes of a pytree of arrays, which can be taken apart into its entries and joined again."""

    structure: Any
    shapes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(arrays: PyTree[Any]) -> "Components":
        leaves, structure = jax.tree.flatten(arrays)
        return Components(structure, tuple(leaf.shape for leaf in leaves))

    @property
    def number(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def largest(self) -> int:
        """Entries of the largest array."""
        return max(math.prod(shape) for shape in self.shapes)

    def apart(self, arrays: PyTree[Any]) -> tuple[Array, ...]:
        """The entries of leaf after leaf. What axes the arrays have more, before their own, the entries have."""
        entries = []
        for leaf, shape in zip(jax.tree.leaves(arrays), self.shapes, strict=True):
            rows = leaf.reshape(*leaf.shape[: leaf.ndim - len(shape)], math.prod(shape))
            entries += jnp.unstack(rows, axis=-1)
        return tuple(entries)

    def joined(self, entries: Sequence[Array]) -> Arrays:
        """The arrays of these entries."""
        left = iter(entries)
        stacks = [jnp.stack([next(left) for _ in range(math.prod(shape))], axis=-1) for shape in self.shapes]
        leaves = [s.reshape(*s.shape[:-1], *shape) for s, shape in zip(stacks, self.shapes, strict=True)]
        return jax.tree.unflatten(self.structure, leaves)

    def grids(self, entries: Sequence[Array]) -> PyTree[Grid]:
        """The same as arrays of objects."""
        left = iter(entries)
        return jax.tree.unflatten(self.structure, [_filled(shape, islice(left, math.prod(shape))) for shape in self.shapes])


class ScalarProgram(Hoisted):
    """A function of (t, y, args), where y and args are tuples of scalars, that computes with scalars alone."""

    largest: int = eqx.field(static=True)
    """Entries of the largest array of the state that the scalars stand for."""
    in_lanes: bool = eqx.field(static=True)
    """Whether it is known that there are many lanes."""
    in_blocks: bool = eqx.field(static=True)
    """Whether these are to be computed block by block, in loops that record something and in those that read it."""

    @property
    def cost(self) -> int:
        """About how many additions take as long as one evaluation."""
        return sum(COSTS.get(equation.primitive.name, DEAR) for equation in self.jaxpr.eqns)


class _NotInScalarsError(Exception):
    """Something in a program is not arithmetic, selection or reduction of entries."""


def written_out(
    function: Hoisted, t: Scalar, y: Arrays, args: PyTree[Any], *, in_lanes: bool, in_blocks: bool
) -> ScalarProgram | None:
    """A function in scalars; None if it cannot be written so.

    The program's args are the entries of two tuples: of the inexact arrays that the function closes over, and of those in
    its args. What else there is in either, it closes over."""
    (closed, closed_rest), (own, own_rest) = (
        eqx.partition(values, eqx.is_inexact_array) for values in (function.arrays, args)
    )
    of_y, of_closed, of_own = (Components.of(values) for values in (y, closed, own))

    def program(t: Scalar, entries: tuple[Array, ...], parameters: tuple[tuple[Array, ...], ...]) -> tuple[Array, ...]:
        constants = eqx.combine(of_closed.grids(parameters[0]), closed_rest)
        arguments = eqx.combine(of_own.grids(parameters[1]), eqx.filter(own_rest, eqx.is_array))
        inputs = [_grid(value) for value in jax.tree.leaves((constants, t, of_y.grids(entries), arguments))]
        return tuple(jnp.asarray(entry) for grid in _evaluated(function.jaxpr, inputs) for entry in grid.flat)

    parameters = of_closed.apart(closed), of_own.apart(own)
    try:
        scalar = hoisted(program, t, of_y.apart(y), parameters)
    except _NotInScalarsError:
        return None
    return ScalarProgram(scalar.arrays, scalar.program, scalar.structure, of_y.largest, in_lanes, in_blocks)


def _evaluated(jaxpr: Any, values: Sequence[Grid]) -> list[Grid]:
    results = interpreted(jaxpr, values, lambda equation, operands: _outputs(equation, [_grid(o) for o in operands]))
    return [_grid(result) for result in results]


def _outputs(equation: Any, operands: list[Grid]) -> list[Grid]:
    """What an equation computes."""
    name, parameters = equation.primitive.name, equation.params
    if any(variable.aval.size == 0 for variable in (*equation.invars, *equation.outvars)):
        raise _NotInScalarsError("an array without entries")
    if name in CALLS:
        closed = parameters["jaxpr"]
        return _evaluated(closed.jaxpr, [*map(_grid, closed.consts), *operands])
    if name in IN_NUMPY:
        return [IN_NUMPY[name](operands[0], parameters)]
    if not tree.is_traced(*(entry for operand in operands for entry in operand.flat)):
        return [_grid(value) for value in _at_once(equation, *map(_array, operands))]
    if name in MOVES:
        positions = _array(_grid(np.arange(operands[0].size).reshape(operands[0].shape)))
        chosen = _at_once(equation, positions, *map(_array, operands[1:]))[0]
        return [_filled(chosen.shape, (_entry(operands[0], position) for position in chosen.ravel().tolist()))]
    if name in COSTS:
        operands = list(np.broadcast_arrays(*operands))
        rows = zip(*(operand.flat for operand in operands), strict=True)
        return [_filled(operands[0].shape, (equation.primitive.bind(*row, **parameters) for row in rows))]
    if name in FOLDS:
        return [_folded(FOLDS[name], operands[0], parameters["axes"])]
    if name == "dot_general":
        contracted, batched = parameters["dimension_numbers"]
        if any(map(len, batched)):
            raise _NotInScalarsError("a batched product")
        dtype = equation.outvars[0].aval.dtype
        left, right = (_filled(o.shape, [jnp.asarray(entry, dtype) for entry in o.flat]) for o in operands)
        product = np.tensordot(left, right, contracted)
        return [_filled(np.shape(product), np.ravel(product))]
    if name == "concatenate":
        return [np.concatenate(operands, parameters["dimension"])]
    if name == "stack":
        return [np.stack(operands, parameters["axis"])]
    if name == "unstack":
        rows = np.moveaxis(operands[0], parameters["axis"], 0)
        return [rows[i, ...] for i in range(len(rows))]
    raise _NotInScalarsError(name)


def _at_once(equation: Any, *values: np.ndarray) -> list[np.ndarray]:
    """What an equation computes of known values."""
    if sum(variable.aval.size for variable in equation.outvars) > MOST_ENTRIES:
        raise _NotInScalarsError(equation.primitive.name)
    with jax.ensure_compile_time_eval():
        results = equation.primitive.bind(*values, **equation.params)
    return [np.asarray(result) for result in (results if equation.primitive.multiple_results else [results])]


def _entry(grid: Grid, position: int) -> Any:
    if not 0 <= position < grid.size:
        raise _NotInScalarsError("an index out of bounds")
    return grid.flat[position]


def _folded(combine: Callable[[Any, Any], Any], grid: Grid, axes: tuple[int, ...]) -> Grid:
    kept = [axis for axis in range(grid.ndim) if axis not in axes]
    shape = tuple(grid.shape[axis] for axis in kept)
    rows = grid.transpose(*kept, *axes).reshape(math.prod(shape), -1)
    return _filled(shape, (functools.reduce(combine, row) for row in rows))


def _grid(value: Any) -> Grid:
    """An array's entries: numbers where they are known, otherwise scalars of the program."""
    if isinstance(value, np.ndarray) and value.dtype == object:
        return value
    if jnp.size(value) > MOST_ENTRIES or jnp.issubdtype(jnp.result_type(value), jax.dtypes.extended):
        raise _NotInScalarsError("an array that is large or not of numbers")
    if tree.is_traced(value):
        return _filled(value.shape, [value] if value.ndim == 0 else jnp.unstack(jnp.ravel(value)))
    known = np.asarray(value)
    return _filled(known.shape, [known.dtype.type(entry) for entry in known.flat])


def _array(grid: Grid) -> np.ndarray:
    """The array of known entries."""
    if tree.is_traced(*grid.flat):
        raise _NotInScalarsError("an index that is not known")
    return np.array(grid.tolist(), grid.flat[0].dtype if grid.size else None)


def _filled(shape: tuple[int, ...], entries: Iterable[Any]) -> Grid:
    grid = np.empty(shape, object)
    for position, entry in zip(np.ndindex(*shape), entries, strict=True):
        grid[position] = entry
    return grid
