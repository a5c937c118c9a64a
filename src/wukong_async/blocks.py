"""Blocks: the numbered tasks of a plan, serialised once each, as executors read them.

A block is a frame of wire.py with one entry for each of its tasks, pickled one by one::

    (node, names, sources, constants, consumers, degrees, requested, limits)

`node` is a callable over `{name: value}`; `names[i]` is provided by object `sources[i]`: a task's
output (≥ 0) or a large literal (< 0). `constants` are small literals, by name, or None. `limits`
are None for most tasks.

Where all tasks are mere calls (`Call` instead of a node), a block is a list of columns, `Calls`,
pickled in one go, and the functions that they call, pickled one by one. Nothing in a column is of a
type that could fail to come back. Such tasks take two thirds of the bytes that Dask's nodes take,
and a quarter of the time to write and to read them.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple, Self, TypeAlias, cast

from wukong_async import wire
from wukong_async.collector import collector_paused
from wukong_async.compression import NONE
from wukong_async.protocol import AHEAD_MOST, TaskSpec

Node: TypeAlias = Callable[[dict[Hashable, Any]], Any]


class Call(NamedTuple):
    """A task that calls a function with inputs and small constants, and nothing else."""

    key: Hashable
    """Of strings and integers."""
    name: str
    function: Callable[..., Any]
    takes: str
    """What it takes, in order: an "S" for a source, a "C" for a constant; or just "L", which is a
    list of all sources."""
    constants: tuple[Any, ...]


Entry: TypeAlias = tuple[
    Node | Call,
    tuple[Hashable, ...],
    tuple[int, ...],
    dict[Hashable, Any] | None,
    tuple[int, ...],
    tuple[int, ...],
    bool,
    tuple[int, float | None] | None,
]


@dataclass(frozen=True, slots=True)
class Calls:
    """Tasks that are mere calls, by columns: an item for each of them, if nothing else is said."""

    keys: Sequence[Hashable]
    names: Sequence[str]
    calls: Sequence[tuple[Callable[..., Any], str, tuple[Any, ...], tuple[int, ...]]]
    """The function, what it takes and its constants as in `Call`, and its sources."""
    inputs: Sequence[int]
    """How many distinct tasks are among those of each."""
    counts: Sequence[int]
    """How many consumers each has."""
    consumers: Sequence[int]
    """Of all of them, one after the other;"""
    degrees: Sequence[int]
    """and the in-degree of each consumer."""
    requested: Sequence[int]
    """Those whose values are results, by their places here."""
    limits: Mapping[int, tuple[int, float | None]]
    """Of those that have any, by their places here."""


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

    @property
    def key(self) -> Hashable:
        """What Dask calls the task; None if the node does not know."""
        return getattr(self.node, "key", None)

    def run(self, values: Mapping[int, Any]) -> Any:
        """The task's output, given all of its sources."""
        data = {name: values[s] for name, s in zip(self.names, self.sources, strict=True)}
        if self.constants:
            data.update(self.constants)
        return self.node(data)


class CallProgram(NamedTuple):
    """How to run a task that is a mere call. `Program` without a node."""

    key: Hashable
    function: Callable[..., Any]
    takes: str
    sources: tuple[int, ...]
    constants: tuple[Any, ...]
    limits: Limits = NO_LIMITS

    def run(self, values: Mapping[int, Any]) -> Any:
        """The task's output, given all of its sources."""
        _, function, takes, sources, constants, _ = self
        if not constants:
            found = [values[s] for s in sources]
            return function(found) if takes == "L" else function(*found)
        if not sources:
            return function(*constants)
        inputs, others = iter(sources), iter(constants)
        return function(*[values[next(inputs)] if t == "S" else next(others) for t in takes])


Recipe: TypeAlias = Program | CallProgram


@dataclass(frozen=True, slots=True)
class Block:
    """A decoded block."""

    specs: list[TaskSpec]
    programs: dict[int, Recipe]


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


