"""The store as a model: what the Lua scripts do, in Python, on an explicit clock.

Same methods, arguments and answers as `wukong_async.store.JobStore`, but synchronous. Whatever
differs between the two is a bug in one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from wukong_async import wire
from wukong_async.protocol import Begun, JobState, Outcome, Reply, Status, Watch
from wukong_async.store import NewJob, Place, place_of

LONGEST = 8
OWNED = 2


@dataclass
class Record:
    frontier: tuple[int, ...]
    generation: int = 0
    nonce: str = ""
    sequence: int = 0
    unstarted: int = 0
    reply: Reply | None = None


@dataclass
class Job:
    new: NewJob
    state: JobState = JobState.RUNNING
    error: bytes = b""
    passed: int = 0
    commits: int = 0
    begins: int = 0
    limit: float | None = None
    owner: str | None = None


@dataclass
class ModelStore:
    """One job's metadata, and one data shard."""

    now: Callable[[], float]
    announce: Callable[[], None] = lambda: None
    job: Job | None = None
    live: dict[str, float] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    refs: dict[int, tuple[int, str]] = field(default_factory=dict)
    values: dict[int, bytes] = field(default_factory=dict)
    results: dict[int, bytes] = field(default_factory=dict)
    owned: float | None = None
    is_open: bool = False
    objects: dict[str, bytes] = field(default_factory=dict)
    index: set[str] = field(default_factory=set)

    # What the invariants are checked on.
    claimed: list[int] = field(default_factory=list)

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
            or self.objects
            or self.index
        )

    # Metadata ---------------------------------------------------------------------------------

    def open(self) -> None:
        self.is_open = True

    def create(self, new: NewJob) -> Status:
        if not self.is_open:
            return Status.GONE
        if self.job is not None:
            return Status.OK
        self.job = Job(new)
        if new.timeout is not None:
            self.job.limit = self.now() + new.timeout
        self._own(self.job, new.owner)
        for executor, frontier in new.records:
            self.records[executor] = Record(tuple(frontier))
            self.live[executor] = self.now() + new.grace
        self.values.update(new.values)
        if new.tasks == 0:
            self._finish_job(JobState.DONE, b"")
        return Status.OK

    def begin(self, executor: str, nonce: str) -> Begun:
        job = self.job
        if job is None or job.state is not JobState.RUNNING:
            return Begun(Status.GONE)
        record = self.records.get(executor)
        if record is None:
            return Begun(Status.GONE)
        if record.nonce != nonce:
            if record.nonce and not self._is_over(self.live[executor]):
                return Begun(Status.HELD)
            if record.generation >= job.new.attempts:
                self._lost("lost", executor, record)
                return Begun(Status.GONE)
            record.nonce = nonce
            record.generation += 1
            record.unstarted = 0
            self.live[executor] = self.now() + self._lease(record)
            job.begins += 1
        return Begun(
            Status.OK,
            record.generation,
            record.sequence,
            self._lease(record),
            record.frontier,
            job.new.facts,
        )

    def commit(self, executor: str, generation: int, sequence: int, body: bytes) -> Reply:
        record = self.records.get(executor)
        if record is None or record.generation != generation:
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
        passed, publish, results, arrivals, reads, error = wire.unpack(body)
        job.commits += 1
        if error:
            self._finish_job(JobState.FAILED, error)
            self._drop(executor)
            return Reply(Status.STOP)
        for task, count, place, value in publish:
            self.refs[task] = (count, place.decode())
            self.values[task] = value
        claims = self._arrive(arrivals)
        deletes = self._pass(reads)
        job.passed += passed
        for task, value in results:
            self.results.setdefault(task, value)
        reply = self._advance(executor, record, sequence, claims, deletes)
        if results and len(self.results) == job.new.want:
            if job.passed == job.new.tasks:
                self._finish_job(JobState.DONE, b"")
            else:
                text = f"{job.passed} of {job.new.tasks} tasks passed"
                self._finish_job(JobState.FAILED, wire.pack(["protocol", text]))
        elif reply.gone and not self.live:
            text = "no executor is left and results are missing"
            self._finish_job(JobState.FAILED, wire.pack(["protocol", text]))
        return reply

    def _arrive(self, arrivals: Iterable[tuple[int, int, int]]) -> tuple[int, ...]:
        claims = []
        for consumer, degree, count in arrivals:
            self.counts[consumer] = self.counts.get(consumer, 0) + count
            if self.counts[consumer] == degree:
                del self.counts[consumer]
                claims.append(consumer)
                self.claimed.append(consumer)
        return tuple(claims)

    def _pass(self, reads: Iterable[tuple[int, int]]) -> tuple[tuple[int, str], ...]:
        deletes = []
        for task, count in reads:
            if task not in self.refs:
                continue
            left, place = self.refs[task]
            if left > count:
                self.refs[task] = (left - count, place)
                continue
            del self.refs[task], self.values[task]
            if place:
                deletes.append((task, place))
        return tuple(deletes)

    def _advance(
        self,
        executor: str,
        record: Record,
        sequence: int,
        claims: tuple[int, ...],
        deletes: tuple[tuple[int, str], ...],
    ) -> Reply:
        """The claims become the frontier."""
        reply = Reply(Status.OK, claims, deletes, gone=not claims)
        if reply.gone:
            self._drop(executor)
        else:
            record.sequence = sequence
            record.frontier = claims
            record.reply = reply
            self.live[executor] = self.now() + self._lease(record)
        return reply

    def renew(self, executor: str, generation: int) -> Status:
        record = self.records.get(executor)
        if record is None or record.generation != generation:
            return Status.FENCED
        assert self.job is not None
        if self.job.state is not JobState.RUNNING or self._timed_out(self.job):
            return Status.STOP
        self.live[executor] = self.now() + self._lease(record)
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
        if job.state is JobState.RUNNING and not self._timed_out(job):
            silent = sorted((e, x) for x, e in self.live.items() if self._is_over(e))
            for _, executor in silent[:most]:
                record = self.records[executor]
                if not record.nonce:
                    record.unstarted += 1
                    unheard += 1
                if record.generation >= job.new.attempts:
                    self._lost("lost", executor, record)
                    revived, unheard = [], 0
                    break
                if record.unstarted > job.new.unstarted:
                    self._lost("unstarted", executor, record)
                    revived, unheard = [], 0
                    break
                record.nonce = ""
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
            job.state, job.error, results, job.new.tasks, job.passed, job.commits, job.begins
        )

    def close(self) -> None:
        """First half of finish: the data shard."""
        self.is_open = False
        for name in self.index:
            self.objects.pop(name, None)
        self.index.clear()

    def forget(self) -> None:
        """Second half of finish: the metadata."""
        if self.job is not None and self.job.state is JobState.RUNNING:
            return
        self.job = None
        self.owned = None
        self.is_open = False
        for books in (
            self.live,
            self.records,
            self.counts,
            self.refs,
            self.values,
            self.results,
        ):
            books.clear()

    def retire(self) -> bool:
        """Both halves at once."""
        job = self.job
        if job is not None and job.state is JobState.RUNNING:
            return False
        done = job is not None and job.state is JobState.DONE
        places = [place_of(n, value) for n, value in self.results.items()] if done else []
        stay = {name for place in places if place for name in place.names}
        self.is_open = False
        for name in self.index - stay:
            self.objects.pop(name, None)
        self.index &= stay
        self.owned = None
        if job is None or job.owner is None:
            return True
        job.owner = None
        for books in (self.live, self.records, self.counts, self.refs, self.values):
            books.clear()
        if not done:
            self.results.clear()
        return True

    def lapsed(self) -> bool:
        """Whether the owner's lease is over."""
        return self.owned is not None and self._is_over(self.owned)

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

    def read_values(self, tasks: Sequence[int]) -> dict[int, bytes | None]:
        """First half of a read: the metadata."""
        return {task: self.values.get(task) for task in tasks}

    def resolve(self, stored: Mapping[int, bytes | None]) -> dict[int, bytes | None]:
        """Second half of a read: what the pointers lead to."""
        frames = dict(stored)
        for task, value in stored.items():
            if value is not None and (place := place_of(task, value)) is not None:
                pieces = [self.objects.get(name) for name in place.names]
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
        error = wire.pack(["timeout", limit, job.passed, job.new.tasks])
        self._finish_job(JobState.FAILED, error)
        return True

    def _lease(self, record: Record) -> float:
        assert self.job is not None
        return float(self.job.new.lease * min(2 ** (record.generation - 1), LONGEST))

    def _drop(self, executor: str) -> None:
        self.records.pop(executor, None)
        self.live.pop(executor, None)

    def _lost(self, kind: str, executor: str, record: Record) -> None:
        frontier = wire.pack(list(record.frontier))
        error = wire.pack([kind, executor, record.generation, frontier])
        self._finish_job(JobState.FAILED, error)

    def _finish_job(self, state: JobState, error: bytes) -> None:
        assert self.job is not None
        self.job.state = state
        self.job.error = error
        self.announce()
