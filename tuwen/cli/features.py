"""`tuwen features`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuwen.cli.console import DEFAULT_REPOSITORY, Json, Out, Repository, Url, progress_bar, stdout
from tuwen.cli.engine_options import Authority, Device, EngineName, Model, ModelVersion, SomeCheckpoint, tls_of

if TYPE_CHECKING:
    from eval.features import Extraction


class FeatureEngine(StrEnum):
    """What computes the embeddings; ray: PyTorch, on the machines of a cluster."""

    torch = "torch"
    onnx = "onnx"
    triton = "triton"
    ray = "ray"


class Dtype(StrEnum):
    """Of the embeddings on disk."""

    float16 = "float16"
    float32 = "float32"


def features(
    data: Annotated[
        Path,
        typer.Option("--data", help="Folder of pictures, of an LMDB or of TSV and JSONL; a glob of shards; Parquet."),
    ],
    out: Out,
    engine: Annotated[
        FeatureEngine, typer.Option("--engine", help="What embeds; ray: checkpoints by Ray Data.")
    ] = FeatureEngine.torch,
    checkpoint: SomeCheckpoint = None,
    images: Annotated[bool, typer.Option("--images", help="Only pictures, unless --texts is given too.")] = False,
    texts: Annotated[bool, typer.Option("--texts", help="Only texts, unless --images is given too.")] = False,
    split: Annotated[str, typer.Option("--split", help="Which split of the data.")] = "valid",
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Of the embeddings on disk.")] = Dtype.float16,
    single_file: Annotated[bool, typer.Option("--single-file", help="Also one Parquet file of each side.")] = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Also Chinese-CLIP's feature JSONL.")] = False,
    part_rows: Annotated[
        int, typer.Option("--part-rows", min=1, help="Items to a part, the most work that a kill loses.")
    ] = 4096,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Of torch, onnx and ray.")] = None,
    device: Device = "cpu",
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Of ray; default: one a GPU, else one a machine.")
    ] = None,
    repository: Repository = DEFAULT_REPOSITORY,
    model: Model = None,
    model_version: ModelVersion = None,
    url: Url = "localhost:8001",
    tls_ca: Authority = None,
    as_json: Json = False,
) -> None:
    """Embed pictures and texts to Parquet; after a kill the same command goes on where it ended."""
    from eval.feature_sources import SIDES
    from eval.features import EngineChoice, FeatureJob, parts_by_engine, write_features
    from eval.ray_features import parts_by_ray

    sides = tuple(side for side, wanted in zip(SIDES, (images, texts), strict=True) if wanted)
    job = FeatureJob(data, out, split, sides, dtype.value, part_rows, single_file, jsonl)
    computing = EngineName.torch if engine is FeatureEngine.ray else EngineName(engine)
    choice = EngineChoice(
        computing.value, checkpoint, device, batch_size, repository, model, model_version, url, tls_of(tls_ca)
    )
    # Under Ray this process only has to know which model it is, and may have no GPU.
    own = replace(choice, device="cpu") if engine is FeatureEngine.ray else choice
    with own.open() as opened, progress_bar("embedding") as report:
        parts = parts_by_ray(choice, workers) if engine is FeatureEngine.ray else parts_by_engine(opened)
        done = write_features(job, opened, engine.value, parts, report)
    if as_json:
        print(json.dumps([asdict(one) for one in done], default=str, ensure_ascii=False))
        return
    for one in done:
        _print_extraction(one)


def _print_extraction(one: Extraction) -> None:
    resumed = f", {one.num_resumed} of the items by an earlier run" if one.num_resumed else ""
    skipped = f", {one.num_skipped} skipped ({one.folder}/skipped.jsonl)" if one.num_skipped else ""
    stdout.print(
        f"{one.folder}: {one.num_embedded} {one.side} embedded{skipped}{resumed}", soft_wrap=True, markup=False
    )
    for path in one.files:
        stdout.print(path, soft_wrap=True, markup=False)
