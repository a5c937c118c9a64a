"""When to share work, and what to keep: the ski-rental rule of docs/design.md, section 4.

Pure: time is an argument. A shell tells a `Policy` what it has seen (tasks that ran, how long, how
large their outputs are; what starting somebody costs here), and asks it to `look` at the engine now
and then; the answer is what `Engine.share` takes.

Nobody knows beforehand what a task costs, but everybody knows what shipping it costs. So nothing is
given away before it has been seen to cost more than that, and each group that is given away pays
its own price. The rules, W1 to W6, are numbered in the comments as in the design.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from wukong_async.engine import Engine
from wukong_async.protocol import TaskSpec

LASTING = 64
"""An estimate is the mean of about as many last tasks of a name."""
BLIND_STARTS = 2
"""An unseen task counts for nothing until it has run or waited for as many starts (W1),"""
BLIND_STARTS_FAN_IN = 4
"""and for as many if its output, whose size nobody knows, will have to travel."""
LEAST_SPARE = 2
"""Starts that the work has to be worth beyond those it pays (W2)."""
LOOK_MOST = 2048
"""Tasks of the plan that one look takes in; the rest is taken to be like them."""
LOOK_SHARE = 0.05
"""Of an executor's time, what looking may take."""
SMALL_TRIPS = 4
"""Round trips that small outputs wait for company in a commit (W6)."""
KEEP_STARTS = 8
"""Starts that a large output is kept while there is other work, if nobody is known to wait."""
ASK_STARTS = 4
"""Starts between two questions for free slots (W5)."""
SCAN_SECONDS = 2e-6
"""What a look takes for each task of the plan."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What it takes to give work away, in seconds and bytes per second."""

    start: float = 0.05
    """From an invocation to the first task."""
    round_trip: float = 0.001
    """A request to the store."""
    bandwidth: float = 100e6
    """Of one executor, to and from the store."""
    invoke: float = 0.001
    """What sending one event costs the sender."""

    def moving(self, size: float) -> float:
        """Seconds to write, or to read, an output of this size."""
        return self.round_trip + size / self.bandwidth

    def blended(self, **measured: float) -> Costs:
        """With measurements: moving averages over about the last four."""
        changes = {n: getattr(self, n) + (seen - getattr(self, n)) / 4 for n, seen in measured.items()}
        return replace(self, **changes)


@dataclass(slots=True)
class Estimate:
    """What tasks of one name are like."""

    count: int = 0
    seconds: float = 0.0
    size: float = 0.0
    """Bytes of an output."""

    def saw(self, seconds: float, size: float) -> None:
        """Another one has run."""
        self.count = min(self.count + 1, LASTING)
        self.seconds += (seconds - self.seconds) / self.count
        self.size += (size - self.size) / self.count


@dataclass(frozen=True, slots=True)
class Sharing:
    """What to say to others now: the arguments of `Engine.share`."""

    arrive: Sequence[int] = ()
    probe: Sequence[int] = ()
    offers: Sequence[Sequence[int]] = ()
    ask: bool = False
    """Nothing, but to hear how many slots are free."""


@dataclass(frozen=True, slots=True)
class Running:
    """What the executor does now."""

    task: int
    since: float
    grown: float = 0.0
    """Bytes that the process has grown by since: at least so much this task has made."""


