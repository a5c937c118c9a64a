"""A seeded world: one job, its client, its executors, who else looks at it, and what can happen.

The engine is the real one, and so are the bodies of its commits, the client's part, the watcher,
the proxy's and that of who attaches; the store is the model. Time is simulated: every request
takes a while each way, and at every step the seed may lose it, lose its answer, deliver it twice,
crash the executor, or let it sleep past its lease. Invocations get lost, late, refused, and
delivered twice; clients and proxies die; servers forget their last moments, or everything. After
`CALM` seconds nothing more goes wrong, and the job has to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, TypeVar

from tests.simulation.graphs import Workload, random_workload
from tests.simulation.loop import Idle, SimulatedLoop
from tests.simulation.model import ModelStore
from tests.simulation.policy import Guess, Policy
from tests.simulation.processes import (
    LEASE,
    TICK,
    Attached,
    Canceller,
    Client,
    Process,
    Proxy,
    freeze,
)
from wukong_async import engine as engine_module
from wukong_async import failure, wire
from wukong_async.engine import (
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
from wukong_async.errors import JobCancelled, StoreLost
from wukong_async.protocol import Begun, Commit, JobState, Payload, Reply, Status, child_name
from wukong_async.store import commit_body, payload, place_of

T = TypeVar("T")

CALM = 25.0
"""Simulated seconds after which no more faults are injected."""
BOUND, LONG_BOUND = 150.0, 600.0
"""By then a job must have ended; one of a large graph, whose tasks may run one by one."""
MANY = 100
"""Tasks of a large graph."""
HEIRS = ("heir", "late heir")
"""Who attaches after all is over."""
DANGEROUS = {"open", "put", "create", "outcome"}.union(
    f"{why}{part}" for why in ("finish", "retire") for part in ("", " 0", " 1")
)
"""Requests of processes that had better not die now."""
TIMEOUT = 0.5
"""A request is sent again after this long without an answer."""


class Violation(AssertionError):
    """A promise was broken."""


class Boom(Exception):
    """What a task raises."""


@dataclass
class Faults:
    """How often things go wrong, each a probability per opportunity."""

    lose_request: float = 0.0
    lose_reply: float = 0.0
    repeat_request: float = 0.0
    crash: float = 0.0
    sleep: float = 0.0
    skew: float = 0.0
    """The clock of an executor runs fast or slow."""
    lose_event: float = 0.0
    repeat_event: float = 0.0
    delay_event: float = 0.0
    cancel: float = 0.0
    refuse_event: float = 0.0
    suspend: float = 0.0
    """A client or a proxy sleeps."""
    client_dies: float = 0.0
    """And proxies."""
    attach: float = 0.0
    """Another process waits for the job as well."""
    fail_over: float = 0.0
    """The metadata goes back to what it was a moment before."""
    data_loss: float = 0.0
    """A server is restarted empty."""

    @classmethod
    def random(cls, rng: random.Random) -> Faults:
        if rng.random() < 0.2:
            return cls()
        faults = cls()
        for name in vars(faults):
            if rng.random() < 0.6:
                # Each of these costs seconds; jobs that get nowhere show nothing.
                much = 0.1 if name in ("crash", "sleep") else 0.2
                setattr(faults, name, rng.choice((0.01, 0.05, much)))
        faults.cancel = rng.choice((0.0, 0.0, 0.0, 0.002))
        faults.client_dies = rng.choice((0.0, 0.0, 0.0, 0.05))
        faults.suspend = rng.choice((0.0, 0.0, 0.0, 0.05))
        faults.attach = rng.choice((0.0, 0.0, 0.0, 0.05))
        faults.fail_over = rng.choice((0.0, 0.0, 0.01, 0.05))
        faults.data_loss = rng.choice((0.0, 0.0, 0.0, 0.01))
        return faults


@dataclass
class World:
    """Runs one seed.

    `store_class` and `executor_class` are where mistakes can be built in; `without` and `calm` are
    for shrinking: kinds of faults and of sharing that do not occur, and when faults end.
    """

    seed: int
    store_class: type[ModelStore] = ModelStore
    executor_class: type[Executor] | None = None
    without: frozenset[str] = frozenset()
    calm: float = CALM
    trace: list[str] = field(default_factory=list)
    tracing: bool = False
    injected: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.workload: Workload = random_workload(self.rng)
        self.faults = Faults.random(self.rng)
        self.policy = Policy.random(self.rng)
        self.whims = random.Random(~self.seed)
        self.policy.whims(self.whims)
        for kinds in (self.faults, self.policy):
            for name in self.without.intersection(vars(kinds)):
                setattr(kinds, name, 0.0)
        self.slots = self.rng.randint(1, 4)
        self.servers = 1 if self.rng.random() < 0.7 else 2
        # Of its own, so that with one thread each seed is what it is without this.
        self.rng_of_threads = random.Random(f"threads of {self.seed}")
        self.threads = self.rng_of_threads.randint(1, 3)
        self.groups = self.workload.plan.groups(self.rng.randint(1, self.slots))
        self.bound = BOUND if len(self.workload.plan) < MANY else LONG_BOUND
        self.over = False
        self.hand_overs = 0
        self.loop = SimulatedLoop(2 * self.bound)
        self.stores: dict[str, ModelStore] = {}
        self.processes: list[Process] = []
        self.executors: list[Executor] = []
        self.client = Client(self)
        self.losses = 0
        """How often something that was there was lost."""
        self.failed_over = False

    # Time -------------------------------------------------------------------------------------

    @property
    def time(self) -> float:
        return self.loop.now

    def after(self, delay: float, event: Callable[[], None]) -> None:
        self.loop.after(delay, event)

    def run(self) -> World:
        """Run to the end and check what must hold then.

        Raises
        ------
        Violation
        """
        unheard: list[Mapping[str, Any]] = []
        self.loop.set_exception_handler(lambda _, told: unheard.append(told))
        windows = _small_windows(self.rng, self.rng_of_threads)
        with _quiet(), windows, contextlib.closing(self.loop):
            try:
                self.loop.run_until_complete(self._live())
            except Idle:
                raise Violation("somebody waits for ever: a hang") from None
            finally:
                self._end()
        if unheard:
            raise Violation(f"nobody has heard of {unheard}")
        return self

    async def _live(self) -> None:
        self.client.start()
        if self.faults.client_dies or self.faults.suspend:
            Proxy(self, "proxy").start()
        if self.faults.cancel and self.rng.random() < 0.3:
            self.after(self.rng.uniform(0, 0.2), self._cancel_client)
        while not self.is_over() or (not self.client.alive and self.loop.has_events):
            await asyncio.sleep(TICK)
            self._befall()
        self.over = True
        for process in self.processes:
            assert process.task is not None
            await asyncio.wait([process.task])
            if process.alive:
                process.task.result()
        self.loop.exhaust()
        for job_id, store in self.stores.items():
            await self._check_end(job_id, store)

    def _end(self) -> None:
        """Whoever still waits is not waited for."""
        for process in self.processes:
            if process.task is not None and not process.task.done():
                process.die()
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
            with contextlib.suppress(BaseException):
                self.loop.run_until_complete(task)

    def is_over(self) -> bool:
        """Whether the client has what it wants, or the job has ended without it."""
        if self.client.alive:
            return self.client.ended
        return all(store.job is None or store.job.owner is None for store in self.stores.values())

    def _befall(self) -> None:
        """What happens to processes and servers, every now and then."""
        if self.time > self.bound:
            raise Violation(f"no end after {self.bound} s: the job hangs")
        job_id = next(reversed(self.stores), "")
        for process in tuple(self.processes):
            if self.happens("client_dies"):
                self.after(self.rng.uniform(0, TICK), partial(self._kill, process))
        if self.happens("attach"):
            Attached(self, f"attached {len(self.processes)}", job_id).start()
        if self.happens("cancel"):
            if self.client.alive and self.rng.random() < 0.5:
                self.after(self.rng.uniform(0, TICK), self._cancel_client)
            else:
                Canceller(self, f"canceller {len(self.processes)}", job_id).start()
        if self.happens("fail_over"):
            self._fail_over(self.stores[job_id])
        if self.happens("data_loss"):
            self.after(self.rng.uniform(0, TICK), partial(self._lose, self.stores[job_id]))

    def _cancel_client(self) -> None:
        """It is interrupted, or its caller has waited for long enough."""
        if self.client.task is not None and not self.client.task.done():
            self.counts("cancel")
            self.note("-- the client is cancelled")
            self.client.task.cancel()

    def a_while(self) -> float:
        """Seconds that somebody sleeps; sometimes they outlast the longest lease."""
        return self.rng.uniform(0, self.rng.choice((2, 2, 9)) * LEASE)

    def happens(self, name: str) -> bool:
        """Whether a fault strikes now."""
        chance = getattr(self.faults, name)
        if not chance or self.loop.now > self.calm or self.rng.random() >= chance:
            return False
        self.counts(name)
        self.note(f"-- {name}")
        return True

    def counts(self, name: str) -> None:
        self.injected[name] = self.injected.get(name, 0) + 1

    def note(self, text: str) -> None:
        if self.tracing:
            self.trace.append(f"{self.time:8.3f} {text}")

    def _strike(self, who: Process | Executor, what: str) -> None:
        """Something goes wrong when it matters."""
        if what in ("begin", "commit") and self.happens("fail_over"):
            assert isinstance(who, Executor)
            self._fail_over(who.store)
        elif what in DANGEROUS and isinstance(who, Process) and self.happens("client_dies"):
            self._kill(who)

    def _kill(self, process: Process) -> None:
        if not process.alive or process.ended or process.name in HEIRS:
            return
        process.die()
        if isinstance(process, Proxy):
            successor = Proxy(self, f"proxy {len(self.processes)}")
            self.after(self.rng.uniform(0, 4 * LEASE), successor.start)

    def _lose(self, store: ModelStore) -> None:
        """A server is restarted empty."""
        kept = "nothing" if self.servers == 1 else self.rng.choice(("metadata", "data"))
        self.note(f"-- {kept} is kept")
        self.losses += store.marked or store.job is not None
        store.lose(metadata=kept != "metadata", data=kept != "data")

    def _fail_over(self, store: ModelStore) -> None:
        """What the store has acknowledged in the last moments is lost; its data shards are not."""
        before = store.memory()

        def lose() -> None:
            if store.job is not None and store.job.state is JobState.RUNNING:
                self.losses += before["job"] is None
                self.failed_over = True
                store.remember(before)
                self._check_always()
                self.note("-- what was acknowledged is forgotten")

        self.after(self.rng.uniform(0, 0.5), lose)

    @property
    def store(self) -> ModelStore:
        """That of the job, or of the last one if it was run again."""
        return self.stores[next(reversed(self.stores))]

    def store_of(self, job_id: str) -> ModelStore:
        """What the servers have of a job."""
        if job_id not in self.stores:
            self.stores[job_id] = self.store_class(lambda: self.time, self.announce)
        return self.stores[job_id]

    # The network ------------------------------------------------------------------------------

    def ask(
        self,
        who: Process | Executor,
        what: str,
        request: Callable[[], T],
        answered: Callable[[T], None],
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Send a request until it is answered, or not wanted any more; the same each time."""
        done = False

        def send() -> None:
            if done or not who.alive or not wanted():
                return
            self._strike(who, what)
            if self.happens("lose_request"):
                self.after(TIMEOUT, send)
                return
            self.after(self._latency(), arrive)
            # A late copy of `open` leaves a mark that expires; nothing else comes of it.
            if what != "open" and self.happens("repeat_request"):
                self.after(self.rng.uniform(0, 6 * LEASE), late_copy)

        def late_copy() -> None:
            request()
            self._check_always()

        def arrive() -> None:
            if what == "open" and not wanted():
                return
            answer = request()
            self._check_always()
            self._strike(who, what)
            if self.tracing:
                self.note(f"{who.name} {what} → {answer!s:.160}")
            if self.happens("lose_reply"):
                self.after(TIMEOUT, send)
            else:
                self.after(self._latency(), lambda: receive(answer))

        def receive(answer: T) -> None:
            nonlocal done
            if not done and who.alive:
                done = True
                who.when_awake(lambda: answered(answer))

        send()

    def invoke(self, job_id: str, executor: str) -> None:
        """Send an event."""
        if self.happens("lose_event"):
            return
        copies = 2 if self.happens("repeat_event") else 1
        for _ in range(copies):
            self.after(self._latency() + self._late(), lambda: self._deliver(job_id, executor))

    def announce(self) -> None:
        """Publish a change of state; the message may get lost like any other."""
        for process in self.processes:
            if process.alive and self.rng.random() < 0.8:
                self.after(self._latency() + self._late(), process.hear)

    def _deliver(self, job_id: str, name: str) -> None:
        make = self.executor_class or Executor
        executor = make(self, job_id, name, f"nonce-{len(self.executors)}")
        self.executors.append(executor)
        executor.step()

    def _late(self) -> float:
        return self.rng.uniform(0, 6 * LEASE) if self.happens("delay_event") else 0.0

    def _latency(self) -> float:
        return self.rng.uniform(0.001, 0.02)

    # What must hold ---------------------------------------------------------------------------

    def _check_always(self) -> None:
        for store in self.stores.values():
            if len(store.live) > self.slots:
                raise Violation(f"{len(store.live)} executors on {self.slots} slots")
            if store.live.keys() != store.records.keys():
                raise Violation("`live` and the records differ")
        if len(self.stores) > 1 + self.losses:
            raise Violation(f"the job is run again, but nothing was lost: {self._failures()}")

    def _failures(self) -> list[bytes]:
        return [store.failed for store in self.stores.values() if store.failed]

    def check(self, holds: bool, otherwise: str) -> None:
        """What must hold now.

        Raises
        ------
        Violation
        """
        if not holds:
            raise Violation(otherwise)

    def check_cancelled(self, job_id: str) -> None:
        """Somebody is told that the job was cancelled."""
        job = self.stores[job_id].job
        self.check(job is None or job.state is not JobState.RUNNING, "cancelled, but it runs")

    def check_references(self, store: ModelStore) -> None:
        """Nobody reads anything any more once all tasks have passed, but for large results."""
        if store.job is None or store.job.passed < store.job.new.tasks:
            return
        held = self.workload.large.intersection(self.workload.plan.requested)
        left = {n: count for n, (count, _, _) in store.refs.items()}
        if any(n not in held or count != 1 for n, count in left.items()):
            raise Violation(f"kept for readers who never come: {left}")

    def check_results(self, values: Mapping[int, Any]) -> None:
        """Somebody has got the results."""
        if self.workload.failing is not None:
            raise Violation("the job succeeded, but one of its tasks fails")
        expected = self.workload.expected()
        for task in self.workload.plan.requested:
            if whole(values[task]) != expected[task]:
                raise Violation(f"wrong result for task {task}")

    def check_error(self, error: Exception, losses: int) -> None:
        """Somebody hears why the job has failed.

        Parameters
        ----------
        losses
            How much has to be lost before it is.
        """
        injected = self.injected
        match error:
            case Boom(args=(int(task),)) if task == self.workload.failing:
                return
            case JobCancelled() if injected.get("cancel"):
                return
            case StoreLost() if self.losses >= losses:
                return
        raise Violation(f"the job failed: {type(error).__name__}: {error}") from error

    def passes(self, store: ModelStore, tasks: Sequence[int]) -> None:
        """Tasks pass, with effect."""
        twice = set(tasks) & set(store.passed)
        if twice:
            raise Violation(f"tasks pass twice: {sorted(twice)}")
        store.passed += tasks

    async def _check_end(self, job_id: str, store: ModelStore) -> None:
        self._check_work(store)
        if not self.client.alive:
            await self._check_bequest(job_id, store)
        if not store.is_empty():
            raise Violation(f"something is left in the store: {store}")

    def _check_work(self, store: ModelStore) -> None:
        """Work is done again for a reason only."""
        # A fail-over may forget that everybody has begun.
        forgotten = self.injected.get("fail_over", 0) * self.slots
        reasons = sum(self.injected.values()) + forgotten + self.hand_overs
        if store.begun > store.invited + reasons:
            raise Violation(f"{store.begun} begins of {store.invited}, for {reasons} reasons")
        tasks = sum(len(e.done) for e in self.executors if e.store is store)
        if not reasons and tasks > len(self.workload.plan):
            raise Violation(f"{tasks} runs of {len(self.workload.plan)} tasks, for no reason")

    async def _check_bequest(self, job_id: str, store: ModelStore) -> None:
        """The client has died: its job can be found for a while, and expires then."""
        done = store.job is not None and store.job.state is JobState.DONE
        places = [place_of(n, value) for n, value in store.results.items()] if done else []
        results = {name for place in places if place for name in place.names}
        if store.job is not None and (store.live or store.refs or store.index - results):
            raise Violation(f"more than the results is left in the store: {store}")
        known = store.job is not None and store.job.manifest is not None
        for name, found in zip(HEIRS, (known, False), strict=True):
            heir = Attached(self, name, job_id)
            heir.start()
            assert heir.task is not None
            await heir.task
            if heir.found != found:
                raise Violation(f"there is {'a' if found else 'no'} job for the {name}: {store}")
            store.lose(metadata=True, data=True)


