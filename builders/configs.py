"""Triton model configurations, rendered from `tuwen.specs`: a dataclass each -> config.pbtxt text.

The text is what a person reads and reviews; the schema is Triton's own model_config.proto.
"""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from tuwen.specs import LENGTH_BUCKETS, ModelSpec

MAX_BATCH_SIZE = 32
# A request waits at most this long for company. A first choice, not yet measured.
QUEUE_DELAY_US = 1000

_HEADER = """\
# Rendered by `tuwen render` from tuwen/specs.py and builders/configs.py; `make test` fails when they differ.
# {purpose}
# {change}
"""


@dataclass(frozen=True)
class Tensor:
    name: str
    data_type: str
    dims: tuple[int, ...]
    ragged: bool = False


@dataclass(frozen=True)
class Model:
    """A single model: a Python step or a tower."""

    name: str
    backend: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    purpose: str
    change: str
    instances: int = 1
    parameters: tuple[tuple[str, str], ...] = ()
    warmup: tuple[tuple[int, ...], ...] = ()

    def to_proto(self) -> pb.ModelConfig:
        config = pb.ModelConfig(name=self.name, backend=self.backend, max_batch_size=MAX_BATCH_SIZE)
        _add_tensors(config, self.inputs, self.outputs)
        config.instance_group.add(count=self.instances, kind=pb.ModelInstanceGroup.KIND_CPU)
        config.dynamic_batching.max_queue_delay_microseconds = QUEUE_DELAY_US
        for key, value in self.parameters:
            config.parameters[key].string_value = value
        for dims in self.warmup:
            shape = "x".join(map(str, dims))
            warmup = config.model_warmup.add(name=f"zeros {shape}", batch_size=1)
            tensor = self.inputs[0]
            warmup.inputs[tensor.name].CopyFrom(
                pb.ModelWarmup.Input(data_type=f"TYPE_{tensor.data_type}", dims=dims, zero_data=True)
            )
        return config


@dataclass(frozen=True)
class Step:
    """One step of an ensemble: model, and (its tensor, the ensemble's tensor) pairs."""

    model: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Ensemble:
    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    steps: tuple[Step, ...]
    purpose: str
    change: str

    def to_proto(self) -> pb.ModelConfig:
        config = pb.ModelConfig(name=self.name, platform="ensemble", max_batch_size=MAX_BATCH_SIZE)
        _add_tensors(config, self.inputs, self.outputs)
        for step in self.steps:
            added = config.ensemble_scheduling.step.add(model_name=step.model, model_version=-1)
            added.input_map.update(dict(step.inputs))
            added.output_map.update(dict(step.outputs))
        return config


def _add_tensors(config: pb.ModelConfig, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    for tensor in inputs:
        config.input.add(
            name=tensor.name, data_type=f"TYPE_{tensor.data_type}", dims=tensor.dims, allow_ragged_batch=tensor.ragged
        )
    for tensor in outputs:
        config.output.add(name=tensor.name, data_type=f"TYPE_{tensor.data_type}", dims=tensor.dims)


def render(model: Model | Ensemble) -> str:
    """The text of a config.pbtxt, header first."""
    body = text_format.MessageToString(model.to_proto(), use_short_repeated_primitives=True, as_utf8=True)
    return _HEADER.format(purpose=model.purpose, change=model.change) + body


_TEXT = Tensor("text", "STRING", (1,))
_INPUT_IDS = Tensor("input_ids", "INT64", (-1,))
_IMAGE = Tensor("image", "UINT8", (-1,), ragged=True)
_FINGERPRINT = Tensor("fingerprint", "INT64", (1,))


def tokenize_text() -> Model:
    return Model(
        name="tokenize_text",
        backend="python",
        inputs=(_TEXT,),
        outputs=(_INPUT_IDS,),
        parameters=(("length_buckets", ",".join(map(str, LENGTH_BUCKETS))),),
        purpose="Chinese text, UTF-8 -> input_ids [L], L the first of length_buckets that holds it. For all models.",
        change="Change here: length_buckets (the towers' batches are built per length), instance_group.",
    )


def preprocess_image(resolution: int) -> Model:
    return Model(
        name=f"preprocess_image_{resolution}",
        backend="python",
        inputs=(_IMAGE,),
        outputs=(_pixel_values(resolution),),
        instances=2,
        parameters=(("resolution", str(resolution)),),
        purpose=f"An encoded picture file -> pixel_values [3, {resolution}, {resolution}], for models of this size.",
        change="Change here: instance_group, one per core that may decode at once.",
    )


def text_tower(spec: ModelSpec, name: str) -> Model:
    return Model(
        name=f"{name}_text_tower",
        backend="onnxruntime",
        inputs=(_INPUT_IDS,),
        outputs=(_embeds("text", spec), _FINGERPRINT),
        warmup=((LENGTH_BUCKETS[0],), (LENGTH_BUCKETS[-1],)),
        purpose=f"{spec.name}: input_ids -> text_embeds of unit length, and the model's fingerprint.",
        change=_TOWER_CHANGE,
    )


def image_tower(spec: ModelSpec, name: str) -> Model:
    pixel_values = _pixel_values(spec.vision.resolution)
    return Model(
        name=f"{name}_image_tower",
        backend="onnxruntime",
        inputs=(pixel_values,),
        outputs=(_embeds("image", spec), _FINGERPRINT),
        warmup=(pixel_values.dims,),
        purpose=f"{spec.name}: pixel_values -> image_embeds of unit length, and the model's fingerprint.",
        change=_TOWER_CHANGE,
    )


_TOWER_CHANGE = "Change here: instance_group, max_queue_delay_microseconds; parameters such as intra_op_thread_count."


def text_ensemble(spec: ModelSpec, name: str) -> Ensemble:
    return Ensemble(
        name=f"{name}_text",
        inputs=(_TEXT,),
        outputs=(_embeds("text", spec), _FINGERPRINT),
        steps=(
            Step("tokenize_text", (("text", "text"),), (("input_ids", "input_ids"),)),
            _tower_step(f"{name}_text_tower", "input_ids", "text_embeds"),
        ),
        purpose=f"{spec.name}: Chinese text -> text_embeds. What clients call.",
        change="Nothing to change here: an ensemble only joins its steps; tune those.",
    )


def image_ensemble(spec: ModelSpec, name: str) -> Ensemble:
    preprocess = f"preprocess_image_{spec.vision.resolution}"
    return Ensemble(
        name=f"{name}_image",
        inputs=(Tensor("image", "UINT8", (-1,)),),
        outputs=(_embeds("image", spec), _FINGERPRINT),
        steps=(
            Step(preprocess, (("image", "image"),), (("pixel_values", "pixel_values"),)),
            _tower_step(f"{name}_image_tower", "pixel_values", "image_embeds"),
        ),
        purpose=f"{spec.name}: an encoded picture file -> image_embeds. What clients call.",
        change="Nothing to change here: an ensemble only joins its steps; tune those.",
    )


def _tower_step(model: str, input_name: str, output_name: str) -> Step:
    outputs = ((output_name, output_name), ("fingerprint", "fingerprint"))
    return Step(model, ((input_name, input_name),), outputs)


def _pixel_values(resolution: int) -> Tensor:
    return Tensor("pixel_values", "FP32", (3, resolution, resolution))


def _embeds(kind: str, spec: ModelSpec) -> Tensor:
    return Tensor(f"{kind}_embeds", "FP32", (spec.embed_dim,))
