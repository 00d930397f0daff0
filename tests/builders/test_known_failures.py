"""What makes text embeddings wrong under TensorRT, each shown to fail, and absent from our graphs.

The reasoning is in docs/gpu_numerics.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from builders.half_numerics import first_overflow
from builders.onnx_export import export_tower
from builders.parity import open_session
from builders.reduced_precision import DTYPES, cast_graph, load_graph, save_graph, write_half
from builders.towers import SAMPLES_DIR, TOWERS, TowerKind
from tests.builders.conftest import FINGERPRINT
from tests.conftest import SMALL_SPECS, random_model
from tuwen.data.pairs import open_pairs
from tuwen.model import ChineseCLIP
from tuwen.tokenizer import default_tokenizer, normalize_text, pack_rows, pad_rows

FLOAT16_MAX = float(np.finfo(np.float16).max)
# Data-dependent shapes, guards against NaN and pooling by the largest id: none belongs into a tower.
UNWANTED_OPS = {"NonZero", "Unique", "Compress", "If", "Loop", "IsNaN", "IsInf", "ArgMax", "TopK", "CumSum", "Mod"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["fp32", "fp16", "bf16"])
def towers(
    request: pytest.FixtureRequest, sample: tuple[ChineseCLIP, dict[TowerKind, Path]], tmp_path_factory
) -> dict[TowerKind, Path]:
    if request.param == "fp32":
        return sample[1]
    paths = {kind: tmp_path_factory.mktemp(request.param) / f"{kind}.onnx" for kind in TOWERS}
    for kind, path in paths.items():
        write_half(sample[1][kind], path, request.param)
    return paths


# --- ours contain none of it ------------------------------------------------------------------------------------------


def test_no_constant_is_beyond_float16(towers) -> None:
    for path in towers.values():
        for each in onnx.load(path).graph.initializer:
            if each.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
                largest = np.abs(numpy_helper.to_array(each).astype(np.float32)).max()
                assert largest <= FLOAT16_MAX, each.name


def test_no_unwanted_operator(towers) -> None:
    for path in towers.values():
        assert UNWANTED_OPS.isdisjoint(node.op_type for node in onnx.load(path).graph.node)


def test_integers_are_never_of_floats(towers) -> None:
    """Ids and positions are INT64 all the way: above 2048 float16 has no odd numbers."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(towers["text"])).graph
    of = {each.name: each.type.tensor_type.elem_type for each in (*graph.input, *graph.value_info, *graph.output)}
    for node in graph.node:
        if node.op_type == "Cast":
            whole = {of[name] in (TensorProto.INT64, TensorProto.INT32) for name in (node.input[0], node.output[0])}
            assert len(whole) == 1 or of[node.input[0]] == TensorProto.BOOL, node.name
    assert of["input_ids"] == TensorProto.INT64


def test_normalisations_are_one_operator(towers, tmp_path: Path) -> None:
    """No LayerNorm in parts, whose squares overflow; no BatchNorm, which is folded into the convolution before it."""
    export_tower(random_model(SMALL_SPECS["vit"]), "image", FINGERPRINT, tmp_path / "vit.onnx")
    for path in (*towers.values(), tmp_path / "vit.onnx"):
        ops = {node.op_type for node in onnx.load(path).graph.node}
        assert ops.isdisjoint({"Pow", "Sqrt", "BatchNormalization", "InstanceNormalization"})
        assert ops & {"LayerNormalization", "Relu"}


# --- each fails where it is present -----------------------------------------------------------------------------------


def test_ids_bound_as_int32_are_other_texts(sample) -> None:
    """Since TensorRT 9 an INT64 input needs an INT64 binding. A runner written for 8, which made INT32 of it, gives a
    buffer in which every two ids read as one of billions (here clamped to the vocabulary), in float32, too."""
    model, _ = sample
    captions = [normalize_text(record.text) for record in open_pairs(SAMPLES_DIR, "valid").texts[:400:50]]
    rows = [default_tokenizer().encode_ids(caption, 52) for caption in captions]
    ids = pad_rows(rows, 52)
    misread = np.zeros_like(ids)
    misread[:, :26] = ids.astype(np.int32).view(np.int64)
    right, wrong = (_embed(model, each.clip(0, model.spec.text.vocab_size - 1)) for each in (ids, misread))
    cosines = (right * wrong).sum(axis=1)
    assert np.median(cosines) < 0.9, cosines


