"""A seeded world: one job, its client and watcher, its executors, and everything that can happen.

The engine is the real one, and so are the bodies of its commits; the store is the model. Time is
simulated: every request takes a while each way, and at every step the seed may lose it, lose its
answer, deliver it twice, crash the executor, or let it sleep past its lease. Invocations get lost,
late, and delivered twice. After `CALM` seconds nothing more goes wrong, and the job has to end.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tests.simulation.graphs import Workload, random_workload
from tests.simulation.model import ModelStore
from tests.simulation.policy import Policy
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
from wukong_async.protocol import (
    Begun,
    Commit,
    JobState,
    Payload,
    Reply,
    Status,
    Watch,
    child_name,
)
from wukong_async.store import NewJob, commit_body, payload

T = TypeVar("T")

LEASE = 2.0
GRACE = 2.0
TICK = 1.0
CALM = 40.0
"""Simulated seconds after which no more faults are injected."""
BOUND = 400.0
"""By then the job must have ended."""
MANY = 100
"""Tasks of a large graph."""
TIMEOUT = 0.5
"""A request is sent again after this long without an answer."""


class Violation(AssertionError):
    """A promise was broken."""


@dataclass
class Faults:
    """How often things go wrong, each a probability per opportunity."""

    lose_request: float = 0.0
    lose_reply: float = 0.0
    repeat_request: float = 0.0
    crash: float = 0.0
    sleep: float = 0.0
    lose_event: float = 0.0
    repeat_event: float = 0.0
    delay_event: float = 0.0
    cancel: float = 0.0
    client_dies: float = 0.0
    fail_over: float = 0.0
    """The metadata goes back to what it was a moment before."""

    @classmethod
    def random(cls, rng: random.Random) -> Faults:
        if rng.random() < 0.2:
            return cls()
        faults = cls()
        for name in vars(faults):
            if rng.random() < 0.6:
                setattr(faults, name, rng.choice((0.01, 0.05, 0.2)))
        faults.cancel = rng.choice((0.0, 0.0, 0.0, 0.002))
        faults.client_dies = rng.choice((0.0, 0.0, 0.0, 0.05))
        faults.fail_over = rng.choice((0.0, 0.0, 0.01, 0.05))
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
    time: float = 0.0
    trace: list[str] = field(default_factory=list)
    tracing: bool = False
    injected: dict[str, int] = field(default_factory=dict)
    passed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.workload: Workload = random_workload(self.rng)
        self.faults = Faults.random(self.rng)
        self.policy = Policy.random(self.rng)
        for kinds in (self.faults, self.policy):
            for name in self.without.intersection(vars(kinds)):
                setattr(kinds, name, 0.0)
        self.slots = self.rng.randint(1, 4)
        self.groups = self.workload.plan.groups(self.rng.randint(1, self.slots))
        self.store = self.store_class(lambda: self.time, self.announce)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._nonces = itertools.count()
        self.client = Client(self)
        self.proxy = Proxy(self)
        self.executors: list[Executor] = []

    # Time -------------------------------------------------------------------------------------

    def after(self, delay: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.time + delay, next(self._order), event))

    def run(self) -> World:
        """Run to the end and check what must hold then.

        Raises
        ------
        Violation
        """
        with _small_windows(self.rng):
            self.client.start()
            if self.faults.client_dies:
                self.proxy.start()
            while self._events:
                self.time, _, event = heapq.heappop(self._events)
                event()
                self._check_always()
                if self.time > BOUND and not self.finished:
                    raise Violation(f"no end after {BOUND} s: the job hangs")
        self._check_end()
        return self

    @property
    def finished(self) -> bool:
        """Whether somebody has heard how the job has ended, and cleaned up."""
        return self.client.finished or self.proxy.finished

    def happens(self, name: str) -> bool:
        """Whether a fault strikes now."""
        chance = getattr(self.faults, name)
        if not chance or self.time > self.calm or self.rng.random() >= chance:
            return False
        self.injected[name] = self.injected.get(name, 0) + 1
        self.note(f"-- {name}")
        return True

    def note(self, text: str) -> None:
        if self.tracing:
            self.trace.append(f"{self.time:8.3f} {text}")

    def fail_over(self) -> None:
        """What the store has acknowledged in the last moments is lost; its data shards are not."""
        before = self.store.memory(), list(self.passed)

        def lose() -> None:
            job = self.store.job
            if job is not None and job.state is JobState.RUNNING:
                memory, self.passed = before
                self.store.remember(memory)
                self.note("-- what was acknowledged is forgotten")

        self.after(self.rng.uniform(0, 0.5), lose)

    # The network ------------------------------------------------------------------------------

    def ask(
        self,
        who: Client | Executor,
        what: str,
        request: Callable[[], T],
        answered: Callable[[T], None],
    ) -> None:
        """Send a request until it is answered; the same each time."""
        done = False

        def send() -> None:
            if done or not who.alive:
                return
            if self.happens("lose_request"):
                self.after(TIMEOUT, send)
                return
            self.after(self._latency(), arrive)
            # A late copy of `open` leaves a mark that expires; nothing else comes of it.
            if what != "open" and self.happens("repeat_request"):
                self.after(self.rng.uniform(0, 6 * LEASE), late_copy)

        def late_copy() -> None:
            request()

        def arrive() -> None:
            answer = request()
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

    def invoke(self, executor: str) -> None:
        """Send an event."""
        if self.happens("lose_event"):
            return
        late = self.rng.uniform(0, 6 * LEASE) if self.happens("delay_event") else 0
        copies = 2 if self.happens("repeat_event") else 1
        for _ in range(copies):
            self.after(self._latency() + late, lambda: self._deliver(executor))

    def announce(self) -> None:
        """Publish a change of state; the message may get lost like any other."""
        if self.rng.random() < 0.8:
            for who in (self.client, self.proxy):
                self.after(self._latency(), who.look)

    def _deliver(self, name: str) -> None:
        make = self.executor_class or Executor
        executor = make(self, name, f"nonce-{next(self._nonces)}")
        self.executors.append(executor)
        executor.step()

    def _latency(self) -> float:
        return self.rng.uniform(0.001, 0.02)

    # What must hold ---------------------------------------------------------------------------

    def _check_always(self) -> None:
        store = self.store
        if len(store.live) > self.slots:
            raise Violation(f"{len(store.live)} executors on {self.slots} slots")
        if set(store.live) != set(store.records):
            raise Violation("`live` and the records differ")

    def passes(self, tasks: Sequence[int]) -> None:
        """Tasks pass, with effect."""
        twice = set(tasks) & set(self.passed)
        if twice:
            raise Violation(f"tasks pass twice: {sorted(twice)}")
        self.passed += tasks

    def _check_end(self) -> None:
        if not self.finished:
            raise Violation("nothing happens any more, and the client has no answer: a hang")
        if len(set(self.store.claimed)) != len(self.store.claimed):
            raise Violation("a fan-in was claimed twice")
        if not self.store.is_empty():
            raise Violation(f"something is left in the store: {self.store}")


@dataclass
class Client:
    """The client: it watches its job, and cleans up behind it."""

    world: World
    name: str = "client"
    alive: bool = True
    finished: bool = False
    looking: bool = False
    collected: bool = False
    begins: int = 0

    def when_awake(self, event: Callable[[], None]) -> None:
        event()

    def start(self) -> None:
        world = self.world
        workload = world.workload
        pointers = []
        objects: dict[str, bytes] = {}
        for number, value in workload.literals.items():
            stored, parts = payload(
                number, freeze(value, 0), writer="plan", inline_limit=0, part_size=4
            )
            pointers.append((number, stored.inline))
            objects.update((name, wire.join(part)) for name, part in parts)
        new = NewJob(
            tasks=len(workload.plan),
            want=len(workload.plan.requested),
            channel="",
            slots=world.slots,
            lease=LEASE,
            grace=GRACE,
            attempts=10_000,
            unstarted=10_000,
            ttl=1e9,
            owner=self.name,
            facts=b"",
            values=pointers,
            records=[(str(i), leaves) for i, leaves in enumerate(world.groups)],
        )

        def opened(_: None) -> None:
            self.ask("put", lambda: world.store.put(objects), put)

        def put(_: Status) -> None:
            self.ask("create", lambda: world.store.create(new), created)

        def created(status: Status) -> None:
            if status is not Status.OK:
                raise Violation(f"create says {status}")
            for executor, _ in new.records:
                world.invoke(executor)
            world.after(TICK, self.tick)

        self.ask("open", world.store.open, opened)

    def ask(self, what: str, request: Callable[[], T], answered: Callable[[T], None]) -> None:
        self.world.ask(self, what, request, answered)

    def tick(self) -> None:
        if self.collected or not self.alive:
            return
        if self.world.happens("client_dies"):
            self.alive = False
            return
        if self.world.happens("cancel"):
            reason = failure.cancelled("by the simulation")
            self.ask(
                "cancel",
                lambda: self.world.store.cancel(JobState.CANCELLED, reason),
                lambda _: None,
            )
        if self.world.happens("fail_over"):
            self.world.fail_over()
        self.ask("watch", lambda: self.world.store.watch(self.name), self.watched)
        self.world.after(TICK, self.tick)

    def watched(self, watch: Watch) -> None:
        for executor in watch.revived:
            self.world.invoke(executor)
        if watch.state is not JobState.RUNNING:
            self.look()

    def look(self) -> None:
        if self.looking or self.collected or not self.alive:
            return
        self.looking = True

        def seen(outcome: Any) -> None:
            self.looking = False
            if outcome.state in (None, JobState.RUNNING) or self.collected:
                return
            self.collected = True
            self.begins = outcome.begins
            frames = self.world.store.resolve(outcome.results)
            self._check(outcome, frames)
            self.ask("close", self.world.store.close, closed)

        def closed(_: None) -> None:
            self.ask("forget", self.world.store.forget, forgotten)

        def forgotten(_: None) -> None:
            self.finished = True

        self.ask("outcome", self.world.store.outcome, seen)

    def _check(self, outcome: Any, frames: dict[int, bytes | None]) -> None:
        workload = self.world.workload
        if outcome.state is JobState.CANCELLED:
            if not self.world.injected.get("cancel"):
                raise Violation("cancelled by nobody")
            return
        if outcome.state is JobState.FAILED:
            if wire.unpack(outcome.error) != [b"task", workload.failing]:
                raise Violation(f"the job failed: {outcome.error!r}")
            return
        if workload.failing is not None:
            raise Violation("the job succeeded, but one of its tasks fails")
        expected = workload.expected()
        for task in workload.plan.requested:
            frame = frames.get(task)
            if frame is None or thaw(frame) != expected[task]:
                raise Violation(f"wrong result for task {task}")
        if outcome.passed == outcome.tasks:
            # Nobody will read anything any more, but for large results.
            held = workload.large.intersection(workload.plan.requested)
            left = {n: count for n, (count, _, _) in self.world.store.refs.items()}
            if any(n not in held or count != 1 for n, count in left.items()):
                raise Violation(f"kept for readers who never come: {left}")


@dataclass
class Proxy(Client):
    """Takes over the job if its client is gone; keeps its results for who attaches to it."""

    name: str = "proxy"
    watching: bool = False

    def start(self) -> None:
        self.world.after(TICK, self.tick)

    def tick(self) -> None:
        world = self.world
        if self.finished or world.client.finished:
            return
        if world.time > BOUND / 2 and world.store.job is None:
            self.finished = True  # The client died before there was a job, whose mark expires.
            world.store.close()
        elif self.watching:
            self.ask("watch", lambda: world.store.watch(self.name), self.watched)
        else:
            self.ask("lapsed", world.store.lapsed, self.heard)
        world.after(TICK, self.tick)

    def heard(self, lapsed: bool) -> None:
        self.watching = lapsed

    def watched(self, watch: Watch) -> None:
        if watch.state is JobState.RUNNING:
            super().watched(watch)
        elif watch.owned:
            self.ask("retire", self.world.store.retire, self.retired)

    def look(self) -> None:
        """An announcement says nothing that the next tick would not."""

    def retired(self, _: object) -> None:
        """Somebody attaches to the job, and later its results expire."""
        store = self.world.store
        outcome = store.outcome()
        if outcome.state is not None and not self.world.client.collected:
            self._check(outcome, store.resolve(outcome.results))
        store.close()
        store.forget()
        self.finished = True


class Executor:
    """The shell around the real engine: what `executor.incarnation` is in the real world."""

    engine_class: type[Engine] = Engine

    def __init__(self, world: World, name: str, nonce: str) -> None:
        self.world = world
        self.executor = name
        self.name = f"executor {name}/{nonce[6:]}"
        self.nonce = nonce
        self.alive = True
        self.engine = self.engine_class()
        self.values: dict[int, int] = {}
        self.payloads: dict[int, Payload] = {}
        self.error = b""
        self.asleep_until = 0.0
        self.steps: list[Step] = []
        self.ran = 0
        self.salt = world.rng.getrandbits(31)

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
            self.asleep_until = world.time + world.rng.uniform(0, 8 * LEASE)
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
            self.leave()
        policy.share(self.engine, rng)

    def leave(self) -> None:
        """The function's time is nearly over: do not start anything, or give up what runs."""
        self.engine.hand_over()
        if self.steps and self.world.rng.random() < 0.5:
            self.steps = []
            self.engine.ran(self.ran)

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
        store = self.world.store
        match action:
            case Begin():
                said = (self.executor, self.nonce, f"request {self.nonce}")
                self.ask("begin", lambda: store.begin(*said), self.begun)
            case Load(tasks):
                self.ask("load", lambda: store.is_open, lambda ok: self.loaded(tasks, ok=ok))
            case Fetch(objects):
                self.fetch(objects)
            case Run(steps):
                self.steps, self.ran = list(steps), 0
                self.run_next(self.steps)
            case Publish(tasks):
                self.publish(tasks)
            case Send(sequence, commit):
                self.send(sequence, commit)
            case Drop(objects):
                for number in objects:
                    self.values.pop(number, None)
            case Delete(objects):
                self.ask("delete", lambda: store.delete(objects), lambda _: None)
            case Invoke(sequence, offers):
                for index in offers:
                    self.world.invoke(child_name(self.executor, sequence, index))
            case InvokeAgain():
                self.world.invoke(self.executor)
            case Exit():
                self.alive = False

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
            self.world.after(begun.lease / 3, lambda: self.renew(begun.lease / 3))

    def renew(self, pause: float) -> None:
        if not self.alive:
            return
        if self.asleep_until > self.world.time:
            self.world.after(self.asleep_until - self.world.time, lambda: self.renew(pause))
            return

        def renewed(status: Status) -> None:
            if status is Status.OK:
                self.world.after(pause, lambda: self.renew(pause))
            else:
                self.engine.stopped(status)

        store, generation = self.world.store, self.engine.generation
        # At most 31 bytes: Lua and Python pack longer ones differently.
        said = (self.executor, generation, self.nonce, f"at {self.world.time:.3f}".encode())
        self.ask("renew", lambda: store.renew(*said), renewed)

    def loaded(self, tasks: Sequence[int], *, ok: bool) -> None:
        if ok:
            self.engine.loaded([self.world.workload.specs[task] for task in tasks])
        else:
            self.fail(wire.pack(["input", []]))

    def fetch(self, objects: Sequence[int]) -> None:
        store = self.world.store

        def stored(found: dict[int, bytes | None]) -> None:
            self.ask("read", lambda: store.resolve(found), read)

        def read(frames: dict[int, bytes | None]) -> None:
            lost = [number for number, frame in frames.items() if frame is None]
            if lost and (min(lost) < 0 or not self.world.injected.get("fail_over")):
                self.fail(failure.input_lost(lost))
                return
            expected = self.world.workload.expected() if lost else {}
            for number, frame in frames.items():
                self.values[number] = expected[number] if frame is None else thaw(frame)
            self.engine.fetched({n: len(f or b"") for n, f in frames.items()})

        self.ask("fields", lambda: store.read_values(objects), stored)

    def run_next(self, steps: list[Step]) -> None:
        if steps is not self.steps:
            return  # It was given up.
        leaving = self.engine.is_leaving and self.world.rng.random() < 0.5
        if self.ran == len(steps) or leaving:
            self.steps = []
            self.engine.ran(self.ran)
            return

        def done(value: int) -> None:
            if steps is self.steps:
                self.values[task] = value
                for number in drops:
                    del self.values[number]
                self.ran += 1
                self.run_next(steps)

        task, drops = steps[self.ran]
        workload = self.world.workload
        if task == workload.failing:
            self.steps = []
            self.when_awake(lambda: self.fail(wire.pack(["task", task])))
            return
        value = workload.compute(task, self.values)
        # Slow ones outlast a lease; a thousand of them would outlast everybody's patience.
        slow = 3.0 if len(workload.plan) < MANY else 0.02
        pause = self.world.rng.choice((0.001, 0.01, 0.01, slow))
        self.world.after(pause, lambda: self.when_awake(lambda: done(value)))

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
                part_size=4,
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

        self.ask("put", lambda: self.world.store.put({name: value}), put)

    def send(self, sequence: int, commit: Commit) -> None:
        body = commit_body(commit, self.payloads, self.error, self.engine.told)
        generation = self.engine.generation
        # Which tasks these are is known here only; the store counts.
        engine = self.engine
        tasks: tuple[int, ...] = ()
        if commit.stay is not None:
            tasks = tuple(t for t in engine._made if t not in engine._undone)
            assert len(tasks) == commit.passed
            self.payloads.clear()
        self.ask(
            "commit",
            lambda: self.commit(generation, sequence, body, tasks),
            engine.replied,
        )

    def commit(self, generation: int, sequence: int, body: bytes, tasks: Sequence[int]) -> Reply:
        store = self.world.store
        before = store.job.passed if store.job else 0
        reply = store.commit(self.executor, generation, self.nonce, sequence, body)
        if store.job and store.job.passed > before:
            self.world.passes(tasks)
        return reply


def freeze(value: int, salt: int) -> wire.Segments:
    """A value as it travels.

    Equal values need not have equal pickles: sets, for one, follow the hash seed of their process.
    The salt stands for that.
    """
    return wire.dumps([value, salt, salt, salt])


def thaw(frame: bytes) -> int:
    """The value; a frame that is pieced together from two incarnations is a violation."""
    try:
        value, *salts = wire.loads(frame)
    except Exception as error:
        raise Violation(f"a value cannot be read: {error}") from error
    if len(set(salts)) != 1:
        raise Violation("a value is pieced together from two incarnations")
    assert isinstance(value, int)
    return value


class _small_windows:  # noqa: N801 - reads as a statement
    """The engine's limits, so small that small graphs reach them."""

    def __init__(self, rng: random.Random) -> None:
        self._values = {
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