@dataclass(eq=False)
class Running:
    """A Run in flight."""

    steps: Sequence[Step]
    ran: int = 0

    @property
    def task(self) -> int:
        """What runs now."""
        return self.steps[self.ran].task


class Executor:
    """The shell around the real engine: what `executor.incarnation` is in the real world."""

    engine_class: type[Engine] = Engine

    def __init__(self, world: World, job_id: str, name: str, nonce: str) -> None:
        self.world = world
        self.job_id = job_id
        self.store = world.store_of(job_id)
        self.executor = name
        self.name = f"executor {name}/{nonce[6:]}"
        self.nonce = nonce
        self.alive = True
        advice = Guess(world.policy, world.whims)
        self.engine = self.engine_class(advice, threads=world.threads)
        self.values: dict[int, int] = {}
        self.dropped: dict[int, int] = {}
        self.payloads: dict[int, Payload] = {}
        self.error = b""
        self.asleep_until = 0.0
        self.runs: dict[int, Running] = {}
        self.undeleted: set[tuple[int, str]] = set()
        self.done: set[int] = set()
        self.salt = world.rng.getrandbits(31)
        self.rate = world.rng.uniform(0.3, 4) if world.happens("skew") else 1.0
        """How much longer a second takes here."""

    # Being alive ------------------------------------------------------------------------------

    def when_awake(self, event: Callable[[], None]) -> None:
        """Something reaches this executor: it may crash, or sleep first."""
        world = self.world
        if not self.alive:
            return
        if world.happens("crash"):
            self.alive = False
            return
        if world.happens("sleep"):
            self.asleep_until = world.time + world.a_while()
        if self.asleep_until > world.time:
            world.after(self.asleep_until - world.time, lambda: self.when_awake(event))
            return
        event()
        self.share()
        self.step()

    def share(self) -> None:
        """What a policy may ask of an executor at any time."""
        policy, rng = self.world.policy, self.world.rng
        if self.engine.state is State.WORK and rng.random() < policy.hand_over:
            self.leave(cut_short=rng.random() < 0.5)
        elif policy.cut_short and self.uses_up() and rng.random() < policy.cut_short:
            self.leave(cut_short=True)
        policy.share(self.engine, rng)
        policy.at_whim(self.engine, self.world.whims)
        for first, running in list(self.runs.items()):
            if policy.take_back and self.world.whims.random() < policy.take_back:
                keep = self.engine.take_back(running.ran + 1, run=first)
                running.steps = running.steps[:keep]

    def leave(self, *, cut_short: bool) -> None:
        """The function's time is nearly over: do not start anything, or give up what runs."""
        self.world.hand_overs += 1
        self.engine.hand_over()
        if not cut_short:
            return
        for first, running in list(self.runs.items()):
            # One may be through before its turn.
            if self.world.threads == 1 or self.world.rng_of_threads.random() < 0.7:
                self.cut(first, running)

    def cut(self, first: int, running: Running) -> None:
        """Give a Run up."""
        spoilt = self.spoilt(running.task, first)
        del self.runs[first]
        if not self.engine.ran(running.ran, spoilt, run=first):
            self.engine.ran(running.ran, run=first)
            return
        if spoilt:
            self.world.note(f"-- {self.name} has used up {spoilt}")
        for number in spoilt:
            del self.values[number]
            for source in self.world.workload.specs[number].inputs:
                if source not in self.values and source in self.dropped:
                    self.values[source] = self.dropped[source]

    def uses_up(self) -> bool:
        """Whether what runs is the only reader of something that was made here."""
        if not self.runs or self.engine.is_leaving:
            return False
        specs = self.world.workload.specs
        reads = chain(*(specs[running.task].inputs for running in self.runs.values()))
        inputs = filter(self.engine.is_only_here, reads)
        return any(self.done.isdisjoint(specs[number].consumers) for number in inputs)

    def spoilt(self, task: int, run: int) -> list[int]:
        """What a task that is cut short has used up, and what that was made of, and so on."""
        specs, rng = self.world.workload.specs, self.world.rng
        some = [
            number
            for number in specs[task].inputs
            if self.engine.is_only_here(number, run=run)
            # What goes once has one reader, most times.
            and rng.random() < (0.8 if self.done.isdisjoint(specs[number].consumers) else 0.1)
        ]
        return list(dict.fromkeys(chain(some, *(self.spoilt(n, run) for n in some))))

    def step(self) -> None:
        if not self.alive:
            return
        for action in self.engine.next_actions():
            if not self.alive:
                return
            if self.world.tracing:
                self.world.note(f"{self.name} {action!s:.160}")
            self.perform(action)

    def perform(self, action: Action) -> None:
        store = self.store
        match action:
            case Begin():
                said = (self.executor, self.nonce, f"request {self.nonce}")
                self.ask("begin", lambda: store.begin(*said), self.begun)
            case Load(tasks):
                self.ask("load", lambda: store.is_open, lambda ok: self.loaded(tasks, ok=ok))
            case Fetch(objects):
                self.fetch(objects)
            case Run(steps):
                self.check(len(self.runs) < self.world.threads, "more Runs than threads")
                self.runs[action.first] = Running(steps)
                self.run_next(self.runs[action.first])
            case Publish(tasks):
                self.publish(tasks)
            case Send(sequence, commit):
                self.send(sequence, commit)
            case Drop(objects):
                for number in objects:
                    value = self.values.pop(number, None)
                    if value is not None and number in self.done:
                        self.dropped[number] = value
            case Delete(objects):
                self.undeleted.difference_update(objects)
                self.ask("delete", lambda: store.delete(objects), lambda _: None)
            case Invoke(sequence, offers):
                for index in offers:
                    self.world.invoke(self.job_id, child_name(self.executor, sequence, index))
            case InvokeAgain():
                self.world.invoke(self.job_id, self.executor)
            case Exit():
                self.alive = False
                if self.undeleted:
                    raise Violation(f"left for the clean-up: {self.undeleted}")

    def ask(self, what: str, request: Callable[[], T], answered: Callable[[T], None]) -> None:
        self.world.ask(self, what, request, answered)

    # Actions ----------------------------------------------------------------------------------

    @property
    def writer(self) -> str:
        """This incarnation, in the names of what it writes."""
        return self.nonce

    def begun(self, begun: Begun) -> None:
        self.engine.begun(begun)
        if begun.status is Status.OK:
            pause = begun.lease / 3 * self.rate
            self.world.after(pause, lambda: self.renew(pause))

    def renew(self, pause: float) -> None:
        if not self.alive:
            return
        if self.asleep_until > self.world.time:
            self.world.after(self.asleep_until - self.world.time, lambda: self.renew(pause))
            return

        def renewed(status: Status) -> None:
            if status is Status.OK or not self.engine.refused(status):
                self.world.after(pause, lambda: self.renew(pause))

        store, generation = self.store, self.engine.generation
        # At most 31 bytes: Lua and Python pack longer ones differently.
        said = (self.executor, generation, self.nonce, f"at {self.world.time:.3f}".encode())
        self.ask("renew", lambda: store.renew(*said), renewed)

    def loaded(self, tasks: Sequence[int], *, ok: bool) -> None:
        if ok:
            self.engine.loaded([self.world.workload.specs[task] for task in tasks])
        else:
            self.fail(failure.input_lost([]))

    def fetch(self, objects: Sequence[int]) -> None:
        store = self.store

        def stored(found: dict[int, bytes | None]) -> None:
            self.ask("read", lambda: store.resolve(found), read)

        def read(frames: dict[int, bytes | None]) -> None:
            lost = [n for n, frame in frames.items() if frame is None and self.engine.is_needed(n)]
            again = self.world.failed_over or self.world.losses
            if lost and (min(lost) < 0 or not again):
                self.fail(failure.input_lost(lost))
                return
            expected = self.world.workload.expected() if lost else {}
            for number, frame in frames.items():
                if frame is None and number not in expected:
                    continue
                value = expected[number] if frame is None else whole(wire.loads(frame))
                self.values[number] = value
            self.engine.fetched({n: len(f or b"") for n, f in frames.items()})

        self.ask("fields", lambda: store.read_values(objects), stored)

    def run_next(self, running: Running) -> None:
        first = running.steps[0].task
        if self.runs.get(first) is not running:
            return  # It was given up.
        leaving = self.engine.is_leaving and self.world.rng.random() < 0.5
        if running.ran == len(running.steps) or leaving:
            del self.runs[first]
            self.engine.ran(running.ran, run=first)
            return

        def done(value: int) -> None:
            if self.runs.get(first) is running:
                if task in self.done:
                    raise Violation(f"task {task} is run twice by one incarnation")
                self.done.add(task)
                self.values[task] = value
                for number in drops:
                    self.dropped[number] = self.values.pop(number)
                running.ran += 1
                self.run_next(running)

        task, drops = running.steps[running.ran]
        workload = self.world.workload
        if task == workload.failing:
            del self.runs[first]
            self.when_awake(lambda: self.fail(self.broken(task)))
            return
        spec = workload.specs[task]
        missing = [n for n in spec.inputs + spec.literals if n not in self.values]
        self.check(not missing, f"task {task} is run, but {missing} are not here")
        value = workload.compute(task, self.values)
        # Slow ones outlast a lease; a thousand of them would outlast everybody's patience.
        slow = 3.0 if len(workload.plan) < MANY else 0.02
        pause = self.world.rng.choice((0.001, 0.01, 0.01, 0.01, 0.01, 0.1, slow))
        self.world.after(pause, lambda: self.when_awake(lambda: done(value)))

    def check(self, holds: bool, otherwise: str) -> None:
        self.world.check(holds, f"{self.name}: {otherwise}")

    def broken(self, task: int) -> bytes:
        """What is told of a task that raises."""
        return failure.task_failed(
            task,
            Boom(task),
            hidden=lambda _: False,
            request_id=self.nonce,
            executor=self.executor,
        )

    def fail(self, error: bytes) -> None:
        self.error = error
        self.engine.failed()

    def publish(self, tasks: Sequence[int]) -> None:
        objects: dict[str, bytes] = {}
        for task in tasks:
            limit = 0 if task in self.world.workload.large else 1000
            if task not in self.values:
                raise Violation(f"task {task} is published, but was not run")
            segments = freeze(self.values[task], self.salt)
            self.payloads[task], parts = payload(
                task,
                segments,
                writer=self.writer,
                inline_limit=limit,
                part_size=12,
            )
            objects.update((name, wire.join(part)) for name, part in parts)

        self.put_next(list(objects.items()))

    def put_next(self, objects: list[tuple[str, bytes]]) -> None:
        """One after the other: an executor may die between the parts of one value."""
        if not objects:
            self.engine.published()
            self.step()
            return
        (name, value), *rest = objects

        def put(status: Status) -> None:
            if status is Status.OK:
                self.put_next(rest)
            else:
                self.engine.stopped(status)

        self.ask("put", lambda: self.store.put({name: value}), put)

    def send(self, sequence: int, commit: Commit) -> None:
        # Some other size each time, to see that the largest is remembered.
        memory = len(self.done)
        body = commit_body(commit, self.payloads, self.error, self.engine.told, memory)
        generation = self.engine.generation
        # Which tasks these are is known here only; the store counts.
        engine = self.engine
        tasks: tuple[int, ...] = ()
        if commit.stay is not None:
            tasks = tuple(t for t in engine._made if t not in engine._undone)
            assert len(tasks) == commit.passed
            if not commit.release:
                unneeded = [n for n in self.values if not engine.is_here(n)]
                self.check(not unneeded, f"{unneeded} are kept for nobody")
            self.payloads.clear()
        self.ask(
            "commit",
            lambda: self.commit(generation, sequence, body, tasks),
            self.replied,
        )

    def replied(self, reply: Reply) -> None:
        self.undeleted.update(reply.deletes)
        self.engine.replied(reply)

    def commit(self, generation: int, sequence: int, body: bytes, tasks: Sequence[int]) -> Reply:
        store = self.store
        before = store.job.passed if store.job else 0
        reply = store.commit(self.executor, generation, self.nonce, sequence, body)
        if reply.claims and len(set(store.claimed)) != len(store.claimed):
            raise Violation("a fan-in was claimed twice")
        if store.job and store.job.passed > before:
            self.world.passes(store, tasks)
        return reply


