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
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise

from wukong_async.engine import Engine
from wukong_async.protocol import Reply, TaskSpec

LASTING = 64
"""An estimate is the mean of about as many last tasks of a name."""
LEAST_START = 0.005
"""Seconds that no start is taken to be shorter than: so much passes before anybody is of use."""
RECENT = 4
"""A cost is the mean of about as many last measurements."""
DOUBT, MOST_DOUBT = 1.5, 8.0
"""How many times as high a bandwidth is believed to be after a job in which it was not measured,
and after many."""
REMEMBERED = 4
"""What is remembered from other jobs counts as much as so many tasks of this one."""
LONGEST_NAME = 100
"""Characters of a name that is remembered."""
MOST_FIGURE = 1e15
NOTABLE = 2.0
"""What has changed less is not worth telling."""
MOST_NAMES = 200
"""Names that are remembered, those that took the longest in all."""
BLIND_STARTS = 2
"""An unseen task counts for nothing until it has run or waited for as many starts (W1),"""
BLIND_STARTS_FAN_IN = 4
"""and for as many if its output, whose size nobody knows, will have to travel."""
SHARED, LEAST_SPARE = 0.9, 1
"""As many executors as so much of the work is worth starts, less so many (W2): the last ones cost
the most for what they bring."""
MOST_READERS = 64
"""Readers of an output, and inputs of one of them, that are looked at to see who waits for it."""
MOST_EDGES = 10_000
"""Inputs that are told or probed in one commit: a larger one holds up others."""
LEAST_WORK = 0.05
"""Seconds of work below which nothing is shared: events and commits take their time as well.
(Trees of 1,000 trivial tasks, 30 ms of work, were not seen to end sooner when two shared them.)"""
LEAST_LATE = 0.025
"""Seconds that tasks wait at the least for one that outlasts its estimate."""
PAYS = 0.85
"""A group has to be worth so much of its price (W3)."""
FEW = 8
"""Groups whose number is tried one by one."""
LOOK_MOST = 2048
"""Tasks of the plan that one look takes in; the rest is taken to be like them."""
UNSEEN_DEPTH = 8
"""Tasks in a row, none of which has been seen, through which a size is guessed."""
LOOK_SHARE = 0.05
"""Of an executor's time, what looking may take."""
SMALL_TRIPS = 4
"""Round trips that small outputs wait for company in a commit (W6)."""
KEEP_TIMES = 8
"""Shipping costs for which a large output is kept, while there is other work."""
CUT_SLACK = 0.35
"""How much larger or smaller than its share a group may be if less has to be moved so."""
LEAST_MOVED = 16 * 1024
"""Bytes that are worth counting as moved."""
LAST_BYTES = 4e6
"""Beside an output of more than this that is to be written, what is much smaller is told first."""
END_PRECISION = 1e-3
"""To which share the end of those who begin a job is known;"""
END_SLACK = 0.01
"""and by which share they may end later, if they are more then."""
ROOM_STARTS = 4
"""Starts in which an executor leaves free slots to those who have begun with it."""
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


NEARBY = Costs(start=0.005, round_trip=0.0003, bandwidth=500e6)
"""What is believed of a store on the same machine, until it is measured."""


class Meter:
    """Costs as they are measured, which a warm sandbox keeps: moving averages.

    Until something is measured here, what somebody else has measured is believed.
    """

    def __init__(self) -> None:
        self.costs = Costs()
        self._counts: Counter[str] = Counter()
        self._moved = False
        """Whether the bandwidth was measured since the last job began;"""
        self._last = 0.0
        """what it was then, on average."""

    @property
    def measured(self) -> bool:
        """Whether what matters has been measured here."""
        return self._counts["start"] > 0 and self._last == self.costs.bandwidth

    def believe(self, costs: Costs) -> None:
        """What others have found."""
        heard = {n: value for n, value in asdict(costs).items() if not self._counts[n]}
        self.costs = replace(self.costs, **heard)

    def doubt(self) -> None:
        """Another job begins: a bandwidth that was not measured in the last one may be better now.

        Else a store that was slow once, say while it was given its memory, would never be measured
        again, where that keeps all work in one place.
        """
        if self._last and not self._moved:
            doubted = min(DOUBT * self.costs.bandwidth, MOST_DOUBT * self._last)
            self.costs = replace(self.costs, bandwidth=doubted)
            self._counts["bandwidth"] = 1
        self._moved = False

    def saw(self, name: str, value: float) -> None:
        """One of the costs was measured."""
        value = max(value, LEAST_START) if name == "start" else value
        before = getattr(self.costs, name)
        self._counts[name] = min(self._counts[name] + 1, RECENT)
        better = value > 2 * before if name == "bandwidth" else value < before / 2
        if better:  # What was slow the first time is seldom so again.
            self._counts[name] = min(self._counts[name], 2)
        if name == "bandwidth":  # What is averaged is the time that a byte takes.
            after = 1 / (1 / before + (1 / value - 1 / before) / self._counts[name])
            self._last, self._moved = after, True
        else:
            after = before + (value - before) / self._counts[name]
        self.costs = replace(self.costs, **{name: after})


@dataclass(slots=True)
class Estimate:
    """What tasks of one name are like."""

    count: int = 0
    seconds: float = 0.0
    size: float = 0.0
    """Bytes of an output."""

    def saw(self, seconds: float, size: float) -> None:
        """Another one has run."""
        count = self.count
        if count < LASTING:
            self.count = count = count + 1
        self.seconds += ((seconds if seconds > 0 else 0.0) - self.seconds) / count
        self.size += (size - self.size) / count


def is_fit(name: str) -> bool:
    """Whether tasks of this name can be remembered: a key may be anything."""
    return 0 < len(name) <= LONGEST_NAME and name.isprintable()


def is_sound(name: str, figures: object) -> bool:
    """Whether figures are what `remembered` makes; those of another version may not be."""
    if not isinstance(figures, list) or len(figures) != (3 if name else 4):
        return False
    if not all(isinstance(each, int | float) and 0 <= each < MOST_FIGURE for each in figures):
        return False
    return bool(name) or all(figures)


