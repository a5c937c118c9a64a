"""The vocabulary of the commit protocol: small value objects, no behaviour.

Tasks are numbers in a plan (`0 … N-1`, dependencies before dependents). An *edge* is a
distinct (consumer, producer) pair: a task that uses one input twice has one edge to it.
In-degrees, out-degrees and reads all count edges. docs/design.md has the rules.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple


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


@dataclass(frozen=True, slots=True)
class Begun:
    """The answer to begin. Only `status` means anything unless it is OK."""

    status: Status
    generation: int = 0
    sequence: int = 0
    lease: float = 0.0
    """Seconds."""
    frontier: tuple[int, ...] = ()
    facts: bytes = b""
    """What `create` was given for the executors, opaque to the store."""


@dataclass(frozen=True, slots=True)
class Commit:
    """One atomic step of an executor: everything done since the last one passes for good."""

    passed: int = 0
    """How many tasks pass."""
    publish: tuple[tuple[int, int], ...] = ()
    """(task, readers): outputs that become visible, with the reads still to come."""
    results: tuple[int, ...] = ()
    """Requested tasks whose value is announced."""
    arrivals: tuple[tuple[int, int, int], ...] = ()
    """(consumer, in-degree, inputs that this commit brings)."""
    reads: tuple[tuple[int, int], ...] = ()
    """(object, reads): published objects that passed tasks have read."""
    failed: bool = False
    """The job fails with this commit; nothing else in it takes effect."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a commit."""

    status: Status
    claims: tuple[int, ...] = ()
    """Fan-ins that this commit completed: the new frontier."""
    deletes: tuple[tuple[int, str], ...] = ()
    """(object, place) that have had their last reader and live outside the metadata."""
    gone: bool = False
    """The frontier is empty and the record deleted: the executor exits."""


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
