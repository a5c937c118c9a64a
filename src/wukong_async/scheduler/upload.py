"""From a task graph to what is written to the store: literals, blocks, facts.

CPU work without I/O, meant for a thread: `Upload.prepare` reads the graph and numbers it, `batches`
serialises as it goes, so that the frames of a large plan never exist all at once.

Blocks hold recipes. What is large in a task (an array among its arguments, a function that closes
over a table) is set apart as a literal: stored once however many tasks share it, in parts where it
is too large for one, and read by executors when it is a task's turn, as its inputs are.
"""

from __future__ import annotations

import secrets
from bisect import bisect_left
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from types import MethodType
from typing import Any

from wukong_async import blocks, graph, plan, wire
from wukong_async.blocks import Call, Calls, Entry, Limits, PlanFacts, name_of
from wukong_async.collector import collector_paused
from wukong_async.compression import LZ4, NONE, Compression, mode_for
from wukong_async.config import Settings
from wukong_async.errors import GraphError, SerializationError
from wukong_async.graph import NO_ANNOTATIONS, FoundCall, TaskGraph
from wukong_async.invocation import MOST_CARRIED
from wukong_async.invoker import region_of
from wukong_async.plan import Plan, Specs
from wukong_async.policy import MOST_NAMES, Costs, first_groups, is_fit, recalled
from wukong_async.protocol import TaskSpec
from wukong_async.store import MANIFEST, Bucket, block_name, payload

SMALL = (int, float, complex, bool, type(None))
"""Literals of these types are not worth a look."""
MOST_BLOCK = 500_000_000
"""Bytes; Redis and Valkey end a string at 512 MB. Values of their own are stored in parts."""
BATCH_BYTES = 8 * 1024 * 1024
"""Bytes of blocks and literals serialised before they are sent."""


