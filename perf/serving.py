"""Is serving faster than the published path, and what does Triton add to bare ONNX Runtime?

    make bench-serving                      # ViT-B-16, random weights: about 15 minutes after a first build of 3
    python -m perf.serving --only text      # text, image or tax

Weights are random, because speed does not depend on them; both precisions are built from the same ones. Every
comparison alternates its sides within one run, on the same threads, and reports medians and ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from tuwen_client import Client

from builders.build import build
from builders.quantize import quantize_tower
from builders.repository import rendered_files, write_rendered
from perf.http_requests import HttpRequests, closed_loop, text_request
from perf.published import import_cn_clip, published_transform, published_twin
from perf.rounds import (
    alternate,
    machine,
    median_difference,
    median_ratio,
    medians,
    milliseconds_of,
    rate_of,
    write_json,
)
from perf.stages import Stage, Statistics, measure_stages, read_statistics, settle
from perf.workload import encode_jpeg, muge_like_texts, photographs
from tuwen.checkpoint import load_checkpoint, save_checkpoint
from tuwen.errors import TuwenError
from tuwen.model import ChineseCLIP
from tuwen.serving.ports import free_ports
from tuwen.serving.server import EmbeddedServer
from tuwen.specs import SPECS
from tuwen.tokenizer import default_tokenizer, normalize_text, pack_rows

BENCH_DIR = Path(".cache/bench")
ARCHITECTURE = "ViT-B-16"
FP32, INT8, SAMPLE = "vit_b_16", "vit_b_16_int8", "sample"
SAMPLE_CHECKPOINT = Path(__file__).parents[1] / "samples" / "emoji_tiny"
CONCURRENCY = 16
ROUNDS = 5
ALONE = 30
PUBLISHED_TEXT_BATCH, PUBLISHED_IMAGE_BATCH = 16, 8
NUM_TEXTS = {"published": 64, "served": 256}
NUM_IMAGES = {"published": 16, "served": 32}


@dataclass(frozen=True)
class Bench:
    """What all comparisons share."""

    checkpoint: Path
    repository: Path
    server: EmbeddedServer

    def client(self, name: str, max_in_flight: int = CONCURRENCY) -> Client:
        return Client(self.server.endpoints.grpc, name, max_in_flight=max_in_flight)

    def statistics(self) -> Statistics:
        """Of all that has been answered until now."""
        settle()
        return read_statistics(self.server.endpoints.grpc, self.server.endpoints.metrics)

    def tower(self, name: str, kind: str) -> Path:
        return self.repository / f"{name}_{kind}_tower" / "1" / "model.onnx"


def bench_repository(work_dir: Path = BENCH_DIR) -> Path:
    """Both precisions of a model with random weights; built at the first call."""
    checkpoint, repository = work_dir / "checkpoint", work_dir / "repository"
    if not checkpoint.exists():
        torch.manual_seed(0)
        save_checkpoint(ChineseCLIP(SPECS[ARCHITECTURE]), checkpoint)
    for name in (FP32, INT8):
        if not (repository / f"{name}_image" / "1").exists():
            print(f"building {name}", flush=True)
            build(checkpoint, name, repository)
        # Configs may have changed since the towers were built.
        write_rendered(rendered_files(SPECS[ARCHITECTURE], name), repository, overwrite=True)
    for kind in ("text", "image"):
        _replace_by_int8(repository / f"{INT8}_{kind}_tower" / "1")
    return repository


@contextmanager
def open_bench(work_dir: Path = BENCH_DIR, models: Sequence[str] | None = None) -> Iterator[Bench]:
    """A server with both precisions, unless models are named, and no cache of answers."""
    with _open(work_dir / "checkpoint", bench_repository(work_dir), models) as bench:
        yield bench


@contextmanager
def open_sample(work_dir: Path = BENCH_DIR) -> Iterator[Bench]:
    """The sample checkpoint, whose tower takes next to nothing."""
    repository = work_dir / "sample_repository"
    build(SAMPLE_CHECKPOINT, SAMPLE, repository)
    with _open(SAMPLE_CHECKPOINT, repository, [f"{SAMPLE}_text"]) as bench:
        yield bench


@contextmanager
def _open(checkpoint: Path, repository: Path, models: Sequence[str] | None) -> Iterator[Bench]:
    grpc_port, http_port, metrics_port = free_ports(3)
    with EmbeddedServer(
        repository,
        models=models,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        cache_size_bytes=0,  # every round sends the same texts
    ) as server:
        yield Bench(checkpoint, repository, server)


def _replace_by_int8(version_dir: Path) -> None:
    """Without the builder's gate of recall, which means nothing for random weights."""
    int8, done = version_dir / "int8.onnx", version_dir / "is_int8"
    if done.exists():
        return
    quantize_tower(version_dir / "model.onnx", int8)
    int8.replace(version_dir / "model.onnx")
    (version_dir / "model.onnx.data").unlink(missing_ok=True)
    done.touch()


