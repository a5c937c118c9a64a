"""From whatever Dask hands over to numbered-ready tasks: the only room that knows Dask's types.

`ingest` culls to what was requested, converts legacy tuples to Dask's task-spec nodes, follows
aliases and sets literals apart. It walks the graph once, with a list and not by recursion.

A *literal* is a node without a computation (a `DataNode`, or a plain value in a legacy graph).
It is no task: it is part of the plan, durable before the job begins, and whoever needs it reads it.

*Annotations* are Dask's: `retries` and `timeout` of the layers of a graph, and of a call.
"""

from __future__ import annotations

import contextlib
import operator
import re
import sys
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, TypeAlias

import dask
from dask._task_spec import (
    Alias,
    DataNode,
    Dict,
    GraphNode,
    List,
    Set,
    Task,
    TaskRef,
    Tuple,
    _execute_subgraph,
    convert_legacy_task,
)
from dask.base import collections_to_expr, is_dask_collection, unpack_collections
from dask.core import flatten
from dask.delayed import Delayed
from dask.delayed import optimize as optimize_delayed
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from dask.local import nested_get
from dask.utils import parse_timedelta

from wukong_async.blocks import NO_LIMITS, Limits
from wukong_async.errors import (
    ConfigError,
    CycleError,
    GraphError,
    MissingDependencyError,
    MissingKeyError,
)

Key: TypeAlias = Hashable
Node: TypeAlias = Any
"""A `dask._task_spec.GraphNode`: a callable over `{key: value}`. Opaque to all other rooms."""

FoundCall: TypeAlias = tuple[Callable[..., Any], str, tuple[Any, ...], tuple[int, ...]]
"""The function of a call, what it takes and the constants (see `blocks.Call`), and the sources."""
NO_ANNOTATIONS: Mapping[str, object] = MappingProxyType({})
MOST = 10**9
"""Retries, or seconds."""
PLAIN = frozenset({int, float, complex, bool, type(None)})
TEXT = frozenset({str, bytes})
SHORT = 64
"""Characters or bytes of a constant that is passed on as it is."""
OF_BLOCK = re.compile(r"(_\.\d+)+$")
"""What Dask puts after the name of a layer to name its task in a fused one."""


@dataclass(frozen=True, slots=True)
class TaskGraph:
    """A culled graph without aliases.

    `names[key]` are the dependencies as the node names them; each is provided by itself, or by what
    `aliases` has for it: a key of `nodes`, or one of `literals`.
    """

    nodes: dict[Key, Node]
    names: dict[Key, Sequence[Key]]
    aliases: dict[Key, Key]
    literals: dict[Key, Any]
    outputs: dict[Key, Key]
    """Requested key → the key of the node or literal that provides it."""
    limits: dict[Key, Limits] = field(default_factory=dict)
    """Of the nodes that have any."""

    def dependencies(self) -> Mapping[Key, Sequence[Key]]:
        """Task → the distinct tasks that it needs, in the order of the original graph."""
        literals, aliases = self.literals, self.aliases
        if not (literals or aliases):
            return self.names
        return {
            key: tuple(dict.fromkeys(s for n in names if (s := aliases.get(n, n)) not in literals))
            if names
            else ()
            for key, names in self.names.items()
        }

    def sources(self, key: Key) -> dict[Key, Key]:
        """Each dependency of a task as its node names it → the key that provides it."""
        aliases = self.aliases
        return {name: aliases.get(name, name) for name in self.names[key]}


