"""The contrastive loss with several positives: pictures (B) and captions (T) that belong together attract.

With one caption per picture it is CLIP's symmetric cross-entropy (arXiv 2103.00020, figure 3); with several, each
row's target is spread evenly over its positives (arXiv 2004.11362, L_out).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def contrastive_loss(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor, positives: Tensor) -> Tensor:
    """Mean of the image-to-text and text-to-image losses, a scalar.

    Args:
        image_embeds: (B, D), unit length.
        text_embeds: (T, D), unit length.
        scale: (), the exponentiated logit_scale.
        positives: bool (B, T), true where the text describes the image; no empty row or column.
    """
    logits_per_image = scale * image_embeds @ text_embeds.t()
    targets = positives.to(logits_per_image.dtype)
    image_loss = F.cross_entropy(logits_per_image, targets / targets.sum(dim=1, keepdim=True))
    text_loss = F.cross_entropy(logits_per_image.t(), (targets / targets.sum(dim=0, keepdim=True)).t())
    return (image_loss + text_loss) / 2
