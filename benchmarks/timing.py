"""A timing model: the real engine and the real policy, on a simulated clock.

Executors, store and network are simulated without faults: an invocation takes `start` seconds to
begin, a request `round_trip`, bytes go through an executor's own link at `bandwidth`, tasks take
what the case says. What the policy knows is what it would know: what has been measured. So its
rules are tuned here, in seconds and without noise, and confirmed on a cluster.
"""

from __future__ import annotations

import heapq
import itertools
import math
import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

# The one model of the store that there is; a differential test holds it to the scripts.
from tests.simulation.model import ModelStore
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
from wukong_async.plan import Plan, make_plan
from wukong_async.policy import Costs, Estimate, Policy, Running, first_groups
from wukong_async.protocol import Commit, JobState, Payload, Reply, TaskSpec, child_name
from wukong_async.store import NewJob, commit_body

INLINE = 16 * 1024
OVERHEAD = 2e-6
"""Seconds that a task takes beyond its own."""


@dataclass(frozen=True)
class Place:
    """Where executors run."""

    name: str
    costs: Costs
    slots: int


AWS = Place("aws", Costs(start=0.05, round_trip=0.001, bandwidth=100e6, invoke=0.00025), 1000)
LOCAL = Place("local", Costs(start=0.002, round_trip=0.0001, bandwidth=1e9, invoke=0.001), 2)


@dataclass(frozen=True)
class Case:
    """A graph with what its tasks take."""

    name: str
    dependencies: Mapping[str, Sequence[str]]
    outputs: Sequence[str]
    seconds: Callable[[str], float]
    size: Callable[[str], float]
    place: Place = AWS
    blind: bool = True
    """Whether the names of its tasks have never been seen."""


def name_of(key: str) -> str:
    """Tasks are called `name-…`."""
    return key.partition("-")[0]


@dataclass
class Outcome:
    """What a run took."""

    seconds: float
    """Until the result was announced."""
    cost: float
    """Seconds of all executors, starts included."""
    starts: int
    commits: int
    moved: float
    """Bytes into and out of the store, of large outputs."""
    idle: float
    """Seconds that executors were there and neither ran, read, wrote nor waited for an answer."""


class World:
    """Runs one case."""

    def __init__(self, case: Case, *, hold: float | None = None, leaf_batch: int | None = None):
        self.case = case
        self.hold = hold
        self.plan: Plan = make_plan(case.dependencies, case.outputs)
        self.specs = [
            spec._replace(name=name_of(key))
            for spec, key in zip(self.plan.specs, self.plan.keys, strict=True)
        ]
        self.seconds = [case.seconds(key) for key in self.plan.keys]
        self.sizes = [case.size(key) for key in self.plan.keys]
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.store = ModelStore(lambda: self.now)
        self.done: float | None = None
        self.starts = 0
        self.cost = 0.0
        self.moved = 0.0
        self.idle = 0.0
        self.estimates = {} if case.blind else known(case, self.plan)
        each = [self.estimates.get(spec.name) for spec in self.specs] if self.estimates else []
        self.groups = first_groups(
            self.plan.specs, each, case.place.costs, case.place.slots, leaf_batch
        )

    def after(self, delay: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._order), event))

    def run(self) -> Outcome:
        place = self.case.place
        self.store.open()
        self.store.create(
            NewJob(
                tasks=len(self.plan),
                want=len(self.plan.requested),
                channel="",
                slots=place.slots,
                lease=1e9,
                grace=1e9,
                attempts=3,
                unstarted=3,
                ttl=1e9,
                facts=b"",
                values=(),
                records=[(str(i), group) for i, group in enumerate(self.groups)],
            )
        )
        ends = [group[0] for group in self.groups[1:]] + [len(self.plan)]
        for index, (group, until) in enumerate(zip(self.groups, ends, strict=True)):
            first = 0 if index == 0 else group[0]
            alone = len(self.groups) == 1
            self.invoke(str(index), index, (first, until), self.estimates, alone=alone)
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()
        job = self.store.job
        if job is None or job.state is not JobState.DONE or self.done is None:
            raise RuntimeError(f"{self.case.name}: the job has not ended")
        return Outcome(self.done, self.cost, self.starts, job.commits, self.moved, self.idle)

    def invoke(
        self,
        name: str,
        index: int,
        span: tuple[int, int],
        estimates: Mapping[str, Estimate],
        *,
        alone: bool = False,
    ) -> None:
        """The `index`-th of several events is sent."""
        costs = self.case.place.costs
        self.starts += 1
        seen = {n: Estimate(e.count, e.seconds, e.size) for n, e in estimates.items()}
        executor = Executor(self, name, span, seen, alone=alone)
        self.after((index + 1) * costs.invoke + costs.start, executor.begin)


