"""`tuwen classifier build` and `tuwen calibrate`: files that the similarity and zero-shot models read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuwen.cli.console import DEFAULT_REPOSITORY, Data, Repository, Url, progress_bar, stdout

classifier_app = typer.Typer(help="Classifiers that the zero-shot model serves by name.", no_args_is_help=True)
Model = Annotated[str | None, typer.Option("--model", help="Which model, where several are served.")]


@classifier_app.command("build")
def classifier_build(
    labels_file: Annotated[Path, typer.Argument(metavar="LABELS.txt", help="One label a line.")],
    name: Annotated[str | None, typer.Option("--name", help="Its name; default: the file's.")] = None,
    templates_file: Annotated[
        Path | None, typer.Option("--templates", help="Prompts, one a line, with {} where the label goes.")
    ] = None,
    url: Url = "localhost:8001",
    model: Model = None,
    repository: Repository = DEFAULT_REPOSITORY,
) -> None:
    """Embed labels with a running server and store them; a server of this repository serves them at once."""
    from tuwen_client import Client

    from tuwen.scoring import DEFAULT_TEMPLATES, Classifier, average_prompts, fill_templates

    labels = _lines(labels_file)
    templates = _lines(templates_file) if templates_file else list(DEFAULT_TEMPLATES)
    name = _checked_name(name or labels_file.stem)
    prompts = fill_templates(labels, templates)
    with Client(url, model) as client, progress_bar("embedding labels") as report:
        text_embeds = client.embed_text(prompts, lambda done: report(done, len(prompts)))
        classifier = Classifier(
            tuple(labels), average_prompts(text_embeds, len(labels)), client.fingerprint, tuple(templates)
        )
        path = repository / f"{client.model}_zero_shot" / "classifiers" / f"{name}.safetensors"
    classifier.save(path)
    stdout.print(f"{path}: {len(labels)} labels, {len(templates)} prompts each", soft_wrap=True)


def calibrate(
    data: Data,
    domain: Annotated[str, typer.Option("--domain", help="What to call it: shop, emoji, news.")],
    split: Annotated[str, typer.Option("--split", help="Which split of the data.")] = "valid",
    url: Url = "localhost:8001",
    model: Model = None,
    repository: Repository = DEFAULT_REPOSITORY,
) -> None:
    """Learn from pairs what a cosine means in their domain: relevance, and when nothing matches."""
    from tuwen_client import Client

    from eval.calibration import calibrate as run_calibration

    domain = _checked_name(domain)
    with Client(url, model) as client, progress_bar("embedding pictures") as report:
        calibration = run_calibration(client, data, split, report)
        path = repository / f"{client.model}_similarity" / "calibration" / f"{domain}.json"
    calibration.save(path)
    stdout.print(
        f"{path}: relevance = sigmoid({calibration.slope:.1f} * cosine {calibration.intercept:+.1f}); at "
        f"{calibration.min_relevance:g} it keeps {calibration.true_match_rate:.1%} of matching pairs and "
        f"{calibration.false_match_rate:.1%} of others",
        soft_wrap=True,
    )


def _lines(path: Path) -> list[str]:
    from tuwen.errors import InvalidInput

    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    return [line for line in lines if line]


def _checked_name(name: str) -> str:
    from tuwen.errors import InvalidInput
    from tuwen.specs import slugify

    if slugify(name) != name:
        raise InvalidInput(f"name {name!r}: expected lower-case letters, digits and underscores")
    return name
