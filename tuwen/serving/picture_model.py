"""A step that takes encoded pictures, `image` UINT8 [size]: one at a time in each of its threads."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils
from PIL import Image

from tuwen.image_transform import MAX_IMAGE_PIXELS
from tuwen.serving.queued_model import QueuedModel, full_refusal
from tuwen.serving.responses import Outputs, respond


class PictureModel:
    """Parameters of its config: `resolution`, `decoders` (threads; 0: one a core), and the bounds of its queue."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self.parameters = {name: each["string_value"] for name, each in config["parameters"].items()}
        self.resolution = int(self.parameters["resolution"])
        decoders = int(self.parameters["decoders"]) or len(os.sched_getaffinity(0))
        # GIF and WebP decoders allocate as they open, after Pillow's own check, which allows twice this number.
        Image.MAX_IMAGE_PIXELS = MAX_IMAGE_PIXELS // 2
        self._queued = QueuedModel(config, self._answer, decoders, max_rows=1)

    def execute(self, requests: list[Any]) -> None:
        self._queued.submit(requests)  # answered by the decoders, each of which has one picture at a time

    def finalize(self) -> None:
        self._queued.close()

    def outputs(self, files: npt.NDArray[np.uint8]) -> Outputs:
        """Of the pictures (N, size) of one request.

        Raises:
            InvalidInput: one of them is not what it takes; the request is refused with that sentence.
        """
        raise NotImplementedError

    def _answer(self, requests: list[Any]) -> list[Any]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        if self._queued.must_refuse(request, "image"):
            return full_refusal()
        return respond(lambda: self.outputs(pb_utils.get_input_tensor_by_name(request, "image").as_numpy()))
