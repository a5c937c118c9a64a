"""What a Lambda function does with its requests: concurrency, queue, age, retries.

Pure: time is an argument, sandboxes and requests are only referred to. The endpoint asks
`assign` after everything that happened and does what it says.

Sources for the behaviour: the Lambda developer guide, "Asynchronous invocation" (queue, maximum
age 60 s to 6 h, 0-2 retries after 1 and 2 minutes) and "Invoke" in the API reference (limits and
errors of synchronous calls).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from wukong_async.config import MOST
from wukong_async.errors import ConfigError

RETRY_DELAYS = (60.0, 120.0)
"""Seconds before the first and the second retry of an asynchronous event."""


class InvocationType(StrEnum):
    """Values of the X-Amz-Invocation-Type header."""

    EVENT = "Event"
    REQUEST_RESPONSE = "RequestResponse"
    DRY_RUN = "DryRun"


@dataclass(frozen=True, slots=True)
class EventInvokeConfig:
    """How asynchronous events are treated, as in Lambda's event-invoke-config.

    wukong-async wants no retries: its watcher knows better when to send an event again.
    """

    maximum_retry_attempts: int = 0
    maximum_event_age: float = 3600.0
    """Seconds."""
    retry_delays: tuple[float, float] = RETRY_DELAYS
    """Seconds; AWS does not let you choose them, tests have to."""

    def __post_init__(self) -> None:
        check_int("maximum_retry_attempts", self.maximum_retry_attempts, 0, len(RETRY_DELAYS))
        check_seconds("maximum_event_age", self.maximum_event_age)
        delays: object = self.retry_delays
        if not isinstance(delays, (tuple, list)) or len(delays) != len(RETRY_DELAYS):
            raise ConfigError(f"retry_delays must be two numbers of seconds, not {delays!r}.")
        for delay in delays:
            check_seconds("each of retry_delays", delay, zero=True)


def check_int(name: str, value: object, least: int, most: int = MOST) -> None:
    """Raise ConfigError if an argument is no int or out of range."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        limit = f"of at least {least}" if most == MOST else f"from {least} to {most}"
        raise ConfigError(f"{name} must be an int {limit}, not {value!r}.")


def check_seconds(name: str, value: object, *, zero: bool = False) -> None:
    """Raise ConfigError if an argument is no finite, positive (or zero) number."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (0 < value <= MOST or (zero and value == 0))
    ):
        sign = "not negative" if zero else "positive"
        raise ConfigError(
            f"{name} must be a number of seconds, {sign} and at most {MOST}, not {value!r}."
        )


@dataclass(eq=False, slots=True)
class Request:
    """One request of a caller; asynchronous ones may be delivered more than once."""

    request_id: str
    payload: bytes
    kind: InvocationType
    received: float
    client_context: str | None = None
    attempts: int = 0
    not_before: float = 0.0


@dataclass(slots=True)
class Function:
    """The requests of one function, and the sandboxes that are free for them."""

    concurrency: int
    config: EventInvokeConfig = field(default_factory=EventInvokeConfig)
    idle: list[int] = field(default_factory=list)
    """Sandboxes, the one used last at the end: it is the warmest."""
    running: dict[int, Request] = field(default_factory=dict)
    waiting: deque[Request] = field(default_factory=deque)
    """Synchronous requests that were admitted and wait for a sandbox to start."""
    queue: deque[Request] = field(default_factory=deque)
    """Asynchronous events."""

    def __repr__(self) -> str:
        return (
            f"<Function idle={len(self.idle)} running={len(self.running)}/{self.concurrency}"
            f" waiting={len(self.waiting)} queued={len(self.queue)}>"
        )

    def admit(self, request: Request) -> bool:
        """Take a request; False if a synchronous one is over the concurrency limit."""
        if request.kind is InvocationType.EVENT:
            self.queue.append(request)
            return True
        if len(self.running) + len(self.waiting) >= self.concurrency:
            return False
        self.waiting.append(request)
        return True

    def ready(self, sandbox: int) -> None:
        """A sandbox asks for work."""
        self.idle.append(sandbox)

    def assign(self, now: float) -> tuple[list[tuple[int, Request]], list[Request]]:
        """(sandbox, request) pairs to run, and asynchronous events that have become too old."""
        expired = [r for r in self.queue if now - r.received > self.config.maximum_event_age]
        for request in expired:
            self.queue.remove(request)
        assigned: list[tuple[int, Request]] = []
        while self.idle and (following := self._next(now)) is not None:
            sandbox = self.idle.pop()
            following.attempts += 1
            self.running[sandbox] = following
            assigned.append((sandbox, following))
        return assigned, expired

    def ended(self, sandbox: int, *, failed: bool, now: float) -> tuple[Request | None, bool]:
        """A sandbox has answered or died: its request, and whether that will be tried again."""
        request = self.running.pop(sandbox, None)
        if request is None or not failed or request.kind is not InvocationType.EVENT:
            return request, False
        if request.attempts > self.config.maximum_retry_attempts:
            return request, False
        request.not_before = now + self.config.retry_delays[request.attempts - 1]
        self.queue.append(request)
        return request, True

    def lost(self, sandbox: int) -> None:
        """A sandbox is gone; its request, if any, has been ended."""
        if sandbox in self.idle:
            self.idle.remove(sandbox)

    def refuse(self) -> Request | None:
        """No sandbox starts: take out the request that has to hear of it."""
        if self.waiting:
            return self.waiting.popleft()
        return self.queue.popleft() if self.queue else None

    def next_due(self) -> float | None:
        """When a delayed event is due, if one waits for its time only."""
        return min((r.not_before for r in self.queue if r.not_before), default=None)

    def _next(self, now: float) -> Request | None:
        if self.waiting:
            return self.waiting.popleft()
        for index, request in enumerate(self.queue):
            if request.not_before <= now:
                del self.queue[index]
                return request
        return None
