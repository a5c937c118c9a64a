"""The proxy's server side."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Coroutine
from dataclasses import asdict, dataclass
from typing import Any, Self, TypeVar

from wukong_async import wire
from wukong_async.config import Settings
from wukong_async.errors import ConfigError
from wukong_async.fanout.frames import (
    MOST_EVENTS,
    FrameError,
    read_body,
    read_length,
    skip_body,
    welcome,
    write_frame,
)
from wukong_async.invoker import Invoker
from wukong_async.proxy.keeper import Keeper

T = TypeVar("T")
log = logging.getLogger("wukong.proxy")

MOST_CONNECTIONS = 1000
"""Above it requests are shed: peers invoke for themselves then."""
SPARE_CONNECTIONS = 24
"""Beyond those, to say so, and for whoever asks after the proxy's health; more are closed."""
MOST_QUEUED_EVENTS = 2 * MOST_EVENTS
"""Of all peers together: what is queued behind more is not sent before its peer gives up."""
MOST_QUEUED_BYTES = 64 * 1024 * 1024
"""Of all frames that are read or worked on, as they arrive; what is made of them is twice that."""
HANDSHAKE_TIMEOUT = 5.0
"""Seconds to prove to know the secret."""
PEER_TIMEOUT = 10.0
"""Seconds for a peer to begin its next request, to send it whole, to take its answer."""
DRAIN_TIMEOUT = 25.0
"""Seconds at the end to finish what was accepted: 20 may be retries while Lambda throttles. Less
than the 30 after which a container is killed."""
LOOK_EVERY = 5.0
"""Seconds between two looks for jobs whose client is gone."""
MOST_REASON = 200
"""Characters that are said of an event that has failed: an answer has to fit in a frame."""


@dataclass(slots=True)
class Counters:
    """What has happened since the start."""

    connections: int = 0
    """Opened by anybody."""
    closed: int = 0
    """Ended by the proxy: too many of them, strangers, garbage, slow peers."""
    frames: int = 0
    """Requests that were understood."""
    events: int = 0
    """In those that were accepted: sent, throttled, failed, or on their way."""
    sent: int = 0
    """Accepted by Lambda."""
    throttled: int = 0
    """Not accepted by Lambda after all retries."""
    failed: int = 0
    """Refused by Lambda, or not sent at all."""
    shed: int = 0
    """Requests that were answered "busy"."""


