"""What is measured: a library's solve or gradient of one problem, as something that can be called again and again."""

import abc
import enum
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.problems import Problem


class Quantity(enum.Enum):
    """What is computed."""

    FORWARD = "forward"
    GRADIENT = "gradient"


class Build(NamedTuple):
    """Seconds until a program can be called, and the bytes that the compiler plans for it besides its inputs."""

    trace: float
    lower: float
    compile: float
    temporary_bytes: int
    output_bytes: int


class Outcome(NamedTuple):
    """What a call has computed: numbers, flat and lanes first, and what the library tells of its work.

    `told`: `accepted`, `rejected` or `steps`, `evaluations`; of every lane, if there are any."""

    numbers: np.ndarray
    told: Mapping[str, np.ndarray]


class Executable(NamedTuple):
    """A program that is ready. `call` runs it and waits for the end; `outcome` reads what `call` returned."""

    call: Callable[[], Any]
    outcome: Callable[[Any], Outcome]
    build: Build | None = None


class Program(abc.ABC):
    """One library's way to compute one quantity of one problem."""

    @abc.abstractmethod
    def ready(self, tolerance: float | None) -> Executable:
        """The program for this tolerance (none for fixed steps), for both rtol and atol."""


Told = dict[str, Any]
Solve = Callable[[Any, Any, Any], tuple[Any, Told]]
"""solve(y0, parameters, tolerance) -> what is saved, and what the library tells, of one lane."""
Derivative = Callable[..., Callable[..., Any]]


def loss(problem: Problem, ys: Any) -> Any:
    """The mean square, whose gradient weighs all save times, or what the problem has weights for."""
    return jnp.mean(jnp.square(ys)) if problem.weights is None else jnp.sum(problem.weights * ys)


class JaxProgram(Program):
    """A solve in JAX, compiled once for all tolerances. A gradient is what `jax.grad` makes of a loss, and nothing more:
    what a library tells of its work is asked of the solve alone, afterwards."""

    def __init__(self, problem: Problem, quantity: Quantity, solve: Solve, derivative: Derivative = jax.grad):
        self.problem, self.quantity, self.solve, self.derivative = problem, quantity, solve, derivative
        self._compiled: tuple[Any, Build] | None = None
        self._telling: Any = None

    def function(self) -> Callable[[Any, Any, Any], tuple[Any, Told]]:
        """What is compiled: y0, parameters, tolerance -> the quantity of all lanes, and of a solve what is told."""

        def cost(parameters: Any, y0: Any, tolerance: Any) -> Any:
            return loss(self.problem, self.solve(y0, parameters, tolerance)[0])

        def gradient(y0: Any, parameters: Any, tolerance: Any) -> tuple[Any, Told]:
            return self.derivative(cost)(parameters, y0, tolerance), {}

        return self._of_lanes(self.solve if self.quantity is Quantity.FORWARD else gradient)

    def _of_lanes(self, one: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
        lanes = one if self.problem.lanes is None else jax.vmap(one, (None, 0, None))
        return lanes if self.problem.devices == 1 else self._apart(lanes)

    def arguments(self, tolerance: float | None) -> tuple[Any, Any, Any]:
        dtype = self.problem.dtype
        number = jnp.asarray(1.0 if tolerance is None else tolerance, dtype)
        parameters = jax.tree.map(jnp.asarray, self.problem.parameters)
        if self.problem.devices > 1:
            parameters = jax.device_put(parameters, NamedSharding(self._mesh, PartitionSpec("lanes")))
        return jnp.asarray(self.problem.y0), parameters, number

    @property
    def _mesh(self) -> Mesh:
        return Mesh(np.array(jax.devices()[: self.problem.devices]), ("lanes",))

    def _apart(self, lanes: Callable[..., Any]) -> Callable[..., Any]:
        """Lanes distributed over devices, which do not wait for one another."""
        own, shared = PartitionSpec("lanes"), PartitionSpec()
        return jax.shard_map(lanes, mesh=self._mesh, in_specs=(shared, own, shared), out_specs=own, check_vma=False)

    def ready(self, tolerance: float | None) -> Executable:
        arguments = self.arguments(tolerance)
        if self._compiled is None:
            self._compiled = compiled(self.function(), arguments)
        executable, build = self._compiled
        outcome = functools.partial(self._outcome, arguments)
        return Executable(lambda: jax.block_until_ready(executable(*arguments)), outcome, build)

    def _outcome(self, arguments: tuple[Any, Any, Any], result: tuple[Any, Told]) -> Outcome:
        numbers, told = result
        if self.quantity is Quantity.GRADIENT:
            told = self._told(arguments)
        return Outcome(flattened(numbers, self.problem), {name: np.asarray(value) for name, value in told.items()})

    def _told(self, arguments: tuple[Any, Any, Any]) -> Told:
        """What the solve tells that a gradient is of."""
        if self._telling is None:
            self._telling = jax.jit(self._of_lanes(lambda *given: self.solve(*given)[1]))
        return self._telling(*arguments)


class StaticToleranceProgram(JaxProgram):
    """A solve in JAX whose tolerance is part of the program, so that every tolerance is compiled."""

    def ready(self, tolerance: float | None) -> Executable:
        solve = self.solve
        given = JaxProgram(self.problem, self.quantity, lambda y0, p, _: solve(y0, p, tolerance), self.derivative)
        return given.ready(tolerance)


def compiled(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, Build]:
    """The function compiled ahead of time, and what that cost."""
    start = time.perf_counter()
    traced = jax.jit(function).trace(*arguments)
    traced_at = time.perf_counter()
    lowered = traced.lower()
    lowered_at = time.perf_counter()
    executable = lowered.compile()
    seconds = traced_at - start, lowered_at - traced_at, time.perf_counter() - lowered_at
    memory = executable.memory_analysis()
    sizes = (0, 0) if memory is None else (memory.temp_size_in_bytes, memory.output_size_in_bytes)
    return executable, Build(*seconds, *sizes)


def flattened(numbers: Any, problem: Problem) -> np.ndarray:
    """All numbers in float64: one row for each lane, or a single one."""
    rows = problem.lanes or 1
    leaves = [np.asarray(leaf, np.float64).reshape(rows, -1) for leaf in jax.tree.leaves(numbers)]
    return np.concatenate(leaves, axis=1)
