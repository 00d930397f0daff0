"""`tuwen serve`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from tuwen.cli.console import DEFAULT_REPOSITORY, Repository, stderr, stdout
from tuwen.serving.model_repository import TUNED_CONFIG

if TYPE_CHECKING:
    from tuwen.serving.supervisor import Supervisor


def serve(
    repository: Repository = DEFAULT_REPOSITORY,
    model: Annotated[list[str] | None, typer.Option("--model", help="Triton model to load; default all built.")] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option("--grpc-port")] = 8001,
    http_port: Annotated[int, typer.Option("--http-port")] = 8000,
    metrics_port: Annotated[int, typer.Option("--metrics-port")] = 8002,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", help="PEM certificate of the gRPC endpoint.")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="Its private key, PEM.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option("--tls-client-ca", help="Admit clients of this authority alone (mutual TLS).")
    ] = None,
    admin_token_file: Annotated[
        Path | None, typer.Option("--admin-token-file", help="Opens model control; else $TUWEN_ADMIN_TOKEN.")
    ] = None,
    cache_mib: Annotated[int, typer.Option("--cache-mib", min=0, help="Cache of text answers; 0: none.")] = 64,
    config_name: Annotated[
        str, typer.Option("--config-name", help="Load configs/NAME.pbtxt where a model has one.")
    ] = TUNED_CONFIG,
    restart: Annotated[bool, typer.Option("--restart/--no-restart", help="Replace what dies or hangs.")] = True,
    log_file: Annotated[
        Path | None, typer.Option("--log-file", help="Keep Triton's log here; - for standard error.")
    ] = None,
    metrics_everywhere: Annotated[
        bool, typer.Option("--metrics-everywhere", help="Metrics on all addresses, whatever --host and TLS say.")
    ] = False,
) -> None:
    """Serve what has been built with the embedded Triton, until Ctrl-C or SIGTERM; then finish what is under way."""
    from tuwen.serving.access import make_tls, new_token, read_token
    from tuwen.serving.server import EmbeddedServer
    from tuwen.serving.supervisor import Supervisor

    tls, token = make_tls(tls_cert, tls_key, tls_client_ca), read_token(admin_token_file) or new_token()

    def make_server() -> EmbeddedServer:
        return EmbeddedServer(
            repository,
            models=model,
            host=host,
            grpc_port=grpc_port,
            http_port=http_port,
            metrics_port=metrics_port,
            log_path=log_file,
            model_config_name=config_name,
            cache_size_bytes=cache_mib << 20,
            tls=tls,
            admin_token=token,
            metrics_everywhere=metrics_everywhere,
        )

    _run(Supervisor(make_server, max_repairs=None if restart else 0, on_event=_tell))


def _run(supervisor: Supervisor) -> None:
    """Until a signal: the first one lets it finish what is under way, a second one does not wait."""
    is_serving = False

    def on_signal(number: int, frame: object) -> None:
        nonlocal is_serving
        if not is_serving:
            raise KeyboardInterrupt
        is_serving = False
        supervisor.request_stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    try:
        with stderr.status("starting Triton"):
            endpoints = supervisor.start()
        is_serving = True
        stdout.print(f"gRPC     {endpoints.grpc}\nHTTP     {endpoints.http}\nmetrics  {endpoints.metrics}")
        stderr.print("ready; Ctrl-C stops it")
        supervisor.run()
        stderr.print("stopped")
    except KeyboardInterrupt:
        stderr.print("stopping")
    finally:
        supervisor.server.stop(timeout_s=0)


def _tell(sentence: str) -> None:
    stderr.print(escape(sentence), soft_wrap=True)
