"""`compare_adjoints`: what each adjoint's gradient of the user's own loss is worth, and what it costs."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from adjoint_jax import tree
from adjoint_jax.adjoints.adjoint import AbstractAdjoint
from adjoint_jax.adjoints.backsolve import BacksolveAdjoint
from adjoint_jax.adjoints.discrete import DiscreteAdjoint
from adjoint_jax.adjoints.forward_mode import ForwardMode
from adjoint_jax.adjoints.gauss import GaussAdjoint
from adjoint_jax.adjoints.interpolating import InterpolatingAdjoint
from adjoint_jax.diagnostics.comparison_report import AdjointComparison, AdjointRow, LeafError, Measurement, Reference
from adjoint_jax.diagnostics.counting import CountingAdjoint, Counts, Tally
from adjoint_jax.diagnostics.losses import differentiable, real_scalar
from adjoint_jax.tree import Arrays, Scalar

Method = PyTree[Any]
"""An adjoint, or a pytree with one adjoint in it."""
AdjointLoss = Callable[[PyTree[Any], Any], Any]
ANY_SOLVER = (DiscreteAdjoint(), InterpolatingAdjoint(), GaussAdjoint(), BacksolveAdjoint())
"""The adjoints for reverse mode that need no particular solver."""


def compare_adjoints(
    loss: AdjointLoss,
    inputs: PyTree[Any],
    adjoints: Sequence[Method] | Mapping[str, Method] = ANY_SOLVER,
    *,
    reference: PyTree[Any] = None,
    good_enough: float = 1e-3,
    repeats: int = 5,
    count: bool = True,
) -> AdjointComparison:
    """The gradient of a loss by one adjoint after the other: error, run time, compile time, memory, work; and which to use.

        def loss(inputs, adjoint):
            return jnp.sum(aj.solve(field, 0.0, 1.0, inputs["y0"], inputs["args"], adjoint=adjoint).ys ** 2)

        print(aj.diagnostics.compare_adjoints(loss, inputs))

    - `loss(inputs, adjoint)`: a real floating-point scalar; it passes the adjoint on to `solve` or `odeint`.
    - `inputs`: any pytree. Its real and complex floating-point arrays, of any shapes and dtypes, are differentiated; the
      rest is passed on as it is, Python floats too.
    - `adjoints`: a sequence, or a dictionary with a name for each. By default those that differentiate in reverse mode with
      any solver. Where an adjoint wants other options of the solve too, give a pytree with the adjoint in it, which is what
      the loss gets: `{"adjoint": aj.ReversibleAdjoint(), "solver": aj.Reversible(aj.Tsit5())}` for a loss that calls
      `aj.solve(..., **options)`. `ForwardMode` is differentiated by `jax.jacfwd`, all others by `jax.value_and_grad`.
    - `reference`: what gradients are compared with: a function of the inputs (the loss with tight tolerances, or a closed
      form), differentiated in reverse mode; or the gradient itself, a pytree like the inputs. By default it is the gradient
      of the first row's program with `DiscreteAdjoint()` for an adjoint. That is exact for the computed solution, so that
      the error of the solve itself goes unseen, and the report says so.
    - `good_enough`: the relative error of a gradient that the recommendation accepts.
    - `repeats`: how many times each program is timed, in turns, each time for at least 20 ms.
    - `count`: whether to count evaluations and products of the vector field as they are executed, replays and rejected
      steps included. That needs two more programs for each adjoint, which are not timed; running costs and `saveat.fn` are
      not counted.

    An adjoint that fails, at trace time, with a `SolveError` or with a value or gradient that is not finite, is a row that
    says why. Runs eagerly: not for use inside of `jax.jit`. A `SolveError` of a compiled program is also logged by JAX.

    Raises `TypeError` if `loss` is no function, a method has no adjoint in it, or `reference` is neither of the two;
    `ValueError` if inputs hold no array to differentiate, the reference is not finite, or an option makes no sense.
    """
    _check_options(loss, good_enough, repeats)
    named = _named(adjoints)
    arrays, static = eqx.partition(inputs, eqx.is_array)
    arrays = tree.map(jnp.asarray, arrays)
    leaves = differentiable(arrays)
    comparison = _Comparison(loss, arrays, static, list(leaves))
    trials = {name: comparison.tried(method) for name, method in named.items()}
    seconds = _timed_in_turns({name: trial.run for name, trial in trials.items() if isinstance(trial, _Trial)}, repeats)
    wanted = comparison.reference(reference, next(iter(named.values())))
    rows = []
    for name, method in named.items():
        outcome = trials[name]
        if isinstance(outcome, _Trial):
            outcome = comparison.measured(outcome, seconds[name], wanted, comparison.counts(method) if count else None)
        rows.append(AdjointRow(name, adjoint_of(method), outcome))
    kind = Reference.DISCRETE if reference is None else Reference.GIVEN
    return AdjointComparison(tuple(rows), kind, good_enough, tree.size_in_bytes(list(leaves.values())))


def adjoint_of(method: Method) -> AbstractAdjoint:
    """The adjoint in a method. Raises `TypeError` unless there is exactly one."""
    found = [leaf for leaf in jax.tree.leaves(method, is_leaf=_is_adjoint) if _is_adjoint(leaf)]
    if len(found) != 1:
        raise TypeError(f"compare_adjoints takes adjoints, or pytrees with one adjoint in each; got {method!r}.")
    return found[0]


# What is compiled and run


class _Program(NamedTuple):
    """A compiled function of the arrays of the inputs, with the seconds that tracing and lowering, and compiling took."""

    run: Callable[[], Any]
    trace_seconds: float
    compile_seconds: float
    temporary_bytes: int | None


class _Trial(NamedTuple):
    """A program that ran through, with the loss and its gradient."""

    program: _Program
    value: float
    gradient: list[np.ndarray]

    @property
    def run(self) -> Callable[[], Any]:
        return self.program.run


class _Work(NamedTuple):
    """Counts of the loss alone, and of what its gradient does besides."""

    forward: Counts
    backward: Counts


class _Comparison(NamedTuple):
    """The loss and its inputs, of which the arrays are traced; and where the differentiable ones are."""

    loss: AdjointLoss
    arrays: Arrays
    static: Any
    paths: list[str]

    def evaluate(self, arrays: Arrays, method: Method) -> Scalar:
        """The loss."""
        return real_scalar(self.loss(eqx.combine(arrays, self.static), method))

    def gradient_program(self, method: Method) -> Callable[[Arrays], tuple[Scalar, Arrays]]:
        """From arrays to the loss and its gradient with respect to the inexact ones."""
        adjoint = adjoint_of(method)
        counted = adjoint.adjoint if isinstance(adjoint, CountingAdjoint) else adjoint
        differentiate = jax.jacfwd if isinstance(counted, ForwardMode) else jax.grad

        def value_and_gradient(arrays: Arrays) -> tuple[Scalar, Arrays]:
            diff, rest = eqx.partition(arrays, eqx.is_inexact_array)

            def twice(diff: Arrays) -> tuple[Scalar, Scalar]:
                value = self.evaluate(eqx.combine(diff, rest), method)
                return value, value

            gradient, value = differentiate(twice, has_aux=True)(diff)
            return value, gradient

        return value_and_gradient

    def tried(self, method: Method) -> _Trial | str:
        """A run of the gradient's program, or why there is none."""
        try:
            program = _compiled(self.gradient_program(method), self.arrays)
            value, gradient = _fetched(program.run())
        except Exception as error:  # Whatever an adjoint cannot do is a result.
            return _reason(error)
        if _all_finite([value, *gradient]):
            return _Trial(program, float(value), gradient)
        return self.diagnosed(method, "the gradient" if np.isfinite(value) else "the loss")

    def diagnosed(self, method: Method, what: str) -> str:
        """Why something is not finite, if an adjoint that raises knows it."""
        try:
            self.counts(method)
        except Exception as error:
            return _reason(error)
        return f"{what} is not finite"

    def counts(self, method: Method) -> _Work:
        """Counts of two programs that are run once."""
        forward = self.tallied(method, lambda counting: lambda arrays: self.evaluate(arrays, counting))
        total = self.tallied(method, self.gradient_program)
        return _Work(forward, Counts(*(both - one for both, one in zip(total, forward, strict=True))))

    def tallied(self, method: Method, program: Callable[[Method], Callable[[Arrays], Any]]) -> Counts:
        """Counts of the program that is made of a method."""
        tally = Tally()
        counting = _with_adjoint(lambda adjoint: CountingAdjoint(adjoint, tally), method)
        jax.block_until_ready(jax.jit(program(counting), compiler_options=_RUN_ONCE)(self.arrays))
        return tally.counts

    def reference(self, given: PyTree[Any], first: Method) -> list[np.ndarray]:
        """The gradient that is taken for the true one."""
        if given is not None and (gradient := self.as_gradient(given)) is not None:
            return gradient
        if given is None:
            program = self.gradient_program(_with_adjoint(lambda _: DiscreteAdjoint(), first))
        elif callable(given):
            program = _Comparison(lambda inputs, _: given(inputs), *self[1:]).gradient_program(DiscreteAdjoint())
        else:
            raise TypeError(f"reference must be a function of the inputs, or a gradient like them; got {given!r}.")
        value, gradient = _fetched(jax.jit(program)(self.arrays))
        if not _all_finite([value, *gradient]):
            raise ValueError("The reference, or its gradient, is not finite: there is nothing to compare with.")
        return gradient

    def as_gradient(self, given: PyTree[Any]) -> list[np.ndarray] | None:
        """The leaves of a pytree like the inputs."""
        wanted = eqx.filter(self.arrays, eqx.is_inexact_array)
        gradient = eqx.filter(given, eqx.is_inexact_array_like)
        if jax.tree.structure(gradient) != jax.tree.structure(wanted):
            return None
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(gradient)]
        if shapes != [leaf.shape for leaf in jax.tree.leaves(wanted)]:
            raise ValueError(f"reference must have the shapes of the inputs, got {shapes}.")
        return [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]

    def measured(self, trial: _Trial, seconds: float, wanted: list[np.ndarray], work: _Work | None) -> Measurement:
        """All about one adjoint."""
        differences = [_norm(np.asarray(got - true)) for got, true in zip(trial.gradient, wanted, strict=True)]
        sizes = [_norm(true) for true in wanted]
        errors = zip(self.paths, differences, map(_ratio, differences, sizes), strict=True)
        return Measurement(
            error=_ratio(math.hypot(*differences), math.hypot(*sizes)),
            leaves=tuple(LeafError(*one) for one in errors),
            value=trial.value,
            seconds=seconds,
            trace_seconds=trial.program.trace_seconds,
            compile_seconds=trial.program.compile_seconds,
            temporary_bytes=trial.program.temporary_bytes,
            forward=None if work is None else work.forward,
            backward=None if work is None else work.backward,
        )


