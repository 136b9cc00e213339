"""The initial value problem: everything that receives a gradient."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PyTree

from adjoint_jax import tree
from adjoint_jax.hoisting import PRODUCTS, Hoisted, contains, hoisted, operations, varying_results
from adjoint_jax.kernels import in_blocks, in_one_kernel, stored
from adjoint_jax.scalars import ScalarProgram
from adjoint_jax.stacks import with_selections
from adjoint_jax.tree import Arrays, Scalar

VectorField = Callable[[Scalar, PyTree[Any], PyTree[Any]], PyTree[Any]]
RunningCost = Callable[[Scalar, PyTree[Any], PyTree[Any]], PyTree[Any]]


MOST_NUMBERS = 512
"""Entries of the state of a small problem."""


def check_function(function: Any, what: str, name: str) -> None:
    """Raise `TypeError` unless a function can be called with a time, a state and args."""
    expected = f"{what} must be callable as {name}(t, y, args), got {function!r}"
    if not callable(function):
        raise TypeError(f"{expected}.")
    try:
        signature = inspect.signature(function)
    except ValueError:
        return
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise TypeError(f"{expected} with parameters {signature}: it must take these three, used or not.") from error


class Split(eqx.Module):
    """The vector field explicit(t, y, args) + implicit(t, y, args), for methods that treat its parts differently: stiff but
    cheap terms implicitly, others explicitly (`KenCarp4`). To all other methods it is the sum.

    Both parts return what a vector field returns. Arrays in both receive gradients, as do those that they close over.
    """

    explicit: VectorField
    implicit: VectorField

    def __check_init__(self) -> None:
        for name, part in (("explicit", self.explicit), ("implicit", self.implicit)):
            check_function(part, f"Split({name}=...)", name)

    def __call__(self, t: Scalar, y: PyTree[Any], args: PyTree[Any]) -> PyTree[Any]:
        return tree.add(self.explicit(t, y, args), self.implicit(t, y, args))

    def mapped(self, change: Callable[[VectorField], VectorField]) -> "Split":
        """Both parts changed in the same way."""
        return Split(change(self.explicit), change(self.implicit))


class Interval(NamedTuple):
    """One step's stretch of time.

    `first` and `last` are the times at which the field is evaluated for the step's two ends: `start` and `end`
    themselves, or the neighbouring floating-point numbers inside the step where the field jumps at an end.
    """

    start: Scalar
    end: Scalar
    first: Scalar
    last: Scalar


class Rates(NamedTuple):
    """What moves along the solution: dy/dt, and the running cost (without one, the empty tuple). Or what pairs with them:
    a(t) = dJ/dy(t), and the constant dJ/dcost."""

    y: Arrays
    cost: Arrays


class Parameters(NamedTuple):
    """The inexact arrays on which the rates depend besides (t, y), or their derivatives: leaves of the vector field, of the
    running cost, and of `args`."""

    vector_field: PyTree[Any]
    running_cost: PyTree[Any]
    args: PyTree[Any]


class Problem(eqx.Module):
    """M dy/dt = vector_field(t, y, args) from y(t0) = y0 to t1, and the integral of running_cost(t, y, args). M is the
    identity if `mass` is None.

    Every inexact array in it receives a gradient, but for M, a constant. Values that the user's functions close over have
    become leaves of `vector_field` and `running_cost` (`hoist` does that), so a gradient has no other road to take.
    """

    vector_field: VectorField
    running_cost: RunningCost | None
    args: PyTree[Any]
    y0: Arrays
    t0: Scalar
    t1: Scalar
    mass: Float[Array, "n n"] | None = None

    def field(self, t: Scalar, y: Arrays) -> Arrays:
        """M dy/dt, with the structure, shapes and dtypes of y."""
        return self.vector_field(t, y, self.args)

    def rates(self, t: Scalar, y: Arrays) -> Rates:
        """dy/dt and the running cost."""
        return Rates(self.field(t, y), () if self.running_cost is None else self.running_cost(t, y, self.args))

    @property
    def direction(self) -> Scalar:
        """1 if time runs forward, else -1."""
        return jnp.where(self.t1 < self.t0, -1, 1).astype(self.t0.dtype)

    @property
    def is_in_scalars(self) -> bool:
        """Whether its state and its parameters are tuples of scalars, and nothing else is computed with."""
        return isinstance(self.vector_field, ScalarProgram)

    @property
    def is_in_lanes(self) -> bool:
        """Whether it is known to be one of many lanes, all of them in scalars."""
        return isinstance(self.vector_field, ScalarProgram) and self.vector_field.in_lanes

    @property
    def is_in_blocks(self) -> bool:
        """Whether these lanes are to be computed block by block."""
        return isinstance(self.vector_field, ScalarProgram) and self.vector_field.in_blocks

    @property
    def multiplies_matrices(self) -> bool:
        """Whether the vector field does, or convolves."""
        field = self.vector_field
        traced = field if isinstance(field, Hoisted) else jax.make_jaxpr(self.field)(self.t0, self.y0)
        return contains(traced.jaxpr, PRODUCTS)

    @property
    def multiplies_vectors(self) -> bool:
        """Whether it multiplies vectors by matrices, rather than matrices by one another: by the shapes of its state."""
        return all(leaf.ndim < 2 for leaf in jax.tree.leaves(self.y0)) and self.multiplies_matrices

    @property
    def fuses(self) -> bool:
        """Whether it is known that XLA can fuse one evaluation of the vector field with the next: whether any of its
        results depends on the state without a product of matrices in between."""
        if self.is_in_scalars or not isinstance(self.vector_field, Hoisted):
            return self.is_in_scalars
        program, of_y = self.vector_field.jaxpr, range(1, 1 + len(jax.tree.leaves(self.y0)))
        return any(varying_results(program, [i in of_y for i in range(len(program.invars))], PRODUCTS))

    @property
    def operations(self) -> int:
        """How many the vector field's program has, if it is known; otherwise 0."""
        return operations(self.vector_field.jaxpr) if isinstance(self.vector_field, Hoisted) else 0

    @property
    def is_small(self) -> bool:
        """Whether it is of so few numbers that starting operations takes longer than the operations do."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.y0)) <= MOST_NUMBERS and not self.multiplies_matrices

    def compute(self, function: Callable[..., Any], *operands: Any, interpolated: bool) -> Any:
        """`function(*operands)`, a loop over steps of this problem, in the way that suits its size. `interpolated`: whether
        something is saved within steps: then lanes hold so much of each that they are best computed in blocks."""
        if not self.is_small:
            return function(*operands)
        if not (self.is_in_blocks and interpolated):
            return in_one_kernel(function, *operands)
        return in_blocks(functools.partial(in_one_kernel, function), *operands)

    def decide(self, function: Callable[..., Any], *operands: Any) -> Any:
        """`function(*operands)`, of a few numbers, within a loop over steps of this problem: as one kernel, unless the loop
        may be one."""
        return function(*operands) if self.is_small else in_one_kernel(function, *operands)

    def looped(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """The body of a loop over steps of this problem. In lanes it is a program of its own, which JAX batches but once: a
        loop is batched twice, to find out what differs between lanes, and then as it does."""
        return jax.jit(body) if self.is_in_lanes else body

    @property
    def stored(self) -> Callable[[Any], Any]:
        """What gives back values from which several evaluations of the vector field are computed: stored, where XLA would
        compute them anew for each."""
        return stored if self.fuses else lambda values: values

    @property
    def scalars_per_array(self) -> int:
        """How many leaves of the state stand for an array, at most."""
        return self.vector_field.largest if isinstance(self.vector_field, ScalarProgram) else 1

    def zero_cost(self) -> Arrays:
        """No cost, with the structure, shapes and dtypes of the running cost."""
        return tree.zeros_like(jax.eval_shape(self.rates, self.t0, self.y0).cost)

    def for_steps(self) -> "Problem":
        """The same problem, with a vector field that is a few kernels if it is one of scalars."""
        return dataclasses.replace(self, vector_field=_for_steps(self.vector_field, self))

    def without_cost(self) -> "Problem":
        """The problem of the solution alone."""
        return self.of_field(self.vector_field)

    def of_field(self, vector_field: VectorField) -> "Problem":
        """The problem of the solution alone, of another field."""
        return Problem(vector_field, None, self.args, self.y0, self.t0, self.t1, self.mass)

    @property
    def parameters(self) -> Parameters:
        """What the rates depend on besides (t, y)."""
        return eqx.filter(Parameters(self.vector_field, self.running_cost, self.args), eqx.is_inexact_array)

    def at(self, parameters: Parameters) -> "Problem":
        """The problem with other parameters, for derivatives with respect to them."""
        own = Parameters(self.vector_field, self.running_cost, self.args)
        static = eqx.filter(own, eqx.is_inexact_array, inverse=True)
        return Problem(*eqx.combine(parameters, static), self.y0, self.t0, self.t1, self.mass)


def hoist(vector_field: VectorField, t: Scalar, y: Arrays, args: PyTree[Any]) -> VectorField:
    """The vector field as a pytree that holds every array it closes over.

    Its output is checked against y at trace time and cast to y's dtypes, so that a float32 state stays float32 even
    where the field computes with float64 times.

    Raises `TypeError` or `ValueError` if the field returns another structure, other shapes, or complex for real.
    """
    if isinstance(vector_field, Split):
        return vector_field.mapped(lambda part: hoist(part, t, y, args))

    def checked(t: Scalar, y: Arrays, args: PyTree[Any]) -> Arrays:
        dy = vector_field(t, y, args)
        if jax.tree.structure(dy) != jax.tree.structure(y):
            raise TypeError(
                "vector_field(t, y, args) must return a pytree like y0: expected structure "
                f"{jax.tree.structure(y)}, got {jax.tree.structure(dy)}."
            )
        return jax.tree.map(_like, dy, y)

    return hoisted(checked, t, y, args)


def _for_steps(vector_field: VectorField, problem: Problem) -> VectorField:
    if isinstance(vector_field, Split):
        return vector_field.mapped(lambda part: _for_steps(part, problem))
    if not isinstance(vector_field, Hoisted):
        return vector_field
    return with_selections(vector_field, problem.t0, problem.y0, problem.args)


def hoist_running_cost(running_cost: RunningCost | None, t: Scalar, y: Arrays, args: PyTree[Any]) -> RunningCost | None:
    """The running cost as a pytree that holds every array it closes over, its values in the precision of the state.

    Raises `TypeError` if it does not return floating-point numbers.
    """
    if running_cost is None:
        return None
    precision = state_precision(y)

    def checked(t: Scalar, y: Arrays, args: PyTree[Any]) -> Arrays:
        return jax.tree.map(lambda rate: _in_precision(rate, precision), running_cost(t, y, args))

    return hoisted(checked, t, y, args)


def _in_precision(rate: Any, precision: DTypeLike) -> Array:
    rate = jnp.asarray(rate)
    if not jnp.issubdtype(rate.dtype, jnp.inexact):
        raise TypeError(
            f"running_cost(t, y, args) must return floating-point numbers, or a pytree of them, got {rate.dtype}: it is "
            "integrated over time."
        )
    return rate.astype(jnp.result_type(precision, jnp.complex64) if jnp.iscomplexobj(rate) else precision)


def _like(derivative: Any, leaf: Array) -> Array:
    derivative = jnp.asarray(derivative)
    if derivative.shape != leaf.shape:
        raise ValueError(
            f"vector_field(t, y, args) must return the shapes of y0: expected {leaf.shape}, got {derivative.shape}."
        )
    if jnp.iscomplexobj(derivative) and not jnp.iscomplexobj(leaf):
        raise TypeError(
            f"vector_field returned {derivative.dtype} for a state of dtype {leaf.dtype}: make y0 complex, or return the "
            "real part."
        )
    return derivative.astype(leaf.dtype)


def canonical_state(y0: PyTree[Any]) -> Arrays:
    """y0 with arrays for leaves. Raises `TypeError` for leaves that are not real or complex floating-point numbers."""

    def canonical(path: Any, leaf: Any) -> Array:
        try:
            array = jnp.asarray(leaf)
        except TypeError as error:
            raise TypeError(f"y0{jax.tree_util.keystr(path)} must be an array, got {leaf!r}.") from error
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            raise TypeError(
                f"y0{jax.tree_util.keystr(path)} has dtype {array.dtype}, but a state must be of real or complex "
                "floating-point numbers: write 1.0 for 1, or cast with .astype(float)."
            )
        return array.astype(array.dtype)

    return jax.tree_util.tree_map_with_path(canonical, y0)


def canonical_args(args: PyTree[Any], y0: Arrays) -> PyTree[Any]:
    """The args with arrays in place of Python floats and complex numbers, in the precision of the state."""
    real = state_precision(y0)

    def canonical(leaf: Any) -> Any:
        if isinstance(leaf, float):
            return jnp.asarray(leaf, real)
        return jnp.asarray(leaf, jnp.result_type(real, jnp.complex64)) if isinstance(leaf, complex) else leaf

    return jax.tree.map(canonical, args)


def state_precision(y: Arrays) -> Any:
    """The real dtype of the state; JAX's default float for an empty one."""
    leaves = jax.tree.leaves(y)
    return tree.real_dtype(jnp.result_type(*leaves, jnp.float16)) if leaves else jnp.result_type(float)


def time_dtype(*times: Any) -> DTypeLike:
    """The common dtype of times: at least float32; the default float if all are Python numbers or integers."""
    common = jnp.result_type(*times)
    if not jnp.issubdtype(common, jnp.floating):
        common = jnp.result_type(float)
    return jnp.promote_types(common, jnp.float32)


def flow_cotangent(problem: Problem, t: Scalar, y: Arrays, cotangent: Rates) -> Scalar:
    """<a, f(t, y)> + <dJ/dcost, running cost>: the derivative of a loss with respect to the time at which y is reached
    and up to which the cost is integrated."""
    return tree.pairing(cotangent, problem.rates(t, y)).astype(problem.t0.dtype)
