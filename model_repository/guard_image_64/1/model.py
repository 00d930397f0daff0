"""image UINT8 [size], an encoded file -> image UINT8 [size], one that DALI decodes; one bad picture fails alone."""

import numpy as np

from tuwen.image_guard import guard_image
from tuwen.serving.picture_model import PictureModel


class TritonPythonModel(PictureModel):
    def outputs(self, files):
        guarded = [guard_image(file.tobytes(), self.resolution) for file in files]
        # Pictures of one request have one length: decoders stop at the end of each, not of its row.
        rows = np.zeros((len(guarded), max(map(len, guarded))), np.uint8)
        for row, file in zip(rows, guarded, strict=True):
            row[: len(file)] = np.frombuffer(file, np.uint8)
        return {"image": rows}