def remembered(estimates: Mapping[str, Estimate], costs: Costs) -> dict[str, list[float]]:
    """What others should know, as it travels; the costs go under no name."""
    longest = sorted(estimates.items(), key=lambda item: -item[1].count * item[1].seconds)
    fit = [(name, e) for name, e in longest if is_fit(name)][:MOST_NAMES]
    seen = {name: [e.count, e.seconds, e.size] for name, e in fit}
    return {**seen, "": [costs.start, costs.round_trip, costs.bandwidth, costs.invoke]}


def news_of(
    estimates: Mapping[str, Estimate], meter: Meter, known: Mapping[str, Sequence[float]]
) -> dict[str, list[float]]:
    """What of it is worth remembering for other jobs, beside what is known."""
    seen = remembered(estimates, meter.costs)
    costs = meter.costs
    if not meter.measured:
        del seen[""]
    return {
        name: figures
        for name, figures in seen.items()
        if _differs(figures, known.get(name))
        and (name == "" or figures[1] >= costs.start / 100 or figures[2] >= LEAST_MOVED)
    }


def _differs(figures: Sequence[float], known: Sequence[float] | None) -> bool:
    """Whether it would make a difference to know it."""
    if known is None or len(known) != len(figures):
        return True
    pairs = list(zip(figures, known, strict=True))
    if len(figures) == 3:
        pairs = pairs[1:]  # Not how many there were.
    return any(max(a, b) > NOTABLE * min(a, b) for a, b in pairs)


def recalled(
    seen: Mapping[str, Sequence[float]], most: int = REMEMBERED
) -> tuple[dict[str, Estimate], Costs | None]:
    """The inverse of `remembered`; counts are at most `most`."""
    estimates = {
        name: Estimate(int(min(count, most)), seconds, size)
        for name, (count, seconds, size) in ((n, f[:3]) for n, f in seen.items() if n)
        if count
    }
    costs = seen.get("")
    return estimates, Costs(*costs) if costs and all(costs) else None


