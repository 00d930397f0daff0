"""text BYTES [1], UTF-8 -> input_ids INT64 [L], num_tokens, truncated; one bad text fails alone."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils

from tuwen.errors import InvalidInput
from tuwen.serving.queued_model import EarlyRefusals, full_refusal
from tuwen.serving.responses import respond
from tuwen.tokenizer import check_text, default_tokenizer, normalize_text


class TritonPythonModel:
    def initialize(self, args):
        self.tokenizer = default_tokenizer()
        self.refusals = EarlyRefusals(json.loads(args["model_config"])["name"], "text")

    def execute(self, requests):
        return [self._respond(request) for request in requests]

    def finalize(self):
        self.refusals.close()

    def _respond(self, request):
        if self.refusals.must_refuse(request):
            return full_refusal()
        return respond(lambda: self._outputs(pb_utils.get_input_tensor_by_name(request, "text").as_numpy().ravel()))

    def _outputs(self, texts):
        if len(texts) != 1:
            raise InvalidInput(f"request has {len(texts)} texts, expected one; the server builds the batches")
        ids, truncated = self.tokenizer.encode_checked(normalize_text(check_text(texts[0])))
        return {
            "input_ids": np.array([ids], np.int64),
            "num_tokens": np.array([[len(ids)]], np.int64),
            "truncated": np.array([[truncated]], np.bool_),
        }