def ingest(
    graph: object, requested: Sequence[Key], annotations: Mapping[str, object] = NO_ANNOTATIONS
) -> TaskGraph:
    """Read a Dask graph.

    Parameters
    ----------
    graph
        A mapping (legacy tuples, task-spec nodes, `HighLevelGraph`) or an expression.
    requested
        Flat keys of the results.
    annotations
        `retries` and `timeout` of the tasks that have none of their own.

    Raises
    ------
    MissingKeyError, MissingDependencyError, CycleError, GraphError
    """
    graph = unculled(graph)
    mapping = materialise(graph)
    position = dict(zip(mapping, range(len(mapping)), strict=True))
    nodes: dict[Key, Node] = {}
    names: dict[Key, Sequence[Key]] = {}
    aliases: dict[Key, Key] = {}
    literals: dict[Key, Any] = {}
    for key in requested:
        if key not in position:
            raise MissingKeyError(_unknown("The requested key", key, mapping))
    work = list(reversed(requested))
    while work:
        key = work.pop()
        if key in nodes or key in literals or key in aliases:
            continue
        node = mapping[key]
        if not isinstance(node, GraphNode):
            node = convert_legacy_task(key, node, position)
        if isinstance(node, Task) or (
            isinstance(node, GraphNode) and not isinstance(node, Alias | DataNode)
        ):
            if type(key) is not str or "partd" in key:
                _check_place(key, node)
            nodes[key] = node
            targets = tuple(node.dependencies)
            if len(targets) > 1 and position.keys() >= node.dependencies:
                targets = tuple(sorted(targets, key=position.__getitem__))
            names[key] = targets
        elif isinstance(node, Alias):
            targets = (aliases.setdefault(key, node.target),)
        else:
            literals[key] = node.value if isinstance(node, DataNode) else node
            continue
        for target in targets:
            if target not in position:
                raise MissingDependencyError(
                    _unknown(f"Task {key!r} depends on a key that", target, mapping)
                )
        work += targets[::-1]
    resolve = _resolver(aliases)
    return TaskGraph(
        nodes=nodes,
        names=names,
        aliases={alias: resolve(alias) for alias in aliases},
        literals=literals,
        outputs={key: resolve(key) for key in requested},
        limits=_limits(graph, nodes, annotations),
    )


def materialise(graph: object) -> Mapping[Key, Any]:
    """The low-level graph of a mapping, a `HighLevelGraph` or an expression."""
    if isinstance(graph, HighLevelGraph):
        merged: dict[Key, Any] = {}
        for layer in graph.layers.values():
            # Of delayed objects each is a layer: going through them as mappings takes as long as
            # planning.
            merged.update(layer.mapping if type(layer) is MaterializedLayer else layer)
        return merged
    if isinstance(graph, Mapping):
        return graph
    make = getattr(graph, "__dask_graph__", None)
    if make is None:
        raise GraphError(
            f"A {type(graph).__qualname__} is not a Dask graph: pass a collection, a mapping of"
            " keys to tasks, a HighLevelGraph or an expression."
        )
    try:
        made = make()
    except TypeError as error:
        layers = (layer.annotations for _, layer in _annotated_layers(graph))
        if not any(callable(value) for given in layers for value in given.values()):
            raise
        raise GraphError(
            "Dask cannot fuse tasks that are annotated with functions: annotate them with values,"
            " or compute with optimize_graph=False."
        ) from error
    if made is None or made is graph:
        raise GraphError(f"The {type(graph).__qualname__} has no Dask graph.")
    return materialise(made)


def unculled(graph: object) -> object:
    """The layers of an expression that Dask would do no more to than cull: so does `ingest`.

    For delayed objects that is all, and takes Dask longer than everything else that is done here.
    """
    from dask._expr import HLGExpr, _HLGExprSequence

    if not isinstance(graph, _HLGExprSequence) or not _is_only_culled():
        return graph
    parts = graph.operands
    if not all(isinstance(p, HLGExpr) and p.low_level_optimizer is optimize_delayed for p in parts):
        return graph
    layers = [part.hlg for part in parts]
    return HighLevelGraph.merge(*layers) if len(layers) > 1 else layers[0]


def _is_only_culled() -> bool:
    """Whether that is all that Dask's optimisation of delayed objects does."""
    return not dask.config.get("optimization.fuse.delayed", default=False)


def _check_place(key: Key, node: Node) -> None:
    """Refuse what the tasks of one of Dask's disk shuffles write to."""
    name = key[0] if isinstance(key, tuple) and key else key
    shuffles = isinstance(name, str) and name.startswith(("partd-", "zpartd-"))
    if shuffles and "partd" in repr(getattr(node, "func", None)):
        raise GraphError(
            f"Task {key!r} shuffles over a disk, and executors have none in common. Make the"
            " collection while a client is open, or with shuffle='tasks' (of a data frame:"
            " shuffle_method='tasks')."
        )


def parts(node: Node) -> list[tuple[str, object]]:
    """What a node is made of, as `set_apart` sees it: (label for messages, part) pairs."""
    found: list[tuple[str, object]] = []

    def note(label: str, part: object) -> None:
        found.append((label, part))

    set_apart(node, note)
    return found