def compare_text(bench: Bench) -> dict[str, Any]:
    """Texts per second: cn_clip's tokenize and encode_text in batches of 16, and the server at concurrency 16."""
    clip = import_cn_clip()
    published = published_twin(load_checkpoint(bench.checkpoint))

    @torch.inference_mode()
    def embed_published(texts: list[str]) -> None:
        for start in range(0, len(texts), PUBLISHED_TEXT_BATCH):
            published.encode_text(clip.tokenize(texts[start : start + PUBLISHED_TEXT_BATCH]))  # type: ignore[operator]

    texts = muge_like_texts(NUM_TEXTS["served"])
    few = texts[: NUM_TEXTS["published"]]
    with bench.client(FP32) as fp32, bench.client(INT8) as int8:
        sides = {
            "published": rate_of(partial(embed_published, few), len(few)),
            "served fp32": rate_of(partial(fp32.embed_text, texts), len(texts)),
            "served int8": rate_of(partial(int8.embed_text, texts), len(texts)),
        }
        warm_up(sides)
        found = alternate(sides, ROUNDS)
    return against_published("texts/s", found)


def compare_images(bench: Bench) -> dict[str, Any]:
    """640x480 JPEGs per second: PIL and encode_image in batches of 8, and the server at concurrency 16."""
    import_cn_clip()
    published = published_twin(load_checkpoint(bench.checkpoint))
    resolution = SPECS[ARCHITECTURE].vision.resolution

    @torch.inference_mode()
    def embed_published(jpegs: list[bytes]) -> None:
        for start in range(0, len(jpegs), PUBLISHED_IMAGE_BATCH):
            batch = [published_transform(each, resolution) for each in jpegs[start : start + PUBLISHED_IMAGE_BATCH]]
            published.encode_image(torch.stack(batch))  # type: ignore[operator]

    different = [encode_jpeg(picture, (640, 480)) for _, picture in photographs()]
    jpegs = (different * NUM_IMAGES["served"])[: NUM_IMAGES["served"]]
    few = jpegs[: NUM_IMAGES["published"]]
    with bench.client(FP32) as fp32, bench.client(INT8) as int8:
        sides = {
            "published": rate_of(partial(embed_published, few), len(few)),
            "served fp32": rate_of(partial(fp32.embed_images, jpegs), len(jpegs)),
            "served int8": rate_of(partial(int8.embed_images, jpegs), len(jpegs)),
        }
        warm_up(sides)
        found = alternate(sides, ROUNDS)
    return against_published("images/s", found)


