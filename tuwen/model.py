"""ChineseCLIP: the two towers and the space they meet in.

model = ChineseCLIP(get_spec("ViT-B-16"))
logits_per_image, logits_per_text = model.get_similarity(pixel_values, input_ids)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tuwen.errors import InvalidInput
from tuwen.specs import ModelSpec
from tuwen.text import BertEncoder, PaddedLayout, packed_layout
from tuwen.vision import build_vision_tower

MAX_LOGIT_SCALE = math.log(100)  # the trainer clamps the learned log to [0, ln 100]; source: Chinese-CLIP train.py


def resolve_device(name: str | torch.device | None) -> torch.device:
    """The device of that name, by default cuda where there is one, else cpu.

    Raises:
        InvalidInput: no such kind of device, or this machine has none.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInput(f"device {str(name)!r} cannot be used here: {reason}") from None
    return device


class ChineseCLIP(nn.Module):
    """Chinese-CLIP with the published parameter names (`visual.*`, `bert.*`, `text_projection`, `logit_scale`)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.visual = build_vision_tower(spec.vision, spec.embed_dim)
        self.bert = BertEncoder(spec.text)
        self.text_projection = nn.Parameter(torch.randn(spec.text.hidden_size, spec.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.text_projection, std=spec.text.hidden_size**-0.5)

    @property
    def dtype(self) -> torch.dtype:
        return self.text_projection.dtype

    def encode_image(self, pixel_values: Tensor, normalize: bool = False) -> Tensor:
        """Image features (B, D) of pixel_values (B, 3, R, R); unit length if `normalize`, as cn_clip's are not."""
        features = self.visual(pixel_values.to(self.dtype))
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, input_ids: Tensor, normalize: bool = False) -> Tensor:
        """Text features (B, D) of input_ids int64 (B, L); unit length if `normalize`, as cn_clip's are not."""
        return self._project_text(self.bert(input_ids.flatten(), PaddedLayout(input_ids)), normalize)

    def encode_packed_text(
        self, input_ids: Tensor, offsets: Tensor, longest: Tensor, normalize: bool = False
    ) -> Tensor:
        """Text features (B, D) of texts laid end to end: input_ids int64 (T,); the others as in `packed_layout`."""
        layout = packed_layout(input_ids.shape[0], offsets, longest)
        return self._project_text(self.bert(input_ids, layout), normalize)

    def _project_text(self, hidden: Tensor, normalize: bool) -> Tensor:
        features = hidden @ self.text_projection
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit-length image_embeds (B, D) and text_embeds (T, D), and logit_scale.exp() ()."""
        image_embeds = self.encode_image(pixel_values, normalize=True)
        text_embeds = self.encode_text(input_ids, normalize=True)
        return image_embeds, text_embeds, self.logit_scale.exp()

    def get_similarity(self, pixel_values: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """logits_per_image (B_image, B_text) and logits_per_text, its transpose."""
        image_embeds, text_embeds, scale = self(pixel_values, input_ids)
        logits_per_image = scale * image_embeds @ text_embeds.t()
        return logits_per_image, logits_per_image.t()
