"""Measuring one case in this process: `python -m benchmarks.measure ROW INDEX LENGTH [CONTESTANT]` prints JSON."""

import dataclasses
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adjoint_jax.diagnostics.counting import CountedField, Tally, pulled_back
from benchmarks import imports, machine, references
from benchmarks.cases import Case, Contestant, Measured, Mode
from benchmarks.lengths import LENGTHS, Length
from benchmarks.problems import Equation, Field, Problem
from benchmarks.programs import Build, Executable, Outcome
from benchmarks.results import Measurement, as_json
from benchmarks.rows import rows


class Entry(NamedTuple):
    """A program that is ready to be called, the seconds of its first call, and what is known of it already."""

    executable: Executable
    first: float
    measurement: Measurement


def measure(measured: Measured, length: Length, contestants: tuple[Contestant, ...]) -> list[Measurement]:
    """All measurements of a case."""
    case = measured.case
    problem = case.problem()
    jax.config.update("jax_enable_x64", problem.dtype == np.float64)
    jax.config.update("jax_num_cpu_devices", problem.devices)
    warm_up()
    kinds = {Mode.RACE: race, Mode.ALONE: alone, Mode.COUNTED: counted, Mode.IMPORT: imported}
    return list(kinds[measured.mode](case._replace(contestants=contestants), problem, length))


def warm_up() -> None:
    """Let JAX, LLVM and the threads that compute start, so that the first contestant does not pay for it."""

    def loop(x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(lambda carry, _: (jnp.sin(carry @ carry), None), x, length=3)[0])

    jax.block_until_ready(jax.jit(jax.grad(loop))(jnp.ones((256, 256))))


def race(case: Case, problem: Problem, length: Length) -> Iterator[Measurement]:
    """Every contestant at every tolerance: compiled first, then called in turns."""
    references.check(problem)
    entries: list[Entry] = []
    for contestant in case.contestants:
        for prepared in _prepared(case, problem, contestant):
            if isinstance(prepared, Measurement):
                yield prepared
            else:
                entries.append(prepared)
    seconds = time_in_turns(entries, length)
    for entry, taken in zip(entries, seconds, strict=True):
        yield _timed(entry.measurement, taken)


def alone(case: Case, problem: Problem, length: Length) -> Iterator[Measurement]:
    """The contestants built in the process's first moments, and called once to see how it grows."""
    references.check(problem)
    del length
    for contestant in case.contestants:
        blank = _blank(case, problem, contestant, Mode.ALONE)
        try:
            tolerance = case.tolerances[0]
            executable = contestant.load()(problem, case.quantity).ready(tolerance)
            entry = _called_once(executable, dataclasses.replace(blank, tolerance=tolerance), problem, case)
        except Exception as error:
            yield _failed(blank, error)
            continue
        timed = dataclasses.replace(entry.measurement, milliseconds=1e3 * entry.first, turns=1)
        yield dataclasses.replace(timed, process_bytes=machine.largest_ever())


def imported(case: Case, problem: Problem, length: Length) -> Iterator[Measurement]:
    """What importing packages costs in fresh processes."""
    with tempfile.TemporaryDirectory() as bytecode:
        for contestant in case.contestants:
            blank = _blank(case, problem, contestant, Mode.IMPORT)
            try:
                taken = imports.seconds(contestant.entry, length.turns, Path(bytecode))
            except Exception as error:
                yield _failed(blank, error)
                continue
            yield _timed(blank, taken)


def counted(case: Case, problem: Problem, length: Length) -> Iterator[Measurement]:
    """Evaluations and vector-Jacobian products of one gradient in JAX, by whatever library."""
    del length
    for contestant in case.contestants:
        blank = dataclasses.replace(_blank(case, problem, contestant, Mode.COUNTED), tolerance=case.tolerances[0])
        tally = Tally()
        counting = dataclasses.replace(problem, equation=CountedEquation(problem.equation, tally))
        try:
            contestant.load()(counting, case.quantity).ready(case.tolerances[0]).call()
        except Exception as error:
            yield _failed(blank, error)
            continue
        yield dataclasses.replace(blank, told={name: float(value) for name, value in tally.counts._asdict().items()})


class CountedEquation(NamedTuple):
    """A right-hand side whose evaluations and vector-Jacobian products are counted as JAX's programs execute them."""

    equation: Equation
    tally: Tally

    def field(self, xp: ModuleType) -> Field:
        return CountedField(self.equation.field(xp), self.tally, pulled_back)


SLOW = 0.5
"""A first call that takes so many seconds is the first turn: it is compiled, and warming up does not matter to it."""

