"""Run the site until SIGTERM or Ctrl-C; what is under way then is finished."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Generator

import uvicorn
from starlette.types import ASGIApp
from tuwen_client import InvalidInput

from tuwen_web.searcher import Searcher

_FINISH_WITHIN_S = 5
_MAX_CONNECTIONS = 512


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for connections; port 0 takes a free one.

    Raises:
        InvalidInput: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        raise InvalidInput(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}") from error


async def run(app: ASGIApp, searcher: Searcher, listener: socket.socket, on_listening: Callable[[], None]) -> None:
    """Serve, and keep the searcher's collection embedded.

    Args:
        on_listening: called once connections are answered.
    Raises:
        NothingToSearch: not one picture can be embedded.
    """
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,  # it would hold what people search for
        server_header=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=_FINISH_WITHIN_S,
    )
    server = _Server(config, on_listening)
    indexing = asyncio.create_task(searcher.keep_indexed())
    indexing.add_done_callback(lambda task: server.stop())  # only an error ends it
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)
    try:
        await server.serve(sockets=[listener])
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        indexing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await indexing


class _Server(uvicorn.Server):
    """uvicorn's, but for signals: it raises them again once it has ended, which skips our own clean-up."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._on_listening()

    def stop(self) -> None:
        """Finish what is under way; asked a second time, do not."""
        self.force_exit = self.should_exit
        self.should_exit = True
