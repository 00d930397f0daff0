"""Triton model configurations, rendered from `tuwen.specs`: a dataclass each -> config.pbtxt text.

The text is what a person reads and reviews; the schema is Triton's own model_config.proto.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from tuwen.specs import CONTEXT_LENGTH, ModelSpec

MAX_BATCH_SIZE = 32
# Requests of one priority that may wait for a model; the next one is refused at once, which is what an overloaded
# server owes its clients. Two full batches: an interactive answer is at most three batches away. Four of bulk: two
# clients with their usual 64 under way; ViT-B-16 texts on two cores have left it after little more than a second.
MAX_QUEUE_SIZE = {"interactive": 2 * MAX_BATCH_SIZE, "bulk": 4 * MAX_BATCH_SIZE}
# What has waited this long is refused too, where a model is slow or hangs: nobody awaits it any more.
MAX_WAIT_S = {"interactive": 5, "bulk": 25}
_QUEUE_BOUNDS = tuple(
    (f"{name}.{priority}", str(number))
    for name, numbers in (("max_queue_size", MAX_QUEUE_SIZE), ("max_wait_s", MAX_WAIT_S))
    for priority, number in numbers.items()
)
# Of the embedded server's backend.
BATCHES_AT_ONCE = "batches_at_once"
Device = Literal["cpu", "gpu"]  # that an instance runs on
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
    optional: bool = False


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
    kind: Device = "cpu"
    parameters: tuple[tuple[str, str], ...] = ()
    warmup: tuple[tuple[int, ...], ...] = ()
    # What Triton makes of a ragged batch: (tensor, kind of batch_input). Source: its docs, Ragged Batching.
    batch_inputs: tuple[tuple[str, str], ...] = ()
    # False: a request is a batch of its own, answered by calls of other models.
    batching: bool = True

    def to_proto(self) -> pb.ModelConfig:
        config = pb.ModelConfig(name=self.name, backend=self.backend)
        config.max_batch_size = MAX_BATCH_SIZE if self.batching else 0
        _add_tensors(config, self.inputs, self.outputs)
        kind = pb.ModelInstanceGroup.Kind.Value(f"KIND_{self.kind.upper()}")
        config.instance_group.add(count=self.instances, kind=kind)
        if self.batching:
            # No delay: a lone request would wait for company in vain, and under load the queue is company enough.
            # No queue policy: see tuwen/serving/request_queue.py; the bounds are parameters.
            config.dynamic_batching.SetInParent()
        for name, kind in self.batch_inputs:
            config.batch_input.add(
                kind=kind, target_name=[name], data_type="TYPE_INT32", source_input=[self.inputs[0].name]
            )
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
    cached: bool = False

    def to_proto(self) -> pb.ModelConfig:
        config = pb.ModelConfig(name=self.name, platform="ensemble", max_batch_size=MAX_BATCH_SIZE)
        if self.cached:
            config.response_cache.enable = True
        _add_tensors(config, self.inputs, self.outputs)
        for step in self.steps:
            added = config.ensemble_scheduling.step.add(model_name=step.model, model_version=-1)
            added.input_map.update(dict(step.inputs))
            added.output_map.update(dict(step.outputs))
        return config


def _add_tensors(config: pb.ModelConfig, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    for tensor in inputs:
        config.input.add(
            name=tensor.name,
            data_type=f"TYPE_{tensor.data_type}",
            dims=tensor.dims,
            allow_ragged_batch=tensor.ragged,
            optional=tensor.optional,
        )
    for tensor in outputs:
        config.output.add(name=tensor.name, data_type=f"TYPE_{tensor.data_type}", dims=tensor.dims)


class Renderable(Protocol):
    """A model's configuration and what a person reads about it at the head of its file."""

    @property
    def name(self) -> str: ...

    @property
    def purpose(self) -> str: ...

    @property
    def change(self) -> str: ...

    def to_proto(self) -> pb.ModelConfig: ...


def render(model: Renderable) -> str:
    """The text of a config.pbtxt, header first."""
    body = text_format.MessageToString(model.to_proto(), use_short_repeated_primitives=True, as_utf8=True)
    return _HEADER.format(purpose=model.purpose, change=model.change) + body


_TEXT = Tensor("text", "STRING", (1,))
_INPUT_IDS = Tensor("input_ids", "INT64", (-1,))
_PACKED_INPUT_IDS = replace(_INPUT_IDS, ragged=True)
_IMAGE = Tensor("image", "UINT8", (-1,), ragged=True)
_FILE = replace(_IMAGE, ragged=False)
_FINGERPRINT = Tensor("fingerprint", "INT64", (1,))
_LOGIT_SCALE = Tensor("logit_scale", "FP32", (1,))
_TOKEN_COUNT = (Tensor("num_tokens", "INT64", (1,)), Tensor("truncated", "BOOL", (1,)))


