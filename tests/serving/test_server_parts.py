"""What the embedded server's parts say without a server: its log explained, what is built, what is not installed."""

import json
import sys
from pathlib import Path

import pytest

from tuwen.errors import InvalidInput, MissingDependency
from tuwen.serving import installation
from tuwen.serving.model_repository import built_models, missing_files
from tuwen.serving.server_log import explain_failed_start, last_meaningful_line

CUDA_LINES = """\
W1124 01:46:34.747309 3971 pinned_memory_manager.cc:273] "Unable to allocate pinned system memory, pinned memory pool \
will not be available: CUDA driver version is insufficient for CUDA runtime version"
I1124 01:46:34.747414 3971 cuda_memory_manager.cc:117] "CUDA memory pool disabled"
E1124 01:46:34.747503 3971 server.cc:241] "CudaDriverHelper has not been initialized."
E1124 01:46:36.637636 3971 ensemble_scheduler.cc:1468] "unable to create stream for ens: CUDA driver version is \
insufficient for CUDA runtime version"
Error: Failed to initialize NVML
W1124 01:46:36.639180 3971 metrics.cc:798] "DCGM unable to start: DCGM initialization error"
"""


def logged(message: str) -> str:
    return f"E1124 01:49:16.194723 4754 model_lifecycle.cc:642] {json.dumps(message, ensure_ascii=False)}"


# Every message is 2.51's own, shortened.
@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (
            [
                r"""E1124 01:49:16.194723 4754 model_lifecycle.cc:642] "failed to load 'pre' version 1: Internal: """
                r"""ValueError: 词表 \"v\" 空\n\nAt:\n  /v/site-packages/x.py(1): f\n  /r/pre/1/model.py(1): g\n" """
            ],
            """model pre does not load: ValueError: 词表 "v" 空 (/r/pre/1/model.py, line 1)""",
        ),
        (
            [
                logged(
                    "failed to load 'a' version 1: Internal: TritonModelException: /r/a/1/model.onnx does not exist"
                    "\n\nAt:\n  /b/onnxruntime/model.py(13): initialize\n"
                ),
                logged("failed to load 'b' version 1: Invalid argument: unable to find backend library for 'tensorrt'"),
            ],
            "model a does not load: /r/a/1/model.onnx does not exist; nor does b",
        ),
        (
            [
                "[libprotobuf ERROR /tmp/text_format.cc:337] Error parsing text-format inference.ModelConfig: 7:14: "
                'Message type "inference.ModelConfig" has no field named "max_batchsize".',
                logged("Poll failed for model directory 'a': failed to read text proto from /r/a/config.pbtxt"),
            ],
            "model a does not load: cannot read /r/a/config.pbtxt, line 7, column 14: "
            'Message type "inference.ModelConfig" has no field named "max_batchsize".',
        ),
        (
            [logged("failed to load 'pre' version 1: Internal: Stub process 'pre_0_0' is not healthy.")],
            "model pre does not load: its Python process died while loading",
        ),
        (
            [
                "/b/python/triton_python_backend_stub: error while loading shared libraries: libpython3.11.so.1.0",
                logged("failed to load 'pre' version 1: Internal: Stub process 'pre_0_0' is not healthy."),
            ],
            "model pre does not load: its Python process died while loading (libpython3.11.so.1.0)",
        ),
        (
            [logged("failed to load model 'a': at least one version must be available under the version policy")],
            "model a does not load: at least one version must be available under the version policy",
        ),
        (
            [
                "error: creating server: Invalid argument - load failed for model 'ens': in ensemble ens, ensemble "
                "tensor y: inconsistent shape: [-1,3] is inferred from model ens while [-1,5] from model tower"
            ],
            "model ens does not load: in ensemble ens, ensemble "
            "tensor y: inconsistent shape: [-1,3] is inferred from model ens while [-1,5] from model tower",
        ),
        (
            [logged("failed to start HTTP service: Unavailable - Socket '127.0.0.1:8000' already in use ")],
            "127.0.0.1:8000 is taken, so the HTTP service cannot listen there",
        ),
        ([], None),
    ],
)
def test_a_failed_start_is_one_sentence(lines: list[str], sentence: str | None) -> None:
    assert explain_failed_start(CUDA_LINES + "\n".join(line.rstrip() for line in lines)) == sentence


