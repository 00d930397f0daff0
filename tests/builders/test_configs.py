"""Rendered configs: true to the specs, true to Triton's schema, and true to what is committed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from builders import configs
from builders.repository import (
    REPOSITORY_DIR,
    check_contract,
    committed_files,
    drifted,
    lone_build,
    rendered_files,
    write_rendered,
)
from tuwen.errors import InvalidInput
from tuwen.specs import SPECS, ModelSpec, get_spec

VIT_B_16 = get_spec("ViT-B-16")


def models_of(spec: ModelSpec, name: str) -> list[configs.Model | configs.Ensemble]:
    return [
        configs.tokenize_text(),
        configs.preprocess_image(spec.vision.resolution),
        configs.text_tower(spec, name),
        configs.image_tower(spec, name),
        configs.cached_text_ensemble(spec, name),
        configs.text_ensemble(spec, name),
        configs.image_ensemble(spec, name),
    ]


def parsed(spec: ModelSpec, name: str) -> dict[str, pb.ModelConfig]:
    """The configs as Triton reads them, by model name."""
    found = [text_format.Parse(configs.render(model), pb.ModelConfig()) for model in models_of(spec, name)]
    return {config.name: config for config in found}


def tensors(config: pb.ModelConfig) -> dict[str, tuple[str, list[int]]]:
    """Name -> (data type, dims) of inputs and outputs."""
    both = (*config.input, *config.output)
    return {one.name: (pb.DataType.Name(one.data_type), list(one.dims)) for one in both}


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_the_text_reads_back_as_the_same_message(spec: ModelSpec) -> None:
    """Nothing is lost between the dataclasses and the file; the header is comments."""
    for model in models_of(spec, spec.slug):
        text = configs.render(model)
        assert text_format.Parse(text, pb.ModelConfig()) == model.to_proto()
        header = text.splitlines()[:3]
        assert all(line.startswith("# ") for line in header)
        assert model.purpose in header[1]
        assert all(len(line) <= 120 for line in header)
        assert "max_batch_size: 32" in text


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_names_and_dims_follow_the_spec(spec: ModelSpec) -> None:
    """The tensor contract, written out."""
    slug, side, width = spec.slug, spec.vision.resolution, spec.embed_dim
    found = {name: tensors(config) for name, config in parsed(spec, slug).items()}
    text, image = ("TYPE_STRING", [1]), ("TYPE_UINT8", [-1])
    input_ids, pixel_values = ("TYPE_INT64", [-1]), ("TYPE_FP32", [3, side, side])
    embeds, fingerprint, scale = ("TYPE_FP32", [width]), ("TYPE_INT64", [1]), ("TYPE_FP32", [1])
    of_text = {"text_embeds": embeds, "fingerprint": fingerprint, "logit_scale": scale}
    counts = {"num_tokens": ("TYPE_INT64", [1]), "truncated": ("TYPE_BOOL", [1])}
    assert found == {
        "tokenize_text": {"text": text, "input_ids": input_ids} | counts,
        f"preprocess_image_{side}": {"image": image, "pixel_values": pixel_values},
        f"{slug}_text_tower": {"input_ids": input_ids} | of_text,
        f"{slug}_image_tower": {"pixel_values": pixel_values, "image_embeds": embeds, "fingerprint": fingerprint},
        f"{slug}_text_cached": {"input_ids": input_ids} | of_text,
        f"{slug}_text": {"text": text} | of_text | counts,
        f"{slug}_image": {"image": image, "image_embeds": embeds, "fingerprint": fingerprint},
    }


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_ensembles_join_what_fits(spec: ModelSpec) -> None:
    """Each step's model exists, has the tensors it is mapped by, and both ends of a mapping agree in type and dims."""
    models = parsed(spec, spec.slug)
    ensembles = [config for config in models.values() if config.platform == "ensemble"]
    assert len(ensembles) == 3
    for ensemble in ensembles:
        wires = tensors(ensemble)
        for step in ensemble.ensemble_scheduling.step:
            model = models[step.model_name]
            for own, wire in (*step.input_map.items(), *step.output_map.items()):
                assert wires.setdefault(wire, tensors(model)[own]) == tensors(model)[own]
            assert set(step.input_map) == {one.name for one in model.input}
        produced = {wire for step in ensemble.ensemble_scheduling.step for wire in step.output_map.values()}
        assert {one.name for one in ensemble.output} <= produced


def test_the_cache_is_within_an_ensemble_that_always_asks_for_everything() -> None:
    found = parsed(VIT_B_16, "vit_b_16")
    assert [name for name, config in found.items() if config.response_cache.enable] == ["vit_b_16_text_cached"]
    tokenise, step = found["vit_b_16_text"].ensemble_scheduling.step
    assert tokenise.model_name == "tokenize_text"  # a hit must not be the first step: see cached_text_ensemble
    assert step.model_name == "vit_b_16_text_cached"
    assert set(step.output_map) == {output.name for output in found["vit_b_16_text_cached"].output}


