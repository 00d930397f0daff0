"""`tuwen ...`: one Typer app. A command is a thin call into a package, imported when the command runs.

stdout is the result, stderr the log and the progress. Exit 0 done, 1 failed with one sentence, 2 wrong usage.
"""

from __future__ import annotations

import logging
import sys

import typer
from rich.logging import RichHandler
from rich.markup import escape

from tuwen.cli.answers import calibrate, classifier_app
from tuwen.cli.bench import bench_app
from tuwen.cli.console import stderr
from tuwen.cli.data import data_app
from tuwen.cli.eval_files import add_file_commands
from tuwen.cli.eval_zero_shot import eval_zero_shot
from tuwen.cli.evaluation import eval_app
from tuwen.cli.export import export_app
from tuwen.cli.features import features
from tuwen.cli.gallery import export_gallery
from tuwen.cli.model import build, render
from tuwen.cli.search import search
from tuwen.cli.serving import serve
from tuwen.cli.training import teacher_features, train
from tuwen.cli.web import web

app = typer.Typer(
    help="图文 Tuwen: train, evaluate, build and serve Chinese-CLIP.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.command()(train)
eval_app.command("zero-shot")(eval_zero_shot)
add_file_commands(eval_app)
app.add_typer(eval_app, name="eval")
app.add_typer(classifier_app, name="classifier")
app.add_typer(bench_app, name="bench")
export_app.command("gallery")(export_gallery)
app.add_typer(export_app, name="export")
for command in (teacher_features, features, build, render, serve, search, web, calibrate):
    app.command()(command)


def main() -> None:
    """Entry point: our own errors become one sentence; anything else is a bug and keeps its traceback."""
    handler = RichHandler(console=stderr, show_time=False, show_level=False, show_path=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    for chatty in ("httpx", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        app()
    except Exception as error:
        if not _is_ours(error):
            raise
        stderr.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)


def _is_ours(error: Exception) -> bool:
    """The library's errors, and the client's, which has a base class of its own and the same name."""
    return any(base.__name__ == "TuwenError" for base in type(error).__mro__)
