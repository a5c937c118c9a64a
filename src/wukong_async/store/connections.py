"""Connections to the store's servers, and the policy of asking again.

Every request of this package can be repeated: scripts recognise what has been done, puts and
deletes are idempotent. So a lost connection, a time-out, or an error that says "not now" (loading,
read-only, busy, out of memory, moved) is not an answer: the identical bytes are sent again, with
jittered backoff, until the server answers or has been silent for `store_timeout`.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Self, TypeVar

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    MasterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

from wukong_async.config import redact
from wukong_async.errors import ConfigError, StoreError, StoreFull, StoreUnreachable
from wukong_async.loops import times_cancelled
from wukong_async.store import scripts
from wukong_async.store.s3 import Buckets
from wukong_async.store.scripts import Script

T = TypeVar("T")

NOT_AN_ANSWER = (
    ConnectionError,
    TimeoutError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
    OSError,
)
BUSY = re.compile(r"(.*caused error: \W*)?(BUSY|LOADING|MOVED|ASK|MISCONF|NOREPLICAS)", re.DOTALL)
"""How errors that say "not now" begin, by themselves or in a pipeline (in brackets and quotes)."""
PATIENCE, LEAST_PATIENCE = 3, 2.0
"""A connection may be silent for the n-th part of what the server may, but for some seconds: it may
be dead, and the server alive."""
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 1.0
"""Seconds between two attempts; doubled each time, with full jitter."""
READ_SIZE = 256 * 1024
"""Bytes per read of a socket; redis-py's 32 KiB costs eight times the wake-ups."""


