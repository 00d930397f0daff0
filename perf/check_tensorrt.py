"""Does TensorRT take every tower of every architecture? Parsed and built at real size, dynamic shapes, without a GPU.

    make check-tensorrt                                              # all; some five minutes on two cores
    python -m perf.check_tensorrt --architectures Tiny-RN --out .cache/check

Runs `builders.tensorrt_plan`, which makes the plans of `tuwen build --profile gpu`, on random weights with the module
`tensorrt_rtx`, ahead of time for GPUs that are not there. It says nothing of speed; its engines are no Triton plans.
Every step is a process of its own, so that its memory is its own; any failure fails the run, after the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import onnx
import torch

from builders.onnx_export import export_tower
from builders.reduced_precision import write_half
from builders.tensorrt_plan import ComputeCapability, PlanOptions, build_plan, import_tensorrt, profile_shapes
from builders.towers import TOWERS, TowerKind
from perf.processes import peak_rss_bytes
from tuwen.errors import TuwenError
from tuwen.files import write_text
from tuwen.model import ChineseCLIP
from tuwen.specs import get_spec

ARCHITECTURES = ("RN50", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "Tiny-RN")
TARGETS = (ComputeCapability(8, 0), ComputeCapability(8, 6), ComputeCapability(8, 9))
Precision = Literal["fp32", "fp16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_MB = 1e6
_NAME = "tensorrt_check"
_FINGERPRINT = 1

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class TowerCheck:
    """One tower in one precision.

    Attributes:
        onnx_nodes: of the graph that is parsed; `onnx_ops` are its kinds.
        num_layers: that TensorRT makes of them.
        seconds: to build, by GPU.
        size_mb: of the largest engine, millions of bytes.
        peak_gb: memory of the process that built it, its libraries included.
        error: of the GPU or step that failed, else empty.
    """

    architecture: str
    tower: TowerKind
    precision: Precision
    onnx_nodes: int = 0
    onnx_ops: tuple[str, ...] = ()
    num_layers: int = 0
    seconds: dict[str, float] | None = None
    size_mb: float = 0.0
    peak_gb: float = 0.0
    error: str = ""


def check_tower(architecture: str, kind: TowerKind, say: Callable[[str], None]) -> list[TowerCheck]:
    """Export one tower, and build it in both precisions for every target."""
    with tempfile.TemporaryDirectory(prefix="check-tensorrt-") as name:
        folder, rows = Path(name), []
        say(f"{architecture} {kind}: exporting")
        try:
            _in_own_process(_export, architecture, kind, folder)
        except TuwenError as error:
            return [TowerCheck(architecture, kind, precision, error=str(error)) for precision in PRECISIONS]
        for precision in PRECISIONS:
            say(f"{architecture} {kind}: building {precision}")
            try:
                rows.append(_in_own_process(_build, architecture, kind, precision, folder))
            except TuwenError as error:
                rows.append(TowerCheck(architecture, kind, precision, error=str(error)))
        return rows


def _in_own_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool:
            raise TuwenError("the process died; it may have needed more memory than there is") from None


def _export(architecture: str, kind: TowerKind, folder: Path) -> None:
    torch.manual_seed(0)
    model = ChineseCLIP(get_spec(architecture)).eval()
    export_tower(model, kind, _FINGERPRINT, folder / "fp32.onnx")
    del model
    write_half(folder / "fp32.onnx", folder / "fp16.onnx", "fp16")


def _build(architecture: str, kind: TowerKind, precision: Precision, folder: Path) -> TowerCheck:
    path, plan_path = folder / f"{precision}.onnx", folder / "model.plan"
    trt, shapes = import_tensorrt("tensorrt_rtx"), profile_shapes(get_spec(architecture), kind)
    built = {
        target.sm: build_plan(trt, path, plan_path, shapes, PlanOptions(workspace_bytes=1 << 30, target=target))
        for target in TARGETS
    }
    ops = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    return TowerCheck(
        architecture,
        kind,
        precision,
        onnx_nodes=len(ops),
        onnx_ops=tuple(sorted(set(ops))),
        num_layers=max(one.num_layers for one in built.values()),
        seconds={sm: round(one.seconds, 1) for sm, one in built.items()},
        size_mb=round(max(one.size_bytes for one in built.values()) / _MB, 1),
        peak_gb=round(peak_rss_bytes() / 1e9, 1),
    )


def to_markdown(rows: Sequence[TowerCheck], tools: dict[str, str]) -> str:
    """The table, what the graphs consist of, and what made it."""
    targets = [target.sm for target in TARGETS]
    lines = [
        "# What TensorRT's parser and builder make of every tower",
        "",
        "Written by `make check-tensorrt`: random weights at real size, the profile that is served (batches of 1 to",
        f"32, texts of 1 to 52 tokens), `tensorrt_rtx` {tools['tensorrt_rtx']} ahead of time on a machine without GPU.",
        "It is TensorRT's parser and strongly typed builder, so a graph that they refuse is refused here; speed is not",
        "shown, and Triton's plans are others.",
        "",
        f"| architecture | tower | precision | ONNX nodes | layers | s {' / '.join(targets)} | engine MB | peak GB |",
        "|---|---|---|---:|---:|---:|---:|---:|",
        *(_row(row, targets) for row in rows),
        "",
        f"ONNX operators: {', '.join(sorted({op for row in rows for op in row.onnx_ops}))}.",
        "",
        f"Made with {', '.join(f'{name} {number}' for name, number in tools.items())}.",
        "",
    ]
    return "\n".join(lines)


def _row(row: TowerCheck, targets: list[str]) -> str:
    head = f"| {row.architecture} | {row.tower} | {row.precision} |"
    if row.error or row.seconds is None:
        return f"{head} **failed**: {row.error} | | | | |"
    seconds = " / ".join(f"{row.seconds[target]:.1f}" for target in targets)
    return f"{head} {row.onnx_nodes} | {row.num_layers} | {seconds} | {row.size_mb:.1f} | {row.peak_gb:.1f} |"


def read_rows(path: Path) -> list[TowerCheck]:
    """What an earlier run found."""
    if not path.is_file():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [TowerCheck(**row | {"onnx_ops": tuple(row["onnx_ops"])}) for row in rows]


def write_report(rows: Sequence[TowerCheck], out: Path) -> None:
    """Both files; rows in the order of ARCHITECTURES."""
    ordered = sorted(rows, key=lambda row: ARCHITECTURES.index(row.architecture))
    tools = {name: version(name) for name in ("tensorrt_rtx", "onnx", "torch")}
    found: dict[str, Any] = {"tools": tools, "rows": [asdict(row) for row in ordered]}
    write_text(out / f"{_NAME}.json", json.dumps(found, indent=1) + "\n")
    write_text(out / f"{_NAME}.md", to_markdown(ordered, tools))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder; rows of other architectures stay")
    options = parser.parse_args()
    import_tensorrt("tensorrt_rtx")
    rows = [row for row in read_rows(options.out / f"{_NAME}.json") if row.architecture not in options.architectures]
    for architecture in options.architectures:
        for kind in TOWERS:
            rows += check_tower(architecture, kind, lambda stage: print(stage, file=sys.stderr, flush=True))
            write_report(rows, options.out)
    print((options.out / f"{_NAME}.md").read_text(encoding="utf-8"))
    failed = [f"{row.architecture} {row.tower} {row.precision}: {row.error}" for row in rows if row.error]
    print("\n".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
