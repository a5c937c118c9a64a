"""One invocation of an executor: the shell around the engine.

The engine decides; this carries out. Each action is a task of one TaskGroup that ends by telling
the engine what came of it. The engine and the books of this class are touched on the event loop
only. Tasks of the graph run in the one worker thread, which owns `values` while it runs: the loop
then only adds what was fetched. Leases are renewed from the loop meanwhile. So nothing is unpickled
on it either: even a small object may import a library for seconds.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from traceback import FrameSummary
from typing import Any, Literal, TypeVar

import dask._task_spec

from wukong_async import blocks, failure, wire
from wukong_async.blocks import PlanFacts, Program
from wukong_async.config import Settings
from wukong_async.engine import (
    Action,
    Begin,
    Delete,
    Drop,
    Engine,
    Exit,
    Fetch,
    Load,
    Publish,
    Run,
    Send,
    Step,
)
from wukong_async.errors import SerializationError, StoreFull, WukongError
from wukong_async.executor.memory import PlanCache
from wukong_async.executor.worker import Worker
from wukong_async.invocation import Invocation, mismatch, versions
from wukong_async.loops import plain
from wukong_async.protocol import Begun, Payload, Status
from wukong_async.store import JobStore, block_name, commit_body, payload
from wukong_async.store.job import BATCH_BYTES

T = TypeVar("T")

BLOCK_BYTES = Settings.block_size
"""What a block of the plan is reckoned with: the default."""
COMMIT_BYTES = 16 * 1024 * 1024
"""Inline values of one commit; the others go to the data shards, or a wide round of small outputs
would be one script argument of gigabytes."""
OURS = (str(Path(__file__).parents[1]), dask._task_spec.__file__)
"""Where the frames live that stand above a task's own in its traceback."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A task, or the pickling of its output, raised."""

    task: int
    error: BaseException
    tries: int = 1


class TookTooLong(Exception):
    """What a try of a task ends with when its time is over."""

    def __init__(self, seconds: float, stack: Sequence[FrameSummary]) -> None:
        super().__init__(seconds, stack)
        self.seconds = seconds
        self.stack = stack