def known(case: Case, plan: Plan) -> dict[str, Estimate]:
    """What is known of a case that has been computed before."""
    estimates: dict[str, Estimate] = {}
    for key in plan.keys:
        estimates.setdefault(name_of(key), Estimate()).saw(case.seconds(key), case.size(key))
    for name, estimate in estimates.items():
        estimate.count = sum(name_of(key) == name for key in plan.keys)
    return estimates


@dataclass
class Executor:
    """The shell around engine and policy."""

    world: World
    name: str
    span: tuple[int, int]
    estimates: dict[str, Estimate]
    alone: bool = False
    steps: Sequence[Step] = ()
    ends: list[float] = field(default_factory=list)
    since: float = 0.0
    alive: bool = True
    begun_at: float = 0.0
    link: float = 0.0
    waiting: int = 0
    resting: float | None = None
    timer: float = math.inf

    def __post_init__(self) -> None:
        costs = self.world.case.place.costs
        self.policy = Policy(
            costs,
            self.estimates,
            inline_limit=INLINE,
            span=self.span,
            slots=self.world.case.place.slots,
            alone=self.alone,
            hold=self.world.hold,
            jitter=(zlib.crc32(self.name.encode()) % 97) / 97,
        )
        self.engine = Engine(self.policy, run_seconds=costs.start / 2)

    def begin(self) -> None:
        self.begun_at = self.world.now
        self.step()

    def ask(self, answered: Callable[[], None], size: float = 0.0) -> None:
        """A request, with so many bytes."""
        costs = self.world.case.place.costs
        self.waiting += 1
        self.link = max(self.link, self.world.now) + size / costs.bandwidth
        self.world.moved += size

        def arrive() -> None:
            self.waiting -= 1
            if self.alive:
                answered()
                self.step()

        self.world.after(self.link - self.world.now + costs.round_trip, arrive)

    def running(self) -> Running | None:
        if not self.steps:
            return None
        world = self.world
        index = min(bisect_right(self.ends, world.now), len(self.steps) - 1)
        since = self.ends[index - 1] if index else self.since
        task = self.steps[index].task
        share = (world.now - since) / max(self.ends[index] - since, 1e-9)
        return Running(task, since, world.sizes[task] * min(1.0, share))

    def step(self) -> None:
        world = self.world
        if self.resting is not None:
            world.idle += world.now - self.resting
            self.resting = None
        while self.alive:
            if self.engine.state is State.WORK:
                sharing = self.policy.look(self.engine, world.now, self.running())
                if sharing is not None:
                    if sharing.ask:
                        self.engine.ask()
                    else:
                        self.engine.share(sharing.arrive, sharing.probe, sharing.offers)
            actions = self.engine.next_actions()
            for action in actions:
                self.perform(action)
            if not actions:
                break
        if not self.alive:
            return
        if not self.steps and not self.waiting:
            self.resting = world.now
        again = self.policy.again
        if world.now < again < self.timer:
            self.timer = again
            world.after(again - world.now, partial(self.ring, again))

    def ring(self, when: float) -> None:
        if when == self.timer:
            self.timer = math.inf
            if self.alive:
                self.step()

    def perform(self, action: Action) -> None:
        world, engine = self.world, self.engine
        match action:
            case Begin():
                self.ask(lambda: engine.begun(world.store.begin(self.name, self.name)))
            case Load(tasks):
                self.ask(lambda: engine.loaded([world.specs[t] for t in tasks]))
            case Fetch(objects):
                self.ask(partial(self.looked, objects))
            case Run(steps):
                self.run(steps)
            case Publish(tasks):
                size = sum(world.sizes[t] for t in tasks if world.sizes[t] > INLINE)
                if size:
                    self.ask(engine.published, size)
                else:
                    engine.published()
            case Send(sequence, commit):
                self.send(sequence, commit)
            case Invoke(sequence, offers):
                for index, offer in enumerate(offers):
                    child = child_name(self.name, sequence, offer)
                    world.invoke(child, index, self.invited[offer], self.estimates)
            case Exit():
                self.alive = False
                costs = world.case.place.costs
                world.cost += world.now - self.begun_at + costs.start
            case Drop() | Delete():
                pass
            case InvokeAgain():
                raise AssertionError("nobody hands over")

    def looked(self, objects: Sequence[int]) -> None:
        sizes = {n: self.world.sizes[n] for n in objects}
        large = sum(size for size in sizes.values() if size > INLINE)
        fetched = partial(self.engine.fetched, {n: int(s) for n, s in sizes.items()})
        if large:
            self.ask(fetched, large)
        else:
            fetched()

    def run(self, steps: Sequence[Step]) -> None:
        world = self.world
        self.steps, self.since = steps, world.now
        times = itertools.accumulate(
            (world.seconds[s.task] + OVERHEAD for s in steps), initial=world.now
        )
        self.ends = list(times)[1:]

        def ran() -> None:
            self.steps = ()
            self.engine.ran()
            seen = [(s.task, world.seconds[s.task], world.sizes[s.task]) for s in steps]
            self.policy.ran(self.engine, seen, world.now)
            self.step()

        world.after(self.ends[-1] - world.now, ran)

    def send(self, sequence: int, commit: Commit) -> None:
        world = self.world
        payloads = {
            task: Payload(b"", f"{world.sizes[task]:.0f}:1:w" if world.sizes[task] > INLINE else "")
            for task in {*(t for t, _ in commit.publish), *commit.results}
        }
        body = commit_body(commit, payloads, b"", self.engine.told)
        self.invited = [self.policy.span_of(group) for group in commit.offers]

        def replied() -> None:
            reply = self.reply
            self.policy.replied(self.engine, commit.offers, reply.accepted, world.now)
            self.engine.replied(reply)

        def arrive() -> None:
            self.reply: Reply = world.store.commit(
                self.name, self.engine.generation, self.name, sequence, body
            )
            if world.done is None and world.store.job and world.store.job.state is JobState.DONE:
                world.done = world.now

        self.world.after(world.case.place.costs.round_trip / 2, arrive)
        self.ask(replied)


