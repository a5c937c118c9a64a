"""An event loop whose time is simulated."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import Callable
from contextvars import Context
from typing import TypeVarTuple, Unpack

Ts = TypeVarTuple("Ts")


class Idle(Exception):
    """Somebody waits, and nothing can happen any more, or has happened for very long."""


class SimulatedLoop(asyncio.BaseEventLoop):
    """Time passes when there is nothing else to do; no time passes while something is done.

    Beside asyncio's callbacks there are events, which cost less.

    Parameters
    ----------
    bound
        Seconds after which nobody should wait any more.
    """

    def __init__(self, bound: float) -> None:
        super().__init__()
        self._bound = bound
        self._selector = self
        self.now = 0.0
        """Seconds since it began."""
        self._woken = False
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def __del__(self) -> None:
        """It holds nothing that would have to be closed."""

    def time(self) -> float:
        return self.now

    def after(self, delay: float, event: Callable[[], None]) -> None:
        """Have an event happen in `delay` seconds."""
        heapq.heappush(self._events, (self.now + delay, next(self._order), event))

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    def exhaust(self) -> None:
        """Let all events happen that are left."""
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()

    # What the loop below asks for -------------------------------------------------------------

    def call_soon(
        self,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        self._woken = True
        return super().call_soon(callback, *args, context=context)

    def select(self, timeout: float | None) -> list[object]:
        """As a selector that nothing but time makes ready."""
        if timeout == 0:
            return []
        self._woken = False
        limit = math.inf if timeout is None else self.now + timeout
        events = self._events
        while not self._woken and events and events[0][0] <= limit:
            self.now, _, event = heapq.heappop(events)
            event()
        if not self._woken:
            if timeout is None or self.now > self._bound:
                raise Idle
            self.now = limit
        return []

    def _process_events(self, events: list[object]) -> None:
        """There are none."""
