"""Whether events go through the proxy, and what is done about those that do not get through."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence

from wukong_async.config import Settings
from wukong_async.fanout.client import ProxyBusy, ProxyClient
from wukong_async.fanout.frames import FrameError
from wukong_async.loops import may_send

log = logging.getLogger("wukong.fanout")

AVOID_FOR = 30.0
"""Seconds for which a proxy that has failed is not asked again: each try may cost 2 s."""

InvokeAll = Callable[[Sequence[bytes]], Awaitable[None]]


class Fanout:
    """Sends events: many at once through the proxy that the settings name, if they name one.

    The proxy is a convenience. What it does not take, whoever has the events sends by themselves;
    only what it was throttled with is left to the watcher, as it would be without it.
    """

    def __init__(self, settings: Settings) -> None:
        self._most = settings.max_task_fanout
        self._proxy = ProxyClient(settings) if settings.proxy_address else None
        self._avoided_until = -math.inf

    def __repr__(self) -> str:
        return f"<Fanout through {self._proxy!r} above {self._most} events>"

    async def fire(
        self,
        function: str,
        events: Sequence[bytes],
        invoke_all: InvokeAll,
        *,
        loaded: bool = True,
    ) -> None:
        """Send events to a function.

        Parameters
        ----------
        invoke_all
            Sends events without the proxy.
        loaded
            Whether it can do so at once. A few events, too, go through the proxy while it has to
            load a client of AWS first: that takes longer than a hundred of them.

        Raises
        ------
        InvocationError
            From `invoke_all`.
        """
        most = self._most if loaded else 0
        if self._proxy is not None and len(events) > most:
            events = await self._through(self._proxy, function, events)
            if not events:
                return
        await invoke_all(events)

    async def _through(
        self, proxy: ProxyClient, function: str, events: Sequence[bytes]
    ) -> Sequence[bytes]:
        """Have the proxy send events; those that it has not taken."""
        now = asyncio.get_running_loop().time
        if now() < self._avoided_until:
            return events
        await may_send()
        try:
            fired = await proxy.fire(function, events)
        except ProxyBusy as busy:
            log.warning("invoking without the proxy, this time: %s", busy)
            return events
        except (OSError, FrameError, UnicodeError) as error:  # The last: no host has such a name.
            self._avoided_until = now() + AVOID_FOR
            log.warning("invoking without the proxy: %s", error)
            return events
        if fired.throttled:
            # It has tried for long: calling now would only add to what Lambda has too much of.
            log.warning(
                "%d of %d events were not accepted; the watcher sends them again",
                len(fired.throttled),
                len(events),
            )
        if fired.failed:
            # It may be the proxy's credentials or network. If not, it is our own error in a moment.
            first = next(iter(fired.failed.values()))
            log.warning("the proxy could not send %d events: %s", len(fired.failed), first)
        return [events[index] for index in fired.failed]
