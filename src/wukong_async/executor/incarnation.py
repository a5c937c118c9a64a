"""One invocation of an executor: the shell around the engine.

The engine decides; this carries out. Each action is a task of one TaskGroup that ends by telling
the engine what came of it. The engine and the books of this class are touched on the event loop
only. Tasks of the graph run in worker threads, one for each Run in flight. They all look things up
in `values`, and add outputs; the loop adds what was fetched, and drops what no Run reads. With one
thread that one drops outputs itself. Leases are renewed from the loop meanwhile. So nothing is
unpickled on it either: even a small object may import a library for seconds. One more thread does
that, and another one pickles: what others wait for does not wait for a task that runs.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from traceback import FrameSummary, clear_frames
from typing import Any, Literal, NamedTuple, TypeVar

import dask._task_spec

from wukong_async import blocks, failure, wire
from wukong_async.blocks import Block, Limits, PlanFacts, Recipe
from wukong_async.compression import Compression
from wukong_async.config import Settings
from wukong_async.engine import (
    FETCH_BYTES,
    LOAD_AHEAD,
    Action,
    Begin,
    Delete,
    Drop,
    Engine,
    Exit,
    Fetch,
    Invoke,
    InvokeAgain,
    Load,
    Publish,
    Run,
    Send,
    State,
    Step,
)
from wukong_async.errors import BucketError, SerializationError, StoreFull, WukongError
from wukong_async.executor.memory import (
    GLANCE,
    MB,
    SMALL,
    SMALL_SIZE,
    Memory,
    PlanCache,
    Values,
    goes_once,
    limit_mb,
    resident_mb,
    size_of,
)
from wukong_async.executor.worker import Worker
from wukong_async.invocation import Hints, Invocation, mismatch, versions
from wukong_async.last_words import LastWords
from wukong_async.loops import plain
from wukong_async.policy import LASTING, Meter, Policy, Running, news_of, recalled, waited_in
from wukong_async.protocol import AHEAD_MOST, Begun, Commit, Payload, Status, child_name
from wukong_async.store import JobStore, block_name, commit_body, payload
from wukong_async.store.job import BATCH_BYTES

T = TypeVar("T")
log = logging.getLogger("wukong.executor")

BLOCK_BYTES = Settings.block_size
"""What a block of the plan is reckoned with: the default."""
LEAST_METERED = 1024 * 1024
"""Bytes whose way tells the bandwidth; with fewer, most of the time is not the way."""
UNLIKELY = 4
"""A start that takes as many times as long as others counts as no more than that."""
LEAST_TRIP = 20e-6
"""Seconds that anything takes at the least."""
LONGEST_START = 60.0
"""Seconds from an event to the first task; what took longer was queued, or is another clock's."""
COMMIT_BYTES = 16 * 1024 * 1024
"""Inline values of one commit; the others go to the data shards, or a wide round of small outputs
would be one script argument of gigabytes."""
FETCH_SHARE = 8
"""Inputs are read ahead into this part of the function's memory, at most."""
MOST_PARCELED = 64
"""Tasks of a group whose inputs may go along with the event."""
SPILL_LEAST = 0.1
"""As a share of the function's memory, what values have to take for it to help to forget them."""
MOST_AT_ONCE = 64
"""Outputs of a few bytes that are pickled on the loop, at most."""
LEAST_PAUSE = 0.0005
"""Seconds between two looks of the policy."""
LEAST_RUN = 0.001
"""Seconds that a Run is worth: handing it to the thread takes a twentieth of that."""
TICK = 1.0
"""Seconds between two renewals, at most: so soon an executor hears that its job is over."""
HAND_OVER_SHARE, HAND_OVER_MOST = 0.2, 30.0
"""What is left of the function's time, as a share and in seconds, when an executor starts nothing
more; when half of that is gone it gives up what still runs."""
IMPORT_PAUSES = (0.05, 0.2, 1.0)
"""Seconds to wait for another thread that imports the same modules."""
HALF_DONE = (ImportError, AttributeError)
"""What a module that another thread is importing leads to."""
STARVED = "it has not come to run anything"
OURS = (str(Path(__file__).parents[1]), dask._task_spec.__file__)
"""Where the frames live that stand above a task's own in its traceback."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A task, or the pickling of its output, raised."""

    task: int
    error: BaseException
    tries: int = 1
    again: bool = False
    """It is to be tried again, with what this try may have used up made new."""
    pause: float = 0.0
    """Seconds to wait before that."""


class Invited(NamedTuple):
    """What an executor is told that takes over a group, if it is accepted."""

    first: int
    until: int
    """The tasks of the plan that go with it, first and last + 1."""
    blocks: tuple[int, ...]
    """Those of its first tasks."""
    parcel: Mapping[str, bytes]
    """Small inputs, by name."""


class TookTooLong(Exception):
    """What a try of a task ends with when its time is over."""

    def __init__(
        self,
        seconds: float | None,
        stack: Sequence[FrameSummary],
        *,
        begun: bool = True,
        along: Sequence[int] = (),
    ) -> None:
        super().__init__(seconds, stack)
        self.seconds = seconds
        """Its limit; None if it is the executor whose time is over."""
        self.stack = stack
        self.begun = begun
        """Not if its thread was busy with something else all the time."""
        self.along = along
        """Tasks that had to run in the same time."""