class ProxyServer:
    """Listens at `host` and fires what authenticated peers send. An async context manager.

    If its settings name a store, it watches the jobs there whose client is gone, too.

    Parameters
    ----------
    listening
        A bound socket to use instead of `host` and `port`, for peers that have to know it before.

    Raises
    ------
    ConfigError
        On construction, if the settings have no `proxy_secret`.
    """

    def __init__(
        self,
        settings: Settings,
        host: str,
        port: int,
        *,
        look_every: float = LOOK_EVERY,
        listening: socket.socket | None = None,
    ) -> None:
        if settings.proxy_secret is None:
            raise ConfigError(
                "wukong.proxy_secret is not set: a proxy invokes functions for whoever knows it,"
                " so it does not run without one."
            )
        self._secret = settings.proxy_secret
        self._host = host
        self.port = port
        self._listening = listening
        settings = settings.replace(invoke_concurrency=settings.proxy_concurrency)
        self._concurrency = settings.invoke_concurrency
        self._invoker = Invoker(settings)
        self.keeper = Keeper(settings, self._invoker, look_every)
        self._stack = contextlib.AsyncExitStack()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()
        self._draining = asyncio.Event()
        self._started = time.monotonic()
        self._queued_events = 0
        self._queued_bytes = 0
        self.counters = Counters()

    def __repr__(self) -> str:
        return f"<ProxyServer {self._host}:{self.port} connections={len(self._open)}>"

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._invoker)
            await stack.enter_async_context(self.keeper)
            if self._listening is None:
                self._server = await asyncio.start_server(self._serve, self._host, self.port)
            else:
                self._server = await asyncio.start_server(self._serve, sock=self._listening)
            self._stack = stack.pop_all()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Drain: finish what was accepted, accept nothing more; cut off who takes too long."""
        assert self._server is not None
        self._server.close()
        self._draining.set()
        if self._open:
            _done, late = await asyncio.wait(self._open, timeout=DRAIN_TIMEOUT)
            for task in late:
                task.cancel()
            if late:
                log.warning("%d connections were cut off after %g s", len(late), DRAIN_TIMEOUT)
                await asyncio.wait(late)
        await self._stack.aclose()

    def health(self) -> dict[str, Any]:
        """Everything that is counted, and how things stand now."""
        return {
            "uptime": round(time.monotonic() - self._started, 3),
            "open_connections": len(self._open),
            "queued_events": self._queued_events,
            "queued_bytes": self._queued_bytes,
            "jobs_kept": len(self.keeper.jobs),
            **asdict(self.counters),
        }

    # Connections ------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        me = asyncio.current_task()
        assert me is not None
        self.counters.connections += 1
        full = len(self._open) >= MOST_CONNECTIONS + SPARE_CONNECTIONS
        if full or self._draining.is_set():
            self.counters.closed += full
            writer.close()
            return
        self._open.add(me)
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                await welcome(self._secret, reader, writer)
            while (length := await self._next(reader)) is not None:
                answer = await self._answer_next(reader, length)
                async with asyncio.timeout(PEER_TIMEOUT):
                    await write_frame(writer, answer)
            writer.close()
            async with asyncio.timeout(PEER_TIMEOUT):
                await writer.wait_closed()  # All has been sent.
        except (FrameError, OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            self.counters.closed += 1
            log.warning("a connection was closed: %s", repr(error))
        finally:
            self._open.discard(me)
            # Not `close`, which goes on sending to whoever does not read.
            writer.transport.abort()

    async def _next(self, reader: asyncio.StreamReader) -> int | None:
        """The size of the next request, or None when the peer is done or the server drains."""
        reading = asyncio.ensure_future(_in_time(read_length(reader)))
        draining = asyncio.ensure_future(self._draining.wait())
        try:
            await asyncio.wait((reading, draining), return_when=asyncio.FIRST_COMPLETED)
            return reading.result() if reading.done() else None
        finally:
            for task in (reading, draining):
                task.cancel()

    async def _answer_next(self, reader: asyncio.StreamReader, length: int) -> dict[str, Any]:
        """Read the rest of a request and do it, if there is room for it."""
        if self._queued_bytes + length > MOST_QUEUED_BYTES:
            await _in_time(skip_body(reader, length))
            return self._shed(f"{self._queued_bytes} bytes are queued")
        self._queued_bytes += length
        try:
            request = await _in_time(read_body(reader, length))
            return await self._answer(request)
        finally:
            self._queued_bytes -= length

    # Requests ---------------------------------------------------------------------------------

    async def _answer(self, request: Any) -> dict[str, Any]:
        match request:
            case {"invoke": [*events], "function": str(function)} if all(
                isinstance(event, bytes) for event in events
            ):
                self.counters.frames += 1
                return await self._admit(function, events)
            case {"health": None}:
                self.counters.frames += 1
                return {"health": self.health()}
        raise FrameError("a request is not understood")

    async def _admit(self, function: str, events: list[bytes]) -> dict[str, Any]:
        """Fire events, or say at once that it is not done: to wait here costs the peer more."""
        if not self._invoker.is_for(function):
            mine = self._invoker.function_name
            log.warning("a peer wants %s invoked, and not %s", function, mine)
            return {"refused": f"it invokes {mine}, not {function}"}
        if len(self._open) > MOST_CONNECTIONS:
            return self._shed(f"{len(self._open)} connections are open")
        if self._queued_events + len(events) > MOST_QUEUED_EVENTS:
            return self._shed(f"{self._queued_events} events are queued")
        self._queued_events += len(events)
        self.counters.events += len(events)
        try:
            return await self._fire(events)
        finally:
            self._queued_events -= len(events)

    def _shed(self, why: str) -> dict[str, Any]:
        self.counters.shed += 1
        return {"busy": why}

    async def _fire(self, events: list[bytes]) -> dict[str, Any]:
        throttled: list[int] = []
        failed: list[tuple[int, str]] = []
        queue = iter(enumerate(events))

        async def work() -> None:
            for index, event in queue:
                try:
                    if not await self._invoker.invoke(event):
                        throttled.append(index)
                except Exception as error:  # Its peer sends it, whatever it was.
                    failed.append((index, wire.text_of(error)[:MOST_REASON]))

        # No more of them than calls in flight: a task for each event would be the larger part of
        # the memory. The invoker's slots go round, so a small request does not wait for a large.
        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._concurrency, len(events))):
                group.create_task(work())
        sent = len(events) - len(throttled) - len(failed)
        self.counters.sent += sent
        self.counters.throttled += len(throttled)
        self.counters.failed += len(failed)
        return {"sent": sent, "throttled": throttled, "failed": failed}


async def _in_time(peer: Coroutine[Any, Any, T]) -> T:
    """What a peer does, within the time that it has for that."""
    async with asyncio.timeout(PEER_TIMEOUT):
        return await peer
