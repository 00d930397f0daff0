"""The command line's manners: stdout is the result, an error is one line on stderr, and the exit status tells."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import SMALL_SPECS, random_model
from tests.shapes import shape_pairs, write_pairs
from tuwen import cli
from tuwen.checkpoint import save_checkpoint
from tuwen.errors import InvalidInput

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "data",
    "train",
    "eval",
    "features",
    "build",
    "render",
    "serve",
    "search",
    "web",
    "classifier",
    "calibrate",
    "bench",
)
Main = Callable[..., tuple[int, str, str]]


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`tuwen ...` as a process of its own, without a terminal, and wide enough that no line of help is wrapped."""
    inherited = os.environ.get("PYTHONPATH", "")
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{inherited}",
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "tuwen.cli", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
        cwd=cwd,
        env=environment,
    )


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Main]:
    """Call main() with arguments -> (exit status, stdout, stderr): the same way in, without a second Python."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tuwen", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    yield call
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def evaluable(tmp_path: Path) -> list[str]:
    """Arguments of an evaluation that works."""
    save_checkpoint(random_model(SMALL_SPECS["vit"]), tmp_path / "model")
    write_pairs(tmp_path / "data", "valid", shape_pairs())
    return ["eval", "retrieval", "--checkpoint", str(tmp_path / "model"), "--data", str(tmp_path / "data")]


def test_help_lists_the_commands() -> None:
    """On stdout, each with a line; exit 0."""
    ended = run("--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    for command in COMMANDS:
        assert [line for line in ended.stdout.splitlines() if line.strip("│ ").startswith(f"{command} ")], command


@pytest.mark.parametrize(
    "command",
    [
        *COMMANDS,
        "data emoji",
        "data lmdb",
        "data shards",
        "data check",
        "eval retrieval",
        "eval compare",
        "bench run",
        "bench compare",
        "bench towers",
    ],
)
def test_every_command_has_help(in_process: Main, command: str) -> None:
    """-h as --help, without importing what the command needs to run."""
    status, out, err = in_process(*command.split(), "-h")
    assert (status, err) == (0, "")
    assert f"{command} [OPTIONS]" in out


def test_help_is_quick_to_import() -> None:
    """A command's packages are imported when it runs: help needs neither torch nor onnx nor tritonclient."""
    heavy = (
        "torch",
        "onnx",
        "onnxruntime",
        "tritonclient",
        "numpy",
        "training",
        "builders",
        "eval",
        "perf",
        "starlette",
    )
    code = f"import sys, tuwen.cli; print([name for name in {heavy} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ended.stdout == "[]\n"


# --- exit 1: it failed, and one sentence says why -------------------------------------------------------------------


