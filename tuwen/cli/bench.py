"""`tuwen bench ...`: load, towers, and whether two runs differ."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from tuwen.cli.console import DEFAULT_REPOSITORY, Json, Repository, Url, progress_bar, stderr, stdout

if TYPE_CHECKING:
    from perf.compare import Comparison
    from perf.towers import TowerReport

bench_app = typer.Typer(help="Measure speed.", no_args_is_help=True)


@bench_app.command("run")
def bench_run(
    scenario: Annotated[str, typer.Argument(help="A TOML file, or a kept scenario: text, image, mixed, smoke.")],
    url: Url = "localhost:8001",
    metrics_url: Annotated[
        str | None, typer.Option("--metrics-url", help="Of that server; default http://HOST:8002/metrics.")
    ] = None,
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
    with embedded_server(repository) if start_server else nullcontext() as started, progress_bar("bench") as report:
        addresses = (
            (started.grpc, started.metrics)
            if started
            else (url, metrics_url or f"http://{url.rpartition(':')[0]}:8002/metrics")
        )
        written = run_bench(path, *addresses, model, out, rates_of, report)
    stdout.print(written, soft_wrap=True)


@bench_app.command("compare")
def bench_compare(
    a: Annotated[Path, typer.Argument(help="The run to compare with: its summary.json, or its folder.")],
    b: Annotated[Path, typer.Argument(help="The run in question.")],
    fail_on_regression: Annotated[
        bool, typer.Option("--fail-on-regression", help="Exit 1 if B is slower anywhere.")
    ] = False,
    min_effect: Annotated[
        float, typer.Option("--min-effect", min=0, help="A smaller change is none, however sure: 0.1 is 10 %.")
    ] = 0.1,
    as_json: Json = False,
) -> None:
    """Tell a regression from noise: the ratio B / A of every load both measured, its 99 % interval, a verdict."""
    from perf.compare import compare
    from perf.summary import read_summary

    found = compare(read_summary(a), read_summary(b), min_effect)
    if as_json:
        print(json.dumps(asdict(found), ensure_ascii=False))
    else:
        _print_comparison(found)
    if fail_on_regression and found.has_regression:
        raise typer.Exit(1)


def _print_comparison(found: Comparison) -> None:
    for warning in found.warnings:
        stderr.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)
    none = "no difference beyond noise"
    table = Table(caption=f"–: {none}", caption_justify="left", box=box.SIMPLE_HEAD)
    for column in ("load", "figure"):
        table.add_column(column, no_wrap=True)
    for column in ("A", "B", "B / A"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("99 % interval", "verdict"):
        table.add_column(column, no_wrap=True)
    has_several = len({one.stream for one in found.findings}) > 1
    colours = {"slower": "red", "faster": "green"}
    for one in found.findings:
        figure = "answers/s" if one.figure == "throughput" else f"{one.figure}, ms"
        high = f"{one.ratio.high:.2f}" if one.ratio.high < 100 else "more"
        ratios = (f"{one.ratio.value:.2f}", f"{one.ratio.low:.2f} to {high}")
        verdict = "–" if one.verdict == none else one.verdict
        load = one.load.removesuffix(" of capacity") + (f", {one.stream}" if has_several else "")
        style = colours.get(one.verdict)
        table.add_row(load, figure, f"{one.a:.4g}", f"{one.b:.4g}", *ratios, verdict, style=style)
    stdout.print(table)


@bench_app.command("towers")
def bench_towers(
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Checkpoint folder, or an official .pt file.")
    ] = None,
    architecture: Annotated[
        str | None, typer.Option("--architecture", help="Instead of a checkpoint: this one with random weights.")
    ] = None,
    batch: Annotated[str, typer.Option("--batch", help="Items a call, with commas between.")] = "1,8,16",
    lengths: Annotated[str, typer.Option("--lengths", help="Tokens a text, with commas between.")] = "9,52",
    rounds: Annotated[int, typer.Option("--rounds", help="How often every side is timed, in turn.")] = 7,
    threads: Annotated[int | None, typer.Option("--threads", help="Of every side; default all cores.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write towers.json to.")] = None,
    as_json: Json = False,
) -> None:
    """Time both towers alone: PyTorch, ONNX Runtime fp32 and int8, TensorRT on a GPU; parity beside the speed."""
    from perf.rounds import write_json
    from perf.towers import load_model, measure_towers

    model, weights = load_model(checkpoint, architecture)
    with stderr.status("opening the towers") as status:
        found = measure_towers(
            model,
            weights,
            _numbers("--batch", batch),
            _numbers("--lengths", lengths),
            rounds,
            threads,
            on_stage=status.update,
        )
    if out is not None:
        write_json(out / "towers.json", found.to_json())
    if as_json:
        print(json.dumps(found.to_json(), ensure_ascii=False))
    else:
        _print_towers(found)


def _numbers(flag: str, text: str) -> list[int]:
    from tuwen.errors import InvalidInput

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidInput(f"{flag} {text}: expected whole numbers with commas between") from None


def _print_towers(found: TowerReport) -> None:
    parity = {(one.tower, one.side): one for one in found.parity}
    table = Table(
        title=f"{found.architecture}, {found.threads} threads",
        caption=f"speed 2: half of PyTorch's time; cosine and difference: the worst of {found.parity[0].num_items} "
        "real items, against PyTorch",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in ("input", "side"):
        table.add_column(column, no_wrap=True)
    for column in ("ms", "items/s", "speed", "cosine", "max diff"):
        table.add_column(column, justify="right", no_wrap=True)
    for index, one in enumerate(found.times):
        is_first = index == 0 or found.times[index - 1].input != one.input
        if is_first and index:
            table.add_row()
        close = parity[one.tower, one.side]
        table.add_row(
            *(one.input if is_first else "", one.side, f"{one.median_ms:.2f}"),
            *(f"{one.batch / one.median_ms * 1000:.0f}", f"{one.speed_of_pytorch:.2f}"),
            *(f"{close.min_cosine:.6f}", f"{close.max_abs_diff:.1e}"),
        )
    stdout.print(table)
