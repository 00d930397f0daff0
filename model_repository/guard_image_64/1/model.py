"""image UINT8 [size], an encoded file -> image UINT8 [size], one that DALI decodes; one bad picture fails alone."""

import json
import os

import numpy as np
import triton_python_backend_utils as pb_utils
from PIL import Image

from tuwen.errors import InvalidInput
from tuwen.image_guard import guard_image
from tuwen.image_transform import MAX_IMAGE_PIXELS
from tuwen.serving.queued_model import QueuedModel, full_refusal


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.resolution = int(config["parameters"]["resolution"]["string_value"])
        decoders = int(config["parameters"]["decoders"]["string_value"]) or len(os.sched_getaffinity(0))
        self.queued = QueuedModel(config, self._answer, decoders, max_rows=1)
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
        try:
            guarded = [guard_image(file.tobytes(), self.resolution) for file in files]
        except InvalidInput as error:
            refused = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=refused)
        except Exception as error:  # a bug, or no memory: what it says is for the log, and this request fails alone
            pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
            failed = pb_utils.TritonError(
                "the server made a mistake; its log says which", pb_utils.TritonError.INTERNAL
            )
            return pb_utils.InferenceResponse(error=failed)
        # Pictures of one request have one length: decoders stop at the end of each, not of its row.
        rows = np.zeros((len(guarded), max(map(len, guarded))), np.uint8)
        for row, file in zip(rows, guarded, strict=True):
            row[: len(file)] = np.frombuffer(file, np.uint8)
        return pb_utils.InferenceResponse([pb_utils.Tensor("image", rows)])