def tokenize_text() -> Model:
    return Model(
        name="tokenize_text",
        backend="python",
        inputs=(_TEXT,),
        outputs=(_INPUT_IDS, *_TOKEN_COUNT),
        purpose="Chinese text, UTF-8 -> input_ids [L] without padding, L = num_tokens. For all models.",
        change="Change here: instance_group.",
    )


def preprocess_image(resolution: int) -> Model:
    return Model(
        name=f"preprocess_image_{resolution}",
        backend="python",
        inputs=(_IMAGE,),
        outputs=(_pixel_values(resolution),),
        parameters=(("resolution", str(resolution)), ("decoders", "0"), *_QUEUE_BOUNDS),
        purpose=f"An encoded picture file -> pixel_values [3, {resolution}, {resolution}], for models of this size.",
        change="Change here: decoders, how many pictures are decoded at once (0: one a core); the queue's bounds.",
    )


def guard_image(resolution: int) -> Model:
    """The step in front of `dali_preprocess`: what it lets through decodes there, and as `preprocess_image` would."""
    return replace(
        preprocess_image(resolution),
        name=f"guard_image_{resolution}",
        outputs=(_FILE,),
        purpose="An encoded picture file -> one that DALI decodes: the file itself if it is an ordinary JPEG, else a "
        f"PPM of {resolution} x {resolution}.",
    )


def dali_preprocess(resolution: int, kind: Device) -> Model:
    """`preprocess_image` by DALI, from a model.dali that was written for the same kind.

    Without the guard in front, one bad file would fail its whole batch.
    """
    return replace(
        preprocess_image(resolution),
        backend="dali",
        kind=kind,
        parameters=(("num_threads", "4"),),
        purpose=f"A guarded picture file -> pixel_values [3, {resolution}, {resolution}], by DALI from model.dali.",
        change="Change here: num_threads, DALI's own on the CPU. One instance: each holds buffers of its own.",
    )


def text_tower(spec: ModelSpec, name: str) -> Model:
    return Model(
        name=f"{name}_text_tower",
        backend="onnxruntime",
        inputs=(_PACKED_INPUT_IDS,),
        outputs=_text_tower_outputs(spec),
        # More would read the weights as often, and that is what a small batch waits for. A picture has as much to
        # compute that all threads may as well share it.
        parameters=(*_QUEUE_BOUNDS, (BATCHES_AT_ONCE, "2")),
        # The texts of a batch are laid end to end, so that nobody pays for padding.
        batch_inputs=(
            ("text_offsets", "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO"),
            ("longest_text", "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE"),
        ),
        warmup=((9,), (CONTEXT_LENGTH,)),
        purpose=f"{spec.name}: input_ids -> text_embeds of unit length, the model's fingerprint and its logit_scale.",
        change="Change here: the queue's bounds; batches_at_once (1: the weights once); instance_group; "
        "intra_op_thread_count.",
    )


def image_tower(spec: ModelSpec, name: str) -> Model:
    pixel_values = _pixel_values(spec.vision.resolution)
    return Model(
        name=f"{name}_image_tower",
        backend="onnxruntime",
        inputs=(pixel_values,),
        outputs=(_embeds("image", spec), _FINGERPRINT),
        parameters=_QUEUE_BOUNDS,
        warmup=(pixel_values.dims,),
        purpose=f"{spec.name}: pixel_values -> image_embeds of unit length, and the model's fingerprint.",
        change="Change here: the queue's bounds; instance_group, each with the weights; intra_op_thread_count.",
    )


def cached_text_ensemble(spec: ModelSpec, name: str) -> Ensemble:
    """The tower, whose answer is kept, and given again to the same token ids without computing it.

    An ensemble of one step, because Triton keeps refusals of a plain model too, as answers without outputs. Within
    another that always asks for all outputs: Triton's key leaves out which are asked for, and who asks for few would
    leave few for the next. And behind the tokeniser: a hit that is the very first step ends a request while Triton's
    gRPC front is still handing it over, and a client that then goes away takes the whole server down (all seen
    with 2.51; `python -m perf.cancellations` measures the last).
    """
    return Ensemble(
        name=f"{name}_text_cached",
        inputs=(_INPUT_IDS,),
        outputs=_text_tower_outputs(spec),
        steps=(Step(f"{name}_text_tower", _same("input_ids"), _names(_text_tower_outputs(spec))),),
        purpose=f"{spec.name}: input_ids -> text_embeds, out of the cache where they were asked before.",
        change="Change here: response_cache. A step of the ensemble that clients call.",
        cached=True,
    )


