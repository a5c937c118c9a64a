"""The store as a model: what the Lua scripts do, in Python, on an explicit clock.

Same methods, arguments and answers as `wukong_async.store.JobStore`, but synchronous. Whatever
differs between the two is a bug in one of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from wukong_async import failure, wire
from wukong_async.protocol import (
    Begun,
    JobState,
    Marks,
    Outcome,
    Reply,
    Status,
    Watch,
    child_name,
    digest,
    has_bit,
    told_after,
)
from wukong_async.store import NewJob, Place, place_of

LONGEST = 8
Arrival: TypeAlias = tuple[int, int, int | list[int]]
METADATA = (
    "job",
    "live",
    "records",
    "counts",
    "refs",
    "values",
    "results",
    "arrived",
    "taken",
    "dead",
    "owned",
    "claimed",
    "passed",
)
OWNED = 2


@dataclass
class Record:
    frontier: tuple[int, ...]
    check: bool = False
    marks: Marks = ()
    generation: int = 0
    nonce: str = ""
    held: bool = False
    sequence: int = 0
    unstarted: int = 0
    tries: int = 0
    soft: bool = False
    told: str = ""
    request: str = ""
    last_words: bytes = b""
    reply: Reply | None = None


@dataclass
class Job:
    new: NewJob
    state: JobState = JobState.RUNNING
    error: bytes = b""
    passed: int = 0
    commits: int = 0
    begins: int = 0
    held: int = 0
    peak: int = 0
    memory: int = 0
    limit: float | None = None
    owner: str | None = None
    manifest: bytes | None = b""


@dataclass
class ModelStore:
    """One job's metadata, and one data shard."""

    now: Callable[[], float] = field(repr=False)
    announce: Callable[[], None] = field(default=lambda: None, repr=False)
    job: Job | None = None
    live: dict[str, float] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    refs: dict[int, tuple[int, str, bool]] = field(default_factory=dict)
    """Object → reads to come, place, whether its producer may make it again."""
    values: dict[int, bytes] = field(default_factory=dict)
    results: dict[int, bytes] = field(default_factory=dict)
    owned: float | None = None
    is_open: bool = False
    """The mark on the data shard."""
    marked: bool = False
    """The mark beside the metadata."""
    arrived: set[int] = field(default_factory=set)
    taken: bytearray = field(default_factory=bytearray)
    dead: set[int] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)
    index: set[str] = field(default_factory=set)

    # What the invariants are checked on.
    claimed: list[int] = field(default_factory=list)
    passed: list[int] = field(default_factory=list)
    failed: bytes = b""
    invited: int = 0
    """Executors that there were to be."""
    begun: int = 0
    """Times that one began."""

    def is_empty(self) -> bool:
        """Whether no key is left."""
        return not (
            self.job
            or self.live
            or self.records
            or self.counts
            or self.refs
            or self.values
            or self.results
            or self.owned
            or self.is_open
            or self.marked
            or self.arrived
            or self.taken
            or self.dead
            or self.objects
            or self.index
        )

    def memory(self) -> dict[str, Any]:
        """The metadata as they are now."""
        return copy.deepcopy({name: getattr(self, name) for name in METADATA})

    def remember(self, memory: dict[str, Any]) -> None:
        """Go back to what they were."""
        vars(self).update(memory)

    # Metadata ---------------------------------------------------------------------------------

    def open(self) -> None:
        self.is_open = self.marked = True

    def create(self, new: NewJob) -> Status:
        if not self.marked:
            return Status.GONE
        if self.job is not None:
            return Status.OK
        self.job = Job(new, manifest=new.manifest)
        self.taken = bytearray(new.taken)
        if new.timeout is not None:
            self.job.limit = self.now() + new.timeout
        self._own(self.job, new.owner)
        for executor, frontier in new.records:
            self.records[executor] = Record(tuple(frontier))
            self.live[executor] = self.now() + new.grace
        self.invited += len(new.records)
        self.values.update(new.values)
        if new.tasks == 0:
            self._finish_job(JobState.DONE, b"")
        return Status.OK

    def begin(self, executor: str, nonce: str, request_id: str = "") -> Begun:
        job = self.job
        if job is None or job.state is not JobState.RUNNING:
            return Begun(Status.GONE)
        record = self.records.get(executor)
        if record is None:
            return Begun(Status.GONE)
        if record.nonce != nonce:
            if record.held and not self._is_over(self.live[executor]):
                return Begun(Status.HELD)
            if record.tries >= job.new.attempts:
                self._lost("lost", executor, record)
                return Begun(Status.GONE)
            record.nonce, record.held = nonce, True
            record.generation += 1
            record.tries += 1
            record.unstarted = 0
            record.request = request_id
            record.told = digest(record.told, nonce)
            record.check = record.check or record.soft
            self.live[executor] = self.now() + self._lease(record)
            job.begins += 1
            self.begun += 1
        return Begun(
            Status.OK,
            record.generation,
            record.sequence,
            record.told,
            job.new.lease,
            record.frontier,
            record.marks,
            job.new.facts,
            record.check,
            bytes(self.taken) if record.check else b"",
            job.new.slots - len(self.live),
        )

    def _fenced(self, executor: str, generation: int, nonce: str) -> Record | None:
        record = self.records.get(executor)
        if record is None or (record.generation, record.nonce) != (generation, nonce):
            return None
        return record

    def commit(
        self, executor: str, generation: int, nonce: str, sequence: int, body: bytes
    ) -> Reply:
        record = self._fenced(executor, generation, nonce)
        if record is None:
            return Reply(Status.FENCED)
        job = self.job
        assert job is not None
        if job.state is not JobState.RUNNING:
            self._drop(executor)
            return Reply(Status.STOP)
        if sequence == record.sequence:
            assert record.reply is not None
            return record.reply
        if sequence < record.sequence:
            return Reply(Status.STALE)
        if sequence > record.sequence + 1:
            return Reply(Status.REJECTED)
        parts = wire.unpack(body)
        passed, stay, publish, results, arrivals, reads, error, probes, offers = parts[:9]
        release, told, memory = parts[9:]
        if told.decode() != record.told:
            return Reply(Status.REJECTED)
        job.commits += 1
        if error:
            self._finish_job(JobState.FAILED, error)
            self._drop(executor)
            return Reply(Status.STOP)
        hard = stay is not False
        frontier = [task for task, _ in stay] if hard else list(record.frontier)
        marks: list[tuple[int, Sequence[int]]] = list(record.marks)
        if hard:
            marks = [(t, m) for t, m in stay if m]
        deletes = self._publish(record, publish, hard=hard)
        claims = self._arrive(arrivals)
        already: list[int] = []
        for probe in probes:
            self._probe(probe, claims, marks, already)
        accepted, handed = self._offer(executor, record, sequence, offers)
        deletes += self._pass(reads)
        job.memory = max(job.memory, memory)
        job.passed += passed
        for task, value in results:
            published = self.values.get(task) if record.check else None
            self.results.setdefault(task, value if published is None else published)
        record.frontier = tuple(t for t in (*frontier, *claims) if t not in handed)
        visible = {p[0] for p in publish}
        left = [(t, tuple(i for i in m if i not in visible)) for t, m in marks]
        record.marks = tuple((t, m) for t, m in left if m)
        gone = not record.frontier
        if gone:
            self._drop(executor)
        free = job.new.slots - len(self.live)
        reply = Reply(
            Status.OK, tuple(claims), tuple(deletes), gone, accepted, tuple(already), free
        )
        if not gone:
            self._advance(executor, record, sequence, reply, hard=hard, passed=passed)
            if release:
                record.held, record.tries = False, 0
                record.generation += 1
                self.live[executor] = self.now() + job.new.grace
        if results and len(self.results) == job.new.want:
            if job.passed == job.new.tasks or self.live:
                self._finish_job(JobState.DONE, b"")
            else:
                text = f"{job.passed} of {job.new.tasks} tasks passed"
                self._finish_job(JobState.FAILED, wire.pack(["protocol", text]))
        elif gone and not self.live:
            text = "no executor is left and results are missing"
            self._finish_job(JobState.FAILED, wire.pack(["protocol", text]))
        return reply

    def _publish(
        self, record: Record, publish: Iterable[tuple[int, int, bytes, bytes]], *, hard: bool
    ) -> list[tuple[int, str]]:
        deletes = []
        for task, count, packed, value in publish:
            place = packed.decode()
            if record.check and (task in self.dead or task in self.refs):
                if place:
                    deletes.append((task, place))
            else:
                self.refs[task] = (count, place, not hard)
                self._hold(_bytes_of(place))
                self.values[task] = value
        return deletes

    def _hold(self, size: int) -> None:
        """The job keeps so many bytes more."""
        assert self.job is not None
        self.job.held += size
        self.job.peak = max(self.job.peak, self.job.held)

    def _arrive(self, arrivals: Iterable[Arrival]) -> list[int]:
        claims: list[int] = []
        for consumer, degree, brought in arrivals:
            if isinstance(brought, int):
                new = brought
            elif has_bit(self.taken, consumer):
                continue
            else:
                edges = set(brought) - self.arrived
                self.arrived |= edges
                new = len(edges)
            if new:
                self.counts[consumer] = self.counts.get(consumer, 0) + new
                if self.counts[consumer] == degree:
                    self._claim(consumer, claims)
        return claims

    def _claim(self, consumer: int, claims: list[int]) -> None:
        self.counts.pop(consumer, None)
        self._take(consumer)
        claims.append(consumer)
        self.claimed.append(consumer)

    def _take(self, task: int) -> None:
        byte = task >> 3
        self.taken.extend(bytes(max(0, byte + 1 - len(self.taken))))
        self.taken[byte] |= 0x80 >> (task & 7)

    def _probe(
        self,
        probe: tuple[int, int, list[tuple[int, int]]],
        claims: list[int],
        marks: list[tuple[int, Sequence[int]]],
        already: list[int],
    ) -> None:
        consumer, degree, pending = probe
        taken = has_bit(self.taken, consumer)
        new = [(e, p) for e, p in pending if not taken and e not in self.arrived]
        already += [e for e, p in pending if (e, p) not in new]
        if new and self.counts.get(consumer, 0) + len(new) == degree:
            self.arrived.update(e for e, _ in new)
            self._claim(consumer, claims)
            marks.append((consumer, [p for _, p in new]))

    def _offer(
        self, executor: str, record: Record, sequence: int, offers: Iterable[Sequence[int]]
    ) -> tuple[tuple[bool, ...], set[int]]:
        assert self.job is not None
        accepted: list[bool] = []
        handed: set[int] = set()
        for index, tasks in enumerate(offers):
            accepted.append(len(self.live) < self.job.new.slots)
            if accepted[-1]:
                child = child_name(executor, sequence, index)
                told = digest(record.told, f"{sequence}.{index}")
                self.records[child] = Record(tuple(tasks), record.check, told=told)
                self.live[child] = self.now() + self.job.new.grace
                self.invited += 1
                for task in tasks:
                    self._take(task)
                    handed.add(task)
        return tuple(accepted), handed

    def _pass(self, reads: Iterable[tuple[int, int]]) -> list[tuple[int, str]]:
        deletes = []
        for task, count in reads:
            if task not in self.refs:
                continue
            left, place, again = self.refs[task]
            if left > count:
                self.refs[task] = (left - count, place, again)
                continue
            del self.refs[task], self.values[task]
            self._hold(-_bytes_of(place))
            if place:
                deletes.append((task, place))
            if again:
                self.dead.add(task)
        return deletes

    def _advance(
        self,
        executor: str,
        record: Record,
        sequence: int,
        reply: Reply,
        *,
        hard: bool,
        passed: int,
    ) -> None:
        record.sequence = sequence
        record.reply, record.told = reply, told_after(record.told, reply)
        record.soft = record.check if hard else True
        if hard and passed:
            record.tries = 1
        self.live[executor] = self.now() + self._lease(record)

    def renew(self, executor: str, generation: int, nonce: str, last_words: bytes = b"") -> Status:
        record = self._fenced(executor, generation, nonce)
        if record is None:
            return Status.FENCED
        assert self.job is not None
        if self.job.state is not JobState.RUNNING or self._timed_out(self.job):
            return Status.STOP
        self.live[executor] = self.now() + self._lease(record)
        record.last_words = last_words or record.last_words
        return Status.OK

    def watch(self, owner: str = "", most: int = 1000) -> Watch:
        job = self.job
        if job is None:
            self.owned = None
            return Watch(None)
        owned = False
        if job.owner is not None and owner:
            owned = job.owner == owner or self.owned is None or self._is_over(self.owned)
            if owned:
                self._own(job, owner)
        revived: list[str] = []
        unheard = 0
        if job.state is JobState.RUNNING and not self._timed_out(job) and not self.marked:
            self._finish_job(JobState.FAILED, failure.data_lost("its mark on a server"))
        if job.state is JobState.RUNNING and not self._timed_out(job):
            silent = sorted((e, x) for x, e in self.live.items() if self._is_over(e))
            for _, executor in silent[:most]:
                record = self.records[executor]
                if not record.held:
                    record.unstarted += 1
                    unheard += 1
                if record.tries >= job.new.attempts:
                    self._lost("lost", executor, record)
                    revived, unheard = [], 0
                    break
                if record.unstarted > job.new.unstarted:
                    self._lost("unstarted", executor, record)
                    revived, unheard = [], 0
                    break
                record.held = False
                grace = job.new.grace * min(2**record.unstarted, LONGEST)
                self.live[executor] = self.now() + grace
                revived.append(executor)
        return Watch(
            job.state,
            tuple(revived),
            job.passed,
            len(self.live),
            unheard=unheard,
            owned=owned,
            pause=min(job.new.lease, job.new.grace) / 2,
        )

    def cancel(self, state: JobState, error: bytes) -> JobState | None:
        if self.job is None:
            return None
        if self.job.state is JobState.RUNNING:
            self._finish_job(state, error)
        return self.job.state

    def outcome(self) -> Outcome:
        job = self.job
        if job is None:
            return Outcome(None)
        if job.state is JobState.RUNNING:
            return Outcome(job.state)
        results = dict(self.results) if job.state is JobState.DONE else {}
        return Outcome(
            job.state,
            job.error,
            results,
            job.new.tasks,
            job.passed,
            job.commits,
            job.begins,
            job.peak,
            job.memory,
        )

    def close(self, why: str) -> bool:
        """First part of an end: the server that has the metadata."""
        if self._runs:
            return False
        if self.job is not None and why == "finish":
            self.job.manifest = None
        self.marked = False
        return True

    def sweep(self, stays: Iterable[str] = ()) -> None:
        """Second part: the one that has the data, which may be the same."""
        self.is_open = False
        for name in self.index.difference(stays):
            self.objects.pop(name, None)
        self.index.intersection_update(stays)

    def forget(self) -> bool:
        """Last part: the metadata."""
        if self._runs:
            return False
        self.job = None
        self.owned = None
        self.marked = False
        self._forget_work()
        self.results.clear()
        return True

    def retire(self) -> bool:
        """Another last part: the results stay."""
        job = self.job
        if self._runs:
            return False
        self.owned = None
        if job is None or job.owner is None:
            return True
        job.owner = None
        self.marked = False
        self._forget_work()
        if job.state is not JobState.DONE:
            self.results.clear()
        return True

    @property
    def _runs(self) -> bool:
        return self.job is not None and self.job.state is JobState.RUNNING

    def _forget_work(self) -> None:
        """All that only a running job needs."""
        for books in (
            self.live,
            self.records,
            self.counts,
            self.refs,
            self.values,
            self.arrived,
            self.taken,
            self.dead,
        ):
            books.clear()

    def lose(self, *, metadata: bool, data: bool) -> None:
        """One of two servers is restarted empty, or both are."""
        if metadata:
            self.job = None
            self.owned = None
            self.marked = False
            self._forget_work()
            self.results.clear()
        if data:
            self.objects.clear()
            self.index.clear()
            self.is_open = False

    def lapsed(self) -> bool:
        """Whether the owner's lease is over."""
        return self.owned is not None and self._is_over(self.owned)

    def notes(self, names: Iterable[str]) -> list[bytes | None]:
        """Fields of the job."""
        job = self.job
        if job is None:
            return [None for _ in names]
        fields = {
            "error": job.error,
            "facts": job.new.facts,
            "manifest": job.manifest,
            "result_ttl": b"%d" % round(job.new.result_ttl * 1000),
            "versions": job.new.versions,
        }
        return [fields[name] for name in names]

    # Objects ----------------------------------------------------------------------------------

    def put(self, objects: Mapping[str, bytes]) -> Status:
        if not self.is_open:
            return Status.CLOSED
        for name, value in objects.items():
            self.objects.setdefault(name, value)
        self.index.update(objects)
        return Status.OK

    def delete(self, outputs: Iterable[tuple[int, str]]) -> None:
        for task, place in outputs:
            for name in Place.from_token(task, place).names:
                self.objects.pop(name, None)
                self.index.discard(name)

    def get(self, names: Iterable[str]) -> list[bytes | None]:
        return [self.objects.get(name) for name in names]

    def read_values(self, tasks: Sequence[int]) -> dict[int, bytes | None]:
        """First half of a read: the metadata."""
        return {task: self.values.get(task) for task in tasks}

    def resolve(self, stored: Mapping[int, bytes | None]) -> dict[int, bytes | None]:
        """Second half of a read: what the pointers lead to."""
        frames = dict(stored)
        for task, value in stored.items():
            if value is not None and (place := place_of(task, value)) is not None:
                pieces = self.get(place.names)
                found = [piece for piece in pieces if piece is not None]
                frames[task] = b"".join(found) if len(found) == place.parts else None
        return frames

    # ------------------------------------------------------------------------------------------

    def _is_over(self, time: float) -> bool:
        # Redis has whole milliseconds.
        return round(time * 1000) <= round(self.now() * 1000)

    def _own(self, job: Job, owner: str) -> None:
        job.owner = owner
        self.owned = self.now() + OWNED * job.new.lease

    def _timed_out(self, job: Job) -> bool:
        if job.limit is None or not self._is_over(job.limit):
            return False
        assert job.new.timeout is not None
        limit = round(job.new.timeout * 1000)
        error = wire.pack(["overtime", limit, job.passed, job.new.tasks])
        self._finish_job(JobState.FAILED, error)
        return True

    def _lease(self, record: Record) -> float:
        assert self.job is not None
        return float(self.job.new.lease * min(2 ** max(0, record.tries - 1), LONGEST))

    def _drop(self, executor: str) -> None:
        self.records.pop(executor, None)
        self.live.pop(executor, None)

    def _lost(self, kind: str, executor: str, record: Record) -> None:
        frontier = wire.pack(list(record.frontier))
        told = (frontier, record.request, record.last_words)
        error = wire.pack([kind, executor, record.tries, *told])
        self._finish_job(JobState.FAILED, error)

    def _finish_job(self, state: JobState, error: bytes) -> None:
        assert self.job is not None
        self.job.state = state
        self.job.error = self.failed = error
        self.announce()


def _bytes_of(place: str) -> int:
    """What a place begins with."""
    return int(place.partition(":")[0]) if place else 0
