"""Towers -> ONNX: dynamic batch, texts packed end to end, unit-length outputs, the fingerprint beside them."""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
import torch
from onnx_graphsurgeon.logger import G_LOGGER
from torch import Tensor, nn

from builders.attention import translate_attention
from builders.towers import ExportFailed, TowerKind
from tuwen.model import ChineseCLIP
from tuwen.specs import CLS_ID, SEP_ID, ModelSpec
from tuwen.tokenizer import pack_rows

INPUT_NAMES: dict[TowerKind, list[str]] = {
    "text": ["input_ids", "text_offsets", "longest_text"],
    "image": ["pixel_values"],
}
OUTPUT_NAMES: dict[TowerKind, list[str]] = {
    "text": ["text_embeds", "fingerprint", "logit_scale"],
    "image": ["image_embeds", "fingerprint"],
}

OPSET = 18  # what TensorRT 10, ONNX Runtime 1.17 and PyTorch's exporter have in common
# Above this, weights go to a file of their own: a protobuf cannot hold more than 2 GiB.
MAX_EMBEDDED_BYTES = 2**31 - 2**24
# The exporter's note of the modules that a node is in, outermost first, then the operation itself.
_SCOPES = "pkg.torch.onnx.name_scopes"


class _Tower(nn.Module):
    baked_fingerprint: Tensor

    def __init__(self, model: ChineseCLIP, fingerprint: int) -> None:
        super().__init__()
        self.model = model
        # Not named "fingerprint": the exporter keeps buffer names, and the output is called that.
        self.register_buffer("baked_fingerprint", torch.tensor([[fingerprint]], dtype=torch.int64))


class TextTower(_Tower):
    """As served: packed texts -> text_embeds float32 (B, D) of unit length, fingerprint int64 (B, 1), logit_scale
    float32 (B, 1), the learned log."""

    def forward(self, input_ids: Tensor, text_offsets: Tensor, longest_text: Tensor) -> tuple[Tensor, ...]:
        embeds = self.model.encode_packed_text(input_ids, text_offsets, longest_text, normalize=True)
        per_text = (embeds.shape[0], 1)
        # A sum, not the parameter itself: the exporter would call the parameter as the output is called.
        scale = (self.model.logit_scale + torch.zeros(1)).expand(per_text)
        return embeds, self.baked_fingerprint.expand(per_text), scale


class ImageTower(_Tower):
    """As served: pixel_values -> image_embeds float32 (B, D) of unit length, fingerprint int64 (B, 1)."""

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        embeds = self.model.encode_image(pixel_values, normalize=True)
        return embeds, self.baked_fingerprint.expand(embeds.shape[0], 1)


def _example(spec: ModelSpec, kind: TowerKind) -> tuple[tuple[Tensor, ...], tuple[dict[int, torch.export.Dim], ...]]:
    """An input of two items, and which of its dimensions vary."""
    if kind == "image":
        batch = torch.export.Dim("batch", min=1, max=4096)
        return (torch.randn(2, 3, spec.vision.resolution, spec.vision.resolution),), ({0: batch},)
    packed = pack_rows([[CLS_ID, 200, 300, SEP_ID], [CLS_ID, *range(400, 409), SEP_ID]])
    sizes = (
        torch.export.Dim("total_length", min=3),
        torch.export.Dim("batch_plus_one", min=2, max=4097),
        torch.export.Dim("longest", min=3, max=spec.text.max_positions),
    )
    return tuple(torch.from_numpy(packed[name]) for name in INPUT_NAMES["text"]), tuple({0: size} for size in sizes)


def export_tower(model: ChineseCLIP, kind: TowerKind, fingerprint: int, path: Path) -> None:
    """Export one tower to `path`, cleaned and checked; weights beside it as `NAME.data` when above 2 GiB.

    Raises:
        ExportFailed: the exporter or the ONNX checker refuses; its reason is quoted.
    """
    if model.training:
        raise ExportFailed("the model is in training mode, its dropout would be exported; call model.eval() first")
    tower = (TextTower if kind == "text" else ImageTower)(model, fingerprint).eval()
    inputs, dynamic_shapes = _example(model.spec, kind)
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                tower,
                inputs,
                dynamo=True,
                opset_version=OPSET,
                input_names=INPUT_NAMES[kind],
                output_names=OUTPUT_NAMES[kind],
                dynamic_shapes=dynamic_shapes,
                custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: translate_attention},
                verbose=False,
            )
            assert program is not None  # it is None for the older exporter only
            graph = clean_graph(program.model_proto)
    except Exception as error:  # the exporter raises a family of its own, not all of it public
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportFailed(f"{model.spec.name} {kind} tower cannot be exported to ONNX: {reason}") from error
    save_proto(graph, path)


def clean_graph(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants, drop what no output needs, sort, and strip the exporter's notes, which name source paths.

    What they are good for is kept: the name of each node begins with that of its module.
    """
    for node in proto.graph.node:
        notes = {each.key: each.value for each in node.metadata_props}
        modules = [name for name in ast.literal_eval(notes.get(_SCOPES, "[]"))[:-1] if name]
        if modules:
            node.name = f"{modules[-1].removeprefix('model.')}/{node.name}"
    graph = gs.import_onnx(proto)
    graph.fold_constants().cleanup(remove_unused_graph_inputs=False).toposort()
    cleaned = gs.export_onnx(graph)
    cleaned.producer_name = "tuwen"
    for message in (cleaned, cleaned.graph, *cleaned.graph.node, *cleaned.graph.input, *cleaned.graph.output):
        del message.metadata_props[:]
    for node in cleaned.graph.node:
        node.doc_string = ""
    return cleaned


def save_proto(proto: onnx.ModelProto, path: Path, embed: bool = True) -> None:
    """Write and check a model; weights beside it as `NAME.data` when above 2 GiB, or when not to `embed` them, which
    takes half as much memory."""
    # Not ByteSize(), which serialises the whole message and fails on just the ones this is about.
    if not embed or sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > MAX_EMBEDDED_BYTES:
        onnx.save_model(
            proto, path, save_as_external_data=True, all_tensors_to_one_file=True, location=f"{path.name}.data"
        )
    else:
        onnx.save_model(proto, path)
    onnx.checker.check_model(path, full_check=True)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporters log of packages they do not find and of their own internals; their errors still raise."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in logs]
    G_LOGGER.severity = G_LOGGER.ERROR
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
