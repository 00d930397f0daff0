"""The towers as training computes them: chunks of pictures and captions in, embeddings out, over any engine.

towers = Towers(model, mask_ratio=0.5)
engine = Engine(towers, recipe.engine, world)      # plain, DDP or FSDP2; compiled, checkpointed, mixed precision
image_embeds, text_embeds = engine(chunk)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from training.batch import Batch, InputIds
from training.distributed import World
from training.pixels import as_floats
from training.recipe import EngineSection
from tuwen.errors import InvalidInput
from tuwen.model import ChineseCLIP
from tuwen.specs import CLS_ID, IMAGE_MEAN, IMAGE_STD, SEP_ID
from tuwen.text import BertLayer
from tuwen.vision import Bottleneck, ResidualAttentionBlock

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BLOCKS = (ResidualAttentionBlock, Bottleneck, BertLayer)
# In place of a chunk's captions where there are fewer of them than chunks; its embedding is thrown away.
_NO_TEXT: InputIds = (CLS_ID, SEP_ID)


@dataclass(frozen=True)
class Chunk:
    """Part of a process's batch, where the batch is.

    Attributes:
        pixels: uint8 (c, 3, R, R); float32 exists while the chunk is computed, and never of the whole batch.
        input_ids, offsets, longest: captions end to end, as ChineseCLIP.encode_packed_text takes them: nobody pays
            for padding.
        num_texts: captions that count.
    """

    pixels: Tensor
    input_ids: Tensor
    offsets: Tensor
    longest: Tensor
    num_texts: int


def chunks_of(batch: Batch, size: int) -> list[Chunk]:
    """The batch in chunks of at most `size` pictures (0: all), each with its part of the captions."""
    count = -(-len(batch.pixels) // (size or len(batch.pixels)))
    parts = zip(batch.pixels.tensor_split(count), _split(batch.texts, count), strict=True)
    return [_chunk(pixels, texts) for pixels, texts in parts]


def _split(texts: Sequence[InputIds], count: int) -> list[Sequence[InputIds]]:
    ends = [len(texts) * number // count for number in range(count + 1)]
    return [texts[start:end] for start, end in pairwise(ends)]


def _chunk(pixels: Tensor, texts: Sequence[InputIds]) -> Chunk:
    given = texts or (_NO_TEXT,)
    lengths = torch.tensor([0, *map(len, given)])
    return Chunk(
        pixels,
        torch.tensor([token for text in given for token in text]),
        lengths.cumsum(0).int(),
        torch.empty(int(lengths.max())),
        len(texts),
    )


def normalize(pixels: Tensor) -> Tensor:
    """pixel_values of pixels uint8 (B, 3, R, R): CLIP's mean and std."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    return as_floats(pixels).sub_(mean).div_(std)


class Towers(nn.Module):
    """Both towers as one module, so that DDP and FSDP see all parameters used in each pass but logit_scale.

    logit_scale belongs to the loss: its gradient is there before the towers' own.
    """

    def __init__(self, model: ChineseCLIP, mask_ratio: float = 0.0) -> None:
        super().__init__()
        self.model, self.mask_ratio = model, mask_ratio

    def forward(self, pixels: Tensor, input_ids: Tensor, offsets: Tensor, longest: Tensor) -> tuple[Tensor, Tensor]:
        """image_embeds (c, D) and text_embeds (t, D) of unit length; the arguments are a `Chunk`'s."""
        pixel_values = normalize(pixels)
        kept = self._patches_kept(len(pixel_values), pixel_values.device) if self.mask_ratio else None
        features = self.model.visual(pixel_values) if kept is None else self.model.visual(pixel_values, kept)
        text_embeds = self.model.encode_packed_text(input_ids, offsets, longest, normalize=True)
        return nn.functional.normalize(features, dim=-1), text_embeds

    def _patches_kept(self, count: int, device: torch.device) -> Tensor:
        """FLIP: the patches each picture keeps, drawn from torch's own generator, which a second pass replays."""
        patches = self.model.spec.vision.grid_size**2
        num_kept = max(1, round(patches * (1 - self.mask_ratio)))
        return torch.rand(count, patches, device=device).argsort(dim=1)[:, :num_kept]


class Engine:
    """Runs the towers forward and backward: on one device, as a copy a process (DDP), or sharded (FSDP2)."""

    def __init__(self, towers: Towers, section: EngineSection, world: World) -> None:
        """Wraps in place; make the optimizer afterwards, of `towers.parameters()`.

        Raises:
            InvalidInput: the device cannot do what the section asks.
        """
        self.towers, self.world = towers, world
        self._dtype = _DTYPES[section.precision]
        _prepare(towers, section, world)
        self._ddp: DistributedDataParallel | None = None
        self._is_sharded = world.is_distributed and section.strategy == "fsdp"
        if not self._is_sharded:
            # Makes the convolutions a quarter faster on CPU, and is what GPUs want too.
            towers.model.visual = towers.model.visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._run: Any = towers
        if section.compile:
            self._run = torch.compile(towers, dynamic=True)
        if self._is_sharded:
            _shard(towers)  # which takes no weights in channels_last
        elif world.is_distributed:
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(towers, ["model.logit_scale"])
            self._ddp = self._run = DistributedDataParallel(
                self._run, device_ids=[world.device.index] if world.device.type == "cuda" else None
            )

    @property
    def is_sharded(self) -> bool:
        return self._is_sharded

    def __call__(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """image_embeds (c, D) and text_embeds (t, D), float32."""
        parts = (chunk.pixels, chunk.input_ids, chunk.offsets, chunk.longest)
        arguments = (part.to(self.world.device, non_blocking=True) for part in parts)
        with torch.autocast(self.world.device.type, self._dtype, enabled=self._dtype is not torch.float32):
            image_embeds, text_embeds = self._run(*arguments)
        return image_embeds.float(), text_embeds[: chunk.num_texts].float()

    @contextmanager
    def without_statistics(self) -> Iterator[None]:
        """A pass that is repeated: batch norms compute with the batch's statistics and do not count it twice."""
        norms = [one for one in self.towers.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
        try:
            yield
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a chunk: gradients are exchanged between processes after the last alone."""
        if self._is_sharded:
            assert isinstance(self.towers, FSDPModule)
            self.towers.set_requires_gradient_sync(is_last)
        return self._ddp.no_sync() if self._ddp is not None and not is_last else nullcontext()


def _prepare(towers: Towers, section: EngineSection, world: World) -> None:
    if section.precision == "bf16" and world.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise InvalidInput("engine.precision: this GPU has no bf16; fp16 is the way")
    if section.sync_batch_norm:
        if world.device.type == "cpu":
            raise InvalidInput("engine.sync_batch_norm: torch has it for GPUs alone")
        nn.SyncBatchNorm.convert_sync_batchnorm(towers)
    if section.grad_checkpointing:
        for module in towers.modules():
            if isinstance(module, _BLOCKS):
                module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]


def _shard(towers: Towers) -> None:
    """FSDP2: each block a unit, the rest another. A scalar cannot be split, and is the loss's anyway."""
    for module in towers.modules():
        if isinstance(module, _BLOCKS):
            fully_shard(module)
            if hasattr(module, "forward_first"):  # of each tower's last block
                register_fsdp_forward_method(module, "forward_first")
    fully_shard(towers, ignored_params={towers.model.logit_scale})
