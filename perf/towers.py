"""The two towers alone, without a server: PyTorch, ONNX Runtime fp32 and int8, TensorRT where there is a GPU.

    tuwen bench towers --checkpoint samples/emoji_tiny
    tuwen bench towers --architecture ViT-B-16        # random weights, on which speed does not depend

Every side gets the same input on the same number of threads, in turn within one run; beside its speed stands how close
its embeddings are to PyTorch's, over real captions and pictures.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch

from builders.build_record import tool_versions
from builders.configs import MAX_BATCH_SIZE
from builders.cuda_device import compute_capability
from builders.onnx_export import export_tower
from builders.plan_gate import Run
from builders.plan_runner import open_plan
from builders.quantize import quantize_tower
from builders.reduced_precision import write_half
from builders.tensorrt_plan import PlanOptions, build_plan, import_tensorrt, profile_shapes
from builders.towers import SAMPLES_DIR, TOWERS, TowerKind, sample_captions, sample_pictures
from perf.rounds import alternate, machine, medians
from tuwen.checkpoint import load_checkpoint
from tuwen.data.pairs import open_pairs
from tuwen.errors import InvalidInput, MissingDependency
from tuwen.files import atomic_path, replace_folder
from tuwen.fingerprint import model_fingerprint
from tuwen.image_transform import preprocess_image
from tuwen.model import ChineseCLIP
from tuwen.specs import CLS_ID, SEP_ID, ModelSpec, get_spec
from tuwen.tokenizer import default_tokenizer, pack_rows, pad_rows

log = logging.getLogger(__name__)

CACHE_DIR = Path(__file__).parents[1] / ".cache" / "bench" / "towers"
PYTORCH = "PyTorch"
DEFAULT_BATCHES = (1, 8, 16)
DEFAULT_LENGTHS = (9, 52)  # tokens: MUGE's mean of 7 characters with [CLS] and [SEP], and the most there can be
DEFAULT_ROUNDS = 7
NUM_PARITY_ITEMS = 32
_REST_S, _MOMENT_S = 0.1, 0.1

Embeds = npt.NDArray[np.float32]
Rows = Sequence[Sequence[int]]  # token ids of texts, unpadded
# A tower as one side runs it: texts or pixel_values -> embeddings (B, D) on the host.
Side = Callable[[Any], Embeds]


@dataclass(frozen=True)
class TowerTime:
    """One side on one input: milliseconds a call, median, least and greatest of the rounds."""

    tower: TowerKind
    batch: int
    length: int | None
    side: str
    median_ms: float
    min_ms: float
    max_ms: float
    speed_of_pytorch: float

    @property
    def input(self) -> str:
        """As a reader names it: "text 16 x 9" is 16 texts of 9 tokens."""
        return f"{self.tower} {self.batch}" + (f" x {self.length}" if self.length else "")


@dataclass(frozen=True)
class TowerParity:
    """Against PyTorch over real items: the worst cosine, and the largest difference of a component."""

    tower: TowerKind
    side: str
    min_cosine: float
    max_abs_diff: float
    num_items: int


@dataclass(frozen=True)
class TowerReport:
    """All of one run; `weights` is a checkpoint's path, or "random"."""

    architecture: str
    weights: str
    threads: int
    rounds: int
    times: tuple[TowerTime, ...]
    parity: tuple[TowerParity, ...]
    machine: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def load_model(checkpoint: Path | None, architecture: str | None) -> tuple[ChineseCLIP, str]:
    """The model to time, and where its weights are from.

    Raises:
        InvalidInput: both or neither given, or it cannot be read.
    """
    if (checkpoint is None) == (architecture is None):
        raise InvalidInput("give one of --checkpoint and --architecture")
    if checkpoint is not None:
        return load_checkpoint(checkpoint), str(checkpoint)
    torch.manual_seed(0)
    return ChineseCLIP(get_spec(str(architecture))).eval(), "random"


