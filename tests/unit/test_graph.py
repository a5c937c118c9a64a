from __future__ import annotations

import pickle
import warnings
from collections import namedtuple
from operator import add
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import pandas as pd
import pytest
from dask import delayed
from dask._expr import Expr
from dask._task_spec import Alias, DataNode, Dict, List, Task, TaskRef, Tuple, _execute_subgraph
from dask.highlevelgraph import HighLevelGraph

from wukong_async import graph
from wukong_async.blocks import Limits
from wukong_async.errors import CycleError, GraphError, MissingDependencyError, MissingKeyError
from wukong_async.graph import TaskGraph


def inc(x: int) -> int:
    return x + 1


def run(found: TaskGraph, keys: Any) -> Any:
    """Compute an ingested graph the simplest way: to compare it with what Dask computes."""
    values = dict(found.literals)

    def value(key: Any) -> Any:
        if key not in values:
            data = {name: value(source) for name, source in found.sources(key).items()}
            values[key] = found.nodes[key](data)
        return values[key]

    return graph.nest(keys, {key: value(source) for key, source in found.outputs.items()})


Point = namedtuple("Point", "x y")  # noqa: PYI024 - Dask treats these specially

GRAPHS: dict[str, tuple[dict[Any, Any], Any]] = {
    "legacy tuples": ({"a": 1, "b": (inc, "a"), "c": (add, "a", "b")}, "c"),
    "nested legacy tuples": ({"a": 1, "b": (add, (inc, "a"), (inc, (inc, "a")))}, "b"),
    "lists of keys": ({"a": 1, "b": 2, "c": (sum, ["a", "b", ["a"][0]])}, "c"),
    "a list as a value": ({"a": 1, "b": (inc, "a"), "c": ["a", "b"]}, "c"),
    "tuple keys": ({("x", 0): 1, ("x", 1): (inc, ("x", 0))}, [[("x", 0)], [("x", 1)]]),
    "task-spec nodes": ({"a": DataNode("a", 1), "b": Task("b", inc, TaskRef("a"))}, "b"),
    "aliases of aliases": ({"a": 1, "b": "a", "c": "b", "d": (inc, "c")}, ["d", "c"]),
    "an alias of a task": ({"a": (inc, 1), "b": Alias("b", "a"), "c": (add, "a", "b")}, "c"),
    "None": ({"a": None, "b": (str, "a")}, ["a", "b"]),
    "a string that is no key": ({"a": "hello", "b": (str.upper, "a")}, "b"),
    "a string that is a key": ({"a": 1, "b": (str, "a")}, "b"),
    "nothing requested": ({"a": 1}, []),
    "a namedtuple": ({"a": 1, "b": Point("a", 2)}, "b"),
    "a dictionary argument": ({"a": 1, "b": (dict, {"k": "a"})}, "b"),
    "the same input twice": ({"a": (inc, 1), "b": (add, "a", "a")}, "b"),
    "integer keys": ({1: 5, 2: (inc, 1)}, 2),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_means_what_it_means_to_dask(name: str) -> None:
    dsk, keys = GRAPHS[name]
    assert run(graph.ingest(dsk, graph.flat(keys)), keys) == dask.get(dsk, keys)


def collections() -> dict[str, Any]:
    x = da.arange(12, chunks=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "array": (x + 1).sum(),
            "unfinished array": x,
            "bag": db.from_sequence(range(10), npartitions=3).map(inc).sum(),
            "delayed": delayed(sum)([delayed(inc)(i) for i in range(5)]),
        }


@pytest.mark.parametrize("name", list(collections()))
@pytest.mark.parametrize("optimize", [True, False])
def test_a_collection_is_asked_for_as_dask_does(name: str, optimize: bool) -> None:
    collection = collections()[name]
    request = graph.request([collection], optimize)
    assert request is not None
    found = graph.ingest(request.graph, [request.keys])
    (value,) = request.finish(run(found, [request.keys])[0])
    assert str(value) == str(collection.compute(scheduler="sync"))


def test_containers_of_collections() -> None:
    request = graph.request([{"a": [delayed(inc)(1), 5]}, delayed(inc)(2)], True)
    assert request is not None
    values = request.finish(run(graph.ingest(request.graph, request.keys), request.keys))
    assert values == ({"a": [2, 5]}, 3)


def test_no_collection_is_no_request() -> None:
    assert graph.request([{"a": 1}, 5], True) is None


def test_high_level_graphs_and_expressions_are_materialised() -> None:
    x = da.ones(4, chunks=2).sum()
    assert isinstance(x.__dask_graph__(), HighLevelGraph)
    found = graph.ingest(x.__dask_graph__(), list(dask.core.flatten(x.__dask_keys__())))
    assert run(found, x.__dask_keys__()) == (4.0,)


def test_only_what_is_needed_is_read() -> None:
    found = graph.ingest({"a": 1, "b": (inc, "a"), "c": (inc, "b"), "d": (inc, "d")}, ["b"])
    assert set(found.nodes) == {"b"}
    assert found.literals == {"a": 1}


def test_data_and_aliases_are_no_tasks() -> None:
    found = graph.ingest({"a": DataNode("a", 1), "b": "a", "c": (inc, "b")}, ["c", "b"])
    assert set(found.nodes) == {"c"}
    assert found.dependencies() == {"c": ()}
    assert found.outputs == {"c": "c", "b": "a"}


def test_dependencies_follow_the_order_of_the_graph() -> None:
    names = [f"task-{i}" for i in range(50)]
    dsk: dict[str, Any] = {name: (inc, i) for i, name in enumerate(names)}
    dsk["sum"] = (sum, list(reversed(names)))
    assert graph.ingest(dsk, ["sum"]).dependencies()["sum"] == tuple(names)


def test_a_key_that_is_not_there_is_named() -> None:
    with pytest.raises(MissingKeyError) as caught:
        graph.ingest({"a": 1}, ["b"])
    assert str(caught.value) == (
        "The requested key 'b' is not in the graph. The graph has 1 keys: 'a'."
    )


def test_a_dependency_that_is_not_there_is_named() -> None:
    dsk = {"a": Task("a", inc, TaskRef("nowhere"))}
    with pytest.raises(MissingDependencyError, match=r"Task 'a' depends on a key .* 'nowhere'"):
        graph.ingest(dsk, ["a"])


def test_aliases_in_a_circle_are_named() -> None:
    with pytest.raises(CycleError, match="lead nowhere: 'a' is 'b' is 'a'"):
        graph.ingest({"a": Alias("a", "b"), "b": Alias("b", "a")}, ["a"])
    with pytest.raises(CycleError, match="lead nowhere: 'b' is 'b'"):
        graph.ingest({"a": Alias("a", "b"), "b": Alias("b", "b")}, ["a"])


@pytest.mark.parametrize("something", [3, "text", object()])
def test_what_is_no_graph_is_refused(something: object) -> None:
    with pytest.raises(GraphError, match="is not a Dask graph"):
        graph.ingest(something, ["a"])


def test_sinks() -> None:
    dsk = {"a": 1, "b": (inc, "a"), "c": (inc, "a"), "d": "c"}
    assert graph.sinks(dsk) == ["b", "d"]
    assert graph.sinks({}) == []


def test_a_long_chain_of_aliases() -> None:
    dsk: dict[Any, Any] = {0: (inc, 1)} | {i: Alias(i, i - 1) for i in range(1, 50_000)}
    assert graph.ingest(dsk, [49_999]).outputs == {49_999: 0}


LARGE = "large"
INNER = {"i": Task("i", add, LARGE, TaskRef("j"))}


@pytest.mark.parametrize(
    ("node", "parts"),
    [
        (Task("k", add, LARGE, TaskRef("x")), {"argument 0": LARGE}),
        (Task("k", add, DataNode(None, LARGE), TaskRef("x")), {"argument 0": LARGE}),
        (Task("k", "{0}{b}".format, TaskRef("x"), b=LARGE), {"argument 'b'": LARGE}),
        (Task("k", add, Task(None, str.upper, LARGE), TaskRef("x")), {"argument 0": LARGE}),
        (Task("k", "".join, List(LARGE, TaskRef("x"))), {"argument 0": LARGE}),
        (Task("k", len, Dict({"a": LARGE, "b": TaskRef("x")})), {"argument 0": LARGE}),
        (Task("k", len, Dict({"a": Tuple(LARGE, TaskRef("x"))})), {"argument 0": LARGE}),
        (
            Task("k", _execute_subgraph, INNER, "i", ("j",), TaskRef("x")),
            {"argument 0": INNER},
        ),
        (Task("k", LARGE.__add__, TaskRef("x")), {"its function": LARGE.__add__}),
    ],
    ids=lambda each: repr(each)[:30],
)
def test_parts_that_are_set_apart_are_provided_as_inputs(
    node: Task, parts: dict[str, object]
) -> None:
    def name_of(label: str, part: object) -> Any:
        return ("apart", label) if part == parts.get(label) else None

    lighter = graph.set_apart(node, name_of)
    apart: dict[Any, Any] = {("apart", label): part for label, part in parts.items()}
    assert lighter.dependencies == {"x", *apart}
    assert lighter({"x": "small", **apart}) == node({"x": "small"})
    assert lighter.key == "k"
    assert b"large" not in pickle.dumps(lighter)


def test_a_node_without_anything_to_set_apart_stays_itself() -> None:
    node = Task("k", add, List("small", TaskRef("x")))
    assert graph.set_apart(node, lambda label, part: None).args[0] is node.args[0]


# Retries and timeouts -----------------------------------------------------------------------------


def limits_of(*collections: Any, optimize_graph: bool = True, **call: Any) -> dict[str, Limits]:
    """By the name of the layer."""
    asked = graph.request(collections, optimize_graph)
    assert asked is not None
    found: dict[Any, Limits] = graph.ingest(
        asked.graph, graph.flat(asked.keys), graph.annotations_of_call(**call)
    ).limits
    return {(k if isinstance(k, str) else k[0]).rsplit("-", 1)[0]: v for k, v in found.items()}


def test_tasks_without_annotations_have_no_limits() -> None:
    assert limits_of(da.ones(4, chunks=2) + 1) == {}
    assert graph.ingest({"a": (inc, 1)}, ["a"]).limits == {}


def test_a_layer_has_its_annotations_and_the_others_those_of_the_call() -> None:
    with dask.annotate(retries=2, priority=7):
        x = delayed(inc)(1, dask_key_name="x")
    with dask.annotate(timeout="2 minutes"):
        y = delayed(inc)(x, dask_key_name="y")
    z = delayed(inc)(y, dask_key_name="z")
    assert limits_of(z) == {"x": (2, None), "y": (0, 120)}
    assert limits_of(z, x, retries=1, timeout=5) == {"x": (2, 5), "y": (1, 120), "z": (1, 5)}


def test_what_is_annotated_around_the_call_is_weaker_than_its_arguments() -> None:
    x = delayed(inc)(1, dask_key_name="x")
    with dask.annotate(retries=lambda key: len(key), timeout=3):
        assert limits_of(x) == {"x": (1, 3)}
        assert limits_of(x, retries=5) == {"x": (5, 3)}


def test_none_means_not_annotated() -> None:
    with dask.annotate(retries=lambda _: None, timeout=None):
        x = delayed(inc)(1, dask_key_name="x")
    assert limits_of(x) == {}
    assert limits_of(x, timeout=3) == {"x": (0, 3)}


def test_a_fused_task_has_the_most_retries_and_the_time_of_all() -> None:
    x = da.ones(4, chunks=2)
    with dask.annotate(retries=2, timeout=3):
        y = x + 1
    with dask.annotate(retries=1, timeout=4):
        z = y * 2
    assert limits_of(z) == {"add-ones_like-mul": (2, None)}, "one has no timeout"
    found = limits_of(z, timeout=5)
    assert found == {"add-ones_like-mul": (2, 5), "finalize-hlgfinalizecompute": (0, 5)}
    with dask.config.set({"optimization.fuse.active": False}):
        assert limits_of(z) == {"add": (2, 3), "mul": (1, 4)}


@pytest.mark.parametrize("first", [True, False])
def test_functions_of_the_key_see_that_of_the_fused_task(first: bool) -> None:
    def by_index(key: Any) -> int:
        return 3 + int(key[1])

    x = da.ones(4, chunks=2)
    with dask.annotate(**({"retries": by_index} if first else {})):
        y = x + 1
    with dask.annotate(**({} if first else {"retries": by_index})):
        z = y * 2
    asked = graph.request((z,), optimize_graph=True)
    assert asked is not None
    found: dict[Any, Limits] = graph.ingest(asked.graph, graph.flat(asked.keys)).limits
    assert {key[1]: limits.retries for key, limits in found.items()} == {0: 3, 1: 4}


def test_a_fused_task_has_the_sum_of_the_timeouts_if_all_have_one() -> None:
    with dask.annotate(timeout=3):
        y = da.ones(4, chunks=2) + 1
    with dask.annotate(timeout=4):
        z = y * 2
    # Of which Dask has fused the first two with rules of its own.
    assert limits_of(z, timeout=100) == {
        "add-mul": (0, 10),
        "finalize-hlgfinalizecompute": (0, 100),
    }


def test_bags_are_fused_as_well() -> None:
    with dask.annotate(retries=2, timeout=1):
        bag = db.from_sequence(range(4), npartitions=2).map(inc)
    assert limits_of(bag.map(inc)) == {"from_sequence-inc": (2, None)}
    assert limits_of(bag.map(inc), optimize_graph=False) == {"inc": (2, 1)}


def test_what_dask_marks_as_not_annotated_is_not() -> None:
    with dask.annotate(retries=lambda _: Expr._annotations_tombstone()):
        x = delayed(inc)(1, dask_key_name="x")
    assert limits_of(x) == {}


def test_what_was_fused_before_keeps_its_annotations() -> None:
    with dask.annotate(retries=3):
        x = da.ones(4, chunks=2).map_blocks(inc).to_delayed()
    found = limits_of(x[0])
    assert list(found.values()) == [(3, None)]


def test_functions_that_dask_cannot_compare() -> None:
    with dask.annotate(retries=lambda _: 1):
        x = da.ones(4, chunks=2).map_blocks(inc)
    with pytest.raises(GraphError, match="annotate them with values, or compute with optimize"):
        limits_of(x)
    assert set(limits_of(x, optimize_graph=False).values()) == {(1, None)}


@pytest.mark.parametrize("fused", [True, False])
def test_a_shuffle_over_a_disk_is_refused(fused: bool) -> None:
    bag = db.from_sequence(range(6), npartitions=2).map(inc)
    found = bag.groupby(lambda v: v % 2, shuffle="disk")
    collection = found.map(len) if fused else found
    with pytest.raises(GraphError, match="shuffles over a disk, and executors have none in common"):
        limits_of(collection)
    frame = dd.from_pandas(pd.DataFrame({"a": range(4)}), npartitions=2)
    with pytest.raises(GraphError, match="shuffle_method='tasks'"):
        limits_of(frame.shuffle("a", shuffle_method="disk"))


@pytest.mark.parametrize("several", [False, True])
def test_delayed_objects_are_not_optimised_before_they_are_culled(
    monkeypatch: pytest.MonkeyPatch, *, several: bool
) -> None:
    """Dask would only cull them as well, which takes longer than planning."""
    a = delayed(add)(1, 2)
    wanted = (delayed(add)(a, 3), delayed(add)(a, 4))[: 1 + several]
    given: list[Any] = []

    def get(dsk: Any, keys: Any, **_: Any) -> Any:
        given.append(graph.unculled(dsk))
        return run(graph.ingest(dsk, graph.flat(keys)), keys)

    monkeypatch.setattr(HighLevelGraph, "cull", None)
    assert dask.compute(*wanted, scheduler=get) == (6, 7)[: 1 + several]
    (layers,) = given
    assert isinstance(layers, HighLevelGraph)


def test_delayed_objects_are_fused_if_that_is_asked_for() -> None:
    x = delayed(add)(delayed(add)(1, 2), 3)

    def get(dsk: Any, keys: Any, **_: Any) -> Any:
        found = graph.ingest(dsk, graph.flat(keys))
        assert len(found.nodes) == 1
        return run(found, keys)

    with dask.config.set({"optimization.fuse.delayed": True}):
        assert x.compute(scheduler=get) == 6
        request = graph.request([x], optimize_graph=True)
        assert request is not None
        assert len(graph.ingest(request.graph, graph.flat(request.keys)).nodes) == 1


@pytest.mark.parametrize(
    ("task", "takes"),
    [
        (Task("k", add, TaskRef("x"), TaskRef("x")), "SS"),
        (Task("k", add, TaskRef("x"), 1), "SC"),
        (Task("k", add, "a", b"b"), "CC"),
        (Task("k", sum, List(TaskRef("x"), TaskRef("x"))), "L"),
        (Task("k", abs), ""),
        (Task("k", sum, List(TaskRef("x"), 1)), None),
        (Task("k", add, [1], 2), None),
        (Task("k", add, "a" * 1000, 2), None),
        (Task("k", add, 1, key=2), None),
        (Task("k", add, Task("inner", abs, 1), 2), None),
        (Task(("k", 1.5), add, 1, 2), None),
        (Task(("k", 1), add, 1, 2), "CC"),
    ],
)
def test_tasks_that_are_mere_calls(task: Any, takes: str | None) -> None:
    dsk = {"x": Task("x", abs, -1), task.key: task}
    found = graph.ingest(dsk, [task.key])
    (call,) = graph.calls_of(found, [task.key], {"x": 7}, {})
    assert (call and call[1]) == takes
