"""Results as Markdown: one file with a section for each row, beside the JSON; plots by `plots`."""

from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import compare, plots, results
from benchmarks.cases import Quality, Row
from benchmarks.lengths import LENGTHS
from benchmarks.results import Measurement, Run
from benchmarks.rows import rows

READINGS = {
    compare.Reading.MEASURED: "",
    compare.Reading.LESS_ACCURATE: " (the peer is less accurate)",
    compare.Reading.MORE_ACCURATE: " (the peer is more accurate)",
}


def render(path: Path) -> str:
    """Write Markdown and plots beside the JSON file, and tell what came of what is wanted."""
    runs = results.load(path)
    sections, summary = [], ["| row | case | wanted | measured | against |", "| --- | --- | --- | --- | --- |"]
    for name, run in runs.items():
        row = rows(LENGTHS[run.settings["name"]])[name]
        verdicts = list(_verdicts(row, run))
        summary += [f"| {name} {line}" for line in verdicts]
        pictures = plots.draw(row, run, path.with_name(f"{path.stem}-{name}"))
        sections.append(_section(name, row, run, pictures))
    text = "\n".join(
        ["# Benchmarks", "", *_machines(runs), "", "## What was wanted, and what came of it", "", *summary, "", *sections]
    )
    path.with_suffix(".md").write_text(text + "\n")
    return "\n".join(summary)


def _machines(runs: results.Runs) -> list[str]:
    """The machines, each with the rows that were measured on it. Date and commit are the rows' own."""
    lines: dict[str, list[str]] = {}
    for name, run in runs.items():
        own = {key: value for key, value in run.machine.items() if value is not None and key not in ("date", "commit")}
        text = ", ".join(f"{key} {value}" for key, value in own.items())
        lines.setdefault(text, []).append(
            f"{name} ({run.machine['commit']}, {run.machine['date'][:10]}, {run.seconds:.0f} s)"
        )
    return [f"{text}: {', '.join(names)}.\n" for text, names in lines.items()]


def _verdicts(row: Row, run: Run) -> Iterable[str]:
    for want in row.wants:
        at = "" if want.tolerance is None else f", {want.tolerance:.0e}"
        unit = " s" if want.quality is Quality.IMPORT else f" of {_listed(want.against)}"
        unit += "" if want.than_in is None else f" in {want.than_in}"
        what = {Quality.MEMORY: ", memory", Quality.BUILD: ", build"}.get(want.quality, "")
        start = f"| {want.case}{at}{what}: {want.ours} | ≤ {want.ratio:g}{unit} |"
        verdict = compare.verdict(want, run.measurements)
        if verdict is None:
            measured = any(m.case == want.case and m.tolerance == want.tolerance for m in run.measurements)
            yield f"{start} {'no peer is nearly as accurate' if measured else 'not measured'} | |"
            continue
        mark = "✓" if verdict.holds else "✗"
        yield f"{start} {verdict.ratio:.2g} {mark}{READINGS[verdict.reading]} | {verdict.against} |"