def waited_in(seen: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """How long tasks have waited or run elsewhere of which none has ended: see `Policy.seen`."""
    return {name: figures[1] for name, figures in seen.items() if name and not figures[0]}


@dataclass(frozen=True, slots=True)
class Sharing:
    """What to say to others now: the arguments of `Engine.share`."""

    arrive: Sequence[int] = ()
    probe: Sequence[int] = ()
    offers: Sequence[Sequence[int]] = ()
    ask: bool = False
    """Also if there is nothing to say: to hear how many slots are free."""


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
    slots
        Executors of the job that may be there at the same time.
    alone
        Whether no other executor has ever existed.
    hold
        Seconds that a ready task waits before it is offered, one by one, and an output before it
        is told, instead of the rules; 0 is the behaviour of the Wukong paper.
    jitter
        From 0 to 1, another one for each executor, so that not all ask at the same time.
    waited
        Of names that nobody has seen the end of: how long such tasks have waited or run elsewhere.
    room
        How many of the free slots are meant for it in the beginning: as many executors begin at the
        same time, and each of them sees all that are free.
    """

    def __init__(
        self,
        costs: Costs,
        estimates: dict[str, Estimate],
        *,
        inline_limit: int,
        span: tuple[int, int],
        slots: int,
        alone: bool = False,
        hold: float | None = None,
        jitter: float = 0.0,
        waited: Mapping[str, float] | None = None,
        room: int | None = None,
    ) -> None:
        self.costs = costs
        self.estimates = estimates
        self.alone = alone
        self.again = 0.0
        """When to look again, at the latest."""
        self._inline_limit = inline_limit
        self._first, self._until = span
        self._slots = slots
        self._hold = hold
        self._jitter = jitter
        self._waited = dict(waited or {})
        self._room = room
        self._begun: float | None = None
        self._met: dict[str, float] = {}
        """Unseen name → since when tasks of it run or wait here."""
        self._growing: dict[str, float] = {}
        """Unseen name → bytes that the one that runs has made so far."""
        self._unseen: dict[int, float] = {}
        """What this look takes outputs of unseen names for."""
        self._ready: dict[int, float] = {}
        """Ready task → since when; for `hold` only."""
        self._sizes: dict[int, float] = {}
        self._due: dict[int, float] = {}
        """Fan-in → when its inputs that are here are to be told."""
        self._next_due = math.inf
        """The first of those times, or before."""
        self._round = 0
        self._ours: dict[int, int] = {}
        self._awaiting: dict[int, bool] = {}
        self._awaited: dict[int, int] = {}
        """Fan-in → how many of its first inputs are not to be made here any more."""
        self._probed: dict[int, float] = {}
        """Fan-in → when it was probed."""
        self._reprobe: set[int] = set()
        """Fan-ins of which something has come meanwhile: what a claim has to read."""
        self._looked = 0.0
        self._ends: dict[int, int] = {}
        """First task of a group that is offered → where in the plan what goes with it ends."""
        self._given: list[tuple[int, int]] = []
        """Ranges of the plan that were given away, in order, none of which touch."""
        self._gave = self._gave_first = False
        """Whether something was, or was for the first time, since the last look."""
        self._next_offer = 0.0
        self._next_ask = 0.0
        self._learning = False
        """Whether a look waits for blocks of the plan; meanwhile Runs are short."""
        self._sample: Sequence[int] = ()
        """Ready tasks at the far end of what has been read, at this look;"""
        self._balances: dict[tuple[int, int], tuple[float, float]] = {}
        self._fan_ins: dict[int, tuple[bool, float, int, float]] = {}
        self._near: Mapping[int, float] = {}
        """What can be run without anybody else, as far as the last look has seen."""
        self._queued = 0
        """Ready tasks at the last look for work to give away."""

    # Advice to the engine ---------------------------------------------------------------------

    def seconds_of(self, task: TaskSpec) -> float:
        """How long a task is expected to run; infinite if none of its name has."""
        estimate = self.estimates.get(task.name)
        if estimate is None or self._hold == 0 or self._learning:
            return math.inf
        return estimate.seconds

    def bytes_of(self, task: TaskSpec) -> float:
        """About how large the output of a task is that was made elsewhere; 0 if unknown."""
        estimate = self.estimates.get(task.name)
        return 0.0 if estimate is None else estimate.size

    def late_at(self, now: float) -> float:
        """Until when tasks wait that were to follow others in a Run that begins now.

        It was to take half a start, but for its last task.
        """
        return now + max(self.costs.start, LEAST_LATE)

    def may_read_ahead(self) -> bool:
        """Not while it is about to be seen what of it others may take."""
        return not self._learning

    def urgent(self, engine: Engine, tasks: Sequence[int]) -> Collection[int]:
        """Ready tasks whose output is all that somebody waits for who was given work (W6)."""
        if self._hold is not None:
            return ()
        return {task for task in tasks if self._is_awaited(engine, task)}

    def _is_awaited(self, engine: Engine, task: int) -> bool:
        spec = engine.spec(task)
        return spec is not None and any(
            self._was_given(consumer) and self._waits_only_for(engine, consumer, task)
            for consumer in spec.consumers[-MOST_READERS:]
        )

    def _waits_only_for(self, engine: Engine, consumer: int, task: int) -> bool:
        """Whether all other inputs of a task are to be made by others."""
        inputs = self._inputs(engine, consumer)
        return 1 < len(inputs) <= MOST_READERS and all(
            d == task or not self._is_ours(engine, d) for d in inputs
        )

    def meanwhile(self, engine: Engine, size: float) -> tuple[Iterable[int], Iterable[int]]:
        """While much is read and nothing can be run: who has no company to wait for (W6)."""
        tell: list[int] = []
        probe: list[int] = []
        edges = 0
        if self.alone or self._hold is not None or size < self.costs.start * self.costs.bandwidth:
            return tell, probe
        gone = self._all_gone(engine)
        for consumer in self._due:
            here = [d for _, d in engine.pending.get(consumer, ())]
            if not here or edges > MOST_EDGES:
                continue
            if any(map(self._is_large, here)):
                probe.append(consumer)
            elif not gone and not self._more_to_come(engine, consumer):
                tell.append(consumer)
            edges += len(here)
        return tell, probe

    def at_last(
        self, pending: Mapping[int, Sequence[tuple[int, int]]]
    ) -> tuple[Iterable[int], Iterable[int]]:
        """With nothing else to do: fan-ins to tell first, and to probe before all is written (W6).

        What is large is probed once more. What is small need not wait until that is written.
        """
        if self.alone or self._hold is not None:
            return (), ()
        recently = self._looked - SMALL_TRIPS * self.costs.round_trip
        large = {c for c, edges in pending.items() if any(self._is_large(d) for _, d in edges)}
        probe = [c for c in large if self._probed.get(c, -1.0) < recently]
        # By what they are made of, since of what is small there may be many.
        sizes = {
            c: max((self._sizes.get(d, 0.0) for _, d in edges), default=0.0)
            for c, edges in pending.items()
        }
        most = max(sizes.values(), default=0.0)
        first: list[int] = []
        if most > LAST_BYTES:
            first = [c for c, size in sizes.items() if size < most / 8 and pending[c]]
            probe = [c for c in probe if c not in first]
        return first, probe

    # Facts ------------------------------------------------------------------------------------

    def ran(self, engine: Engine, tasks: Iterable[tuple[int, float, float]], now: float) -> None:
        """Tasks have run: (task, seconds, bytes of the output)."""
        inline_limit, alone = self._inline_limit, self.alone
        estimates, spec_of = self.estimates, engine.spec
        for task, seconds, size in tasks:
            spec = spec_of(task)
            assert spec is not None
            name = spec.name
            estimate = estimates.get(name)
            if estimate is None:
                estimate = estimates[name] = Estimate()
                self._met.pop(name, None)
                self._next_offer = 0.0  # Blindness ends here.
            estimate.saw(seconds, size)
            if size > inline_limit:
                self._sizes[task] = size
            if not alone:
                self._hold_back(engine, spec, now)

    def keeps(self, task: int) -> bool:
        """Whether a task is among those that nobody else was given."""
        return self._first <= task < self._until and not self._was_given(task)

    def span_of(self, group: Sequence[int]) -> tuple[int, int]:
        """The tasks of the plan, first and last + 1, that go with a group that is offered."""
        return group[0], self._ends.get(group[0], group[-1] + 1)

    def replied(
        self,
        engine: Engine,
        offers: Sequence[Sequence[int]],
        reply: Reply,
        now: float,
    ) -> None:
        """What a commit has offered, and the answer."""
        accepted = reply.accepted
        if len(reply.claims) > 1:
            self._next_offer = 0.0  # Before all of their inputs are read.
        self._read_once(engine, reply.claims)
        if any(accepted):
            spans = [
                self.span_of(group) for group, yes in zip(offers, accepted, strict=False) if yes
            ]
            self._given = _merged([*self._given, *spans])
            self._gave, self._gave_first = True, self._gave_first or self.alone
            self.alone = False

    def _give(self, engine: Engine, now: float) -> None:
        """The engine has seen that work was given away: what nobody has waited for may be now."""
        self._ours.clear()
        self._awaiting.clear()
        self._awaited.clear()
        first, self._gave, self._gave_first = self._gave_first, False, False
        for consumer, edges in engine.pending.items():
            if first or self._awaits_given(engine, consumer):
                for _, d in edges:
                    if engine.is_done(d):
                        self._hold_until(engine, consumer, d, now)

    def _read_once(self, engine: Engine, claims: Iterable[int]) -> None:
        """Before an input of what is claimed is read, what else waits for it is probed again."""
        if not self._probed or self._hold is not None:
            return
        for d in {d for task in claims for d in self._inputs(engine, task)}:
            source = engine.spec(d)
            if source is None or engine.is_here(d) or not self._size(engine, source):
                continue
            self._reprobe.update(c for c in source.consumers if c in self._probed)

    def seen(self, now: float) -> dict[str, list[float]]:
        """What somebody who is given work should know, as it travels: see `remembered`.

        Of what has been seen to wait only, that it takes so long at the least.
        """
        waited = [
            (max(now - since, self._waited.get(name, 0.0)), name)
            for name, since in self._met.items()
            if is_fit(name)
        ]
        return {
            **{name: [0, seconds, 0.0] for seconds, name in sorted(waited)[-MOST_NAMES:]},
            **remembered(self.estimates, self.costs),
        }

    # A look -----------------------------------------------------------------------------------

    def look(self, engine: Engine, now: float, running: Running | None = None) -> Sharing | None:
        """What to say to others now, if anything; `again` is when to look next."""
        self.again, self._looked = math.inf, now
        self._unseen.clear()  # Sizes may have been seen since.
        if self._round != engine.rounds:  # All that was here has been told.
            self._round = engine.rounds
            for books in (self._due, self._probed, self._ours, self._awaiting, self._awaited):
                books.clear()
            self._sizes.clear()
            self._reprobe.clear()
            self._next_due = math.inf
        self._begun = now if self._begun is None else self._begun
        if engine.is_busy:
            return None  # The answer is a reason to look again.
        if self._gave:
            self._give(engine, now)
        arrive, probe = self._outputs(engine, now)
        groups: list[tuple[Sequence[int], int]] = []
        ask = False
        # Much that is new is worth a look at once.
        surge = engine.queued > 2 * self._queued
        if now < self._next_offer and not surge:
            self.again = min(self.again, self._next_offer)
        elif self._slots == 1:
            pass  # There is nobody to share with.
        elif self._hold is not None:
            groups, ask = self._one_by_one(engine, now, self._hold)
        else:
            groups, ask = self._groups(engine, now, running)
        if not (arrive or probe or groups or ask):
            return None
        self._ends = {group[0]: until for group, until in groups}
        return Sharing(arrive, probe, [group for group, _ in groups], ask)

    # Outputs (W6) -----------------------------------------------------------------------------

    def _is_large(self, task: int) -> bool:
        return task in self._sizes

    def _size(self, engine: Engine, task: TaskSpec, depth: int = UNSEEN_DEPTH) -> float:
        """Bytes of an output, expected if it is not there; 0 if it travels in a commit."""
        size = self._sizes.get(task.number)
        if size is None:
            size = self._expected_size(engine, task, depth)
        return size if size > self._inline_limit else 0.0

    def _expected_size(self, engine: Engine, task: TaskSpec, depth: int) -> float:
        estimate = self.estimates.get(task.name)
        if estimate is not None:
            return estimate.size
        if task.number not in self._unseen:
            # Of what was never seen: what one has made so far, or as much as it is made of.
            known = [self._growing.get(task.name, 0.0)]
            for d in task.inputs if depth else ():
                source = engine.spec(d)
                if source is not None:
                    known.append(self._size(engine, source, depth - 1))
            self._unseen[task.number] = max(known)
        return self._unseen[task.number]

    def _hold_back(self, engine: Engine, spec: TaskSpec, now: float) -> None:
        """Note when an output has to be told to those who wait for it."""
        for consumer in spec.consumers:
            if consumer in engine.pending:
                self._hold_until(engine, consumer, spec.number, now)

    def _hold_until(self, engine: Engine, consumer: int, task: int, now: float) -> None:
        """Note when a fan-in has to be told of an input."""
        if self._hold is not None:
            due = now + self._hold
        elif self._is_all_ours(engine, consumer):
            return  # It stays.
        elif self._awaits_given(engine, consumer):
            due = now  # Who was given it will soon have nothing else to do.
        elif self._is_large(task) and consumer not in self._probed:
            due = now + SMALL_TRIPS * self.costs.round_trip
        else:
            due = now + self._patience(task)
        self._due[consumer] = min(due, self._due.get(consumer, math.inf))
        self._next_due = min(self._next_due, due)

    # A fan-in may have very many inputs, and each of them asks the same: answers are kept until
    # work is given away again.

    def _is_all_ours(self, engine: Engine, consumer: int) -> bool:
        """Whether all inputs of a fan-in are made here, as far as can be seen."""
        inputs = self._inputs(engine, consumer)
        known = self._ours.get(consumer, 0)  # So many of them, from the first one on.
        while known < len(inputs) and self._is_ours(engine, inputs[known]):
            known += 1
        self._ours[consumer] = known
        return bool(inputs) and known == len(inputs)

    def _awaits_given(self, engine: Engine, consumer: int) -> bool:
        """Whether an input of a fan-in was given away from here."""
        if not self._given:
            return False
        if consumer not in self._awaiting:
            self._awaiting[consumer] = any(
                self._was_given(d) and not engine.is_mine(d) for d in self._inputs(engine, consumer)
            )
        return self._awaiting[consumer]

    def _patience(self, task: int) -> float:
        """Seconds that an output waits for company, and for the others to come."""
        costs = self.costs
        if self._is_large(task):
            return costs.start + costs.moving(self._sizes[task])
        return max(SMALL_TRIPS * costs.round_trip, costs.start)

    def _is_ours(self, engine: Engine, task: int) -> bool:
        """Whether a task was or will be run here, as far as can be seen."""
        return engine.is_mine(task) or self.keeps(task)

    def _was_given(self, task: int) -> bool:
        found = bisect_right(self._given, (task, math.inf)) - 1
        return found >= 0 and task < self._given[found][1]

    def _outputs(self, engine: Engine, now: float) -> tuple[list[int], list[int]]:
        """Fan-ins to tell of their inputs, and fan-ins to probe."""
        arrive: list[int] = []
        probe = [c for c in self._reprobe if engine.pending.get(c)]
        self._reprobe.clear()
        self._probed.update(dict.fromkeys(probe, now))
        if now < self._next_due:
            self.again = min(self.again, self._next_due)
            return arrive, probe
        costs, edges = self.costs, 0
        for consumer, due in list(self._due.items()):
            pending = engine.pending.get(consumer)
            if not pending:
                del self._due[consumer]  # It was told, or claimed.
            if due > now or not pending or edges > MOST_EDGES:
                continue
            if self._all_gone(engine):
                # What is missing is in the store, or to be made here.
                self._due[consumer] = now + KEEP_TIMES * costs.start
                continue
            if self._hold is None and self._more_to_come(engine, consumer):
                self._due[consumer] = now + costs.start
                continue
            here = [d for _, d in pending if engine.is_done(d)]
            del self._due[consumer]
            if not here:
                continue
            edges += len(here)
            kept = self._attracts(engine, consumer, here)
            if consumer not in self._probed and any(map(self._is_large, here)):
                probe.append(consumer)
                self._probed[consumer] = now
                if not kept:
                    self._due[consumer] = now + max(map(self._patience, here))
                    continue
            elif not kept or engine.free > 0:
                arrive.append(consumer)
                continue
            # Else nobody would have the time.
            self._due[consumer] = now + KEEP_TIMES * max(map(self._patience, here))
        self._next_due = min(self._due.values(), default=math.inf)
        self.again = min(self.again, max(self._next_due, now + costs.round_trip))
        return arrive, probe

    def _all_gone(self, engine: Engine) -> bool:
        """Whether no other executor is there any more, by the last reply."""
        return engine.free == self._slots - 1

    def _more_to_come(self, engine: Engine, consumer: int) -> bool:
        """Whether a fan-in waits for something else from here, so that telling has time."""
        inputs = self._inputs(engine, consumer)
        known = self._awaited.get(consumer, 0)
        while known < len(inputs):
            d = inputs[known]
            undone = d in engine.unfinished or not (engine.is_done(d) or engine.is_here(d))
            if undone and self._is_ours(engine, d):
                break
            known += 1
        self._awaited[consumer] = known
        return known < len(inputs)

    def _attracts(self, engine: Engine, consumer: int, here: Sequence[int]) -> bool:
        """Whether a fan-in should rather run here than where its other inputs are."""
        size = sum(self._sizes.get(d, 0.0) for d in here)
        if not size or self._hold is not None:
            return False
        if self._awaits_given(engine, consumer):
            return False  # Whoever was given it has less to do than who gave it.
        made = set(here)
        others = [d for d in self._inputs(engine, consumer) if d not in made]
        specs = [spec for d in others if (spec := engine.spec(d)) is not None]
        return max((self._size(engine, spec) for spec in specs), default=0.0) <= size

    # Work (W1 to W5) --------------------------------------------------------------------------

    def _one_by_one(
        self, engine: Engine, now: float, hold: float
    ) -> tuple[list[tuple[Sequence[int], int]], bool]:
        """Each task that has waited for as long, but for the next one, for somebody else."""
        queue = engine.offerable()
        self._ready = {task: self._ready.get(task, now) for task in queue}
        queue = queue[engine.idle :]
        waited = [task for task in queue if self._ready[task] + hold <= now]
        if len(waited) < len(queue):
            self.again = min(
                self.again, min(s for s in self._ready.values() if s + hold > now) + hold
            )
        if engine.free > 0 or not waited:
            return [((task,), task + 1) for task in waited[-max(engine.free, 1) :]], False
        if ask := now >= self._next_ask:
            self._ask_later(now, self.costs.start)
        self.again = min(self.again, self._next_ask)
        return [], ask

    def _ask_later(self, now: float, pause: float) -> None:
        """The next question for free slots, each executor at another time."""
        self._next_ask = now + ASK_STARTS * pause * (1 + self._jitter)

    def _groups(
        self, engine: Engine, now: float, running: Running | None
    ) -> tuple[list[tuple[Sequence[int], int]], bool]:
        """Groups for others that pay their price, and whether to ask for free slots."""
        self._learning = False
        near = engine.offerable()
        # Somebody without anything to do does not give away what it could begin now.
        queue = sorted(near[engine.idle :])
        if not queue:
            return [], False
        stop = max(self._until, queue[-1] + 1)
        scan = min(stop, queue[0] + LOOK_MOST)
        self._queued = engine.queued
        start = self.costs.start
        pause = max(start, (len(queue) / 4 + scan - queue[0]) * SCAN_SECONDS / LOOK_SHARE)
        if self._is_little(engine, queue, scan, now, running):
            self._look_later(now, pause)
            return [], False
        self._learning = stop == scan and engine.learn(range(queue[0], stop))
        if self._learning:
            return [], False
        work, own = self._work(engine, queue, scan, now, running)
        read = [task for task in queue if task in work]
        self._sample = read[len(read) // 2 :]
        self._balances.clear()
        self._fan_ins.clear()
        self._near = work
        # What is ready, and has not been read yet, will be shared as well, in groups as large.
        total = sum(own.values()) * (1 + engine.stalled / len(queue))
        most = SHARED * total / start - LEAST_SPARE
        self._look_later(now, pause)
        if most < 1 or total < LEAST_WORK:
            return [], False
        if engine.free <= 0:
            if now < self._next_ask:
                return [], False
            self._ask_later(now, pause)
            return [], True
        blind = any(name in self._met for name in self._names(engine, queue))
        count = self._at_once(min(most, self._free(engine, now)), blind=blind)
        stay = {task for task in queue if self._stays(engine, task, work)}
        while count >= 1:
            # Such that all would finish together, and who keeps has no start to pay.
            share = (total - (total + count * start) / (count + 1)) / count
            groups = self._cut(engine, queue, work, own, stay, scan, stop, count, share)
            paid = [g for g in groups if self._pays(engine, g, work, scan)]
            if len(groups) - len(paid) <= len(groups) // FEW:  # The rest stays.
                if engine.stalled and not blind:
                    self._next_offer = now  # There is more to share as soon as that is here.
                return [(group, until) for group, until in paid], False
            # The price does not grow with the number: fewer groups are larger ones.
            count = count - 1 if count < FEW else count * 3 // 4
        return [], False

    def _look_later(self, now: float, pause: float) -> None:
        self._next_offer = now + pause * (1 + self._jitter / 2)
        self.again = min(self.again, self._next_offer)

    def _is_little(
        self, engine: Engine, queue: Sequence[int], scan: int, now: float, running: Running | None
    ) -> bool:
        """Whether all that can follow the queue is not worth sharing, if each takes the longest.

        That is seen at a glance, and a graph of trivial tasks takes less time than `_work`.
        """
        names = self._names(engine, queue)
        if not names:
            return False  # None of them has been read.
        names |= self._met.keys() | self._waited.keys()
        longest = max((estimate.seconds for estimate in self.estimates.values()), default=0.0)
        if running is not None:
            spec = engine.spec(running.task)
            names |= {spec.name} if spec is not None else set()
            longest = max(longest, 2 * (now - running.since))
        if not names <= self.estimates.keys():
            return False
        most = (scan - queue[0] + len(queue)) * longest / engine.threads
        specs = (engine.spec(task) for task in queue)
        reading = sum(self._reading(engine, s) for s in specs if s is not None and s.inputs)
        return (most + reading) * (1 + engine.stalled / len(queue)) < LEAST_WORK

    def _stays(self, engine: Engine, task: int, work: Mapping[int, float]) -> bool:
        """Whether a ready task is not worth what would have to move for it, if it is alone."""
        moved = sum(self._inputs_from_here(engine, task).values())
        return moved > 0 and work.get(task, 0.0) < 2 * moved / self.costs.bandwidth

    def _inputs_from_here(self, engine: Engine, task: int) -> dict[int, float]:
        """Inputs of a task that only this executor has, with their bytes."""
        found = {}
        for d in self._inputs(engine, task):
            source = engine.spec(d)
            if source is not None and engine.is_done(d) and not engine.is_published(d):
                found[d] = self._size(engine, source)
        return found

    def _free(self, engine: Engine, now: float) -> int:
        """Slots that may be filled from here."""
        begun = now if self._begun is None else self._begun
        late = now > begun + ROOM_STARTS * self.costs.start
        if self._room is None or late or engine.rounds:
            return engine.free
        return min(engine.free, self._room)

    def room_of(self, engine: Engine, count: int) -> int:
        """The room of each of as many executors that have just been accepted."""
        return engine.free // (count + 1)

    def _at_once(self, wanted: float, *, blind: bool) -> int:
        """How many of all the executors that are worth their start are invoked from here (W2).

        Invocations take their time, one after the other: where that is more than another start,
        those who are invoked invoke the rest.
        """
        root = math.sqrt(wanted)
        if blind or wanted * self.costs.invoke > self.costs.start + 2 * root * self.costs.invoke:
            return int(root)
        return int(wanted)

    @staticmethod
    def _names(engine: Engine, tasks: Iterable[int]) -> set[str]:
        specs = (engine.spec(task) for task in tasks)
        return {spec.name for spec in specs if spec is not None}

    def _work(
        self, engine: Engine, queue: Sequence[int], scan: int, now: float, running: Running | None
    ) -> tuple[dict[int, float], dict[int, float]]:
        """Expected seconds of each task that can follow the queue, and what each ready one brings.

        What needs something that is not here has to wait for it, and does not count; and what needs
        most of the queue cannot be shared. What follows several counts with the last of them, since
        of two executors the one with less to do will run it.
        """
        seconds: dict[str, float] = {}
        self._unseen.clear()
        if running is not None:
            self._overrun(engine, now, running, seconds)
        queued = set(queue)
        work: dict[int, float] = {}
        own = dict.fromkeys(queue, 0.0)
        last: dict[int, int] = {}
        sources: dict[int, int] = {}
        for number in range(queue[0], scan):
            spec = engine.spec(number)
            if spec is None or engine.is_scheduled(number):
                continue
            ready = number in queued
            # What was given away may have come back, and what follows it with it.
            back = ready or any(d in work and self._was_given(d) for d in spec.inputs)
            if not back and self._was_given(number):
                continue
            if ready:
                last[number], sources[number] = number, 1
            else:
                follows = [d for d in spec.inputs if d in work]
                if len(follows) < len(spec.inputs) and not all(
                    d in work or engine.is_here(d) for d in spec.inputs
                ):
                    continue
                count = sum(sources[d] for d in follows)
                if not follows or count > max(2, len(queue) / 2):
                    continue
                last[number], sources[number] = max(last[d] for d in follows), count
            expected = seconds.get(spec.name)
            if expected is None:
                expected = self._expected(spec, now, ready=ready)
                seconds[spec.name] = expected
            # Here and elsewhere, so many run at once.
            work[number] = expected / engine.threads
            work[number] += self._reading(engine, spec) if ready else 0.0
            self._size(engine, spec)
            own[last[number]] += work[number]
        seen = [task for task in queue if task in work]
        if len(seen) < len(queue):  # What has not been read yet is taken to be like the rest.
            mean = sum(own[task] for task in seen) / max(1, len(seen))
            own.update((task, mean) for task in queue if task not in work)
        return work, own

    def _reading(self, engine: Engine, spec: TaskSpec) -> float:
        """Seconds for inputs that are in the store: whoever runs the task has to read them."""
        away = [d for d in spec.inputs if not (engine.is_scheduled(d) or engine.is_here(d))]
        sources = [source for d in away if (source := engine.spec(d)) is not None]
        size = sum(self._size(engine, source) for source in sources)
        return size / self.costs.bandwidth

    def _expected(self, spec: TaskSpec, now: float, *, ready: bool) -> float:
        """W1."""
        estimate = self.estimates.get(spec.name)
        if estimate is not None:
            return estimate.seconds
        if not ready and spec.name not in self._met and spec.name not in self._waited:
            return 0.0
        waited = now - self._met.setdefault(spec.name, now)
        waited = max(waited, self._waited.get(spec.name, 0.0))
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
            self._growing = {spec.name: running.grown}
        elif elapsed > estimate.seconds:
            count = estimate.count
            seconds[spec.name] = (count * estimate.seconds + 2 * elapsed) / (count + 1)

    def _cut(
        self,
        engine: Engine,
        queue: Sequence[int],
        work: Mapping[int, float],
        own: Mapping[int, float],
        stay: Container[int],
        scan: int,
        stop: int,
        count: int,
        share: float,
    ) -> list[tuple[Sequence[int], int]]:
        """`count` groups from the far end, or as many as there are, each with its share (W4)."""
        crossing = self._crossing(engine, work, queue[0], scan)
        beyond = [*accumulate((own[task] for task in reversed(queue)), initial=0.0)][::-1]
        groups: list[tuple[Sequence[int], int]] = []
        end, until = len(queue), stop
        falling = [-held for held in beyond]
        while len(groups) < count and end:

            def at(held: float, end: int = end) -> int:
                """The last ready task from which on there is so much work."""
                return max(0, bisect_right(falling, -(held + beyond[end]), 0, end) - 1)

            cut = at(share)
            if crossing:
                near = range(at(share * (1 + CUT_SLACK)), at(share * (1 - CUT_SLACK)) + 1)
                cut = min(
                    near,
                    key=lambda i, end=end: (  # type: ignore[misc]
                        abs(beyond[i] - beyond[end] - share) / 2
                        + 2 * crossing.get(queue[i], 0.0) / self.costs.bandwidth
                    ),
                    default=cut,
                )
            group = [task for task in queue[cut:end] if task not in stay]
            if group:
                groups.append((group, until))
            end, until = cut, queue[cut]
        return groups

    def _crossing(
        self, engine: Engine, work: Mapping[int, float], first: int, scan: int
    ) -> dict[int, float]:
        """Bytes that would have to go from one side to the other of a cut before each task.

        Empty if there is nothing large.
        """
        change: dict[int, float] = {}
        large = False
        for number in work:
            spec = engine.spec(number)
            assert spec is not None
            size = self._size(engine, spec)
            large = large or size > 0
            last = max((c for c in spec.consumers if c < scan), default=number)
            if last > number and size:
                change[number + 1] = change.get(number + 1, 0.0) + size
                change[last + 1] = change.get(last + 1, 0.0) - size
        if not large:
            return {}
        crossing: dict[int, float] = {}
        total = 0.0
        for number in range(first, scan):
            total += change.get(number, 0.0)
            crossing[number] = total
        return crossing

    def _pays(
        self,
        engine: Engine,
        group: tuple[Sequence[int], int],
        work: Mapping[int, float],
        scan: int,
    ) -> bool:
        """Whether a group is worth its start and what has to move because of it (W3).

        One whose tasks have not all been read is taken to be like those at the far end that have.
        """
        tasks, until = group
        share = 1.0
        if any(task not in work for task in tasks):
            share = len(tasks) / max(1, len(self._sample))
            tasks, until = self._sample, scan
        key = (tasks[0] if tasks else -1, until)
        if key not in self._balances:
            self._balances[key] = self._balance(engine, tasks, until, work, scan)
        gain, price = self._balances[key]
        return gain * share >= PAYS * (self.costs.start + price * share)

    def _balance(
        self,
        engine: Engine,
        tasks: Sequence[int],
        until: int,
        work: Mapping[int, float],
        scan: int,
    ) -> tuple[float, float]:
        """Seconds that a group works by itself, and that it costs beside its start."""
        own = set(tasks)
        for number in range(min(tasks, default=scan), min(until, scan)):
            if number in work and number not in own:
                inputs = self._inputs(engine, number)
                if all(d in own or engine.is_here(d) for d in inputs):
                    own.add(number)
        known = [number for number in own if number in work]
        taken: dict[int, float] = {}
        fan_ins: set[int] = set()
        out = 0.0
        for number in known:
            spec = engine.spec(number)
            assert spec is not None
            taken.update(self._inputs_from_here(engine, number))
            fan_ins.update(consumer for consumer in spec.consumers if consumer not in own)
            if self._leaves(engine, spec, own):
                out += self._size(engine, spec)
        # Others have to read it, too; with two slots all of it is for the one who keeps.
        out += out / max(1, self._slots - 1)
        costs = self.costs
        moved = sum(taken.values()) + out
        # Each fan-in that needs both sides takes a commit, at the worst one after the other.
        price = moved / costs.bandwidth + len(fan_ins) * costs.round_trip
        return sum(work[n] for n in known), price

    def _leaves(self, engine: Engine, spec: TaskSpec, own: Container[int]) -> bool:
        """Whether an output will have to be written for somebody outside of its group.

        Not where it is by far the largest input of a fan-in: the others come to it. But if one of
        those is far away, whoever has made this one will have gone before that is made.
        """
        size = self._size(engine, spec)
        if not size or spec.requested:
            return False
        for consumer in spec.consumers:
            if consumer in own:
                continue
            far, first, largest, second = self._fan_in(engine, consumer)
            other = second if largest == spec.number else first
            if far or other >= size:
                return True
        return False

    def _fan_in(self, engine: Engine, consumer: int) -> tuple[bool, float, int, float]:
        """Whether an input of a fan-in is far, the largest of them and its task, and the second."""
        if consumer not in self._fan_ins:
            inputs = self._inputs(engine, consumer)
            sizes = [(math.inf, -1)] if not inputs else [(0.0, -1)]
            for d in inputs:
                source = engine.spec(d)
                sizes.append((math.inf if source is None else self._size(engine, source), d))
            sizes.sort(reverse=True)
            second = sizes[1][0] if len(sizes) > 1 else math.inf
            # An only reader is no fan-in that anything could come to.
            far = len(inputs) == 1 or any(self._is_far(engine, d) for d in inputs)
            self._fan_ins[consumer] = far, *sizes[0], second
        return self._fan_ins[consumer]

    def _is_far(self, engine: Engine, task: int) -> bool:
        """Whether an output has to wait for what is not here now."""
        here = engine.is_scheduled(task) or engine.is_here(task) or engine.is_published(task)
        return not here and task not in self._near

    @staticmethod
    def _inputs(engine: Engine, task: int) -> tuple[int, ...]:
        spec = engine.spec(task)
        return () if spec is None else spec.inputs


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers in order, in as few ranges as there can be."""
    merged: list[tuple[int, int]] = []
    for first, until in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(until, merged[-1][1])
        else:
            merged.append((first, until))
    return merged


def first_groups(
    specs: Sequence[TaskSpec],
    leaves: Sequence[int],
    estimates: Sequence[Estimate | None],
    costs: Costs,
    slots: int,
    leaf_batch: int | None = None,
    threads: int = 1,
) -> list[list[int]]:
    """The leaves of the executors that begin a job, in contiguous groups.

    As many as the work is worth that is known (W2), each with as much of it; one, where nothing is
    known, or where more would have to be moved between them than they bring.

    Parameters
    ----------
    specs
        The tasks of the plan.
    estimates
        What is known of each of them; may be empty.
    leaf_batch
        Leaves for each, instead.
    threads
        Tasks that an executor runs at once.
    """
    if leaf_batch is not None:
        count = min(math.ceil(len(leaves) / leaf_batch), slots, len(leaves))
        bounds = [round(len(leaves) * i / count) for i in range(count + 1)]
        return [list(leaves[a:b]) for a, b in pairwise(bounds)]
    seconds = [e.seconds / threads if e else 0.0 for e in estimates]
    total = sum(seconds)
    count = int(min(SHARED * total / costs.start - LEAST_SPARE, slots, len(leaves)))
    while count > 1:
        groups = _by_work(leaves, seconds, count, costs.invoke)
        moving = _moved(specs, estimates, groups) / costs.bandwidth
        # Who soon needs what others make would have to write all that it has made, and leave.
        if moving <= total / (len(groups) + 1) and _are_closed(specs, seconds, groups):
            return groups
        count //= 2
    return [list(leaves)]


def _by_work(
    leaves: Sequence[int], seconds: Sequence[float], count: int, invoke: float
) -> list[list[int]]:
    """Leaves in at most `count` groups that end together, as early as that can be.

    What follows leaves in the plan is counted with them. Each group begins an invocation later than
    the one before it, and has as much less.
    """
    work = [0.0, *accumulate(seconds)]
    before = [0.0, *(work[leaf] for leaf in leaves[1:]), work[-1]]
    slack = 1e-9 * work[-1]  # Sums are not exact.

    def reach(first: int, most: float) -> int:
        """The leaf before which a group of so many seconds ends that begins with `first`."""
        return max(first, bisect_right(before, before[first] + most + slack) - 1)

    def is_enough(end: float) -> bool:
        first = 0
        for index in range(count):
            first = reach(first, end - index * invoke)
        return first == len(leaves)

    low = work[-1] / count
    high = low + count * invoke + max(b - a for a, b in pairwise(before))
    while high - low > END_PRECISION * high:
        middle = (low + high) / 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)

    def cut(end: float) -> list[list[int]]:
        """As evenly as it can be, if each is to be through by then."""
        rooms = [max(0.0, end - index * invoke) for index in range(count)]
        # Where what is on the right of a cut has to begin at the latest.
        latest = [len(leaves)] * (count + 1)
        for index in range(count - 1, 0, -1):
            least = before[latest[index + 1]] - rooms[index] - slack
            latest[index] = bisect_left(before, least)
        cuts = [0]
        scale = work[-1] / sum(rooms)
        for index, room in enumerate(accumulate(rooms)):
            target = scale * room
            near = min(bisect_left(before, target), len(leaves))
            if near and target - before[near - 1] < before[near] - target:
                near -= 1
            furthest = reach(cuts[-1], rooms[index])
            cuts.append(min(max(near, latest[index + 1], cuts[-1]), furthest))
        return [list(leaves[a:b]) for a, b in pairwise(cuts) if a < b]

    # A little later is as good, if there are more of them.
    return max(cut(high), cut(high * (1 + END_SLACK)), key=len)