@dataclass
class Upload:
    """A plan on its way into the store."""

    graph: TaskGraph
    plan: Plan
    settings: Settings
    starts: list[int] = field(default_factory=list)
    edges: list[int] = field(default_factory=list)
    values: list[tuple[int, bytes]] = field(default_factory=list)
    """(literal, pointer), for `create`."""
    seen: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """What is remembered of such tasks, and of what sharing costs."""
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(16), repr=False)
    first: dict[str, bytes] = field(default_factory=dict)
    """The first blocks by name, as many as may go along with the first event."""
    is_serialised: bool = False
    """Whether what `batches` has given last is the last one."""
    _room: int = MOST_CARRIED
    """Bytes that may still come to those."""
    _large: dict[Hashable, int] = field(default_factory=dict)
    """Key of a literal that is an object of its own → its number."""
    _apart: dict[Hashable, tuple[object, int]] = field(default_factory=dict)
    """Identity of a task's part that is an object of its own → the part, and its number."""
    _labels: list[tuple[str, Hashable]] = field(default_factory=list)
    """What literals -1, -2, … are: the label of a part, and its task's key."""

    @classmethod
    def prepare(
        cls,
        source: object,
        keys: Sequence[Hashable],
        settings: Settings,
        annotations: Mapping[str, object] = NO_ANNOTATIONS,
    ) -> Upload:
        """Read and number a Dask graph. `annotations` hold for tasks without their own.

        Raises
        ------
        wukong_async.errors.GraphError, wukong_async.errors.ConfigError
        """
        mode_for(settings.compression)
        with collector_paused():
            task_graph = graph.ingest(source, keys, annotations)
            outputs = [k for k in task_graph.outputs.values() if k not in task_graph.literals]
            made = cls(task_graph, plan.make_plan(task_graph.dependencies(), outputs), settings)
            made.names()  # They take a while, and this is no loop.
            return made

    @property
    def facts(self) -> PlanFacts:
        """What executors are told; complete once `batches` is exhausted."""
        settings = self.settings
        return PlanFacts(
            self.starts,
            self.edges,
            settings.inline_limit,
            settings.part_size,
            settings.ttl,
            len(self.plan),
            settings.max_concurrency,
            settings.hold,
            self.seen,
            mode_for(settings.compression),
            self.bucket,
            settings.s3_limit,
            self.secret,
            settings.threads_per_executor,
        )

    @property
    def bucket(self) -> str:
        """The URL of the bucket for what is very large, if there is one."""
        settings = self.settings
        if settings.s3_bucket is None:
            return ""
        endpoint = settings.s3_endpoint_url or ""
        return Bucket(settings.s3_bucket, settings.s3_prefix, region_of(settings), endpoint).url

    def name(self, number: int) -> str:
        """A task or a literal, for messages."""
        if -len(self._labels) <= number < 0:
            label, key = self._labels[-1 - number]
            return f"{label.removeprefix('its ')} of task {_shown(key)}"
        if 0 <= number < len(self.plan):
            return _shown(self.plan.keys[number])
        return f"number {number}"

    @property
    def results(self) -> dict[Hashable, int]:
        """Requested keys that are computed → their numbers."""
        outputs, numbers = self.graph.outputs, self.plan.numbers
        return {key: numbers[output] for key, output in outputs.items() if output in numbers}

    @property
    def constants(self) -> dict[Hashable, Any]:
        """Requested keys that need no computation → their values."""
        outputs, literals = self.graph.outputs, self.graph.literals
        return {key: literals[output] for key, output in outputs.items() if output in literals}

    def names(self) -> list[str]:
        """What its tasks are called, each once, and as many as are remembered."""
        return self._different

    @cached_property
    def _names(self) -> list[str]:
        return list(map(name_of, self.plan.keys))

    @cached_property
    def _different(self) -> list[str]:
        return list(filter(is_fit, dict.fromkeys(self._names)))[:MOST_NAMES]

    @property
    def costs(self) -> Costs:
        """What sharing is believed to cost."""
        place = dict(item for item in self.seen.items() if not item[0])
        return recalled(place)[1] or Costs()

    def groups(self) -> list[list[int]]:
        """The leaves that each of the first executors begins with."""
        estimates, costs = recalled(self.seen)
        return first_groups(
            self.plan.specs,
            self.plan.leaves,
            list(map(estimates.get, self._names)) if estimates else [],
            costs or Costs(),
            self.settings.max_concurrency,
            self.settings.leaf_batch,
            self.settings.threads_per_executor or 1,
        )

    def manifest(self, keys: object) -> tuple[bytes, list[tuple[str, wire.Segments]]]:
        """What whoever attaches has to know of the results, as a stored value and its objects.

        Parameters
        ----------
        keys
            The requested keys, nested as they were asked for.
        """
        try:
            frame = wire.dumps((keys, self.results, self.constants))
        except SerializationError:
            frame = wire.dumps(None)  # Only its own client can have the results.
        stored, objects = payload(
            MANIFEST,
            frame,
            writer="manifest",
            inline_limit=self.settings.inline_limit,
            part_size=self.settings.part_size,
        )
        return stored.inline, objects

    def batches(self) -> Iterator[list[tuple[str, wire.Segments]]]:
        """Everything to put, in batches. From the beginning each time: a job may be run twice.

        Raises
        ------
        wukong_async.errors.SerializationError
            Naming the task and the object that does not pickle.
        """
        for made in (self.starts, self.edges, self.values, self._large, self._apart, self._labels):
            made.clear()
        self.first.clear()
        self.is_serialised = False
        self._room = MOST_CARRIED
        batch: list[tuple[str, wire.Segments]] = []
        waiting = 0
        for name, segments in chain(self._literals(), self._blocks()):
            batch.append((name, segments))
            waiting += wire.size(segments)
            if waiting > BATCH_BYTES:
                yield batch
                batch, waiting = [], 0
        self.is_serialised = True
        if batch:
            yield batch

    @property
    def _compression(self) -> Compression:
        # The function may have no `lz4`: whether it has is for who asks for it to know.
        return Compression(LZ4 if self.settings.compression == LZ4 else NONE)

    # Literals ---------------------------------------------------------------------------------

    def _literals(self) -> Iterator[tuple[str, wire.Segments]]:
        """Literals that are too large to be repeated in every block that reads them."""
        task_graph = self.graph
        if not task_graph.literals:
            return
        readers = {
            source: task
            for task in task_graph.nodes
            for source in task_graph.sources(task).values()
            if source in task_graph.literals
        }
        for key, value in task_graph.literals.items():
            if key not in readers or type(value) in SMALL:
                continue
            label = f"its input {_shown(key)}"
            segments = self._dumps(readers[key], label, value)
            # What it weighs, not what somebody guesses that it weighs: sizes of objects are 56.
            if wire.size(segments) > self.settings.inline_limit:
                self._large[key], objects = self._literal(readers[key], label, segments)
                yield from objects

    def _dumps(self, key: Hashable, label: str, value: object) -> wire.Segments:
        try:
            return wire.dumps(value)
        except SerializationError as error:
            raise self._does_not_pickle(key, label, value, error) from error

    def _does_not_pickle(
        self, key: Hashable, label: str, value: object, error: SerializationError
    ) -> SerializationError:
        return SerializationError(
            f"Task {_shown(key)} cannot travel: {label}, a {type(value).__qualname__}, does not"
            f" pickle ({error.__cause__ or error})."
        )

    def _literal(
        self, key: Hashable, label: str, segments: wire.Segments
    ) -> tuple[int, list[tuple[str, wire.Segments]]]:
        """A new literal: its number and what to put for it."""
        self._labels.append((label, key))
        number = -len(self._labels)
        segments = wire.compressed(segments, self._compression)
        stored, objects = payload(
            number,
            segments,
            writer="plan",
            inline_limit=0,  # Whatever its pickle turns out to weigh, it is an object.
            part_size=self.settings.part_size,
            bucket=self.bucket,
            bucket_limit=self.settings.s3_limit,
        )
        self.values.append((number, stored.inline))
        return number, objects

    # Blocks -----------------------------------------------------------------------------------

    def _blocks(self) -> Iterator[tuple[str, wire.Segments]]:
        total, most = len(self.plan), self.settings.block_tasks
        for first in range(0, total, most):
            keys = self.plan.keys[first : first + most]
            found = graph.calls_of(self.graph, keys, self.plan.numbers, self._large)
            calls = [call for call in found if call is not None]
            if len(calls) == len(keys):
                frame = self._encode_calls(first, keys, calls)
                if wire.size(frame) <= self.settings.block_size:
                    yield self._block(first, frame)
                    continue
            entries = list(map(self._entry, self.plan.specs[first : first + most], found))
            count, frame = self._encode(first, entries)
            if count < len(entries) or wire.size(frame) > self.settings.block_size:
                lighter, objects = self._lighten(first, entries)
                yield from objects
                if lighter:
                    entries = lighter
                    count, frame = self._encode(first, entries)
            start = first
            while True:
                yield self._block(start, frame)
                start += count
                if start == first + len(entries):
                    break
                count, frame = self._encode(start, entries[start - first :])

    def _block(self, start: int, frame: wire.Segments) -> tuple[str, wire.Segments]:
        """The object of a block that begins with this task."""
        if wire.size(frame) > MOST_BLOCK:
            raise GraphError(
                f"Task {self.name(start)} carries {wire.size(frame) / 1e6:.0f} MB of"
                " arguments that are small one by one, more than the store takes in one piece."
                " Put them into a list or an array."
            )
        name = block_name(len(self.starts))
        self._room -= wire.size(frame)
        if self._room >= 0:
            self.first[name] = wire.join(frame)
        self.starts.append(start)
        self.edges.append(self.plan.specs[start].first_edge)
        return name, frame

    def _encode_calls(
        self, first: int, keys: Sequence[Hashable], calls: Sequence[FoundCall]
    ) -> wire.Segments:
        """A block of these tasks."""
        limits, requested, specs = self.graph.limits, self.plan.requested, self.plan.specs
        assert isinstance(specs, Specs)
        last = first + len(keys)
        wanted = requested[bisect_left(requested, first) : bisect_left(requested, last)]
        limited = enumerate(keys) if limits else ()
        tasks = Calls(
            keys,
            self._names[first:last],
            calls,
            **specs.columns(first, last),
            requested=[number - first for number in wanted],
            limits={n: _told(limits[key]) for n, key in limited if key in limits},
        )
        try:
            return blocks.encode_calls(tasks)
        except wire.ItemError as error:
            raise self._blame(first + error.index, error) from error

    def _entry(self, spec: TaskSpec, found: FoundCall | None) -> Entry:
        if found is None:
            return self._node_entry(spec)
        function, takes, constants, sources = found
        call = Call(
            self.plan.keys[spec.number], self._names[spec.number], function, takes, constants
        )
        return (call, (), sources, None, *self._rest(spec))

    def _node_entry(self, spec: TaskSpec) -> Entry:
        key = self.plan.keys[spec.number]
        names: list[Hashable] = []
        sources: list[int] = []
        constants: dict[Hashable, Any] | None = None
        for name, source in self.graph.sources(key).items():
            provider = self.plan.numbers.get(source, self._large.get(source))
            if provider is not None:
                names.append(name)
                sources.append(provider)
            else:
                constants = constants or {}
                constants[name] = self.graph.literals[source]
        return (
            *(self.graph.nodes[key], tuple(names), tuple(sources), constants),
            *self._rest(spec),
        )

    def _rest(
        self, spec: TaskSpec
    ) -> tuple[tuple[int, ...], tuple[int, ...], bool, tuple[int, float | None] | None]:
        limits = self.graph.limits and self.graph.limits.get(self.plan.keys[spec.number])
        told = _told(limits) if limits else None
        return (spec.consumers, spec.degrees, spec.requested, told)

    def _lighten(
        self, first: int, entries: Sequence[Entry]
    ) -> tuple[list[Entry], list[tuple[str, wire.Segments]]]:
        """Tasks without what is large in them, if anything is, and the objects to put for that.

        Large is what a part has for itself. What two parts share stays with them: apart, they
        would have it twice, and no longer in common.
        """
        parts: dict[Hashable, tuple[object, str, Hashable]] = {}
        limit = self.settings.inline_limit
        for key in self.plan.keys[first : first + len(entries)]:
            for label, part in graph.parts(self.graph.nodes[key]):
                if not _is_small(part, limit):
                    parts.setdefault(_identity(part), (part, label, key))
        try:
            weights = wire.own_weights([part for part, _, _ in parts.values()])
        except wire.ItemError as error:
            part, label, key = list(parts.values())[error.index]
            raise self._does_not_pickle(key, label, part, error) from error
        put: list[tuple[str, wire.Segments]] = []
        large: dict[Hashable, int] = {}
        for (identity, (part, label, key)), weight in zip(parts.items(), weights, strict=True):
            if weight <= limit:
                continue
            if identity not in self._apart:
                number, objects = self._literal(key, label, self._dumps(key, label, part))
                self._apart[identity] = part, number
                put.extend(objects)
            large[identity] = self._apart[identity][1]
        if not large:
            return [], []
        return [self._without(n, entry, large) for n, entry in enumerate(entries, first)], put

    def _without(self, number: int, entry: Entry, large: Mapping[Hashable, int]) -> Entry:
        """A task that reads these parts instead of having them."""
        key = self.plan.keys[number]
        taken = self.graph.names[key]
        apart: dict[Hashable, int] = {}

        def name_of(_: str, part: object) -> Hashable | None:
            literal = large.get(_identity(part))
            if literal is None:
                return None
            name: Hashable = literal
            while name in taken:  # A key may be anything.
                name = ("wukong", name)
            apart[name] = literal
            return name

        node = graph.set_apart(self.graph.nodes[key], name_of)
        if not apart:
            return entry
        _, names, sources, *rest = self._node_entry(self.plan.specs[number])
        return (node, (*names, *apart), (*sources, *apart.values()), *rest)

    def _encode(self, first: int, entries: Sequence[Entry]) -> tuple[int, wire.Segments]:
        """A block of the first of these tasks."""
        try:
            return blocks.encode(entries, self.settings.block_size)
        except wire.ItemError as error:
            raise self._blame(first + error.index, error) from error

    def _blame(self, number: int, error: wire.ItemError) -> SerializationError:
        """What of a task does not pickle."""
        key = self.plan.keys[number]
        node, _, _, constants, *_ = self._node_entry(self.plan.specs[number])
        for label, part in (
            *graph.parts(node),
            *((f"its input {_shown(name)}", value) for name, value in (constants or {}).items()),
        ):
            try:
                self._dumps(key, label, part)
            except SerializationError as found:
                return found
        return SerializationError(f"Task {_shown(key)} cannot travel: {error.__cause__ or error}")


def _told(limits: Limits) -> tuple[int, float | None]:
    return limits.retries, limits.timeout


def _is_small(part: object, limit: int) -> bool:
    """Whether a part is known to be small without a look."""
    return type(part) in SMALL or (isinstance(part, str | bytes) and len(part) <= limit // 4)


def _identity(part: object) -> Hashable:
    """What makes a part the same in two tasks. `model.predict` is a new object each time."""
    if isinstance(part, MethodType):
        return id(part.__self__), id(part.__func__)
    return id(part)


def _shown(key: Hashable) -> str:
    try:
        return repr(key)
    except Exception as error:  # A key's own.
        return f"<a {type(key).__qualname__} whose repr raises {type(error).__name__}>"
