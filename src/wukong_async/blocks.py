"""Blocks: the numbered tasks of a plan, serialised once each, as executors read them.

A block is a frame of wire.py with one entry for each of its tasks, pickled one by one::

    (node, names, sources, constants, consumers, degrees, requested, limits)

`node` is a callable over `{name: value}`; `names[i]` is provided by object `sources[i]`: a task's
output (≥ 0) or a large literal (< 0). `constants` are small literals, by name, or None. `limits`
are None for most tasks.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple, Self, TypeAlias, cast

from wukong_async import wire
from wukong_async.collector import collector_paused
from wukong_async.compression import NONE
from wukong_async.protocol import AHEAD_MOST, TaskSpec

Node: TypeAlias = Callable[[dict[Hashable, Any]], Any]
Entry: TypeAlias = tuple[
    Node,
    tuple[Hashable, ...],
    tuple[int, ...],
    dict[Hashable, Any] | None,
    tuple[int, ...],
    tuple[int, ...],
    bool,
    tuple[int, float | None] | None,
]


class Limits(NamedTuple):
    """How often and how long a task is tried."""

    retries: int = 0
    """Tries after the first one."""
    timeout: float | None = None
    """Seconds for each try."""


@dataclass(frozen=True, slots=True)
class PlanFacts:
    """What an executor must know of the plan before it can read any of it."""

    starts: Sequence[int]
    """The first task of each block."""
    edges: Sequence[int]
    """The first edge of each block; edges are numbered by their producers."""
    inline_limit: int
    """Outputs of at most this many bytes travel inside commits."""
    part_size: int
    ttl: float
    """Seconds that an object may live without being extended."""
    tasks: int = 0
    """How many there are."""
    slots: int = 1
    """Executors that may be there at the same time."""
    hold: float | None = None
    """What `wukong.hold` says."""
    seen: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """What is remembered of tasks by name, and of the place: see `policy.remembered`."""
    compression: str = NONE
    """A mode of `compression`."""
    bucket: str = ""
    """The URL of the bucket that takes values above a limit, if there is one."""
    bucket_limit: int = 0
    secret: bytes = b""
    """Proves that what came along with an event is the job's: see `invocation.mac_of`."""
    threads: int | None = None
    """Tasks that an executor runs at once; None: what its function is set up for."""

    def pack(self) -> bytes:
        """As `create` takes them."""
        return wire.pack(
            [
                list(self.starts),
                list(self.edges),
                self.inline_limit,
                self.part_size,
                self.ttl,
                self.tasks,
                self.slots,
                self.hold,
                dict(self.seen),
                self.compression,
                self.bucket,
                self.bucket_limit,
                self.secret,
                self.threads,
            ]
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The inverse of `pack`."""
        facts = cls(*wire.unpack(data))
        figures = cast("Mapping[bytes, Sequence[float]]", facts.seen)
        return replace(
            facts,
            seen={name.decode(): each for name, each in figures.items()},
            compression=cast("bytes", facts.compression).decode(),
            bucket=cast("bytes", facts.bucket).decode(),
        )


NO_LIMITS = Limits()


class Program(NamedTuple):
    """How to run a task."""

    node: Node
    names: tuple[Hashable, ...]
    sources: tuple[int, ...]
    constants: dict[Hashable, Any] | None
    limits: Limits = NO_LIMITS

    def run(self, values: dict[int, Any]) -> Any:
        """The task's output, given all of its sources."""
        data = {name: values[s] for name, s in zip(self.names, self.sources, strict=True)}
        if self.constants:
            data.update(self.constants)
        return self.node(data)


@dataclass(frozen=True, slots=True)
class Block:
    """A decoded block."""

    specs: list[TaskSpec]
    programs: dict[int, Program]


class Unreadable(Exception):
    """A task of a block, or a value, cannot be unpickled here; `__cause__` says why."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def encode(entries: Sequence[Entry], most: int) -> tuple[int, wire.Segments]:
    """A block of the first tasks, of about `most` bytes: how many they are, and its frame.

    What tasks share is pickled once for a block; tasks that share most of what they weigh stay
    together.

    Raises
    ------
    wukong_async.wire.ItemError
        For the task that does not pickle.
    """
    return wire.dumps_some(entries, most)


def decode(frame: wire.Buffer, first: int, edge: int) -> Block:
    """The tasks of a block whose first one has number `first`, and its first edge `edge`.

    Raises
    ------
    Unreadable
    """
    specs: list[TaskSpec] = []
    programs: dict[int, Program] = {}
    with collector_paused():
        try:
            for number, entry in enumerate(wire.loads_some(frame), first):
                node, names, sources, constants, consumers, degrees, requested, limits = entry
                inputs = sources
                literals: tuple[int, ...] = ()
                if sources and min(sources) < 0:
                    inputs = tuple([s for s in sources if s >= 0])
                    literals = tuple({s: None for s in sources if s < 0})
                if len(inputs) > 1:
                    inputs = tuple(dict.fromkeys(inputs))
                limits = NO_LIMITS if limits is None else Limits(*limits)
                limited = limits.timeout is not None
                name = name_of(getattr(node, "key", None))
                specs.append(
                    TaskSpec(
                        number, inputs, consumers, degrees, requested, literals, edge, limited, name
                    )
                )
                edge += len(consumers)
                programs[number] = Program(node, names, sources, constants, limits)
        except Exception as error:  # A task that does not come back, or a damaged frame.
            cause = error.__cause__ if isinstance(error, wire.ItemError) else error
            raise Unreadable(first + len(specs)) from cause
    return Block(specs, programs)


TOKEN = re.compile(r"(-[0-9a-f]{8,}|-[0-9]+)+(-.*)?$")
"""What Dask puts behind the name: a hash, a UUID, or a number."""


def name_of(key: Hashable) -> str:
    """What tasks that do the same are called: Dask's key without what tells them apart."""
    head = key[0] if type(key) is tuple and key else key
    if type(head) is str:
        if len(head) > 37 and head[-37] == "-":  # A UUID, as `delayed` makes them: each is new.
            return sys.intern(head[:-37])
        return _name_of(head)
    return "" if head is None else type(head).__name__


@lru_cache(10_000)
def _name_of(head: str) -> str:
    return sys.intern(TOKEN.sub("", head))


def first_blocks(starts: Sequence[int], tasks: Iterable[int]) -> tuple[int, ...]:
    """Blocks that tasks are in, in order; the first ones, if they are in many."""
    return tuple(dict.fromkeys(block_of(starts, task) for task in tasks))[:AHEAD_MOST]


def block_of(starts: Sequence[int], task: int) -> int:
    """The index of the block that holds a task, given the first task of each."""
    return bisect_right(starts, task) - 1
