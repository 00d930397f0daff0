"""cn_clip's public API: load_from_name, tokenize, available_models, image_transform; and the downloads behind it.

Files come from the published repositories through `huggingface_hub` or `modelscope`, which resume what was cut
off and show progress; what arrives is checked against the SHA-256 the hub itself publishes for the file.
Source of the addresses: Chinese-CLIP cn_clip/clip/utils.py.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tuwen.checkpoint import load_checkpoint
from tuwen.errors import InvalidInput, MissingDependency, TuwenError
from tuwen.image_transform import transform_image
from tuwen.model import ChineseCLIP, resolve_device
from tuwen.specs import CONTEXT_LENGTH, get_spec
from tuwen.tokenizer import default_tokenizer

log = logging.getLogger(__name__)

HUGGING_FACE_ORG = "OFA-Sys"
MODELSCOPE_ORG = "AI-ModelScope"
DEFAULT_DOWNLOAD_ROOT = Path("~/.cache/clip")  # where cn_clip keeps its own, so that nothing is fetched twice


class DownloadFailed(TuwenError):
    """A weights file could not be fetched, or what arrived is not what the hub says it is."""


@dataclass(frozen=True)
class PublishedFile:
    repository: str
    filename: str


PUBLISHED: dict[str, PublishedFile] = {
    "ViT-B-16": PublishedFile("chinese-clip-vit-base-patch16", "clip_cn_vit-b-16.pt"),
    "ViT-L-14": PublishedFile("chinese-clip-vit-large-patch14", "clip_cn_vit-l-14.pt"),
    "ViT-L-14-336": PublishedFile("chinese-clip-vit-large-patch14-336px", "clip_cn_vit-l-14-336.pt"),
    "ViT-H-14": PublishedFile("chinese-clip-vit-huge-patch14", "clip_cn_vit-h-14.pt"),
    "RN50": PublishedFile("chinese-clip-rn50", "clip_cn_rn50.pt"),
}


def available_models() -> list[str]:
    """Names that `load_from_name` downloads."""
    return list(PUBLISHED)


def load_from_name(
    name: str,
    device: str | torch.device | None = None,
    download_root: str | Path | None = None,
    input_resolution: int | None = None,
    use_modelscope: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[ChineseCLIP, Callable[[Image.Image], Tensor]]:
    """The model, in eval mode, and its image transform: PIL image -> pixel_values float32 (3, R, R).

    Args:
        name: one of `available_models()`, or a path: an official `.pt`, a checkpoint folder of ours or of
            Hugging Face. A path's architecture is told from its weights.
        device: default cuda where there is one, else cpu.
        download_root: where downloads are kept; default ~/.cache/clip.
        input_resolution: another resolution than the weights' own; position embeddings are interpolated.
        use_modelscope: fetch from ModelScope instead of Hugging Face.
        dtype: of the weights; cn_clip uses float16 on a GPU, we do when asked.
    Raises:
        InvalidInput: the name is unknown, or the file cannot be used.
        DownloadFailed: the file could not be fetched whole.
    """
    if name in PUBLISHED:
        path = download(name, Path(download_root or DEFAULT_DOWNLOAD_ROOT).expanduser(), use_modelscope)
    elif Path(name).exists():
        path = Path(name)
    else:
        raise InvalidInput(f"model {name!r}: no such file or folder, and no published name ({', '.join(PUBLISHED)})")
    spec = get_spec(name) if name in PUBLISHED else None
    model = load_checkpoint(path, spec)
    if input_resolution is not None and input_resolution != model.spec.vision.resolution:
        model = load_checkpoint(path, model.spec.with_resolution(input_resolution))
    return model.to(resolve_device(device), dtype), image_transform(model.spec.vision.resolution)


def image_transform(image_size: int = 224) -> Callable[[Image.Image], Tensor]:
    """PIL image -> pixel_values float32 (3, image_size, image_size), as cn_clip's transform of that name."""
    return lambda image: torch.from_numpy(transform_image(image, image_size))


def tokenize(texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH) -> Tensor:
    """input_ids int64 (N, context_length) of a text or several, as cn_clip's `tokenize`.

    As published it does not apply `tuwen.tokenizer.normalize_text`: curly quotes become [UNK].
    """
    return torch.from_numpy(default_tokenizer().encode([texts] if isinstance(texts, str) else texts, context_length))


def download(name: str, root: Path, use_modelscope: bool = False) -> Path:
    """The published weights file of that name, fetched into `root` unless it is there.

    Raises:
        DownloadFailed: no connection, no such file, or a wrong SHA-256 (the file is then removed).
        MissingDependency: modelscope is asked for and not installed.
    """
    published = PUBLISHED[name]
    target = root / published.filename
    if target.is_file():
        return target
    root.mkdir(parents=True, exist_ok=True)
    log.info("downloading %s to %s", published.filename, root)
    fetch = _fetch_modelscope if use_modelscope else _fetch_hugging_face
    try:
        expected_sha256 = fetch(published, root)
    except MissingDependency:
        raise
    except Exception as error:  # each hub raises its own dozen kinds; the cause stays attached
        hub = "ModelScope" if use_modelscope else "Hugging Face"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DownloadFailed(f"{published.filename} could not be fetched from {hub}: {reason}") from error
    _check_sha256(target, expected_sha256)
    return target


def _fetch_hugging_face(published: PublishedFile, root: Path) -> str | None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    repository = f"{HUGGING_FACE_ORG}/{published.repository}"
    # For a large file the hub's ETag is its SHA-256.
    etag = get_hf_file_metadata(hf_hub_url(repository, published.filename)).etag
    hf_hub_download(repository, filename=published.filename, local_dir=root)
    return etag


def _fetch_modelscope(published: PublishedFile, root: Path) -> str | None:
    try:
        from modelscope.hub.file_download import model_file_download
        from modelscope_hub.api import HubApi
    except ImportError:
        raise MissingDependency("downloads from ModelScope need its library: pip install 'tuwen[modelscope]'") from None
    repository = f"{MODELSCOPE_ORG}/{published.repository}"
    model_file_download(model_id=repository, file_path=published.filename, local_dir=str(root))
    files = HubApi().list_repo_files(repository, "model")
    return next((entry.sha256 for entry in files if entry.path == published.filename), None)


def _check_sha256(path: Path, expected: str | None) -> None:
    if expected is None or len(expected) != 64:
        path.unlink(missing_ok=True)
        raise DownloadFailed(f"{path.name}: the hub published no SHA-256 for it, so it was not kept")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected.lower():
        path.unlink()
        raise DownloadFailed(f"{path.name}: SHA-256 is {digest}, the hub says {expected}; removed, please try again")
