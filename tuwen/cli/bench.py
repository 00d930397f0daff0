"""`tuwen bench ...`: load, towers, and whether two runs differ."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tuwen.cli.console import DEFAULT_REPOSITORY, Json, Repository, Url, progress_bar, stderr, stdout

if TYPE_CHECKING:
    from perf.compare import Comparison

bench_app = typer.Typer(help="Measure speed.", no_args_is_help=True)


@bench_app.command("run")
def bench_run(
    scenario: Annotated[str, typer.Argument(help="A TOML file, or a kept scenario: text, image, mixed, smoke.")],
    url: Url = "localhost:8001",
    start_server: Annotated[bool, typer.Option("--serve", help="Start the embedded server for this run.")] = False,
    model: Annotated[str | None, typer.Option("--model", help="Which model, where several are served.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; default runs/bench/DATE-NAME.")] = None,
    rates_of: Annotated[
        Path | None, typer.Option("--rates-of", help="An earlier summary, whose arrival rates are used again.")
    ] = None,
    repository: Repository = DEFAULT_REPOSITORY,
) -> None:
    """Drive perf_analyzer through a scenario; prints the folder with CSVs, summary.json, curves.png, report.html."""
    from perf.bench import run_bench
    from perf.scenario import find_scenario, load_scenario
    from tuwen.cli.search import embedded_server

    path = find_scenario(scenario)
    load_scenario(path)  # a slip in it should not cost a server's start
    with embedded_server(repository) if start_server else nullcontext(url) as address, progress_bar("bench") as report:
        written = run_bench(path, address, model, out, rates_of, report)
    stdout.print(written, soft_wrap=True)


@bench_app.command("compare")
def bench_compare(
    a: Annotated[Path, typer.Argument(help="The run to compare with: its summary.json, or its folder.")],
    b: Annotated[Path, typer.Argument(help="The run in question.")],
    fail_on_regression: Annotated[
        bool, typer.Option("--fail-on-regression", help="Exit 1 if B is slower anywhere.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Tell a regression from noise: the ratio B / A of every load both measured, its 99 % interval, a verdict."""
    from perf.compare import compare
    from perf.summary import read_summary

    found = compare(read_summary(a), read_summary(b))
    if as_json:
        print(json.dumps(asdict(found), ensure_ascii=False))
    else:
        _print_comparison(found)
    if fail_on_regression and found.has_regression:
        raise typer.Exit(1)


def _print_comparison(found: Comparison) -> None:
    for warning in found.warnings:
        stderr.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)
    table = Table()
    for column in ("load", "", "figure"):
        table.add_column(column)
    for column in ("A", "B", "B / A", "99 % interval"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    colours = {"slower": "red", "faster": "green"}
    for one in found.findings:
        unit = "/s" if one.figure == "throughput" else " ms"
        interval = f"{one.ratio.low:.2f} to {one.ratio.high:.2f}"
        style = colours.get(one.verdict)
        table.add_row(
            *(one.load, one.stream, one.figure, f"{one.a:.4g}{unit}", f"{one.b:.4g}{unit}", f"{one.ratio.value:.3f}"),
            *(interval, one.verdict),
            style=style,
        )
    stdout.print(table)
