"""One HTML file about a bench run, with everything in it: open it years later, without network.

Summary -> report.html and curves.png.
"""

from __future__ import annotations

import base64
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from perf.analyzer import NUM_WINDOWS, Loop
from perf.curves import write_curves
from perf.scenario import Scenario, StreamKind
from perf.stages import Stage
from perf.summary import Point, Summary

_PAGE = Template((Path(__file__).parent / "report.html.template").read_text(encoding="utf-8"))
_NOUNS: dict[StreamKind, str] = {"text": "texts", "image": "pictures"}
_COUNTED_BY = {
    True: "Towers and preprocessing have a queue of their own and count batches themselves; their input is the "
    "hand-over to it.",
    False: "The counters of towers and preprocessing were not read; their figures are Triton's, which sees the "
    "hand-over to their queues only.",
}
_LOOPS: dict[Loop, tuple[str, str, str]] = {
    "closed": ("Closed loop", "so many requests always under way: what the server can do at most", "under way"),
    "open": (
        "Open loop",
        "Poisson arrivals, whatever the server does: what users feel, queues included",
        "asked for, 1/s",
    ),
}


def write_report(summary: Summary, folder: Path) -> None:
    """report.html and curves.png beside the summary."""
    png = write_curves(summary, folder / "curves.png")
    (folder / "report.html").write_text(render_report(summary, png), encoding="utf-8")


def render_report(summary: Summary, png: bytes) -> str:
    """The whole page."""
    scenario = summary.scenario
    return _PAGE.substitute(
        title=escape(f"{summary.model} under load: {scenario.name}"),
        subtitle=escape(f"{summary.started_at} · fingerprint {summary.fingerprint} · {summary.url}"),
        headline="".join(f"<div class=cards>{_headline(summary, stream)}</div>" for stream in scenario.streams),
        png=base64.b64encode(png).decode("ascii"),
        tables="".join(_stream_section(summary, stream) for stream in scenario.streams),
        stages=_stages_table(summary),
        workload=_list(_describe_workload(scenario)),
        machine=_pairs({**summary.machine, **summary.versions}),
        scenario=escape(summary.scenario_text),
        repeat=escape(_how_to_repeat(summary)),
        method=_list(_method(summary)),
    )


