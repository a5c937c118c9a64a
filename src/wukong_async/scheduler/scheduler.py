"""Runs jobs: what a client holds open for all of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeVar

from wukong_async.config import Settings
from wukong_async.errors import ClientStateError
from wukong_async.fanout import Fanout
from wukong_async.graph import Request
from wukong_async.invoker import Invoker
from wukong_async.scheduler.announcements import Announcements
from wukong_async.scheduler.job import Job
from wukong_async.store import Connections, JobStore

T = TypeVar("T")


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
    executor_memory_mb: int
    """Memory that any of its executors has had, at the most, as far as it was measured."""
    store_peak_bytes: int
    """Values outside of the metadata that were kept at the same time, at the most."""


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
        self._fanout = Fanout(settings)
        self._stack = contextlib.AsyncExitStack()
        self._jobs: set[Job] = set()
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
        try:
            if self._running:
                await asyncio.wait(self._running)
        finally:
            await self._stack.aclose()
            self._threads.shutdown(wait=False)

    def store(self, job_id: str) -> JobStore:
        """What the store has of a job."""
        return JobStore(self.connections, job_id)

    async def in_thread(self, work: Callable[..., T], *args: Any) -> T:
        """Do CPU work off the loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(_contained, work, *args))

    async def fire(self, events: Sequence[bytes]) -> None:
        """Send events; many at once through the proxy, where there is one."""
        function = self.settings.function_name
        await self._fanout.fire(function, events, self.invoker.invoke_all)

    @property
    def jobs(self) -> tuple[str, ...]:
        """The jobs that run now."""
        return tuple(job.job_id for job in tuple(self._jobs) if job.created)

    async def run(
        self, make: Callable[[], Request | None], options: Options
    ) -> tuple[Any, JobSummary] | None:
        """Compute what is requested: what it is, and what it took.

        Parameters
        ----------
        make
            CPU work that leads to the request. If it leads to none, neither does this.

        Raises
        ------
        wukong_async.errors.WukongError
            See its tree; or whatever a task raised.
        """
        started = time.perf_counter()
        settings = self.settings
        if options.job_timeout is not None:
            settings = settings.replace(job_timeout=options.job_timeout)
        job = Job(self, settings)
        self._jobs.add(job)
        try:
            made = await self.supervise(job.run(make, options.annotations))
        finally:
            self._jobs.discard(job)
        if made is None:
            return None
        values, outcome = made
        summary = JobSummary(
            job.job_id,
            outcome.tasks,
            job.invocations,
            outcome.begins,
            outcome.commits,
            time.perf_counter() - started,
            outcome.memory,
            outcome.peak,
        )
        return values, summary

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


def _contained(work: Callable[..., T], *args: Any) -> T:
    try:
        return work(*args)
    except StopIteration as error:  # A future does not take it: whoever awaits would never hear.
        raise RuntimeError("StopIteration was raised where a graph was read") from error
