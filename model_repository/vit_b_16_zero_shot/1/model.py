"""images BYTES [N] with labels BYTES [L], or a stored classifier's name -> labels, logits_per_image, probs [N, L]."""

import asyncio
import json
from pathlib import Path

import numpy as np

from tuwen.errors import InvalidInput
from tuwen.scoring import Classifier, average_prompts, fill_templates, load_classifier, softmax
from tuwen.serving.ensemble_calls import (
    Calibrations,
    Ensembles,
    StoredFiles,
    answer_all,
    check_fingerprint,
    read_bytes,
    read_name,
    read_texts,
)  # fmt: skip


class TritonPythonModel:
    def initialize(self, args):
        name = json.loads(args["model_config"])["parameters"]["serves"]["string_value"]
        self.ensembles = Ensembles(name)
        folder = Path(args["model_repository"])
        self.classifiers = StoredFiles("classifier", folder / "classifiers", ".safetensors", load_classifier)
        calibration_dir = folder.with_name(f"{name}_similarity") / "calibration"
        self.calibrations = Calibrations(calibration_dir)

    async def execute(self, requests):
        return await answer_all(requests, self._classify)

    async def _classify(self, request):
        images, classifier = await asyncio.gather(
            self.ensembles.embed_images(read_bytes(request, "images")), self._classifier(request)
        )
        check_fingerprint("classifier", "asked for", classifier.fingerprint, images.fingerprint)
        cosine = images.embeds @ classifier.text_embeds.T
        logits = np.float32(np.exp(await self.ensembles.logit_scale(images.fingerprint))) * cosine
        outputs = {
            "labels": np.array([label.encode() for label in classifier.labels], np.object_),
            "logits_per_image": logits,
            "probs": softmax(logits),
            "fingerprint": np.array([images.fingerprint], np.int64),
        }
        return outputs | self.calibrations.judge(read_name(request, "calibration"), cosine, images.fingerprint)

    async def _classifier(self, request):
        name, labels, templates = (
            read_name(request, "classifier"), read_texts(request, "labels"), read_texts(request, "templates")
        )  # fmt: skip
        if bool(name) == bool(labels):
            raise InvalidInput("request needs either labels or the name of a classifier")
        if name:
            return self.classifiers.get(name)
        found = await self.ensembles.embed_texts([each.encode() for each in fill_templates(labels, templates)])
        return Classifier(tuple(labels), average_prompts(found.embeds, len(labels)), found.fingerprint, ())
