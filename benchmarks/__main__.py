"""Run the benchmarks, each case in fresh processes, store the results and render them.

python -m benchmarks                                  # all rows
python -m benchmarks lv-forward wide                  # some
python -m benchmarks --short --output try.json   # everything once, small: does it run?
python -m benchmarks --render benchmarks/results/cpu.json
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from benchmarks import machine, render, results
from benchmarks.cases import Contestant, Measured, Mode
from benchmarks.lengths import FULL, SHORT, UNOPTIMISED, Length
from benchmarks.results import Measurement, Run
from benchmarks.rows import rows

RESULTS = Path(__file__).parent / "results"
MOST_SECONDS = 1200
DEVICE = "import jax; d = jax.devices()[0]; print(d.platform if d.platform == 'cpu' else d.device_kind)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*rows(FULL), []], metavar="ROW", help=", ".join(rows(FULL)))
    parser.add_argument("--short", action="store_true", help="every program once, small sizes; figures mean nothing")
    parser.add_argument("--output", type=Path, help="the JSON file whose rows are added or replaced; results/DEVICE.json")
    parser.add_argument(
        "--render", type=Path, metavar="FILE", help="measure nothing: tables and plots of this file, beside it"
    )
    arguments = parser.parse_args()
    if arguments.render is not None:
        print(render.render(arguments.render))
        return
    length = SHORT if arguments.short else FULL
    device = subprocess.run([sys.executable, "-c", DEVICE], check=True, capture_output=True, text=True).stdout.strip()
    if arguments.output is None and length is SHORT:
        parser.error("--short needs --output, so that its figures are not taken for results.")
    output = arguments.output or RESULTS / f"{device.replace(' ', '-').lower()}.json"
    run(arguments.rows or list(rows(length)), length, device, output)
    print(render.render(output))


def run(names: list[str], length: Length, device: str, output: Path) -> None:
    """Measure these rows, and store each as soon as it is measured."""
    facts = machine.facts(device)
    for name in tqdm(names, desc="rows"):
        start = time.perf_counter()
        cases = tqdm(rows(length)[name].cases, desc=name, leave=False)
        measurements = [m for index, measured in enumerate(cases) for m in run_case(name, index, measured, length)]
        seconds = time.perf_counter() - start
        stored = results.load(output)
        stored[name] = Run(facts, dataclasses.asdict(length), seconds, tuple(measurements))
        results.store(output, stored)
        for measurement in measurements:
            if measurement.problem is not None:
                tqdm.write(f"{name}, {measurement.case}: {measurement.contestant} left out: {measurement.problem}")


def run_case(row: str, index: int, measured: Measured, length: Length) -> Iterator[Measurement]:
    """A case in one fresh process, or in one for each contestant."""
    everybody = measured.case.contestants
    if measured.mode is not Mode.ALONE:
        yield from run_process(row, index, measured, length, everybody)
        return
    for contestant in tqdm(everybody, desc=measured.case.name, leave=False):
        yield from run_process(row, index, measured, length, (contestant,))


def run_process(
    row: str, index: int, measured: Measured, length: Length, contestants: tuple[Contestant, ...]
) -> list[Measurement]:
    """What `benchmarks.measure` prints; if it dies, that it did."""
    command = [sys.executable, "-m", "benchmarks.measure", row, str(index), length.name]
    command += [contestant.name for contestant in contestants]
    flags = UNOPTIMISED if measured.mode is Mode.COUNTED else length.xla_flags
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS, env=environment)
        if done.returncode == 0:
            return results.from_json(done.stdout.splitlines()[-1])
        reason = f"the process ended with {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}"
    except subprocess.TimeoutExpired:
        reason = f"the process took more than {MOST_SECONDS} s"
    except json.JSONDecodeError as error:
        reason = f"the process printed something else: {error}"
    case = measured.case
    blank = Measurement(case.name, measured.mode.value, case.quantity.value, "", "", size=case.size, problem=reason)
    return [dataclasses.replace(blank, contestant=c.name, role=c.role.value) for c in contestants]


if __name__ == "__main__":
    main()
