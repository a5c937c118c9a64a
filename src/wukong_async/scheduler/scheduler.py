"""Runs jobs: what a client holds open, and the life of each job.

A job goes through plan → upload → create → invoke → wait → collect → finish. Whatever ends it, its
keys are deleted before the caller hears of it; a job that is still running is cancelled first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeVar

from wukong_async import failure, wire
from wukong_async.config import Settings
from wukong_async.errors import (
    ClientStateError,
    FunctionNotFound,
    InvocationError,
    SerializationError,
    StoreError,
    StoreFull,
    StoreLost,
    StoreUnreachable,
)
from wukong_async.invocation import Invocation
from wukong_async.invoker import Invoker
from wukong_async.protocol import JobState, Outcome, Status
from wukong_async.proxy import FrameError, ProxyClient
from wukong_async.scheduler.announcements import Announcements
from wukong_async.scheduler.explained import explained
from wukong_async.scheduler.upload import Upload
from wukong_async.store import Connections, JobStore, NewJob

T = TypeVar("T")
log = logging.getLogger("wukong.scheduler")

UNSTARTED = 60
"""How often an executor that never began is invoked again. With a grace that doubles up to eight
times over, that is more than an hour for the default of 10 s: it may wait for a free sandbox."""
LARGE = 1_000_000
"""Results of more bytes than this are unpickled off the loop."""


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


class Scheduler:
    """Everything that jobs share: connections, announcements, the invoker."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Not the loop's own threads: callers may fill those with blocking calls of `get`.
        self._threads = ThreadPoolExecutor(thread_name_prefix="wukong-plan")
        self.connections = Connections(settings.redis_endpoints, settings.store_timeout)
        self._announcements = Announcements(self.connections)
        self._invoker = Invoker(settings)
        self._proxy = ProxyClient(settings) if settings.proxy_address else None
        self._stack = contextlib.AsyncExitStack()
        self._jobs: set[asyncio.Task[tuple[dict[Hashable, Any], Outcome]]] = set()
        self._closing = False

    def __repr__(self) -> str:
        return f"<Scheduler on {self.connections!r}, {len(self._jobs)} jobs running>"

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self.connections)
            await self.connections.check()
            await stack.enter_async_context(self._announcements)
            await stack.enter_async_context(self._invoker)
            await self._invoker.check()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        for job in self._jobs:
            job.cancel()
        if self._jobs:
            await asyncio.wait(self._jobs)
        await self._stack.aclose()
        self._threads.shutdown(wait=False)

    async def in_thread(self, work: Callable[..., T], *args: Any) -> T:
        """Do CPU work off the loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(work, *args))

    async def run(
        self, graph: object, keys: Sequence[Hashable], annotations: Mapping[str, object]
    ) -> tuple[dict[Hashable, Any], JobSummary]:
        """Compute `keys` of a Dask graph: the value of each, and what it took.

        `annotations` hold for tasks without their own.

        Raises
        ------
        wukong_async.errors.WukongError
            See its tree; or whatever a task raised.
        """
        started = time.perf_counter()
        job = _Job(self, secrets.token_hex(10))
        # A task of its own, so that closing can end it without cancelling its caller.
        running = asyncio.create_task(
            job.run(graph, keys, annotations), name=f"wukong-job-{job.job_id}"
        )
        self._jobs.add(running)
        running.add_done_callback(self._jobs.discard)
        try:
            values, outcome = await running
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if self._closing and not (me and me.cancelling()):
                raise ClientStateError("The client was closed while it computed.") from None
            raise
        summary = JobSummary(
            job.job_id,
            outcome.tasks,
            job.invocations,
            outcome.begins,
            outcome.commits,
            time.perf_counter() - started,
        )
        return values, summary


class _Job:
    """The life of one job."""

    def __init__(self, scheduler: Scheduler, job_id: str) -> None:
        self.job_id = job_id
        self.invocations = 0
        self._settings = scheduler.settings
        self._in_thread = scheduler.in_thread
        self._announcements = scheduler._announcements
        self._invoker = scheduler._invoker
        self._proxy = scheduler._proxy
        self._store = JobStore(scheduler.connections, job_id)
        self._ping: asyncio.Task[str | None] | None = None

    async def run(
        self, graph: object, keys: Sequence[Hashable], annotations: Mapping[str, object]
    ) -> tuple[dict[Hashable, Any], Outcome]:
        upload = await self._in_thread(Upload.prepare, graph, keys, self._settings, annotations)
        if not len(upload.plan):
            return _literals(upload, keys), Outcome(JobState.DONE)
        with self._announcements.expect(self.job_id) as changed:
            async with self._cleaned_up():
                await self._upload(upload)
                await self._start(upload)
                try:
                    outcome = await self._wait(changed)
                finally:
                    await self._end_ping()
                values = await self._collect(upload, outcome)
        if outcome.state is not JobState.DONE:
            # Out here: what a task has raised may look like an error of ours, and be handled so.
            raise await explained(outcome.error, upload.name, self._invoker)
        number = upload.plan.numbers
        outputs = upload.graph.outputs
        found = _literals(upload, keys)
        found.update((k, values[number[outputs[k]]]) for k in keys if outputs[k] in number)
        return found, outcome

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

    async def _upload(self, upload: Upload) -> None:
        ttl = self._settings.ttl
        await self._store.open(ttl)
        batches = upload.batches()
        while batch := await self._in_thread(next, batches, None):
            await self._store.put(batch, ttl)

    async def _start(self, upload: Upload) -> None:
        settings = self._settings
        groups = upload.plan.groups(settings.max_concurrency)
        records = [(str(index), leaves) for index, leaves in enumerate(groups)]
        status = await self._store.create(
            NewJob(
                tasks=len(upload.plan),
                want=len(upload.plan.requested),
                channel=self._announcements.channel,
                slots=settings.max_concurrency,
                lease=settings.lease,
                grace=settings.grace,
                attempts=settings.max_attempts,
                unstarted=UNSTARTED,
                ttl=settings.ttl,
                facts=upload.facts.pack(),
                values=upload.values,
                records=records,
            )
        )
        if status is not Status.OK:
            raise StoreLost(f"The store lost job {self.job_id} while it was uploaded.")
        await self._invoke([executor for executor, _ in records])

    async def _invoke(self, executors: Sequence[str]) -> None:
        events = [Invocation(self.job_id, x).to_json() for x in executors]
        self.invocations += len(events)
        if self._proxy is not None and len(events) > self._settings.max_task_fanout:
            try:
                await self._proxy.fire(events)
            except (OSError, FrameError) as error:
                log.warning("job %s invokes without the proxy: %s", self.job_id, error)
            else:
                return
        await self._invoker.invoke_all(events)

    # Watch ------------------------------------------------------------------------------------

    async def _wait(self, changed: asyncio.Event) -> Outcome:
        """Until the job is over. Announcements make it fast, the ticks make it certain."""
        tick = min(self._settings.lease, self._settings.grace) / 2
        loop = asyncio.get_running_loop()
        due = loop.time() + tick
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await changed.wait()
            if changed.is_set():
                changed.clear()
                outcome = await self._store.outcome()
                if outcome.state is None:
                    raise StoreLost(f"The store has lost job {self.job_id} while it ran.")
                if outcome.state is not JobState.RUNNING:
                    return outcome
            if self._ping is not None and self._ping.done():
                self._hear_ping(self._ping)
            # However often it is woken: a connection that flaps must not put off the watcher.
            if loop.time() >= due:
                due = loop.time() + tick
                await self._look(changed)

    async def _look(self, changed: asyncio.Event) -> None:
        """A watcher's tick: revive whoever has fallen silent."""
        watch = await self._store.watch()
        if watch.state is not JobState.RUNNING:
            changed.set()
            return
        if watch.extended:
            await self._store.extend(self._settings.ttl)
        if watch.unheard and self._ping is None:
            # Lost, queued behind other work, or does the function not start at all?
            self._ping = asyncio.create_task(self._invoker.ping(), name="wukong-ping")
            self._ping.add_done_callback(lambda _: changed.set())
        if watch.revived:
            log.warning(
                "job %s: no word from %d executors; invoking them again",
                self.job_id,
                len(watch.revived),
            )
            try:
                await self._invoke(watch.revived)
            except InvocationError as error:
                # The next tick tries again; how often is bounded in the store.
                log.warning("job %s: %s", self.job_id, error)

    def _hear_ping(self, ping: asyncio.Task[str | None]) -> None:
        self._ping = None
        try:
            wrong = ping.result()
        except FunctionNotFound:
            raise
        except InvocationError as error:
            log.warning("job %s: %s", self.job_id, error)
            return
        if wrong is not None:
            raise InvocationError(
                f"The function {self._settings.function_name!r} is invoked, but does not run:"
                f" {wrong}"
            )

    async def _end_ping(self) -> None:
        ping, self._ping = self._ping, None
        if ping is not None:
            ping.cancel()
            await asyncio.gather(ping, return_exceptions=True)

    # End --------------------------------------------------------------------------------------

    async def _collect(self, upload: Upload, outcome: Outcome) -> dict[int, Any]:
        if outcome.state is not JobState.DONE:
            return {}
        frames = await self._store.resolve(outcome.results)
        lost = [task for task, frame in frames.items() if frame is None]
        if lost:
            raise StoreLost(
                f"The store has lost the result {upload.name(lost[0])} of job {self.job_id}."
                f" {failure.WHY_LOST}"
            )
        if sum(len(frame) for frame in frames.values() if frame) > LARGE:
            return await self._in_thread(_unpickle, frames, upload)
        return _unpickle(frames, upload)


def _literals(upload: Upload, keys: Sequence[Hashable]) -> dict[Hashable, Any]:
    """Requested keys that need no computation."""
    literals, outputs = upload.graph.literals, upload.graph.outputs
    return {key: literals[outputs[key]] for key in keys if outputs[key] in literals}


def _unpickle(frames: dict[int, bytes | None], upload: Upload) -> dict[int, Any]:
    values = {}
    for task in list(frames):
        frame = frames.pop(task)
        assert frame is not None
        try:
            values[task] = wire.loads(frame)
        except (Exception, SystemExit) as error:  # SystemExit would end the loop that hears it.
            raise SerializationError(
                f"The result of task {upload.name(task)} cannot be unpickled here:"
                f" {type(error).__name__}: {error}"
            ) from error
    return values


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