class Incarnation:
    """An executor from `begin` to its exit."""

    def __init__(
        self,
        invocation: Invocation,
        store: JobStore,
        cache: PlanCache,
        worker: Worker,
        request_id: str,
    ) -> None:
        self._invocation = invocation
        self._executor = invocation.executor
        self._store = store
        self._cache = cache
        self._worker = worker
        # Apart, so that a limited task begins when it is submitted, and holds nothing else up.
        self._limited = Worker()
        self._request_id = request_id
        self._engine = Engine()
        self._nonce = secrets.token_hex(8)
        self._values: dict[int, Any] = {}
        self._payloads: dict[int, Payload] = {}
        self._error = b""
        self._stop = threading.Event()
        self._wake = asyncio.Event()
        self._work: Future[Any] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._facts = PlanFacts((), 0, 0, 0.0)

    def __repr__(self) -> str:
        return f"<Incarnation {self._executor} of {self._store.job_id}: {self._engine!r}>"

    @property
    def busy(self) -> bool:
        """Whether the worker thread still computes."""
        return self._work is not None and not self._work.done()

    async def run(self) -> Status:
        """Live. Returns why it ended.

        Raises
        ------
        wukong_async.errors.StoreUnreachable
        """
        try:
            async with asyncio.TaskGroup() as group:
                reason = await self._obey(group)
                self._stop.set()
                for task in self._tasks:
                    task.cancel()
        except BaseExceptionGroup as many:
            raise plain(many) from None
        finally:
            self._stop.set()
            self._limited.close()
            # The cancelled tasks' tracebacks lead back here: without this, the values of a finished
            # job stay in the warm sandbox until the cycle collector comes by.
            self._tasks.clear()
            self._values = {}
            self._payloads.clear()
            if not self.busy:
                self._work = None
        return reason

    async def _obey(self, group: asyncio.TaskGroup) -> Status:
        while True:
            self._wake.clear()
            for action in self._engine.next_actions():
                match action:
                    case Exit(reason):
                        return reason
                    case Begin():
                        begun = await self._store.begin(self._executor, self._nonce)
                        self._begun(group, begun)
                    case Delete(objects):
                        await self._store.delete(objects)
                    case Drop(objects):
                        for number in objects:
                            self._values.pop(number, None)
                    case _:
                        self._start(group, action)
            await self._wake.wait()

    def _start(self, group: asyncio.TaskGroup, action: Action) -> None:
        task = group.create_task(self._perform(action))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _perform(self, action: Action) -> None:
        match action:
            case Load(tasks):
                await self._load(tasks)
            case Fetch(objects):
                await self._fetch(objects)
            case Run(steps):
                await self._run(steps)
            case Publish(tasks):
                await self._publish(tasks)
            case Send(sequence, commit):
                body = commit_body(commit, self._payloads, self._error)
                self._payloads.clear()
                reply = await self._store.commit(
                    self._executor, self._engine.generation, sequence, body
                )
                self._engine.replied(reply)
        self._wake.set()

    # Life -------------------------------------------------------------------------------------

    def _begun(self, group: asyncio.TaskGroup, begun: Begun) -> None:
        self._engine.begun(begun)
        self._wake.set()
        if begun.status is not Status.OK:
            return
        difference = mismatch(self._invocation.versions, versions())
        if difference:
            self._fail(failure.versions_differ(difference))
            return
        self._facts = PlanFacts.unpack(begun.facts)
        renewal = group.create_task(self._renew(begun.lease / 3))
        self._tasks.add(renewal)

    async def _renew(self, pause: float) -> None:
        while True:
            await asyncio.sleep(pause)
            status = await self._store.renew(self._executor, self._engine.generation)
            if status is not Status.OK:
                self._stopped(status)
                return

    def _stopped(self, status: Status) -> None:
        self._stop.set()
        self._engine.stopped(status)
        self._wake.set()

    def _fail(self, blob: bytes) -> None:
        if not self._error:
            self._error = blob
            self._stop.set()
            self._engine.failed()

    # Reading ----------------------------------------------------------------------------------

    async def _load(self, tasks: Sequence[int]) -> None:
        starts = self._facts.starts
        wanted = dict.fromkeys(blocks.block_of(starts, task) for task in tasks)
        missing = [index for index in wanted if self._cache.block(index) is None]
        frames = await self._store.get(
            [block_name(i) for i in missing], [BLOCK_BYTES] * len(missing)
        )
        for index, frame in zip(missing, frames, strict=True):
            if frame is None:
                self._fail(failure.input_lost([]))
                return
            try:
                block = await asyncio.to_thread(blocks.decode, frame, starts[index])
            except blocks.Unreadable as error:
                self._fail(self._unreadable("plan", error))
                return
            self._cache.add_block(index, block)
        for index in wanted:
            found = self._cache.block(index)
            assert found is not None
            self._engine.loaded(found.specs)

    async def _fetch(self, objects: Sequence[int]) -> None:
        sizes: dict[int, int] = {}
        for number in objects:
            cached = self._cache.literal(number) if number < 0 else None
            if cached is not None:
                sizes[number], self._values[number] = cached
        missing = [number for number in objects if number not in sizes]
        frames = await self._store.read(missing) if missing else {}
        lost = [number for number, frame in frames.items() if frame is None]
        if lost:
            self._fail(failure.input_lost(lost))
            return
        try:
            decoded = await asyncio.to_thread(_decode, frames)
        except blocks.Unreadable as error:
            self._fail(self._unreadable("value", error))
            return
        for number, (size, value) in decoded.items():
            sizes[number], self._values[number] = size, value
            if number < 0:
                self._cache.add_literal(number, size, value)
        self._engine.fetched(sizes)

    def _unreadable(self, what: Literal["plan", "value"], error: blocks.Unreadable) -> bytes:
        cause = error.__cause__ or error
        return failure.unreadable(what, error.number, cause, **self._told_by())

    def _task_failed(self, failed: Failed) -> bytes:
        task, error = failed.task, failed.error
        told_by = {"tries": failed.tries, **self._told_by()}
        if isinstance(error, TookTooLong):
            return failure.task_timed_out(task, error.seconds, error.stack, **told_by)
        return failure.task_failed(task, error, **told_by)

    def _told_by(self) -> dict[str, Any]:
        return {
            "hidden": lambda filename: filename.startswith(OURS),
            "request_id": self._request_id,
            "executor": self._executor,
        }

    # Running ----------------------------------------------------------------------------------

    async def _run(self, steps: Sequence[Step]) -> None:
        if self._cache.programs[steps[0].task].limits.timeout is None:
            failed = await self._in_worker(
                partial(_run_steps, steps, self._cache, self._values, self._stop)
            )
        else:
            (step,) = steps
            failed = await self._run_limited(step)
        if failed is None:
            self._engine.ran()
        else:
            self._fail(self._task_failed(failed))

    async def _run_limited(self, step: Step) -> Failed | None:
        """Run a task whose time is limited, each try in a thread that can be abandoned."""
        task, drops = step
        program = self._cache.programs[task]
        for tries in count(1):
            if self._stop.is_set():
                return None
            # Of its own, since a thread that is abandoned may go on for a while.
            values = {number: self._values[number] for number in program.sources}
            error = await self._try_limited(task, program, values)
            if error is None:
                self._values[task] = values[task]
                for number in drops:
                    del self._values[number]
                return None
            if not _again(program, tries, error):
                return Failed(task, error, tries)
        raise AssertionError

    async def _try_limited(
        self, task: int, program: Program, values: dict[int, Any]
    ) -> BaseException | None:
        seconds = program.limits.timeout
        assert seconds is not None
        work = self._limited.submit(partial(_try, task, program, values))
        try:
            await asyncio.wait([asyncio.wrap_future(work)], timeout=seconds)
            return work.result() if work.done() else TookTooLong(seconds, self._limited.stack())
        finally:
            if not work.done():
                self._limited.abandon()

    async def _in_worker(self, work: Callable[[], T]) -> T:
        """Run `work` in the worker thread, and remember whether the thread is still at it."""
        future = self._work = self._worker.submit(work)
        done: T = await asyncio.wrap_future(future)
        self._work = None  # What it made must not be held by its future as well.
        return done

    async def _publish(self, tasks: Sequence[int]) -> None:
        """Serialise and store outputs, a batch at a time, so that the frames never pile up."""
        rest = list(tasks)
        room = COMMIT_BYTES
        writer = f"{self._executor}-{self._engine.generation}"
        while rest and not self._stop.is_set():
            made = await self._in_worker(
                partial(_encode, rest, self._values, self._facts, writer, room, self._stop)
            )
            if isinstance(made, Failed):
                self._fail(self._task_failed(made))
                return
            payloads, objects = made
            self._payloads.update(payloads)
            room = max(0, room - sum(len(p.inline) for p in payloads.values()))
            rest = [task for task in rest if task not in payloads]
            try:
                if objects and await self._store.put(objects, self._facts.ttl) is not Status.OK:
                    self._stopped(Status.CLOSED)
                    return
            except StoreFull as error:
                self._fail(failure.store_full(str(error)))
                return
        self._engine.published()