def test_what_varies_in_size_is_ragged_where_it_is_batched() -> None:
    """Picture files in preprocessing, texts in their tower."""
    ragged = {
        (name, one.name)
        for name, config in parsed(VIT_B_16, "vit_b_16").items()
        for one in config.input
        if one.allow_ragged_batch
    }
    assert ragged == {("preprocess_image_224", "image"), ("vit_b_16_text_tower", "input_ids")}


def test_the_text_tower_is_told_where_texts_begin() -> None:
    """Triton makes the graph's other two inputs of a ragged batch."""
    made = parsed(VIT_B_16, "vit_b_16")["vit_b_16_text_tower"].batch_input
    assert [name for one in made for name in one.target_name] == ["text_offsets", "longest_text"]
    assert {source for one in made for source in one.source_input} == {"input_ids"}


def test_every_queue_that_may_grow_is_bounded() -> None:
    """In the model's own process: with a policy Triton's own queue stalls, see tuwen/serving/request_queue.py."""
    bounded = set()
    for name, config in parsed(VIT_B_16, "vit_b_16").items():
        assert not config.dynamic_batching.HasField("default_queue_policy")
        assert not config.dynamic_batching.priority_levels
        if "max_queue_size.bulk" in config.parameters:
            bounded.add(name)
            values = {key: config.parameters[key].string_value for key in config.parameters if key.startswith("max_")}
            assert values == {
                "max_queue_size.interactive": "64",
                "max_queue_size.bulk": "128",
                "max_wait_s.interactive": "5",
                "max_wait_s.bulk": "25",
            }
    assert bounded == {"preprocess_image_224", "vit_b_16_text_tower", "vit_b_16_image_tower"}


def test_towers_warm_up_with_their_own_input() -> None:
    """The shortest and the longest text, one picture."""
    models = parsed(VIT_B_16, "vit_b_16")
    for name, expected in (
        ("vit_b_16_text_tower", [[9], [52]]),
        ("vit_b_16_image_tower", [[3, 224, 224]]),
    ):
        config = models[name]
        (tensor,) = config.input
        assert [list(one.inputs[tensor.name].dims) for one in config.model_warmup] == expected
        assert all(one.inputs[tensor.name].data_type == tensor.data_type for one in config.model_warmup)
        assert all(one.batch_size == 1 for one in config.model_warmup)


def test_python_steps_get_their_settings() -> None:
    """As strings, which is what Triton hands to model.py."""
    models = parsed(VIT_B_16, "vit_b_16")
    assert models["preprocess_image_224"].parameters["resolution"].string_value == "224"
    assert {name for name, config in models.items() if config.backend == "python"} == {
        "tokenize_text",
        "preprocess_image_224",
    }


def test_the_guarded_ensemble_is_what_clients_know_with_a_step_in_front() -> None:
    """Same tensors under the same name, so that a client never sees which profile serves it."""
    plain, guarded = configs.image_ensemble(VIT_B_16, "shop"), configs.guarded_image_ensemble(VIT_B_16, "shop")
    assert (guarded.name, guarded.inputs, guarded.outputs) == (plain.name, plain.inputs, plain.outputs)
    assert [step.model for step in guarded.steps] == ["guard_image_224", "preprocess_image_224", "shop_image_tower"]
    models = {model.name: model for model in (configs.guard_image(224), configs.dali_preprocess(224, "gpu"))}
    fed = {"image"}
    for step in guarded.steps[:2]:
        config = models[step.model].to_proto()
        assert {tensor.name for tensor in config.input} == {name for name, _ in step.inputs}
        assert {tensor.name for tensor in config.output} == {name for name, _ in step.outputs}
        assert {name for _, name in step.inputs} <= fed
        fed |= {name for _, name in step.outputs}
    assert fed >= {name for _, name in guarded.steps[2].inputs}


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_dali_takes_the_place_of_the_python_step(kind: Literal["cpu", "gpu"]) -> None:
    plain, dali = configs.preprocess_image(224).to_proto(), configs.dali_preprocess(224, kind).to_proto()
    assert (dali.name, dali.input, dali.output) == (plain.name, plain.input, plain.output)
    assert dali.backend == "dali"
    assert dali.input[0].allow_ragged_batch
    assert [pb.ModelInstanceGroup.Kind.Name(group.kind) for group in dali.instance_group] == [f"KIND_{kind.upper()}"]


def test_another_name_shares_what_is_shared() -> None:
    """A custom name renames towers and ensembles; tokeniser and preprocessing keep theirs."""
    files = rendered_files(VIT_B_16, "shop")
    assert {path.parts[0] for path in files} == {
        "tokenize_text", "preprocess_image_224", "guard_image_224", "shop_text", "shop_image", "shop_text_tower",
        "shop_image_tower", "shop_text_cached", "shop_similarity", "shop_zero_shot",
    }  # fmt: skip
    assert not [text for path, text in files.items() if path.name == "config.pbtxt" and "vit_b_16" in text]