def test_an_error_is_one_line_on_stderr(tmp_path: Path) -> None:
    """No traceback, nothing on stdout, exit 1; a long line is not wrapped where there is no terminal."""
    path = tmp_path / ("long" * 50) / "recipe.toml"
    ended = run("train", str(path))
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr == f"error: {path}: there is no such recipe\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("eval retrieval --checkpoint nowhere --data nowhere", "nowhere: there is no such checkpoint"),
        ("eval retrieval --engine onnx --repository nowhere --data x", "nowhere: no built model in it; `tuwen build"),
        ("eval compare torch:nowhere onnx:nowhere --data nowhere", "nowhere: there is no such checkpoint"),
        ("eval compare here there --data nowhere", "engine 'here': expected torch:CHECKPOINT, onnx:REPOSITORY"),
        ("build --checkpoint nowhere --repository served", "nowhere: there is no such checkpoint"),
        ("build --checkpoint nowhere --repository served --version 0", "version 0: expected 1 or more"),
        (
            "build --checkpoint nowhere --precision fp16",
            "--precision fp16: a CPU model is fp32 or int8; for others give",
        ),
        ("build --checkpoint nowhere --profile gpu --tune", "--tune measures the CPU model: leave it out, or take"),
        ("build --checkpoint nowhere --hardware-compatible", "--version-compatible and --hardware-compatible are of"),
        ("build --checkpoint nowhere --repository served --profile gpu", "nowhere: there is no such checkpoint"),
        ("render --check --repository nowhere", "nowhere: tokenize_text/config.pbtxt, "),
        ("data lmdb --data nowhere", "nowhere: no *_imgs.tsv in it"),
        ("data check --data nowhere", "nowhere: there is no such folder of pairs"),
        ("data shards --data nowhere --out shards", "nowhere: there is no such folder of pairs"),
        ("train .", ".: cannot be read: Is a directory"),
        ("bench run nowhere.toml --serve", "nowhere.toml: there is no such scenario; those kept are image, mixed"),
        ("bench compare nowhere nowhere", "nowhere: there is no such summary; `tuwen bench run` writes one"),
        ("bench towers --checkpoint nowhere", "nowhere: there is no such checkpoint"),
        ("web --images nowhere", "nowhere: there is no such folder"),
        ("features --data nowhere --out out", "the torch engine needs a checkpoint: --checkpoint DIR"),
        ("features --data nowhere --out out --checkpoint nowhere", "nowhere: there is no such checkpoint"),
        ("bench towers", "give one of --checkpoint and --architecture"),
        ("bench towers --architecture Tiny-RN --batch 1;2", "--batch 1;2: expected whole numbers with commas between"),
    ],
)
def test_what_cannot_be_used_is_named(
    in_process: Main, arguments: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every command, in the same form, leaving nothing behind."""
    monkeypatch.chdir(tmp_path)
    status, out, err = in_process(*arguments.split())
    assert (status, out) == (1, "")
    assert err.startswith(f"error: {reason}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_brackets_in_an_error_are_printed_as_they_are(in_process: Main) -> None:
    """Rich would take them for colours and drop them."""
    for name in ("[red]x[/red].toml", r"back\[slash].toml", "[/].toml"):
        status, _, err = in_process("train", name)
        assert (status, err) == (1, f"error: {name}: there is no such recipe\n")


def test_a_clients_error_is_ours_too(in_process: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a base class of its own; any other exception is a bug and keeps its traceback."""
    from tuwen_client import errors

    def raises(error: Exception) -> None:
        def app() -> None:
            raise error

        monkeypatch.setattr(cli, "app", app)

    for error in (errors.ServerUnavailable("nobody there"), InvalidInput("no such thing")):
        raises(error)
        assert in_process("search") == (1, "", f"error: {error}\n")
    raises(KeyError("a bug"))
    with pytest.raises(KeyError, match="a bug"):
        cli.main()


# --- exit 2: wrong usage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    ["retrain", "train", "train a b", "eval retrieval --data x", "render --chek", "build --checkpoint x --version two"],
)
def test_wrong_usage_exits_2(in_process: Main, arguments: str) -> None:
    """With the usage on stderr and nothing on stdout."""
    status, out, err = in_process(*arguments.split())
    assert (status, out) == (2, "")
    assert "Usage:" in err


def test_wrong_usage_exits_2_as_a_process() -> None:
    """The status a shell sees."""
    ended = run("render", "--chek")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "--chek" in ended.stderr


# --- results --------------------------------------------------------------------------------------------------------


def test_json_is_all_there_is_on_stdout(evaluable: list[str]) -> None:
    """The whole of stdout is one JSON object; the progress bar is not in it."""
    ended = run(*evaluable, "--json")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("\n") == 1
    result = json.loads(ended.stdout)
    assert (result["architecture"], result["num_images"]) == ("Small-ViT", 20)
    assert result["text_to_image"]["num_queries"] == 25
    assert 0 <= result["text_to_image"]["r1"] <= result["text_to_image"]["r10"] <= 1


def test_without_json_the_figures_are_a_table(evaluable: list[str]) -> None:
    """Both directions, as percentages."""
    ended = run(*evaluable)
    assert ended.returncode == 0, ended.stderr
    rows = [line for line in ended.stdout.splitlines() if "text to image" in line or "image to text" in line]
    assert [row.count("%") for row in rows] == [4, 4]