def measure_towers(
    model: ChineseCLIP,
    weights: str,
    batches: Sequence[int] = DEFAULT_BATCHES,
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    rounds: int = DEFAULT_ROUNDS,
    threads: int | None = None,
    cache_dir: Path = CACHE_DIR,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> TowerReport:
    """Time both towers on every side.

    Args:
        batches: items a call.
        lengths: of the texts, in tokens with [CLS] and [SEP].
        threads: of every side; by default all cores this process may use.
    Raises:
        InvalidInput: a batch, length, number of rounds or of threads that cannot be.
        ExportFailed: a tower cannot be exported or quantised.
    """
    longest = min(model.spec.context_length, model.spec.text.max_positions)
    _check("--batch", batches, 1, MAX_BATCH_SIZE)
    _check("--lengths", lengths, 3, longest)
    threads = threads or len(os.sched_getaffinity(0))
    _check("--threads", [threads], 1, 1024)
    _check("--rounds", [rounds], 1, 1000)
    times: list[TowerTime] = []
    parity: list[TowerParity] = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for kind in TOWERS:
            with ExitStack() as opened:
                sides = open_sides(model, kind, threads, cache_dir, on_stage, opened)
                on_stage(f"comparing the {kind} towers with PyTorch")
                parity += _measure_parity(kind, sides, _real_items(model, kind, longest))
                for batch in batches:
                    for length in lengths if kind == "text" else (None,):
                        on_stage(f"timing the {kind} tower, batch {batch}" + (f", {length} tokens" if length else ""))
                        items = _items(model, kind, batch, length)
                        times += _time(kind, batch, length, sides, items, rounds)
    finally:
        torch.set_num_threads(before)
    return TowerReport(model.spec.name, weights, threads, rounds, tuple(times), tuple(parity), machine())


def _check(flag: str, values: Sequence[int], least: int, most: int) -> None:
    for value in values:
        if not least <= value <= most:
            raise InvalidInput(f"{flag} {value}: expected {least} to {most}")
    if not values:
        raise InvalidInput(f"{flag}: no number given")


def open_sides(
    model: ChineseCLIP,
    kind: TowerKind,
    threads: int,
    cache_dir: Path,
    on_stage: Callable[[str], None],
    opened: ExitStack,
) -> dict[str, Side]:
    """Every side that runs on this machine, PyTorch first; what has to be closed goes to `opened`."""
    folder = build_onnx(model, kind, cache_dir, on_stage)
    sides: dict[str, Side] = {PYTORCH: partial(_run_pytorch, model, kind)}
    if torch.cuda.is_available():
        sides["PyTorch CUDA"] = partial(_run_pytorch, deepcopy(model).to("cuda"), kind)
    for name, file in (("ONNX Runtime fp32", "fp32.onnx"), ("ONNX Runtime int8", "int8.onnx")):
        sides[name] = partial(_run_onnx, _open_session(folder / file, threads), kind)
    on_stage(f"building TensorRT plans of the {kind} tower, if there is a GPU")
    for name, run in open_plans(folder, kind, model.spec, opened).items():
        sides[name] = partial(_run_plan, run, kind)
    return sides


def open_plans(folder: Path, kind: TowerKind, spec: ModelSpec, opened: ExitStack) -> dict[str, Run]:
    """Side name -> plan, made as `tuwen build --profile gpu` makes it; empty without GPU or without TensorRT.

    Raises:
        PlanFailed: TensorRT refuses the tower.
    """
    try:
        capability = compute_capability()
    except MissingDependency:
        return {}
    try:
        trt = import_tensorrt()
    except MissingDependency as error:  # a GPU without it is worth a word
        log.warning("no TensorRT beside the others: %s", error)
        return {}
    half_dir = folder / "fp16"
    if not half_dir.exists():
        with tempfile.TemporaryDirectory(prefix=".fp16-", dir=folder) as name:
            staging = Path(name, "fp16")
            staging.mkdir()
            write_half(folder / "fp32.onnx", staging / "fp16.onnx", "fp16")
            replace_folder(staging, half_dir)
    runs, paths = {}, {"fp32": folder / "fp32.onnx", "fp16": half_dir / "fp16.onnx"}
    for precision, path in paths.items():
        plan = folder / f"{precision}-{trt.__version__}-{capability.sm}.plan"
        if not plan.exists():
            with atomic_path(plan) as temporary:
                build_plan(trt, path, temporary, profile_shapes(spec, kind), PlanOptions())
        runs[f"TensorRT {precision}"] = opened.enter_context(open_plan(trt, plan))
    return runs


def build_onnx(model: ChineseCLIP, kind: TowerKind, cache_dir: Path, on_stage: Callable[[str], None]) -> Path:
    """A folder with fp32.onnx and int8.onnx of the tower; made once for these weights.

    int8 is not put through the builder's gate of recall, which says nothing about random weights: parity is shown.
    """
    fingerprint = model_fingerprint(model.spec, model.state_dict())
    made_by = f"torch{torch.__version__}-{tool_versions()['source']}"  # the exporter's source too
    target = cache_dir / f"{model.spec.slug}-{fingerprint:016x}-{made_by}" / kind
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{kind}-", dir=target.parent) as name:
        staging = Path(name, "tower")
        staging.mkdir()
        on_stage(f"exporting the {kind} tower")
        export_tower(model, kind, fingerprint, staging / "fp32.onnx")
        on_stage(f"quantising the {kind} tower")
        quantize_tower(staging / "fp32.onnx", staging / "int8.onnx")
        replace_folder(staging, target)
    return target


def _open_session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@torch.inference_mode()
def _run_pytorch(model: ChineseCLIP, kind: TowerKind, items: Any) -> Embeds:
    """Texts padded to the longest among them, as training and evaluation feed them."""
    device = model.logit_scale.device
    if kind == "image":
        embeds = model.encode_image(torch.from_numpy(items).to(device), normalize=True)
    else:
        padded = torch.from_numpy(pad_rows(items, max(map(len, items))))
        embeds = model.encode_text(padded.to(device), normalize=True)
    return embeds.cpu().numpy()


def _feed(kind: TowerKind, items: Any) -> dict[str, npt.NDArray[Any]]:
    """The inputs of a served tower: texts packed, as Triton's ragged batching lays them."""
    return {"pixel_values": items} if kind == "image" else pack_rows(items)


def _run_onnx(session: ort.InferenceSession, kind: TowerKind, items: Any) -> Embeds:
    embeds: Embeds = session.run([f"{kind}_embeds"], _feed(kind, items))[0]
    return embeds


def _run_plan(run: Run, kind: TowerKind, items: Any) -> Embeds:
    return run(_feed(kind, items))[f"{kind}_embeds"]


def _time(
    kind: TowerKind, batch: int, length: int | None, sides: Mapping[str, Side], items: Any, rounds: int
) -> list[TowerTime]:
    found = alternate({name: partial(_milliseconds_a_call, side, items) for name, side in sides.items()}, rounds)
    middle = medians(found)
    return [
        TowerTime(kind, batch, length, name, middle[name], min(row), max(row), middle[PYTORCH] / middle[name])
        for name, row in found.items()
    ]


def _milliseconds_a_call(side: Side, items: Any) -> float:
    """Mean over as many calls as fill a moment, after a rest and a call that does not count.

    The threads of the side before spin on for a while after its last call, and would take cores from this one: without
    the rest PyTorch's medians were up to 25 times its best.
    """
    time.sleep(_REST_S)
    side(items)
    calls, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < _MOMENT_S:
        side(items)
        calls += 1
    return passed / calls * 1000


def _measure_parity(kind: TowerKind, sides: Mapping[str, Side], items: Any) -> list[TowerParity]:
    expected = sides[PYTORCH](items)
    found = []
    for name, side in sides.items():
        embeds = side(items)
        cosine = float((embeds * expected).sum(axis=1).min())
        found.append(TowerParity(kind, name, min(cosine, 1.0), float(np.abs(embeds - expected).max()), len(items)))
    return found


def _real_items(model: ChineseCLIP, kind: TowerKind, longest: int) -> Any:
    """Emoji-CN's captions of all lengths as token ids, or its pictures as pixel_values (N, 3, R, R)."""
    if kind == "text":
        return [default_tokenizer().encode_ids(caption, longest) for caption in sample_captions(NUM_PARITY_ITEMS)]
    resolution = model.spec.vision.resolution
    return np.stack([preprocess_image(each, resolution) for each in sample_pictures(NUM_PARITY_ITEMS)])


def _items(model: ChineseCLIP, kind: TowerKind, batch: int, length: int | None) -> Any:
    """`batch` texts of `length` tokens, or as many pictures."""
    if length is not None:
        return texts_of_length(batch, length)
    return np.stack(list(islice(cycle(_real_items(model, kind, 0)), batch)))


def texts_of_length(count: int, length: int) -> Rows:
    """Token ids of `count` texts of exactly `length` tokens, [CLS] and [SEP] among them, made of captions."""
    captions = open_pairs(SAMPLES_DIR, "valid").texts
    tokens = (token for record in cycle(captions) for token in default_tokenizer().encode_ids(record.text)[1:-1])
    return [[CLS_ID, *islice(tokens, length - 2), SEP_ID] for _ in range(count)]
