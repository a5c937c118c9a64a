"""What a proxy does for jobs whose client is gone: it watches them to their end.

A client that dies leaves its job in the registry of the job's server. The proxy takes such a job
over, invokes its executors where they fall silent, and lets go of it when it has ended: then only
the results stay, for `result_ttl`. A proxy that dies is succeeded in the same way by another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Self

from wukong_async import failure
from wukong_async.config import Settings, redact
from wukong_async.errors import InvocationError, StoreError
from wukong_async.invoker import Invoker
from wukong_async.protocol import JobState
from wukong_async.store import Connections, JobStore, lapsed_jobs
from wukong_async.watcher import Watcher

log = logging.getLogger("wukong.proxy")


class Keeper:
    """Looks at the registries every `pause` seconds. An async context manager.

    It does nothing if the settings name no store.
    """

    def __init__(self, settings: Settings, invoker: Invoker, pause: float) -> None:
        self._stores = settings.redis_endpoints
        self._timeout = settings.store_timeout
        self._invoker = invoker
        self._pause = pause
        self._stack = contextlib.AsyncExitStack()
        self._keeping: dict[str, asyncio.Task[None]] = {}

    def __repr__(self) -> str:
        return f"<Keeper of {len(self._keeping)} jobs>"

    @property
    def jobs(self) -> tuple[str, ...]:
        """The jobs that are watched now."""
        return tuple(self._keeping)

    async def __aenter__(self) -> Self:
        if self._stores:
            connections = Connections(self._stores, self._timeout)
            await self._stack.enter_async_context(connections)
            looking = [
                asyncio.create_task(self._look(connections, shard), name="wukong-keeper")
                for shard in range(len(connections))
            ]
            self._stack.push_async_callback(self._stop, looking)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _stop(self, looking: Sequence[asyncio.Task[None]]) -> None:
        tasks = [*looking, *self._keeping.values()]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def _look(self, connections: Connections, shard: int) -> None:
        """Find jobs on one server that nobody owns any more, for ever."""
        while True:
            try:
                for job_id in await lapsed_jobs(connections, shard):
                    # A server may be known to others by another name: their jobs are not for us.
                    if job_id not in self._keeping and connections.shard(job_id) == shard:
                        keeping = self._keep(JobStore(connections, job_id))
                        self._keeping[job_id] = asyncio.create_task(keeping, name="wukong-keep")
            except StoreError as error:
                where = redact(connections.endpoints[shard])
                log.warning("the jobs at %s cannot be looked at: %s", where, error)
            await asyncio.sleep(self._pause)

    async def _keep(self, store: JobStore) -> None:
        try:
            await keep(store, self._invoker)
        except StoreError as error:
            # It is found again, by us or by another proxy.
            log.warning("job %s cannot be watched: %s", store.job_id, error)
        finally:
            del self._keeping[store.job_id]


async def keep(store: JobStore, invoker: Invoker) -> None:
    """Watch a job to its end, or until somebody else owns it."""
    watcher = await Watcher.of_another(store, invoker, invoker.invoke_all)
    async with contextlib.aclosing(watcher):
        while True:
            try:
                watch = await watcher.look()
            except InvocationError as error:
                await store.cancel(JobState.FAILED, failure.cancelled(str(error)))
                continue
            if watch.state is None or not watch.owned:
                return
            if watch.state is not JobState.RUNNING:
                await watcher.retire()
                log.info("job %s has ended as %s without its client", store.job_id, watch.state)
                return
            await asyncio.sleep(watch.pause)
