"""`tuwen build --profile gpu`: plans are placed only behind the gate, whole or not at all, and not twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from typer.testing import CliRunner

from builders.build import build
from builders.build_record import find_current
from builders.feeds import Feed
from builders.gpu_build import Gpu, GpuBuildResult, build_gpu, pipeline_path
from builders.plan_gate import PlanPrecision, Run, gate_batches, measure_plan
from builders.tensorrt_plan import ComputeCapability, PlanFailed, PlanOptions
from builders.towers import TOWERS
from tests.builders.gpu import absent_gpu, open_onnx, run_reduced_onnx
from tests.conftest import SMALL_SPECS, random_model
from tuwen.checkpoint import load_checkpoint, save_checkpoint
from tuwen.cli import app
from tuwen.errors import InvalidInput, MissingDependency
from tuwen.model import ChineseCLIP

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning"),
]
ROOT = Path(__file__).parents[2]


def build_here(folder: Path, gpu: Gpu | None = None, if_changed: bool = False, **options: object) -> GpuBuildResult:
    """The checkpoint in a folder, for a GPU that is not there."""
    precision: PlanPrecision = options.pop("precision", "fp16")  # type: ignore[assignment]
    return build_gpu(
        folder / "model", None, folder / "served", precision=precision, options=PlanOptions(**options),  # type: ignore[arg-type]
        if_changed=if_changed, find_gpu=lambda: gpu or absent_gpu(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, `model`, and a repository with CPU model and fp16 plans, `served`."""
    pytest.importorskip("nvidia.dali", reason="model.dali needs nvidia-dali")
    folder = tmp_path_factory.mktemp("gpu")
    save_checkpoint(random_model(SMALL_SPECS["vit"]), folder / "model")
    build_here(folder)
    return folder


