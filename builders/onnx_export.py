"""Towers -> ONNX: dynamic batch and text length, unit-length outputs, the fingerprint as a second output."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import onnx
import onnx_graphsurgeon as gs
import torch
from onnx_graphsurgeon.logger import G_LOGGER
from torch import Tensor, nn

from tuwen.errors import TuwenError
from tuwen.model import ChineseCLIP
from tuwen.specs import ModelSpec

TowerKind = Literal["text", "image"]
TOWERS: tuple[TowerKind, ...] = ("text", "image")
INPUT_NAMES: dict[TowerKind, str] = {"text": "input_ids", "image": "pixel_values"}
OUTPUT_NAMES: dict[TowerKind, str] = {"text": "text_embeds", "image": "image_embeds"}

OPSET = 18  # what TensorRT 10, ONNX Runtime 1.17 and PyTorch's exporter have in common
# Above this, weights go to a file of their own: a protobuf cannot hold more than 2 GiB.
MAX_EMBEDDED_BYTES = 2**31 - 2**24


class ExportFailed(TuwenError):
    """A tower could not be exported, or the export does not compute what PyTorch computes."""


class Tower(nn.Module):
    """One tower as it is served: input -> (embeds float32 (B, D) of unit length, fingerprint int64 (B, 1))."""

    baked_fingerprint: Tensor

    def __init__(self, model: ChineseCLIP, kind: TowerKind, fingerprint: int) -> None:
        super().__init__()
        self.model, self.kind = model, kind
        # Not named "fingerprint": the exporter keeps buffer names, and the output is called that.
        self.register_buffer("baked_fingerprint", torch.tensor([[fingerprint]], dtype=torch.int64))

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        encode = self.model.encode_text if self.kind == "text" else self.model.encode_image
        return encode(values, normalize=True), self.baked_fingerprint.expand(values.shape[0], 1)


def example_input(spec: ModelSpec, kind: TowerKind, batch: int = 2, length: int = 9) -> Tensor:
    """Random input of the tower: input_ids int64 (batch, length) without padding, or pixel_values."""
    if kind == "text":
        return torch.randint(103, spec.text.vocab_size, (batch, length))
    return torch.randn(batch, 3, spec.vision.resolution, spec.vision.resolution)


def export_tower(model: ChineseCLIP, kind: TowerKind, fingerprint: int, path: Path) -> None:
    """Export one tower to `path`, cleaned and checked; weights beside it as `NAME.data` when above 2 GiB.

    Raises:
        ExportFailed: the exporter or the ONNX checker refuses; its reason is quoted.
    """
    if model.training:
        raise ExportFailed("the model is in training mode, its dropout would be exported; call model.eval() first")
    batch = torch.export.Dim("batch", min=1, max=4096)
    dynamic = {0: batch}
    if kind == "text":
        dynamic[1] = torch.export.Dim("length", min=3, max=model.spec.text.max_positions)
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                Tower(model, kind, fingerprint).eval(),
                (example_input(model.spec, kind),),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT_NAMES[kind]],
                output_names=[OUTPUT_NAMES[kind], "fingerprint"],
                dynamic_shapes=(dynamic,),
                verbose=False,
            )
            assert program is not None  # it is None for the older exporter only
            graph = clean_graph(program.model_proto)
    except Exception as error:  # the exporter raises a family of its own, not all of it public
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportFailed(f"{model.spec.name} {kind} tower cannot be exported to ONNX: {reason}") from error
    _save(graph, path)


def clean_graph(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants, drop what no output needs, sort, and strip the exporter's notes, which name source paths."""
    graph = gs.import_onnx(proto)
    graph.fold_constants().cleanup(remove_unused_graph_inputs=False).toposort()
    cleaned = gs.export_onnx(graph)
    cleaned.producer_name = "tuwen"
    for message in (cleaned, cleaned.graph, *cleaned.graph.node, *cleaned.graph.input, *cleaned.graph.output):
        del message.metadata_props[:]
    for node in cleaned.graph.node:
        node.doc_string = ""
    return cleaned


def _save(proto: onnx.ModelProto, path: Path) -> None:
    # Not ByteSize(), which serialises the whole message and fails on just the ones this is about.
    if sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > MAX_EMBEDDED_BYTES:
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
