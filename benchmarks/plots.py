"""Plots of results: error against time, and cost against size."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from benchmarks.cases import Row
from benchmarks.results import Measurement, Run, apart, timed

matplotlib.use("Agg")
FAMILIES = {
    "adjoint_jax": "Blues",
    "diffrax": "Oranges",
    "jax.experimental.ode": "Greens",
    "gradsolve": "Purples",
    "torch": "Reds",
    "SciPy": "RdPu",
    "CVODES": "cividis",
    "diffsol": "Greens",
    "bare": "Greys",
}
"""Colours by the beginnings of names."""
MARKERS = "os^DvPX*<>"
FEWEST = 3
"""A curve of error against time needs so many tolerances."""


def draw(row: Row, run: Run, stem: Path) -> list[Path]:
    """All pictures that a row's measurements make."""
    measured = [m for m in run.measurements if m.problem is None and m.milliseconds is not None]
    looks = _looks(measured)
    pictures = [_precision(row, measured, looks, stem), _growth(row, measured, looks, stem)]
    return [picture for picture in pictures if picture is not None]


Looks = dict[str, dict[str, Any]]


def _looks(measured: list[Measurement]) -> Looks:
    """Colour and marker of each contestant: families share a palette, ours are drawn strongest."""
    looks: Looks = {}
    names = list(dict.fromkeys(m.contestant for m in measured))
    for start, palette in FAMILIES.items():
        members = [name for name in names if name.startswith(start)]
        for place, name in enumerate(members):
            shade = 0.9 - 0.5 * place / max(len(members), 1)
            ours = start == "adjoint_jax"
            looks[name] = {
                "color": matplotlib.colormaps[palette](shade),
                "marker": MARKERS[place % len(MARKERS)],
                "linewidth": 2.2 if ours else 1.2,
                "linestyle": "--" if start == "bare" else "-",
                "zorder": 3 if ours else 2,
            }
    return looks


def _precision(row: Row, measured: list[Measurement], looks: Looks, stem: Path) -> Path | None:
    """Error against time, one panel for each case with enough tolerances."""
    races = [m for m in measured if m.mode == "race" and m.tolerance is not None]
    cases = [
        case
        for case in dict.fromkeys(m.case for m in races)
        if len({m.tolerance for m in races if m.case == case}) >= FEWEST
    ]
    if not cases:
        return None
    panels = {case: Panel([m for m in races if m.case == case], _time, "ms") for case in cases}
    path = stem.with_name(f"{stem.name}-precision.png")
    return _figure(row.title, panels, looks, path, _error, "relative error")


def _growth(row: Row, measured: list[Measurement], looks: Looks, stem: Path) -> Path | None:
    """Time, and memory where it was measured, against what is varied in the row."""
    sized = [m for m in measured if m.size is not None]
    if row.axis is None or len({m.size for m in sized}) < FEWEST - 1:
        return None
    first = {m.case: m.tolerance for m in reversed(timed(sized))}
    shown = [m for m in sized if m.tolerance == first.get(m.case)]
    panels = {
        quantity: Panel([m for m in timed(shown) if m.quantity == quantity], _time, "ms")
        for quantity in dict.fromkeys(m.quantity for m in timed(shown))
    }
    if any(m.mode == "alone" for m in sized):
        memory = [m for m in apart(shown) if m.peak_bytes]
        panels["peak memory of a call"] = Panel(memory, _memory, "MB")
    return _figure(row.title, panels, looks, stem.with_name(f"{stem.name}-{row.axis}.png"), _size, row.axis)


def _error(m: Measurement) -> float:
    return max(m.error or 0.0, 1e-16)


def _time(m: Measurement) -> float:
    return m.milliseconds or 0.0


def _size(m: Measurement) -> float:
    return m.size or 0.0


def _memory(m: Measurement) -> float:
    return (m.peak_bytes or 0) / 1e6


Coordinate = Callable[[Measurement], float]


class Panel(NamedTuple):
    """Measurements, what is drawn of them, and its unit."""

    measurements: list[Measurement]
    up: Coordinate
    unit: str


def _figure(
    title: str,
    panels: dict[str, Panel],
    looks: Looks,
    path: Path,
    across: Coordinate,
    label: str,
) -> Path:
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(4.6 * columns + 2.6, 3.8 * lines), squeeze=False)
    for axes, (name, panel) in itertools.zip_longest(grid.flat, panels.items(), fillvalue=(None, None)):
        if panel is None:
            axes.set_axis_off()
            continue
        _draw(axes, panel, looks, across)
        axes.set(title=name, xlabel=label, ylabel=panel.unit, xscale="log", yscale="log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    entries = dict(pair for axes in grid.flat for pair in zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path


def _draw(axes: Axes, panel: Panel, looks: Looks, across: Coordinate) -> None:
    for name in dict.fromkeys(m.contestant for m in panel.measurements):
        points = sorted((across(m), panel.up(m)) for m in panel.measurements if m.contestant == name)
        axes.plot(*zip(*points, strict=True), label=name, markersize=4, **looks[name])
    axes.grid(which="major", alpha=0.3)
