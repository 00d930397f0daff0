"""What a model of ours answers: outputs, or a sentence to one request alone; what is not for clients is for the log.

Runs inside a model process of Triton, where `triton_python_backend_utils` exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from tuwen.errors import InvalidInput

Outputs = Mapping[str, npt.NDArray[Any]]


def respond(make_outputs: Callable[[], Outputs]) -> Any:
    """The response to one request: output name -> array, or why there is none."""
    try:
        return response_of(make_outputs())
    except Exception as error:
        return failure(error)


def response_of(outputs: Outputs) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outputs.items()])


def failure(error: Exception) -> Any:
    """INVALID_ARGUMENT with what is wrong with the request; INTERNAL for a bug or want of memory, told to the log."""
    if isinstance(error, InvalidInput):
        return refusal(str(error), pb_utils.TritonError.INVALID_ARG)
    pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
    return refusal("the server made a mistake; its log says which", pb_utils.TritonError.INTERNAL)


def refusal(sentence: str, code: int) -> Any:
    """An error of one of pb_utils.TritonError's codes."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(sentence, code))