def _decode(frames: dict[int, bytes | None]) -> dict[int, tuple[int, Any]]:
    """Sizes and values. Takes the frames out one by one: both at once may be more than there is."""
    values = {}
    for number in list(frames):
        frame = frames.pop(number)
        assert frame is not None
        try:
            values[number] = len(frame), wire.loads(frame)
        except BaseException as error:  # Whatever an import or a `__setstate__` may raise.
            raise blocks.Unreadable(number) from error
    return values


def _run_steps(
    steps: Sequence[Step], cache: PlanCache, values: dict[int, Any], stop: threading.Event
) -> Failed | None:
    """Run tasks one after the other, until one fails or nobody wants them any more."""
    programs = cache.programs
    for task, drops in steps:
        program = programs[task]
        for tries in count(1):
            if stop.is_set():
                return None
            error = _try(task, program, values)
            if error is None:
                break
            if not _again(program, tries, error):
                return Failed(task, error, tries)
        for number in drops:
            del values[number]
    return None


def _try(task: int, program: Program, values: dict[int, Any]) -> BaseException | None:
    """Run a task once, and add its output to `values`; or what it has raised."""
    try:
        values[task] = program.run(values)
    except BaseException as error:  # sys.exit() in a task fails the task, not the sandbox.
        return error
    return None


def _again(program: Program, tries: int, error: BaseException) -> bool:
    """Whether a task that has failed is run again."""
    return tries <= program.limits.retries and isinstance(error, Exception)


def _encode(
    tasks: Sequence[int],
    values: dict[int, Any],
    facts: PlanFacts,
    writer: str,
    room: int,
    stop: threading.Event,
) -> tuple[dict[int, Payload], list[tuple[str, wire.Segments]]] | Failed:
    """Serialise outputs until there is a batch to write; `room` bytes of them may go inline."""
    payloads: dict[int, Payload] = {}
    objects: list[tuple[str, wire.Segments]] = []
    waiting = 0
    for task in tasks:
        if stop.is_set():
            break
        try:
            segments = wire.dumps(values[task])
        except BaseException as error:
            explained = SerializationError(
                f"The output of this task has to travel, but does not pickle: {error}"
            )
            explained.__cause__ = error.__cause__ if isinstance(error, WukongError) else error
            return Failed(task, explained)
        payloads[task], parts = payload(
            task,
            segments,
            writer=writer,
            inline_limit=min(facts.inline_limit, room),
            part_size=facts.part_size,
        )
        room = max(0, room - len(payloads[task].inline))
        # In one piece here, in the worker thread, and not on the loop where it is written.
        objects += [(name, [wire.join(part)]) for name, part in parts]
        waiting += wire.size(segments) if parts else 0
        if waiting > BATCH_BYTES:
            break
    return payloads, objects