def clairvoyant(case: Case) -> float:
    """Seconds of the best schedule found by whoever knows everything.

    List scheduling by upward rank on k executors that are all started at once, for several k; each
    task goes where it ends first. What is moved takes a round trip, and the bytes twice.
    """
    plan = make_plan(case.dependencies, case.outputs)
    costs = case.place.costs
    seconds = [case.seconds(key) + OVERHEAD for key in plan.keys]
    moving = [
        costs.round_trip + (2 * s / costs.bandwidth if (s := case.size(k)) > INLINE else 0.0)
        for k in plan.keys
    ]
    rank = [0.0] * len(plan)
    for spec in reversed(plan.specs):
        rank[spec.number] = seconds[spec.number] + max(
            (rank[c] for c in spec.consumers), default=0.0
        )
    order = sorted(range(len(plan)), key=lambda n: (-rank[n], n))
    best = math.inf
    count = 1
    while True:
        best = min(best, _listed(plan.specs, order, seconds, moving, count, costs.start))
        if count >= min(case.place.slots, len(plan)):
            return best + costs.round_trip
        count = min(count * 2, case.place.slots)


def _listed(
    specs: Sequence[TaskSpec],
    order: Sequence[int],
    seconds: Sequence[float],
    moving: Sequence[float],
    count: int,
    start: float,
) -> float:
    free = [start] * count
    heap = [(start, m) for m in range(count)]
    end: dict[int, float] = {}
    where: dict[int, int] = {}
    for number in order:
        inputs = specs[number].inputs
        while heap[0][0] != free[heap[0][1]]:
            heapq.heapreplace(heap, (free[heap[0][1]], heap[0][1]))
        best = (math.inf, 0)
        for m in dict.fromkeys((*[where[d] for d in inputs[:8]], heap[0][1])):
            ready = max(
                (end[d] + (0.0 if where[d] == m else moving[d]) for d in inputs), default=0.0
            )
            best = min(best, (max(ready, free[m]) + seconds[number], m))
        end[number], where[number] = best
        free[best[1]] = best[0]
    return max(end.values())
