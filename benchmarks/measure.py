"""One case in this process: all libraries compiled, then timed in turns. Prints JSON."""

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import numpy as np

from benchmarks.libraries import LIBRARIES
from benchmarks.problems import Problem, Reference, loss, lotka_volterra, neural, save_times


class Case(NamedTuple):
    """A problem, and what of it is timed."""

    make: Callable[[], Problem]
    kinds: tuple[str, ...] = ("forward", "gradient")


CASES = {
    "lotka-volterra-1e-6": Case(lambda: lotka_volterra(1e-6)),
    "lotka-volterra-1e-9": Case(lambda: lotka_volterra(1e-9)),
    "neural-1e-4": Case(lambda: neural(1e-4)),
    **{
        f"saves-{count}-to-{end:g}" + ("" if lanes is None else f"-lanes-{lanes}"): Case(
            functools.partial(save_times, end, count, lanes), ("forward",)
        )
        for lanes in (None, 64)
        for end, count in ((1.0, 2), (1.0, 1000), (100.0, 2), (100.0, 5))
    },
}
TURNS = 9
TURN_SECONDS = 0.1


def compiled(function: Callable[[Any], Any], argument: Any) -> tuple[Callable[[Any], Any], dict[str, float]]:
    """The function compiled ahead of time, and the seconds that tracing, lowering and compiling took."""
    start = time.perf_counter()
    traced = jax.jit(function).trace(argument)
    traced_at = time.perf_counter()
    lowered = traced.lower()
    lowered_at = time.perf_counter()
    executable = lowered.compile()
    done = time.perf_counter()
    seconds = {"trace": traced_at - start, "lower": lowered_at - traced_at, "compile": done - lowered_at}
    memory = executable.memory_analysis()
    return executable, {**seconds, "temporary_bytes": 0 if memory is None else memory.temp_size_in_bytes}


def time_in_turns(functions: dict[str, Callable[[Any], Any]], argument: Any) -> dict[str, list[float]]:
    """Seconds a call, one number for each library and turn; within a turn every library runs once for a while."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        jax.block_until_ready(function(argument))
    for _ in range(TURNS):
        for name, function in functions.items():
            calls, start = 0, time.perf_counter()
            while time.perf_counter() - start < TURN_SECONDS:
                jax.block_until_ready(function(argument))
                calls += 1
            seconds[name].append((time.perf_counter() - start) / calls)
    return seconds


def relative_error(got: Any, expected: np.ndarray) -> float:
    """The largest deviation, relative to the largest expected value."""
    return float(np.max(np.abs(np.asarray(got, np.float64) - expected)) / np.max(np.abs(expected)))


def run(case: str) -> list[dict[str, Any]]:
    """The rows of one case: each library's forward solve and gradient."""
    make, kinds = CASES[case]
    problem = make()
    reference = Reference(problem)
    rows = []
    for kind in kinds:
        expected = reference.values() if kind == "forward" else reference.gradient()
        functions, facts, errors = {}, {}, {}
        for name, library in LIBRARIES.items():
            solve = library(problem)
            target = solve if kind == "forward" else jax.grad(lambda p, solve=solve: loss(solve(p)))
            target = target if problem.lanes is None else jax.vmap(target)
            functions[name], facts[name] = compiled(target, problem.parameters)
            result = functions[name](problem.parameters)
            got = result if kind == "forward" else jax.flatten_util.ravel_pytree(result)[0]
            errors[name] = relative_error(got, expected)
        for name, seconds in time_in_turns(functions, problem.parameters).items():
            spread = statistics.quantiles(seconds, n=4)
            row = {"case": problem.name, "kind": kind, "library": name, "error": errors[name], **facts[name]}
            rows.append({**row, "milliseconds": 1e3 * statistics.median(seconds), "quartiles": [1e3 * q for q in spread]})
    return rows


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print(json.dumps(run(sys.argv[1])))
