"""What an executor decides: which tasks to run, what to read, what to commit, when to leave.

Pure: no I/O, no clock, no randomness. A shell feeds it facts (`begun`, `loaded`, `fetched`,
`ran`, `published`, `replied`, …) and carries out the actions that `next_actions` returns; the
executor service is one shell, the simulation in tests/simulation is another.

Theory of operation
===================

An executor answers for a *frontier*: tasks whose inputs are durable. It works in rounds::

    BEGIN ──► WORK ──► PUBLISH ──► COMMIT ──┬─► WORK    claims: the next frontier
                 │                    ▲     └─► EXIT    the record is gone, or fenced, or stopped
                 └── failed, lost ────┘

In WORK it runs all that can be run: the frontier, consumers with a single input, and fan-ins all
of whose inputs were made in this round. When nothing is left it publishes the outputs that a
task elsewhere will read (data first), and commits (visibility second): every task of the round
passes for good, and a fan-in whose other inputs had arrived before is claimed and becomes the new
frontier.

Rules of this file:

1. Scheduling is ahead of running. `_take` settles the order of the next tasks as if those before
   them had succeeded; they run in that order in one thread. If one fails the job fails, so nothing
   has to be undone.
2. A claimed fan-in has all its inputs in the store, hence none of them is made in this round: the
   tasks of the frontier and the consumers reached from it never meet.
3. A value stays in memory while a task that will run here reads it, or until it is published.
   `_left` has the outputs of this round and how many consumers of each have not run here;
   `_kept` the objects of earlier rounds or from the store, `_need` how many tasks of the frontier's
   window read each.
4. Literals are read like the inputs of a frontier task. A task that is reached and finds one
   missing is set aside (`_starved`) until it is there.
5. One commit is in flight at most, and it is formed once: whoever sends it again sends the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple, TypeAlias

from wukong_async.protocol import Begun, Commit, Reply, Status, TaskSpec

RUN_LIMIT = 256
"""Tasks in one Run: enough to make the hand-over to the worker thread (50 µs) cheap."""
LOAD_AHEAD = 512
"""Frontier tasks whose blocks are loaded before it is their turn: two blocks' worth."""
FETCH_BYTES = 256 * 1024 * 1024
"""Bytes of inputs to hold for the running and the next tasks. With a quarter of it, a product of
matrices in blocks of 8 MB reads most of them again."""
FETCH_MOST = 4096
FETCH_FIRST = 32
"""Objects to read while nothing is known of their size."""
STARVED_MOST = 8
"""Tasks set aside for their literals; more would only fill the memory."""


class State(Enum):
    """Where an executor is in its life."""

    BEGIN = auto()
    WORK = auto()
    PUBLISH = auto()
    COMMIT = auto()
    EXIT = auto()


class Step(NamedTuple):
    """Run `task`; then forget the values of `drops`."""

    task: int
    drops: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Begin:
    """Take the record."""


@dataclass(frozen=True, slots=True)
class Load:
    """Read the plan blocks of these tasks; answer with `loaded`."""

    tasks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fetch:
    """Read these objects into memory; answer with `fetched` or `failed`."""

    objects: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """Run these tasks in this order; answer with `ran` or `failed`."""

    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Publish:
    """Serialise these outputs and store the large ones; answer with `published` or `failed`."""

    tasks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Send:
    """Send this commit until it is answered; answer with `replied`."""

    sequence: int
    commit: Commit


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget these values. No answer."""

    objects: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete (object, place) from the data shards. No answer; if it gets lost, finish does it."""

    objects: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class Exit:
    """Return normally. Nothing is started, published or committed after this."""

    reason: Status


Action: TypeAlias = Begin | Load | Fetch | Run | Publish | Send | Drop | Delete | Exit