def set_apart(node: Node, name_of: Callable[[str, object], Key | None]) -> Node:
    """`node` with references in place of those of its parts for which `name_of` has a name.

    Parameters
    ----------
    name_of
        Label for messages, part → the name under which the part will be provided, or None.
    """
    if type(node) not in {Task, Dict, List, Tuple, Set}:
        return node

    def replaced(label: str, part: object) -> object:
        if isinstance(part, TaskRef | Alias):
            return part
        if isinstance(part, GraphNode) and not isinstance(part, DataNode):
            return set_apart(part, lambda _, inner: name_of(label, inner))
        name = name_of(label, part.value if isinstance(part, DataNode) else part)
        return part if name is None else TaskRef(name)

    args = [replaced(f"argument {index}", part) for index, part in enumerate(node.args)]
    if type(node) is not Task:  # A container with nodes in it. (A Dict is made of one list.)
        same = all(map(operator.is_, args, node.args))
        return node if same else Dict(args) if type(node) is Dict else type(node)(*args)
    kwargs = {name: replaced(f"argument {name!r}", part) for name, part in node.kwargs.items()}
    function = node.func
    if (name := name_of("its function", function)) is not None:
        function, args = operator.call, [TaskRef(name), *args]
    return Task(node.key, function, *args, **kwargs)


def calls_of(
    graph: TaskGraph, keys: Iterable[Key], numbers: Mapping[Key, int], large: Mapping[Key, int]
) -> list[FoundCall | None]:
    """Tasks as mere calls; None for what is more than that.

    Parameters
    ----------
    numbers, large
        Where the values of keys come from: the numbers of tasks, and of literals.
    """
    nodes, aliases, literals = graph.nodes, graph.aliases, graph.literals
    found: list[FoundCall | None] = []
    for key in keys:
        node = nodes[key]
        if type(node) is not Task or node.kwargs or not (type(key) is str or _is_plain(key)):
            found.append(None)
            continue
        sources: list[int] = []
        constants: list[Any] = []
        takes = ""
        args = node.args
        lists = len(args) == 1 and type(args[0]) is List
        for arg in args[0].args if lists else args:
            kind = type(arg)
            if kind is TaskRef or kind is Alias:
                source = arg.key if kind is TaskRef else arg.target
                if aliases:
                    source = aliases.get(source, source)
                number = numbers.get(source)
                if number is None:
                    number = large.get(source)
                if number is not None:
                    sources.append(number)
                    takes += "S"
                    continue
                constant = literals[source]
            else:
                constant = arg.value if kind is DataNode else arg
            kind = type(constant)
            if kind not in PLAIN and not (kind in TEXT and len(constant) <= SHORT):
                break
            constants.append(constant)
            takes += "C"
        else:
            if not lists:
                # Each form of call once: pickle refers to what it knows by identity.
                call = (node.func, sys.intern(takes), tuple(constants), tuple(sources))
                found.append(call)
                continue
            if sources and not constants:
                found.append((node.func, "L", (), tuple(sources)))
                continue
        found.append(None)
    return found


def _is_plain(key: Key) -> bool:
    """Whether a key consists of what comes back from a pickle whatever happens."""
    if type(key) is tuple:
        return all(type(part) is str or type(part) is int for part in key)
    return type(key) is str


def is_graph(value: object) -> bool:
    """Whether `value` is a graph of its own rather than a collection of some kind."""
    if is_dask_collection(value):
        return False
    return isinstance(value, Mapping) or hasattr(value, "__dask_graph__")


def are_keys_of(keys: object, graph: object) -> bool:
    """Whether two arguments are a graph and its keys, and not containers of collections."""
    if not is_graph(graph) or unpack_collections(keys)[0]:
        return False
    values = graph.values() if type(graph) is dict else ()
    return not any(map(is_dask_collection, values))


def sinks(graph: object) -> list[Key]:
    """The keys of a graph that nothing else in it depends on."""
    mapping = materialise(graph)
    needed: set[Key] = set()
    for key, value in mapping.items():
        node = convert_legacy_task(key, value, mapping)
        if isinstance(node, GraphNode) and not (isinstance(node, Alias) and node.target == key):
            needed.update(node.dependencies)
    return [key for key in mapping if key not in needed]


def flat(keys: object) -> list[Key]:
    """The distinct keys in a key or a nested list of keys."""
    return list(dict.fromkeys(flatten([keys], container=list)))


def nest(keys: object, values: Mapping[Key, Any]) -> Any:
    """`values` in the shape of a key or a nested list of keys (lists become tuples, as in Dask)."""
    return nested_get(keys, values)


def _as_they_are(values: Any) -> Any:
    return values