@pytest.fixture
def built(built_once: Path, tmp_path: Path) -> Path:
    shutil.copytree(built_once, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def model(built_once: Path) -> ChineseCLIP:
    return load_checkpoint(built_once / "model")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tower_dir(folder: Path, kind: str) -> Path:
    return folder / "served" / f"small_vit_{kind}_tower" / "1"


@contextmanager
def run_perturbed(trt: ModuleType, plan_path: Path) -> Iterator[Run]:
    """The plan's arithmetic, and then noise: what a wrong kernel would give."""
    with run_reduced_onnx(trt, plan_path) as run:

        def noisy(feed: Feed) -> Feed:
            outputs = run(feed)
            name = next(iter(outputs))
            moved = outputs[name] + 0.05 * np.random.default_rng(0).standard_normal(outputs[name].shape, np.float32)
            outputs[name] = moved / np.linalg.norm(moved, axis=1, keepdims=True)
            return outputs

        yield noisy


# --- what is placed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOWERS)
def test_a_plan_stands_beside_the_onnx_with_its_record(built: Path, kind: str) -> None:
    record = json.loads((tower_dir(built, kind) / "model_sm86.json").read_text(encoding="utf-8"))
    assert (tower_dir(built, kind) / "model_sm86.plan").stat().st_size == record["size_bytes"] > 10_000
    cpu = json.loads((tower_dir(built, kind) / "build.json").read_text(encoding="utf-8"))
    assert record["fingerprint"] == cpu["fingerprint"]
    assert (record["precision"], record["compute_capability"], cpu["precision"]) == ("fp16", "8.6", "fp32")
    assert record["tensorrt"]["module"] == "tensorrt_rtx"
    assert record["parity"]["min_cosine"] >= 0.9995
    assert record["parity"]["num_items"] >= 16 + 32
    names = {path.name for path in tower_dir(built, kind).iterdir()}
    assert names == {"model.onnx", "build.json", ".gitkeep", "model_sm86.plan", "model_sm86.json"}


def test_the_preprocessing_pipeline_and_nothing_else_is_placed(built: Path) -> None:
    """Nothing is left in staging; the timing cache is in a hidden folder."""
    assert pipeline_path(built / "served", 32).stat().st_size > 100
    assert [path.name for path in (built / "served").iterdir() if path.name.startswith(".")] == [".tensorrt"]


def test_the_same_again_makes_nothing(built: Path) -> None:
    """With --if-changed; any other wish, or a lost file, does."""
    before = tree(built / "served")
    assert build_here(built, if_changed=True).is_current
    assert tree(built / "served") == before
    (tower_dir(built, "image") / "model_sm86.plan").unlink()
    assert not build_here(built, if_changed=True).is_current
    assert build_here(built, if_changed=True).is_current


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_another_precision_is_another_plan(built: Path, precision: PlanPrecision) -> None:
    """The CPU model stays as it is."""
    before = tree(built / "served")
    result = build_here(built, if_changed=True, precision=precision)
    assert not result.is_current
    assert result.cpu.is_current
    after = tree(built / "served")
    changed = {path for path in after if after[path] != before.get(path)}
    files = {f"small_vit_{kind}_tower/1/model_sm86.{suffix}" for kind in TOWERS for suffix in ("plan", "json")}
    assert files <= changed
    assert {path for path in changed if path.endswith(".onnx")} == set()
    assert all(record["precision"] == precision for record in result.plans.values())


def test_a_plan_for_every_gpu_has_the_name_of_each(built: Path) -> None:
    """From Ampere on; Turing's stays missing, and so fails loudly."""
    build_here(built, hardware_compatible=True)
    plans = {path.name: path for path in tower_dir(built, "text").glob("*.plan")}
    assert {"model_sm80.plan", "model_sm86.plan", "model_sm89.plan", "model_sm90.plan", "model_sm120.plan"} <= set(
        plans
    )
    assert "model_sm75.plan" not in plans
    assert len({path.stat().st_ino for path in plans.values()}) == 1


def test_new_weights_drop_the_plans_of_the_old(built: Path) -> None:
    """A plan of other weights beside a new ONNX would answer with other vectors, so the version folder goes whole."""
    changed = random_model(SMALL_SPECS["vit"])
    changed.logit_scale.data.fill_(1.5)
    save_checkpoint(changed, built / "model")
    build(built / "model", None, built / "served", if_changed=True)
    assert not list((built / "served").rglob("*.plan"))


def test_a_current_cpu_model_is_not_built_again(built: Path) -> None:
    """Told by its record: as built, and no more once a tower's file is gone. The command says so in one line."""
    before = tree(built / "served")
    result = build(built / "model", None, built / "served", if_changed=True)
    assert result.is_current
    assert result.parity["text"].num_items >= 16
    assert tree(built / "served") == before
    command = f"build --checkpoint {built / 'model'} --repository {built / 'served'} --if-changed"
    told = CliRunner().invoke(app, command.split())
    assert (told.exit_code, told.stdout) == (0, f"{built / 'served'}/small_vit, version 1: current, nothing was made\n")
    asked = (built / "model", None, built / "served", 1)
    assert find_current(*asked, "fp32") == "small_vit"
    assert find_current(*asked, "int8") is None
    (tower_dir(built, "text") / "model.onnx").unlink()
    assert find_current(*asked, "fp32") is None


# --- what fails places nothing --------------------------------------------------------------------------------------


def test_a_plan_below_the_gate_is_not_placed(built: Path) -> None:
    """Nor the other tower's, nor do those of before go."""
    before = tree(built / "served")
    wrong = replace(absent_gpu(), open_plan=run_perturbed)
    with pytest.raises(
        PlanFailed, match=r"^text tower in fp16: cosine 0\.9\d+ with .*at least 0\.9995, so nothing was"
    ):
        build_here(built, wrong)
    assert tree(built / "served") == before


def test_an_overflow_names_the_layer(built: Path) -> None:
    """Weights that take float16 beyond its range; the gate says where."""
    big = random_model(SMALL_SPECS["vit"])
    big.get_parameter("bert.encoder.layer.0.intermediate.dense.weight").data.mul_(1e5)
    save_checkpoint(big, built / "model")
    with pytest.raises(PlanFailed, match=r"embeddings are not finite; \S+ \(\w+\) overflows, so nothing was placed$"):
        build_here(built)
    assert not list((built / "served").rglob("*.plan"))


def test_a_plan_of_other_weights_is_noticed(built: Path, model: ChineseCLIP) -> None:
    """By the fingerprint, whatever its vectors are."""
    onnx_path = tower_dir(built, "text") / "model.onnx"
    run = open_onnx(onnx_path)

    def other(feed: Feed) -> Feed:
        return run(feed) | {"fingerprint": run(feed)["fingerprint"] + 1}

    with pytest.raises(PlanFailed, match=r"^text tower in fp16: fingerprint \d+, expected \d+$"):
        measure_plan(other, onnx_path, "text", "fp16", gate_batches(model, "text"))


def test_a_scale_that_is_no_number_is_noticed(built: Path, model: ChineseCLIP) -> None:
    onnx_path = tower_dir(built, "text") / "model.onnx"
    run = open_onnx(onnx_path)

    def broken(feed: Feed) -> Feed:
        return run(feed) | {"logit_scale": run(feed)["logit_scale"] * np.float32("nan")}

    with pytest.raises(PlanFailed, match=r"^text tower in fp16: logit_scale nan, expected "):
        measure_plan(broken, onnx_path, "text", "fp16", gate_batches(model, "text"))


@pytest.mark.parametrize("kind", TOWERS)
def test_the_gate_feeds_single_items_and_a_full_batch(model: ChineseCLIP, kind: str) -> None:
    """The batch is of real items, in order, and of as many as the server ever joins."""
    batches = gate_batches(model, kind)  # type: ignore[arg-type]
    sizes = [len(expected) for _, expected in batches]
    assert sizes[-1] == 32
    assert 1 in sizes
    first = np.concatenate([expected for _, expected in batches[:-1]])[:32]
    assert np.array_equal(batches[-1][1][: len(first)], first)


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_without_a_gpu_the_cpu_model_stays(built: Path) -> None:
    """One sentence, exit 1, on the real command; what was built is not touched."""
    before = tree(built / "served")
    command = [sys.executable, "-m", "tuwen.cli", "build", "--checkpoint", "model", "--profile", "gpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, "--repository", "served"], cwd=built, env=environment, capture_output=True, text=True, timeout=300
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.strip().startswith("error: no NVIDIA ")
    assert len(ended.stderr.strip().splitlines()) == 1
    assert tree(built / "served") == before


def test_a_precision_the_gpu_lacks_is_refused(built: Path) -> None:
    turing = replace(absent_gpu(), capability=ComputeCapability(7, 5))
    with pytest.raises(InvalidInput, match=r"^precision bf16: needs compute capability 8\.0, this GPU has 7\.5$"):
        build_here(built, turing, precision="bf16")


@pytest.mark.parametrize(
    ("capability", "precision", "hardware_compatible", "reason"),
    [
        ((8, 7), "fp16", False, r"^this GPU has compute capability 8\.7, for which configs/gpu\.pbtxt names no plan"),
        ((7, 5), "fp16", True, r"^--hardware-compatible: needs compute capability 8\.0, this GPU has 7\.5$"),
        ((8, 9), "fp8", True, r"^--hardware-compatible: not with fp8"),
    ],
)
def test_a_plan_that_would_never_be_loaded_is_refused(
    built: Path, capability: tuple[int, int], precision: PlanPrecision, hardware_compatible: bool, reason: str
) -> None:
    before = tree(built / "served")
    gpu = replace(absent_gpu(), capability=ComputeCapability(*capability))
    with pytest.raises(InvalidInput, match=reason):
        build_here(built, gpu, precision=precision, hardware_compatible=hardware_compatible)
    assert tree(built / "served") == before


def test_a_folder_without_weights_is_a_sentence(built: Path) -> None:
    """Also where it is asked first whether anything has changed."""
    (built / "model" / "model.safetensors").unlink()
    with pytest.raises(InvalidInput, match=r"not a checkpoint folder, model\.safetensors is missing$"):
        build_here(built, if_changed=True)


def test_a_missing_tensorrt_leaves_the_cpu_model(built: Path) -> None:
    def find_gpu() -> Gpu:
        raise MissingDependency("TensorRT cannot be loaded")

    with pytest.raises(MissingDependency):
        build_gpu(built / "model", None, built / "served", find_gpu=find_gpu)
    assert build(built / "model", None, built / "served", if_changed=True).is_current


_KILLED_BUILD = """
import os, signal, sys
from pathlib import Path
import builders.gpu_build
from tests.builders.gpu import absent_gpu

real, calls = os.replace, []

def dies_between_the_towers(source, target):
    real(source, target)
    if str(target).endswith(".plan"):
        os.kill(os.getpid(), signal.SIGKILL)

builders.gpu_build.os.replace = dies_between_the_towers
folder = Path(sys.argv[1])
builders.gpu_build.build_gpu(folder / "model", None, folder / "served", precision="bf16", find_gpu=absent_gpu)
"""


def test_a_kill_while_placing_leaves_plans_that_are_whole_and_not_called_current(built: Path) -> None:
    """SIGKILL after the first plan is in place: it has no record, the other is untouched; the next run mends it."""
    before = tree(built / "served")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", _KILLED_BUILD, str(built)], env=environment, timeout=300)
    assert ended.returncode == -signal.SIGKILL
    after = tree(built / "served")
    assert "small_vit_text_tower/1/model_sm86.json" not in after
    assert {path: content for path, content in after.items() if "image_tower" in path} == {
        path: content for path, content in before.items() if "image_tower" in path
    }
    assert not build_here(built, if_changed=True, precision="bf16").is_current
    assert build_here(built, if_changed=True, precision="bf16").is_current
