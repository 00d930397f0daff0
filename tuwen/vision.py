"""The image towers: pixel_values float32 (B, 3, R, R) -> features (B, D), not yet unit length.

Parameter names are those of OpenAI's CLIP, which Chinese-CLIP's checkpoints keep under `visual.`.
Source: arXiv 2103.00020, sections 2.4 and 3; the ResNet's changes are described there too.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tuwen.specs import VisionSpec

_QUICK = 1.702  # Source: arXiv 1606.08415, section 2.


def build_vision_tower(spec: VisionSpec, embed_dim: int) -> VisionTransformer | ModifiedResNet:
    return VisionTransformer(spec, embed_dim) if spec.kind == "vit" else ModifiedResNet(spec, embed_dim)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(_QUICK * x)


class Mlp(nn.Sequential):
    """(B, L, C) -> (B, L, C), four times as wide between."""

    def __init__(self, width: int) -> None:
        c_fc, c_proj = nn.Linear(width, width * 4), nn.Linear(width * 4, width)
        super().__init__(OrderedDict(c_fc=c_fc, gelu=QuickGELU(), c_proj=c_proj))
        self.c_fc, self.c_proj = c_fc, c_proj

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        # The same with its constants in the weights, up to rounding: of the wide tensors a backward pass then needs
        # two, not three, and one pass over them takes the place of three.
        wide = F.silu(F.linear(x, _QUICK * self.c_fc.weight, _QUICK * self.c_fc.bias))
        return F.linear(wide, self.c_proj.weight / _QUICK, self.c_proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention with nn.MultiheadAttention's parameter names."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        query, key, value = self._heads(x, 0, 3)
        return self._attend(query, key, value)

    def forward_first(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, 1, C), of the first position alone."""
        (query,), (key, value) = self._heads(x[:, :1], 0, 1), self._heads(x, 1, 3)
        return self._attend(query, key, value)

    def _heads(self, x: Tensor, first: int, end: int) -> Tensor:
        """Those from `first` to `end` of query, key and value: (end - first, B, heads, L, C / heads)."""
        batch, length, width = x.shape
        rows = slice(first * width, end * width)
        projected = F.linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])
        return projected.view(batch, length, end - first, self.num_heads, -1).permute(2, 0, 3, 1, 4)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, num_heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

    def forward_first(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, C), of the first position alone: a sixth of the work."""
        first = x[:, :1] + self.attn.forward_first(self.ln_1(x))
        return (first + self.mlp(self.ln_2(first)))[:, 0]


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, num_heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, num_heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, C): the first position, the class token, which is all that the last block computes."""
        *blocks, last = self.resblocks
        for block in blocks:
            x = block(x)
        assert isinstance(last, ResidualAttentionBlock)
        return last.forward_first(x)


class VisionTransformer(nn.Module):
    """CLIP's ViT: patches, a class token, pre- and post-LayerNorm; the class token is the feature."""

    def __init__(self, spec: VisionSpec, embed_dim: int) -> None:
        super().__init__()
        assert isinstance(spec.layers, int)  # this and the next are held by VisionSpec
        assert spec.patch_size is not None
        scale = spec.width**-0.5
        self.conv1 = nn.Conv2d(3, spec.width, kernel_size=spec.patch_size, stride=spec.patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(spec.width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(spec.grid_size**2 + 1, spec.width))
        self.ln_pre = nn.LayerNorm(spec.width)
        self.transformer = Transformer(spec.width, spec.layers, spec.num_heads)
        self.ln_post = nn.LayerNorm(spec.width)
        self.proj = nn.Parameter(scale * torch.randn(spec.width, embed_dim))

    def forward(self, pixel_values: Tensor, patches_kept: Tensor | None = None) -> Tensor:
        """Features of pictures of which only some patches are looked at: int64 (B, K) of grid^2; by default all."""
        patches = self.conv1(pixel_values).flatten(2).transpose(1, 2)  # (B, grid^2, C)
        class_token = self.class_embedding.expand(patches.shape[0], 1, -1)
        x = torch.cat([class_token, patches], dim=1) + self.positional_embedding
        if patches_kept is not None:
            rows = torch.arange(x.shape[0], device=x.device)[:, None]
            x = torch.cat([x[:, :1], x[rows, patches_kept + 1]], dim=1)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x) @ self.proj


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions; strides are average pools, for anti-aliasing (CLIP's change to ResNet-D)."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        nn.init.zeros_(self.bn3.weight)  # a block starts as the identity
        self.downsample: nn.Sequential | None = None
        if stride > 1 or in_channels != out_channels:
            # The parameter-free pool is "-1" so that "0" and "1" carry the weights, as in the published files.
            conv, norm = nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            self.downsample = nn.Sequential(OrderedDict([("-1", nn.AvgPool2d(stride)), ("0", conv), ("1", norm)]))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class AttentionPool2d(nn.Module):
    """Pools (B, C, H, W) by one attention query, the mean of all positions; -> (B, D)."""

    def __init__(self, grid_size: int, width: int, num_heads: int, embed_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(grid_size**2 + 1, width) / width**0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embed_dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding
        batch, _, width = x.shape

        def split_heads(projected: Tensor) -> Tensor:
            return projected.view(batch, -1, self.num_heads, width // self.num_heads).transpose(1, 2)

        query, key, value = split_heads(self.q_proj(x[:, :1])), split_heads(self.k_proj(x)), split_heads(self.v_proj(x))
        pooled = F.scaled_dot_product_attention(query, key, value)
        return self.c_proj(pooled.transpose(1, 2).reshape(batch, width))


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: a stem of three convolutions, anti-aliased strides, attention pooling."""

    def __init__(self, spec: VisionSpec, embed_dim: int) -> None:
        super().__init__()
        assert not isinstance(spec.layers, int)  # held by VisionSpec
        width = spec.width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        channels = [width, *(width * 2**stage * Bottleneck.expansion for stage in range(4))]
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(
                Bottleneck(channels[stage], width * 2**stage, stride=1 if stage == 0 else 2),
                *(Bottleneck(channels[stage + 1], width * 2**stage, stride=1) for _ in range(blocks - 1)),
            )
            for stage, blocks in enumerate(spec.layers)
        )
        self.attnpool = AttentionPool2d(spec.grid_size, width * 32, spec.num_heads, embed_dim)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.avgpool(F.relu(self.bn3(self.conv3(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.attnpool(x)
