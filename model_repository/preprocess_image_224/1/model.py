"""image UINT8 [size], an encoded file -> pixel_values FP32 [3, R, R]; one bad picture fails alone."""

import numpy as np

from tuwen.image_transform import preprocess_image
from tuwen.serving.picture_model import PictureModel

_FLAG = {"true": True, "false": False}


class TritonPythonModel(PictureModel):
    def initialize(self, args):
        super().initialize(args)
        self.draft = _FLAG[self.parameters.get("jpeg_draft", "true")]

    def outputs(self, files):
        pixel_values = np.empty((len(files), 3, self.resolution, self.resolution), np.float32)
        for file, pixels in zip(files, pixel_values, strict=True):
            preprocess_image(file.tobytes(), self.resolution, draft=self.draft, out=pixels)
        return {"pixel_values": pixel_values}