def measure_tax(bench: Bench, name: str = FP32) -> dict[str, Any]:
    """What serving adds to ONNX Runtime called in this process: throughput at concurrency 16, time of one request.

    Served: over HTTP, by a sender that takes next to nothing of the cores that it shares with the server; client: by
    `tuwen_client`, which does take its part.
    """
    options = ort.SessionOptions()
    # Else its threads spin on after each call, and take the processor from the server, which is asked next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(bench.tower(name, "text"), options, providers=["CPUExecutionProvider"])
    texts = muge_like_texts(NUM_TEXTS["served"], seed=1)
    ids = [default_tokenizer().encode_ids(normalize_text(text)) for text in texts]
    requests = [text_request(f"{name}_text", text) for text in texts]
    http: HttpRequests[int] = HttpRequests(bench.server.endpoints.http_address)

    def run_bare(batch_size: int) -> None:
        for start in range(0, len(ids), batch_size):
            session.run(["text_embeds"], pack_rows(ids[start : start + batch_size]))

    def run_served() -> None:
        statuses = {each.status for each in closed_loop(http, requests, CONCURRENCY)}
        if statuses != {200}:
            raise TuwenError(f"the server answered with status {', '.join(map(str, sorted(statuses)))}")

    with bench.client(name) as client, bench.client(name, max_in_flight=1) as patient:
        run_served()
        before = bench.statistics()
        run_served()
        stages = measure_stages(before, bench.statistics(), [f"{name}_text", "tokenize_text", f"{name}_text_tower"])
        batch_size = max(1, round(stages[-1].mean_batch))
        together = {
            "bare": rate_of(partial(run_bare, batch_size), len(ids)),
            "served": rate_of(run_served, len(texts)),
            "client": rate_of(partial(client.embed_text, texts), len(texts)),
        }
        warm_up(together)
        found = alternate(together, 2 * ROUNDS)
        feeds = [pack_rows([each]) for each in ids[:ALONE]]
        alone = {
            "bare": median_ms(lambda n: session.run(["text_embeds"], feeds[n])),
            "served": median_ms(lambda n: closed_loop(http, requests[n : n + 1], 1)),
            "client": median_ms(lambda n: patient.embed_text(texts[n : n + 1])),
        }
        lone = alternate(alone, 2 * ROUNDS)
    http.close()
    return {
        "mean_batch": stages[-1].mean_batch,
        "texts/s": medians(found),
        "of bare": {side: median_ratio(found, side, "bare") for side in ("served", "client")},
        "one request, ms": medians(lone),
        "more than bare, ms": {side: median_difference(lone, side, "bare") for side in ("served", "client")},
        "rounds": {"texts/s": found, "one request, ms": lone},
        "stages": [vars(stage) for stage in stages],
    }


def median_ms(work: Callable[[int], object]) -> Callable[[], float]:
    """A side that does `work` on texts 0, 1, ... one after another: median milliseconds of one."""
    return lambda: statistics.median(milliseconds_of(partial(work, n))() for n in range(ALONE))


def warm_up(sides: dict[str, Any]) -> None:
    for measure in sides.values():
        measure()


def against_published(unit: str, found: dict[str, list[float]]) -> dict[str, Any]:
    ratios = {f"{side}/published": median_ratio(found, side, "published") for side in found if side != "published"}
    return {unit: medians(found), "ratios": ratios, "rounds": found}


def describe(title: str, figures: dict[str, Any]) -> None:
    print(title)
    for key, value in figures.items():
        if key == "stages":
            print(Stage.header())
            for stage in value:
                print(Stage(**stage).row())
        elif isinstance(value, dict) and key != "rounds":
            print(f"  {key:16s} " + "  ".join(f"{name} {number:.2f}" for name, number in value.items()))
        elif isinstance(value, float):
            print(f"  {key:16s} {value:.3f}")
    print(flush=True)


PARTS = {"text": compare_text, "image": compare_images, "tax": measure_tax}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--out", type=Path, default=BENCH_DIR / "serving.json")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    results: dict[str, Any] = {"architecture": ARCHITECTURE, "machine": machine(), "at": time.strftime("%Y-%m-%d")}
    with open_bench() as bench:
        for part in options.only or PARTS:
            results[part] = PARTS[part](bench)
            describe(f"{part}: {(PARTS[part].__doc__ or '').splitlines()[0]}", results[part])
    write_json(options.out, results)
    print(options.out)


if __name__ == "__main__":
    main()
