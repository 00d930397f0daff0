"""`tuwen serve`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from tuwen.cli.console import DEFAULT_REPOSITORY, Repository, stderr, stdout


def serve(
    repository: Repository = DEFAULT_REPOSITORY,
    model: Annotated[list[str] | None, typer.Option("--model", help="Triton model to load; default all built.")] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option("--grpc-port")] = 8001,
    http_port: Annotated[int, typer.Option("--http-port")] = 8000,
    metrics_port: Annotated[int, typer.Option("--metrics-port")] = 8002,
    log_file: Annotated[Path | None, typer.Option("--log-file", help="Keep Triton's log here.")] = None,
) -> None:
    """Serve what has been built with the embedded Triton, until Ctrl-C."""
    from tuwen.serving.server import EmbeddedServer

    server = EmbeddedServer(
        repository,
        models=model,
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        log_path=log_file,
    )
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with stderr.status("starting Triton"):
            endpoints = server.start()
        stdout.print(f"gRPC     {endpoints.grpc}\nHTTP     {endpoints.http}\nmetrics  {endpoints.metrics}")
        stderr.print("ready; Ctrl-C stops it")
        server.wait()
    except KeyboardInterrupt:
        stderr.print("stopping")
    finally:
        server.stop()


def _interrupt(number: int, frame: object) -> None:
    """SIGTERM ends `tuwen serve` as Ctrl-C does."""
    raise KeyboardInterrupt