@dataclass(frozen=True, slots=True)
class Request:
    """What `compute` was asked: a graph, the keys of its results, and how to dress them."""

    graph: object
    keys: Any
    finish: Callable[[Any], Any] = _as_they_are


def request_of_sinks(graph: object) -> Request:
    """All that nothing else in a graph depends on, by key."""
    keys = sinks(graph)
    return Request(graph, keys, lambda values: dict(zip(keys, values, strict=True)))


def request(collections: Sequence[object], optimize_graph: bool) -> Request | None:
    """What to run for `collections`, as `dask.compute` would; None if there is no collection.

    `finish` turns the nested values of `keys` into a tuple with one item for each argument.
    Delayed objects are not optimised by Dask first: all that does is to cull, and so does `ingest`.
    """
    found, repack = unpack_collections(*collections)
    if not found:
        return None
    if _is_only_culled() and all(isinstance(c, Delayed) for c in found):
        graphs = [c.__dask_graph__() for c in found]
        # Their layers have annotations.
        merged = HighLevelGraph.merge(*graphs) if len(graphs) > 1 else graphs[0]
        return _request(merged, [c.key for c in found], collections, repack)
    from dask._expr import FinalizeCompute

    with warnings.catch_warnings():
        # Mixing arrays with delayed objects is the user's right; the advice is about Dask's speed.
        warnings.filterwarnings("ignore", message="Computing mixed collections")
        expression = FinalizeCompute(collections_to_expr(found, optimize_graph)).optimize()
    return _request(expression, list(flatten(expression.__dask_keys__())), collections, repack)


def _request(
    graph: object, keys: list[Key], collections: Sequence[object], repack: Callable[[Any], Any]
) -> Request:
    if len(keys) == len(collections) == 1 and is_dask_collection(collections[0]):
        # Not a list of one: whoever attaches to the job gets what was asked for.
        return Request(graph, keys[0], lambda value: (value,))
    return Request(graph, keys, repack)


def annotations_of_call(retries: object = None, timeout: object = None) -> Mapping[str, object]:
    """What holds for the tasks of a call: its arguments, or else `dask.annotate` around it.

    Raises
    ------
    ConfigError
    """
    found = {name: v for name, v in dask.get_annotations().items() if name in CHECKS}
    for name, value in (("retries", retries), ("timeout", timeout)):
        if value is not None:
            try:
                found[name] = CHECKS[name](value)
            except ValueError as error:
                raise ConfigError(str(error)) from None
    return found


def _limits(
    graph: object, nodes: Mapping[Key, Node], defaults: Mapping[str, object]
) -> dict[Key, Limits]:
    """The limits of the tasks that have any."""
    annotated = _Annotated()
    for name, layer in _annotated_layers(graph):
        annotated.layers[name] = layer.annotations
        annotated.tasks.update(dict.fromkeys(layer.get_output_keys(), layer.annotations))
    if not annotated.layers:
        if not defaults or not nodes:
            return {}
        if not any(map(callable, defaults.values())):
            return dict.fromkeys(nodes, _combined((), next(iter(nodes)), defaults))
    found = {}
    for key, node in nodes.items():
        limits = _combined(list(annotated.origins(key, node, key)), key, defaults)
        if limits != NO_LIMITS:
            found[key] = limits
    return found


def _combined(
    origins: Sequence[tuple[Key, Mapping[str, object]]], key: Key, defaults: Mapping[str, object]
) -> Limits:
    """The most retries, and the sum of the timeouts if there is one of each."""
    each = [_annotation("retries", name, annotations) for name, annotations in origins]
    own = [retries for retries in each if retries is not None]
    timeouts = [_annotation("timeout", name, annotations) for name, annotations in origins]
    limited = timeouts and None not in timeouts
    return Limits(
        max(own) if own else _annotation("retries", key, defaults) or 0,
        sum(timeouts) if limited else _annotation("timeout", key, defaults),
    )


def _annotated_layers(graph: object) -> Iterator[tuple[str, Any]]:
    """Layers as they were made, not as they are optimised: that drops most annotations."""
    if isinstance(graph, HighLevelGraph):
        for name, layer in graph.layers.items():
            if layer.annotations and not CHECKS.keys().isdisjoint(layer.annotations):
                yield name, layer
    elif not isinstance(graph, Mapping) and hasattr(graph, "walk"):
        for expression in graph.walk():
            if "dsk" in expression._parameters:
                dsk = expression.operand("dsk")
                if isinstance(dsk, HighLevelGraph):
                    yield from _annotated_layers(dsk)


