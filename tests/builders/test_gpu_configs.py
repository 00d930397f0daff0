"""configs/gpu.pbtxt against config.pbtxt: another backend, the same contract."""

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from builders.configs import MAX_BATCH_SIZE
from builders.repository import rendered_files, write_rendered
from builders.tensorrt_plan import COMPUTE_CAPABILITIES, ComputeCapability
from tuwen.serving.model_repository import built_models
from tuwen.specs import CONTEXT_LENGTH, SPECS, get_spec

TOWERS = ("m_text_tower", "m_image_tower")


def read(files: dict[Path, str], *parts: str) -> pb.ModelConfig:
    return text_format.Parse(files[Path(*parts)], pb.ModelConfig())


@pytest.mark.parametrize("architecture", SPECS)
@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_has_the_same_contract_on_a_gpu(architecture: str, tower: str) -> None:
    files = rendered_files(get_spec(architecture), "m")
    on_cpu, on_gpu = read(files, tower, "config.pbtxt"), read(files, tower, "configs", "gpu.pbtxt")
    for field in ("name", "max_batch_size", "input", "output", "batch_input", "dynamic_batching", "model_warmup"):
        assert getattr(on_gpu, field) == getattr(on_cpu, field), field
    assert on_gpu.backend == "tensorrt"
    assert [group.kind for group in on_gpu.instance_group] == [pb.ModelInstanceGroup.KIND_GPU]
    # A queue with bounds of Triton's own may stand still for 500 ms.
    assert not on_gpu.dynamic_batching.HasField("default_queue_policy")


def test_graphs_of_lone_texts_name_the_full_shape_of_every_input() -> None:
    files = rendered_files(get_spec("ViT-B-16"), "m")
    config = read(files, "m_text_tower", "configs", "gpu.pbtxt")
    inputs = {tensor.name for tensor in config.input} | {each.target_name[0] for each in config.batch_input}
    graphs = config.optimization.cuda.graph_spec
    assert {graph.batch_size for graph in graphs} == {1}
    for graph in graphs:
        dims = {name: list(shape.dim) for name, shape in graph.input.items()}
        (length,) = dims["input_ids"]
        assert dims == {"input_ids": [length], "text_offsets": [2], "longest_text": [length]}
        assert set(dims) == inputs
        assert 3 <= length <= CONTEXT_LENGTH
        assert not graph.HasField("graph_lower_bound")


def test_graphs_of_pictures_are_of_batches_that_are_allowed() -> None:
    config = read(rendered_files(get_spec("RN50"), "m"), "m_image_tower", "configs", "gpu.pbtxt")
    batches = [graph.batch_size for graph in config.optimization.cuda.graph_spec]
    assert batches == sorted(set(batches))
    assert batches[0] == 1
    assert batches[-1] == MAX_BATCH_SIZE


def test_the_profile_is_built_when_a_plan_of_any_gpu_is_there(tmp_path: Path) -> None:
    write_rendered(rendered_files(get_spec("Tiny-RN"), "m"), tmp_path, overwrite=True)
    for path in ("tokenize_text", *(f"{tower}" for tower in TOWERS)):
        (tmp_path / path / "1").mkdir(exist_ok=True)
    (tmp_path / "tokenize_text" / "1" / "model.py").touch()
    assert "m_text" not in built_models(tmp_path, model_config_name="gpu")
    (tmp_path / "m_text_tower" / "1" / ComputeCapability(8, 6).plan_name).touch()
    assert "m_text" in built_models(tmp_path, model_config_name="gpu")
    assert "m_text" not in built_models(tmp_path)  # without the profile it is the ONNX file that counts


def test_a_plan_is_named_for_its_gpu() -> None:
    config = read(rendered_files(get_spec("Tiny-RN"), "m"), "m_image_tower", "configs", "gpu.pbtxt")
    assert dict(config.cc_model_filenames).items() >= {"8.6": "model_sm86.plan", "12.0": "model_sm120.plan"}.items()
    assert len(set(config.cc_model_filenames.values())) == len(COMPUTE_CAPABILITIES)
