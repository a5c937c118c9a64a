"""A job of another process, as whoever attaches to it sees it.

Who waits for it watches it as well, and takes it over when its owner is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wukong_async import blocks, failure, wire
from wukong_async import graph as graphs
from wukong_async.blocks import PlanFacts
from wukong_async.errors import JobNotFound, SerializationError, StoreError, StoreLost
from wukong_async.protocol import JobState, Outcome
from wukong_async.scheduler.explained import explained
from wukong_async.scheduler.job import Shared
from wukong_async.scheduler.results import collect, named
from wukong_async.store import MANIFEST, block_name
from wukong_async.watcher import Watcher

log = logging.getLogger("wukong.scheduler")

PAUSE = 1.0
"""Seconds between two looks at a job that has ended."""


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a job is."""

    tasks: int
    passed: int
    """Tasks that are done for good."""
    executors: int
    """Executors that work, or wait to begin."""


class AttachedJob:
    """What can be asked of a job. Every verb raises `JobNotFound` if there is no such job."""

    def __init__(self, shared: Shared, job_id: str) -> None:
        self._shared = shared
        self._store = shared.store(job_id)

    def __repr__(self) -> str:
        return f"<AttachedJob {self._store!r}>"

    async def state(self) -> JobState:
        """Whether it runs, or how it has ended."""
        state, *_ = await self._store.count()
        if state is None:
            raise self._not_found()
        return state

    async def progress(self) -> JobProgress:
        """How far it is."""
        state, *counts = await self._store.count()
        if state is None:
            raise self._not_found()
        return JobProgress(*counts)

    async def cancel(self) -> None:
        """End it, if it runs."""
        reason = failure.cancelled("by a client that attached to it")
        if await self._store.cancel(JobState.CANCELLED, reason) is None:
            raise self._not_found()
        async with contextlib.aclosing(await self._watcher()) as watcher:
            await watcher.look()
            await self._retire(watcher)

    async def result(self) -> Any:
        """Wait for its end: its results, nested like the keys that were asked for.

        Raises
        ------
        SerializationError
            When the requested keys or literals did not pickle, or a result cannot be unpickled.
        Whatever the job has failed with.
        """
        with self._shared.announcements.expect(self._store.job_id) as changed:
            if not await self._store.listen(self._shared.announcements.channel):
                raise self._not_found()
            (stored,) = await self._store.notes("manifest")
            if stored is None:
                raise self._not_found()
            async with contextlib.aclosing(await self._watcher()) as watcher:
                outcome = await self._wait(watcher, changed)
                if outcome.state is None:
                    raise self._not_found()
                try:
                    async with watcher.keeping(PAUSE):
                        values = await self._collect(outcome, stored)
                        name_of = await self._names(outcome)
                finally:
                    await self._retire(watcher)
        if outcome.state is not JobState.DONE:
            raise await explained(outcome.error, name_of, self._shared.invoker)
        return values

    async def _watcher(self) -> Watcher:
        return await Watcher.of_another(self._store, self._shared.invoker, self._shared.fire)

    async def _retire(self, watcher: Watcher) -> None:
        """Let go of the job if it is ours."""
        if watcher.owns:
            try:
                await watcher.retire()
            except StoreError as broken:
                # The result is worth more than this; a proxy will do it, or all of it expires.
                log.warning("%r could not be retired: %s", self._store, broken)

    async def _wait(self, watcher: Watcher, changed: asyncio.Event) -> Outcome:
        watch = await watcher.look(changed)
        changed.set()  # It may have ended before anybody listened.
        return await watcher.wait(changed, watch.pause or PAUSE)

    async def _collect(self, outcome: Outcome, stored: bytes) -> Any:
        if outcome.state is not JobState.DONE:
            return None
        try:
            frame = (await self._store.resolve({MANIFEST: stored}))[MANIFEST]
            if not frame:
                raise StoreLost(f"The store has lost what job {self._store.job_id} was asked for.")
            manifest = await self._shared.in_thread(_manifest, frame)
            if manifest is None:
                raise SerializationError(
                    f"The keys or the literals that job {self._store.job_id} was asked for do not"
                    " pickle, so only its own client can have its results."
                )
            keys, results, constants = manifest
            wanted = results.values()
            values = await collect(
                self._store, outcome, wanted, lambda n: f"number {n}", self._shared.in_thread
            )
        except StoreLost:
            if await self._store.notes("manifest") == [None]:
                raise self._not_found() from None
            raise
        return graphs.nest(keys, named(values, results, constants))

    async def _names(self, outcome: Outcome) -> Any:
        """How the failure calls what it is about: the plan has the names, while it is there."""
        numbers = failure.numbers(outcome.error) if outcome.error else []
        (facts,) = await self._store.notes("facts")
        names = {}
        if numbers and facts:
            starts = PlanFacts.unpack(facts).starts
            wanted = [n for n in numbers if n >= 0]
            for index in {blocks.block_of(starts, n) for n in wanted}:
                (frame,) = await self._store.get([block_name(index)], [1])
                names.update(
                    await self._shared.in_thread(_keys, frame or b"", starts[index], wanted)
                )
        return lambda number: names.get(number, f"number {number}")

    def _not_found(self) -> JobNotFound:
        return JobNotFound(
            f"The store knows of no job {self._store.job_id!r}. Either its own client has its"
            " results and has deleted it, or it has ended longer than wukong.result_ttl ago, or"
            " the id or wukong.redis_endpoints is another."
        )


def _manifest(frame: bytes) -> Any:
    try:
        return wire.loads(frame)
    except (Exception, SystemExit) as error:  # SystemExit would end the loop that hears it.
        raise SerializationError(
            "The keys or the literals that the job was asked for cannot be unpickled here:"
            f" {type(error).__name__}: {error}"
        ) from error


def _keys(frame: bytes, first: int, numbers: Sequence[int]) -> dict[int, str]:
    """The keys of those tasks that are in a block, as far as it can be read here."""
    try:
        programs = blocks.decode(frame, first, 0).programs
        return {n: repr(programs[n].key) for n in numbers if n in programs}
    except Exception:  # It is gone, or needs a module that is not here; there is still the number.
        return {}