@pytest.mark.parametrize("name", ["ViT-B-16", "图文", "a/b", "../up", "9lives", "two words", "trailing_", "_a", "a__b"])
def test_a_bad_served_name_is_refused(name: str) -> None:
    """It becomes a folder and a model name."""
    with pytest.raises(InvalidInput, match=r"(served|model) name .*expected"):
        rendered_files(VIT_B_16, name)


# --- what is committed --------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of what is committed, without artifacts."""
    target = tmp_path / "model_repository"
    write_rendered(committed_files(), target, overwrite=True)
    return target


def test_the_committed_files_do_not_differ() -> None:
    """`tuwen render` was run after the last change of specs or configs."""
    assert drifted(committed_files(), REPOSITORY_DIR) == []


def test_the_committed_files_are_complete() -> None:
    """Shared models, the reference and the sample; an empty version folder is kept where there is no model.py."""
    files = set(committed_files())
    for slug in ("vit_b_16", "tiny_rn"):
        for model in ("text", "image", "text_tower", "image_tower"):
            assert {Path(f"{slug}_{model}", "config.pbtxt"), Path(f"{slug}_{model}", "1", ".gitkeep")} <= files
    assert {Path(f"preprocess_image_{side}", "1", "model.py") for side in (224, 64)} <= files


def test_rendering_writes_what_is_committed(repository: Path) -> None:
    """Byte for byte, LF and UTF-8; a second time there is nothing to write."""
    for path in committed_files():
        assert (repository / path).read_bytes() == (REPOSITORY_DIR / path).read_bytes()
    assert write_rendered(committed_files(), repository, overwrite=True) == []


@pytest.mark.parametrize(
    "path",
    [Path("tokenize_text/config.pbtxt"), Path("preprocess_image_64/1/model.py"), Path("tiny_rn_text/1/.gitkeep")],
    ids=str,
)
def test_drift_is_noticed(repository: Path, path: Path) -> None:
    """A changed file and a missing one are named; rendering puts them right."""
    assert drifted(committed_files(), repository) == []
    with open(repository / path, "a", encoding="utf-8") as file:
        file.write("# tuned\n")
    assert drifted(committed_files(), repository) == [path]
    (repository / path).unlink()
    assert drifted(committed_files(), repository) == [path]
    assert write_rendered(committed_files(), repository, overwrite=True) == [path]
    assert drifted(committed_files(), repository) == []


def test_a_config_tuned_by_hand_survives_a_build(repository: Path) -> None:
    """Without overwrite only what is missing is written; with it, all is as rendered."""
    tuned, missing = Path("vit_b_16_text_tower/config.pbtxt"), Path("vit_b_16_image_tower/config.pbtxt")
    text = (repository / tuned).read_text(encoding="utf-8").replace("count: 1", "count: 4")
    assert "count: 4" in text
    (repository / tuned).write_text(text, encoding="utf-8")
    (repository / missing).unlink()
    assert write_rendered(committed_files(), repository, overwrite=False) == [missing]
    assert (repository / tuned).read_text(encoding="utf-8") == text
    check_contract(committed_files(), repository)
    assert write_rendered(committed_files(), repository, overwrite=True) == [tuned]


def test_a_name_is_kept_to_one_contract(repository: Path) -> None:
    """Towers of other shapes under the configs of ViT-B-16 would not load; the sentence names both and the way out."""
    check_contract(rendered_files(VIT_B_16, "vit_b_16"), repository)
    with pytest.raises(
        InvalidInput,
        match=r"vit_b_16_text_tower/config\.pbtxt: .*TYPE_FP32\[512\].* needs .*TYPE_FP32\[768\].*another --name$",
    ):
        check_contract(rendered_files(get_spec("ViT-L-14"), "vit_b_16"), repository)
    with pytest.raises(InvalidInput, match=r"image_tower/config\.pbtxt: .*\[3, 224, 224\].* needs .*\[3, 336, 336\]"):
        check_contract(rendered_files(VIT_B_16.with_resolution(336), "vit_b_16"), repository)


def test_a_broken_config_is_named(repository: Path) -> None:
    """Instead of a build whose server does not start."""
    (repository / "tokenize_text" / "config.pbtxt").write_text("name: tokenize_text\n", encoding="utf-8")
    with pytest.raises(InvalidInput, match=r"tokenize_text/config\.pbtxt: no Triton model config: "):
        check_contract(committed_files(), repository)


def test_a_fresh_repository_gets_everything(tmp_path: Path) -> None:
    """Folders included."""
    files = rendered_files(VIT_B_16, "vit_b_16")
    assert write_rendered(files, tmp_path / "new" / "repository", overwrite=False) == list(files)


def test_builds_of_one_repository_wait_for_each_other(tmp_path: Path) -> None:
    order: list[str] = []
    waits = threading.Event()

    def second() -> None:
        with lone_build(tmp_path, on_wait=waits.set):
            order.append("second")

    with lone_build(tmp_path, on_wait=lambda: order.append("waited for nobody")):
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
