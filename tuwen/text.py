"""The text tower: input_ids -> last hidden state of each text's [CLS] (B, H); BERT as in RoBERTa-wwm-ext.

Texts come padded, as everywhere in training, or packed end to end without padding, as they are served: all but
attention works token by token, so a batch of short and long queries costs no more than the tokens in it.
Parameter names are those of the published checkpoints under `bert.`. Any length up to `max_positions` works.
Source: arXiv 1810.04805 and 1906.08101; post-LayerNorm, learned positions, exact GELU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tuwen.specs import PAD_ID, TextSpec

LAYER_NORM_EPS = 1e-12  # source: RoBERTa-wwm-ext's config, kept by Chinese-CLIP


class TextLayout(Protocol):
    """How the tokens (T, H) of B texts lie in memory."""

    @property
    def positions(self) -> Tensor:
        """Of each token in its text: int64 (T,)."""

    @property
    def mask(self) -> Tensor:
        """bool (B, 1, 1, L), true where a key may be attended to; it broadcasts over heads and queries."""

    def to_rows(self, tokens: Tensor) -> Tensor:
        """(T, H) -> (B, L, H), a text each; what `mask` hides may hold anything finite."""

    def to_tokens(self, rows: Tensor) -> Tensor:
        """(B, L, H) -> (T, H)."""

    def first_tokens(self, tokens: Tensor) -> Tensor:
        """(T, H) -> (B, H), the [CLS] of each text."""


@dataclass(frozen=True)
class PaddedLayout:
    """B texts filled up to L tokens with [PAD]; T is B * L."""

    input_ids: Tensor

    @property
    def positions(self) -> Tensor:
        batch, length = self.input_ids.shape
        return torch.arange(length, device=self.input_ids.device).expand(batch, length).flatten()

    @property
    def mask(self) -> Tensor:
        return (self.input_ids != PAD_ID)[:, None, None, :]

    def to_rows(self, tokens: Tensor) -> Tensor:
        return tokens.view(*self.input_ids.shape, -1)

    def to_tokens(self, rows: Tensor) -> Tensor:
        return rows.flatten(0, 1)

    def first_tokens(self, tokens: Tensor) -> Tensor:
        return self.to_rows(tokens)[:, 0]


@dataclass(frozen=True)
class PackedLayout:
    """B texts end to end. Build it with `packed_layout`."""

    positions: Tensor
    mask: Tensor
    starts: Tensor
    row_index: Tensor
    token_index: Tensor

    def to_rows(self, tokens: Tensor) -> Tensor:
        return tokens[self.row_index]

    def to_tokens(self, rows: Tensor) -> Tensor:
        return rows.flatten(0, 1)[self.token_index]

    def first_tokens(self, tokens: Tensor) -> Tensor:
        return tokens[self.starts]


def packed_layout(num_tokens: int, offsets: Tensor, longest: Tensor) -> PackedLayout:
    """The layout of texts that begin at `offsets`.

    Args:
        num_tokens: T, of all texts together.
        offsets: int32 (B + 1,): where each text begins, and T. Triton's BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO.
        longest: (L,), of which only the shape counts: the length of the longest. BATCH_MAX_ELEMENT_COUNT_AS_SHAPE.
    """
    offsets = offsets.long()
    starts, lengths = offsets[:-1], offsets[1:] - offsets[:-1]
    tokens = torch.arange(num_tokens, device=offsets.device)
    columns = torch.arange(longest.shape[0], device=offsets.device)
    text_of_token = (tokens[:, None] >= offsets[None, 1:]).sum(1)
    positions = tokens - starts[text_of_token]
    is_token = columns < lengths[:, None]
    return PackedLayout(
        positions=positions,
        mask=is_token[:, None, None, :],
        starts=starts,
        # Not clamped to T - 1: TensorRT documents no Clip of integers.
        row_index=torch.where(is_token, starts[:, None] + columns, 0),
        token_index=text_of_token * longest.shape[0] + positions,
    )


class BertEmbeddings(nn.Module):
    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(spec.vocab_size, spec.hidden_size, padding_idx=PAD_ID)
        self.position_embeddings = nn.Embedding(spec.max_positions, spec.hidden_size)
        self.token_type_embeddings = nn.Embedding(spec.type_vocab_size, spec.hidden_size)
        self.LayerNorm = nn.LayerNorm(spec.hidden_size, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """(T, H) of input_ids (T,) and positions (T,)."""
        # A caption is one segment, so its token type is 0 throughout.
        x = self.word_embeddings(input_ids) + self.position_embeddings(positions) + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(x))


class BertSelfAttention(nn.Module):
    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.num_heads, self.dropout = spec.num_heads, spec.dropout
        self.query, self.key, self.value = (nn.Linear(spec.hidden_size, spec.hidden_size) for _ in range(3))

    def forward(self, queries: Tensor, tokens: Tensor, layout: TextLayout) -> Tensor:
        """What each of the queries (B, Q, H) gathers from its text among the tokens (T, H): (B, Q, H)."""

        def split_heads(rows: Tensor) -> Tensor:
            batch, length, hidden = rows.shape
            return rows.view(batch, length, self.num_heads, hidden // self.num_heads).transpose(1, 2)

        attended = F.scaled_dot_product_attention(
            split_heads(queries),
            split_heads(layout.to_rows(self.key(tokens))),
            split_heads(layout.to_rows(self.value(tokens))),
            attn_mask=layout.mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return attended.transpose(1, 2).flatten(2)


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

    def forward(self, tokens: Tensor, layout: TextLayout) -> Tensor:
        """(T, H) -> (T, H)."""
        attend = self._self_attention
        attended = attend(layout.to_rows(attend.query(tokens)), tokens, layout)
        return self._mix(layout.to_tokens(attended), tokens)

    def forward_first(self, tokens: Tensor, layout: TextLayout) -> Tensor:
        """(T, H) -> (B, H), of each text's [CLS] alone: a sixth of the work, and all that the last layer is for."""
        attend, first = self._self_attention, layout.first_tokens(tokens)
        attended = attend(attend.query(first)[:, None], tokens, layout)
        return self._mix(attended[:, 0], first)

    @property
    def _self_attention(self) -> BertSelfAttention:
        attention = self.attention["self"]
        assert isinstance(attention, BertSelfAttention)
        return attention

    def _mix(self, attended: Tensor, residual: Tensor) -> Tensor:
        x = self.attention["output"](attended, residual)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class BertEncoder(nn.Module):
    """The whole tower; padding (id 0) is masked out."""

    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(spec)
        layers = nn.ModuleList(BertLayer(spec) for _ in range(spec.layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.apply(_initialise)

    def forward(self, input_ids: Tensor, layout: TextLayout) -> Tensor:
        """Last hidden state of each text's [CLS], (B, H), of the input_ids (T,) of all texts."""
        x = self.embeddings(input_ids, layout.positions)
        *layers, last = self._layers()
        for layer in layers:
            x = layer(x, layout)
        assert isinstance(last, BertLayer)
        return last.forward_first(x, layout)

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
