"""A Triton repository without weights that keeps the server's contract: `toy_text` and `toy_image`, both ensembles.

An embedding is a hash of the text, or of the decoded pixels and their mode. Words in a text steer the model:
"bad" is refused, "slow" sleeps. The fingerprint is read from a file at each request, so that a test can change it.
"""

from __future__ import annotations

from pathlib import Path

EMBED_DIM = 8
FINGERPRINT = 4_611_686_018_427_387_905  # above 2**62: every bit but the sign must survive the journey
SLEEP_S = 2.0
MAX_QUEUE_SIZE = 300
MODEL = "toy"

_TOWER_PY = """
import hashlib, io, os, time
import numpy as np
import triton_python_backend_utils as pb_utils
from PIL import Image

SIDE = "@side@"

class TritonPythonModel:
    def execute(self, requests):
        return [self.respond(request) for request in requests]

    def respond(self, request):
        try:
            seed = self.seed(pb_utils.get_input_tensor_by_name(request, SIDE).as_numpy())
        except ValueError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        row = np.random.default_rng(seed).standard_normal((1, @embed_dim@)).astype(np.float32)
        with open("@fingerprint_path@") as file:
            fingerprint = np.array([[int(file.read())]], dtype=np.int64)
        return pb_utils.InferenceResponse([
            pb_utils.Tensor(SIDE + "_embeds", row / np.linalg.norm(row)), pb_utils.Tensor("fingerprint", fingerprint)
        ])

    def seed(self, values):
        assert values.shape[0] == 1, values.shape
        if SIDE == "text":
            text = values[0, 0].decode("utf-8")
            if "bad" in text:
                raise ValueError("text is bad, expected a good one")
            if "slow" in text:
                time.sleep(@sleep_s@)
            content = text.encode()
        else:
            try:
                picture = Image.open(io.BytesIO(values.tobytes()))
                content = f"{picture.mode} {picture.size}".encode() + picture.tobytes()
            except OSError as error:
                raise ValueError(f"image cannot be decoded: {error}")
        return list(hashlib.sha256(content).digest())
"""

_TOWER_CONFIG = """
name: "toy_@side@_tower"
backend: "python"
max_batch_size: 32
input [{ name: "@side@" data_type: @data_type@ dims: [@dims@] allow_ragged_batch: true }]
output [{ name: "@side@_embeds" data_type: TYPE_FP32 dims: [@embed_dim@] },
        { name: "fingerprint" data_type: TYPE_INT64 dims: [1] }]
instance_group [{ kind: KIND_CPU count: 1 }]
dynamic_batching {
  max_queue_delay_microseconds: 1000
  default_queue_policy { max_queue_size: @max_queue_size@ }
}
"""

_ENSEMBLE_CONFIG = """
name: "toy_@side@"
platform: "ensemble"
max_batch_size: 32
input [{ name: "@side@" data_type: @data_type@ dims: [@dims@] }]
output [{ name: "@side@_embeds" data_type: TYPE_FP32 dims: [@embed_dim@] },
        { name: "fingerprint" data_type: TYPE_INT64 dims: [1] }]
ensemble_scheduling { step [{
  model_name: "toy_@side@_tower" model_version: -1
  input_map { key: "@side@" value: "@side@" }
  output_map [{ key: "@side@_embeds" value: "@side@_embeds" }, { key: "fingerprint" value: "fingerprint" }]
}] }
"""


def write_toy_repository(repository: Path) -> None:
    """Both ensembles and their towers, below `repository`."""
    set_fingerprint(repository, FINGERPRINT)
    for side, data_type, dims in (("text", "TYPE_STRING", "1"), ("image", "TYPE_UINT8", "-1")):
        values = {
            "side": side,
            "data_type": data_type,
            "dims": dims,
            "embed_dim": EMBED_DIM,
            "sleep_s": SLEEP_S,
            "max_queue_size": MAX_QUEUE_SIZE,
            "fingerprint_path": _fingerprint_path(repository),
        }
        (repository / f"toy_{side}" / "1").mkdir(parents=True)
        (repository / f"toy_{side}_tower" / "1").mkdir(parents=True)
        _write(repository / f"toy_{side}" / "config.pbtxt", _ENSEMBLE_CONFIG, values)
        _write(repository / f"toy_{side}_tower" / "config.pbtxt", _TOWER_CONFIG, values)
        _write(repository / f"toy_{side}_tower" / "1" / "model.py", _TOWER_PY, values)


def set_fingerprint(repository: Path, fingerprint: int) -> None:
    """Every later answer carries this fingerprint."""
    repository.mkdir(parents=True, exist_ok=True)
    path = _fingerprint_path(repository)
    temporary = path.with_suffix(".new")
    temporary.write_text(str(fingerprint), encoding="utf-8")
    temporary.replace(path)


def _fingerprint_path(repository: Path) -> Path:
    return repository.absolute() / "fingerprint.txt"


def _write(path: Path, template: str, values: dict[str, object]) -> None:
    for key, value in values.items():
        template = template.replace(f"@{key}@", str(value))
    path.write_text(template, encoding="utf-8")
