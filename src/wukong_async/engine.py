"""What an executor decides: which tasks to run, what to read, what to commit, when to leave.

Pure: no I/O, no clock, no randomness. A shell feeds it facts (`begun`, `loaded`, `fetched`,
`ran`, `published`, `replied`, …) and carries out the actions that `next_actions` returns; the
executor service is one shell, the simulation in tests/simulation is another.

Theory of operation
===================

An executor answers for a *frontier*: tasks whose inputs are durable. It works in rounds::

    BEGIN ──► WORK ──► PUBLISH ──► COMMIT ──┬─► WORK    claims: the next frontier
              │  ▲        │           ▲     └─► EXIT    the record is gone, or fenced, or stopped
              └──┘        └── failed ─┘
        soft commits

In WORK it runs all that can be run: the frontier, consumers with a single input, and fan-ins all
of whose inputs were made in this round. When nothing is left it publishes the outputs that a
task elsewhere will read (data first), and sends a hard commit (visibility second): every task of
the round passes for good, and a fan-in whose other inputs had arrived before is claimed and becomes
the new frontier.

While it works it may say what it has to others in soft commits, which pass nothing: inputs arrive
at fan-ins, fan-ins are probed, ready tasks are offered to new executors (`share`). When it dies,
its successor does the same work again, and finds the effects of such commits done.

`hand_over` ends a round before its time: what is done passes, what is ready becomes the frontier of
the next incarnation.

Rules of this file:

1. Scheduling is ahead of running. `_take` settles the order of the next tasks as if those before
   them had succeeded; they run in that order in one thread, as one Run. If one fails the job fails,
   so nothing has to be undone. `_undone` has those that have not run, or have to run again after a
   hand-over. There are as many Runs at once as threads; what they have in common is done before: no
   task is taken that reads an output which is still undone in another Run (`_behind`).
2. A consumer that is reached is looked up in this order: one of the frontier only loses its mark
   for this input; one that is in somebody's hands is let alone; one that has all inputs from this
   round, none of which has been told to the store, is ready; any other waits for the store.
3. A value made here stays in memory while a consumer has not run here (`_left`), at most until the
   round ends; one from the store or an earlier round (`_kept`) as long as a task of the frontier's
   window reads it (`_need`). What was made in the Run of its last reader is dropped by that as soon
   as it has run; always, with one thread. Else nobody knows which Run will be the last to read it:
   it stays until none does (`_readers`).
4. Literals are read like the inputs of a frontier task. A task that is reached and finds one
   missing is set aside (`_starved`) until it is there.
5. One commit is in flight at most, and it is formed once: whoever sends it again sends the same.
   What it offers is nobody's until it is answered.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple, Protocol, TypeAlias

from wukong_async.protocol import (
    Begun,
    Commit,
    Marks,
    Reply,
    Status,
    TaskSpec,
    has_bit,
    told_after,
)

LEAST_SPLIT = 0.001
"""Seconds of tasks that one thread runs while another has nothing to do: handing some of them over
would take a twentieth of that."""
RUN_LIMIT = 1024
"""Tasks in one Run: enough to make the hand-over to the worker thread (a few 100 µs) cheap."""
LOAD_AHEAD = 512
"""Frontier tasks whose blocks are loaded before it is their turn: two blocks' worth."""
URGENT_MOST = 512
"""Tasks of the frontier that may be said to be urgent: the next ones."""
FETCH_BYTES = 256 * 1024 * 1024
"""By default, bytes of inputs to hold for the running and the next tasks. With a quarter of it, a
product of matrices in blocks of 8 MB reads most of them again."""
FETCH_BATCH = 16 * 1024 * 1024
"""Bytes of one Fetch: the first tasks do not wait for the inputs of the last ones."""
FETCH_FLIGHT = 2
"""Fetches in flight: more would only hold up what is written meanwhile."""
FETCH_MOST = 4096
FETCH_FIRST = 32
"""Objects to read while nothing is known of their size."""
COMMIT_MOST = 20_000
"""Arrivals and outputs in one commit: a script that takes 50 ms holds up everybody else."""
SURGE = 16
"""A Run ends where there are twice as many ready tasks and so many more: they may be shared."""
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
    """Run these tasks in this order; answer with `ran`, also if not all of them, or `failed`."""

    steps: tuple[Step, ...]

    @property
    def first(self) -> int:
        """Its first task: no other Run in flight has it, so that tells which one this is."""
        return self.steps[0].task


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
class Invoke:
    """Invoke the executors that have come of these offers of a commit. No answer."""

    sequence: int
    offers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class InvokeAgain:
    """Invoke this executor again: it has given its record back. No answer."""


@dataclass(frozen=True, slots=True)
class Exit:
    """Return normally. Nothing is started, published or committed after this."""

    reason: Status


Action: TypeAlias = (
    Begin | Load | Fetch | Run | Publish | Send | Drop | Delete | Invoke | InvokeAgain | Exit
)


class Advice(Protocol):
    """What the engine asks a policy for."""

    def seconds_of(self, task: TaskSpec) -> float:
        """How long a task is expected to run; infinite if nothing is known."""

    def bytes_of(self, task: TaskSpec) -> float:
        """About how large its output is; 0 if nothing is known."""

    def may_read_ahead(self) -> bool:
        """Whether to read inputs of more than the next task, as others may take the rest."""

    def urgent(self, engine: Engine, tasks: Sequence[int]) -> Collection[int]:
        """Those of these tasks of the frontier that others wait for, and that are to run first."""

    def meanwhile(self, engine: Engine, size: float) -> tuple[Iterable[int], Iterable[int]]:
        """Fan-ins to tell, and to probe, while so many bytes are read and nothing can be run."""

    def at_last(
        self, pending: Mapping[int, Sequence[tuple[int, int]]]
    ) -> tuple[Iterable[int], Iterable[int]]:
        """With nothing else to do: fan-ins to tell first, and to probe before all is written."""


