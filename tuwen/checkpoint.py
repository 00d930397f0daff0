"""Read and write checkpoints: ours, Chinese-CLIP's official `.pt`, Hugging Face ChineseCLIPModel folders.

    model = load_checkpoint(Path("clip_cn_vit-b-16.pt"))        # the architecture is told from the weights' shapes
    save_checkpoint(model, Path("runs/mine"))                   # config.json + model.safetensors

Nothing here unpickles: `.pt` files are read with weights_only, everything else is safetensors.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from tuwen.errors import InvalidInput
from tuwen.files import atomic_file, atomic_path, replace_folder, write_text
from tuwen.model import ChineseCLIP
from tuwen.specs import SPECS, ModelSpec, VisionSpec

FORMAT = "tuwen-checkpoint-1"
StateDict = dict[str, Tensor]

# Buffers and heads that some published files carry and no tower reads.
_UNUSED = re.compile(r"bert\.pooler\.|.*position_ids$")
# What torch's unpickler raises for bytes that are no pickle, seen over 20,000 random files; and a missing file's own.
_NOT_A_PICKLE = (RuntimeError, EOFError, OSError, ValueError, LookupError, struct.error)
# More would be a paragraph: a wrong file has hundreds.
_MISFITS_NAMED = 5

# Hugging Face's names -> the published ones; q, k and v are joined afterwards. Source: transformers'
# ChineseCLIPModel, whose text tower keeps BERT's names.
_HUGGING_FACE_NAMES = (
    (r"text_model\.", "bert."),
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.", r"visual.transformer.resblocks.\1.attn."),
    (r"vision_model\.encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"visual.transformer.resblocks.\1.ln_\2."),
    (r"vision_model\.encoder\.layers\.(\d+)\.mlp\.fc1\.", r"visual.transformer.resblocks.\1.mlp.c_fc."),
    (r"vision_model\.encoder\.layers\.(\d+)\.mlp\.fc2\.", r"visual.transformer.resblocks.\1.mlp.c_proj."),
)


def load_checkpoint(path: Path, spec: ModelSpec | None = None) -> ChineseCLIP:
    """The model of a checkpoint, fp32, in eval mode, on the CPU.

    Args:
        path: our folder, a Hugging Face ChineseCLIPModel folder, or an official `.pt` file.
        spec: the architecture to load into; by default the checkpoint's own. A different resolution is allowed:
            position embeddings are interpolated.
    Raises:
        InvalidInput: the path is missing, truncated or of an unknown format, or its weights do not fit; the
            sentence names the file, the key and both shapes.
    """
    state_dict, own_spec, source = read_checkpoint(path)
    model = ChineseCLIP(spec or own_spec or infer_spec(state_dict, source))
    load_weights(model, state_dict, source)
    return model.eval()


def load_weights(model: ChineseCLIP, state_dict: Mapping[str, Tensor], source: Path) -> None:
    """Copy `state_dict` into `model`, interpolating position embeddings where the grids differ.

    Raises:
        InvalidInput: a key is missing, unknown or of another shape; the sentence names `source`, key and shapes.
    """
    expected = model.state_dict()
    given = {key: value for key, value in state_dict.items() if not _UNUSED.match(key)}
    for key in ("visual.positional_embedding", "visual.attnpool.positional_embedding"):
        if key in given and key in expected:
            given[key] = interpolate_positions(given[key], expected[key].shape[0])
    check_fit(expected, given, model.spec.name, source)
    model.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in given.items()})


def check_fit(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], name: str, source: Path) -> None:
    """Are these the keys and shapes of `name`'s weights?

    Raises:
        InvalidInput: no; the sentence names `source`, and of what is wrong the first few with their shapes.
    """
    problems = _misfits(expected, given)
    if problems:
        named, more = problems[:_MISFITS_NAMED], len(problems) - _MISFITS_NAMED
        rest = f" (and {more} more)" if more > 0 else ""
        raise InvalidInput(f"{source}: does not fit {name}: {'; '.join(named)}{rest}")


def _misfits(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    def shape(tensor: Tensor) -> str:
        return str(tuple(tensor.shape))

    wrong = [
        f"{key} has shape {shape(given[key])}, expected {shape(expected[key])}"
        for key in expected
        if key in given and given[key].shape != expected[key].shape
    ]
    missing = [f"{key} {shape(expected[key])} is missing" for key in expected if key not in given]
    extra = [f"{key} {shape(given[key])} is not part of it" for key in given if key not in expected]
    return wrong + missing + extra


def interpolate_positions(positions: Tensor, num_positions: int) -> Tensor:
    """Position embeddings (1 + g^2, C) for another square grid, bicubic; the first, the class token's, is kept."""
    if positions.ndim != 2 or positions.shape[0] == num_positions:
        return positions
    old, new = round((positions.shape[0] - 1) ** 0.5), round((num_positions - 1) ** 0.5)
    if old**2 + 1 != positions.shape[0] or new**2 + 1 != num_positions:
        return positions  # not a square grid; the shape check names it
    grid = positions[1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1].float(), grid.flatten(2)[0].t()])