def test_the_last_line_is_never_a_harmless_one() -> None:
    line = """I1124 01:46:36.637687 3971 model_lifecycle.cc:839] "successfully loaded 'ens'"\n"""
    assert last_meaningful_line(line + CUDA_LINES + "+---+\n| a |\n\n") == "successfully loaded 'ens'"
    assert last_meaningful_line(CUDA_LINES) is None


def write_repository(path: Path) -> None:
    steps = 'step [ { model_name: "words" model_version: -1 }, { model_name: "tower" model_version: -1 } ]'
    for name, config, artifact in [
        ("words", 'backend: "python"', "1/model.py"),
        ("tower", 'backend: "onnxruntime"', "3/model.onnx"),
        ("pair", f'platform: "ensemble" ensemble_scheduling {{ {steps} }}', "1/.gitkeep"),
        ("outer", 'ensemble_scheduling { step [ { model_name: "pair" model_version: -1 } ] }', "1/.gitkeep"),
        ("broken", 'ensemble_scheduling { step [ { model_name: "absent" model_version: -1 } ] }', "1/.gitkeep"),
    ]:
        artifact_path = path / name / artifact
        artifact_path.parent.mkdir(parents=True)
        artifact_path.touch()
        (path / name / "config.pbtxt").write_text(f'name: "{name}" {config}')


def test_an_ensemble_is_built_when_every_part_has_its_file(tmp_path: Path) -> None:
    pytest.importorskip("tritonclient.grpc")
    write_repository(tmp_path)
    assert built_models(tmp_path) == ["outer"], "pair is a step of it, which clients do not call"
    assert missing_files(tmp_path, "broken") == [tmp_path / "absent" / "config.pbtxt"]
    (tmp_path / "tower" / "3" / "model.onnx").unlink()
    assert built_models(tmp_path) == []
    assert missing_files(tmp_path, "outer") == [tmp_path / "tower" / "1" / "model.onnx"]


def test_a_profile_names_its_own_files(tmp_path: Path) -> None:
    pytest.importorskip("tritonclient.grpc")
    write_repository(tmp_path)
    profile_path = tmp_path / "tower" / "configs" / "gpu.pbtxt"
    profile_path.parent.mkdir()
    profile_path.write_text('backend: "tensorrt" cc_model_filenames { key: "8.9" value: "sm89.plan" }')
    assert built_models(tmp_path, model_config_name="gpu") == []
    (tmp_path / "tower" / "3" / "sm89.plan").touch()
    assert built_models(tmp_path, model_config_name="gpu") == ["outer"]
    profile_path.write_text("max_batchsize: 3")
    with pytest.raises(InvalidInput, match=r"configs/gpu.pbtxt: not a model configuration: .*max_batchsize"):
        built_models(tmp_path, model_config_name="gpu")


@pytest.mark.parametrize(
    ("target", "name", "value", "sentence"),
    [
        (
            "importlib.util",
            "find_spec",
            lambda name: None,
            r"needs nvidia-pytriton: pip install 'tuwen\[serve\]'$",
        ),
        (
            "os",
            "confstr",
            lambda name: "glibc 2.31",
            r"needs Linux with glibc 2.35, this is linux with glibc 2.31: run it on",
        ),
        ("os", "confstr", lambda name: None, r"this is linux with another C library: run it on such a machine"),
        (
            "importlib.metadata",
            "version",
            lambda name: "2.4.1",
            r"needs numpy below 2, found 2.4.1: pip install 'numpy<2'",
        ),
        (
            "",
            "_PYTHON_VERSION",
            "3.99",
            r"this Python is 3.99, nvidia-pytriton serves 3.8, 3.9, .*3.13: use one of these",
        ),
        ("", "_python_library_dirs", list, r"this Python has no libpython3.\d+.so.1.0, which .* need: install it"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the platform's sentence comes first")
def test_what_is_not_there_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, target: str, name: str, value: object, sentence: str
) -> None:
    pytest.importorskip("pytriton", reason="needs pip install 'tuwen[serve]'")
    monkeypatch.setattr(installation.ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(f"{target or installation.__name__}.{name}", value)
    with pytest.raises(MissingDependency, match=sentence):
        installation.find_installation()
