"""The model.py files that Triton runs, run here: the real code, over a stand-in for Triton's own small module."""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy.typing as npt
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from perf.fuzz.inputs import FuzzInput, Kind
from perf.fuzz.judgement import BadAnswer, check_ids, check_pixels, refusal_class
from tuwen.tokenizer import VOCAB_PATH

REPOSITORY = Path(__file__).parents[2] / "model_repository"
RESOLUTION = 224
MODELS: dict[Kind, str] = {"image": f"preprocess_image_{RESOLUTION}", "text": "tokenize_text"}
OK = "ok"
MAX_ANSWER_S = 60.0


class Tensor:
    def __init__(self, name: str, array: npt.NDArray[Any]) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> npt.NDArray[Any]:
        return self._array

    def shape(self) -> tuple[int, ...]:
        return self._array.shape


class TritonError:
    INVALID_ARG, INTERNAL, UNAVAILABLE = "INVALID_ARG", "INTERNAL", "UNAVAILABLE"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> str:
        return self._code


@dataclass(frozen=True)
class InferenceResponse:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None


@dataclass(frozen=True)
class InferenceRequest:
    """One request, and the responses that were sent to it by its sender."""

    tensors: list[Tensor]
    sent: SimpleQueue[InferenceResponse] = field(default_factory=SimpleQueue)

    def inputs(self) -> list[Tensor]:
        return self.tensors

    def parameters(self) -> str:
        return ""

    def timeout(self) -> int:
        return 0

    def get_response_sender(self) -> InferenceRequest:
        return self

    def send(self, response: InferenceResponse, flags: int) -> None:
        self.sent.put(response)


class Logger:
    """What a model logs is a bug's: it comes back as an answer that is none of those allowed."""

    @staticmethod
    def log_error(message: str) -> None:
        print(message, file=sys.stderr)


class MetricFamily:
    """Counts nothing."""

    COUNTER, GAUGE = "counter", "gauge"

    def __init__(self, name: str, description: str, kind: str) -> None: ...

    def Metric(self, labels: dict[str, str]) -> MetricFamily:  # noqa: N802, Triton's name
        return self

    def increment(self, count: float) -> None: ...

    def set(self, value: float) -> None: ...


def _input_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in request.tensors if tensor.name() == name), None)


def install_stand_in() -> None:
    """Makes `import triton_python_backend_utils` find the above, in this process."""
    module = types.ModuleType("triton_python_backend_utils")
    parts: tuple[type, ...] = (Tensor, TritonError, InferenceRequest, InferenceResponse, Logger, MetricFamily)
    vars(module).update({part.__name__: part for part in parts}, get_input_tensor_by_name=_input_by_name)
    vars(module).update(TRITONSERVER_RESPONSE_COMPLETE_FINAL=1, TritonModelException=RuntimeError)
    sys.modules[module.__name__] = module


class Models:
    """Both models, loaded as Triton loads them: model.py, and initialize() with the rendered config."""

    def __init__(self, repository: Path = REPOSITORY) -> None:
        install_stand_in()
        self._models: dict[str, Any] = {kind: _load(repository, name) for kind, name in MODELS.items()}
        self._vocab_size = VOCAB_PATH.read_bytes().count(b"\n") + 1

    def run(self, item: FuzzInput) -> str:
        """Outcome of one request: "ok", or the class of its refusal.

        Raises:
            BadAnswer: anything else.
        """
        request = InferenceRequest([Tensor(item.kind, item.array())])
        try:
            responses = self._models[item.kind].execute([request])
            response = responses[0] if responses else request.sent.get(timeout=MAX_ANSWER_S)
        except Exception as error:
            raise BadAnswer(f"execute raised {type(error).__name__}: {error}") from error
        if response.error is not None:
            if item.intact:
                raise BadAnswer(f"a valid {item.format} was refused: {response.error.message()}")
            if response.error.code() != TritonError.INVALID_ARG:
                raise BadAnswer(f"error of code {response.error.code()}: {response.error.message()}")
            return refusal_class(response.error.message())
        outputs = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors}
        check_ids(outputs, self._vocab_size) if item.kind == "text" else check_pixels(outputs, RESOLUTION)
        return OK


def _load(repository: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{name}_model", repository / name / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = text_format.Parse((repository / name / "config.pbtxt").read_text(encoding="utf-8"), ModelConfig())
    model = module.TritonPythonModel()
    model.initialize({"model_config": json_format.MessageToJson(config, preserving_proto_field_name=True)})
    return model
