"""A checkpoint in PyTorch, on the CPU or a GPU, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from eval.engine import EngineKind
from eval.local_engine import DEFAULT_BATCH_SIZE, LocalEngine, Rows
from tuwen.checkpoint import load_checkpoint
from tuwen.fingerprint import model_fingerprint
from tuwen.model import ChineseCLIP, resolve_device
from tuwen.tokenizer import pad_rows


class TorchEngine(LocalEngine):
    """An Engine over a checkpoint; see `eval.engine`."""

    def __init__(self, model: ChineseCLIP, device: str = "cpu", batch_size: int = DEFAULT_BATCH_SIZE) -> None:
        """Args: device: cpu or cuda. Raises InvalidInput: there is no such device, or the batch size is below 1."""
        spec = model.spec
        super().__init__(spec.vision.resolution, spec.context_length, batch_size)
        self._device = resolve_device(device)
        self._model = model.to(self._device).eval()

    @classmethod
    def open(cls, checkpoint: Path, device: str = "cpu", batch_size: int = DEFAULT_BATCH_SIZE) -> TorchEngine:
        """Of a checkpoint folder or an official .pt.

        Raises:
            InvalidInput: the checkpoint cannot be read; or as the constructor.
        """
        return cls(load_checkpoint(checkpoint), device, batch_size)

    @property
    def kind(self) -> EngineKind:
        return "torch"

    @property
    def model_name(self) -> str:
        return self._model.spec.name

    @property
    def embed_dim(self) -> int:
        return self._model.spec.embed_dim

    @cached_property
    def fingerprint(self) -> int:
        return model_fingerprint(self._model.spec, self._model.state_dict())

    @torch.inference_mode()
    def _run_images(self, pixel_values: Rows) -> Rows:
        features = self._model.encode_image(torch.from_numpy(pixel_values).to(self._device), normalize=True)
        return features.float().cpu().numpy()

    @torch.inference_mode()
    def _run_texts(self, rows: Sequence[Sequence[int]]) -> Rows:
        input_ids = torch.from_numpy(pad_rows(rows, max(map(len, rows)))).to(self._device)
        return self._model.encode_text(input_ids, normalize=True).float().cpu().numpy()
