"""From a task graph to what is written to the store: literals, blocks, facts.

CPU work without I/O, meant for a thread: `Upload.prepare` reads the graph and numbers it, `batches`
serialises as it goes, so that the frames of a large plan never exist all at once.
"""

from __future__ import annotations

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
            try:
                segments = wire.dumps(value)
            except SerializationError as error:
                raise SerializationError(
                    f"Task {readers[key]!r} cannot travel: its input {key!r}, a"
                    f" {type(value).__qualname__}, does not pickle ({error.__cause__ or error})."
                ) from error
            # What it weighs, not what somebody guesses that it weighs: sizes of objects are 56.
            if wire.size(segments) <= self.settings.inline_limit:
                continue
            number = self._large[key] = -1 - len(self._large)
            # Inline limit 0: whatever its pickle turns out to weigh, it is an object.
            stored, objects = payload(
                number,
                segments,
                writer="plan",
                inline_limit=0,
                part_size=self.settings.part_size,
            )
            self.values.append((number, stored.inline))
            yield from objects

    def _blocks(self) -> Iterator[tuple[str, wire.Segments]]:
        most = self.settings.block_tasks
        for first in range(0, len(self.plan), most):
            entries = [self._entry(n) for n in range(first, min(first + most, len(self.plan)))]
            start = first
            try:
                for count, frame in blocks.encode(entries, self.settings.block_size):
                    if wire.size(frame) > MOST_BLOCK:
                        raise GraphError(
                            f"Task {self.plan.keys[start]!r} and its block carry"
                            f" {wire.size(frame) / 1e6:.0f} MB of arguments, more than the store"
                            " takes in one piece. Pass large arguments as values of their own:"
                            " dask.delayed(argument)."
                        )
                    yield block_name(len(self.starts)), frame
                    self.starts.append(start)
                    start += count
            except SerializationError as error:
                raise self._blame(start, entries[start - first :], error) from error

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

    def _blame(
        self, first: int, entries: Sequence[Entry], error: SerializationError
    ) -> SerializationError:
        """Which task, and what of it, does not pickle."""
        for number, (node, _, _, constants, *_) in enumerate(entries, first):
            key = self.plan.keys[number]
            for label, part in (
                *graph.parts(node),
                *((f"its input {name!r}", value) for name, value in (constants or {}).items()),
            ):
                if cause := _unpicklable(part):
                    return SerializationError(
                        f"Task {key!r} cannot travel: {label}, a {type(part).__qualname__}, does"
                        f" not pickle ({cause})."
                    )
            if cause := _unpicklable(node):
                return SerializationError(f"Task {key!r} cannot travel: {cause}")
        return error


def _unpicklable(value: object) -> Exception | None:
    try:
        wire.dumps(value)
    except SerializationError as error:
        cause = error.__cause__
        return cause if isinstance(cause, Exception) else error
    return None