_RUN_ONCE = {"xla_backend_optimization_level": 0}
"""What is executed is decided before the back end, whose optimisations take longer than one run."""
_TURN_SECONDS = 0.02


def _compiled(function: Callable[[Arrays], Any], arrays: Arrays) -> _Program:
    start = time.perf_counter()
    lowered = jax.jit(function).lower(arrays)
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    memory = compiled.memory_analysis()
    size = None if memory is None else int(memory.temp_size_in_bytes)
    return _Program(lambda: jax.block_until_ready(compiled(arrays)), lowered_at - start, done - lowered_at, size)


def _timed_in_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median seconds of a call of each, all of them warm. Taking turns, they share whatever else the machine does."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            calls, start = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - start) < _TURN_SECONDS or not calls:
                run()
                calls += 1
            seconds[name].append(elapsed / calls)
    return {name: statistics.median(some) for name, some in seconds.items()}


def _fetched(result: tuple[Scalar, Arrays]) -> tuple[np.ndarray, list[np.ndarray]]:
    value, gradient = result
    return np.asarray(value), [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]


def _all_finite(values: Sequence[np.ndarray]) -> bool:
    return all(np.all(np.isfinite(value)) for value in values)


def _norm(leaf: np.ndarray) -> float:
    return float(np.linalg.norm(leaf.astype(np.result_type(leaf, np.float64)).ravel()))