LOOK, LONGEST_REST = 0.01, 1.0
"""Seconds of a look at whether this process rests, and for how long at most."""


def rest() -> None:
    """Wait until threads of the last program no longer look for work, which takes PyTorch's some 10 ms."""
    for _ in range(round(LONGEST_REST / LOOK)):
        before = time.process_time()
        time.sleep(LOOK)
        if time.process_time() - before < 0.1 * LOOK:
            return


def time_in_turns(entries: list[Entry], length: Length) -> list[list[float]]:
    """Seconds a call, one number for each turn; within a turn every program runs once for a while. The first call of a turn
    is not timed: it finds in the caches what another program left there, which says nothing of a training loop."""
    estimates = [entry.first if entry.first > SLOW else _a_while(entry.executable, 0.0) for entry in entries]
    seconds = [[estimate] if estimate > SLOW else [] for estimate in estimates]
    for _ in range(length.turns):
        for entry, estimate, taken in zip(entries, estimates, seconds, strict=True):
            if len(taken) < length.turns_of(estimate):
                rest()
                if estimate <= SLOW:
                    entry.executable.call()
                taken.append(_a_while(entry.executable, length.turn_seconds))
    return seconds


def _a_while(executable: Executable, least: float) -> float:
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < least:
        executable.call()
        calls += 1
    return (time.perf_counter() - start) / calls


def _prepared(case: Case, problem: Problem, contestant: Contestant) -> Iterator[Entry | Measurement]:
    """The contestant's programs for all tolerances, called once to see their errors; or why there is none. Only its very
    first call shows what memory it takes: later ones take again what that one freed."""
    blank = _blank(case, problem, contestant, Mode.RACE)
    try:
        program = contestant.load()(problem, case.quantity)
    except Exception as error:
        yield _failed(blank, error)
        return
    for tolerance in case.tolerances:
        at = dataclasses.replace(blank, tolerance=tolerance)
        try:
            entry = _called_once(program.ready(tolerance), at, problem, case)
            first = tolerance == case.tolerances[0]
            yield entry if first else entry._replace(measurement=dataclasses.replace(entry.measurement, peak_bytes=None))
        except Exception as error:
            yield _failed(at, error)


def _called_once(executable: Executable, blank: Measurement, problem: Problem, case: Case) -> Entry:
    """The program after its first call, which shows its error and by how much the process grows."""
    before = machine.restarted_peak()
    start = time.perf_counter()
    result = executable.call()
    first = time.perf_counter() - start
    grown = machine.grown_by(before)
    described = _described(blank, executable.build, executable.outcome(result), problem, case)
    return Entry(executable, first, dataclasses.replace(described, peak_bytes=grown))


def _timed(measurement: Measurement, taken: list[float]) -> Measurement:
    low, middle, high = (float(quartile) for quartile in 1e3 * np.quantile(taken, [0.25, 0.5, 0.75]))
    return dataclasses.replace(measurement, milliseconds=middle, quartiles=(low, high), turns=len(taken))


def _blank(case: Case, problem: Problem, contestant: Contestant, mode: Mode) -> Measurement:
    return Measurement(
        case=case.name,
        mode=mode.value,
        quantity=case.quantity.value,
        contestant=contestant.name,
        role=contestant.role.value,
        size=case.size,
        lanes=problem.lanes,
        steps=problem.steps,
    )


def _described(blank: Measurement, build: Build | None, outcome: Outcome, problem: Problem, case: Case) -> Measurement:
    error = references.error(outcome.numbers, problem, case.quantity)
    if not np.isfinite(error):
        raise ArithmeticError("The result is not finite: the solve or its gradient failed.")
    told = {name: float(np.sum(value)) for name, value in outcome.told.items()}
    if {"accepted", "rejected"} <= set(told) and problem.lanes is not None:
        told["largest_steps"] = float(np.max(outcome.told["accepted"] + outcome.told["rejected"]))
    return dataclasses.replace(blank, error=error, told=told, **({} if build is None else build._asdict()))


def _failed(blank: Measurement, error: Exception) -> Measurement:
    if isinstance(error, ImportError):
        reason = f"not installed: {error}"
    else:
        traceback.print_exception(error, file=sys.stderr)
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
    return dataclasses.replace(blank, problem=reason)


def main(row: str, index: str, length: str, *names: str) -> None:
    measured = rows(LENGTHS[length])[row].cases[int(index)]
    contestants = tuple(c for c in measured.case.contestants if not names or c.name in names)
    print(as_json(measure(measured, LENGTHS[length], contestants)))


if __name__ == "__main__":
    main(*sys.argv[1:])
