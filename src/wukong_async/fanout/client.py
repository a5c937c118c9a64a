"""The proxy's peers: one connection, one frame, one answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wukong_async.config import Settings
from wukong_async.errors import InvocationError
from wukong_async.fanout.frames import MOST_EVENTS, FrameError, introduce, read_frame, write_frame

CONNECT_TIMEOUT = 2.0
"""Seconds until a proxy that does not shake hands is given up: the peer can do without."""
ANSWER_TIMEOUT = 30.0
"""Seconds to fire the events: about 20 of them may be retries while Lambda throttles."""


class ProxyBusy(InvocationError):
    """The proxy has too much to do, and has not taken the events."""


@dataclass(frozen=True, slots=True)
class Fired:
    """What has become of a frame's events, by their place in it."""

    sent: int
    """Accepted by Lambda."""
    throttled: tuple[int, ...]
    """Not accepted for as long as the proxy has tried."""
    failed: Mapping[int, str]
    """Refused, or not sent at all, and why."""


class ProxyClient:
    """Talks to the proxy that the settings name."""

    def __init__(self, settings: Settings) -> None:
        self._host = settings.proxy_address
        self._port = settings.proxy_port
        self._secret = settings.proxy_secret or ""

    def __repr__(self) -> str:
        return f"<ProxyClient of {self._host}:{self._port}>"

    async def fire(self, function: str, events: Sequence[bytes]) -> Fired:
        """Have the proxy send all events.

        Raises
        ------
        ProxyBusy
            If it has taken none of them.
        OSError, FrameError
            If the proxy cannot be used: nothing is known about the events then, and sending them
            again does no harm.
        """
        if len(events) > MOST_EVENTS:
            raise ProxyBusy(f"{len(events)} events are more than a proxy takes at once")
        answer = await self._ask({"invoke": list(events), "function": function})
        match answer:
            case {"sent": int(sent), "throttled": [*throttled], "failed": [*failed]}:
                return _fired(sent, throttled, failed, len(events))
            case {"busy": str(why)}:
                raise ProxyBusy(f"the proxy at {self._host}:{self._port} is busy: {why}")
            case {"refused": str(why)}:
                raise FrameError(f"the proxy at {self._host}:{self._port} refuses: {why}")
        raise FrameError("the proxy's answer is not understood")

    async def health(self) -> dict[str, Any]:
        """The proxy's counters.

        Raises
        ------
        OSError, FrameError
            If it does not answer.
        """
        match await self._ask({"health": None}):
            case {"health": dict(counters)}:
                return counters
        raise FrameError("the proxy's answer is not understood")

    async def _ask(self, request: Any) -> Any:
        where = f"the proxy at {self._host}:{self._port}"
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT) as patience:
                reader, writer = await asyncio.open_connection(self._host, self._port)
                try:
                    await introduce(self._secret, reader, writer)
                    patience.reschedule(asyncio.get_running_loop().time() + ANSWER_TIMEOUT)
                    await write_frame(writer, request)
                    return await read_frame(reader)
                finally:
                    # Not `close`, which goes on sending to whoever does not read.
                    writer.transport.abort()
        except TimeoutError as error:
            raise FrameError(f"{where} does not answer") from error
        except asyncio.IncompleteReadError as error:
            raise FrameError(f"{where} hung up") from error


def _fired(sent: int, throttled: list[Any], failed: list[Any], events: int) -> Fired:
    fired = Fired(
        sent,
        tuple(index for index in throttled if isinstance(index, int)),
        {f[0]: f[1] for f in failed if isinstance(f, list) and [*map(type, f)] == [int, str]},
    )
    named = {*fired.throttled, *fired.failed}
    # Each event once, or some would be sent by nobody.
    if sent + len(throttled) + len(failed) != events or sent + len(named) != events:
        raise FrameError("the proxy's answer does not fit the events")
    if not named <= {*range(events)}:
        raise FrameError("the proxy's answer does not fit the events")
    return fired
