"""What a Triton model repository on disk holds: which ensembles are built, and which files the others still lack."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tuwen.errors import InvalidInput, MissingDependency

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

# source: Triton docs, model repository; dali's is the file our GPU profile names.
_DEFAULT_FILENAMES = {"python": "model.py", "onnxruntime": "model.onnx", "tensorrt": "model.plan", "dali": "model.dali"}

# What `tuwen build --tune` writes, configs/tuned.pbtxt, and the commands that serve load where there is one.
TUNED_CONFIG = "tuned"

# The parameter by which a model says whose ensembles it calls.
_SERVES = "serves"


def model_names(repository: Path) -> list[str]:
    """Names of the folders that hold a config.pbtxt, sorted; [] when the repository does not exist."""
    return sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))


def built_models(repository: Path, *, model_config_name: str | None = None) -> list[str]:
    """Sorted names of what clients call, ensembles and the models that call them, where every part has its file.

    Args:
        model_config_name: the profile, as in Triton's --model-config-name: configs/NAME.pbtxt where a model has one.
    Raises:
        InvalidInput: a config.pbtxt is not a model configuration.
        MissingDependency: tritonclient, which knows the format, is not installed.
    """
    configs = {name: _read_config(repository, name, model_config_name) for name in model_names(repository)}
    steps = {step.model_name for config in configs.values() for step in config.ensemble_scheduling.step}
    return [
        name
        for name, config in configs.items()
        if name not in steps
        and _is_called_by_clients(config)
        and not missing_files(repository, name, model_config_name=model_config_name)
    ]


def called_models(repository: Path, name: str) -> list[str]:
    """The ensembles that this model calls while it answers, which Triton does not know of; [] for most."""
    serves = _read_config(repository, name, None).parameters.get(_SERVES)
    return [f"{serves.string_value}_{side}" for side in ("text", "image")] if serves else []


def keeps_requests(repository: Path, name: str) -> bool:
    """Whether requests wait in the process of this model, by the bounds in its config; see queued_model.py."""
    return "max_queue_size.bulk" in _read_config(repository, name, None).parameters


def _is_called_by_clients(config: "ModelConfig") -> bool:
    return config.HasField("ensemble_scheduling") or _SERVES in config.parameters


def missing_files(repository: Path, name: str, *, model_config_name: str | None = None) -> list[Path]:
    """Files that this model, or a part of this ensemble, still needs: one path per part, in version folder 1."""
    return list(dict.fromkeys(_missing_files(repository, name, model_config_name, frozenset())))


def _missing_files(repository: Path, name: str, config_name: str | None, seen: frozenset[str]) -> Iterator[Path]:
    model_dir = repository / name
    if not (model_dir / "config.pbtxt").is_file():
        yield model_dir / "config.pbtxt"
        return
    config = _read_config(repository, name, config_name)
    if config.HasField("ensemble_scheduling"):
        for step in config.ensemble_scheduling.step:
            if step.model_name not in seen:  # an ensemble within itself: Triton names the circle
                yield from _missing_files(repository, step.model_name, config_name, seen | {name})
        return
    for called in called_models(repository, name):
        yield from _missing_files(repository, called, config_name, seen | {name})
    filenames = _artifact_filenames(config)
    versions = [path for path in model_dir.iterdir() if path.is_dir() and path.name.isdecimal()]
    if filenames and not any((version / filename).exists() for version in versions for filename in filenames):
        yield model_dir / "1" / filenames[0]


def _artifact_filenames(config: "ModelConfig") -> list[str]:
    """Any one of these makes a version; [] for a backend that we do not know."""
    default = config.default_model_filename or _DEFAULT_FILENAMES.get(config.backend)
    return [*([default] if default else []), *config.cc_model_filenames.values()]


def _read_config(repository: Path, name: str, config_name: str | None) -> "ModelConfig":
    try:
        from google.protobuf import text_format  # type: ignore[import-untyped]
        from tritonclient.grpc.model_config_pb2 import ModelConfig
    except ImportError as error:
        raise MissingDependency("reading config.pbtxt needs tritonclient: pip install 'tuwen[serve]'") from error

    profile_path = repository / name / "configs" / f"{config_name}.pbtxt"
    path = profile_path if config_name and profile_path.is_file() else repository / name / "config.pbtxt"
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: not a model configuration: {error}") from error