class Connections:
    """The servers of `redis_endpoints`, in order. An async context manager.

    Parameters
    ----------
    endpoints
        URLs; all name servers that exist for this use or share it with others.
    timeout
        Seconds that a server may be silent.
    """

    def __init__(self, endpoints: Sequence[str], timeout: float) -> None:
        if not endpoints:
            raise ConfigError(
                "wukong.redis_endpoints is empty: name a Redis or Valkey server, or start a"
                " LocalCluster, which brings its own."
            )
        self.endpoints = tuple(endpoints)
        self.timeout = timeout
        self._weights = [hashlib.blake2b(e.encode(), digest_size=8).digest() for e in endpoints]
        self._clients: list[Redis] = []
        self.buckets = Buckets()
        """Clients for what is not on these servers."""

    async def __aenter__(self) -> Self:
        self._clients = [self._client(url) for url in self.endpoints]
        return self

    async def __aexit__(self, *_: object) -> None:
        clients, self._clients = self._clients, []
        for client in clients:
            await client.aclose()
        await self.buckets.aclose()

    def __repr__(self) -> str:
        return f"<Connections {', '.join(redact(url) for url in self.endpoints)}>"

    def __len__(self) -> int:
        return len(self.endpoints)

    def client(self, shard: int) -> Redis:
        """The redis-py client of a server, for what this package has no word for."""
        return self._clients[shard]

    def shard(self, name: str) -> int:
        """The server responsible for `name`, by rendezvous hashing."""
        if len(self.endpoints) == 1:
            return 0
        key = name.encode()
        return max(
            range(len(self.endpoints)),
            key=lambda i: hashlib.blake2b(key, key=self._weights[i], digest_size=8).digest(),
        )

    async def check(self) -> None:
        """Prove that every server answers, and give it the scripts.

        Raises
        ------
        StoreUnreachable
        """
        await asyncio.gather(*(self._load_all(shard) for shard in range(len(self))))

    async def ask(self, shard: int, request: Callable[[Redis], Awaitable[T]]) -> T:
        """Send a request until it is answered.

        Raises
        ------
        StoreUnreachable
            When the server has been silent for `timeout` seconds, or refuses the credentials.
        StoreFull
            When it has had no room for as long.
        StoreError
            When it answers with an error that asking again will not change.
        """
        pause = FIRST_PAUSE
        started = time.monotonic()
        cancelled = times_cancelled()
        while True:
            try:
                try:
                    return await request(self._clients[shard])
                finally:
                    # Python 3.11 loses a cancellation that comes with an answer or an error.
                    if times_cancelled() > cancelled:
                        raise asyncio.CancelledError
            except NoScriptError:
                await self._load_all(shard)
            except NOT_AN_ANSWER as error:
                # redis-py raises this one, or a ConnectionError because of it.
                if AuthenticationError in {type(error), type(error.__cause__)}:
                    raise StoreUnreachable(
                        f"{self._name(shard)} refuses access: {error}"
                    ) from error
                self._give_up(shard, started, error)
                if isinstance(error, TimeoutError):
                    # What else has lain idle since may be as dead. It is closed at once: TLS would
                    # wait for an answer, and others might be given it meanwhile.
                    pool: Any = self._clients[shard].connection_pool
                    for connection in list(pool._available_connections):
                        await connection.disconnect(nowait=True)
            except ResponseError as error:
                if not BUSY.match(str(error)):
                    raise StoreError(f"{self._name(shard)} says: {error}") from error
                self._give_up(shard, started, error)
            await asyncio.sleep(random.uniform(0, pause))
            pause = min(2 * pause, LONGEST_PAUSE)

    async def call(self, shard: int, script: Script, keys: Sequence[str], *args: Any) -> Any:
        """Run a script until it is answered."""
        return await self.command(shard, "EVALSHA", script.sha, len(keys), *keys, *args)

    async def calls(
        self, shard: int, requests: Sequence[tuple[Script, Sequence[str], Sequence[Any]]]
    ) -> list[Any]:
        """Run scripts one after the other, in one round trip, until all are answered.

        Parameters
        ----------
        requests
            (script, keys, arguments). All are run once more if one of them has to be.
        """

        async def run(client: Redis) -> list[Any]:
            async with client.pipeline(transaction=False) as pipe:
                for script, keys, args in requests:
                    pipe.evalsha(script.sha, len(keys), *keys, *args)
                return list(await pipe.execute())

        return await self.ask(shard, run)

    async def command(self, shard: int, *words: Any) -> Any:
        """Run a command until it is answered."""

        async def run(client: Redis) -> Any:
            return await client.execute_command(*words)  # type: ignore[no-untyped-call]

        return await self.ask(shard, run)

    def _give_up(self, shard: int, started: float, error: Exception) -> None:
        silent = time.monotonic() - started
        if silent >= self.timeout and isinstance(error, OutOfMemoryError):
            raise StoreFull(
                f"{self._name(shard)} has been full for {silent:.1f} s (wukong.store_timeout)."
                " Raise its maxmemory, or compute less at a time."
            ) from error
        if silent >= self.timeout:
            raise StoreUnreachable(
                f"{self._name(shard)} has not answered for {silent:.1f} s"
                f" (wukong.store_timeout): {error}"
            ) from error

    async def _load_all(self, shard: int) -> None:
        async def load(client: Redis) -> None:
            async with client.pipeline(transaction=False) as pipe:
                for script in scripts.ALL:
                    pipe.script_load(script.source)
                await pipe.execute()

        await self.ask(shard, load)

    def _name(self, shard: int) -> str:
        return f"The store at {redact(self.endpoints[shard])}"

    def _client(self, url: str) -> Redis:
        patience = max(self.timeout / PATIENCE, min(self.timeout, LEAST_PATIENCE))
        try:
            return Redis.from_url(
                url,
                protocol=3,
                socket_timeout=patience,
                socket_connect_timeout=min(5.0, patience),
                socket_read_size=READ_SIZE,
                # `ask` owns repetition; a second policy below it would multiply the waiting.
                retry=Retry(NoBackoff(), 0),
            )
        except (ValueError, RedisError) as error:
            raise ConfigError(f"wukong.redis_endpoints: {redact(url)!r}: {error}") from error