class NoAdvice:
    """As if everything took no time and were small."""

    def seconds_of(self, task: TaskSpec) -> float:
        """See `Advice`."""
        return 0.0

    def bytes_of(self, task: TaskSpec) -> float:
        """See `Advice`."""
        return 0.0

    def may_read_ahead(self) -> bool:
        """See `Advice`."""
        return True

    def urgent(self, engine: Engine, tasks: Sequence[int]) -> Collection[int]:
        """See `Advice`."""
        return ()

    def meanwhile(self, engine: Engine, size: float) -> tuple[Iterable[int], Iterable[int]]:
        """See `Advice`."""
        return (), ()

    def at_last(
        self, pending: Mapping[int, Sequence[tuple[int, int]]]
    ) -> tuple[Iterable[int], Iterable[int]]:
        """See `Advice`."""
        return (), ()


class Engine:
    """The decisions of one incarnation of one executor.

    Parameters
    ----------
    advice
        Whom to ask about what is not known here: how long tasks take, and how large outputs are.
    run_seconds
        About how long one Run may take. What is in a Run cannot be offered to anybody any more.
    fetch_bytes
        About how many bytes of inputs, and of a Run's outputs, are held in memory.
    threads
        How many Runs there may be at once. Stays as it is once the first one was handed out.
    """

    # The books of one round; `_start_round` opens them.
    _mine: set[int]  # The frontier as the store has it,
    _marks: dict[int, set[int]]  # with inputs that are in no store,
    _missing: dict[int, set[int]]  # and those of them that are not in memory either.
    _frontier: list[int]  # What of it can run:
    _urgent: frozenset[int]  # these before what is ready,
    _head: int  # tasks before this have been scheduled,
    _window: int  # before this have their inputs in memory or asked for,
    _ahead: int  # before this have their blocks loaded or asked for.
    _stack: list[int]  # Ready; the next one on top.
    _stalled: dict[int, None]  # Ready, but for their block,
    _unasked: list[int]  # which has not been asked for; the next one last.
    _starved: list[int]  # Ready, but for a literal,
    _fed: set[int]  # which has been asked for.
    _pending: dict[int, list[tuple[int, int]]]  # Consumer → (edge, input made here), untold,
    _degree: dict[int, int]  # and its in-degree.
    _edges: set[int]  # Edges that were told to the store.
    _probed: dict[int, int]  # Fan-in → how much had been scheduled when it was probed.
    _scheduled: set[int]
    _made: list[int]  # The same, in order.
    _undone: dict[int, tuple[int, ...]]  # The last of them, which have not run, and their drops:
    _running: dict[int, tuple[Step, ...]]  # those of the Runs in flight, by their first tasks,
    _rest: list[tuple[Step, ...]]  # and what others have not come to.
    _behind: dict[int, list[int]]  # Undone in a Run → ready but for that, for another one.
    _left: dict[int, int]
    _need: dict[int, int]
    _readers: dict[int, int]  # How many that are undone read an object; for several threads.
    _unread: set[int]  # In memory, and not needed any more when the Runs in flight are done.
    _published: set[int]  # By soft commits.
    _handed: set[int]
    _loading: set[int]
    _fetching: set[int]
    _flights: int  # Fetches that were not answered yet.
    _trim_pending: bool

    def __init__(
        self,
        advice: Advice | None = None,
        run_seconds: float = 1.0,
        fetch_bytes: float = FETCH_BYTES,
        threads: int = 1,
    ) -> None:
        self.advice: Advice = advice or NoAdvice()
        self.run_seconds = run_seconds
        self.fetch_bytes = fetch_bytes
        self.threads = threads
        self.state = State.BEGIN
        self.generation = 0
        self.free = 0
        """Concurrency slots that were not in use when the store was asked last."""
        self.told = ""
        """A digest of what the record was told; goes with the next commit."""
        self.rounds = 0
        """How many have ended with a hard commit."""
        self._sequence = 0
        self._check = False
        self._taken = b""
        self._specs: dict[int, TaskSpec] = {}
        self._actions: list[Action] = [Begin()]
        self._object_bytes = 0.0
        self._kept: set[int] = set()
        self._next: Commit | None = None  # Formed, and waiting for its data.
        self._sent: Commit | None = None  # In flight.
        self._failing = False
        self._leaving = False
        self._spilling = False
        self._start_round((), ())

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
        self._sequence, self.told = answer.sequence, answer.told
        self._check, self._taken = answer.check, answer.taken
        self.free = answer.free
        self._start_round(answer.frontier, answer.marks)
        self.state = State.WORK

    def loaded(self, specs: Iterable[TaskSpec]) -> None:
        """Tasks of plan blocks that were read, asked for or not."""
        fresh = {spec.number: spec for spec in specs}
        self._specs.update(fresh)
        self._loading.difference_update(fresh)
        # In the order of the plan, as they come.
        ready = [number for number in fresh if number in self._stalled] if self._stalled else []
        for number in ready:
            del self._stalled[number]
        self._stack.extend(reversed(ready))
        self._trim()

    def fetched(self, sizes: Mapping[int, int]) -> None:
        """Objects that are in memory now, with their bytes."""
        self._fetching.difference_update(sizes)
        self._flights -= 1
        mean = sum(sizes.values()) / max(1, len(sizes))
        self._object_bytes = max(mean, self._object_bytes / 2)
        stored = [number for number in sizes if number not in self._left]
        self._kept.update(number for number in stored if number in self._need)
        # Their reader got them from here meanwhile, or was handed over.
        self._unread.update(number for number in stored if number not in self._need)
        self._drop_unread(stored)
        for task in [t for t in self._starved if self._kept.issuperset(self._specs[t].literals)]:
            self._starved.remove(task)
            self._stack.append(task)

    def is_needed(self, number: int) -> bool:
        """Whether a task here is to read an object that is being fetched.

        If not, its reader was handed over meanwhile, and may be the last that was waited for: the
        object may be gone, and counts as fetched.
        """
        return number in self._need

    def ran(
        self, count: int | None = None, spoilt: Sequence[int] = (), *, run: int | None = None
    ) -> bool:
        """The first `count` steps of a Run are done, by default all; the others did not start.

        Parameters
        ----------
        spoilt
            Outputs (`is_only_here`) that one of the others has used up before it was cut short, in
            a hand-over. The next incarnation makes them again, of their inputs, which have to be in
            memory.
        run
            Which Run, by its `first` task; not needed if there is but one.

        Returns
        -------
        bool
            False, and nothing has changed, if something that is done, or that another Run is about
            to do, has read what is spoilt.
        """
        assert self._leaving or not spoilt
        first, steps = self._running_steps(run)
        done, rest = steps[:count], () if count is None else steps[count:]
        if spoilt:
            over = self._undone.keys() - {t for each in self._running.values() for t, _ in each}
            over.update(spoilt, (task for task, _ in rest))
            if any(not self._unrun(task, over) for task in spoilt):
                return False
        self._running.pop(first, None)
        for task, _ in done:
            del self._undone[task]
        self._undone.update((task, ()) for task in spoilt)
        if rest:
            self._rest.append(rest)
        self._drop_unread(self._settle(done) if self.threads > 1 else ())
        return True

    def _running_steps(self, run: int | None) -> tuple[int, tuple[Step, ...]]:
        """The first task of a Run, and its steps; of the only one, if `run` does not say which."""
        assert run is not None or len(self._running) < 2
        first = next(iter(self._running), -1) if run is None else run
        return first, self._running.get(first, ())

    def take_back(self, count: int, *, run: int | None = None) -> int:
        """Have what is behind the first `count` steps of a Run, which have been begun, ready again.

        They take longer than was expected, and others may have the time.

        Parameters
        ----------
        run
            Which Run, by its `first` task; not needed if there is but one.

        Returns
        -------
        int
            How many steps the Run has now; more than `count` if not all of the rest can go back.
        """
        first, steps = self._running_steps(run)
        keep = len(steps)
        if not (self.is_ending or self._check):
            while keep > count and self._may_go_back(steps[keep - 1].task):
                keep -= 1
        if keep < len(steps):
            self._running[first] = steps[:keep]
            self._unschedule([task for task, _ in steps[keep:]])
        return keep

    def _may_go_back(self, task: int) -> bool:
        """Whether `_schedule` can be undone; not where a fan-in that has not been read is ready."""
        spec = self._specs[task]
        for consumer, degree in zip(spec.consumers, spec.degrees, strict=True):
            if consumer in self._mine:
                return False
            if degree > 1 and consumer not in self._specs and consumer not in self._pending:
                return False
        return True

    def _unschedule(self, tasks: Sequence[int]) -> None:
        """Undo `_schedule` for the last tasks of a Run, and have them ready."""
        undone = set(tasks)
        reached: set[int] = set()
        touched: set[int] = set()
        for task in reversed(tasks):
            spec = self._specs[task]
            reached.update(self._unreach(spec))
            self._unread_made(spec.inputs)
            if self.threads > 1:
                self._unread_by(spec, touched)
            self._left.pop(task, None)
            self._unread.discard(task)
            self._scheduled.discard(task)
            del self._undone[task]
        self._made = [task for task in self._made if task not in undone]
        for consumer in reached.intersection(self._pending):
            untold = [edge for edge in self._pending[consumer] if edge[1] not in undone]
            self._pending[consumer] = untold
            if not untold:
                del self._pending[consumer], self._degree[consumer]
        for queue in (self._stack, self._starved, *self._behind.values()):
            queue[:] = [task for task in queue if task not in reached]
        for consumer in reached:
            self._stalled.pop(consumer, None)
        mine = self._back_to_frontier(undone)
        again = [task for task in tasks if task not in reached and task not in mine]
        self._stack.extend(reversed(again))
        self._drop_unread(touched)

    def _unreach(self, spec: TaskSpec) -> list[int]:
        """Undo `_reach`, but for edges that are pending and tasks that are ready: of whom."""
        reached = []
        for consumer, degree in zip(spec.consumers, spec.degrees, strict=True):
            if self._is_settled(consumer):
                continue
            reached.append(consumer)
            if degree > 1 and consumer not in self._pending:
                sources = [(self._specs[d], d) for d in self._inputs(consumer)]
                self._pending[consumer] = [
                    (s.first_edge + bisect_left(s.consumers, consumer), d) for s, d in sources
                ]
                self._degree[consumer] = degree
        return reached

    def _unread_made(self, objects: Iterable[int]) -> None:
        """Undo `_read_made`."""
        for number in objects:
            if number in self._scheduled:
                self._left[number] = self._left.get(number, 0) + 1
                self._unread.discard(number)

    def _back_to_frontier(self, tasks: Container[int]) -> list[int]:
        """Those of these tasks that are of the frontier; they are the next ones again."""
        past = self._frontier[: self._head]
        mine = [task for task in past if task in tasks]
        self._frontier[: self._head] = [task for task in past if task not in tasks] + mine
        self._head -= len(mine)
        for task in mine:
            missing = self._want(self._specs[task].inputs + self._specs[task].literals)
            assert not missing, (task, missing)
        self._reorder()
        return mine

    def _unread_by(self, spec: TaskSpec, touched: set[int]) -> None:
        """A reader less, with several threads; what nobody reads any more is added to `touched`."""
        for number in spec.inputs + spec.literals:
            self._readers[number] -= 1
            if not self._readers[number]:
                del self._readers[number]
                touched.add(number)

    def _settle(self, done: Iterable[Step]) -> set[int]:
        """With several threads: what waited for these goes on; objects that may be unread now."""
        touched: set[int] = set()
        ready: list[int] = []
        for task, _ in done:
            touched.add(task)
            ready += self._behind.pop(task, ())
            self._unread_by(self._specs[task], touched)
        self._stack.extend(reversed(ready))
        return touched

    def _unrun(self, task: int, undone: Container[int]) -> bool:
        """Whether no consumer of this task has run but for these."""
        consumers = self._specs[task].consumers
        return all(c in undone for c in self._scheduled.intersection(consumers))

    def is_only_here(self, number: int, *, run: int | None = None) -> bool:
        """Whether an object that a Run has read was made in this round and is in no store.

        Parameters
        ----------
        run
            Which Run, by its `first` task; not needed if there is but one. What another one is
            about to make again, this one has read from the store.
        """
        if number not in self._scheduled or number in self._published:
            return False
        others = (steps for first, steps in self._running.items() if first != run)
        return run is None or all(number != task for steps in others for task, _ in steps)

    def failed(self) -> None:
        """A task failed, its output does not pickle, or an input is lost: the job fails."""
        if self.state in (State.WORK, State.PUBLISH):
            self._next = None
            self._failing = True
            if self._sent is None:
                self._send(Commit(failed=True))

    def published(self) -> None:
        """The outputs of the last Publish are durable."""
        if self._next is not None:
            self._send(self._next)

    def replied(self, reply: Reply) -> None:
        """The answer to Send."""
        commit, self._sent = self._sent, None
        assert commit is not None
        if reply.status is Status.FENCED:
            # The commit may have had its effect before: `begin` sorts out who is invoked in vain.
            self._invoke(commit, (True,) * len(commit.offers), again=commit.release)
        if reply.status is not Status.OK:
            self._exit(reply.status)
            return
        self.free, self.told = reply.free, told_after(self.told, reply)
        self._invoke(commit, reply.accepted, again=commit.release and not reply.gone)
        if reply.deletes:
            self._actions.append(Delete(reply.deletes))
        if reply.gone or commit.release:
            self._exit(Status.OK)
        elif self._failing:
            self._send(Commit(failed=True))
        elif commit.stay is None:
            self._shared(commit, reply)
        else:
            self._passed(commit.stay, reply)

    def refused(self, reason: Status) -> bool:
        """A renewal was answered with FENCED or STOP; whether that is the end.

        A commit in flight may have ended or released the record itself. Its own answer will say so.
        """
        if reason is Status.FENCED and self._sent is not None:
            return False
        self.stopped(reason)
        return True

    def stopped(self, reason: Status) -> None:
        """A put was answered with CLOSED, or this incarnation is to end for another reason."""
        if self.state is not State.EXIT:
            self._exit(reason)

    # What a policy may ask for ----------------------------------------------------------------

    @property
    def pending(self) -> Mapping[int, Sequence[tuple[int, int]]]:
        """Fan-ins that inputs made here are to arrive at: (edge, input) pairs, some unfinished."""
        return self._pending

    def offerable(self) -> list[int]:
        """Tasks that somebody else could run, in the order in which they would run here."""
        if self._missing or self._leaving or self.state is not State.WORK:
            # What is marked has to be made here, and so has what leads to it.
            return []
        undone = self._undone.keys()
        ready = [t for t in reversed(self._stack) if undone.isdisjoint(self._inputs(t))]
        ready = [t for t in ready if t not in self._fed]
        # What has marks takes along what is in no store, which has to be here for that.
        frontier = self._frontier[self._head :]
        if self._urgent:
            ready = [t for t in frontier if t in self._urgent] + ready
            frontier = [t for t in frontier if t not in self._urgent]
        return [t for t in ready + frontier if all(map(self.is_done, self._marks.get(t, ())))]

    @property
    def queued(self) -> int:
        """About how many tasks are ready."""
        return len(self._stack) + len(self._frontier) - self._head

    @property
    def stalled(self) -> int:
        """How many are ready but for their blocks, which have to be read."""
        return len(self._stalled)

    @property
    def is_busy(self) -> bool:
        """Whether a commit is formed or in flight, or there will be no more: `share` is in vain."""
        return bool(self.is_ending or self._next or self._sent)

    @property
    def is_ending(self) -> bool:
        """Whether nothing more is begun in this round."""
        return self.state is not State.WORK or self._failing or self._leaving or self._spilling

    def spec(self, task: int) -> TaskSpec | None:
        """A task of the plan, if its block has been read."""
        return self._specs.get(task)

    def is_done(self, task: int) -> bool:
        """Whether a task has run here in this round."""
        return task in self._scheduled and task not in self._undone

    def is_mine(self, task: int) -> bool:
        """Whether a task has run here in this round, or is certain to."""
        return task in self._scheduled or task in self._mine

    def is_scheduled(self, task: int) -> bool:
        """Whether it has, or is about to."""
        return task in self._scheduled

    def is_here(self, number: int) -> bool:
        """Whether an object is in memory, be it made here or read."""
        return self._has(number)

    def is_published(self, number: int) -> bool:
        """Whether others can read an output of this round."""
        return number in self._published

    @property
    def handed(self) -> Collection[int]:
        """Tasks of this round that somebody else has been given."""
        return self._handed

    @property
    def idle(self) -> int:
        """Threads that have nothing to do."""
        return max(0, self.threads - len(self._running))

    @property
    def unfinished(self) -> Collection[int]:
        """Tasks that run or are about to, in order."""
        return self._undone

    def learn(self, tasks: Iterable[int]) -> bool:
        """Have the blocks of these tasks read, for a policy to look at; whether any is missing."""
        missing = [t for t in tasks if t not in self._specs]
        wanted = tuple(t for t in missing if t not in self._loading)
        if wanted and self.state is State.WORK and not self._leaving:
            self._loading.update(wanted)
            self._actions.append(Load(wanted))
        return bool(missing)

    def share(
        self,
        arrive: Iterable[int] = (),
        probe: Iterable[int] = (),
        offers: Iterable[Sequence[int]] = (),
        *,
        ask: bool = False,
    ) -> bool:
        """Form a soft commit, if none is under way and there is something to say.

        Parameters
        ----------
        arrive
            Fan-ins of `pending` whose inputs arrive.
        probe
            Fan-ins of `pending` to claim if nothing else is missing there. Each is probed again
            only once something else has been scheduled, since nobody polls, and only if none of its
            inputs has been published.
        offers
            Groups of `offerable` tasks, each for a new executor.
        ask
            Form one even if there is nothing to say, to hear how many slots are free.
        """
        if self.is_busy:
            return False
        groups = tuple(tuple(group) for group in offers if group)
        arrivals = self._arrivals(arrive)
        probes = self._probes(probe)
        if not (groups or arrivals or probes or ask):
            return False
        told = [d for _, _, edges in arrivals for d in edges.values()]
        for task in (t for group in groups for t in group):
            # Of the frontier only what has marks has inputs that are in no store; what was claimed
            # by a probe may have got ready here meanwhile, so that it is on the stack.
            told += self._marks.get(task, ()) if task in self._mine else self._inputs(task)
        self._lock(groups)
        self._tell(told, arrivals, probes, groups)
        return True

    def spill(self) -> bool:
        """Pass what is done as soon as nothing runs, and forget all values: they are read again.

        For an executor that has too much in memory. False if there is nothing to be passed.
        """
        if self.state is State.WORK and self._made and not (self._failing or self._leaving):
            self._spilling = True
        return self._spilling

    @property
    def is_leaving(self) -> bool:
        """Whether the executor hands over: it starts nothing more."""
        return self._leaving

    def hand_over(self) -> None:
        """End the round as soon as nothing runs; what is ready is for the next incarnation."""
        self._leaving = True
        if self.threads > 1:  # It may have to be given what a Run that has just ended is done with.
            self._actions = [each for each in self._actions if not isinstance(each, Drop)]

    # One round --------------------------------------------------------------------------------

    def _start_round(self, frontier: Sequence[int], marks: Marks) -> None:
        self._mine = set(frontier)
        self._marks = {task: set(inputs) for task, inputs in marks}
        self._missing = {task: set(inputs) for task, inputs in marks}
        self._frontier = sorted(self._mine.difference(self._missing))
        self._urgent = frozenset()
        self._head = self._window = self._ahead = 0
        self._stack, self._starved, self._fed = [], [], set()
        self._stalled, self._unasked = {}, []
        self._pending, self._degree = {}, {}
        self._edges, self._probed = set(), {}
        self._scheduled, self._made, self._undone = set(), [], {}
        self._turns = 0
        self._running, self._rest, self._behind = {}, [], {}
        self._left, self._need, self._unread = {}, {}, set()
        self._readers = {}
        self._published, self._handed = set(), set()
        self._loading, self._fetching, self._flights = set(), set(), 0
        self._trim_pending = False

    def _work(self) -> None:
        if self._failing:
            return
        if self._leaving or self._spilling:
            reading = self._spilling and (self._loading or self._fetching)
            if not (self._running or self._next or self._sent or reading):
                self._end_round()
            return
        self._load()
        self._fetch()
        while len(self._running) < self.threads:
            steps = self._rest.pop(0) if self._rest else self._take()
            if not steps:
                break
            self._running[steps[0].task] = steps
            self._actions.append(Run(steps))
            self._load()  # While these run, what they lead to is read.
            self._fetch()
        if self._running or self._loading or self._next or self._sent:
            return
        if self._fetching:
            size = sum(map(self._bytes_of, self._fetching))
            self.share(*self.advice.meanwhile(self, size))
        elif not self.share(*self.advice.at_last(self._pending)):
            self._end_round()

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
            if task not in self._specs and task not in self._loading:
                wanted.append(task)
            self._ahead += 1
        if wanted:
            self._loading.update(wanted)
            self._actions.append(Load(tuple(wanted)))

    def _fetch(self) -> None:
        """Ask for the inputs of the next frontier tasks: at least one task's, at most a window."""
        most = FETCH_FIRST
        if self._object_bytes:
            most = int(min(FETCH_MOST, self.fetch_bytes / self._object_bytes))
        ahead = self.advice.may_read_ahead()
        while self._window < self._ahead and self._flights < FETCH_FLIGHT:
            wanted: list[int] = []
            held = 0.0
            while self._window < self._ahead and held < FETCH_BATCH:
                spec = self._specs.get(self._frontier[self._window])
                if spec is None:
                    break
                objects = spec.inputs + spec.literals
                if self._window > self._head and (
                    not ahead or len(self._need) + len(objects) > most
                ):
                    break
                self._window += 1
                if objects:
                    missing = self._want(objects)
                    wanted += missing
                    held += sum(map(self._bytes_of, missing))
            if not wanted:
                break
            self._ask_for(wanted)

    def _bytes_of(self, number: int) -> float:
        """About how large an object is that is to be fetched."""
        spec = self._specs.get(number)
        return (self.advice.bytes_of(spec) if spec else 0.0) or self._object_bytes

    def _ask_for(self, objects: Sequence[int]) -> None:
        self._flights += 1
        self._actions.append(Fetch(tuple(objects)))

    def _want(self, objects: Iterable[int]) -> list[int]:
        """Note that a task will read these objects; those that have to be fetched for it."""
        missing = []
        for number in objects:
            self._need[number] = self._need.get(number, 0) + 1
            self._unread.discard(number)
            if not self._has(number) and number not in self._fetching:
                self._fetching.add(number)
                missing.append(number)
        return missing

    def _has(self, number: int) -> bool:
        """Whether an object is in memory, or will be when what is scheduled has run."""
        return number in self._kept or number in self._left

    def _take(self) -> tuple[Step, ...]:
        """The next tasks in depth-first order (rule 1); one whose time is limited by itself."""
        steps: list[Step] = []
        seconds, room = self.run_seconds, self.fetch_bytes
        most = 2 * self.queued + SURGE
        stack, frontier, specs = self._stack, self._frontier, self._specs
        seconds_of, bytes_of = self.advice.seconds_of, self.advice.bytes_of
        several, idle = self.threads > 1, self.idle
        # Of what could run now, for each thread without work.
        fair = (len(stack) + self._window - self._head) / idle
        own: set[int] = set()
        is_split = False
        new_step = tuple.__new__  # As `Step` does, without a call of Python for each of them.
        while len(steps) < RUN_LIMIT and seconds > 0 and room > 0:
            if len(stack) + len(frontier) - self._head >= most:
                break
            if several:
                is_split = fair <= 0 and idle > 1 and self.run_seconds - seconds >= LEAST_SPLIT
            ready = None
            if self._urgent and not is_split and self._is_urgent():
                ready = self._next_of_frontier(alone=not steps)
            if ready is None and stack and len(self._starved) < STARVED_MOST:
                spec = specs[stack[-1]]
                if steps and spec.limited:
                    break
                if is_split and own.isdisjoint(spec.inputs):
                    break
                stack.pop()
                if self._undone and self._waits(spec):
                    continue
                if spec.literals:
                    if self._starves(spec):
                        continue
                    self._read_stored(spec.literals)
            elif not is_split and (ready := ready or self._next_of_frontier(alone=not steps)):
                spec = ready
                if objects := spec.inputs + spec.literals:
                    self._read_stored(objects)
            else:
                break
            number = spec.number
            if several:
                fair -= own.isdisjoint(spec.inputs)  # What follows nobody else could do.
                own.add(number)
            steps.append(new_step(Step, (number, self._schedule(spec, own))))
            seconds -= seconds_of(spec)
            room -= bytes_of(spec)
            if spec.limited:
                break
        self._undone.update(steps)
        return tuple(steps)

    def _waits(self, spec: TaskSpec) -> bool:
        """Whether a reached task reads what is undone in another Run. It is set aside then."""
        for number in spec.inputs:
            if number in self._undone:
                self._behind.setdefault(number, []).append(spec.number)
                return True
        return False

    def _schedule(self, spec: TaskSpec, own: Container[int]) -> tuple[int, ...]:
        """Enter a task as run, and what it leads to; the values to drop when it is done.

        Parameters
        ----------
        own
            With several threads, the tasks of its Run, itself included.
        """
        task, inputs, consumers = spec.number, spec.inputs, spec.consumers
        drops = self._read_made(inputs) if inputs else ()
        self._made.append(task)
        self._turns += 1
        self._scheduled.add(task)
        unrun = len(consumers)
        if self._check:
            # Tasks that were claimed before may have run before what they read was made again.
            unrun -= len(self._scheduled.intersection(consumers))
            self._kept.discard(task)
            self._unread.discard(task)
        if unrun or spec.requested:
            self._left[task] = unrun
        else:
            drops += (task,)
        if consumers:
            self._reach(spec)
        if self.threads > 1:
            for number in inputs + spec.literals:
                self._readers[number] = self._readers.get(number, 0) + 1
            # What this Run makes is read by no other one, but for a value of a dead incarnation.
            late = [number for number in drops if self._check or number not in own]
            self._unread.update(late)
            drops = tuple([number for number in drops if number not in late])
        return drops

    def _starves(self, spec: TaskSpec) -> bool:
        """Whether a reached task has to wait for a literal (rule 4). Asks for it the first time."""
        if spec.number not in self._fed:
            self._fed.add(spec.number)
            if missing := self._want(spec.literals):
                self._ask_for(missing)
        if self._kept.issuperset(spec.literals):
            self._fed.discard(spec.number)
            return False
        self._starved.append(spec.number)
        return True

    def _is_urgent(self) -> bool:
        """Whether the next task of the frontier goes before what is ready."""
        return self._head < self._window and self._frontier[self._head] in self._urgent

    def _next_of_frontier(self, *, alone: bool) -> TaskSpec | None:
        if self._head == self._window:
            return None
        spec = self._specs[self._frontier[self._head]]
        if spec.limited and not alone:
            return None
        if self._undone and not self._undone.keys().isdisjoint(spec.inputs):
            return None  # It had a mark, or one is made again that it has read from the store.
        if self._lacks(spec):
            return None
        self._head += 1
        return spec

    def _lacks(self, spec: TaskSpec) -> bool:
        """Whether something that a task reads is neither in memory nor about to be made."""
        objects = spec.inputs + spec.literals
        return bool(objects) and not all(map(self._has, objects))

    def _read_made(self, objects: Iterable[int]) -> tuple[int, ...]:
        """Count one reader of outputs of this round down; return those that are done with."""
        all_left, specs = self._left, self._specs
        drops: list[int] = []
        for number in objects:
            left = all_left.get(number)
            if left is None:
                continue
            if left > 1 or specs[number].requested:
                all_left[number] = left - 1
            else:
                del all_left[number]
                drops.append(number)
        return tuple(drops)

    def _read_stored(self, objects: Iterable[int]) -> None:
        """The same for what a window has been opened for.

        Those that are done with are dropped after the Run, not in it: another task may ask for
        one meanwhile, and what it fetched would be dropped by a step that is still to run.
        """
        for number in objects:
            self._need[number] -= 1
            if not self._need[number]:
                del self._need[number]
                if number in self._kept:
                    self._unread.add(number)

    def _drop_unread(self, touched: Collection[int]) -> None:
        """Forget what nobody reads any more.

        With one thread when nothing runs: what runs drops by itself what has been made here, and
        that may be the same. With several, of what was touched, whatever no Run reads or makes. In
        a hand-over the next incarnation may have to be given it.
        """
        if self.threads == 1:
            unread = set() if self._running or self._undone else set(self._unread)
        elif self._leaving:
            unread = set()
        else:
            unread = self._unread.intersection(touched)
            unread = {n for n in unread if n not in self._readers and n not in self._undone}
        if unread:
            self._kept -= unread
            self._unread -= unread
            self._actions.append(Drop(tuple(sorted(unread))))

    def _reach(self, spec: TaskSpec) -> None:
        """Hand the output of `spec` to its consumers (rule 2)."""
        # Reversed: the first consumer in plan order is on top of the stack.
        number, consumers, degrees = spec.number, spec.consumers, spec.degrees
        mine, elsewhere = self._mine, bool(self._handed or self._check)
        for i in range(len(consumers) - 1, -1, -1):
            consumer, degree = consumers[i], degrees[i]
            if consumer in mine:
                self._clear_mark(consumer, number)
                continue
            if elsewhere and self._is_settled(consumer):
                continue
            if degree > 1:
                pending = self._pending.get(consumer)
                if pending is None:
                    pending = self._pending[consumer] = []
                    self._degree[consumer] = degree
                pending.append((spec.first_edge + i, number))
                if len(pending) < degree:
                    continue
                del self._pending[consumer], self._degree[consumer]
            if consumer in self._specs:
                self._stack.append(consumer)
            else:
                self._stalled[consumer] = None
                self._unasked.append(consumer)

    def _clear_mark(self, consumer: int, number: int) -> None:
        missing = self._missing.get(consumer)
        if missing is not None:
            missing.discard(number)
            if not missing:
                del self._missing[consumer]
                self._frontier.append(consumer)

    def _is_settled(self, consumer: int) -> bool:
        """Whether a task that is not ours is somebody else's."""
        return consumer in self._handed or (self._check and has_bit(self._taken, consumer))

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

    # Soft commits -----------------------------------------------------------------------------

    def _inputs(self, task: int) -> tuple[int, ...]:
        return self._specs[task].inputs

    def _requested(self, tasks: Iterable[int]) -> frozenset[int]:
        return frozenset(t for t in tasks if self._specs[t].requested)

    def _arrivals(self, consumers: Iterable[int]) -> list[tuple[int, int, dict[int, int]]]:
        """(fan-in, in-degree, {edge: input}) of what is done there; from now on it is told."""
        arrivals = []
        for consumer in consumers:
            pending = self._pending.get(consumer, [])
            edges = {edge: d for edge, d in pending if d not in self._undone}
            if edges:
                arrivals.append((consumer, self._degree[consumer], edges))
                self._told_of(consumer, edges)
        return arrivals

    def _told_of(self, consumer: int, edges: Iterable[int]) -> None:
        """These inputs need not arrive any more."""
        self._edges.update(edges)
        if consumer in self._pending:
            untold = [p for p in self._pending[consumer] if p[0] not in self._edges]
            self._pending[consumer] = untold

    def _probes(
        self, consumers: Iterable[int]
    ) -> tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]:
        probes = []
        for consumer in consumers:
            pending = self._pending.get(consumer, [])
            if self._probed.get(consumer) == self._turns or any(
                d in self._published or d in self._undone for _, d in pending
            ):
                continue
            if pending:
                self._probed[consumer] = self._turns
                probes.append((consumer, self._degree[consumer], tuple(pending)))
        return tuple(probes)

    def _lock(self, groups: Iterable[Sequence[int]]) -> None:
        """What is offered does not run here until the answer is there."""
        offered = {task for group in groups for task in group}
        if not offered:
            return
        self._stack = [t for t in self._stack if t not in offered]
        near, far = self._frontier[self._head : self._window], self._frontier[self._window :]
        for task in offered.intersection(near):
            spec = self._specs[task]
            self._read_stored(spec.inputs + spec.literals)  # It will not be.
            if self.threads > 1:
                self._drop_unread(spec.inputs + spec.literals)
        near = [t for t in near if t not in offered]
        self._frontier[self._head :] = near + [t for t in far if t not in offered]
        self._window = self._ahead = self._head + len(near)

    def _shared(self, commit: Commit, reply: Reply) -> None:
        """A soft commit has taken effect."""
        for group, accepted in zip(commit.offers, reply.accepted, strict=True):
            if accepted:
                self._handed.update(group)
                self._mine.difference_update(group)
                continue
            self._frontier += [task for task in group if task in self._mine]
            self._stack += [task for task in reversed(group) if task not in self._mine]
        already = set(reply.already)
        marks = {c: {d for e, d in edges if e not in already} for c, _, edges in commit.probes}
        for consumer, _, edges in commit.probes:
            self._told_of(consumer, already.intersection(e for e, _ in edges))
        for task in reply.claims:
            self._pending.pop(task, None)
            self._degree.pop(task, None)
            self._mine.add(task)
            if marks.get(task):
                self._marks[task] = marks[task]
            if not self._runs_here(task):
                self._frontier.append(task)
        self._frontier[self._window :] = sorted(self._frontier[self._window :])
        if any(reply.accepted):
            self._hurry()
        else:
            self._reorder()
        self._ahead = self._window
        for task, inputs in list(self._marks.items()):
            inputs.difference_update(d for d, _ in commit.publish)
            if not inputs:
                del self._marks[task]

    def _hurry(self) -> None:
        """Have those first that others wait for."""
        end = self._head + URGENT_MOST
        self._urgent = frozenset(self.advice.urgent(self, self._frontier[self._head : end]))
        self._reorder()

    def _reorder(self) -> None:
        """Urgent tasks of the frontier before others that have as much of what they read."""
        if not self._urgent:
            return
        head, window, frontier = self._head, self._window, self._frontier
        self._frontier[head:] = [
            # What is here could run; what has been asked for; and the rest.
            *sorted(
                frontier[head:window],
                key=lambda t: t not in self._urgent or self._lacks(self._specs[t]),
            ),
            *sorted(frontier[window:], key=lambda t: t not in self._urgent),
        ]

    def _runs_here(self, task: int) -> bool:
        """Whether a task that was claimed has or will run without being of the frontier.

        All of its inputs were made here, and a dead incarnation had brought some of them before.
        """
        if task in self._scheduled:
            return True
        waiting = (self._stack, self._stalled, self._starved, *self._behind.values())
        return self._check and any(task in queue for queue in waiting)

    # The end of a round -----------------------------------------------------------------------

    def _end_round(self) -> None:
        """Pass what is done: everything, but for a hand-over."""
        done, passing = self._made, self._scheduled
        if self._undone:
            done = [t for t in done if t not in self._undone]
            passing = set(done)
        arrivals: dict[int, dict[int, int]] = {}
        degrees: dict[int, int] = {}
        publish: dict[int, int] = {}
        # Only what has consumers that have not been scheduled can have some that have not run.
        for task in done if self._undone else [t for t in done if self._left.get(t)]:
            spec = self._specs[task]
            unread, told = 0, True
            for i, consumer in enumerate(spec.consumers):
                if consumer in passing:
                    continue
                unread += 1
                if consumer in self._mine:
                    told = told and task not in self._marks.get(consumer, ())
                elif not self._is_settled(consumer) and spec.first_edge + i not in self._edges:
                    told = False
                    arrivals.setdefault(consumer, {})[spec.first_edge + i] = task
                    degrees[consumer] = spec.degrees[i]
            if not told and task not in self._published:
                # Who counts from the start has to know of all readers: others may have read it.
                publish[task] = len(spec.consumers) if self._check else unread
        if sum(map(len, arrivals.values())) > COMMIT_MOST:
            self._share_some(arrivals, degrees)
            return
        requested = self._requested(done)
        stay = tuple(
            (task, tuple(sorted(self._marks.get(task, set()) - passing)))
            for task in sorted(self._mine - passing)
        )
        commit = Commit(
            passed=len(done),
            stay=stay,
            publish=tuple(publish.items()),
            results=tuple(sorted(requested)),
            arrivals=tuple(
                (c, degrees[c], tuple(edges) if self._check else len(edges))
                for c, edges in arrivals.items()
            ),
            reads=tuple(self._reads(done).items()),
            release=self._leaving,
        )
        self.state = State.PUBLISH
        fresh = requested.difference(self._published).union(publish)
        self._prepare(commit, [t for t in done if t in fresh])

    def _reads(self, done: Sequence[int]) -> dict[int, int]:
        """What these tasks have read of what is, or may be, published."""
        if self._check:
            return Counter(number for task in done for number in self._inputs(task))
        if not self._published:
            done = [t for t in done if t in self._mine]
        return Counter(
            number
            for task in done
            for number in self._inputs(task)
            if number not in self._scheduled or number in self._published
        )

    def _share_some(
        self, arrivals: Mapping[int, Mapping[int, int]], degrees: Mapping[int, int]
    ) -> None:
        """All at once would hold up the store: tell a part, in a commit that passes nothing."""
        edges = [(c, e, t) for c, brought in arrivals.items() for e, t in brought.items()]
        some: dict[int, list[int]] = {}
        for consumer, edge, _ in edges[:COMMIT_MOST]:
            some.setdefault(consumer, []).append(edge)
            self._edges.add(edge)
        told = [task for _, _, task in edges[:COMMIT_MOST]]
        self._tell(told, [(c, degrees[c], brought) for c, brought in some.items()])

    def _tell(
        self,
        tasks: Iterable[int],
        arrivals: Iterable[tuple[int, int, Iterable[int]]],
        probes: tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...] = (),
        offers: tuple[tuple[int, ...], ...] = (),
    ) -> None:
        """Form a commit that passes nothing, and publishes these outputs with all their readers."""
        publish = tuple(d for d in dict.fromkeys(tasks) if d not in self._published)
        self._published.update(publish)
        commit = Commit(
            publish=tuple((d, len(self._specs[d].consumers)) for d in publish),
            held=self._requested(publish),
            arrivals=tuple((c, degree, tuple(edges)) for c, degree, edges in arrivals),
            probes=probes,
            offers=offers,
        )
        self._prepare(commit, publish)

    def _prepare(self, commit: Commit, tasks: Sequence[int]) -> None:
        """Send a commit as soon as these outputs are durable."""
        self._next = commit
        if tasks:
            self._actions.append(Publish(tuple(tasks)))
        else:
            self._send(commit)

    def _send(self, commit: Commit) -> None:
        if commit.stay is not None or commit.failed:
            self.state = State.COMMIT
        self._next, self._sent = None, commit
        self._sequence += 1
        self._actions.append(Send(self._sequence, commit))

    def _passed(self, stay: Marks, reply: Reply) -> None:
        """A hard commit has taken effect."""
        self.rounds += 1
        if self._spilling:
            held = self._kept.union(self._left, self._unread)
            self._actions.append(Drop(tuple(sorted(held))))
            self._kept.clear()
            self._spilling = False
        else:
            # Outputs of the round may be inputs of what was claimed; the rest goes with it.
            self._kept.update(self._left)
        marks = tuple((task, inputs) for task, inputs in stay if inputs)
        self._start_round((*(task for task, _ in stay), *reply.claims), marks)
        self._trim_pending = True
        self._trim()
        self.state = State.WORK

    def _invoke(self, commit: Commit, accepted: Sequence[bool], *, again: bool) -> None:
        """Invoke whoever was given work."""
        if offers := tuple(index for index, yes in enumerate(accepted) if yes):
            self._actions.append(Invoke(self._sequence, offers))
        if again:
            self._actions.append(InvokeAgain())

    def _exit(self, reason: Status) -> None:
        self.state = State.EXIT
        self._actions.append(Exit(reason))
