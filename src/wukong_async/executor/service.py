"""What a warm sandbox keeps: a loop, connections, worker threads, and caches keyed by job.

Nothing else survives an invocation. Whatever happens inside one, `handle` returns normally
wherever it can: raising would make Lambda deliver the event again.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import threading
from collections.abc import Sequence
from functools import cache, partial
from typing import Protocol

from wukong_async import wire
from wukong_async.collector import Freezer
from wukong_async.config import Settings
from wukong_async.cores import threads_for, usable_cores
from wukong_async.errors import StoreError, WukongError
from wukong_async.executor.incarnation import Incarnation
from wukong_async.executor.memory import PlanCache, limit_mb
from wukong_async.executor.worker import Worker
from wukong_async.fanout import Fanout
from wukong_async.invocation import PING, Invocation, versions
from wukong_async.invoker import Invoker
from wukong_async.loops import new_event_loop
from wukong_async.policy import Meter
from wukong_async.store import Connections, JobStore

log = logging.getLogger("wukong.executor")

ENDPOINT = "AWS_ENDPOINT_URL_LAMBDA"
"""Set where the function does not run on AWS."""
LONGEST_IMPORT = 10.0
"""Seconds that an earlier invocation's unpickling is waited for."""
NOT_OURS = ("_X_AMZN_", "AWS_LAMBDA_", "_LAMBDA_")
"""Prefixes of the variables that AWS's runtime client sets and deletes for each request."""


class Context(Protocol):
    """The part of Lambda's context object that is used here."""

    aws_request_id: str
    invoked_function_arn: str

    def get_remaining_time_in_millis(self) -> int:
        """Until the invocation is ended."""
        ...


class Service:
    """Runs executors, one invocation after the other."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loop = new_event_loop()
        self._connections: Connections | None = None
        self._invoker: Invoker | None = None
        self._making = asyncio.Lock()
        self._meter = Meter()
        self._fanout = Fanout(settings)
        self.threads = settings.threads_per_executor or threads_for(limit_mb(), usable_cores())
        """Tasks that run at once, if a job does not say otherwise."""
        self._workers = [Worker()]
        self._reader, self._writer = Worker(), Worker()
        self._cache = PlanCache("")
        versions()  # Looks through the installed packages, once: 15 ms that no job has to pay.
        self._environment = _environment()
        self._freezer = Freezer()
        if settings.preload:
            threading.Thread(target=_preload, args=(settings,), daemon=True).start()
        self._directory = os.sep
        with contextlib.suppress(OSError):  # It may have been deleted.
            self._directory = os.getcwd()  # noqa: PTH109 - chdir wants it as it is

    def handle(self, event: object, context: Context) -> dict[str, str]:
        """Lambda's entry point: run one invocation to its end."""
        if event == PING:
            return self._loop.run_until_complete(self._answer_ping())
        self._restore()
        self._freezer.freeze()
        invocation = Invocation.from_event(event)
        return self._loop.run_until_complete(self._handle(invocation, context))

    def close(self) -> None:
        """Let go of everything; for tests, since a sandbox is simply killed."""
        for held in (self._connections, self._invoker):
            if held is not None:
                self._loop.run_until_complete(held.__aexit__(None, None, None))
        for worker in (*self._workers, self._reader, self._writer):
            worker.close()
        self._freezer.close()
        self._loop.close()

    def _restore(self) -> None:
        """Undo what tasks of earlier jobs did to the working directory and the environment."""
        with contextlib.suppress(OSError):
            os.chdir(self._directory)
        now = _environment()
        if now != self._environment:
            for name in now.keys() - self._environment.keys():
                del os.environ[name]
            os.environ.update(self._environment)

    async def _connected(self) -> Connections:
        if self._connections is None:
            settings = self._settings
            connections = Connections(settings.redis_endpoints, settings.store_timeout)
            self._connections = await connections.__aenter__()
        return self._connections

    async def _invoke(self, arn: str, invocations: Sequence[Invocation]) -> None:
        """Invoke this function. Events that cannot be sent are left to the watcher."""
        events = [i.to_json() for i in invocations]
        try:
            invoke_all = partial(self._invoke_all, arn)
            loaded = self._invoker is not None
            await self._fanout.fire(arn, events, invoke_all, loaded=loaded)
        except Exception as error:  # Whatever an import may raise: the work goes on.
            log.warning("%d events were not sent: %s", len(events), wire.text_of(error))

    async def _invoke_all(self, arn: str, events: Sequence[bytes]) -> None:
        """Without the proxy, which spares an executor this import."""
        async with self._making:
            if self._invoker is None:
                await asyncio.to_thread(_load_invoker, self._settings)
                settings = self._settings.replace(
                    function_name=arn,
                    endpoint_url=self._settings.endpoint_url or os.environ.get(ENDPOINT),
                )
                self._invoker = await Invoker(settings).__aenter__()
        await self._invoker.invoke_all(events)

    async def _answer_ping(self) -> dict[str, str]:
        """What is wrong here, if anything."""
        try:
            await (await self._connected()).check()
        except WukongError as error:
            return {"error": str(error)}
        return {}

    async def _handle(self, invocation: Invocation, context: Context) -> dict[str, str]:
        connections = await self._connected()
        # Not interrupted: a module whose import is cut short may never be whole again. Not waited
        # for endlessly: what hangs must not hold up every other job in this sandbox.
        if not await self._reader.settle(LONGEST_IMPORT):
            self._reader.abandon(interrupt=False)
            gc.enable()  # It may hang while the collector is paused.
        if self._cache.job_id != invocation.job_id:
            self._cache = PlanCache(invocation.job_id)
            self._meter.doubt()
        incarnation = Incarnation(
            invocation,
            JobStore(connections, invocation.job_id),
            self._cache,
            self._workers,
            self._reader,
            self._writer,
            context.aws_request_id,
            context.get_remaining_time_in_millis() / 1000,
            partial(self._invoke, context.invoked_function_arn),
            self._meter,
            self.threads,
        )
        try:
            reason = await incarnation.run()
        except StoreError as error:
            log.warning("executor %s gives up: %s", invocation.executor, error)
            return {"executor": invocation.executor, "exit": "UNREACHABLE"}
        finally:
            for worker in (*self._workers, self._writer):
                if worker.busy:
                    worker.abandon()  # A task that nobody wants any more still computes.
        return {"executor": invocation.executor, "exit": reason.value}


def _preload(settings: Settings) -> None:
    _load_invoker(settings)
    gc.collect()  # Now, and not in the middle of a job: see `Freezer`.


@cache
def _load_invoker(settings: Settings) -> None:
    """Have in memory what it takes to invoke somebody: that takes a second, most of it imports.

    Once. Whoever comes while it is under way does it again, which does no harm.
    """

    async def make() -> None:
        async with Invoker(settings):
            """The description of the service is in memory now."""

    with contextlib.suppress(Exception):  # What is wrong is said when somebody is invoked.
        asyncio.run(make())


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(NOT_OURS)}