def text_ensemble(spec: ModelSpec, name: str) -> Ensemble:
    return Ensemble(
        name=f"{name}_text",
        inputs=(_TEXT,),
        outputs=(*_text_tower_outputs(spec), *_TOKEN_COUNT),
        steps=(
            Step("tokenize_text", _same("text"), _same("input_ids", "num_tokens", "truncated")),
            Step(f"{name}_text_cached", _same("input_ids"), _names(_text_tower_outputs(spec))),
        ),
        purpose=f"{spec.name}: Chinese text -> text_embeds. What clients call.",
        change="Nothing to change here: an ensemble only joins its steps; tune those.",
    )


def _text_tower_outputs(spec: ModelSpec) -> tuple[Tensor, ...]:
    return (_embeds("text", spec), _FINGERPRINT, _LOGIT_SCALE)


def image_ensemble(spec: ModelSpec, name: str) -> Ensemble:
    preprocess = f"preprocess_image_{spec.vision.resolution}"
    return Ensemble(
        name=f"{name}_image",
        inputs=(_FILE,),
        outputs=(_embeds("image", spec), _FINGERPRINT),
        steps=(
            Step(preprocess, (("image", "image"),), (("pixel_values", "pixel_values"),)),
            Step(f"{name}_image_tower", _same("pixel_values"), _same("image_embeds", "fingerprint")),
        ),
        purpose=f"{spec.name}: an encoded picture file -> image_embeds. What clients call.",
        change="Nothing to change here: an ensemble only joins its steps; tune those.",
    )


def guarded_image_ensemble(spec: ModelSpec, name: str) -> Ensemble:
    """The GPU profile's `image_ensemble`: guard, DALI, tower."""
    plain = image_ensemble(spec, name)
    guard = Step(f"guard_image_{spec.vision.resolution}", _same("image"), (("image", "guarded"),))
    preprocess, tower = plain.steps
    return replace(plain, steps=(guard, replace(preprocess, inputs=(("image", "guarded"),)), tower))


def similarity(spec: ModelSpec, name: str) -> Model:
    return _answering(
        f"{name}_similarity",
        name,
        inputs=(_IMAGES, Tensor("texts", "STRING", (-1,)), _CALIBRATION),
        outputs=(*_scores(), Tensor("cosine", "FP32", (-1, -1))),
        purpose=f"{spec.name}: a few pictures and many texts -> how well each fits each.",
    )


def zero_shot(spec: ModelSpec, name: str) -> Model:
    choices = (Tensor(each, "STRING", (-1,), optional=True) for each in ("labels", "templates", "classifier"))
    return _answering(
        f"{name}_zero_shot",
        name,
        inputs=(_IMAGES, *choices, _CALIBRATION),
        outputs=(Tensor("labels", "STRING", (-1,)), *_scores()),
        purpose=f"{spec.name}: pictures and labels, or the name of a stored classifier -> what they show.",
    )


def _answering(model: str, serves: str, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], purpose: str) -> Model:
    """A model without weights of its own, which calls the ensembles of `serves`."""
    return Model(
        name=model,
        backend="python",
        inputs=inputs,
        outputs=outputs,
        instances=2,
        batching=False,
        parameters=(("serves", serves),),
        purpose=purpose,
        change="Change here: instance_group, the requests that are answered at a time.",
    )


_IMAGES = Tensor("images", "STRING", (-1,))
_CALIBRATION = Tensor("calibration", "STRING", (1,), optional=True)


def _scores() -> tuple[Tensor, ...]:
    """One row per picture, one column per text or label; the last two where a calibration is named."""
    matrices = (Tensor(each, "FP32", (-1, -1)) for each in ("logits_per_image", "probs", "relevance"))
    return (*matrices, Tensor("no_match", "BOOL", (-1,)), _FINGERPRINT)


def _same(*names: str) -> tuple[tuple[str, str], ...]:
    """A step's tensors, called the same in the ensemble."""
    return tuple((name, name) for name in names)


def _names(tensors: tuple[Tensor, ...]) -> tuple[tuple[str, str], ...]:
    return _same(*(tensor.name for tensor in tensors))


def _pixel_values(resolution: int) -> Tensor:
    return Tensor("pixel_values", "FP32", (3, resolution, resolution))


def _embeds(kind: str, spec: ModelSpec) -> Tensor:
    return Tensor(f"{kind}_embeds", "FP32", (spec.embed_dim,))
