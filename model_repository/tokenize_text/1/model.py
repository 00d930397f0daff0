"""text BYTES [1], UTF-8 -> input_ids INT64 [L]; one bad text fails alone, with INVALID_ARGUMENT."""

import json

import triton_python_backend_utils as pb_utils

from tuwen.errors import InvalidInput
from tuwen.specs import CONTEXT_LENGTH
from tuwen.tokenizer import check_text, default_tokenizer, normalize_text, pad_rows


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        self.buckets = sorted(int(size) for size in parameters["length_buckets"]["string_value"].split(","))
        if self.buckets[-1] < CONTEXT_LENGTH:
            raise ValueError(f"length_buckets end at {self.buckets[-1]}, the last must hold {CONTEXT_LENGTH}")
        self.tokenizer = default_tokenizer()

    def execute(self, requests):
        return [self._respond(request) for request in requests]

    def _respond(self, request):
        try:
            texts = pb_utils.get_input_tensor_by_name(request, "text").as_numpy()
            rows = [self.tokenizer.encode_ids(normalize_text(check_text(text))) for text in texts.ravel()]
        except InvalidInput as error:
            refused = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=refused)
        longest = max(map(len, rows))
        length = next(size for size in self.buckets if size >= longest)
        return pb_utils.InferenceResponse([pb_utils.Tensor("input_ids", pad_rows(rows, length))])
