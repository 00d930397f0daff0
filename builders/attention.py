"""Attention as it stands in our ONNX graphs: the six operators that TensorRT's and ONNX Runtime's fusions look for.

The exporter's own translation swaps K's axes through three reshapes, masks with float32's least number and guards each
softmax against rows that attend to nothing. The first two are in the way of a fused kernel; the mask becomes -inf in
float16, where a fully masked row is then NaN. A text has its [CLS], so no row of ours is empty.
"""

from __future__ import annotations

from typing import Any

from onnxscript import opset18 as op

# Added to the scores of masked keys. exp(-30000) is 0 in float32 and in float16, as that of any larger number would be,
# and the sum with a score of up to 35,000 still fits float16's 65,504.
MASKED_SCORE = -30000.0


def translate_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(query * head_size**-0.5 @ key^T + mask) @ value, of (B, heads, L, head_size); the mask bool, true where
    a key may be attended to.

    Raises:
        ValueError: an option that no tower of ours uses.
    """
    if dropout_p or is_causal or scale is not None or enable_gqa:
        raise ValueError("attention is exported without dropout, causal mask, scale of its own and grouped queries")
    scaled = op.Mul(query, op.Constant(value_float=query.shape[-1] ** -0.5))
    scores = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None:
        visible: Any = op.Constant(value_float=0.0)
        hidden: Any = op.Constant(value_float=MASKED_SCORE)
        scores = op.Add(scores, op.Where(attn_mask, visible, hidden))
    return op.MatMul(op.Softmax(scores, axis=-1), value)
