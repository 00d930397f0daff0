"""The model repository as builders see it: which folder holds which config.pbtxt, is what is committed still true, and
who builds.

tuwen render            write the configs that are committed
tuwen render --check    say which of them differ, and exit 1
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from builders import configs
from builders.gpu_configs import PROFILE, gpu_models
from tuwen.errors import InvalidInput
from tuwen.files import write_text
from tuwen.specs import ModelSpec, get_spec, slugify

log = logging.getLogger(__name__)

REPOSITORY_DIR = Path(__file__).parent.parent / "model_repository"

# In git stand the shared models, the reference architecture a reader opens, and the sample's.
COMMITTED = ("ViT-B-16", "Tiny-RN")
# The hand-written model.py of each kind; those of other resolutions and names are copies, held equal by --check.
_PREPROCESS_SOURCE = Path("preprocess_image_224", "1", "model.py")
_GUARD_SOURCE = Path("guard_image_224", "1", "model.py")
_SIMILARITY_SOURCE = Path("vit_b_16_similarity", "1", "model.py")
_ZERO_SHOT_SOURCE = Path("vit_b_16_zero_shot", "1", "model.py")


def rendered_files(spec: ModelSpec, name: str) -> dict[Path, str]:
    """Path inside the repository -> text, of everything one served model needs but its artifacts.

    Raises:
        InvalidInput: `name` is no model name.
    """
    if slugify(name) != name:
        raise InvalidInput(f"served name {name!r}: expected lower-case letters, digits and underscores")
    models = (
        configs.tokenize_text(),
        configs.preprocess_image(spec.vision.resolution),
        configs.guard_image(spec.vision.resolution),
        configs.text_tower(spec, name),
        configs.image_tower(spec, name),
        configs.cached_text_ensemble(spec, name),
        configs.text_ensemble(spec, name),
        configs.image_ensemble(spec, name),
        configs.similarity(spec, name),
        configs.zero_shot(spec, name),
    )
    files = {Path(model.name, "config.pbtxt"): configs.render(model) for model in models}
    # Triton wants a version folder even where an ensemble has nothing in it, and git keeps no empty ones.
    files |= {Path(model.name, "1", ".gitkeep"): "" for model in models[3:-2]}
    sources = (_PREPROCESS_SOURCE, _GUARD_SOURCE, _SIMILARITY_SOURCE, _ZERO_SHOT_SOURCE)
    for model, source in zip((*models[1:3], *models[-2:]), sources, strict=True):
        files[Path(model.name, "1", "model.py")] = (REPOSITORY_DIR / source).read_text(encoding="utf-8")
    for on_gpu in gpu_models(spec, name):
        files[Path(on_gpu.name, "configs", f"{PROFILE}.pbtxt")] = configs.render(on_gpu)
    return files


@contextmanager
def lone_build(repository: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """One build of a repository at a time, whoever starts it: another would take away the plans beside the ONNX file it
    replaces, and find current what is about to change. `on_wait` hears that another is under way."""
    is_first = not repository.is_dir()
    repository.mkdir(parents=True, exist_ok=True)
    path = repository / ".build.lock"
    with _locked(path, on_wait):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if is_first and not any(repository.iterdir()):  # what failed before it made anything leaves nothing
                repository.rmdir()


@contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """A file of that name held alone. Open for writing, which NFS asks for; the end of a process lets go of it, however
    it comes."""
    while True:
        with open(path, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:  # a file system without locks
                log.warning("%s cannot be locked (%s): start one build of it at a time", path, error.strerror)
            # Whoever held it before has taken the name away: what is locked then is no longer what others find.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield
                return


def check_contract(files: dict[Path, str], repository: Path) -> None:
    """Refuse to place a model under the configs of another: a build keeps those it finds, tuned by hand or not.

    Raises:
        InvalidInput: a config in `repository` is none, or has other tensors than the one in `files`.
    """
    for path, text in files.items():
        target = repository / path
        if path.name != "config.pbtxt" or not target.is_file():
            continue
        try:
            found = _tensors(target.read_text(encoding="utf-8"))
        except (text_format.ParseError, UnicodeDecodeError) as error:
            raise InvalidInput(f"{target}: no Triton model config: {error}") from None
        if found != (expected := _tensors(text)):
            raise InvalidInput(
                f"{target}: has {', '.join(found)}; the checkpoint needs {', '.join(expected)}. "
                "A changed shape is another model: give it another --name"
            )


def _tensors(text: str) -> list[str]:
    """Name and shape of every input and output of a config."""
    config = text_format.Parse(text, pb.ModelConfig())
    return [f"{one.name} {pb.DataType.Name(one.data_type)}{list(one.dims)}" for one in (*config.input, *config.output)]


def committed_files() -> dict[Path, str]:
    """Everything `tuwen render` keeps in git."""
    files: dict[Path, str] = {}
    for name in COMMITTED:
        files |= rendered_files(get_spec(name), get_spec(name).slug)
    return files


def drifted(files: dict[Path, str], repository: Path) -> list[Path]:
    """Those of `files` that are missing in `repository` or differ there."""
    return [path for path, text in files.items() if not _same(repository / path, text)]


def _same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def write_rendered(files: dict[Path, str], repository: Path, overwrite: bool) -> list[Path]:
    """Write `files` below `repository`, each atomically; returns those written.

    Args:
        overwrite: False keeps files that exist, so that a config tuned by hand survives a build.
    """
    written = []
    for path, text in files.items():
        target = repository / path
        if _same(target, text) or (target.exists() and not overwrite):
            continue
        write_text(target, text)
        written.append(path)
    return written
