"""image UINT8 [size], an encoded file -> pixel_values FP32 [3, R, R]; one bad picture fails alone."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils

from tuwen.errors import InvalidInput
from tuwen.image_transform import preprocess_image


class TritonPythonModel:
    def initialize(self, args):
        self.resolution = int(json.loads(args["model_config"])["parameters"]["resolution"]["string_value"])

    def execute(self, requests):
        return [self._respond(request) for request in requests]

    def _respond(self, request):
        files = pb_utils.get_input_tensor_by_name(request, "image").as_numpy()
        try:
            pixel_values = np.stack([preprocess_image(file.tobytes(), self.resolution) for file in files])
        except InvalidInput as error:
            refused = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=refused)
        return pb_utils.InferenceResponse([pb_utils.Tensor("pixel_values", pixel_values)])
