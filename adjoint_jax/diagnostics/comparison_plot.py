"""The picture of a comparison."""

from pathlib import Path
from typing import Any, NamedTuple


class Point(NamedTuple):
    """One adjoint in the picture."""

    label: str
    milliseconds: float
    error: float
    temporary_bytes: int


def plot(points: list[Point], notes: list[str], good_enough: float, target: Any) -> Any:
    """Error against run time, both logarithmic, with the memory as the area; returns the axes. `target`: a path or axes.

    Raises `ImportError` if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'adjoint_jax[examples]'.") from error
    figure = Figure(figsize=(7.2, 3.6), dpi=130, layout="constrained")
    axes = figure.subplots() if isinstance(target, str | Path) else target
    _draw(points, notes, good_enough, axes)
    axes.xaxis.set(major_formatter="{x:g}", minor_locator=LogLocator(subs=(2, 5)), minor_formatter="{x:g}")
    if isinstance(target, str | Path):
        figure.savefig(target)
    return axes


def _draw(points: list[Point], notes: list[str], good_enough: float, axes: Any) -> None:
    floor = _floor([point.error for point in points], good_enough)
    largest = max((point.temporary_bytes for point in points), default=0)
    handles = []
    for index, point in enumerate(points):
        at, area = (point.milliseconds, max(point.error, floor)), 30 + 400 * point.temporary_bytes / max(largest, 1)
        handles += [axes.scatter(*at, s=area, color=f"C{index}", alpha=0.6, linewidths=0, label=point.label)]
    limit = axes.axhline(good_enough, color="#777777", linewidth=0.8, linestyle="--", label="good enough")
    axes.set(xscale="log", yscale="log", xlabel="time of loss and gradient (ms)", ylabel="relative error of the gradient")
    axes.margins(x=0.2, y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    options = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0), "frameon": False, "fontsize": 8}
    legend = axes.legend(handles=[*handles, limit], title="temporary memory", **options)
    for handle in legend.legend_handles[: len(points)]:
        handle.set_sizes([40])
    axes.set_title("\n".join(notes), fontsize=8, loc="left", color="#cc3311")


def _floor(errors: list[float], good_enough: float) -> float:
    """Where an error of zero stands on a logarithmic axis: below all others."""
    return min([error for error in errors if error > 0] + [good_enough]) / 10
