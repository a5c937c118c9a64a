"""The proxy's server side."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from typing import Any, Self

from wukong_async.config import Settings
from wukong_async.errors import ConfigError, InvocationError
from wukong_async.invoker import Invoker
from wukong_async.proxy.frames import (
    DIGEST_BYTES,
    NONCE_BYTES,
    FrameError,
    is_proof,
    prove,
    read_frame,
    write_frame,
)
from wukong_async.proxy.keeper import Keeper

log = logging.getLogger("wukong.proxy")

MOST_CONNECTIONS = 1000
"""More are closed at once: peers invoke for themselves then."""
HANDSHAKE_TIMEOUT = 5.0
"""Seconds to answer the challenge."""
DRAIN_TIMEOUT = 10.0
"""Seconds at the end to finish what was received: a peer may never read its answer."""


LOOK_EVERY = 5.0
"""Seconds between two looks for jobs whose client is gone."""


class ProxyServer:
    """Listens at `host` and fires what authenticated peers send. An async context manager.

    If its settings name a store, it watches the jobs there whose client is gone, too.

    Raises
    ------
    ConfigError
        On construction, if the settings have no `proxy_secret`.
    """

    def __init__(
        self, settings: Settings, host: str, port: int, *, look_every: float = LOOK_EVERY
    ) -> None:
        if settings.proxy_secret is None:
            raise ConfigError(
                "wukong.proxy_secret is not set: a proxy invokes functions for whoever knows it,"
                " so it does not run without one."
            )
        self._secret = settings.proxy_secret
        self._host = host
        self.port = port
        self._invoker = Invoker(settings)
        self.keeper = Keeper(settings, self._invoker, look_every)
        self._stack = contextlib.AsyncExitStack()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()
        self._draining = asyncio.Event()
        self.fired = 0
        """Events accepted by Lambda."""

    def __repr__(self) -> str:
        return f"<ProxyServer {self._host}:{self.port} connections={len(self._open)}>"

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._invoker)
            await stack.enter_async_context(self.keeper)
            self._server = await asyncio.start_server(self._serve, self._host, self.port)
            self._stack = stack.pop_all()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Drain: finish what was received, accept nothing more; cut off who takes too long."""
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

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        me = asyncio.current_task()
        assert me is not None
        if len(self._open) >= MOST_CONNECTIONS or self._draining.is_set():
            writer.close()
            return
        self._open.add(me)
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                await self._shake_hands(reader, writer)
            while (request := await self._next(reader)) is not None:
                await write_frame(writer, await self._answer(request))
            writer.close()
            await writer.wait_closed()  # All has been sent.
        except (FrameError, OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            log.warning("a connection was closed: %s", repr(error))
        except asyncio.CancelledError:
            writer.transport.abort()  # What a close sends before it ends, nobody reads.
            raise
        finally:
            self._open.discard(me)
            writer.close()

    async def _shake_hands(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        nonce = secrets.token_bytes(NONCE_BYTES)
        writer.write(nonce)
        answer = await reader.readexactly(DIGEST_BYTES)
        if not is_proof(self._secret, nonce, answer):
            raise FrameError("a peer does not know the secret")
        writer.write(prove(self._secret, answer))

    async def _next(self, reader: asyncio.StreamReader) -> Any:
        """The next request, or None when the peer is done or the server drains."""
        reading = asyncio.ensure_future(read_frame(reader))
        draining = asyncio.ensure_future(self._draining.wait())
        try:
            await asyncio.wait((reading, draining), return_when=asyncio.FIRST_COMPLETED)
            return reading.result() if reading.done() else None
        finally:
            for task in (reading, draining):
                task.cancel()

    async def _answer(self, request: Any) -> dict[str, Any]:
        match request:
            case {"invoke": [*events]} if all(isinstance(event, bytes) for event in events):
                return await self._fire(events)
        raise FrameError("a request is not understood")

    async def _fire(self, events: list[bytes]) -> dict[str, Any]:
        outcomes = await asyncio.gather(
            *(self._invoker.invoke(event) for event in events), return_exceptions=True
        )
        failed = []
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, InvocationError):
                failed.append([index, str(outcome)])
            elif isinstance(outcome, BaseException):
                raise outcome
        self.fired += len(events) - len(failed)
        return {"sent": len(events) - len(failed), "failed": failed}