def _headline(summary: Summary, stream: StreamKind) -> str:
    """Three figures: what one request costs alone, the most that goes through, and the tail at about half of that."""
    closed = [point for point in summary.points if point.loop == "closed" and point.measured(stream)]
    if not closed:
        return ""
    rows = [(point, point.medians(stream) or {}) for point in closed]
    first, alone = rows[0]
    best, most = max(rows, key=lambda row: row[1]["throughput"])
    cards = [
        (f"{most['throughput']:.0f} {_NOUNS[stream]}/s", f"the most, {best.levels[stream]:g} under way"),
        (f"{alone['p50_ms']:.1f} ms", f"median latency, {first.levels[stream]:g} {_NOUNS[stream]} under way"),
    ]
    usual = [
        (point, point.medians(stream) or {})
        for point in summary.points
        if point.loop == "open" and point.measured(stream)
    ]
    if usual:
        half = min(usual, key=lambda row: abs(row[1]["throughput"] - most["throughput"] / 2))
        cards.append((f"{half[1]['p99_ms']:.1f} ms", f"p99 at {half[0].levels[stream]:g} {_NOUNS[stream]}/s, Poisson"))
    return "".join(f"<div class=card><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in cards)


def _stream_section(summary: Summary, stream: StreamKind) -> str:
    parts = [f"<h2>{_NOUNS[stream].capitalize()}</h2>"]
    for loop, (name, meaning, level) in _LOOPS.items():
        points = [point for point in summary.points if point.loop == loop]
        if points:
            header = (level, f"{_NOUNS[stream]}/s", "avg", "p50", "p90", "p95", "p99 ms", "spread of p50", "remarks")
            rows = [_row(summary, point, stream) for point in points]
            parts.append(f"<h3>{name} <small>{escape(meaning)}</small></h3>{_table(header, rows)}")
    return "".join(parts)


def _row(summary: Summary, point: Point, stream: StreamKind) -> list[str]:
    level = f"{point.levels[stream]:g}"
    if point.loop == "closed" and len(point.levels) > 1:
        level += f" of {point.level:g}"
    if point.loop == "open" and point.name.endswith("of capacity"):
        level += f" ({point.level:.0%})"
    remarks = "; ".join(summary.remarks(point, stream))
    row = point.medians(stream)
    if row is None:
        return [level, *["–"] * 7, remarks]
    figures = [
        f"{row['throughput']:.1f}",
        *(f"{row[f'{which}_ms']:.2f}" for which in ("avg", "p50", "p90", "p95", "p99")),
    ]
    p50 = point.latencies(stream, "p50")
    return [level, *figures, f"{min(p50):.2f} to {max(p50):.2f}", remarks]


def _stages_table(summary: Summary) -> str:
    header = ("load", "model", "requests", "a batch", "queue", "input", "infer", "output ms", "refused")
    rows = []
    for point in summary.points:
        for number, stage in enumerate(_median_stages(point)):
            times = (f"{ms:.2f}" for ms in (stage.queue_ms, stage.input_ms, stage.infer_ms, stage.output_ms))
            refused = sum(repeat.refused for repeat in point.repeats)
            first = [point.name, str(refused)] if number == 0 else ["", ""]
            rows.append([first[0], stage.model, str(stage.requests), f"{stage.mean_batch:.1f}", *times, first[1]])
    return _table(header, rows, words=2)


def _median_stages(point: Point) -> list[Stage]:
    """Each part's median over the repeats, of every column by itself."""
    by_model: dict[str, list[Stage]] = {}
    for repeat in point.repeats:
        for stage in repeat.stages:
            by_model.setdefault(stage.model, []).append(stage)
    columns = ("mean_batch", "queue_ms", "input_ms", "infer_ms", "output_ms")
    return [
        Stage(
            model,
            round(statistics.median(stage.requests for stage in stages)),
            *(statistics.median(getattr(stage, column) for stage in stages) for column in columns),
        )
        for model, stages in by_model.items()
    ]


def _describe_workload(scenario: Scenario) -> list[str]:
    found = []
    if text := scenario.text:
        found.append(
            f"{text.count} queries in Emoji-CN's words; characters log-normal, median {text.median_characters:g}, "
            f"spread {text.spread:g}, at most {text.max_characters}"
        )
    if image := scenario.image:
        whole = sum(size.share for size in image.sizes)
        sizes = ", ".join(f"{size.width}x{size.height} ({size.share / whole:.0%})" for size in image.sizes)
        found.append(f"{image.count} JPEGs of quality 90, from eight photographs: {sizes}")
    return [*found, f"seed {scenario.seed}; one item a request, over gRPC"]


def _method(summary: Summary) -> list[str]:
    scenario, measure = summary.scenario, summary.scenario.measure
    found = [
        f"Each load was measured {scenario.load.repeats} times, one round through all loads after the other; a row "
        f"shows medians. A measurement is {NUM_WINDOWS} windows of {measure.window_s:g} s.",
        f"Unsteady: its windows differ by more than {measure.stability_percent:g} % in throughput or in the "
        f"{measure.percentile}th percentile of latency.",
        "Latency runs from sending a request to its answer, as perf_analyzer sees it. The times inside the server are "
        "its own count, means over the few requests before and after the windows too; infer is the time of the batch "
        f"that a request was in. {_COUNTED_BY[summary.own_counters]} (Server Queue in perf_analyzer's "
        "CSV is the ensemble's own, always 0; the queues of its parts are counted under Network there.)",
        "perf_analyzer gives up at the first refused request, and a load at which that happens has no figures.",
    ]
    if summary.url.rpartition(":")[0] in ("localhost", "127.0.0.1", "[::1]"):
        found.append("The load generator ran on the server's own machine and took its share of the processor.")
    return found


def _how_to_repeat(summary: Summary) -> str:
    name = summary.scenario.name
    return (
        "make perf-analyzer\n"
        f"# with the scenario above as {name}.toml; instead of --serve, --url ADDRESS of a server that is there\n"
        f"tuwen bench run {name}.toml --model {summary.model} --serve --rates-of THIS --out AGAIN\n"
        "tuwen bench compare THIS AGAIN"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 0) -> str:
    """HTML; the first `words` columns and the remarks are text, the others figures."""

    def cells(row: Sequence[str], tag: str) -> str:
        classes = [" class=word" if index < words or header[index] == "remarks" else "" for index in range(len(row))]
        return "".join(f"<{tag}{style}>{escape(cell)}</{tag}>" for cell, style in zip(row, classes, strict=True))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{cells(header, 'th')}</tr></thead><tbody>{body}</tbody></table></div>"


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _pairs(values: dict[str, object]) -> str:
    return (
        "<dl>"
        + "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in values.items())
        + "</dl>"
    )
