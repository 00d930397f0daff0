"""How the asyncio twin waits: for requests that end, for retries that are due, and for items of an async iterable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from typing import Any, TypeVar

from tuwen_client.calls import Call
from tuwen_client.core import Flight, Sent, now
from tuwen_client.sides import Job

Item = TypeVar("Item")
Items = Iterable[Item] | AsyncIterable[Item]
_END = object()


class Source:
    """Items one after the other, packed; from an async iterable one is awaited while answers arrive."""

    def __init__(self, items: Items[object], job: Job[Any], events: asyncio.Queue[Any]) -> None:
        self._is_async = isinstance(items, AsyncIterable)
        self._iterator: Any = aiter(items) if isinstance(items, AsyncIterable) else iter(items)
        self._job, self._events = job, events
        self._pull: asyncio.Task[Any] | None = None
        self._index = 0
        self.is_exhausted = False

    @property
    def is_asked(self) -> bool:
        """Whether an item is awaited; it will be among the events."""
        return self._pull is not None

    async def feed(self, flight: Flight[Any]) -> None:
        """Add the next item to the window, or ask for it."""
        if self._is_async:
            self._pull = asyncio.ensure_future(anext(self._iterator, _END))
            self._pull.add_done_callback(self._events.put_nowait)
        else:
            await self._add(next(self._iterator, _END), flight)

    async def take(self, pull: asyncio.Task[Any], flight: Flight[Any]) -> None:
        """Add the item that was awaited; raises what its source raised."""
        self._pull = None
        await self._add(pull.result(), flight)

    def cancel(self) -> None:
        """Nobody wants another."""
        if self._pull is not None:
            self._pull.cancel()

    async def _add(self, item: object, flight: Flight[Any]) -> None:
        if item is _END:
            self.is_exhausted = True
            return
        is_slow = self._job.is_slow(item)
        packed = await asyncio.to_thread(flight.packed, item) if is_slow else flight.packed(item)
        flight.window.add(self._index, item, packed, now())
        self._index += 1


async def fly(flight: Flight[Any], source: Source, events: asyncio.Queue[Any]) -> AsyncGenerator[Call]:
    """Settled calls from the front of the window, which is kept full."""
    window = flight.window
    while window or not source.is_exhausted:
        if window.has_result:
            yield window.pop()
            continue
        if window.has_room and not source.is_exhausted and not source.is_asked:
            await source.feed(flight)
        else:
            await _take(await _next_event(events, window.wait_s(now())), flight, source)
        await _send_due(flight)
        while not events.empty():
            await _take(events.get_nowait(), flight, source)
        window.expire(now())


async def _next_event(events: asyncio.Queue[Any], timeout_s: float | None) -> Any:
    """A request that ended, or an item that came; None when a request is due first, or has taken too long."""
    if timeout_s is None:
        return await events.get()
    timer = asyncio.get_running_loop().call_later(timeout_s, events.put_nowait, None)
    try:
        return await events.get()
    finally:
        timer.cancel()


async def _take(event: Any, flight: Flight[Any], source: Source) -> None:
    if isinstance(event, Sent):
        flight.take(event)
    elif event is not None:
        await source.take(event, flight)


async def _send_due(flight: Flight[Any]) -> None:
    while (attempt := flight.window.next_attempt(now())) is not None:
        if not flight.must_prepare(attempt) or await asyncio.to_thread(flight.prepare, attempt):
            flight.send(attempt)


async def ended(future: Any) -> Any:
    """The same future of gRPC, once it has ended."""
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()

    def wake() -> None:
        if not waiter.done():
            waiter.set_result(None)

    future.add_done_callback(lambda ended: loop.call_soon_threadsafe(wake))
    try:
        await waiter
    except asyncio.CancelledError:
        future.cancel()
        raise
    return future
