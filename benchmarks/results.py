"""Results, and how they are stored: one JSON file, with the machine's facts beside each row."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

VERSION = 2


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One contestant in one case at one tolerance. What does not apply is None.

    - `milliseconds`, `quartiles`: of a call; the median over turns, and the quartiles on both sides of it.
    - `error`: the largest deviation from the reference, relative to its largest entry.
    - `trace`, `lower`, `compile`: seconds. `temporary_bytes`, `output_bytes`: as the compiler plans them.
    - `peak_bytes`: by how much the process grew in the contestant's first call. `process_bytes`: the largest size that a
      process for this contestant alone ever had, compilation included.
    - `told`: what the library tells, summed over lanes; for adaptive lanes `largest_steps`, the most that any lane took.
    - `problem`: why there is nothing else, if the contestant is missing or failed.
    """

    case: str
    mode: str
    quantity: str
    contestant: str
    role: str
    tolerance: float | None = None
    size: float | None = None
    lanes: int | None = None
    steps: int | None = None
    milliseconds: float | None = None
    quartiles: tuple[float, float] | None = None
    turns: int | None = None
    error: float | None = None
    trace: float | None = None
    lower: float | None = None
    compile: float | None = None
    temporary_bytes: int | None = None
    output_bytes: int | None = None
    peak_bytes: int | None = None
    process_bytes: int | None = None
    told: Mapping[str, float] = dataclasses.field(default_factory=dict)
    problem: str | None = None

    @property
    def build(self) -> float | None:
        """Seconds until the first call can start."""
        if self.trace is None or self.lower is None or self.compile is None:
            return None
        return self.trace + self.lower + self.compile

    @property
    def planned_bytes(self) -> int | None:
        """What the compiler plans for a call, beyond the inputs."""
        return None if self.temporary_bytes is None else self.temporary_bytes + (self.output_bytes or 0)


@dataclasses.dataclass(frozen=True)
class Run:
    """The measurements of a row, and where and how they were taken."""

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    seconds: float
    measurements: tuple[Measurement, ...]


Runs = dict[str, Run]


def measured_in(measurements: Iterable[Measurement], *modes: str) -> list[Measurement]:
    """Those of every case in the first of these modes in which it was measured."""
    every = list(measurements)
    mode = {m.case: m.mode for wanted in reversed(modes) for m in every if m.mode == wanted}
    return [m for m in every if mode.get(m.case) == m.mode]


def timed(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Times of calls: of races, and of single calls where there was no race."""
    return measured_in(measurements, "race", "alone")


def apart(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Builds and memory: of processes for one contestant, and of races where there were none."""
    return measured_in(measurements, "alone", "race")


def as_json(measurements: list[Measurement]) -> str:
    return json.dumps([_without_blanks(m) for m in measurements])


def from_json(text: str) -> list[Measurement]:
    return [Measurement(**entry) for entry in json.loads(text)]


def store(path: Path, runs: Runs) -> None:
    """Write the runs, one measurement to a line."""
    rows = []
    for name, run in runs.items():
        facts = {"machine": run.machine, "settings": run.settings, "seconds": round(run.seconds, 1)}
        head = ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items())
        lines = ",\n".join("  " + json.dumps(_without_blanks(m)) for m in run.measurements)
        rows.append(f'{json.dumps(name)}: {{{head}, "measurements": [\n{lines}\n ]}}')
    body = ",\n ".join(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"version": {VERSION}, "rows": {{\n {body}\n}}}}\n')


def load(path: Path) -> Runs:
    """The runs of a file; none if there is no such file."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    if content.get("version") != VERSION:
        raise ValueError(f"{path} is not a result of this version of the benchmarks: measure again into another file.")
    return {name: _run(row) for name, row in content["rows"].items()}


def _run(row: dict[str, Any]) -> Run:
    measurements = tuple(Measurement(**entry) for entry in row["measurements"])
    return Run(row["machine"], row["settings"], row["seconds"], measurements)


def _without_blanks(measurement: Measurement) -> dict[str, Any]:
    def short(value: Any) -> Any:
        return float(f"{value:.5g}") if isinstance(value, float) else value

    entries = dataclasses.asdict(measurement).items()
    return {name: _each(short, value) for name, value in entries if value is not None and value != {}}


def _each(function: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: function(item) for key, item in value.items()}
    return [function(item) for item in value] if isinstance(value, tuple | list) else function(value)
