"""A tower's ONNX file as a TensorRT engine on this machine's GPU; nothing where there is no GPU or no TensorRT.

Written against the documented API of TensorRT 10 and not yet run: no machine of this project has had a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tuwen.errors import TuwenError
from tuwen.specs import ModelSpec

# What the engines are built for; TensorRT picks its kernels for the middle one.
MAX_BATCH, USUAL_BATCH, USUAL_TOKENS = 64, 8, 9
_WORKSPACE_BYTES = 4 << 30

Engine = Callable[[Mapping[str, npt.NDArray[Any]], str], npt.NDArray[np.float32]]
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


class TensorRTFailed(TuwenError):
    """TensorRT refuses the tower; its own words are quoted."""


def open_tensorrt(onnx_path: Path, spec: ModelSpec) -> dict[str, Engine]:
    """Side name -> engine, fp32 (with TF32) and fp16; empty without GPU or without the package tensorrt.

    Raises:
        TensorRTFailed: the parser or the builder gives up.
    """
    if not torch.cuda.is_available() or find_spec("tensorrt") is None:
        return {}
    return {
        "TensorRT fp32": _build(onnx_path, spec, half=False),
        "TensorRT fp16": _build(onnx_path, spec, half=True),
    }


def profile_shapes(spec: ModelSpec, input_names: list[str]) -> Shapes:
    """Least, usual and greatest shape of each input."""
    side = spec.vision.resolution
    longest = min(spec.context_length, spec.text.max_positions)
    shapes: Shapes = {
        "pixel_values": ((1, 3, side, side), (USUAL_BATCH, 3, side, side), (MAX_BATCH, 3, side, side)),
        "input_ids": ((3,), (USUAL_BATCH * USUAL_TOKENS,), (MAX_BATCH * longest,)),
        "text_offsets": ((2,), (USUAL_BATCH + 1,), (MAX_BATCH + 1,)),
        "longest_text": ((3,), (USUAL_TOKENS,), (longest,)),
    }
    return {name: shapes[name] for name in input_names}


def _build(onnx_path: Path, spec: ModelSpec, half: bool) -> Engine:
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        raise TensorRTFailed(f"{onnx_path.name}: TensorRT cannot read it: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE_BYTES)
    if half:
        config.set_flag(trt.BuilderFlag.FP16)
    profile = builder.create_optimization_profile()
    names = [network.get_input(index).name for index in range(network.num_inputs)]
    for name, shapes in profile_shapes(spec, names).items():
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise TensorRTFailed(f"{onnx_path.name}: TensorRT cannot build an engine of it")
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    return _Tower(trt, engine, names).run


class _Tower:
    """One engine and its execution context; copies to the GPU and back are part of a call."""

    def __init__(self, trt: Any, engine: Any, input_names: list[str]) -> None:
        self._engine, self._context, self._inputs = engine, engine.create_execution_context(), input_names
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._outputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        types = {trt.float32: torch.float32, trt.float16: torch.float16, trt.int64: torch.int64}
        self._types = {name: types[engine.get_tensor_dtype(name)] for name in self._outputs}

    def run(self, feed: Mapping[str, npt.NDArray[Any]], wanted: str) -> npt.NDArray[np.float32]:
        tensors = {name: torch.from_numpy(feed[name]).cuda() for name in self._inputs}
        for name, tensor in tensors.items():
            self._context.set_input_shape(name, tuple(tensor.shape))
        for name in self._outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            tensors[name] = torch.empty(shape, dtype=self._types[name], device="cuda")
        for name, tensor in tensors.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.current_stream()
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise TensorRTFailed("TensorRT did not run the tower")
        embeds: npt.NDArray[np.float32] = tensors[wanted].float().cpu().numpy()  # waits for the stream
        return embeds
