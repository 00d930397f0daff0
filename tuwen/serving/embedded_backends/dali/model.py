"""Triton Python-based backend `dali`: runs the model.dali of every model that says backend: "dali", on the CPU.

Encoded files in, tensors out. It stands in for Triton's C++ backend, which the wheel nvidia-pytriton lacks, over the
wheel of DALI, and reads the same config.pbtxt; `tuwen serve` copies it into the server's backend folder.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from tuwen.errors import InvalidInput
from tuwen.serving.responses import failure, response_of

_INSTALL_HINT = "backend dali needs NVIDIA DALI: pip install 'tuwen[gpu]'"


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self._path = Path(args["model_repository"]) / args["model_version"]
        self._path /= config["default_model_filename"] or "model.dali"
        (self._input,), (self._output,) = config["input"], config["output"]
        self._max_batch_size = int(config["max_batch_size"])
        # -1: as many as there are cores; the C++ backend takes the number written in the pipeline.
        threads = int(config.get("parameters", {}).get("num_threads", {}).get("string_value", -1))
        self._threads = threads if threads > 0 else len(os.sched_getaffinity(0))
        self._pipeline = self._build()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request, in order."""
        files = [pb_utils.get_input_tensor_by_name(request, self._input["name"]).as_numpy() for request in requests]
        return self._answer(files)

    def _answer(self, files: list[Any]) -> list[Any]:
        """Responses to one batch; when it fails each request runs again alone, so that only the bad one fails."""
        lengths = [len(each) for each in files]
        try:
            rows = self._run([row for each in files for row in each])
        except RuntimeError as error:
            # A pipeline that has raised answers nothing any more.
            self._pipeline = self._build()
            if len(files) > 1:
                return [response for each in files for response in self._answer([each])]
            pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
            return [failure(InvalidInput("image cannot be decoded by DALI; the server's log says why"))]
        return [response_of({self._output["name"]: batch}) for batch in np.split(rows, np.cumsum(lengths)[:-1])]

    def _run(self, files: list[Any]) -> Any:
        self._pipeline.feed_input(self._input["name"], files)
        (outputs,) = self._pipeline.run()
        return np.array(outputs.as_array())  # the next run writes to the same place

    def _build(self) -> Any:
        try:
            from nvidia.dali import Pipeline
        except ImportError:
            raise pb_utils.TritonModelException(_INSTALL_HINT) from None
        if not self._path.is_file():
            raise pb_utils.TritonModelException(f"{self._path} does not exist")
        # Not pipelined: with more than one batch under way a run would wait for the next.
        options = {"batch_size": self._max_batch_size, "num_threads": self._threads, "prefetch_queue_depth": 1}
        try:
            return Pipeline.deserialize(filename=str(self._path), device_id=None, **options)
        except RuntimeError as error:
            told = f"{self._path} is not a pipeline that DALI runs on the CPU: {error}"
            raise pb_utils.TritonModelException(told) from error
