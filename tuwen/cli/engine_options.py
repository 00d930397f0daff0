"""Options of the commands that embed through PyTorch, ONNX Runtime or a live server: the same flags everywhere."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tuwen_client import Tls


class EngineName(StrEnum):
    """What computes the embeddings."""

    torch = "torch"
    onnx = "onnx"
    triton = "triton"


Engine = Annotated[EngineName, typer.Option("--engine", help="What embeds: a checkpoint, its ONNX files, a server.")]
SomeCheckpoint = Annotated[
    Path | None, typer.Option("--checkpoint", help="Of --engine torch: a checkpoint folder, or an official .pt file.")
]
Device = Annotated[str, typer.Option("--device", help="Of --engine torch: cpu or cuda.")]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Of onnx and triton: the name it is served under."),
]
ModelVersion = Annotated[int | None, typer.Option("--version", help="Of --engine onnx; default: the highest.")]
Authority = Annotated[
    Path | None, typer.Option("--tls-ca", help="PEM of the authority that signed the server's certificate.")
]


def tls_of(authority: Path | None) -> Tls | None:
    """An encrypted connection where an authority is named."""
    if authority is None:
        return None
    from tuwen_client import Tls

    return Tls(ca_path=authority)
