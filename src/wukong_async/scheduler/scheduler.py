"""Runs jobs: what a client holds open, and the life of each job.

A job goes through plan → upload → create → invoke → wait → collect → finish. Whatever ends it, its
keys are deleted before the caller hears of it; a job that is still running is cancelled first.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Self, TypeVar

from wukong_async import failure
from wukong_async import graph as graphs
from wukong_async.config import Settings
from wukong_async.errors import (
    ClientStateError,
    StoreError,
    StoreFull,
    StoreLost,
    StoreUnreachable,
)
from wukong_async.invocation import versions
from wukong_async.invoker import Invoker
from wukong_async.protocol import JobState, Outcome, Status
from wukong_async.proxy import FrameError, ProxyClient
from wukong_async.scheduler.announcements import Announcements
from wukong_async.scheduler.explained import explained
from wukong_async.scheduler.results import collect, named
from wukong_async.scheduler.upload import Upload
from wukong_async.store import Connections, JobStore, NewJob
from wukong_async.watcher import Watcher

T = TypeVar("T")
log = logging.getLogger("wukong.scheduler")

UNSTARTED = 60
"""How often an executor that never began is invoked again. With a grace that doubles up to eight
times over, that is more than an hour for the default of 10 s: it may wait for a free sandbox."""


@dataclass(frozen=True, slots=True)
class JobSummary:
    """What a job took. Counts come from the store."""

    job_id: str
    tasks: int
    invocations: int
    """Events sent for it, repetitions included."""
    begins: int
    """Executors that began, revived ones counted again."""
    commits: int
    seconds: float
    """Wall time from the call to the results."""


@dataclass(frozen=True, slots=True)
class Options:
    """What holds for one call."""

    annotations: Mapping[str, object]
    """Of tasks that have none of their own."""
    job_timeout: float | str | None = None
    """Instead of the setting, unless it is None."""


class Scheduler:
    """Everything that jobs share: connections, announcements, the invoker."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Not the loop's own threads: callers may fill those with blocking calls of `get`.
        self._threads = ThreadPoolExecutor(thread_name_prefix="wukong-plan")
        self.connections = Connections(settings.redis_endpoints, settings.store_timeout)
        self.announcements = Announcements(self.connections)
        self.invoker = Invoker(settings)
        self._proxy = ProxyClient(settings) if settings.proxy_address else None
        self._stack = contextlib.AsyncExitStack()
        self._jobs: set[_Job] = set()
        self._running: set[asyncio.Task[Any]] = set()
        self._closing = False

    def __repr__(self) -> str:
        return f"<Scheduler on {self.connections!r}, {len(self._jobs)} jobs running>"

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self.connections)
            await self.connections.check()
            await stack.enter_async_context(self.announcements)
            await stack.enter_async_context(self.invoker)
            await self.invoker.check()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)
        await self._stack.aclose()
        self._threads.shutdown(wait=False)

    async def in_thread(self, work: Callable[..., T], *args: Any) -> T:
        """Do CPU work off the loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(work, *args))

    async def fire(self, events: Sequence[bytes]) -> None:
        """Send events; many at once through the proxy, where there is one."""
        if self._proxy is not None and len(events) > self.settings.max_task_fanout:
            try:
                await self._proxy.fire(events)
            except (OSError, FrameError) as error:
                log.warning("invoking without the proxy: %s", error)
            else:
                return
        await self.invoker.invoke_all(events)

    @property
    def jobs(self) -> tuple[str, ...]:
        """The jobs that run now."""
        return tuple(job.job_id for job in tuple(self._jobs) if job.created)

    async def run(self, graph: object, keys: Any, options: Options) -> tuple[Any, JobSummary]:
        """Compute keys of a Dask graph: their values, nested like them, and what it took.

        Raises
        ------
        wukong_async.errors.WukongError
            See its tree; or whatever a task raised.
        """
        started = time.perf_counter()
        settings = self.settings
        if options.job_timeout is not None:
            settings = settings.replace(job_timeout=options.job_timeout)
        job = _Job(self, settings)
        self._jobs.add(job)
        try:
            values, outcome = await self.supervise(job.run(graph, keys, options.annotations))
        finally:
            self._jobs.discard(job)
        summary = JobSummary(
            job.job_id,
            outcome.tasks,
            job.invocations,
            outcome.begins,
            outcome.commits,
            time.perf_counter() - started,
        )
        return graphs.nest(keys, values), summary

    async def supervise(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, which ends with the scheduler at the latest.

        Raises
        ------
        ClientStateError
            When it was the scheduler that ended it.
        """
        # A task of its own, so that closing can end it without cancelling its caller.
        running = asyncio.create_task(work, name="wukong-job")
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        try:
            return await running
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if self._closing and not (me and me.cancelling()):
                raise ClientStateError("The client was closed while it computed.") from None
            raise