def _listed(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"the best of: {'; '.join(names)}"


Column = tuple[str, Callable[[Measurement, float | None], str]]


def _section(name: str, row: Row, run: Run, pictures: list[Path]) -> str:
    lines = [f"## {name}: {row.title}", ""]
    for key in dict.fromkeys((m.case, m.mode) for m in run.measurements):
        group = [m for m in run.measurements if (m.case, m.mode) == key]
        lines += [f"### {group[0].case}{_MODES[group[0].mode]}", "", *_table(row, group), ""]
    lines += [f"![{picture.stem}]({picture.name})\n" for picture in pictures]
    return "\n".join(lines)


_MODES = {
    "race": "",
    "alone": ", each in a process of its own",
    "counted": ": work of the vector field, counted",
    "import": "",
}


def _table(row: Row, group: list[Measurement]) -> list[str]:
    """The case at the tolerances at which something is wanted; without such, at the first."""
    measured = [m for m in group if m.problem is None]
    wanted = {want.tolerance for want in row.wants if want.case == group[0].case}
    wanted = wanted or {m.tolerance for m in measured[:1]}
    shown = [m for m in measured if m.tolerance in wanted]
    lines = []
    if shown:
        columns = [column for column in COLUMNS if any(column[1](m, 1.0) for m in shown)]
        lines.append("| " + " | ".join(title for title, _ in columns) + " |")
        lines.append("| " + " | ".join("---" for _ in columns) + " |")
        order = sorted(shown, key=lambda m: -(m.tolerance or 0))
        lines += ["| " + " | ".join(cell(m, _ratio(m, measured)) for _, cell in columns) + " |" for m in order]
    lines += [f"\nLeft out: {m.contestant}{_at(m)}: {m.problem}" for m in group if m.problem is not None]
    return lines


def _at(measurement: Measurement) -> str:
    return "" if measurement.tolerance is None else f" at {measurement.tolerance:.0e}"


def _ratio(measurement: Measurement, case: list[Measurement]) -> float | None:
    """The time of the first of ours over that of this contestant, at our error at this tolerance."""
    ours = [m for m in case if m.role == "ours" and m.tolerance == measurement.tolerance]
    if not ours or measurement.mode != "race":
        return None
    first = next((m for m in case if m.role == "ours"), None)
    own = next((m for m in ours if first is not None and m.contestant == first.contestant), None)
    theirs = [m for m in case if m.contestant == measurement.contestant]
    cost = None if own is None else compare.time_ratio(own, theirs)
    return None if cost is None else cost.value


def _milliseconds(m: Measurement, _: float | None) -> str:
    if m.milliseconds is None:
        return ""
    spread = "" if m.quartiles is None or m.turns == 1 else f" ({m.quartiles[0]:.3g}-{m.quartiles[1]:.3g})"
    return f"{m.milliseconds:.3g}{spread}"


def _per_lane(m: Measurement, _: float | None) -> str:
    return "" if m.milliseconds is None or not m.lanes else f"{1e3 * m.milliseconds / m.lanes:.3g}"


def _per_step(m: Measurement, _: float | None) -> str:
    return "" if m.milliseconds is None or not m.steps else f"{1e3 * m.milliseconds / m.steps:.3g}"


def _build(m: Measurement, _: float | None) -> str:
    return "" if m.build is None else f"{m.build:.2f} ({m.trace:.2f} + {m.lower:.2f} + {m.compile:.2f})"


def _planned(m: Measurement, _: float | None) -> str:
    return "" if m.planned_bytes is None else f"{m.planned_bytes / 1e6:.3g}"


def _lockstep(m: Measurement, _: float | None) -> str:
    if m.lanes is None or "largest_steps" not in m.told:
        return ""
    needed = m.told["accepted"] + m.told["rejected"]
    return f"{m.lanes * m.told['largest_steps'] / needed:.2f}"


def _work(m: Measurement, _: float | None) -> str:
    return ", ".join(f"{value:g} {name.replace('_', ' ')}" for name, value in m.told.items())


def _megabytes(get: Callable[[Measurement], int | None]) -> Callable[[Measurement, float | None], str]:
    def cell(m: Measurement, _: float | None) -> str:
        value = get(m)
        return "" if value is None else f"{value / 1e6:.3g}"

    return cell


COLUMNS: list[Column] = [
    ("contestant", lambda m, _: m.contestant),
    ("tolerance", lambda m, _: "" if m.tolerance is None else f"{m.tolerance:.0e}"),
    ("ms (quartiles)", _milliseconds),
    ("µs a lane", _per_lane),
    ("µs a step", _per_step),
    ("error", lambda m, _: "" if m.error is None else f"{m.error:.1e}"),
    ("ours / it at equal error", lambda m, ratio: "" if ratio is None or m.mode != "race" else f"{ratio:.2g}"),
    ("trace + lower + compile, s", _build),
    ("planned MB", _planned),
    ("peak MB of a call", _megabytes(lambda m: m.peak_bytes)),
    ("peak MB of the process", _megabytes(lambda m: m.process_bytes)),
    ("work", _work),
    ("steps in lockstep / needed", _lockstep),
]