class Policy:
    """The policy of one incarnation of one executor. An `engine.Advice`.

    Parameters
    ----------
    costs
        What giving work away costs here; may be replaced as it is measured.
    estimates
        What is known of tasks by name; goes on to be learnt.
    inline_limit
        Bytes of an output that travels inside a commit.
    span
        The tasks of the plan, first and last + 1, that nobody else was given in the beginning.
    alone
        Whether no other executor has ever existed.
    hold
        Seconds that a ready task waits before it is offered, one by one, and an output before it
        is told, instead of the rules; 0 is the behaviour of the Wukong paper.
    jitter
        From 0 to 1, another one for each executor, so that not all ask at the same time.
    """

    def __init__(
        self,
        costs: Costs,
        estimates: dict[str, Estimate],
        *,
        inline_limit: int,
        span: tuple[int, int],
        alone: bool = False,
        hold: float | None = None,
        jitter: float = 0.0,
    ) -> None:
        self.costs = costs
        self.estimates = estimates
        self.alone = alone
        self.again = 0.0
        """When to look again, at the latest."""
        self._inline_limit = inline_limit
        self._first, self._until = span
        self._hold = hold
        self._jitter = jitter
        self._met: dict[str, float] = {}
        """Unseen name → since when tasks of it run or wait here."""
        self._ready: dict[int, float] = {}
        """Ready task → since when; for `hold` only."""
        self._sizes: dict[int, float] = {}
        self._due: dict[int, float] = {}
        """Fan-in → when its inputs that are here are to be told."""
        self._probed: set[int] = set()
        self.offered: list[tuple[Sequence[int], int]] = []
        """In the commit in flight: groups, and where in the plan each ends."""
        self._given: list[tuple[int, int]] = []
        """Ranges of the plan that were given away."""
        self._next_offer = 0.0
        self._next_ask = 0.0

    # Advice to the engine ---------------------------------------------------------------------

    def seconds_of(self, task: TaskSpec) -> float:
        """How long a task is expected to run; infinite if none of its name has."""
        estimate = self.estimates.get(task.name)
        return math.inf if estimate is None or self._hold is not None else estimate.seconds

    def probe_at_last(self, pending: Mapping[int, Sequence[tuple[int, int]]]) -> Iterable[int]:
        """Fan-ins that wait for something large from here (W6)."""
        if self.alone or self._hold is not None:
            return ()
        return [c for c, edges in pending.items() if any(self._is_large(d) for _, d in edges)]

    # Facts ------------------------------------------------------------------------------------

    def ran(self, engine: Engine, tasks: Iterable[tuple[int, float, float]], now: float) -> None:
        """Tasks have run: (task, seconds, bytes of the output)."""
        for task, seconds, size in tasks:
            spec = engine.spec(task)
            assert spec is not None
            estimate = self.estimates.get(spec.name)
            if estimate is None:
                estimate = self.estimates[spec.name] = Estimate()
                self._met.pop(spec.name, None)
                self._next_offer = 0.0  # Blindness ends here.
            estimate.saw(seconds, size)
            if size > self._inline_limit:
                self._sizes[task] = size
            if not self.alone:
                self._hold_back(engine, spec, now)

    def replied(self, engine: Engine, accepted: Sequence[bool], now: float) -> None:
        """The answer to what was shared last."""
        offered, self.offered = self.offered, []
        for (group, until), yes in zip(offered, accepted, strict=True):
            if yes:
                self._given.append((group[0], until))
        if self.alone and any(accepted):
            self.alone = False
            made = dict.fromkeys(d for edges in engine.pending.values() for _, d in edges)
            for task in made:
                spec = engine.spec(task)
                if spec is not None and engine.is_done(task):
                    self._hold_back(engine, spec, now)

    # A look -----------------------------------------------------------------------------------

    def look(self, engine: Engine, now: float, running: Running | None = None) -> Sharing | None:
        """What to say to others now, if anything; `again` is when to look next."""
        self.again = math.inf
        if engine.is_busy:
            return None  # The answer is a reason to look again.
        arrive, probe = self._outputs(engine, now)
        groups: list[tuple[Sequence[int], int]] = []
        ask = False
        if now < self._next_offer:
            self.again = min(self.again, self._next_offer)
        elif self._hold is not None:
            groups = self._one_by_one(engine, now, self._hold)
        else:
            groups, ask = self._groups(engine, now, running)
        if not (arrive or probe or groups or ask):
            return None
        self.offered = groups
        return Sharing(arrive, probe, [group for group, _ in groups], ask)

    # Outputs (W6) -----------------------------------------------------------------------------

    def _is_large(self, task: int) -> bool:
        return task in self._sizes

    def _size(self, task: TaskSpec) -> float:
        """Bytes of an output, expected if it is not there; 0 if it travels in a commit."""
        size = self._sizes.get(task.number)
        if size is None:
            estimate = self.estimates.get(task.name)
            size = estimate.size if estimate is not None else 0.0
        return size if size > self._inline_limit else 0.0

    def _hold_back(self, engine: Engine, spec: TaskSpec, now: float) -> None:
        """Note when an output has to be told to those who wait for it."""
        for consumer in spec.consumers:
            if consumer not in engine.pending:
                continue
            reader = engine.spec(consumer)
            others = () if reader is None else reader.inputs
            if self._hold is not None:
                due = now + self._hold
            elif others and all(self._is_ours(engine, d) for d in others):
                continue  # It stays.
            elif not self._is_large(spec.number):
                due = now + SMALL_TRIPS * self.costs.round_trip
            else:
                due = now
            self._due[consumer] = min(due, self._due.get(consumer, math.inf))

    def _is_ours(self, engine: Engine, task: int) -> bool:
        """Whether a task was or will be run here, as far as can be seen."""
        if engine.is_scheduled(task):
            return True
        return self._first <= task < self._until and not self._was_given(task)

    def _was_given(self, task: int) -> bool:
        return any(first <= task < until for first, until in self._given)

    def _outputs(self, engine: Engine, now: float) -> tuple[list[int], list[int]]:
        """Fan-ins to tell of their inputs, and fan-ins to probe."""
        arrive, probe = [], []
        for consumer, due in list(self._due.items()):
            if due > now:
                self.again = min(self.again, due)
                continue
            here = [d for _, d in engine.pending.get(consumer, ()) if engine.is_done(d)]
            del self._due[consumer]
            if not here:
                continue  # It was told, or claimed.
            reader = engine.spec(consumer)
            given = reader is not None and any(self._was_given(d) for d in reader.inputs)
            large = any(self._is_large(d) for d in here)
            if not large or given or consumer in self._probed or self._hold is not None:
                # What was given away has less to do than who gave it: it will run this.
                arrive.append(consumer)
                continue
            probe.append(consumer)
            self._probed.add(consumer)
            costs = self.costs
            size = sum(self._sizes.get(d, 0.0) for d in here)
            self._due[consumer] = now + KEEP_STARTS * costs.start + 2 * costs.moving(size)
            self.again = min(self.again, self._due[consumer])
        return arrive, probe

    # Work (W1 to W5) --------------------------------------------------------------------------

    def _one_by_one(
        self, engine: Engine, now: float, hold: float
    ) -> list[tuple[Sequence[int], int]]:
        """Each task that has waited for as long, but for the next one, for somebody else."""
        queue = engine.offerable()
        self._ready = {task: self._ready.get(task, now) for task in queue}
        queue = queue if engine.unfinished else queue[1:]
        waited = [task for task in queue if self._ready[task] + hold <= now]
        if len(waited) < len(queue):
            self.again = min(self.again, min(s for s in self._ready.values() if s + hold > now) + hold)
        if engine.free <= 0 and waited:
            self.again = min(self.again, now + ASK_STARTS * self.costs.start)
        return [((task,), task + 1) for task in waited[-engine.free :] if engine.free > 0]

    def _groups(
        self, engine: Engine, now: float, running: Running | None
    ) -> tuple[list[tuple[Sequence[int], int]], bool]:
        """Groups for others that pay their price, and whether to ask for free slots."""
        near = engine.offerable()
        # Somebody without anything to do does not give away what it could begin now.
        queue = sorted(near if engine.unfinished else near[1:])
        if not queue:
            return [], False
        stop = max(self._until, queue[-1] + 1)
        scan = min(stop, queue[0] + LOOK_MOST)
        start = self.costs.start
        pause = max(start, (len(queue) / 4 + scan - queue[0]) * SCAN_SECONDS / LOOK_SHARE)
        if stop == scan and engine.learn(range(queue[0], stop)):
            return [], False
        work = self._work(engine, queue, scan, now, running)
        density = sum(work.values()) / (scan - queue[0])
        total = sum(work.values()) + density * (stop - scan)
        most = total / start - LEAST_SPARE
        self._next_offer = now + pause * (1 + self._jitter / 2)
        self.again = min(self.again, self._next_offer)
        if most < 1:
            return [], False
        if engine.free <= 0:
            if now < self._next_ask:
                return [], False
            self._next_ask = now + ASK_STARTS * pause * (1 + self._jitter)
            return [], True
        blind = any(name in self._met for name in self._names(engine, queue))
        at_once = math.sqrt(engine.free) if blind else max(1.0, start / self.costs.invoke)
        count = int(min(most, at_once, engine.free))
        while count >= 1:
            groups = self._cut(queue, work, density, scan, stop, total, count)
            paid = [g for g in groups if self._pays(engine, g, work, density, scan)]
            if len(paid) == len(groups):
                return [(group, until) for group, until in paid], False
            count = min(len(paid), count // 2)
        return [], False

    @staticmethod
    def _names(engine: Engine, tasks: Iterable[int]) -> set[str]:
        specs = (engine.spec(task) for task in tasks)
        return {spec.name for spec in specs if spec is not None}

    def _work(
        self, engine: Engine, queue: Sequence[int], scan: int, now: float, running: Running | None
    ) -> dict[int, float]:
        """Expected seconds of the tasks that follow each other from the queue on, without others.

        Of those that are known: what needs something that is not here has to wait for it, and
        does not count.
        """
        seconds: dict[str, float] = {}
        if running is not None:
            self._overrun(engine, now, running, seconds)
        queued = set(queue)
        work: dict[int, float] = {}
        for number in range(queue[0], scan):
            spec = engine.spec(number)
            if spec is None or engine.is_scheduled(number):
                continue
            if number not in queued and not all(d in work or engine.is_here(d) for d in spec.inputs):
                continue
            if self._was_given(number):
                continue
            expected = seconds.get(spec.name)
            if expected is None:
                expected = seconds[spec.name] = self._expected(spec, now)
            work[number] = expected
        return work

    def _expected(self, spec: TaskSpec, now: float) -> float:
        """W1."""
        estimate = self.estimates.get(spec.name)
        if estimate is not None:
            return estimate.seconds
        waited = now - self._met.setdefault(spec.name, now)
        blind = BLIND_STARTS_FAN_IN if max(spec.degrees, default=0) > 1 else BLIND_STARTS
        return waited if waited >= blind * self.costs.start else 0.0

    def _overrun(
        self, engine: Engine, now: float, running: Running, seconds: dict[str, float]
    ) -> None:
        """What the running task says of those of its name."""
        spec = engine.spec(running.task)
        if spec is None:
            return
        estimate = self.estimates.get(spec.name)
        elapsed = now - running.since
        if estimate is None:
            self._met[spec.name] = min(running.since, self._met.get(spec.name, now))
        elif elapsed > estimate.seconds:
            count = estimate.count
            seconds[spec.name] = (count * estimate.seconds + 2 * elapsed) / (count + 1)
        if running.grown > self._inline_limit and estimate is None:
            self._sizes[running.task] = running.grown

    def _cut(
        self,
        queue: Sequence[int],
        work: Mapping[int, float],
        density: float,
        scan: int,
        stop: int,
        total: float,
        count: int,
    ) -> list[tuple[Sequence[int], int]]:
        """`count` groups from the far end, such that all would finish together (W4)."""
        start = self.costs.start
        share = max((total - (total + count * start) / (count + 1)) / count, 0.0)
        groups: list[tuple[Sequence[int], int]] = []
        group: list[int] = []
        until, held = stop, 0.0
        end = stop
        for task in reversed(queue):
            held += sum(work.get(n, 0.0) for n in range(task, min(end, scan)))
            held += density * (end - max(task, scan)) if end > scan else 0.0
            group.append(task)
            end = task
            if held >= share and held > 0:
                groups.append((group[::-1], until))
                group, until, held = [], task, 0.0
                if len(groups) == count:
                    break
        return groups

    def _pays(
        self,
        engine: Engine,
        group: tuple[Sequence[int], int],
        work: Mapping[int, float],
        density: float,
        scan: int,
    ) -> bool:
        """Whether a group is worth its start and what has to move because of it (W3)."""
        tasks, until = group
        first = tasks[0]
        known = [n for n in range(first, min(until, scan)) if n in work]
        inputs: dict[int, float] = {}
        out = 0.0
        for number in known:
            spec = engine.spec(number)
            assert spec is not None
            for d in spec.inputs:
                if d not in inputs and engine.is_done(d) and not engine.is_published(d):
                    source = engine.spec(d)
                    inputs[d] = self._size(source) if source is not None else 0.0
            size = self._size(spec)
            if size and not spec.requested and any(c not in work or c >= until for c in spec.consumers):
                out += size
        gain = sum(work[n] for n in known)
        moved = sum(inputs.values()) + out
        unknown = until - max(first, scan)
        if unknown > 0:
            gain += density * unknown
        price = self.costs.start + 2 * moved / self.costs.bandwidth
        return gain >= price


def first_groups(
    leaves: Sequence[int],
    tasks: int,
    seconds: float,
    costs: Costs,
    slots: int,
    leaf_batch: int | None = None,
) -> int:
    """How many executors begin a job: as many as its leaves are worth (W2).

    Parameters
    ----------
    seconds
        What all tasks are expected to take, as far as that is known.
    leaf_batch
        Leaves for each, instead.
    """
    if leaf_batch is not None:
        wanted = math.ceil(len(leaves) / leaf_batch)
    else:
        wanted = int(seconds / costs.start - LEAST_SPARE)
    return max(1, min(wanted, len(leaves), slots))
