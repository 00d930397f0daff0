"""images BYTES [N] and texts BYTES [M] -> logits_per_image, probs, cosine, and with a calibration relevance [N, M]."""

import asyncio
import json
from pathlib import Path

import numpy as np

from tuwen.scoring import softmax
from tuwen.serving.ensemble_calls import Calibrations, Ensembles, answer_all, check_fingerprint, read_bytes, read_name


class TritonPythonModel:
    def initialize(self, args):
        name = json.loads(args["model_config"])["parameters"]["serves"]["string_value"]
        self.ensembles = Ensembles(name)
        folder = Path(args["model_repository"], "calibration")
        self.calibrations = Calibrations(folder)

    async def execute(self, requests):
        return await answer_all(requests, self._score)

    async def _score(self, request):
        images, texts = await asyncio.gather(
            self.ensembles.embed_images(read_bytes(request, "images")),
            self.ensembles.embed_texts(read_bytes(request, "texts")),
        )
        check_fingerprint("text", "tower", texts.fingerprint, images.fingerprint)
        cosine = images.embeds @ texts.embeds.T
        logits = np.float32(np.exp(texts.logit_scale)) * cosine
        outputs = {
            "logits_per_image": logits,
            "probs": softmax(logits),
            "cosine": cosine,
            "fingerprint": np.array([images.fingerprint], np.int64),
        }
        return outputs | self.calibrations.judge(read_name(request, "calibration"), cosine, images.fingerprint)
