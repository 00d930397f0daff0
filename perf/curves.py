"""Latency against throughput, closed and open loop, as a PNG: what a server does as it is asked for more."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from perf.analyzer import Loop
from perf.scenario import StreamKind
from perf.summary import Point, Summary
from tuwen.errors import MissingDependency

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colour tells the loop, the line's style the percentile; both differ in lightness too, for print and for colour-blind
# readers (Okabe and Ito's blue and vermilion).
_COLOURS: dict[Loop, str] = {"closed": "#0072b2", "open": "#d55e00"}
_MARKERS: dict[Loop, str] = {"closed": "o", "open": "s"}
_STYLES = {"p50": "-", "p99": "--"}
_LOOP_NAMES: dict[Loop, str] = {"closed": "closed loop", "open": "open loop, Poisson"}
_UNITS: dict[StreamKind, str] = {"text": "texts per second", "image": "pictures per second"}


def check_matplotlib() -> None:
    """Before an hour of measuring rather than after it.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependency("curves need matplotlib: pip install 'tuwen[bench]'") from error


def draw_curves(summary: Summary) -> bytes:
    """PNG; a panel per kind of request. Marks are medians of the repeats, bars reach from the least to the greatest.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    streams = summary.scenario.streams
    # A figure of its own, not pyplot's: no global state, and no display is looked for.
    figure = Figure(figsize=(9 if len(streams) == 1 else 13, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, stream in zip(figure.subplots(1, len(streams), squeeze=False)[0], streams, strict=True):
        _draw_panel(axes, summary, stream)
    figure.suptitle(f"{summary.model}, scenario {summary.scenario.name}")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def write_curves(summary: Summary, path: Path) -> bytes:
    png = draw_curves(summary)
    path.write_bytes(png)
    return png


def _draw_panel(axes: Axes, summary: Summary, stream: StreamKind) -> None:
    for loop in ("closed", "open"):
        points = [point for point in summary.points if point.loop == loop and point.measured(stream)]
        for which, style in _STYLES.items():
            _draw_line(axes, points, stream, which, style, loop)
        for point in points:
            _label(axes, point, stream)
    axes.set_yscale("log")
    # Plain numbers: 20 and 50, not powers of ten.
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    axes.set_xlim(left=0)
    axes.set_xlabel(f"throughput, {_UNITS[stream]}")
    axes.set_ylabel("latency, ms (log scale)")
    axes.grid(which="both", alpha=0.25, linewidth=0.6)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", frameon=False)


def _draw_line(axes: Axes, points: list[Point], stream: StreamKind, which: str, style: str, loop: Loop) -> None:
    rows = [(point.medians(stream) or {}, point.latencies(stream, which)) for point in points]
    if not rows:
        return
    x, y = [row["throughput"] for row, _ in rows], [row[f"{which}_ms"] for row, _ in rows]
    bars = [
        [value - min(repeats) for value, (_, repeats) in zip(y, rows, strict=True)],
        [max(repeats) - value for value, (_, repeats) in zip(y, rows, strict=True)],
    ]
    axes.errorbar(
        x,
        y,
        yerr=bars,
        linestyle=style,
        marker=_MARKERS[loop],
        markersize=5,
        color=_COLOURS[loop],
        ecolor=_COLOURS[loop],
        elinewidth=0.8,
        capsize=2,
        label=f"{which}, {_LOOP_NAMES[loop]}",
    )


def _label(axes: Axes, point: Point, stream: StreamKind) -> None:
    """The load beside its p50: requests under way below the closed loop, the rate asked for above the open one."""
    row = point.medians(stream) or {}
    is_closed = point.loop == "closed"
    axes.annotate(
        f"{point.levels[stream]:g}" if is_closed else f"{point.levels[stream]:g}/s",
        (row["throughput"], row["p50_ms"]),
        xytext=(6, -11) if is_closed else (-6, 7),
        textcoords="offset points",
        ha="left" if is_closed else "right",
        fontsize=8,
        color=_COLOURS[point.loop],
    )
