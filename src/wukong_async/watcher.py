"""Watching a job: whoever has fallen silent is invoked again, and nothing of the job expires.

A job is watched by its client, by whoever has attached to it, and by a proxy once its client is
gone: by any number of them at once, as the store decides whose turn it is to do what. One of them
owns the job and cleans up behind it; a watcher takes over from an owner that has fallen silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Self

from wukong_async import failure
from wukong_async.blocks import PlanFacts, block_of
from wukong_async.errors import FunctionNotFound, InvocationError, StoreError
from wukong_async.invocation import Hints, Invocation, versions
from wukong_async.invoker import Invoker
from wukong_async.loops import times_cancelled
from wukong_async.protocol import JobState, Outcome, Watch
from wukong_async.store import JobStore, block_name

log = logging.getLogger("wukong.watcher")

SLACK = 0.01
"""Seconds after its limit at which a job is looked at: the server counts whole milliseconds."""


class Watcher:
    """Watches one job. `aclose` it in the end.

    Parameters
    ----------
    fire
        Sends events.
    speaks
        The versions that the job's client has, which an executor compares with its own.
    """

    def __init__(
        self,
        store: JobStore,
        invoker: Invoker,
        fire: Callable[[Sequence[bytes]], Awaitable[None]],
        speaks: Mapping[str, str] | None = None,
    ) -> None:
        self.owner = secrets.token_hex(8)
        """The token under which it owns the job, if it does."""
        self.owns = False
        self.invocations = 0
        """Events sent, repetitions included."""
        self._store = store
        self._invoker = invoker
        self._fire = fire
        self._versions = speaks or versions()
        self._ping: asyncio.Task[str | None] | None = None

    @classmethod
    async def of_another(
        cls,
        store: JobStore,
        invoker: Invoker,
        fire: Callable[[Sequence[bytes]], Awaitable[None]],
    ) -> Self:
        """A watcher of a job that another process has created."""
        (spoken,) = await store.notes("versions")
        return cls(store, invoker, fire, json.loads(spoken) if spoken else None)

    def __repr__(self) -> str:
        return f"<Watcher of {self._store!r}{' owns it' if self.owns else ''}>"

    async def aclose(self) -> None:
        """Let go; the job goes on."""
        ping, self._ping = self._ping, None
        if ping is not None:
            ping.cancel()
            await asyncio.gather(ping, return_exceptions=True)

    async def invoke(
        self, executors: Sequence[str], hints: Mapping[str, Hints] | None = None
    ) -> None:
        """Tell executors to look at their records."""
        job_id, speaks, told = self._store.job_id, self._versions, hints or {}
        events = [Invocation(job_id, x, speaks, told.get(x)).to_json() for x in executors]
        self.invocations += len(events)
        await self._fire(events)

    async def retire(self) -> None:
        """Let go of a job that has ended: what is kept of it is said in `JobStore.retire`."""
        error, facts = await self._store.notes("error", "facts")
        named = failure.numbers(error) if error else []
        plan = PlanFacts.unpack(facts) if facts else None
        starts = plan.starts if plan else []
        self._store.bucket = plan.bucket if plan else ""
        # They know the names of the tasks that the failure is about.
        await self._store.retire({block_name(block_of(starts, n)) for n in named if n >= 0})

    @contextlib.asynccontextmanager
    async def keeping(self, pause: float) -> AsyncIterator[None]:
        """Keep a job that has ended while the body reads its results, however long that takes.

        Parameters
        ----------
        pause
            Seconds between two looks.
        """
        keeping = asyncio.create_task(self._keep(pause), name="wukong-keeping")
        try:
            yield
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])

    async def _keep(self, pause: float) -> None:
        while not times_cancelled():
            await asyncio.sleep(pause)
            with contextlib.suppress(StoreError):  # The body meets it as well.
                await self._touch()

    async def _touch(self) -> Watch:
        """Say to the store that the job is watched, which keeps all of it from expiring."""
        watch = await self._store.watch(self.owner)
        self.owns = watch.owned
        if watch.extended:
            await self._store.extend(watch.extended)
        return watch

    async def wait(
        self, changed: asyncio.Event, pause: float, timeout: float | None = None
    ) -> Outcome:
        """Until the job is over: `changed` makes it fast, the looks make it certain.

        Parameters
        ----------
        pause
            Seconds between two looks.
        timeout
            Seconds in which the job's time is over, if they are known.

        Raises
        ------
        InvocationError
            The function does not run.
        """
        loop = asyncio.get_running_loop()
        due = loop.time() + pause
        limit = math.inf if timeout is None else loop.time() + timeout + SLACK
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(min(due, limit)):
                    await changed.wait()
            if changed.is_set():
                changed.clear()
                outcome = await self._store.outcome()
                if outcome.state is not JobState.RUNNING:
                    return outcome
            # However often it is woken: a connection that flaps must not put off the watcher.
            if loop.time() >= min(due, limit):
                if loop.time() >= limit:
                    limit = math.inf
                due = loop.time() + pause
                if (await self.look(changed)).state is not JobState.RUNNING:
                    changed.set()
            self._hear_ping()

    async def look(self, changed: asyncio.Event | None = None) -> Watch:
        """One look at the job: keep it, and revive whoever has fallen silent.

        Parameters
        ----------
        changed
            Set when there is something to be heard of a ping.

        Raises
        ------
        InvocationError
            The function does not run.
        """
        self._hear_ping()
        watch = await self._touch()
        if watch.state is not JobState.RUNNING:
            return watch
        if not await self._store.is_open():
            await self._store.cancel(JobState.FAILED, failure.data_lost("its mark on a server"))
            return dataclasses.replace(watch, state=JobState.FAILED)
        if watch.unheard and self._ping is None:
            # Lost, queued behind other work, or does the function not start at all?
            self._ping = asyncio.create_task(self._invoker.ping(), name="wukong-ping")
            if changed is not None:
                self._ping.add_done_callback(lambda _: changed.set())
        if watch.revived:
            log.warning(
                "job %s: no word from %d executors; invoking them again",
                self._store.job_id,
                len(watch.revived),
            )
            try:
                await self.invoke(watch.revived)
            except InvocationError as error:
                # The next look tries again; how often is bounded in the store.
                log.warning("job %s: %s", self._store.job_id, error)
        return watch

    def _hear_ping(self) -> None:
        if self._ping is None or not self._ping.done():
            return
        ping, self._ping = self._ping, None
        try:
            wrong = ping.result()
        except FunctionNotFound:
            raise
        except InvocationError as error:
            log.warning("job %s: %s", self._store.job_id, error)
            return
        if wrong is not None:
            raise InvocationError(
                f"The function {self._invoker.function_name!r} is invoked, but does not run:"
                f" {wrong}"
            )
