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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from operator import itemgetter
from typing import TypeAlias

from benchmarks.shapes import Key, Shape

# The one model of the store that there is; a differential test holds it to the scripts.
from tests.simulation.model import ModelStore
from wukong_async.blocks import first_blocks, name_of
from wukong_async.engine import (
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
from wukong_async.executor.incarnation import MOST_PARCELED
from wukong_async.plan import Plan, make_plan
from wukong_async.policy import (
    Costs,
    Estimate,
    Meter,
    Policy,
    Running,
    first_groups,
    news_of,
    recalled,
    waited_in,
)
from wukong_async.protocol import Commit, JobState, Payload, Reply, TaskSpec, child_name
from wukong_async.store import NewJob, commit_body

INLINE = 16 * 1024
TRIPS = 1
"""Requests of an executor before its first task: blocks of the plan are read at the same time."""
BLOCK = 256
"""Tasks of a block."""
OVERHEAD = 2e-6
"""Seconds that a task takes beyond its own."""
SMALL = 100.0
"""Bytes of what is hardly anything."""
PIECES = 8
"""Readers of a task that make each of them read a piece of it."""

Figures: TypeAlias = float | Mapping[str, float] | Callable[[Key], float]
"""Of all tasks; or by name, where `name>reader` says more (whose outputs tasks called `reader`
read), and so does `name*` (which take a piece of what many read); or by key."""
Fused: TypeAlias = Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Place:
    """Where executors run."""

    name: str
    costs: Costs
    slots: int


AWS = Place("aws", Costs(start=0.05, round_trip=0.001, bandwidth=100e6, invoke=0.00025), 1000)
COLD = replace(AWS, name="cold", costs=replace(AWS.costs, start=0.25))
LOCAL = Place("local", Costs(start=0.002, round_trip=0.0001, bandwidth=1e9, invoke=0.001), 2)


@dataclass(frozen=True)
class Case:
    """A graph, with what its tasks take and make."""

    name: str
    shape: Callable[[], Shape]
    takes: Figures
    """Seconds of each task."""
    makes: Figures = SMALL
    """Bytes of each output."""
    place: Place = AWS

    @cached_property
    def plan(self) -> Plan:
        """The plan of the graph, with the names of its tasks."""
        shape = self.shape()
        plan = make_plan(shape.dependencies, shape.outputs)
        named = [s._replace(name=name_of(k)) for s, k in zip(plan.specs, plan.keys, strict=True)]
        return replace(plan, specs=named)

    @cached_property
    def seconds(self) -> list[float]:
        """Of each task, by number."""
        return _figures(self.takes, self.plan, sum)

    @cached_property
    def sizes(self) -> list[float]:
        """Bytes of each output, by number."""
        return _figures(self.makes, self.plan, itemgetter(-1))


def _figures(figures: Figures, plan: Plan, fused: Fused) -> list[float]:
    if callable(figures):
        return [figures(key) for key in plan.keys]
    if isinstance(figures, Mapping):
        return [_figure(figures, plan.specs, spec, fused) for spec in plan.specs]
    return [figures] * len(plan)


def _figure(
    figures: Mapping[str, float], specs: Sequence[TaskSpec], spec: TaskSpec, fused: Fused
) -> float:
    """The most particular one that there is.

    Tasks that Dask has fused are called after all of them: what they take and make follows.

    Raises
    ------
    KeyError
        If there is none.
    """
    consumer = specs[spec.consumers[0]].name if spec.consumers else ""
    piece = any(len(specs[d].consumers) >= PIECES for d in spec.inputs)
    for label in (f"{spec.name}*" if piece else "", f"{spec.name}>{consumer}", spec.name):
        if label in figures:
            return figures[label]
    parts = [figures[part] for part in spec.name.split("-") if part in figures]
    if not parts:
        raise KeyError(spec.name)
    return fused(parts)


@dataclass(frozen=True)
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
    """Runs one case.

    Parameters
    ----------
    known
        Whether an earlier job has left what is worth remembering.
    hold, leaf_batch
        As in the settings.
    """

    def __init__(
        self,
        case: Case,
        *,
        known: bool = False,
        hold: float | None = None,
        leaf_batch: int | None = None,
    ) -> None:
        self.case = case
        self.hold = hold
        self.now = 0.0
        self.store = ModelStore(lambda: self.now)
        self.done: float | None = None
        self.starts = 0
        self.cost = 0.0
        self.moved = 0.0
        self.idle = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._estimates = remembered_of(case) if known else {}
        specs, place = case.plan.specs, case.place
        each = [self._estimates.get(spec.name) for spec in specs] if known else []
        self._groups = first_groups(
            specs, self.case.plan.leaves, each, place.costs, place.slots, leaf_batch
        )

    def after(self, delay: float, event: Callable[[], None]) -> None:
        """Let something happen in so many seconds."""
        heapq.heappush(self._events, (self.now + delay, next(self._order), event))

    def run(self) -> Outcome:
        """Run until nothing happens any more.

        Raises
        ------
        RuntimeError
            If the job has not ended then.
        """
        case, groups = self.case, self._groups
        self.store.open()
        self.store.create(
            NewJob(
                tasks=len(case.plan),
                want=len(case.plan.requested),
                channel="",
                slots=case.place.slots,
                lease=1e9,
                grace=1e9,
                attempts=3,
                unstarted=3,
                ttl=1e9,
                facts=b"",
                values=(),
                records=[(str(i), group) for i, group in enumerate(groups)],
            )
        )
        ends = [group[0] for group in groups[1:]] + [len(case.plan)]
        alone = len(groups) == 1
        room = None if alone else max(0, case.place.slots - len(groups)) // len(groups)
        for index, (group, until) in enumerate(zip(groups, ends, strict=True)):
            span = (0 if index == 0 else group[0], until)
            self.invoke(str(index), index, group, span, self._estimates, alone=alone, room=room)
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()
        job = self.store.job
        if job is None or job.state is not JobState.DONE or self.done is None:
            raise RuntimeError(f"{case.name}: the job has not ended")
        return Outcome(self.done, self.cost, self.starts, job.commits, self.moved, self.idle)

    def invoke(
        self,
        name: str,
        index: int,
        group: Sequence[int],
        span: tuple[int, int],
        estimates: Mapping[str, Estimate],
        *,
        carried: Iterable[int] = (),
        alone: bool = False,
        waited: Mapping[str, float] | None = None,
        room: int | None = None,
    ) -> None:
        """The `index`-th of several events is sent."""
        costs = self.case.place.costs
        self.starts += 1
        seen = {n: Estimate(e.count, e.seconds, e.size) for n, e in estimates.items()}
        executor = Executor(self, name, span, seen, alone=alone, waited=waited, room=room)
        starts = range(0, len(self.case.plan), BLOCK)
        executor.blocks.update(first_blocks(starts, group[:LOAD_AHEAD]))
        executor.carried.update(carried)
        self.after((index + 1) * costs.invoke + costs.start, executor.begin)


def remembered_of(case: Case) -> dict[str, Estimate]:
    """What jobs know of such tasks after one has run."""
    estimates: dict[str, Estimate] = {}
    for spec, seconds, size in zip(case.plan.specs, case.seconds, case.sizes, strict=True):
        estimates.setdefault(spec.name, Estimate()).saw(seconds, size)
    meter = Meter()
    meter.believe(case.place.costs)
    return recalled(news_of(estimates, meter, {}))[0]


@dataclass
class Executor:
    """The shell around engine and policy."""

    world: World
    name: str
    span: tuple[int, int]
    estimates: dict[str, Estimate]
    alone: bool = False
    waited: Mapping[str, float] | None = None
    room: int | None = None
    blocks: set[int] = field(default_factory=set)
    """Of the plan, which have been read, or were asked for before anything else;"""
    carried: set[int] = field(default_factory=set)
    """objects that came along with the event."""
    steps: Sequence[Step] = ()
    ends: list[float] = field(default_factory=list)
    since: float = 0.0
    alive: bool = True
    runs: int = 0
    """Counts Runs, and one twice of which something is taken back."""
    begun_at: float = 0.0
    lines: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Until when it reads, and writes."""
    waiting: int = 0
    resting: float | None = None
    timer: float = math.inf

    def __post_init__(self) -> None:
        place = self.world.case.place.costs
        # As an executor measures it: up to its first task, with the record, a block and an input.
        costs = replace(place, start=place.start + TRIPS * place.round_trip)
        self.policy = Policy(
            costs,
            self.estimates,
            inline_limit=INLINE,
            span=self.span,
            slots=self.world.case.place.slots,
            alone=self.alone,
            hold=self.world.hold,
            waited=self.waited,
            room=self.room,
            jitter=(zlib.crc32(self.name.encode()) % 97) / 97,
        )
        self.engine = Engine(self.policy, run_seconds=costs.start / 2)

    def begin(self) -> None:
        """The event has arrived."""
        self.begun_at = self.world.now
        self._step()

    def _ask(
        self, answered: Callable[[], None], size: float = 0.0, *, writes: bool = False
    ) -> None:
        """A request, with so many bytes.

        Each way of a line has its own bandwidth, and what is small has connections of its own.
        """
        world, costs = self.world, self.world.case.place.costs
        self.waiting += 1
        world.moved += size
        ends = (max(self.lines[writes], world.now) if size else world.now) + size / costs.bandwidth
        self.lines[writes] = max(self.lines[writes], ends)

        def arrive() -> None:
            self.waiting -= 1
            if self.alive:
                answered()
                self._step()

        world.after(ends - world.now + costs.round_trip, arrive)

    def _running(self) -> Running | None:
        """What the thread does now."""
        if not self.steps:
            return None
        world = self.world
        index = min(bisect_right(self.ends, world.now), len(self.steps) - 1)
        since = self.ends[index - 1] if index else self.since
        task = self.steps[index].task
        share = (world.now - since) / max(self.ends[index] - since, 1e-9)
        return Running(task, since, world.case.sizes[task] * min(1.0, share))

    def _step(self) -> None:
        """Ask policy and engine, until they have nothing more to say."""
        world = self.world
        if self.resting is not None:
            world.idle += world.now - self.resting
            self.resting = None
        while self.alive:
            if self.engine.state is State.WORK:
                sharing = self.policy.look(self.engine, world.now, self._running())
                if sharing is not None:
                    self.engine.share(
                        sharing.arrive, sharing.probe, sharing.offers, ask=sharing.ask
                    )
            actions = self.engine.next_actions()
            for action in actions:
                self._perform(action)
            if not actions:
                break
        if not self.alive:
            return
        if not self.steps and not self.waiting:
            self.resting = world.now
        again = self.policy.again
        if world.now < again < self.timer:
            self.timer = again
            world.after(again - world.now, partial(self._ring, again))

    def _ring(self, when: float) -> None:
        """It is time for another look, unless there is to be one earlier."""
        if when == self.timer:
            self.timer = math.inf
            if self.alive:
                self._step()

    def _perform(self, action: Action) -> None:
        world, engine = self.world, self.engine
        match action:
            case Begin():
                self._ask(lambda: engine.begun(world.store.begin(self.name, self.name)))
            case Load(tasks):
                self._load({task // BLOCK for task in tasks})
            case Fetch(objects):
                self._fetch(objects)
            case Run(steps):
                self._run(steps)
            case Publish(tasks):
                size = sum(world.case.sizes[t] for t in tasks if world.case.sizes[t] > INLINE)
                if size:
                    self._ask(engine.published, size, writes=True)
                else:
                    engine.published()
            case Send(sequence, commit):
                self._send(sequence, commit)
            case Invoke(sequence, offers):
                room = self.policy.room_of(engine, len(offers))
                for index, offer in enumerate(offers):
                    child = child_name(self.name, sequence, offer)
                    waited = waited_in(self.policy.seen(world.now))
                    group, span, carried = self.invited[offer]
                    world.invoke(
                        child,
                        index,
                        group,
                        span,
                        self.estimates,
                        carried=carried,
                        waited=waited,
                        room=room,
                    )
            case Exit():
                self.alive = False
                costs = world.case.place.costs
                world.cost += world.now - self.begun_at + costs.start
            case Drop() | Delete():
                pass
            case InvokeAgain():
                raise AssertionError("nobody hands over")

    def _load(self, blocks: set[int]) -> None:
        """Read blocks of the plan, unless they are here."""
        specs = self.world.case.plan.specs
        tasks = [spec for block in blocks for spec in specs[block * BLOCK : (block + 1) * BLOCK]]
        loaded = partial(self.engine.loaded, tasks)
        if blocks <= self.blocks:
            loaded()
        else:
            self._ask(loaded)
        self.blocks |= blocks

    def _fetch(self, objects: Sequence[int]) -> None:
        """Read inputs, unless they came along with the event."""
        sizes = {n: self.world.case.sizes[n] for n in objects}
        large = sum(size for size in sizes.values() if size > INLINE)
        fetched = partial(self.engine.fetched, {n: int(s) for n, s in sizes.items()})
        if self.carried.issuperset(objects):
            fetched()
        elif large:
            self._ask(partial(self._ask, fetched, large))
        else:
            self._ask(fetched)

    def _run(self, steps: Sequence[Step]) -> None:
        world = self.world
        self.steps, self.since = steps, world.now
        times = itertools.accumulate(
            (world.case.seconds[s.task] + OVERHEAD for s in steps), initial=world.now
        )
        self.ends = list(times)[1:]

        self._await_end()
        if len(steps) > 1:
            late = self.policy.late_at(world.now) - world.now
            world.after(late, partial(self._take_back, self.runs))

    def _await_end(self) -> None:
        self.runs += 1
        self.world.after(self.ends[-1] - self.world.now, partial(self._ran, self.runs))

    def _ran(self, run: int) -> None:
        """The thread is through with a Run, unless some of that was taken back."""
        world = self.world
        if run != self.runs:
            return
        tasks = [step.task for step in self.steps]
        self.steps = ()
        self.engine.ran()
        seen = [(task, world.case.seconds[task], world.case.sizes[task]) for task in tasks]
        self.policy.ran(self.engine, seen, world.now)
        self._step()

    def _take_back(self, run: int) -> None:
        """What waits behind a task that takes too long is ready again."""
        begun = bisect_right(self.ends, self.world.now) + 1
        if run != self.runs or begun >= len(self.steps):
            return
        keep = self.engine.take_back(begun)
        if keep < len(self.steps):
            self.steps, self.ends = self.steps[:keep], self.ends[:keep]
            self._await_end()
        self._step()

    def _send(self, sequence: int, commit: Commit) -> None:
        world = self.world
        payloads = {
            task: Payload(
                b"", f"{size:.0f}:1:w" if (size := world.case.sizes[task]) > INLINE else ""
            )
            for task in {*(t for t, _ in commit.publish), *commit.results}
        }
        body = commit_body(commit, payloads, b"", self.engine.told)
        small = {task for task, _ in commit.publish if world.case.sizes[task] <= INLINE}
        specs = world.case.plan.specs
        self.invited = [
            (
                group,
                self.policy.span_of(group),
                small.intersection(d for task in group[:MOST_PARCELED] for d in specs[task].inputs),
            )
            for group in commit.offers
        ]

        def replied() -> None:
            reply = self.reply
            self.policy.replied(self.engine, commit.offers, reply, world.now)
            self.engine.replied(reply)

        def arrive() -> None:
            self.reply: Reply = world.store.commit(
                self.name, self.engine.generation, self.name, sequence, body
            )
            if world.done is None and world.store.job and world.store.job.state is JobState.DONE:
                world.done = world.now

        self.world.after(world.case.place.costs.round_trip / 2, arrive)
        self._ask(replied)