def test_a_server_that_is_not_there_ends_an_evaluation(evaluable: list[str], in_process: Main) -> None:
    """With the client's sentence."""
    status, out, err = in_process("eval", "retrieval", "--engine", "triton", "--url", "127.0.0.1:1", *evaluable[-2:])
    assert (status, out) == (1, "")
    assert err.startswith("error: no server answers")


def test_a_report_is_written_beside_the_figures(evaluable: list[str], tmp_path: Path, in_process: Main) -> None:
    """stdout stays the result."""
    status, out, err = in_process(*evaluable, "--json", "--report", str(tmp_path / "report.html"))
    assert (status, json.loads(out)["engine"]) == (0, "torch")
    assert "report.html shows the worst retrievals" in err
    assert "<title>Retrieval: Small-ViT" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_broken_picture_ends_an_evaluation_with_its_id(evaluable: list[str], in_process: Main) -> None:
    """One line, also out of the middle of a progress bar."""
    pairs = shape_pairs()
    pairs.images[107] = b"no picture"
    write_pairs(Path(evaluable[-1]), "valid", pairs)
    status, out, err = in_process(*evaluable, "--json")
    assert (status, out) == (1, "")
    assert [line for line in err.splitlines() if line.startswith("error: picture 107: image is not")]


def test_the_checkout_is_rendered() -> None:
    """`tuwen render --check`, as `make lint` runs it."""
    ended = run("render", "--check")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_rendering_tells_what_it_wrote(in_process: Main, tmp_path: Path) -> None:
    """Each file once; afterwards --check is content, until one is changed."""
    repository = str(tmp_path / "served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")
        status, out, _ = in_process("render", "--repository", repository)
    assert status == 0
    written = [Path(line) for line in out.split()]
    assert len(written) == len(set(written)) > 10
    assert all(path.is_file() for path in written)
    assert in_process("render", "--check", "--repository", repository) == (0, "", "")
    written[0].write_text("# tuned\n", encoding="utf-8")
    status, _, err = in_process("render", "--check", "--repository", repository)
    assert status == 1
    assert str(written[0].relative_to(repository)) in err
    assert "run `tuwen render`" in err


def test_training_prints_its_folder(in_process: Main, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From a recipe file to a checkpoint that `tuwen eval` takes; of 2 steps, fewer than the default warm-up."""
    for split in ("train", "valid"):
        write_pairs(tmp_path / "data", split, shape_pairs())
    recipe = f"""
    [model]
    architecture = "Tiny-ViT"
    [data]
    path = "{tmp_path}/data"
    [optim]
    epochs = 1
    batch_size = 10
    lr = 1e-3
    [run]
    out = "{tmp_path}/run"
    """
    (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
    status, out, _ = in_process("train", str(tmp_path / "recipe.toml"))
    assert (status, out.replace("\n", "")) == (0, f"{tmp_path}/run")
    status, out, _ = in_process(
        "eval", "retrieval", "--checkpoint", f"{tmp_path}/run", "--data", f"{tmp_path}/data", "--json"
    )
    assert (status, json.loads(out)["architecture"]) == (0, "Tiny-ViT")
    assert "optim.warmup_steps is 500 and the run has 2 steps" in caplog.text
    # What is finished stays as it is.
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    status, out, _ = in_process("train", str(tmp_path / "recipe.toml"))
    assert (status, out.replace("\n", "")) == (0, f"{tmp_path}/run")
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_cannot_be_where_a_file_is(in_process: Main, tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write_pairs(tmp_path, split, shape_pairs())
    recipe = f"""
    model.architecture = "Tiny-ViT"
    data.path = "{tmp_path}"
    optim = {{epochs = 1, batch_size = 10}}
    run.out = "{tmp_path}/recipe.toml"
    """
    (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
    status, _, err = in_process("train", str(tmp_path / "recipe.toml"))
    assert status == 1
    assert "recipe.toml: cannot be a folder: File exists" in err.replace("\n", " ")
