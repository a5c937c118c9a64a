"""Wake-ups over one pub/sub connection.

An announcement names a job whose state has changed, and nothing more: what there is to know is in
the store, durably. So a lost message costs latency, never a result, and a connection that was lost
wakes every job, because nobody knows what was said meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from redis.exceptions import RedisError

from wukong_async.config import redact
from wukong_async.errors import StoreUnreachable
from wukong_async.loops import times_cancelled
from wukong_async.store import Connections
from wukong_async.store.connections import FIRST_PAUSE, LONGEST_PAUSE

log = logging.getLogger("wukong.scheduler")


class Announcements:
    """Listens on a channel of its own for as long as it is entered."""

    def __init__(self, connections: Connections) -> None:
        self.channel = f"wukong:announce:{secrets.token_hex(8)}"
        self._connections = connections
        self._waiting: dict[str, list[asyncio.Event]] = {}
        self._unheard = set(range(len(connections)))
        self._ready = asyncio.Event()
        self._pauses = [FIRST_PAUSE] * len(connections)
        self._error: BaseException | None = None
        """Why it has last lost a connection."""
        self._listener: asyncio.Task[None] | None = None
        self._closing = False

    async def __aenter__(self) -> Self:
        """Listen on every server.

        Raises
        ------
        StoreUnreachable
            When one has not taken the subscription within `store_timeout`.
        """
        self._listener = asyncio.create_task(self._listen(), name="wukong-announcements")
        try:
            async with asyncio.timeout(self._connections.timeout):
                await self._ready.wait()
        except TimeoutError:
            await self.__aexit__(None, None, None)
            silent = ", ".join(redact(self._connections.endpoints[s]) for s in self._unheard)
            reason = f" ({self._error})" if self._error else ""
            raise StoreUnreachable(
                f"The store at {silent} has not taken a subscription for"
                f" {self._connections.timeout:g} s (wukong.store_timeout){reason}. Check that it"
                " answers, and that its user may SUBSCRIBE to `wukong:announce:*`."
            ) from self._error
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._listener is not None
        # A connection that breaks at this moment would make it forget that it was cancelled.
        self._closing = True
        self._listener.cancel()
        await asyncio.wait([self._listener])

    @contextmanager
    def expect(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever the job should be looked at. Enter before `create`."""
        event = asyncio.Event()
        self._waiting.setdefault(job_id, []).append(event)
        try:
            yield event
        finally:
            self._waiting[job_id].remove(event)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    async def _listen(self) -> None:
        # A job's announcements come from its metadata shard, so each shard is listened to.
        async with asyncio.TaskGroup() as group:
            for shard in range(len(self._connections)):
                group.create_task(self._keep_listening(shard))

    async def _keep_listening(self, shard: int) -> None:
        while not self._closing:
            try:
                await self._listen_to(shard)
            except (RedisError, OSError) as error:
                self._error = error
                log.debug("announcements interrupted: %s", error)
            pause = self._pauses[shard]
            self._pauses[shard] = min(2 * pause, LONGEST_PAUSE)
            await asyncio.sleep(random.uniform(0, pause))

    async def _listen_to(self, shard: int) -> None:
        async with self._connections.client(shard).pubsub() as subscription:
            await subscription.subscribe(self.channel)
            if times_cancelled():
                raise asyncio.CancelledError
            async for message in subscription.listen():
                if message["type"] == "subscribe":
                    self._subscribed(shard)
                elif message["type"] == "message":
                    self._wake(message["data"].decode())

    def _subscribed(self, shard: int) -> None:
        self._pauses[shard] = FIRST_PAUSE
        self._unheard.discard(shard)
        if not self._unheard:
            self._ready.set()
        for job_id in self._waiting:
            self._wake(job_id)

    def _wake(self, job_id: str) -> None:
        for event in self._waiting.get(job_id, ()):
            event.set()