class _Job:
    """The life of one job; of a second one where the store loses the first."""

    def __init__(self, scheduler: Scheduler, settings: Settings) -> None:
        self._scheduler = scheduler
        self._settings = settings
        self._in_thread = scheduler.in_thread
        self.invocations = 0
        self._begin()

    def _begin(self) -> None:
        self.job_id = secrets.token_hex(10)
        self.created = False
        self._store = JobStore(self._scheduler.connections, self.job_id)
        self._watcher = Watcher(self._store, self._scheduler.invoker, self._scheduler.fire)

    async def run(
        self, graph: object, keys: Any, annotations: Mapping[str, object]
    ) -> tuple[dict[Hashable, Any], Outcome]:
        flat = graphs.flat(keys)
        upload = await self._in_thread(Upload.prepare, graph, flat, self._settings, annotations)
        if not len(upload.plan):
            return upload.constants, Outcome(JobState.DONE)
        try:
            values, outcome = await self._run_once(upload, keys)
            lost = None
            if outcome.state is JobState.FAILED and failure.is_loss(outcome.error):
                lost = str(failure.rebuild(outcome.error, upload.name))
        except StoreLost as error:
            lost = str(error)
        if lost is not None:
            log.warning("job %s is run once more: %s", self.job_id, lost)
            self._begin()
            values, outcome = await self._run_once(upload, keys)
        if outcome.state is not JobState.DONE:
            # Out here: what a task has raised may look like an error of ours, and be handled so.
            raise await explained(outcome.error, upload.name, self._scheduler.invoker)
        return named(values, upload.results, upload.constants), outcome

    async def _run_once(self, upload: Upload, keys: Any) -> tuple[dict[int, Any], Outcome]:
        """From upload to clean-up: the results by number, and how it ended."""
        with self._scheduler.announcements.expect(self.job_id) as changed:
            async with self._cleaned_up():
                manifest = await self._upload(upload, keys)
                async with contextlib.aclosing(self._watcher) as watcher:
                    try:
                        await self._start(upload, manifest)
                        pause = min(self._settings.lease, self._settings.grace) / 2
                        outcome = await watcher.wait(changed, pause, self._settings.job_timeout)
                    finally:
                        self.invocations += watcher.invocations
                if outcome.state is None:
                    raise StoreLost(f"The store has lost job {self.job_id} while it ran.")
                return await collect(self._store, outcome, upload.name, self._in_thread), outcome

    @contextlib.asynccontextmanager
    async def _cleaned_up(self) -> AsyncIterator[None]:
        """Leave nothing behind, and nothing running, however the body ends."""
        try:
            yield
        except BaseException as error:
            await _uninterrupted(self._abandon(error))
            raise
        await _uninterrupted(self._forget())

    async def _abandon(self, error: BaseException) -> None:
        """The body failed or was cancelled: end the job if it still runs, and forget it."""
        if isinstance(error, StoreUnreachable):
            return  # Nothing can be said to the store; what is left there expires.
        state = JobState.FAILED if isinstance(error, Exception) else JobState.CANCELLED
        reason = str(error) if state is JobState.FAILED else "by its client"
        try:
            if isinstance(error, StoreFull):
                await self._store.release()
            await self._store.cancel(state, failure.cancelled(reason))
        except StoreError as broken:
            log.warning("job %s could not be cancelled: %s", self.job_id, broken)
        else:
            await self._forget()

    async def _forget(self) -> None:
        try:
            await self._store.finish()
        except StoreError as broken:
            # The caller's result or error is worth more than this; what is left expires.
            log.warning("job %s could not be cleaned up: %s", self.job_id, broken)

    # Start ------------------------------------------------------------------------------------

    async def _upload(self, upload: Upload, keys: Any) -> bytes:
        """Everything that is there before the job is; its manifest."""
        ttl = self._settings.ttl
        await self._store.open(ttl)
        manifest, objects = await self._in_thread(upload.manifest, keys)
        batches = chain([objects] if objects else [], upload.batches())
        while batch := await self._in_thread(next, batches, None):
            if await self._store.put(batch, ttl) is not Status.OK:
                raise self._lost_early()
        return manifest

    async def _start(self, upload: Upload, manifest: bytes) -> None:
        settings = self._settings
        groups = upload.plan.groups(settings.max_concurrency)
        records = [(str(index), leaves) for index, leaves in enumerate(groups)]
        status = await self._store.create(
            NewJob(
                tasks=len(upload.plan),
                want=len(upload.plan.requested),
                channel=self._scheduler.announcements.channel,
                slots=settings.max_concurrency,
                lease=settings.lease,
                grace=settings.grace,
                attempts=settings.max_attempts,
                unstarted=UNSTARTED,
                ttl=settings.ttl,
                facts=upload.facts.pack(),
                values=upload.values,
                records=records,
                timeout=settings.job_timeout,
                owner=self._watcher.owner,
                result_ttl=settings.result_ttl,
                manifest=manifest,
                versions=json.dumps(dict(versions())).encode(),
            )
        )
        if status is not Status.OK:
            raise self._lost_early()
        self.created = True
        await self._watcher.invoke([executor for executor, _ in records])

    def _lost_early(self) -> StoreLost:
        return StoreLost(
            f"The store has lost job {self.job_id} while it was uploaded. {failure.WHY_LOST}"
        )


async def _uninterrupted(work: Any) -> None:
    """Await `work` to its end, even if this task is cancelled meanwhile; then be cancelled."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                break
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled
