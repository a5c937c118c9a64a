"""The life of a job, as its client sees it.

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
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Hashable,
    Iterator,
    Mapping,
    Sequence,
)
from functools import partial
from itertools import chain, islice, pairwise
from typing import Any, Protocol, TypeAlias, TypeVar

from wukong_async import failure, wire
from wukong_async import graph as graphs
from wukong_async.blocks import block_of, first_blocks
from wukong_async.config import Settings, is_nearby
from wukong_async.engine import LOAD_AHEAD
from wukong_async.errors import StoreError, StoreLost, StoreUnreachable
from wukong_async.graph import Request
from wukong_async.invocation import Hints, versions
from wukong_async.invoker import Invoker
from wukong_async.loops import sending_after
from wukong_async.policy import NEARBY, is_sound, remembered
from wukong_async.protocol import JobState, Outcome, Status
from wukong_async.scheduler.explained import explained
from wukong_async.scheduler.results import collect, named
from wukong_async.scheduler.upload import Upload
from wukong_async.store import JobStore, NewJob, block_name
from wukong_async.watcher import Watcher

T = TypeVar("T")
Batch: TypeAlias = list[tuple[str, wire.Segments]]
log = logging.getLogger("wukong.scheduler")

UNSTARTED = 60
"""How often an executor that never began is invoked again. With a grace that doubles up to eight
times over, that is more than an hour for the default of 10 s: it may wait for a free sandbox."""

FEW = 10_000
"""Tasks whose first executors are found on the loop."""
LAST_WORD = 1.0
"""Seconds to cancel a job when one of its servers does not answer."""


class Wakes(Protocol):
    """What wakes those who wait for jobs."""

    channel: str

    def expect(self, job_id: str) -> contextlib.AbstractContextManager[asyncio.Event]:
        """An event that is set whenever the job should be looked at. Enter before `create`."""


class Shared(Protocol):
    """What the jobs of a process have in common."""

    @property
    def announcements(self) -> Wakes:
        """What wakes them."""

    @property
    def invoker(self) -> Invoker:
        """Who knows the function."""

    def store(self, job_id: str) -> JobStore:
        """What the store has of a job."""

    async def fire(self, events: Sequence[bytes]) -> None:
        """Send events."""

    async def in_thread(self, work: Callable[..., T], *args: Any) -> T:
        """Do CPU work off the loop."""


class Job:
    """The life of one job; of a second one where the store loses the first."""

    def __init__(self, shared: Shared, settings: Settings) -> None:
        self._shared = shared
        self._settings = settings
        self._in_thread = shared.in_thread
        self.invocations = 0
        self._begin()

    def _begin(self) -> None:
        self.job_id = secrets.token_hex(10)
        self.created = False
        self._store = self._shared.store(self.job_id)
        self._watcher = Watcher(self._store, self._shared.invoker, self._shared.fire)

    async def run(
        self, make: Callable[[], Request | None], annotations: Mapping[str, object]
    ) -> tuple[Any, Outcome] | None:
        """What is requested, nested like its keys, and how the job has ended.

        Parameters
        ----------
        make
            CPU work that leads to the request. If it leads to none, neither does this.
        """
        prepare = partial(_prepare, make, self._settings, annotations)
        request, upload = await self._in_thread(prepare)
        if request is None or upload is None:
            return None
        if len(upload.plan):
            values, outcome = await self.compute(upload, request.keys)
        else:
            values, outcome = upload.constants, Outcome(JobState.DONE)
        return request.finish(graphs.nest(request.keys, values)), outcome

    async def compute(self, upload: Upload, keys: Any) -> tuple[dict[Hashable, Any], Outcome]:
        """`run`, once there is a plan."""
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
            raise await explained(outcome.error, upload.name, self._shared.invoker)
        return named(values, upload.results, upload.constants), outcome

    async def _run_once(self, upload: Upload, keys: Any) -> tuple[dict[int, Any], Outcome]:
        """From upload to clean-up: the results by number, and how it ended."""
        with self._shared.announcements.expect(self.job_id) as changed:
            async with self._cleaned_up():
                manifest, rest = await self._upload(upload, keys)
                pause = min(self._settings.lease, self._settings.grace) / 2
                async with contextlib.aclosing(self._watcher) as watcher:
                    try:
                        await self._start(upload, manifest, rest)
                        outcome = await watcher.wait(changed, pause, self._settings.job_timeout)
                    finally:
                        self.invocations += watcher.invocations
                if outcome.state is None:
                    raise StoreLost(f"The store has lost job {self.job_id} while it ran.")
                async with watcher.keeping(pause):
                    wanted = upload.results.values()
                    values = await collect(
                        self._store, outcome, wanted, upload.name, self._in_thread
                    )
                return values, outcome

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
        state = JobState.FAILED if isinstance(error, Exception) else JobState.CANCELLED
        reason = failure.cancelled(str(error) if state is JobState.FAILED else "by its client")
        try:
            if isinstance(error, StoreUnreachable):
                # Perhaps it is another server that is silent. What is left there expires.
                async with asyncio.timeout(LAST_WORD):
                    await self._store.cancel(state, reason)
                return
            # A `create` on its way may arrive after the first time; after the second, it cannot.
            for _ in range(2):
                await self._store.cancel(state, reason)
                if await self._forget():
                    return
        except (StoreError, TimeoutError) as broken:
            why = str(broken) or "its server does not answer"
            log.warning("job %s could not be cancelled: %s", self.job_id, why)

    async def _forget(self) -> bool:
        """Whether there is nothing more to be done: the job does not run."""
        try:
            return await self._store.finish()
        except StoreError as broken:
            # The caller's result or error is worth more than this; what is left expires.
            log.warning("job %s could not be cleaned up: %s", self.job_id, broken)
            return True

    # Start ------------------------------------------------------------------------------------

    async def _upload(self, upload: Upload, keys: Any) -> tuple[bytes, Batch]:
        """What is there before the job is; its manifest, and what has to be put yet."""
        ttl = self._settings.ttl
        self._store.bucket = upload.bucket
        clock = asyncio.get_running_loop().time
        due = clock() + ttl / 3

        async def keep() -> None:
            nonlocal due
            if clock() > due:
                await self._store.extend(ttl)
                due = clock() + ttl / 3

        # What is remembered comes while the first batch is serialised.
        async with _meanwhile(self._store.open(ttl, ["", *upload.names()])) as opening:
            await asyncio.sleep(0)  # First of all it is sent: the thread has Python to itself then.
            manifest, batches, batch = await self._in_thread(_begin_batches, upload, keys)
            found = await opening
        seen = {name: figures for name, figures in found.items() if is_sound(name, figures)}
        if "" not in seen and all(map(is_nearby, self._settings.redis_endpoints)):
            seen[""] = remembered({}, NEARBY)[""]
        upload.seen = seen
        while batch and not upload.is_serialised:
            await keep()
            # The next one is serialised while this one is on its way. Where that fails, the thread
            # may still be at it, and whoever comes next begins anew.
            async with _meanwhile(
                self._in_thread(next, batches, None), to_its_end=True
            ) as following:
                if await self._store.put(batch, ttl) is not Status.OK:
                    raise self._lost_early()
                batch = await following
        await keep()
        return manifest, batch or []

    async def _start(self, upload: Upload, manifest: bytes, rest: Batch) -> None:
        # Of many tasks that takes seconds, of a few less than a thread.
        many = len(upload.plan) > FEW
        groups = await self._in_thread(upload.groups) if many else upload.groups()
        records = [(str(index), leaves) for index, leaves in enumerate(groups)]
        # Events are got ready while the job is created, and leave when it is.
        async with _meanwhile(self._create(upload, manifest, records, rest)) as creating:
            await asyncio.sleep(0)  # First of all that is sent.
            with sending_after(creating):
                await self._watcher.invoke(*self._first_events(upload, records))
            await creating

    async def _create(
        self,
        upload: Upload,
        manifest: bytes,
        records: Sequence[tuple[str, Sequence[int]]],
        rest: Batch,
    ) -> None:
        settings = self._settings
        status = await self._store.create(
            NewJob(
                tasks=len(upload.plan),
                want=len(upload.plan.requested),
                channel=self._shared.announcements.channel,
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
            ),
            rest,
        )
        if status is not Status.OK:
            raise self._lost_early()
        self.created = True

    def _first_events(
        self, upload: Upload, records: Sequence[tuple[str, Sequence[int]]]
    ) -> tuple[list[str], dict[str, Hints]]:
        """The first executors, and what they are told."""
        # Each with the range of the plan up to the leaves of the next one.
        most = self._settings.max_concurrency
        bounds = [0, *(group[0] for _, group in records[1:]), len(upload.plan)]
        ahead = {name: first_blocks(upload.starts, group[:LOAD_AHEAD]) for name, group in records}
        mine = block_of(upload.starts, bounds[1] - 1) + 1
        carried = dict(islice(upload.first.items(), mine))
        ahead["0"] = tuple(index for index in ahead["0"] if block_name(index) not in carried)
        alone = len(records) == 1
        # Each of them sees all slots that are free, and may fill its part of them.
        room = None if alone else max(0, most - len(records)) // len(records)
        # They are sent one by one.
        now, pause = time.time(), upload.costs.invoke
        hints = {
            name: Hints(
                now + index * pause, first, until, alone=alone, blocks=ahead[name], room=room
            )
            for index, ((name, _), (first, until)) in enumerate(
                zip(records, pairwise(bounds), strict=True)
            )
        }
        hints["0"] = hints["0"].carrying(carried, upload.secret)
        return list(hints), hints

    def _lost_early(self) -> StoreLost:
        return StoreLost(
            f"The store has lost job {self.job_id} while it was uploaded. {failure.WHY_LOST}"
        )


def _prepare(
    make: Callable[[], Request | None], settings: Settings, annotations: Mapping[str, object]
) -> tuple[Request | None, Upload | None]:
    request = make()
    if request is None:
        return None, None
    return request, Upload.prepare(request.graph, graphs.flat(request.keys), settings, annotations)


def _begin_batches(upload: Upload, keys: Any) -> tuple[bytes, Iterator[Batch], Batch | None]:
    """What `_upload` is through with as one step: the manifest, all to put, the first of it."""
    manifest, objects = upload.manifest(keys)
    batches = chain([objects] if objects else [], upload.batches())
    return manifest, batches, next(batches, None)


@contextlib.asynccontextmanager
async def _meanwhile(
    work: Coroutine[Any, Any, T], *, to_its_end: bool = False
) -> AsyncIterator[asyncio.Task[T]]:
    """Do `work` beside the body. If that fails it is cancelled, or else waited for."""
    task = asyncio.create_task(work)
    try:
        yield task
    except BaseException:
        if not to_its_end:
            task.cancel()
        raise
    finally:
        await asyncio.wait([task])
        task.cancelled() or task.exception()


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
