"""What an executor holds in memory: decoded plan blocks, literals, and the values of tasks."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import islice, repeat
from typing import Any

from dask.sizeof import sizeof

from wukong_async.blocks import Block, Recipe

MB = 1024 * 1024
LITERAL_BYTES = 64 * MB
"""Literals kept for the next task that reads them: models and tables are read by many."""
PLAIN = frozenset((int, float, complex, bool, str, bytes, type(None)))
"""Types of values that are not worth a look."""
SMALL = frozenset((int, float, complex, bool, type(None)))
SMALL_SIZE = 32
"""Bytes that a value of these types is reckoned with."""
CONTAINERS: Collection[tuple[type, Callable[[Any], Iterable[Any]]]] = (
    (list, list.__iter__),
    (tuple, tuple.__iter__),
    (dict, dict.values),
    (set, set.__iter__),
    (frozenset, frozenset.__iter__),
    (deque, deque.__iter__),
)
"""Python's containers, and how to go through them whatever their subclasses say."""
GLANCE = 16
"""Items at each depth that a glance takes in."""
GLANCE_DEPTH = 4
"""A list of pairs of a key and a list of iterators has three."""
MEASURED_EVERY = 0.02
"""Seconds between two looks at the process's memory; a look takes 15 µs."""
SOON_MUCH = 0.02
"""The share of the function's memory that calls for a look at once."""
SCARCE = 0.6
"""The share of the function's memory from which on values are written and forgotten; the rest is
for what tasks need while they run."""
MOST_ORIGINS = 16
"""Values that are kept for the sake of one iterator."""


def resident_mb() -> int:
    """Memory that this process has now; where that is not known, the most that it has had."""
    try:
        pages = int(os.pread(_statm(os.getpid()), 128, 0).split()[1])
    except (OSError, ValueError, IndexError):  # A task may have closed it.
        _statm.cache_clear()
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most // (MB if sys.platform == "darwin" else 1024)
    return pages * resource.getpagesize() // MB


@lru_cache(1)
def _statm(pid: int) -> int:
    """The file in which Linux says how many pages a process has: to open it is most of a look.

    A task may have forked, and its child look for itself.
    """
    return os.open(f"/proc/{pid}/statm", os.O_RDONLY)


def limit_mb() -> int:
    """Memory that the function may have; 0 if that is not known."""
    return int(os.environ.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "0"))


class Memory:
    """What this process has, measured now and then."""

    def __init__(self) -> None:
        self.limit = limit_mb()
        self.peak = 0
        """MB at the most, as far as it was measured."""
        self._measured = 0.0

    def is_scarce(self, grown: float) -> bool:
        """Whether it is high time to forget what can be had again.

        Parameters
        ----------
        grown
            Bytes that values have grown by since the last question, about.
        """
        now = time.monotonic()
        if now - self._measured < MEASURED_EVERY and grown < SOON_MUCH * self.limit * MB:
            return False
        self._measured = now
        resident = resident_mb()
        self.peak = max(self.peak, resident)
        if not 0 < SCARCE * self.limit < resident:
            return False
        _give_back()  # What was freed may still be in the heap.
        return resident_mb() > SCARCE * self.limit


def _give_back() -> None:
    """Have the C library return free memory to the system: glibc keeps it for long."""
    with suppress(Exception):
        ctypes.CDLL(None).malloc_trim(0)


def size_of(value: object) -> int:
    """About how many bytes a value has; 0 if it does not say."""
    kind = type(value)
    if kind in SMALL:
        return SMALL_SIZE
    with suppress(Exception):  # What a user's type says of itself.
        size = value.nbytes if hasattr(value, "nbytes") else sizeof(value)
        return int(size)
    return 0


def goes_once(value: object, most: int | None = None) -> bool:
    """Whether a value is, or holds, something that can be gone through only once, as a file can.

    Runs no code of the user's.

    Parameters
    ----------
    most
        How many items of containers to look at, at each of some depths; default: all.
    """
    kind = type(value)
    if kind in PLAIN:
        return False
    if issubclass(kind, Iterator):
        return True
    level: Sequence[object] = (value,)
    seen: set[int] = set()  # One may hold itself.
    depth = 0
    while level and (most is None or depth < GLANCE_DEPTH):
        inside: list[object] = []
        room = most
        for each in level:
            items = _items_of(type(each))
            if items is None or id(each) in seen:
                continue
            seen.add(id(each))
            some = list(islice(items(each), room))  # At once: other threads may change it.
            kinds = set(map(type, some)) - PLAIN
            if any(issubclass(kind, Iterator) for kind in kinds):
                return True
            containers = {kind for kind in kinds if _items_of(kind)}
            if containers:
                inside += [item for item in some if type(item) in containers]
            if room is not None:
                room -= len(some)
        level = inside
        depth += 1
    return False