def whole(value: Any) -> int:
    """What `freeze` was given; a value that is pieced together from two incarnations' is wrong."""
    number, *salts = value
    if len(set(salts)) != 1:
        raise Violation("a value is pieced together from two incarnations")
    assert isinstance(number, int)
    return number


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What is reported of lost executors and jobs is the rule here."""
    loggers = [logging.getLogger(f"wukong.{name}") for name in ("watcher", "scheduler", "proxy")]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger in loggers:
            logger.disabled = False


class _small_windows:  # noqa: N801 - reads as a statement
    """The engine's limits, so small that small graphs reach them."""

    def __init__(self, rng: random.Random, rng_of_threads: random.Random) -> None:
        self._values = {
            "LEAST_SPLIT": rng_of_threads.choice((0.0, 0.0, 0.001)),
            "RUN_LIMIT": rng.choice((1, 2, 256)),
            "LOAD_AHEAD": rng.choice((1, 2, 512)),
            "FETCH_MOST": rng.choice((1, 3, 4096)),
            "FETCH_FIRST": rng.choice((1, 2, 32)),
            "COMMIT_MOST": rng.choice((1, 3, 20_000)),
            "STARVED_MOST": rng.choice((1, 8)),
        }

    def __enter__(self) -> None:
        self._saved = {name: getattr(engine_module, name) for name in self._values}
        vars(engine_module).update(self._values)

    def __exit__(self, *_: object) -> None:
        vars(engine_module).update(self._saved)