# --- reading -----------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> tuple[StateDict, ModelSpec | None, Path]:
    """The state dict with published names, the architecture if the checkpoint names it, and the weights' file.

    Raises:
        InvalidInput: as `load_checkpoint`, but for weights that do not fit.
    """
    if path.is_file():
        return read_official(path), None, path
    if not path.is_dir():
        raise InvalidInput(f"{path}: there is no such checkpoint (a folder with config.json, or a .pt file)")
    config_path, weights_path = path / "config.json", path / "model.safetensors"
    for needed in (config_path, weights_path):
        if not needed.is_file():
            raise InvalidInput(f"{path}: not a checkpoint folder, {needed.name} is missing")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInput(f"{config_path}: not valid JSON: {error}") from None
    state_dict = read_safetensors(weights_path)
    if config.get("model_type") == "chinese_clip":
        return from_hugging_face(state_dict), None, weights_path
    if config.get("format") != FORMAT:
        raise InvalidInput(f"{config_path}: format is {config.get('format')!r}, expected {FORMAT!r}")
    return state_dict, ModelSpec.from_dict(config["architecture"]), weights_path


def read_safetensors(path: Path) -> StateDict:
    """The tensors of a `.safetensors` file.

    Raises:
        InvalidInput: missing, truncated or not such a file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"{path}: truncated or not a safetensors file: {error}") from None


def read_official(path: Path) -> StateDict:
    """The state dict of a `.pt` or `.bin` file, Chinese-CLIP's or bare, with DDP's `module.` prefix removed.

    Raises:
        InvalidInput: truncated, not a checkpoint, or holding pickled objects other than tensors.
    """
    if is_torchscript(path):
        convert = f"import torch; torch.save(torch.jit.load({str(path)!r}, 'cpu').state_dict(), 'weights.pt')"
        raise InvalidInput(
            f"{path}: a TorchScript archive, which holds code beside its weights; if you trust it, take the weights "
            f'out: python -c "{convert}"'
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise InvalidInput(f"{path}: not a plain weights file, refused: {reason}") from None
    except _NOT_A_PICKLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InvalidInput(f"{path}: truncated or not a .pt file: {reason}") from None
    state_dict = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not state_dict or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise InvalidInput(f"{path}: holds no state_dict of tensors, expected a Chinese-CLIP checkpoint")
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def is_torchscript(path: Path) -> bool:
    """A program saved by torch.jit.save, as OpenAI's CLIP files are, and not a state dict saved by torch.save."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def from_hugging_face(state_dict: Mapping[str, Tensor]) -> StateDict:
    """A ChineseCLIPModel's state dict under the published names."""
    renamed: StateDict = {}
    for key, value in state_dict.items():
        for pattern, replacement in _HUGGING_FACE_NAMES:
            key = re.sub("^" + pattern, replacement, key)
        renamed[key] = value
    for hugging_face, published in (("visual_projection", "visual.proj"), ("text_projection", "text_projection")):
        if f"{hugging_face}.weight" in renamed:
            renamed[published] = renamed.pop(f"{hugging_face}.weight").t().contiguous()
    for key in [key for key in renamed if ".attn.q_proj." in key]:
        parts = [renamed.pop(key.replace("q_proj", f"{part}_proj"), None) for part in "qkv"]
        if all(part is not None for part in parts):
            kind = key.rsplit(".", 1)[1]
            renamed[key.replace(f"q_proj.{kind}", f"in_proj_{kind}")] = torch.cat([p for p in parts if p is not None])
    return renamed