class Engine:
    """The decisions of one incarnation of one executor."""

    # The books of one round; `_start_round` opens them.
    _frontier: list[int]
    _head: int  # Frontier tasks before this have been scheduled,
    _window: int  # before this have their inputs in memory or asked for,
    _ahead: int  # before this have their blocks loaded or asked for.
    _stack: list[int]  # Ready; the next one on top.
    _stalled: dict[int, None]  # Ready, but for their block,
    _unasked: list[int]  # which has not been asked for; the next one last.
    _starved: list[int]  # Ready, but for a literal,
    _fed: set[int]  # which has been asked for.
    _arrived: dict[int, int]  # Consumer → inputs made here, while some are missing,
    _degree: dict[int, int]  # and its in-degree.
    _made: list[int]
    _left: dict[int, int]
    _need: dict[int, int]
    _unread: set[int]  # Read for the last time by the Run in flight.
    _loading: set[int]
    _fetching: set[int]
    _running: bool
    _trim_pending: bool

    def __init__(self) -> None:
        self.state = State.BEGIN
        self.generation = 0
        self._sequence = 0
        self._specs: dict[int, TaskSpec] = {}
        self._actions: list[Action] = [Begin()]
        self._object_bytes = 0.0
        self._kept: set[int] = set()
        self._start_round(())

    def __repr__(self) -> str:
        return (
            f"<Engine {self.state.name} gen={self.generation} seq={self._sequence}"
            f" made={len(self._made)} frontier={len(self._frontier) - self._head}"
            f" ready={len(self._stack)}>"
        )

    def next_actions(self) -> list[Action]:
        """What to do now. Empty: wait for the answer to an earlier action."""
        if self.state is State.WORK:
            self._work()
        actions, self._actions = self._actions, []
        return actions

    # Facts ------------------------------------------------------------------------------------

    def begun(self, answer: Begun) -> None:
        """The answer to Begin."""
        if answer.status is not Status.OK:
            self._exit(answer.status)
            return
        self.generation = answer.generation
        self._sequence = answer.sequence
        self._start_round(answer.frontier)
        self.state = State.WORK

    def loaded(self, specs: Iterable[TaskSpec]) -> None:
        """Tasks of plan blocks that were read, asked for or not."""
        ready = []
        for spec in specs:
            self._specs[spec.number] = spec
            self._loading.discard(spec.number)
            if spec.number in self._stalled:
                del self._stalled[spec.number]
                ready.append(spec.number)
        self._stack.extend(reversed(ready))
        self._trim()

    def fetched(self, sizes: Mapping[int, int]) -> None:
        """Objects that are in memory now, with their bytes."""
        self._fetching.difference_update(sizes)
        self._kept.update(sizes)
        mean = sum(sizes.values()) / max(1, len(sizes))
        self._object_bytes = max(mean, self._object_bytes / 2)
        for task in [t for t in self._starved if self._kept.issuperset(self._specs[t].literals)]:
            self._starved.remove(task)
            self._stack.append(task)

    def ran(self) -> None:
        """All steps of the Run are done."""
        self._running = False
        if self._unread:
            self._kept.difference_update(self._unread)
            self._actions.append(Drop(tuple(sorted(self._unread))))
            self._unread.clear()

    def failed(self) -> None:
        """A task failed, its output does not pickle, or an input is lost: the job fails."""
        if self.state in (State.WORK, State.PUBLISH):
            self._send(Commit(failed=True))

    def published(self) -> None:
        """The outputs are durable."""
        self._send(self._commit())

    def replied(self, reply: Reply) -> None:
        """The answer to Send."""
        if reply.status is not Status.OK:
            self._exit(reply.status)
            return
        if reply.deletes:
            self._actions.append(Delete(reply.deletes))
        if reply.gone:
            self._exit(Status.OK)
            return
        # Published outputs may be inputs of what was claimed; the rest goes with the old round.
        self._kept.update(self._left)
        self._start_round(reply.claims)
        self._trim_pending = True
        self._trim()
        self.state = State.WORK

    def stopped(self, reason: Status) -> None:
        """A renewal or a put was answered with FENCED, STOP or CLOSED."""
        if self.state is not State.EXIT:
            self._exit(reason)

    # One round --------------------------------------------------------------------------------

    def _start_round(self, frontier: Sequence[int]) -> None:
        self._frontier = sorted(frontier)
        self._head = self._window = self._ahead = 0
        self._stack, self._starved, self._fed = [], [], set()
        self._stalled, self._unasked = {}, []
        self._arrived, self._degree = {}, {}
        self._made, self._left, self._need, self._unread = [], {}, {}, set()
        self._loading, self._fetching = set(), set()
        self._running = False
        self._trim_pending = False

    def _work(self) -> None:
        self._load()
        self._fetch()
        if self._running:
            return
        steps = self._take()
        if steps:
            self._running = True
            self._actions.append(Run(steps))
            self._load()  # While these run, what they lead to is read.
            self._fetch()
        elif not (self._loading or self._fetching):
            tasks = self._to_publish()
            if tasks:
                self.state = State.PUBLISH
                self._actions.append(Publish(tasks))
            else:
                self.published()

    def _load(self) -> None:
        """Ask for the blocks of what is ready, and of the frontier ahead of its turn."""
        limit = min(len(self._frontier), self._head + LOAD_AHEAD)
        wanted: list[int] = []
        while self._unasked and len(self._loading) + len(wanted) < LOAD_AHEAD:
            task = self._unasked.pop()
            if task in self._stalled and task not in self._loading:
                wanted.append(task)
        wanted.reverse()  # What is loaded last is on top.
        while self._ahead < limit:
            task = self._frontier[self._ahead]
            if task not in self._specs:
                wanted.append(task)
            self._ahead += 1
        if wanted:
            self._loading.update(wanted)
            self._actions.append(Load(tuple(wanted)))

    def _fetch(self) -> None:
        """Ask for the inputs of the next frontier tasks: at least one task's, at most a window."""
        most = FETCH_FIRST
        if self._object_bytes:
            most = int(min(FETCH_MOST, FETCH_BYTES / self._object_bytes))
        wanted: list[int] = []
        while self._window < self._ahead:
            spec = self._specs.get(self._frontier[self._window])
            if spec is None:
                break
            objects = spec.inputs + spec.literals
            if self._window > self._head and len(self._need) + len(objects) > most:
                break
            self._window += 1
            wanted += self._want(objects)
        if wanted:
            self._actions.append(Fetch(tuple(wanted)))

    def _want(self, objects: Iterable[int]) -> list[int]:
        """Note that a task will read these objects; those that have to be fetched for it."""
        missing = []
        for number in objects:
            self._need[number] = self._need.get(number, 0) + 1
            self._unread.discard(number)
            if number not in self._kept and number not in self._fetching:
                self._fetching.add(number)
                missing.append(number)
        return missing

    def _take(self) -> tuple[Step, ...]:
        """The next tasks in depth-first order (rule 1); one whose time is limited by itself."""
        steps: list[Step] = []
        while len(steps) < RUN_LIMIT:
            if self._stack and len(self._starved) < STARVED_MOST:
                spec = self._specs[self._stack[-1]]
                if steps and spec.limited:
                    break
                self._stack.pop()
                if spec.literals and self._starves(spec):
                    continue
                drops = self._read_made(spec.inputs)
                self._read_stored(spec.literals)
            elif (ready := self._next_of_frontier(alone=not steps)) is not None:
                spec, drops = ready, ()
                self._read_stored(spec.inputs + spec.literals)
            else:
                break
            steps.append(Step(spec.number, drops))
            self._made.append(spec.number)
            self._left[spec.number] = len(spec.consumers)
            self._reach(spec)
            if spec.limited:
                break
        return tuple(steps)

    def _starves(self, spec: TaskSpec) -> bool:
        """Whether a reached task has to wait for a literal (rule 4). Asks for it the first time."""
        if spec.number not in self._fed:
            self._fed.add(spec.number)
            if missing := self._want(spec.literals):
                self._actions.append(Fetch(tuple(missing)))
        if self._kept.issuperset(spec.literals):
            self._fed.discard(spec.number)
            return False
        self._starved.append(spec.number)
        return True

    def _next_of_frontier(self, *, alone: bool) -> TaskSpec | None:
        if self._head == self._window:
            return None
        spec = self._specs[self._frontier[self._head]]
        if spec.limited and not alone:
            return None
        if not self._kept.issuperset(spec.inputs + spec.literals):
            return None
        self._head += 1
        return spec

    def _read_made(self, objects: Iterable[int]) -> tuple[int, ...]:
        """Count one reader of outputs of this round down; return those that are done with."""
        drops = []
        for number in objects:
            self._left[number] -= 1
            if not self._left[number] and not self._specs[number].requested:
                del self._left[number]
                drops.append(number)
        return tuple(drops)

    def _read_stored(self, objects: Iterable[int]) -> None:
        """The same for objects from earlier rounds or the store.

        Those that are done with are dropped after the Run, not in it: another task may ask for
        one meanwhile, and what it fetched would be dropped by a step that is still to run.
        """
        for number in objects:
            self._need[number] -= 1
            if not self._need[number]:
                del self._need[number]
                self._unread.add(number)

    def _reach(self, spec: TaskSpec) -> None:
        """Hand the output of `spec` to its consumers; those that have all inputs are ready."""
        # Reversed: the first consumer in plan order is on top of the stack.
        for i in range(len(spec.consumers) - 1, -1, -1):
            consumer, degree = spec.consumers[i], spec.degrees[i]
            arrived = self._arrived.get(consumer, 0) + 1
            if arrived < degree:
                self._arrived[consumer] = arrived
                self._degree[consumer] = degree
                continue
            self._arrived.pop(consumer, None)
            self._degree.pop(consumer, None)
            if consumer in self._specs:
                self._stack.append(consumer)
            else:
                self._stalled[consumer] = None
                self._unasked.append(consumer)

    def _trim(self) -> None:
        """Drop what the new frontier does not read, as soon as all of its inputs are known."""
        if not self._trim_pending or any(t not in self._specs for t in self._frontier):
            return
        self._trim_pending = False
        wanted = {number for task in self._frontier for number in self._specs[task].inputs}
        wanted.update(self._need, self._unread)
        if drops := tuple(sorted(self._kept - wanted)):
            self._kept.difference_update(drops)
            self._actions.append(Drop(drops))

    # The end of a round -----------------------------------------------------------------------

    def _to_publish(self) -> tuple[int, ...]:
        """Outputs that a task elsewhere will read, or the caller."""
        return tuple(t for t in self._made if t in self._left)

    def _commit(self) -> Commit:
        """The round as one commit. A value that nobody else reads is in none of its lists."""
        reads: dict[int, int] = {}
        for task in self._frontier:
            for number in self._specs[task].inputs:
                reads[number] = reads.get(number, 0) + 1
        return Commit(
            passed=len(self._made),
            publish=tuple((t, self._left[t]) for t in self._made if self._left.get(t)),
            results=tuple(t for t in self._made if self._specs[t].requested),
            arrivals=tuple((c, self._degree[c], n) for c, n in self._arrived.items()),
            reads=tuple(reads.items()),
        )

    def _send(self, commit: Commit) -> None:
        self.state = State.COMMIT
        self._sequence += 1
        self._actions.append(Send(self._sequence, commit))

    def _exit(self, reason: Status) -> None:
        self.state = State.EXIT
        self._actions.append(Exit(reason))