def test_a_mask_of_float32s_least_number_is_nan_in_float16(tmp_path: Path) -> None:
    """(1 - mask) * finfo.min, as BERT implementations have it: -inf in float16, and 0 * -inf for every token that may
    be seen."""
    _export_module(_MultipliedMask(), torch.ones(2, 3), tmp_path / "fp32.onnx")
    _cast_everything(tmp_path / "fp32.onnx", tmp_path / "fp16.onnx")
    mask = np.float32([[1, 1, 0], [1, 1, 1]])
    wide, half = (_run(tmp_path / f"{each}.onnx", mask) for each in ("fp32", "fp16"))
    np.testing.assert_array_equal(wide, np.float32([[0.5, 0.5, 0], [1 / 3] * 3]))
    assert np.isnan(half).all()
    assert first_overflow(tmp_path / "fp16.onnx", {"x": mask}) is not None


def test_ours_is_right_where_a_text_is_much_shorter_than_the_longest(sample, tmp_path: Path) -> None:
    """Where most of a row is masked; against padding of another length."""
    model, fp32 = sample
    write_half(fp32["text"], tmp_path / "fp16.onnx", "fp16")
    rows = [default_tokenizer().encode_ids(text, 52) for text in ("猫", "一只在草地上奔跑的棕色小狗" * 3)]
    embeds = open_session(tmp_path / "fp16.onnx").run(None, dict(pack_rows(rows)))[0]
    cosines = (embeds * _embed(model, pad_rows(rows, 52))).sum(axis=1)
    assert (cosines >= 0.9995).all()


def test_a_layer_norm_in_parts_overflows_in_float16(tmp_path: Path) -> None:
    """As opset 13 has it: the square of a channel of 300 is beyond 65,504, and the epsilon of 1e-12 is 0."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    x[:, 7] = 300
    _export_module(_LayerNormInParts(), x, tmp_path / "fp32.onnx")
    _cast_everything(tmp_path / "fp32.onnx", tmp_path / "fp16.onnx")
    expected = torch.nn.functional.layer_norm(x, (64,), eps=1e-12).numpy()
    np.testing.assert_allclose(_run(tmp_path / "fp32.onnx", x.numpy()), expected, atol=1e-4)
    found = first_overflow(tmp_path / "fp16.onnx", {"x": x.numpy()})
    assert found is not None
    assert found.endswith(("(Pow)", "(Mul)"))


def test_pooling_by_the_largest_id_picks_the_first_token_in_float16() -> None:
    """OpenAI's CLIP: the end of text is 49407, its start 49406. To float16 they are one number."""
    ids = np.array([49406, 320, 2368, 49407, 0])
    assert ids.argmax() == 3
    assert ids.astype(np.float16).argmax() == 0


# --- helpers ----------------------------------------------------------------------------------------------------------


class _MultipliedMask(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax((1 - x) * torch.finfo(torch.float32).min, dim=-1)


class _LayerNormInParts(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-12)


def _export_module(module: nn.Module, x: torch.Tensor, path: Path) -> None:
    torch.onnx.export(
        module.eval(), (x,), path, dynamo=True, opset_version=18, input_names=["x"], output_names=["y"], verbose=False
    )


def _cast_everything(fp32: Path, fp16: Path) -> None:
    """What a converter without a list of exceptions makes of it."""
    graph = load_graph(fp32)
    cast_graph(graph, DTYPES["fp16"], {node.name for node in graph.nodes})
    save_graph(graph, fp16)


def _run(path: Path, x: np.ndarray) -> np.ndarray:
    return open_session(path, optimise=False).run(None, {"x": x})[0]


@torch.inference_mode()
def _embed(model: ChineseCLIP, padded: np.ndarray) -> np.ndarray:
    return model.encode_text(torch.from_numpy(padded), normalize=True).numpy()
