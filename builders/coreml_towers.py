"""Towers -> ML programs, by coremltools: pictures and texts one at a time, as an app has them.

The image tower takes the picture itself, 0 to 255, and normalises it; the text tower takes input_ids padded with [PAD]
to one of a few lengths, and masks the padding. Both give vectors of unit length.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, partialmethod
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from builders.palette import fit_palette
from builders.towers import ExportFailed, TowerKind
from tuwen.errors import MissingDependency
from tuwen.model import ChineseCLIP
from tuwen.specs import IMAGE_MEAN, IMAGE_STD, PAD_ID, ModelSpec

Precision = Literal["fp32", "fp16", "palette8", "palette6", "int8"]
INPUT_NAMES: dict[TowerKind, str] = {"text": "input_ids", "image": "image"}
OUTPUT_NAMES: dict[TowerKind, str] = {"text": "text_embeds", "image": "image_embeds"}

# Steps of a third to a half, so that a text is padded by a quarter on average: what a text costs grows evenly with its
# length (docs/performance.md), and a query of seven characters has nine tokens. The last is the context length.
TEXT_BUCKETS = (8, 12, 16, 24, 32)

PALETTE_SIZES: dict[Precision, int] = {"palette8": 256, "palette6": 64}


def text_buckets(spec: ModelSpec) -> tuple[int, ...]:
    """The lengths, in tokens, that the text tower takes; a text is padded to the next one."""
    longest = min(spec.context_length, spec.text.max_positions)
    return (*(length for length in TEXT_BUCKETS if length < longest), longest)


class ImageTower(nn.Module):
    """image float32 (1, 3, R, R), RGB, 0 to 255 -> image_embeds float32 (1, D) of unit length."""

    mean: Tensor
    scale: Tensor

    def __init__(self, model: ChineseCLIP) -> None:
        super().__init__()
        self.model = model
        # First the difference, then the product: coremltools makes a batch norm of the other order, and with it adds an
        # epsilon to the variance.
        self.register_buffer("mean", 255 * torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1))
        self.register_buffer("scale", 1 / (255 * torch.tensor(IMAGE_STD).view(1, 3, 1, 1)))

    def forward(self, image: Tensor) -> Tensor:
        return self.model.encode_image((image - self.mean) * self.scale, normalize=True)


@dataclass(frozen=True)
class _OneText:
    """A TextLayout of one padded text. That of a batch would put operations on shapes into the program, one for each
    reshape, which no part of the device but the CPU computes."""

    input_ids: Tensor

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.input_ids.shape[1])

    @property
    def mask(self) -> Tensor:
        return (self.input_ids != PAD_ID)[:, None, None, :]

    def to_rows(self, tokens: Tensor) -> Tensor:
        return tokens[None]

    def to_tokens(self, rows: Tensor) -> Tensor:
        return rows[0]

    def first_tokens(self, tokens: Tensor) -> Tensor:
        return tokens[:1]


class TextTower(nn.Module):
    """input_ids int32 (1, L), padded -> text_embeds float32 (1, D) of unit length."""

    def __init__(self, model: ChineseCLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.model.bert(input_ids[0], _OneText(input_ids))
        return F.normalize(hidden @ self.model.text_projection, dim=-1)


def import_coremltools() -> ModuleType:
    """
    Raises:
        MissingDependency: it is not installed.
    """
    try:
        with quiet():
            import coremltools
            import coremltools.optimize.coreml
    except ImportError:
        raise MissingDependency("Core ML packages are made by coremltools: pip install 'tuwen[coreml]'") from None
    return coremltools


def trace_tower(model: ChineseCLIP, kind: TowerKind) -> torch.export.ExportedProgram:
    """The tower as torch.export sees it, the length of a text left open.

    Raises:
        ExportFailed: the model is in training mode, or torch.export refuses it.
    """
    if model.training:
        raise ExportFailed("the model is in training mode, its dropout would be exported; call model.eval() first")
    if kind == "image":
        tower: nn.Module = ImageTower(model)
        resolution = model.spec.vision.resolution
        example, dynamic = torch.zeros(1, 3, resolution, resolution), None
    else:
        tower = TextTower(model)
        example = torch.ones(1, 12, dtype=torch.int32)
        dynamic = {1: torch.export.Dim("length", min=3, max=text_buckets(model.spec)[-1])}
    try:
        with quiet(), torch.inference_mode():
            exported = torch.export.export(tower.eval(), (example,), dynamic_shapes=(dynamic,))
            return exported.run_decompositions({})
    except Exception as error:  # torch.export raises a family of its own, not all of it public
        raise _refusal(model, kind, error) from error


def convert_tower(
    model: ChineseCLIP,
    kind: TowerKind,
    traced: torch.export.ExportedProgram,
    is_half: bool,
    minimum_ios: int,
) -> Any:
    """A coremltools MLModel of one tower.

    Args:
        is_half: compute in half precision.
        minimum_ios: 16, 17 or 18.
    Raises:
        ExportFailed: coremltools refuses; its reason is quoted.
    """
    ct = import_coremltools()
    resolution, buckets = model.spec.vision.resolution, text_buckets(model.spec)
    if kind == "image":
        shape = (1, 3, resolution, resolution)
        given = ct.ImageType(INPUT_NAMES[kind], shape=shape, color_layout=ct.colorlayout.RGB)
    else:
        lengths = ct.EnumeratedShapes([[1, length] for length in buckets], default=[1, buckets[-1]])
        given = ct.TensorType(INPUT_NAMES[kind], shape=lengths, dtype=np.int32)
    try:
        with quiet():
            return ct.convert(
                traced,
                inputs=[given],
                outputs=[ct.TensorType(OUTPUT_NAMES[kind], dtype=np.float32)],
                convert_to="mlprogram",
                minimum_deployment_target=getattr(ct.target, f"iOS{minimum_ios}"),
                compute_precision=ct.precision.FLOAT16 if is_half else ct.precision.FLOAT32,
                skip_model_load=True,
            )
    except Exception as error:  # coremltools raises whatever its passes raise
        raise _refusal(model, kind, error) from error


def compress_tower(converted: Any, precision: Precision) -> Any:
    """The half-precision MLModel with its weights in a palette or in int8; itself for fp16 and fp32.

    Raises:
        ExportFailed: coremltools refuses.
    """
    if precision in ("fp32", "fp16"):
        return converted
    optimize = import_coremltools().optimize.coreml
    try:
        with quiet():
            if precision == "int8":
                linear = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8")
                return optimize.linear_quantize_weights(converted, optimize.OptimizationConfig(global_config=linear))
            fit = partial(fit_palette, size=PALETTE_SIZES[precision])
            palette = optimize.OpPalettizerConfig(mode="custom", lut_function=fit)
            return optimize.palettize_weights(converted, optimize.OptimizationConfig(global_config=palette))
    except Exception as error:  # as above
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportFailed(f"coremltools cannot compress the weights to {precision}: {reason}") from error


def save_tower(converted: Any, path: Path) -> None:
    """Write `path`, an .mlpackage."""
    with quiet():
        converted.save(str(path))
    # A debugger's map from operations to source lines; no part of the package's manifest.
    (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    for folder in (path, *(each for each in path.rglob("*") if each.is_dir())):
        folder.chmod(0o755)
    for file in (each for each in path.rglob("*") if each.is_file()):
        file.chmod(0o644)  # coremltools makes some for their owner alone


def discard(converted: Any) -> None:
    """Let go of the copy that coremltools keeps in the temporary folder until the process ends."""
    if path := getattr(converted, "package_path", None):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def quiet() -> Iterator[None]:
    """coremltools warns at its import of what it lacks on Linux and of versions it has not seen, and draws bars."""
    import tqdm

    log = logging.getLogger("coremltools")
    level, draw = log.level, tqdm.tqdm.__init__
    log.setLevel(logging.ERROR)
    tqdm.tqdm.__init__ = partialmethod(draw, disable=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        tqdm.tqdm.__init__ = draw


def _refusal(model: ChineseCLIP, kind: TowerKind, error: Exception) -> ExportFailed:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ExportFailed(f"{model.spec.name} {kind} tower cannot be exported to Core ML: {reason}")
