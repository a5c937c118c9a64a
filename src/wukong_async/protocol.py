"""The vocabulary of the commit protocol: small value objects, no behaviour.

Tasks are numbers in a plan (`0 … N-1`, dependencies before dependents). An *edge* is a
distinct (consumer, producer) pair: a task that uses one input twice has one edge to it.
In-degrees, out-degrees and reads all count edges. docs/protocol.md has the rules.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, TypeAlias

AHEAD_MOST = 4
"""Blocks of the plan that whoever is given work reads while it takes its record."""


class TaskSpec(NamedTuple):
    """What an executor must know of a task to schedule it."""

    number: int
    inputs: tuple[int, ...]
    """Distinct producers."""
    consumers: tuple[int, ...]
    """Distinct consumers, in plan order."""
    degrees: tuple[int, ...]
    """The in-degree of each consumer."""
    requested: bool
    """Whether the task's value is a result of the job."""
    literals: tuple[int, ...] = ()
    """Values of the plan that the task reads. Objects of the store with negative numbers, there
    before the job begins; no edges lead from them."""
    first_edge: int = 0
    """The number of the edge to the first consumer; those to the others follow."""
    limited: bool = False
    """Whether its time is limited: it is run by itself, so that it is known when it began."""
    name: str = ""
    """What the key begins with, shared by tasks that do the same."""


class Status(StrEnum):
    """What the store says to an executor."""

    OK = "OK"
    GONE = "GONE"
    """begin: no such record, or the job does not run. The invocation has nothing to do."""
    HELD = "HELD"
    """begin: another incarnation holds the record on a live lease."""
    FENCED = "FENCED"
    """commit, renew: this incarnation was given up for dead; what it says has no effect."""
    STOP = "STOP"
    """commit, renew: the job is over; stop at once."""
    STALE = "STALE"
    """commit: older than the last one that took effect."""
    REJECTED = "REJECTED"
    """commit: a sequence number was skipped, which is a bug of ours."""
    CLOSED = "CLOSED"
    """put: the job's objects are gone already, so nothing was written."""


class JobState(StrEnum):
    """The life of a job. It leaves `RUNNING` once and never comes back."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


Marks: TypeAlias = tuple[tuple[int, tuple[int, ...]], ...]
"""(task of a frontier, those of its inputs that are in no store): such a task was claimed while
they were in the memory of an executor, and whoever succeeds that has to make them again."""


@dataclass(frozen=True, slots=True)
class Begun:
    """The answer to begin. Only `status` means anything unless it is OK."""

    status: Status
    generation: int = 0
    sequence: int = 0
    told: str = ""
    """A digest of what the record comes from, and of what it was told since; see `told_after`."""
    lease: float = 0.0
    """Seconds that an executor may be silent."""
    frontier: tuple[int, ...] = ()
    marks: Marks = ()
    facts: bytes = b""
    """What `create` was given for the executors, opaque to the store."""
    check: bool = False
    """Whether somebody may have done some of this work before, with effects that are to be seen."""
    taken: bytes = b""
    """With `check`: a bit for each task, the first one in the highest bit, that is set if the task
    is or was in somebody's frontier."""
    free: int = 0
    """Concurrency slots that are not in use."""


