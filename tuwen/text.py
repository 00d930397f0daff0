"""The text tower: input_ids int64 (B, L) -> last hidden states (B, L, H); BERT as in RoBERTa-wwm-ext.

Parameter names are those of the published checkpoints under `bert.`. Any L up to `max_positions` works.
Source: arXiv 1810.04805 and 1906.08101; post-LayerNorm, learned positions, exact GELU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tuwen.specs import PAD_ID, TextSpec

LAYER_NORM_EPS = 1e-12  # source: RoBERTa-wwm-ext's config, kept by Chinese-CLIP


class BertEmbeddings(nn.Module):
    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(spec.vocab_size, spec.hidden_size, padding_idx=PAD_ID)
        self.position_embeddings = nn.Embedding(spec.max_positions, spec.hidden_size)
        self.token_type_embeddings = nn.Embedding(spec.type_vocab_size, spec.hidden_size)
        self.LayerNorm = nn.LayerNorm(spec.hidden_size, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = self.position_embeddings.weight[: input_ids.shape[1]]
        # A caption is one segment, so its token type is 0 throughout.
        x = self.word_embeddings(input_ids) + positions + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(x))


class BertSelfAttention(nn.Module):
    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.num_heads, self.dropout = spec.num_heads, spec.dropout
        self.query, self.key, self.value = (nn.Linear(spec.hidden_size, spec.hidden_size) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, hidden = x.shape

        def split_heads(projected: Tensor) -> Tensor:
            return projected.view(batch, length, self.num_heads, hidden // self.num_heads).transpose(1, 2)

        attended = F.scaled_dot_product_attention(
            split_heads(self.query(x)),
            split_heads(self.key(x)),
            split_heads(self.value(x)),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return attended.transpose(1, 2).reshape(batch, length, hidden)


class BertResidual(nn.Module):
    """dense -> dropout -> add the residual -> LayerNorm: the second half of attention and of the MLP."""

    def __init__(self, in_size: int, spec: TextSpec) -> None:
        super().__init__()
        self.dense = nn.Linear(in_size, spec.hidden_size)
        self.LayerNorm = nn.LayerNorm(spec.hidden_size, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class BertLayer(nn.Module):
    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        # Two plain containers, so that the keys read attention.self.query and intermediate.dense.
        self.attention = nn.ModuleDict(
            {"self": BertSelfAttention(spec), "output": BertResidual(spec.hidden_size, spec)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(spec.hidden_size, spec.intermediate_size)})
        self.output = BertResidual(spec.intermediate_size, spec)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, mask), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class BertEncoder(nn.Module):
    """The whole tower; padding (id 0) is masked out."""

    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(spec)
        layers = nn.ModuleList(BertLayer(spec) for _ in range(spec.layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.apply(_initialise)

    def forward(self, input_ids: Tensor) -> Tensor:
        # (B, 1, 1, L), true where a key may be attended to; it broadcasts over heads and queries.
        mask = (input_ids != PAD_ID)[:, None, None, :]
        x = self.embeddings(input_ids)
        for layer in self._layers():
            x = layer(x, mask)
        return x

    def _layers(self) -> nn.ModuleList:
        layers = self.encoder["layer"]
        assert isinstance(layers, nn.ModuleList)
        return layers


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)  # BERT's initializer_range
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