def _items_of(kind: type) -> Callable[[Any], Iterable[Any]] | None:
    """How to go through a builtin container, whatever its subclass says; None for other types."""
    for builtin, items in CONTAINERS:
        if issubclass(kind, builtin):
            return items
    return None


class Values(dict[int, Any]):
    """Inputs and outputs by number.

    What an iterator was made of stays for as long as the iterator, so that another one can be made
    if the task that goes through it has to be run again; unless that is very much, or the iterator
    is too well hidden to be seen at a glance.

    Worker threads look things up and add outputs while the event loop drops what is not read any
    more, each of which is one operation of a dict. Nobody drops what another one still reads, and
    no two threads add the same; so what a thread has looked up stays for as long as it has to.
    """

    def __init__(self) -> None:
        super().__init__()
        self._origins: dict[int, dict[int, Any]] = {}

    def add(self, task: int, value: object, sources: Iterable[int]) -> None:
        """An output, and the numbers of what it was made of, which is here."""
        self[task] = value
        if goes_once(value, GLANCE):
            origins: dict[int, Any] = {}
            for number in sources:
                origins.update(self._origins.get(number, {}))
                origins[number] = self[number]
            if len(origins) <= MOST_ORIGINS:
                self._origins[task] = origins

    def drop(self, numbers: Sequence[int]) -> list[Any]:
        """Forget these, if they are here. What the caller lets go of: destructors take a while."""
        if not self._origins:
            return list(map(self.pop, numbers, repeat(None)))
        origins = [self._origins.pop(number, None) for number in numbers]
        return [*(self.pop(number, None) for number in numbers), *origins]

    def used_up(self, sources: Iterable[int]) -> list[int]:
        """Those inputs that a task may have used up."""
        return [number for number in sources if goes_once(self[number])]

    def clear(self) -> None:
        """Forget everything."""
        super().clear()
        self._origins.clear()

    def lasting(self, numbers: Iterable[int]) -> dict[int, Any]:
        """What is here of these, or has been an origin, and cannot be used up."""
        held = self._held()
        return {n: held[n] for n in numbers if n in held and not goes_once(held[n])}

    def _held(self) -> dict[int, Any]:
        """All that is here, origins too."""
        held: dict[int, Any] = {}
        for origins in list(self._origins.values()):
            held.update(origins)
        held.update(self)
        return held

    def spoilt(
        self,
        sources: Iterable[int],
        sources_of: Callable[[int], Iterable[int]],
        is_only_here: Callable[[int], bool],
    ) -> tuple[list[int], dict[int, Any]] | None:
        """What a task that was cut short has used up, and how to make it again.

        Parameters
        ----------
        sources
            What the task reads.
        sources_of
            What a task of the plan reads.
        is_only_here
            Whether an object is in no store.

        Returns
        -------
        tuple or None
            Of what is only here: inputs that go once, what those were made of if that goes once as
            well, and so on; and the rest of what they were made of. None if some of it is gone.
        """
        spoilt: dict[int, None] = {}
        work = list(sources)
        rest: dict[int, Any] = {}
        held = self._held()
        while work:
            number = work.pop()
            if number in spoilt or number in rest or not is_only_here(number):
                continue
            if number not in held:
                return None
            if goes_once(held[number]):
                spoilt[number] = None
                work += sources_of(number)
            else:
                rest[number] = held[number]
        return list(spoilt), rest


class PlanCache:
    """The plan of one job, as far as this sandbox has read it."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.programs: dict[int, Recipe] = {}
        self.begun: set[int] = set()
        """Tasks that have been run here: what their programs hold, a file say, may be used up."""
        self._blocks: dict[int, Block] = {}
        self._literals: OrderedDict[int, tuple[int, Any]] = OrderedDict()
        self._literal_bytes = 0

    def block(self, index: int) -> Block | None:
        """A block that was read before."""
        return self._blocks.get(index)

    def add_block(self, index: int, block: Block) -> None:
        """Remember a block."""
        self._blocks[index] = block
        self.programs.update(block.programs)

    def literal(self, number: int) -> tuple[int, Any] | None:
        """A literal that was read before, with its size in bytes."""
        found = self._literals.get(number)
        if found is not None:
            self._literals.move_to_end(number)
        return found

    def add_literal(self, number: int, size: int, value: Any) -> None:
        """Remember a literal; the least recently used ones make room."""
        self._literals[number] = (size, value)
        self._literal_bytes += size
        while self._literal_bytes > LITERAL_BYTES and len(self._literals) > 1:
            _, (dropped, _) = self._literals.popitem(last=False)
            self._literal_bytes -= dropped
