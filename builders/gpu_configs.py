"""configs/gpu.pbtxt: what a model's config is where there is a GPU, `tritonserver --model-config-name=gpu`.

A tower's is its CPU config with another backend: the same tensors under the same names, so that no client notices.
Source of what the backend wants: github.com/triton-inference-server/tensorrt_backend, src/instance_state.cc and
src/model_state.cc at e2ef6d7; docs/gpu.md has the findings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tritonclient.grpc import model_config_pb2 as pb

from builders.configs import (
    MAX_BATCH_SIZE,
    Model,
    Renderable,
    dali_preprocess,
    guarded_image_ensemble,
    image_tower,
    text_tower,
)
from builders.tensorrt_plan import COMPUTE_CAPABILITIES
from tuwen.specs import CONTEXT_LENGTH, ModelSpec

PROFILE = "gpu"
# What a search box sends: one text of up to 22 characters and its two marks; and a text that was cut.
_TEXT_GRAPH_LENGTHS = (*range(3, 25), CONTEXT_LENGTH)
_IMAGE_GRAPH_BATCHES = (1, 2, 4, 8, 16, MAX_BATCH_SIZE)


@dataclass(frozen=True)
class TensorRTTower:
    """A tower whose plans lie beside its ONNX file, one per compute capability."""

    tower: Model
    # Full shapes a CUDA graph is captured for at load, by input; a batch of another shape runs without one.
    graphs: tuple[tuple[int, tuple[tuple[str, int], ...]], ...]
    purpose: str
    change: str = "Change here: graph_spec, shapes captured as CUDA graphs; instance_group, each with the weights."

    @property
    def name(self) -> str:
        return self.tower.name

    def to_proto(self) -> pb.ModelConfig:
        # Without the queue's bounds: TensorRT's backend does not read them, and Triton's own may stand still for
        # 500 ms (tuwen/serving/request_queue.py). The models in front of a tower keep theirs.
        config = replace(self.tower, backend="tensorrt", kind="gpu", parameters=()).to_proto()
        for capability in COMPUTE_CAPABILITIES:
            config.cc_model_filenames[str(capability)] = capability.plan_name
        config.optimization.cuda.graphs = True
        for batch_size, inputs in self.graphs:
            graph = config.optimization.cuda.graph_spec.add(batch_size=batch_size)
            for name, dim in inputs:
                graph.input[name].dim.append(dim)
        return config


def gpu_text_tower(spec: ModelSpec, name: str) -> TensorRTTower:
    # Only a lone text has a shape that comes again. All three inputs, each in full; and no graph_lower_bound: ids of
    # earlier requests would stay behind the last text.
    lone_texts = tuple(
        (1, (("input_ids", length), ("text_offsets", 2), ("longest_text", length))) for length in _TEXT_GRAPH_LENGTHS
    )
    tower = text_tower(spec, name)
    return TensorRTTower(tower, lone_texts, purpose=f"On a GPU. {tower.purpose}")


def gpu_image_tower(spec: ModelSpec, name: str) -> TensorRTTower:
    tower = image_tower(spec, name)
    batches = tuple((batch_size, ()) for batch_size in _IMAGE_GRAPH_BATCHES)
    return TensorRTTower(tower, batches, purpose=f"On a GPU. {tower.purpose}")


def gpu_models(spec: ModelSpec, name: str) -> tuple[Renderable, ...]:
    """Every model of an architecture whose config differs on a GPU."""
    return (
        gpu_text_tower(spec, name),
        gpu_image_tower(spec, name),
        dali_preprocess(spec.vision.resolution, "gpu"),
        guarded_image_ensemble(spec, name),
    )