@dataclass(frozen=True, slots=True)
class Commit:
    """One atomic step of an executor.

    A *hard* commit passes everything done since the last one, for good. A *soft* one (`stay` is
    None) passes nothing: it tells others what they need, and offers them work.
    """

    passed: int = 0
    """How many tasks pass."""
    stay: Marks | None = None
    """What is left of the frontier, next to what is claimed."""
    publish: tuple[tuple[int, int], ...] = ()
    """(task, readers): outputs that become visible, with the reads still to come."""
    held: frozenset[int] = frozenset()
    """Those of them that are results of the job, and are announced when they pass."""
    results: tuple[int, ...] = ()
    """Requested tasks whose value is announced."""
    arrivals: tuple[tuple[int, int, int | tuple[int, ...]], ...] = ()
    """(consumer, in-degree, what this commit brings): how many inputs, where it is certain that
    nobody has brought them before; else the edges to them."""
    probes: tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...] = ()
    """(consumer, in-degree, ((edge, producer), ...)): if these inputs are the last ones that are
    missing, the consumer is claimed and they need not be stored; else nothing changes."""
    offers: tuple[tuple[int, ...], ...] = ()
    """Tasks for new executors, one each as long as there are free slots."""
    reads: tuple[tuple[int, int], ...] = ()
    """(object, reads): published objects that passed tasks have read."""
    release: bool = False
    """The executor gives its record back, for another incarnation to go on."""
    failed: bool = False
    """The job fails with this commit; nothing else in it takes effect."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a commit."""

    status: Status
    claims: tuple[int, ...] = ()
    """Fan-ins that this commit completed: they join the frontier."""
    deletes: tuple[tuple[int, str], ...] = ()
    """(object, place) that nobody will read any more and that live outside the metadata."""
    gone: bool = False
    """The frontier is empty and the record deleted: the executor exits."""
    accepted: tuple[bool, ...] = ()
    """Which offers have become executors."""
    already: tuple[int, ...] = ()
    """Edges of probes that somebody has brought before."""
    free: int = 0
    """Concurrency slots that are not in use."""


def digest(*parts: str) -> str:
    """As the scripts make them."""
    return hashlib.sha1("|".join(parts).encode(), usedforsecurity=False).hexdigest()


def told_after(told: str, reply: Reply) -> str:
    """A digest of what an executor has been told, before and by this reply.

    It goes with the next commit. A server that failed over may have forgotten this answer, and
    given another one to a late copy of the same commit; or it may have heard of an incarnation by a
    late copy of its begin only, which has taken a record that has come about otherwise meanwhile.
    """
    if not (reply.claims or reply.accepted or reply.already):
        return told
    claims, already = (",".join(map(str, numbers)) for numbers in (reply.claims, reply.already))
    return digest(told, claims, "".join("01"[yes] for yes in reply.accepted), already)


def child_name(executor: str, sequence: int, index: int) -> str:
    """The executor that comes of offer `index` (from 0) in a commit."""
    return f"{executor}.{sequence}.{index}"


def has_bit(bits: bytes | bytearray, number: int) -> bool:
    """Whether a bit is set, as Redis numbers them."""
    byte = number >> 3
    return byte < len(bits) and bool(bits[byte] & (0x80 >> (number & 7)))


@dataclass(frozen=True, slots=True)
class Watch:
    """The answer to a watcher's look at a job."""

    state: JobState | None
    """None: the store knows of no such job."""
    revived: tuple[str, ...] = ()
    """Executors whose lease was over and who have to be invoked again."""
    passed: int = 0
    live: int = 0
    extended: float = 0.0
    """Seconds that the job's deadline was moved to, so the data shards' must be as well; or 0."""
    unheard: int = 0
    """How many of the revived have not begun since they were invoked last."""
    owned: bool = False
    """Whether the watcher owns the job now, and so has to clean up."""
    pause: float = 0.0
    """Seconds until a watcher should look again."""


@dataclass(frozen=True, slots=True)
class Payload:
    """A serialised value on its way into a commit.

    Either the value itself, or a pointer to its parts on the data shards.
    """

    inline: bytes
    """The value, or the pointer."""
    place: str = ""
    """For a pointer, what it takes to delete the parts."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended, as the store remembers it."""

    state: JobState | None
    error: bytes = b""
    results: dict[int, bytes] = field(default_factory=dict)
    """Task → inline value or pointer."""
    tasks: int = 0
    passed: int = 0
    commits: int = 0
    begins: int = 0
    peak: int = 0
    """Bytes of values outside of the metadata, at the most."""
    memory: int = 0
    """MB of memory that any of its executors has had, at the most."""
