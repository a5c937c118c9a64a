"""The proxy's peers: one connection, one frame, one answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from wukong_async.config import Settings
from wukong_async.errors import InvocationError
from wukong_async.proxy.frames import (
    DIGEST_BYTES,
    NONCE_BYTES,
    FrameError,
    is_proof,
    prove,
    read_frame,
    write_frame,
)

CONNECT_TIMEOUT = 2.0
"""Seconds until a proxy that does not answer is given up: the peer can do without."""
ANSWER_TIMEOUT = 60.0


class ProxyClient:
    """Hands events to the proxy that the settings name."""

    def __init__(self, settings: Settings) -> None:
        self._host = settings.proxy_address
        self._port = settings.proxy_port
        self._secret = settings.proxy_secret or ""

    async def fire(self, events: Sequence[bytes]) -> None:
        """Have the proxy send all events.

        Raises
        ------
        OSError, FrameError
            If the proxy cannot be used: nothing is known about the events then, and sending them
            again does no harm.
        InvocationError
            If Lambda refuses an event.
        """
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                reader, writer = await asyncio.open_connection(self._host, self._port)
        except TimeoutError as error:
            raise FrameError(f"the proxy at {self._host}:{self._port} does not answer") from error
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                await self._shake_hands(reader, writer)
                await write_frame(writer, {"invoke": list(events)})
                answer = await read_frame(reader)
        except (TimeoutError, asyncio.IncompleteReadError) as error:
            raise FrameError(f"the proxy at {self._host}:{self._port} hung up") from error
        finally:
            writer.close()
        match answer:
            case {"sent": int(), "failed": [*failed]}:
                if failed:
                    raise InvocationError(f"{len(failed)} events were refused: {failed[0][1]}")
            case _:
                raise FrameError("the proxy's answer is not understood")

    async def _shake_hands(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        answer = prove(self._secret, await reader.readexactly(NONCE_BYTES))
        writer.write(answer)
        if not is_proof(self._secret, answer, await reader.readexactly(DIGEST_BYTES)):
            raise FrameError("this is not our proxy: it does not know the secret")
