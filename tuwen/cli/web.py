"""`tuwen web`."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuwen.cli.console import DEFAULT_REPOSITORY, Repository, Url, progress_bar, stderr
from tuwen.cli.search import captions_of, embedded_server, gallery
from tuwen.errors import MissingDependency

if TYPE_CHECKING:
    from tuwen_web.indexing import Collection, ProgressHook
    from tuwen_web.searcher import Searcher


def web(
    images: Annotated[Path, typer.Option("--images", help="Folder of pictures, or an *_imgs.tsv.")],
    url: Url = "localhost:8001",
    start_server: Annotated[bool, typer.Option("--serve", help="Start the embedded server for this page.")] = False,
    repository: Repository = DEFAULT_REPOSITORY,
    model: Annotated[str | None, typer.Option("--model", help="Which model, where several are served.")] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8080,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="Host name that browsers may come by; may be repeated.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Folder that keeps the vectors; default ~/.cache/tuwen/web.")
    ] = None,
    example: Annotated[
        list[str] | None, typer.Option("--example", help="Query to offer in place of the usual ones; may be repeated.")
    ] = None,
) -> None:
    """A page where a Chinese phrase or a picture finds pictures, until Ctrl-C or SIGTERM."""
    try:
        from tuwen_web.app import make_app
        from tuwen_web.guard import allowed_hosts
        from tuwen_web.pages import EXAMPLES
        from tuwen_web.server import listen, run
    except ImportError as error:
        reason = f"{error.name or error} is not installed"
        raise MissingDependency(f"{reason}: pip install ./clients/python ./clients/web") from None

    def serve(url: str, listener: socket.socket) -> None:
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}"

        async def until_stopped() -> None:
            searcher = _searcher(collection, url, model, _vectors_path(cache, images))
            app = make_app(searcher, allowed_hosts(host, allow_host or []), example or EXAMPLES)
            await run(app, searcher, listener, lambda: print(address, flush=True))

        asyncio.run(until_stopped())

    collection = _collection(images)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the server has its own: what was begun is ended
    try:
        with listen(host, port) as listener, embedded_server(repository) if start_server else nullcontext() as started:
            serve(started.grpc if started else url, listener)
    except KeyboardInterrupt:
        pass
    stderr.print("stopped")


def _collection(images: Path) -> Collection:
    from tuwen_web.indexing import Collection

    return Collection(gallery(images), list(dict.fromkeys(captions_of(images).values())))


def _searcher(collection: Collection, url: str, model: str | None, vectors_path: Path) -> Searcher:
    from tuwen_client import AsyncClient
    from tuwen_web.searcher import Searcher
    from tuwen_web.store import VectorStore

    def make_client() -> AsyncClient:
        return AsyncClient(url, model)

    return Searcher(collection, make_client, VectorStore(vectors_path), _bar)


def _bar() -> AbstractContextManager[ProgressHook]:
    return progress_bar("embedding pictures")


def _vectors_path(cache: Path | None, images: Path) -> Path:
    """One file for each collection."""
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "tuwen" / "web"
    digest = hashlib.blake2b(os.fsencode(images.resolve()), digest_size=6).hexdigest()
    return cache / f"{images.stem}-{digest}.npz"