def _are_closed(
    specs: Sequence[TaskSpec], seconds: Sequence[float], groups: Sequence[Sequence[int]]
) -> bool:
    """Whether each group can run half of its share without the others."""
    owners = {leaf: index for index, group in enumerate(groups) for leaf in group}
    closed = [0.0] * len(groups)
    for spec in specs:
        owner = owners.get(spec.number, -1)
        if spec.inputs:
            found = {owners[d] for d in spec.inputs}
            owner = found.pop() if len(found) == 1 else -1
            owners[spec.number] = owner
        if owner >= 0:
            closed[owner] += seconds[spec.number]
    total = [0.0, *accumulate(seconds)]
    ends = [*(group[0] for group in groups[1:]), len(seconds)]
    own = [total[end] - total[group[0]] for group, end in zip(groups, ends, strict=True)]
    share, slack = total[-1] / len(groups), 1e-9 * total[-1]  # Sums are not exact.
    return all(c >= min(mine, share) / 2 - slack for c, mine in zip(closed, own, strict=True))


def _moved(
    specs: Sequence[TaskSpec], estimates: Sequence[Estimate | None], groups: Sequence[Sequence[int]]
) -> float:
    """Bytes that each group would have to write for others, and read, if it ran all up to the next
    one; of the one for which they are the most.
    """
    starts = [group[0] for group in groups]
    moved = [0.0] * len(groups)
    for spec, estimate in zip(specs, estimates, strict=True):
        if estimate is None or estimate.size < LEAST_MOVED:
            continue
        own = max(bisect_right(starts, spec.number) - 1, 0)
        others = {bisect_right(starts, consumer) - 1 for consumer in spec.consumers} - {own}
        if others:
            moved[own] += estimate.size
            for other in others:
                moved[other] += estimate.size
    return max(moved)
