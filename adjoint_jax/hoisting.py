"""Functions as pytrees that hold every array they close over, so that derivatives have no other road to take."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from adjoint_jax.tree import Arrays, Scalar

Function = Callable[[Scalar, PyTree[Any], PyTree[Any]], PyTree[Any]]
"""Of a time, a state and args."""

Rule = Callable[[Any, list[Any]], Sequence[Any]]
"""What computes the results of an equation from its operands."""

PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})
"""Products of matrices and convolutions: what XLA fuses nothing across."""
CALLS = frozenset({"jit", "pjit"})
"""Equations that call a program and do nothing else."""
OWN_PULLBACKS = frozenset({"custom_vjp_call", "custom_vjp_call_jaxpr"})
"""Equations whose pullback is whatever the user says, linear or not."""


class Program:
    """A traced function of arrays: constants, and operands.

    However often another program calls it, each call is one equation there, and JAX derives, batches and lowers what it
    calls once: a solve and its gradient call the vector field some twenty times, and a network's is a hundred equations."""

    def __init__(self, jaxpr: Any):
        @jax.jit
        def program(constants: Sequence[Any], *operands: Any) -> list[Any]:
            return jax.core.eval_jaxpr(jaxpr, constants, *operands)

        self.jaxpr = jaxpr
        self._call = program

    def __call__(self, constants: Sequence[Any], *operands: Any) -> list[Any]:
        return self._call(constants, *operands)


class Hoisted(eqx.Module):
    """A function of (t, y, args), traced once; its leaves are the arrays that it closes over.

    (`equinox.filter_closure_convert` does the same, but compares all arguments with the first ones in every call, and so
    refuses those that `jax.shard_map` computes.)
    """

    arrays: list[Any]
    program: Program = eqx.field(static=True)
    structure: Any = eqx.field(static=True)

    @property
    def jaxpr(self) -> Any:
        return self.program.jaxpr

    def __call__(self, t: Scalar, y: Arrays, args: PyTree[Any]) -> PyTree[Array]:
        return self.evaluated(self.program, t, y, args)

    def evaluated(self, evaluate: Callable[..., list[Any]], t: Scalar, y: Arrays, args: PyTree[Any]) -> PyTree[Array]:
        """What the function returns, where something evaluates its program for constants and operands."""
        inputs = jax.tree.leaves(eqx.filter((t, y, args), eqx.is_array))
        outputs = evaluate(self.arrays, *inputs)
        return jax.tree.unflatten(self.structure, [jnp.asarray(output) for output in outputs])


def hoisted(function: Function, t: Scalar, y: Arrays, args: PyTree[Any]) -> Hoisted:
    """The function, traced for arguments like these. What is no array in args is static."""
    dynamic, static = eqx.partition((t, y, args), eqx.is_array)

    def traced(dynamic: PyTree[Any]) -> PyTree[Any]:
        return function(*eqx.combine(dynamic, static))

    closed, shapes = jax.make_jaxpr(traced, return_shape=True)(dynamic)
    return Hoisted(closed.consts, Program(closed.jaxpr), jax.tree.structure(shapes))


def interpreted(jaxpr: Any, values: Sequence[Any], rule: Rule) -> list[Any]:
    """The results of a program, of whose equations each is computed by `rule(equation, operands)`."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], values, strict=True))
    return results_of(jaxpr.eqns, known, jaxpr.outvars, rule)


def computed(equation: Any, operands: Sequence[Any]) -> Sequence[Any]:
    """The results of an equation. (JAX 0.7 keeps functions that it calls apart from its parameters.)"""
    parameters = equation.primitive.get_bind_params(equation.params)
    functions, parameters = parameters if isinstance(parameters, tuple) else ((), parameters)
    results = equation.primitive.bind(*functions, *operands, **parameters)
    return results if equation.primitive.multiple_results else [results]


def inlined(closed: Any) -> Any:
    """A closed program with all those written out that its equations do nothing but call."""

    def written_out(equation: Any, operands: Sequence[Any]) -> Sequence[Any]:
        if equation.primitive.name not in CALLS:
            return computed(equation, operands)
        called = equation.params["jaxpr"]
        return interpreted(called.jaxpr, [*called.consts, *operands], written_out)

    def program(*operands: Any) -> list[Any]:
        return interpreted(closed.jaxpr, [*closed.consts, *operands], written_out)

    return jax.make_jaxpr(program)(*(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars))


def results_of(equations: Sequence[Any], known: dict[Any, Any], wanted: Sequence[Any], rule: Rule) -> list[Any]:
    """What some variables become, given others and the equations that lead from these to those."""
    for equation in equations:
        operands = [_read(known, variable) for variable in equation.invars]
        known.update(zip(equation.outvars, rule(equation, operands), strict=True))
    return [_read(known, variable) for variable in wanted]


def _read(known: dict[Any, Any], variable: Any) -> Any:
    return known[variable] if is_computed(variable) else variable.val


def is_computed(variable: Any) -> bool:
    """Whether it is no constant that stands in the program itself."""
    return not hasattr(variable, "val")


def varying_results(jaxpr: Any, varies: Sequence[bool], but_by: frozenset[str] = frozenset()) -> list[bool]:
    """Which results of a program vary, where its constants do not, but some of its operands do: what is computed from
    something that varies, but by some kinds of equations."""
    varying = {variable for variable, does in zip(jaxpr.invars, varies, strict=True) if does}

    def is_varying(variable: Any) -> bool:
        return is_computed(variable) and variable in varying

    for equation in jaxpr.eqns:
        operands = [is_varying(variable) for variable in equation.invars]
        if equation.primitive.name in CALLS:
            results = varying_results(programs_of(equation)[0], operands, but_by)
        else:
            results = [any(operands) and equation.primitive.name not in but_by] * len(equation.outvars)
        varying.update(variable for variable, does in zip(equation.outvars, results, strict=True) if does)
    return [is_varying(variable) for variable in jaxpr.outvars]


def contains(jaxpr: Any, kinds: frozenset[str]) -> bool:
    """Whether a program, or one that it calls, has equations of some kinds."""
    called = (program for equation in jaxpr.eqns for program in programs_of(equation))
    return any(equation.primitive.name in kinds for equation in jaxpr.eqns) or any(contains(one, kinds) for one in called)


def operations(jaxpr: Any) -> int:
    """How many a program has, with those of the programs that its equations call."""
    return sum(1 + sum(map(operations, programs_of(equation))) for equation in jaxpr.eqns)


def programs_of(equation: Any) -> list[Any]:
    """The programs that an equation calls: the body of a loop, the branches of a choice, a function, what solves a linear
    system."""
    if equation.primitive.name == "custom_linear_solve":
        return _programs(equation.params["jaxprs"].solve)
    return [program for value in equation.params.values() for program in _programs(value)]


def _programs(value: Any) -> list[Any]:
    """Those in a parameter of an equation."""
    if isinstance(value, tuple | list):
        return [program for entry in value for program in _programs(entry)]
    program = getattr(value, "jaxpr", value)
    return [program] if hasattr(program, "eqns") else []