@dataclass(slots=True, eq=False)
class Progress:
    """How far a Run has come; its worker thread writes it, the loop reads it."""

    steps: Sequence[Step]
    slot: int = 0
    """Which of the worker threads is its own."""
    running: asyncio.Future[Any] | None = None
    """What the loop waits for, while a thread is at it."""
    resident: int = 0
    """MB of memory that there were before, if tasks of the name have not been seen; else 0."""
    ran: int = 0
    starts: list[float] = field(default_factory=list)
    """When each of those that have run was begun, in the try that went well, and"""
    ends: list[float] = field(default_factory=list)
    """When each of those that have run was through, by the monotonic clock."""
    sizes: list[int] = field(default_factory=list)
    """Bytes of their outputs."""
    tries: Counter[int] = field(default_factory=Counter)
    """How often tasks have failed."""
    half_done: Counter[int] = field(default_factory=Counter)
    """How often they have met modules that another thread was importing."""
    failed: Failed | None = None
    """The last try of the task that runs now."""
    began: float = math.inf
    """When the thread came to it, by the monotonic clock."""
    late: float = math.inf
    """When what is behind the running task has waited for it for too long."""
    closed: bool = False
    """The loop does not wait for it any more."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def first(self) -> int:
        """What the engine knows the Run by."""
        return self.steps[0].task

    @property
    def task(self) -> int | None:
        """What runs now."""
        ran = self.ran  # Once: the thread goes on meanwhile.
        return self.steps[ran].task if ran < len(self.steps) else None

    @property
    def since(self) -> float:
        """When that was begun, by the monotonic clock; infinite if its thread is not there yet."""
        return self.ends[-1] if self.ends else self.began

    @property
    def is_begun(self) -> bool:
        """Whether the thread has come to it."""
        return self.running is not None and self.began < math.inf

    def judge(self, program: Recipe, task: int, error: BaseException, *, half_done: bool) -> Failed:
        """What is made of a try that has failed; `half_done`: it met a module in that state."""
        if half_done and self.half_done[task] < len(IMPORT_PAUSES):
            # Not the task's fault: see `_patiently`.
            pause = IMPORT_PAUSES[self.half_done[task]]
            self.half_done[task] += 1
            self.failed = Failed(task, error, self.tries[task], again=True, pause=pause)
        else:
            self.tries[task] += 1
            tries = self.tries[task]
            again = tries <= program.limits.retries and isinstance(error, Exception)
            self.failed = Failed(task, error, tries, again)
        return self.failed


class Incarnation:
    """An executor from `begin` to its exit.

    Parameters
    ----------
    workers
        Threads for tasks. Where there have to be more, they are added.
    remaining
        Seconds until the function's time is over.
    invoke
        Sends events; it does not matter whether they arrive. With none of them it gets ready to,
        which takes a second.
    meter
        What sharing costs here.
    threads
        How many tasks run at once, if the job does not say otherwise.
    """

    def __init__(
        self,
        invocation: Invocation,
        store: JobStore,
        cache: PlanCache,
        workers: list[Worker],
        reader: Worker,
        writer: Worker,
        request_id: str,
        remaining: float,
        invoke: Callable[[Sequence[Invocation]], Awaitable[None]],
        meter: Meter,
        threads: int = 1,
    ) -> None:
        self._invocation = invocation
        self._meter = meter
        self._executor = invocation.executor
        self._store = store
        self._cache = cache
        self._workers = workers
        # One, or modules that import each other would be met half done more often.
        self._reader = reader
        self._writer = writer
        # Apart, so that a limited task begins when it is submitted, and holds nothing else up.
        self._limited: list[Worker] = []
        self._request_id = request_id
        self._remaining = remaining
        self._ends = time.monotonic() + remaining
        self._invoke = invoke
        self._engine = Engine(threads=threads)
        self._nonce = secrets.token_hex(8)
        self._values = Values()
        self._payloads: dict[int, Payload] = {}
        self._error = b""
        self._stop = threading.Event()
        self._pause = threading.Event()
        self._runs: list[Progress] = []
        self._ran = 0
        self._remaking = 0
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._facts = PlanFacts((), (), 0, 0, 0.0)
        self._policy = Policy(meter.costs, {}, inline_limit=0, span=(0, 0), slots=1)
        self._timer: asyncio.TimerHandle | None = None
        self._look = math.inf
        """When it rings."""
        self._invited: Sequence[Invited] = ()
        self._carried: dict[str, wire.Buffer] = {}
        self._came: Sequence[int] = ()
        """Blocks of the plan among those."""
        self._ahead: asyncio.Task[None] | None = None
        self._coming: dict[int, asyncio.Future[None]] = {}
        """Blocks that are being read."""
        self._remembering: asyncio.Task[None] | None = None
        self._known: dict[str, Sequence[float]] = {}
        """What others know of tasks by name."""
        self._busy = 0
        self.idle = 0.0
        """Seconds in which nothing ran, was read, written or asked: none, since nobody waits."""
        self._sent = 0.0
        self._memory = Memory()
        self._spilled = -1

    def __repr__(self) -> str:
        return f"<Incarnation {self._executor} of {self._store.job_id}: {self._engine!r}>"

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
            if self._remembering is not None:
                await asyncio.wait([self._remembering])
            self._stop.set()
            if self._timer is not None:
                self._timer.cancel()
            for worker in self._limited:
                worker.close()
            # The cancelled tasks' tracebacks lead back here: without this, the values of a finished
            # job stay in the warm sandbox until the cycle collector comes by.
            self._tasks.clear()
            self._values.clear()
            self._runs.clear()
            self._payloads.clear()
            self._carried.clear()
        return reason

    async def _obey(self, group: asyncio.TaskGroup) -> Status:
        while True:
            self._wake.clear()
            self._share()
            for action in self._engine.next_actions():
                match action:
                    case Exit(reason):
                        return reason
                    case Begin():
                        self._read_ahead(group)
                        started = time.monotonic()
                        begun = await self._store.begin(
                            self._executor, self._nonce, self._request_id
                        )
                        self._saw("round_trip", time.monotonic() - started)
                        self._begun(group, begun)
                    case Delete(objects):
                        await self._store.delete(objects)
                    case Drop(objects):
                        self._drop(objects)
                    case Invoke(sequence, offers):
                        group.create_task(self._invoke_children(sequence, offers))
                    case InvokeAgain():
                        await self._invoke_all({self._executor: None})
                    case _:
                        self._start(group, action)
            idle = None if self._busy or self._wake.is_set() else time.monotonic()
            await self._wake.wait()
            if idle is not None:
                self.idle += time.monotonic() - idle

    def _start(self, group: asyncio.TaskGroup, action: Action) -> None:
        self._busy += 1
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
                await self._send(sequence, commit)
        self._busy -= 1
        self._wake.set()

    async def _send(self, sequence: int, commit: Commit) -> None:
        told_so_far, memory = self._engine.told, self._memory.peak
        body = commit_body(commit, self._payloads, self._error, told_so_far, memory)
        generation, inline = self._engine.generation, self._payloads
        invited = [
            Invited(
                *self._policy.span_of(group),
                blocks.first_blocks(self._facts.starts, group[:LOAD_AHEAD]),
                self._parcel(group, inline),
            )
            for group in commit.offers
        ]
        # A result that was published in a commit that passed nothing is announced in a later one.
        kept = self._payloads if commit.stay is None else {}
        told = {task for task, _ in commit.publish} - commit.held
        self._payloads = {t: kept[t] for t in kept if t not in told}
        started = time.monotonic()
        news: Mapping[str, Sequence[float]] = {}
        if commit.stay is not None and (self._remembering is None or self._remembering.done()):
            news = news_of(self._policy.estimates, self._meter, self._known)
        if news:  # At the same time, so that nobody waits for it.
            self._remembering = asyncio.create_task(self._store.remember(news))
            self._known |= news
        reply = await self._store.commit(self._executor, generation, self._nonce, sequence, body)
        now = time.monotonic()
        if len(body) < LEAST_METERED:
            self._saw("round_trip", now - started)
        self._invited = invited
        self._policy.replied(self._engine, commit.offers, reply, now)
        self._engine.replied(reply)

    def _parcel(self, group: Sequence[int], payloads: Mapping[int, Payload]) -> dict[str, bytes]:
        """Small inputs of tasks that are offered, which save whoever takes them a round trip."""
        found: dict[str, bytes] = {}
        for task in group[:MOST_PARCELED]:
            spec = self._engine.spec(task)
            for number in spec.inputs if spec is not None else ():
                payload = payloads.get(number)
                if payload is not None and not payload.place:
                    found[str(number)] = payload.inline
        return found

    async def _invoke_children(self, sequence: int, offers: Sequence[int]) -> None:
        seen = self._policy.seen(time.monotonic())
        hints: dict[str, Hints | None] = {}
        room = self._policy.room_of(self._engine, len(offers))
        for index in offers:
            name = child_name(self._executor, sequence, index)
            hints[name] = None
            if index < len(self._invited):
                first, until, ahead, parcel = self._invited[index]
                told = Hints(time.time(), first, until, seen=seen, room=room, blocks=ahead)
                hints[name] = told.carrying(parcel, self._facts.secret)
        await self._invoke_all(hints)

    async def _invoke_all(self, executors: Mapping[str, Hints | None]) -> None:
        job, client = self._store.job_id, self._invocation.versions
        await self._invoke(
            [Invocation(job, executor, client, hints) for executor, hints in executors.items()]
        )

    # Sharing ----------------------------------------------------------------------------------

    def _share(self) -> None:
        """Say to others what the policy says, if anything, and look again when it wants to."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._look = math.inf
        engine, now = self._engine, time.monotonic()
        if engine.state is not State.WORK:
            return
        again = self._take_back(now)
        sharing = self._policy.look(engine, now, self._now_running())
        if sharing is not None:
            engine.share(sharing.arrive, sharing.probe, sharing.offers, ask=sharing.ask)
        self._look_at(min(again, self._policy.again), now)

    def _look_at(self, when: float, now: float) -> None:
        """Look again then, unless that is to be earlier."""
        if when < self._look:
            self._look = when
            if self._timer is not None:
                self._timer.cancel()
            pause = max(when - now, LEAST_PAUSE)
            self._timer = asyncio.get_running_loop().call_later(pause, self._wake.set)

    def _take_back(self, now: float) -> float:
        """Have ready again what waits behind tasks that take too long; when to look again."""
        again = math.inf
        for progress in self._runs:
            if len(progress.steps) - progress.ran < 2:
                continue
            if now >= progress.late:
                # Not while its thread goes on to the next one; and that is in time then.
                if progress.is_begun and progress.lock.acquire(blocking=False):
                    try:
                        keep = self._engine.take_back(progress.ran + 1, run=progress.first)
                        behind = [task for task, _ in progress.steps[keep:]]
                        progress.steps = progress.steps[:keep]
                    finally:
                        progress.lock.release()
                    self._cache.begun.difference_update(behind)
                progress.late = self._policy.late_at(now)
            again = min(again, progress.late)
        return again

    def _now_running(self) -> Running | None:
        progress = self._longest()
        task = None if progress is None else progress.task
        if progress is None or task is None or not progress.since < math.inf:
            return None
        grown = 0
        if progress.resident and len(self._runs) == 1:  # Else nobody knows whose it is.
            grown = max(0, resident_mb() - progress.resident) * MB
        return Running(task, progress.since, float(grown))

    def _longest(self) -> Progress | None:
        """The Run whose task has run for longest."""
        running = [p for p in self._runs if p.running is not None and p.task is not None]
        return min(running, key=lambda progress: progress.since, default=None)

    def _saw(self, name: str, value: float) -> None:
        self._meter.saw(name, value)
        self._policy.costs = self._meter.costs
        self._engine.run_seconds = max(LEAST_RUN, self._meter.costs.start / 2)

    def _get_policy(self, begun: Begun) -> None:
        """What is known about when to share."""
        hints = self._invocation.hints
        facts = self._facts
        estimates, costs = recalled(facts.seen)
        self._known = dict(facts.seen)
        if costs is not None:
            self._meter.believe(costs)
        if hints is not None:
            self._carried.update(hints.carried(facts.secret))
            self._came = [int(name[1:]) for name in self._carried if name.startswith("b")]
            heard, costs = recalled(hints.seen, LASTING)
            estimates |= heard
            if costs is not None:
                self._meter.believe(costs)
            if begun.generation == 1:
                self._sent = hints.sent
        fresh = hints is not None and begun.generation == 1
        frontier = begun.frontier or (0,)
        self._policy = Policy(
            self._meter.costs,
            estimates,
            inline_limit=facts.inline_limit,
            span=(hints.first, min(hints.until, facts.tasks))
            if hints and fresh
            else (min(frontier), max(frontier) + 1),
            slots=facts.slots,
            alone=hints.alone if hints and fresh else False,
            hold=facts.hold,
            waited=waited_in(hints.seen) if hints is not None else None,
            room=hints.room if hints is not None else None,
            jitter=int(self._nonce, 16) / 16 ** len(self._nonce),
        )
        self._engine.advice = self._policy
        if self._memory.limit:
            self._engine.fetch_bytes = min(FETCH_BYTES, self._memory.limit * MB / FETCH_SHARE)
        self._engine.run_seconds = max(LEAST_RUN, self._meter.costs.start / 2)

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
        threads = self._engine.threads = self._facts.threads or self._engine.threads
        self._workers += [Worker() for _ in range(threads - len(self._workers))]
        self._limited = [Worker() for _ in range(threads)]
        self._get_policy(begun)
        duties = (self._renew(min(begun.lease / 3, TICK)), self._get_ready(), self._hand_over())
        for duty in duties:
            self._tasks.add(group.create_task(duty))

    async def _renew(self, pause: float) -> None:
        while True:
            await asyncio.sleep(pause)
            status = await self._store.renew(
                self._executor, self._engine.generation, self._nonce, self._last_words()
            )
            if status is not Status.OK and self._engine.refused(status):
                self._stop.set()
                self._wake.set()
                return

    def _last_words(self) -> bytes:
        now = time.monotonic()
        longest = self._longest()
        task = None if longest is None else longest.task
        running_for = 0.0 if longest is None else max(0.0, now - longest.since)
        return LastWords(task, running_for, resident_mb(), limit_mb(), self._ends - now).pack()

    async def _get_ready(self) -> None:
        """To invoke somebody, well before it is time to."""
        await asyncio.sleep(self._ends - self._remaining / 2 - time.monotonic())
        await self._invoke([])

    async def _hand_over(self) -> None:
        """Before the function's time is over: leave the rest to another incarnation."""
        margin = min(HAND_OVER_MOST, HAND_OVER_SHARE * self._remaining)
        await asyncio.sleep(self._ends - margin - time.monotonic())
        if not (self._ran or self._runs):
            self._leave(STARVED)  # It has only read: the next one would not come further.
            return
        self._pause.set()
        self._engine.hand_over()
        self._wake.set()
        await asyncio.sleep(margin / 2)
        if self._remaking and not self._stop.is_set():
            self._leave("it still makes again what is lost, or what a task has used up")
        elif any(progress.running is None for progress in self._runs) and not self._stop.is_set():
            self._leave("it still reads again what a task has used up")
        else:
            for progress in self._runs:
                if progress.running is not None:
                    progress.running.cancel()

    def _leave(self, why: str) -> None:
        """End as if crashed, so that it counts as an attempt."""
        log.warning("executor %s leaves: %s", self._executor, why)
        self._stopped(Status.FENCED)

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

    def _read_ahead(self, group: asyncio.TaskGroup) -> None:
        """Ask for the blocks of its first tasks while the record is taken."""
        hints = self._invocation.hints
        wanted = hints.blocks if hints is not None else ()
        missing = [index for index in wanted if self._cache.block(index) is None]
        if missing:
            self._ahead = group.create_task(self._take_along(missing))
            self._tasks.add(self._ahead)

    async def _take_along(self, indexes: Sequence[int]) -> None:
        frames = await self._frames(indexes)
        self._carried.update((block_name(i), f) for i, f in frames.items() if f is not None)

    async def _load(self, tasks: Sequence[int]) -> None:
        starts = self._facts.starts
        wanted = {blocks.block_of(starts, task) for task in tasks}
        along = [*self._along(), *self._following(wanted)]
        # Those that are asked for come first.
        for block in await self._blocks([*tasks, *(starts[i] for i in along if i not in wanted)]):
            self._engine.loaded(block.specs)

    def _along(self) -> list[int]:
        """Blocks that have come along with the event: all are read in one go."""
        came, self._came = self._came, ()
        return [i for i in came if self._cache.block(i) is None and i not in self._coming]

    async def _blocks(self, tasks: Iterable[int], *, anew: bool = False) -> list[Block]:
        """The blocks of these tasks; none if one of them cannot be had, which fails the job."""
        wanted = dict.fromkeys(blocks.block_of(self._facts.starts, task) for task in tasks)
        missing = [index for index in wanted if anew or self._cache.block(index) is None]
        loop = asyncio.get_running_loop()
        mine = {i: loop.create_future() for i in missing if anew or i not in self._coming}
        others = [self._coming[i] for i in missing if i not in mine]
        self._coming.update(mine)
        try:
            if not await self._read_blocks(mine):
                return []
        finally:
            for index, here in mine.items():
                if self._coming.get(index) is here:
                    del self._coming[index]
                if not here.done():
                    here.set_result(None)
        for here in others:
            await here
        found = [self._cache.block(index) for index in wanted]
        there = [block for block in found if block is not None]
        return there if len(there) == len(found) else []

    async def _read_blocks(self, here: Mapping[int, asyncio.Future[None]]) -> bool:
        """Have blocks in the cache, and say of each when it is; whether that worked."""
        # What has come along waits for nothing, and what was asked for ahead not for the rest.
        if not await self._decode_blocks(self._carried_blocks(here), here):
            return False
        rest = [index for index, each in here.items() if not each.done()]
        if self._ahead is not None and rest:
            await self._ahead
            if not await self._decode_blocks(self._carried_blocks(rest), here):
                return False
            rest = [index for index in rest if not here[index].done()]
        return await self._decode_blocks(await self._frames(rest), here)

    def _following(self, wanted: Collection[int]) -> list[int]:
        """Blocks to read along with these: the next ones of whoever reads one after the other."""
        if not wanted or self._cache.block(min(wanted) - 1) is None:
            return []
        starts, last = self._facts.starts, max(wanted)
        return [
            index
            for index in range(last + 1, min(last + 1 + AHEAD_MOST, len(starts)))
            if self._policy.keeps(starts[index])
            and self._cache.block(index) is None
            and index not in self._coming
        ]

    def _carried_blocks(self, indexes: Iterable[int]) -> dict[int, wire.Buffer | None]:
        names = {index: block_name(index) for index in indexes}
        return {i: self._carried.pop(name) for i, name in names.items() if name in self._carried}

    async def _decode_blocks(
        self,
        frames: Mapping[int, wire.Buffer | None],
        here: Mapping[int, asyncio.Future[None]],
    ) -> bool:
        there = [(index, frame) for index, frame in frames.items() if frame is not None]
        if len(there) < len(frames):
            self._fail(failure.input_lost([]))
            return False
        if not there:
            return True
        try:
            decoded = await self._in_reader(partial(_decode_blocks, there, self._facts))
        except blocks.Unreadable as error:
            self._fail(await self._in_reader(partial(self._unreadable, "plan", error)))
            return False
        for (index, _), block in zip(there, decoded, strict=True):
            self._cache.add_block(index, block)
            here[index].set_result(None)
        return True

    async def _frames(self, indexes: Sequence[int]) -> dict[int, wire.Buffer | None]:
        names = list(map(block_name, indexes))
        read = await self._store.get(names, [BLOCK_BYTES] * len(names)) if names else []
        return dict(zip(indexes, read, strict=True))

    async def _fresh(self, tasks: Collection[int]) -> bool:
        """Read again what is to be run, and has been run here before; whether that worked."""
        again = self._cache.begun.intersection(tasks)
        if again and not await self._blocks(again, anew=True):
            return False
        self._cache.begun.update(tasks)
        return True

    async def _fetch(self, objects: Sequence[int]) -> None:
        sizes: dict[int, int] = {}
        for number in objects:
            cached = self._cache.literal(number) if number < 0 else None
            if cached is not None:
                sizes[number], self._values[number] = cached
        missing = [number for number in objects if number not in sizes]
        found, lost = await self._read(missing)
        sizes.update((number, 0) for number in lost if not self._engine.is_needed(number))
        lost = [number for number in lost if number not in sizes]
        if lost:
            log.warning("the store has lost %d objects; they are computed again", len(lost))
            found.update(await self._remake(lost, self._pause))
        literals = [(number, value) for number, (_, value) in found.items() if number < 0]
        if literals:
            for number in await self._in_reader(partial(_lasting, literals)):
                self._cache.add_literal(number, *found[number])
        for number, (size, value) in found.items():
            sizes[number], self._values[number] = size, value
        if sizes.keys() >= set(objects):
            self._engine.fetched(sizes)
            self._check_memory(sum(sizes.values()))

    async def _read(self, objects: Sequence[int]) -> tuple[dict[int, tuple[int, Any]], list[int]]:
        """Objects of the store, as (size, value), and those that it has lost."""
        started = time.monotonic()
        try:
            carried = {n: self._carried.pop(str(n), None) for n in objects}
            asked = [number for number, frame in carried.items() if frame is None]
            frames = await self._store.read(asked) if asked else {}
            frames |= {number: frame for number, frame in carried.items() if frame is not None}
        except BucketError as error:
            self._fail(failure.bucket_refused(str(error)))
            return {}, []
        self._metered(sum(len(frame) for frame in frames.values() if frame), started)
        lost = [number for number, frame in frames.items() if frame is None]
        there = {number: frame for number, frame in frames.items() if frame is not None}
        frames.clear()
        try:
            return await self._in_reader(partial(_decode, there, self._stop)), lost
        except blocks.Unreadable as error:
            self._fail(await self._in_reader(partial(self._unreadable, "value", error)))
            return {}, []

    async def _in_reader(self, work: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._reader.submit(work))

    async def _remake(
        self, lost: Sequence[int], pause: threading.Event, known: Values | None = None
    ) -> dict[int, tuple[int, Any]]:
        """Outputs that are nowhere any more, made again from the plan and what is left of it.

        Nothing of it is told to anybody: for all others the tasks have passed. What cannot be made
        again (a literal, a block of the plan) fails the job.

        Parameters
        ----------
        known
            What is here to make them of.
        """
        progress = Progress(())
        while True:
            values = Values()
            recipes: dict[int, Recipe] = {}
            missing = list(lost)
            while missing:
                if min(missing) < 0:
                    self._fail(failure.input_lost(missing))
                    return {}
                if not await self._blocks(missing):
                    return {}
                recipes.update((task, self._cache.programs[task]) for task in missing)
                sources = {source for task in missing for source in recipes[task].sources}
                sources -= recipes.keys() | values.keys()
                if known is not None:
                    values.update(await self._in_worker(partial(known.lasting, sources)))
                found, missing = await self._read(sorted(sources - values.keys()))
                values.update((number, value) for number, (_, value) in found.items())
                if self._stop.is_set():
                    return {}
            if not await self._fresh(recipes):
                return {}
            # In the order of their numbers, inputs come first.
            progress.steps, progress.ran = [Step(task, ()) for task in sorted(recipes)], 0
            run = partial(_run_steps, progress, self._cache, values, self._stop, pause)
            self._remaking += 1
            failed = await self._in_worker(run)
            self._remaking -= 1
            if failed is None:
                return {task: (0, values[task]) for task in lost if task in values}
            if not failed.again:
                await self._fail_for(failed)
                return {}
            # It may have used up what it was made of: from the beginning.
            await asyncio.sleep(failed.pause)

    def _unreadable(self, what: Literal["plan", "value"], error: blocks.Unreadable) -> bytes:
        cause = error.__cause__ or error
        return failure.unreadable(what, error.number, cause, **self._told_by())

    async def _fail_for(self, failed: Failed) -> None:
        self._stop.set()
        # An exception is pickled, and unpickled to see whether that works.
        self._fail(await self._in_worker(partial(self._task_failed, failed)))

    def _task_failed(self, failed: Failed) -> bytes:
        task, error = failed.task, failed.error
        told_by = {"tries": failed.tries, **self._told_by()}
        if isinstance(error, TookTooLong):
            seconds = error.seconds or self._remaining
            return failure.task_timed_out(task, seconds, error.stack, along=error.along, **told_by)
        return failure.task_failed(task, error, **told_by)

    def _told_by(self) -> dict[str, Any]:
        return {
            "hidden": lambda filename: filename.startswith(OURS),
            "request_id": self._request_id,
            "executor": self._executor,
        }

    # Running ----------------------------------------------------------------------------------

    async def _run(self, steps: Sequence[Step]) -> None:
        progress = Progress(steps, self._free_slot())
        now = time.monotonic()
        progress.late = self._policy.late_at(now)
        if len(steps) > 1:
            self._look_at(progress.late, now)
        self._runs.append(progress)
        if await self._fresh([task for task, _ in steps]):
            await self._run_fresh(progress)
        self._runs.remove(progress)
        self._ran += progress.ran

    def _free_slot(self) -> int:
        """A thread that no Run has; if there is one, one that has nothing else to do either."""
        used = {progress.slot for progress in self._runs}
        free = [slot for slot in range(self._engine.threads) if slot not in used]
        return next((slot for slot in free if not self._workers[slot].busy), free[0])

    @property
    def _finished(self) -> int:
        """Tasks that have run here, and that are not to be run again for what they have lost."""
        return self._ran + sum(progress.ran for progress in self._runs)

    async def _run_fresh(self, progress: Progress) -> None:
        if self._sent:  # What starting an executor takes, all in all.
            latency, self._sent = time.time() - self._sent, 0.0
            if 0 < latency < LONGEST_START:
                # Bounded, since clocks differ, and events may queue for a sandbox.
                self._saw("start", min(latency, UNLIKELY * self._meter.costs.start))
        first = self._engine.spec(progress.first)
        unseen = first is not None and first.name not in self._policy.estimates
        progress.resident = resident_mb() if unseen else 0
        limits = self._cache.programs[progress.first].limits
        if limits.timeout is None:
            failed = await self._run_unlimited(progress)
        else:
            failed = await self._run_limited(progress, limits)
        self._tell_policy(progress)
        self._check_memory(sum(progress.sizes))
        if isinstance(failed, Failed):
            await self._fail_for(failed)
        elif progress.task is None or not self._pause.is_set():
            self._engine.ran(progress.ran, run=progress.first)
        else:
            await self._cut_short(progress, failed)

    def _drop(self, objects: Sequence[int]) -> None:
        """Forget values; in a thread, if tasks have made them: destructors may take their time."""
        dropped = self._values.drop(objects)
        if self._engine.threads > 1:
            self._reader.submit(dropped.clear)

    def _tell_policy(self, progress: Progress) -> None:
        """What has been seen of the tasks that have run."""
        tasks = [step.task for step in progress.steps[: progress.ran]]
        times = zip(progress.starts, progress.ends, strict=False)
        seconds = [end - start for start, end in times]
        if len(seconds) == len(tasks):
            ran = zip(tasks, seconds, progress.sizes, strict=True)
            self._policy.ran(self._engine, ran, time.monotonic())

    def _check_memory(self, grown: float) -> None:
        """Have all values written, and forgotten, if they are too much; they are read again."""
        if self._memory.is_scarce(grown) and self._finished > self._spilled:
            values = list(self._values.values())
            if any(goes_once(value, GLANCE) for value in values):
                return  # An iterator can go to the next task, but not into the store.
            held = sum(map(size_of, values))
            if held > SPILL_LEAST * self._memory.limit * MB and self._engine.spill():
                log.info("executor %s writes what it holds: %d MB", self._executor, held // MB)
                self._spilled = self._finished

    def _metered(self, size: int, started: float) -> None:
        """So many bytes have gone one way since then."""
        if size >= LEAST_METERED:
            self._saw("bandwidth", size / max(time.monotonic() - started, LEAST_TRIP))

    async def _cut_short(self, progress: Progress, late: TookTooLong | None) -> None:
        """The time is over before everything has run."""
        task = progress.task
        assert task is not None
        if (late is None or not late.begun) and progress.failed is None:
            self._engine.ran(progress.ran, run=progress.first)
            return
        programs = self._cache.programs
        found = await self._in_worker(
            partial(
                self._values.spoilt,
                programs[task].sources,
                lambda number: programs[number].sources,
                partial(self._engine.is_only_here, run=progress.first),
            )
        )
        spoilt, rest = found or ([], {})
        self._values.update(rest)
        if self._finished > len(spoilt):
            if found is not None and self._engine.ran(progress.ran, spoilt, run=progress.first):
                self._ran -= len(spoilt)  # Another Run that is cut short has to count without them.
                return
            # Somebody else has read it as well, or it cannot be made of what is here.
            if await self._renewed(task, threading.Event()):
                self._engine.ran(progress.ran, run=progress.first)
            elif not self._stop.is_set():
                self._leave("it cannot make again what a task has used up")
        elif progress.failed is not None and progress.failed.tries:
            # The next incarnation would begin with the first try, and not come further.
            await self._fail_for(progress.failed)
        elif late is not None and progress.began < self._ends - self._remaining / 2:
            # It had all of the function's time, or most of it.
            error = TookTooLong(self._remaining, late.stack, along=spoilt)
            await self._fail_for(Failed(task, error, tries=0))
        else:
            self._leave(STARVED)

    async def _renewed(self, task: int, pause: threading.Event) -> bool:
        """Make new what a try of a task may have used up; whether that worked.

        An iterator goes from task to task like any other value, but only once; and a file may be
        part of the graph.
        """
        if not await self._fresh([task]):
            return False
        sources = self._cache.programs[task].sources
        used = await self._in_worker(partial(self._values.used_up, sources))
        made, lost = await self._read(used) if used else ({}, [])
        if lost:
            made.update(await self._remake(lost, pause, self._values))
        self._values.update((number, value) for number, (_, value) in made.items())
        return made.keys() == set(used)

    async def _tried_again(self, failed: Failed) -> bool:
        """Get ready for another try, if there is to be one, and time for it."""
        if not failed.again or self._pause.is_set():
            return False
        await asyncio.sleep(failed.pause)
        return await self._renewed(failed.task, self._pause)

    async def _run_unlimited(self, progress: Progress) -> Failed | TookTooLong | None:
        """Run tasks in a worker thread.

        One that is given up goes on with the values of all. It adds the output of a task that
        counts as not run, which nobody reads.
        """
        while True:
            run = partial(_run_steps, progress, self._cache, self._values, self._stop, self._pause)
            failed = await self._await(progress, self._workers[progress.slot], run)
            if not isinstance(failed, Failed):
                return failed
            if not await self._tried_again(failed):
                return None if failed.again and self._pause.is_set() else failed

    async def _run_limited(self, progress: Progress, limits: Limits) -> Failed | TookTooLong | None:
        """Run a task whose time is limited, each try in a thread that can be given up."""
        task, drops = progress.steps[0]
        while not (self._stop.is_set() or self._pause.is_set()):
            program = self._cache.programs[task]
            # Of its own, since a thread that is given up may go on for a while.
            values = Values()
            values.update((number, self._values[number]) for number in program.sources)
            progress.began = time.monotonic()
            attempt = partial(_try, task, program, values)
            worker = self._limited[progress.slot]
            error = await self._await(progress, worker, attempt, limits.timeout)
            if error is None:
                self._values.add(task, values[task], program.sources)
                progress.starts.append(progress.began)
                progress.ends.append(time.monotonic())
                progress.sizes.append(size_of(values[task]))
                self._values.drop(drops)
                progress.ran, progress.failed = 1, None
                return None
            if isinstance(error, TookTooLong) and error.seconds is None:
                return error
            failed = progress.judge(program, task, error, half_done=_met_half_done(error))
            if not await self._tried_again(failed):
                return None if failed.again and self._pause.is_set() else failed
        return None

    async def _await(
        self,
        progress: Progress,
        worker: Worker,
        work: Callable[[], T],
        seconds: float | None = None,
    ) -> T | TookTooLong:
        """What `work` makes of it in a thread, if there is time for it."""
        future = worker.submit(work)
        running = progress.running = asyncio.wrap_future(future)
        try:
            await asyncio.wait([running], timeout=seconds)
            if running.done() and not running.cancelled():
                return future.result()
            own = not running.cancelled()
            begun = not future.cancelled()
            return TookTooLong(seconds if own else None, worker.stack(), begun=begun)
        finally:
            progress.running = None
            if not future.done():
                with progress.lock:
                    progress.closed = True
                worker.abandon()

    async def _in_worker(self, work: Callable[[], T]) -> T:
        """What `work` makes of it in a worker thread, or in its successor."""
        me = asyncio.current_task()
        while True:
            # One that has nothing to do, or the first one, when it is through with what it does.
            workers = self._workers
            future = next((w for w in workers if not w.busy), workers[0]).submit(work)
            try:
                return await asyncio.wrap_future(future)
            except asyncio.CancelledError:
                # The thread was given up before it came to this.
                if not future.cancelled() or (me is not None and me.cancelling()):
                    raise

    async def _publish(self, tasks: Sequence[int]) -> None:
        """Serialise and store outputs, a batch at a time, so that the frames never pile up."""
        rest = list(tasks)
        room = COMMIT_BYTES
        compression = Compression(self._facts.compression, self._store.bandwidth)
        while rest and not self._stop.is_set():
            values, facts = self._values, self._facts
            encode = partial(
                _encode, rest, values, facts, self._nonce, room, compression, self._stop
            )
            if len(rest) <= MOST_AT_ONCE and all(type(values.get(task)) in SMALL for task in rest):
                made = encode()  # It takes less than to hand it over.
            else:
                made = await asyncio.wrap_future(self._writer.submit(encode))
            if isinstance(made, Failed) and self._runs:
                # A task may just have read it, and have changed something inside. Behind that task:
                made = await self._in_worker(encode)
            if isinstance(made, Failed):
                await self._fail_for(made)
                return
            payloads, objects = made
            self._payloads.update(payloads)
            room = max(0, room - sum(len(p.inline) for p in payloads.values()))
            rest = [task for task in rest if task not in payloads]
            started = time.monotonic()
            try:
                if objects and await self._store.put(objects, self._facts.ttl) is not Status.OK:
                    self._stopped(Status.CLOSED)
                    return
                self._metered(sum(wire.size(segments) for _, segments in objects), started)
            except StoreFull as error:
                self._fail(failure.store_full(str(error)))
                return
            except BucketError as error:
                self._fail(failure.bucket_refused(str(error)))
                return
        if not rest:  # Else it was stopped, and whoever did that tells the engine.
            self._engine.published()


def _patiently(unpickle: Callable[[], T]) -> T:
    """What `unpickle` makes, whatever other threads import meanwhile.

    Modules that import each other may be seen half done by a thread that comes in from the other
    side: Python prefers that to a deadlock. It is over when the other thread is through.
    """
    for pause in IMPORT_PAUSES:
        try:
            return unpickle()
        except (*HALF_DONE, blocks.Unreadable) as error:
            cause = error.__cause__ if isinstance(error, blocks.Unreadable) else error
            if not isinstance(cause, HALF_DONE) or isinstance(cause, ModuleNotFoundError):
                raise
        time.sleep(pause)
    return unpickle()


def _decode_blocks(
    frames: Sequence[tuple[int, wire.Buffer]], facts: PlanFacts
) -> list[blocks.Block]:
    """Blocks of the plan, given their indexes and frames."""
    return [
        _patiently(partial(blocks.decode, frame, facts.starts[index], facts.edges[index]))
        for index, frame in frames
    ]


def _decode(frames: dict[int, wire.Buffer], stop: threading.Event) -> dict[int, tuple[int, Any]]:
    """Sizes and values. Takes the frames out one by one: both at once may be more than there is."""
    values = {}
    for number in list(frames):
        if stop.is_set():
            break
        frame = frames.pop(number)
        try:
            values[number] = wire.weight(frame), _patiently(partial(wire.loads, frame))
        except BaseException as error:  # Whatever an import or a `__setstate__` may raise.
            raise blocks.Unreadable(number) from error
    return values


def _run_steps(
    progress: Progress,
    cache: PlanCache,
    values: Values,
    stop: threading.Event,
    pause: threading.Event,
) -> Failed | None:
    """Run tasks one after the other, until one fails or there is no more time for them."""
    programs, lock = cache.programs, progress.lock
    clock, stopped, paused = time.monotonic, stop.is_set, pause.is_set
    sizes, starts, ends = progress.sizes, progress.starts, progress.ends
    progress.began = started = clock()
    while progress.ran < len(progress.steps):  # Others may take back the rest.
        task, drops = progress.steps[progress.ran]
        if stopped() or paused():
            return None
        program = programs[task]
        dropped: list[Any] | None = None
        try:
            value = program.run(values)
            if type(value) in SMALL:  # As most are where each microsecond counts.
                values[task], size = value, SMALL_SIZE
            else:
                values.add(task, value, program.sources)
                size = size_of(value)
            del value
        except BaseException as error:  # sys.exit() in a task fails the task, not the sandbox.
            _let_go(error)
            half_done = _met_half_done(error)
            with lock:
                if progress.closed:  # And what the task has raised is our interruption.
                    return None
                return progress.judge(program, task, error, half_done=half_done)
        with lock:
            if progress.closed:
                return None
            if drops:
                dropped = values.drop(drops)
            sizes.append(size)
            starts.append(started)
            started = clock()
            ends.append(started)
            progress.ran += 1
            progress.failed = None
        del dropped  # A destructor of the user's may take its time; the loop takes this lock.
    return None


def _try(task: int, program: Recipe, values: Values) -> BaseException | None:
    """Run a task once, and add its output to `values`; or what it has raised."""
    try:
        values.add(task, program.run(values), program.sources)
    except BaseException as error:  # As above.
        _let_go(error)
        return error
    return None


def _let_go(error: BaseException) -> None:
    """Free what the calls of a failed try hold: the next one needs the room."""
    with suppress(Exception):  # Attributes of exceptions may be the user's.
        _clear_all(error)


def _clear_all(error: BaseException) -> None:
    work: list[BaseException | None] = [error]
    seen: set[int] = set()
    while work:
        each = work.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        clear_frames(each.__traceback__)
        work += (each.__cause__, each.__context__)
        if isinstance(each, BaseExceptionGroup):
            work += each.exceptions


def _met_half_done(error: BaseException | None) -> bool:
    """Whether a task has met a module that another thread is importing, as in `_patiently`."""
    return isinstance(error, HALF_DONE) and "partially initialized" in wire.text_of(error)


def _lasting(values: Iterable[tuple[int, Any]]) -> list[int]:
    """The numbers of values that cannot be used up."""
    return [number for number, value in values if not goes_once(value)]


def _encode(
    tasks: Sequence[int],
    values: dict[int, Any],
    facts: PlanFacts,
    writer: str,
    room: int,
    compression: Compression,
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
            segments = wire.compressed(wire.dumps(values[task]), compression)
        except BaseException as error:
            explained = SerializationError(
                f"The output of this task has to travel, but does not pickle: {wire.text_of(error)}"
            )
            explained.__cause__ = error.__cause__ if isinstance(error, WukongError) else error
            return Failed(task, explained)
        payloads[task], parts = payload(
            task,
            segments,
            writer=writer,
            inline_limit=min(facts.inline_limit, room),
            part_size=facts.part_size,
            bucket=facts.bucket,
            bucket_limit=facts.bucket_limit,
        )
        room = max(0, room - len(payloads[task].inline))
        objects += parts
        waiting += wire.size(segments) if parts else 0
        if waiting > BATCH_BYTES:
            break
    return payloads, objects