@dataclass(frozen=True, slots=True)
class _Annotated:
    """The annotations of a graph, by the names of tasks and of layers."""

    tasks: dict[Key, Mapping[str, object]] = field(default_factory=dict)
    layers: dict[Key, Mapping[str, object]] = field(default_factory=dict)

    def origins(
        self, key: Key, node: Node, holder: Key
    ) -> Iterator[tuple[Key, Mapping[str, object]]]:
        """The tasks that Dask made a task of: keys for callables to see, and annotations.

        Parameters
        ----------
        holder
            The key of the task that has this one in it. Tasks of fused layers have no other.
        """
        inner = node.args[0] if getattr(node, "func", None) is _execute_subgraph else None
        tasks = inner.items() if isinstance(inner, dict) else ()
        computed = [(k, t) for k, t in tasks if not isinstance(t, DataNode | Alias)]
        if key in self.tasks or not isinstance(key, str):
            holder = key
        if computed:
            inside = [o for k, task in computed for o in self.origins(k, task, holder)]
            # What was fused before it was annotated has nothing inside.
            own = {} if any(given for _, given in inside) else self.tasks.get(key)
            yield from [(holder, own)] if own else inside
        else:
            layer = OF_BLOCK.sub("", key) if isinstance(key, str) else None
            found = self.tasks.get(key) or self.layers.get(layer) or NO_ANNOTATIONS
            yield holder, found


def _annotation(name: str, key: Key, annotations: Mapping[str, object]) -> Any:
    given = annotations.get(name)
    try:
        value = given(key) if callable(given) else given
    except Exception as error:
        raise GraphError(
            f"Task {key!r}: its annotation {name} is a callable, and raises"
            f" {type(error).__name__}: {error}"
        ) from error
    # Where a delayed object was made of other collections, Dask marks the tasks without.
    if value is None or type(value).__name__ == "_AnnotationsTombstone":
        return None
    try:
        return CHECKS[name](value)
    except ValueError as error:
        raise GraphError(f"Task {key!r}: {error}") from None


def _retries(value: Any) -> int:
    number: Any = value if isinstance(value, Integral) and not isinstance(value, bool) else -1
    if not 0 <= number <= MOST:
        raise ValueError(f"retries must be an integer from 0 to {MOST:_}, not {value!r}.")
    return int(number)


def _timeout(value: Any) -> float:
    seconds = value
    # Dask reads "s" as 1 second.
    if isinstance(value, str) and any(map(str.isdigit, value)):
        with contextlib.suppress(ValueError, KeyError, OverflowError):
            seconds = parse_timedelta(value)
    number: Any = seconds if isinstance(seconds, Real) and not isinstance(seconds, bool) else 0
    if not 0 < number <= MOST:  # Written so that nan is in no range.
        raise ValueError(
            "timeout must be seconds, or a time such as '30 s', above 0 and at most"
            f" {MOST:_}, not {value!r}."
        )
    return float(number)


CHECKS: Mapping[str, Callable[[object], object]] = {"retries": _retries, "timeout": _timeout}
"""The annotations that are understood, and what makes a value of each."""


def _resolver(aliases: Mapping[Key, Key]) -> Callable[[Key], Key]:
    """Follow aliases to the end, remembering what was found."""
    known: dict[Key, Key] = {}

    def resolve(key: Key) -> Key:
        if key not in aliases:
            return key
        trail = {key: None}
        while (key := aliases[key]) in aliases:
            if key in known:
                key = known[key]
                break
            if key in trail:
                cycle = [*trail][[*trail].index(key) :]
                shown = " is ".join(repr(k) for k in [*cycle[:6], key])
                raise CycleError(f"Aliases lead nowhere: {shown}.")
            trail[key] = None
        known.update(dict.fromkeys(trail, key))
        return key

    return resolve


def _unknown(what: str, key: Key, graph: Mapping[Key, Any]) -> str:
    def some() -> Iterator[str]:
        for index, known in enumerate(graph):
            if index == 5:
                yield "…"
                return
            yield repr(known)

    subject = f"{what} {key!r}" if what.endswith("key") else f"{what} is not in the graph: {key!r}"
    verb = " is not in the graph" if what.endswith("key") else ""
    return f"{subject}{verb}. The graph has {len(graph)} keys: {', '.join(some()) or 'none'}."
