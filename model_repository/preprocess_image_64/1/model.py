"""image UINT8 [size], an encoded file -> pixel_values FP32 [3, R, R]; one bad picture fails alone."""

import json
import os

import numpy as np
import triton_python_backend_utils as pb_utils
from PIL import Image

from tuwen.errors import InvalidInput
from tuwen.image_transform import MAX_IMAGE_PIXELS, preprocess_image
from tuwen.serving.queued_model import QueuedModel, full_refusal

_FLAG = {"true": True, "false": False}


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        self.resolution = int(parameters["resolution"]["string_value"])
        self.draft = _FLAG[parameters.get("jpeg_draft", {"string_value": "true"})["string_value"]]
        decoders = int(parameters["decoders"]["string_value"]) or len(os.sched_getaffinity(0))
        self.queued = QueuedModel(json.loads(args["model_config"]), self._answer, decoders, max_rows=1)
        # GIF and WebP decoders allocate as they open, after Pillow's own check, which allows twice this number.
        Image.MAX_IMAGE_PIXELS = MAX_IMAGE_PIXELS // 2

    def execute(self, requests):
        self.queued.submit(requests)  # answered by the decoders, each of which has one picture at a time

    def finalize(self):
        self.queued.close()

    def _answer(self, requests):
        return [self._respond(request) for request in requests]

    def _respond(self, request):
        if self.queued.must_refuse(request, "image"):
            return full_refusal()
        files = pb_utils.get_input_tensor_by_name(request, "image").as_numpy()
        pixel_values = np.empty((len(files), 3, self.resolution, self.resolution), np.float32)
        try:
            for file, pixels in zip(files, pixel_values, strict=True):
                preprocess_image(file.tobytes(), self.resolution, draft=self.draft, out=pixels)
        except InvalidInput as error:
            refused = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=refused)
        except Exception as error:  # a bug, or no memory: what it says is for the log, and this request fails alone
            pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
            failed = pb_utils.TritonError(
                "the server made a mistake; its log says which", pb_utils.TritonError.INTERNAL
            )
            return pb_utils.InferenceResponse(error=failed)
        return pb_utils.InferenceResponse([pb_utils.Tensor("pixel_values", pixel_values)])
