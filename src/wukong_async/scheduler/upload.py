"""From a task graph to what is written to the store: literals, blocks, facts.

CPU work without I/O, meant for a thread: `Upload.prepare` reads the graph and numbers it, `batches`
serialises as it goes, so that the frames of a large plan never exist all at once.

Blocks hold recipes. What is large in a task (an array among its arguments, a function that closes
over a table) is set apart as a literal: stored once however many tasks share it, in parts where it
is too large for one, and read by executors when it is a task's turn, as its inputs are.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from wukong_async import blocks, graph, plan, wire
from wukong_async.blocks import Entry, PlanFacts
from wukong_async.collector import collector_paused
from wukong_async.config import Settings
from wukong_async.errors import GraphError, SerializationError
from wukong_async.graph import TaskGraph
from wukong_async.plan import Plan
from wukong_async.store import block_name, payload

SMALL = (int, float, complex, bool, type(None))
"""Literals of these types are not worth a look."""
MOST_BLOCK = 500_000_000
"""Bytes; Redis and Valkey end a string at 512 MB. Values of their own are stored in parts."""
BATCH_BYTES = 8 * 1024 * 1024
"""Bytes of blocks and literals serialised before they are sent."""


@dataclass(slots=True)
class Upload:
    """A plan on its way into the store."""

    graph: TaskGraph
    plan: Plan
    settings: Settings
    starts: list[int] = field(default_factory=list)
    values: list[tuple[int, bytes]] = field(default_factory=list)
    """(literal, pointer), for `create`."""
    _large: dict[Hashable, int] = field(default_factory=dict)
    """Key of a literal that is an object of its own → its number."""
    _weighed: dict[int, tuple[object, int | None]] = field(default_factory=dict)
    """id of a task's part → the part, and its number if it is an object of its own."""
    _functions: dict[bytes, int] = field(default_factory=dict)
    """Digest of a function's pickle → its number. `model.predict` is another object each time."""
    _labels: list[str] = field(default_factory=list)
    """What literals -1, -2, … are, for messages."""

    @classmethod
    def prepare(cls, source: object, keys: Sequence[Hashable], settings: Settings) -> Upload:
        """Read and number a Dask graph.

        Raises
        ------
        wukong_async.errors.GraphError
        """
        with collector_paused():
            task_graph = graph.ingest(source, keys)
            outputs = [k for k in task_graph.outputs.values() if k not in task_graph.literals]
            return cls(task_graph, plan.make_plan(task_graph.dependencies(), outputs), settings)

    @property
    def facts(self) -> PlanFacts:
        """What executors are told; complete once `batches` is exhausted."""
        settings = self.settings
        return PlanFacts(self.starts, settings.inline_limit, settings.part_size, settings.ttl)

    def name(self, number: int) -> str:
        """A task or a literal, for messages."""
        if -len(self._labels) <= number < 0:
            return self._labels[-1 - number]
        try:
            return repr(self.plan.keys[number])
        except Exception:  # A key's own __repr__; or a number that is none of ours.
            return f"number {number}"

    def batches(self) -> Iterator[list[tuple[str, wire.Segments]]]:
        """Everything to put, in batches.

        Raises
        ------
        wukong_async.errors.SerializationError
            Naming the task and the object that does not pickle.
        """
        batch: list[tuple[str, wire.Segments]] = []
        waiting = 0
        for name, segments in chain(self._literals(), self._blocks()):
            batch.append((name, segments))
            waiting += wire.size(segments)
            if waiting > BATCH_BYTES:
                yield batch
                batch, waiting = [], 0
        if batch:
            yield batch

    # Literals ---------------------------------------------------------------------------------

    def _literals(self) -> Iterator[tuple[str, wire.Segments]]:
        """Literals that are too large to be repeated in every block that reads them."""
        task_graph = self.graph
        if not task_graph.literals:
            return
        readers = {
            source: task
            for task, sources in task_graph.sources.items()
            for source in sources.values()
        }
        for key, value in task_graph.literals.items():
            if key not in readers or type(value) in SMALL:
                continue
            label = f"its input {key!r}"
            segments = self._dumps(readers[key], label, value)
            # What it weighs, not what somebody guesses that it weighs: sizes of objects are 56.
            if wire.size(segments) > self.settings.inline_limit:
                self._large[key], objects = self._literal(readers[key], label, segments)
                yield from objects

    def _dumps(self, key: Hashable, label: str, value: object) -> wire.Segments:
        try:
            return wire.dumps(value)
        except SerializationError as error:
            raise SerializationError(
                f"Task {key!r} cannot travel: {label}, a {type(value).__qualname__}, does"
                f" not pickle ({error.__cause__ or error})."
            ) from error

    def _literal(
        self, key: Hashable, label: str, segments: wire.Segments
    ) -> tuple[int, list[tuple[str, wire.Segments]]]:
        """A new literal: its number and what to put for it."""
        self._labels.append(f"{label.removeprefix('its ')} of task {key!r}")
        number = -len(self._labels)
        stored, objects = payload(
            number,
            segments,
            writer="plan",
            inline_limit=0,  # Whatever its pickle turns out to weigh, it is an object.
            part_size=self.settings.part_size,
        )
        self.values.append((number, stored.inline))
        return number, objects

    # Blocks -----------------------------------------------------------------------------------

    def _blocks(self) -> Iterator[tuple[str, wire.Segments]]:
        total, most = len(self.plan), self.settings.block_tasks
        for first in range(0, total, most):
            entries = [self._entry(n) for n in range(first, min(first + most, total))]
            count, frame = self._encode(first, entries)
            if count < len(entries) or wire.size(frame) > self.settings.block_size:
                lighter = []
                for number, entry in enumerate(entries, first):
                    light, objects = self._lighten(number, entry)
                    lighter.append(light)
                    yield from objects
                if any(map(operator.is_not, lighter, entries)):
                    entries = lighter
                    count, frame = self._encode(first, entries)
            start = first
            while True:
                self._check(start, frame)
                yield block_name(len(self.starts)), frame
                self.starts.append(start)
                start += count
                if start == first + len(entries):
                    break
                count, frame = self._encode(start, entries[start - first :])

    def _entry(self, number: int) -> Entry:
        key = self.plan.keys[number]
        spec = self.plan.specs[number]
        names: list[Hashable] = []
        numbers: list[int] = []
        constants: dict[Hashable, Any] | None = None
        for name, source in self.graph.sources[key].items():
            provider = self.plan.numbers.get(source, self._large.get(source))
            if provider is not None:
                names.append(name)
                numbers.append(provider)
            else:
                constants = constants or {}
                constants[name] = self.graph.literals[source]
        return (
            self.graph.nodes[key],
            tuple(names),
            tuple(numbers),
            constants,
            spec.consumers,
            spec.degrees,
            spec.requested,
        )

    def _lighten(self, number: int, entry: Entry) -> tuple[Entry, list[tuple[str, wire.Segments]]]:
        """A task without what is large in it, and the objects to put for that."""
        key = self.plan.keys[number]
        node, names, sources, *_ = entry
        taken = self.graph.sources[key]
        apart: dict[Hashable, int] = {}
        put: list[tuple[str, wire.Segments]] = []

        def name_of(label: str, part: object) -> Hashable | None:
            if type(part) in SMALL:
                return None
            if id(part) not in self._weighed:
                self._weighed[id(part)] = part, self._weigh(key, label, part, put)
            literal = self._weighed[id(part)][1]
            if literal is None:
                return None
            name: Hashable = literal
            while name in taken:  # A key may be anything.
                name = ("wukong", name)
            apart[name] = literal
            return name

        node = graph.set_apart(node, name_of)
        if not apart:
            return entry, []
        return (node, (*names, *apart), (*sources, *apart.values()), *entry[3:]), put

    def _weigh(
        self, key: Hashable, label: str, part: object, put: list[tuple[str, wire.Segments]]
    ) -> int | None:
        """The number of a part that is to be an object of its own; what to put for it is added."""
        segments = self._dumps(key, label, part)
        if wire.size(segments) <= self.settings.inline_limit:
            return None
        if not callable(part):
            number, objects = self._literal(key, label, segments)
            put.extend(objects)
            return number
        digest = hashlib.blake2b(wire.join(segments)).digest()
        if digest not in self._functions:
            self._functions[digest], objects = self._literal(key, label, segments)
            put.extend(objects)
        return self._functions[digest]

    def _encode(self, first: int, entries: Sequence[Entry]) -> tuple[int, wire.Segments]:
        """A block of the first of these tasks."""
        try:
            return blocks.encode(entries, self.settings.block_size)
        except wire.ItemError as error:
            raise self._blame(first + error.index, entries[error.index], error) from error

    def _check(self, task: int, frame: wire.Segments) -> None:
        if wire.size(frame) > MOST_BLOCK:
            raise GraphError(
                f"Task {self.plan.keys[task]!r} carries {wire.size(frame) / 1e6:.0f} MB of"
                " arguments that are small one by one, more than the store takes in one piece."
                " Put them into a list or an array."
            )

    def _blame(self, number: int, entry: Entry, error: wire.ItemError) -> SerializationError:
        """What of a task does not pickle."""
        key = self.plan.keys[number]
        node, _, _, constants, *_ = entry
        for label, part in (
            *graph.parts(node),
            *((f"its input {name!r}", value) for name, value in (constants or {}).items()),
        ):
            try:
                self._dumps(key, label, part)
            except SerializationError as found:
                return found
        return SerializationError(f"Task {key!r} cannot travel: {error.__cause__ or error}")