def encode_calls(tasks: Calls) -> wire.Segments:
    """A block of these tasks.

    Raises
    ------
    wukong_async.wire.ItemError
        For the first task whose function does not pickle.
    """
    functions, takes, constants, sources = zip(*tasks.calls, strict=True)
    ids = list(map(id, functions))
    numbers = {each: number for number, each in enumerate(dict.fromkeys(ids))}
    first_users = list(map(ids.index, numbers))
    # Then the sources are the inputs, as they are.
    plain = list(map(len, sources)) == tasks.inputs
    columns = [
        *(tasks.keys, tasks.names, [numbers[each] for each in ids], takes, constants, sources),
        *(plain, tasks.counts, tasks.consumers, tasks.degrees, tasks.requested, tasks.limits),
    ]
    try:
        return wire.dumps_all([columns, *(functions[user] for user in first_users)])
    except wire.ItemError as error:
        raise wire.ItemError(first_users[max(error.index - 1, 0)], str(error)) from error.__cause__


def inputs_of(sources: tuple[int, ...]) -> tuple[int, ...]:
    """The distinct tasks among sources; the same tuple if that is what they are."""
    if not sources or (len(sources) == 1 and sources[0] >= 0):
        return sources
    inputs = tuple(dict.fromkeys([s for s in sources if s >= 0]))
    return sources if inputs == sources else inputs


def decode(frame: wire.Buffer, first: int, edge: int) -> Block:
    """The tasks of a block whose first one has number `first`, and its first edge `edge`.

    Raises
    ------
    Unreadable
    """
    block = Block([], {})
    with collector_paused():
        try:
            values = wire.loads_some(frame)
            for number, entry in enumerate(values, first):
                if type(entry) is list:
                    _decode_calls(block, entry, values, first, edge)
                    return block
                edge = _decode_entry(block, entry, number, edge)
        except Exception as error:  # A task that does not come back, or a damaged frame.
            cause = error.__cause__ if isinstance(error, wire.ItemError) else error
            raise Unreadable(first + len(block.specs)) from cause
    return block


def _decode_entry(block: Block, entry: Entry, number: int, edge: int) -> int:
    """Add a task; the first edge of the next one."""
    node, names, sources, constants, consumers, degrees, requested, limits = entry
    inputs = inputs_of(sources)
    tries = NO_LIMITS if limits is None else Limits(*limits)
    limited = tries.timeout is not None
    key = getattr(node, "key", None)
    block.specs.append(
        TaskSpec(
            *(number, inputs, consumers, degrees, requested, _literals(sources, inputs)),
            *(edge, limited, name_of(key)),
        )
    )
    if isinstance(node, Call):
        _, _, function, takes, small = node
        block.programs[number] = CallProgram(key, function, takes, sources, small, tries)
    else:
        block.programs[number] = Program(node, names, sources, constants, tries)
    return edge + len(consumers)


def _decode_calls(
    block: Block, columns: Sequence[Any], functions: Iterator[Any], first: int, edge: int
) -> None:
    """Add tasks that are calls.

    Raises
    ------
    wukong_async.wire.ItemError
        For a function that does not come back: `block` has all tasks before the first that needs
        it.
    """
    specs, programs = block.specs, block.programs
    *told, plain, counts, consumers, degrees, requested, limits = columns
    wanted = frozenset(requested)
    known: list[Any] = []
    at = 0
    tasks = zip(range(first, first + len(counts)), *told, counts, strict=True)
    for number, key, name, function, takes, constants, sources, count in tasks:
        if function == len(known):  # They come in the order in which they are needed.
            known.append(next(functions))
        if count == 1:
            mine, their = (consumers[at],), (degrees[at],)
        else:
            mine, their = tuple(consumers[at : at + count]), tuple(degrees[at : at + count])
        inputs = sources if plain else inputs_of(sources)
        literals = () if plain else _literals(sources, inputs)
        tries = NO_LIMITS
        if limits and number - first in limits:
            tries = Limits(*limits[number - first])
        result = number - first in wanted
        limited = tries.timeout is not None
        spec = (number, inputs, mine, their, result, literals, edge + at, limited, name)
        specs.append(tuple.__new__(TaskSpec, spec))
        call = (key, known[function], takes, sources, constants, tries)
        programs[number] = tuple.__new__(CallProgram, call)
        at += count


def _literals(sources: tuple[int, ...], inputs: tuple[int, ...]) -> tuple[int, ...]:
    if inputs is sources:
        return ()
    return tuple(dict.fromkeys([s for s in sources if s < 0]))


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