def infer_spec(state_dict: Mapping[str, Tensor], source: Path) -> ModelSpec:
    """The known architecture whose weights have these shapes, at the resolution they imply.

    Raises:
        InvalidInput: none has.
    """
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    candidates = [(spec, spec.with_resolution(_resolution(shapes, spec.vision))) for spec in SPECS.values()]
    # ViT-L-14 at 336 pixels is ViT-L-14-336: one whose own resolution fits comes first.
    for _, candidate in sorted(candidates, key=lambda pair: pair[0] != pair[1]):
        with torch.device("meta"):
            expected = ChineseCLIP(candidate).state_dict()
        if all(shapes.get(key) == tuple(value.shape) for key, value in expected.items() if _is_weight(key)):
            return candidate
    projection, conv = shapes.get("text_projection"), shapes.get("visual.conv1.weight")
    raise InvalidInput(
        f"{source}: no known architecture has these weights (text_projection {projection}, visual.conv1.weight {conv});"
        f" known are {', '.join(SPECS)}"
    )


def _is_weight(key: str) -> bool:
    """Keys that tell architectures apart; those of single layers are left to load_weights, which names them."""
    return key.endswith(("conv1.weight", "text_projection", "word_embeddings.weight", "proj", "dense.weight"))


def _resolution(shapes: Mapping[str, tuple[int, ...]], vision: VisionSpec) -> int:
    key = "visual.positional_embedding" if vision.kind == "vit" else "visual.attnpool.positional_embedding"
    positions = shapes.get(key, (0,))[0]
    grid = round(max(positions - 1, 0) ** 0.5)
    return grid * vision.downscale if grid else vision.resolution


# --- writing -----------------------------------------------------------------------------------------------


def save_checkpoint(
    model: ChineseCLIP, out_dir: Path, model_card: str = "", dtype: torch.dtype = torch.float16
) -> None:
    """Write config.json, model.safetensors and README.md; an existing folder is replaced whole, or not at all."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        write_checkpoint(staging, model.spec, model.state_dict(), model_card, dtype)
        replace_folder(staging, out_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_checkpoint(
    folder: Path,
    spec: ModelSpec,
    state_dict: Mapping[str, Tensor],
    model_card: str = "",
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write the files of a checkpoint into a folder, which may hold others; each appears whole."""
    with atomic_path(folder / "model.safetensors") as path:
        save_file({key: _to_dtype(value, dtype) for key, value in state_dict.items()}, path)
    write_text(folder / "README.md", model_card)
    config = {"format": FORMAT, "architecture": spec.to_dict()}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def save_official(model: ChineseCLIP, path: Path, epoch: int = 0, step: int = 0) -> None:
    """Write the official `.pt` layout (fp16, `module.` prefix), which cn_clip loads."""
    state_dict = {f"module.{key}": _to_dtype(value, torch.float16) for key, value in model.state_dict().items()}
    with atomic_file(path) as file:
        torch.save({"epoch": epoch, "step": step, "name": model.spec.name, "state_dict": state_dict}, file)


def _to_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    value = value.detach().cpu().contiguous()
    return value.to(dtype) if value.is_floating_point() else value