def _ratio(difference: float, size: float) -> float:
    """Relative to zero, nothing is small but zero."""
    return difference / size if size else (math.inf if difference else 0.0)


def _reason(error: Exception) -> str:
    """What an error says; of the run-time error that JAX makes of a `SolveError`, with the traceback, what this said."""
    message = str(error).rpartition("SolveError: ")[2].strip()
    return message.splitlines()[0] if message else type(error).__name__


# What is given


def _is_adjoint(node: Any) -> bool:
    return isinstance(node, AbstractAdjoint)


def _with_adjoint(replace: Callable[[AbstractAdjoint], AbstractAdjoint], method: Method) -> Method:
    """The method with something else in place of its adjoint."""
    return jax.tree.map(lambda leaf: replace(leaf) if _is_adjoint(leaf) else leaf, method, is_leaf=_is_adjoint)


def _named(adjoints: Sequence[Method] | Mapping[str, Method]) -> dict[str, Method]:
    methods = list(adjoints.values() if isinstance(adjoints, Mapping) else adjoints)
    if not methods:
        raise ValueError("There is no adjoint to compare.")
    own_names = [_name(adjoint_of(method)) for method in methods]
    names = list(adjoints) if isinstance(adjoints, Mapping) else own_names
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"Several adjoints are called {', '.join(sorted(repeated))}: name them in a dictionary.")
    return dict(zip(names, methods, strict=True))


def _name(adjoint: AbstractAdjoint) -> str:
    """The class, with the options that are not the default ones."""
    options = {field.name: getattr(adjoint, field.name) for field in dataclasses.fields(adjoint)}
    default = {field.name: field.default for field in dataclasses.fields(adjoint)}
    chosen = [f"{name}={value}" for name, value in options.items() if not eqx.tree_equal(value, default[name])]
    return f"{type(adjoint).__name__}({', '.join(chosen)})"


def _check_options(loss: Any, good_enough: Any, repeats: Any) -> None:
    if not callable(loss):
        raise TypeError(f"loss must be callable as loss(inputs, adjoint), got {loss!r}.")
    if not good_enough > 0:
        raise ValueError(f"good_enough must be positive, got {good_enough}.")
    if repeats < 1:
        raise ValueError(f"repeats must be a positive integer, got {repeats}.")
