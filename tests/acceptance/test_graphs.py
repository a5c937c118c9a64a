"""Whatever Dask hands over gives what Dask's synchronous scheduler gives."""

from __future__ import annotations

import asyncio
import operator
import warnings
from collections.abc import Callable
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask import delayed
from dask._task_spec import Alias, DataNode, Task, TaskRef

from tests.acceptance.functions import (
    Model,
    add,
    add_lengths,
    fails,
    identity,
    inc,
    predict,
    returns_none,
)
from wukong_async import LocalCluster, WukongClient


def tree(leaves: int) -> Any:
    level: list[Any] = list(range(leaves))
    while len(level) > 1:
        level = list(map(delayed(operator.add), level[0::2], level[1::2]))
    return level[0]


def frame() -> Any:
    data = pd.DataFrame({"k": list("abcab") * 20, "v": range(100), "w": np.arange(100) / 3})
    return dd.from_pandas(data, npartitions=5)


def left_and_right() -> Any:
    left = frame()
    right = dd.from_pandas(pd.DataFrame({"k": list("abc"), "z": [1, 2, 3]}), npartitions=2)
    return left.merge(right, on="k").z.sum()


def ones(size: int, chunk: int) -> Any:
    return da.random.RandomState(0).random_sample((size, size), chunks=chunk)


COLLECTIONS: dict[str, Callable[[], Any]] = {
    "delayed": lambda: delayed(inc)(1),
    "delayed with keywords": lambda: delayed(dict)(a=delayed(inc)(1), b=[delayed(inc)(2)]),
    "tree reduction": lambda: tree(256),
    "array sum": lambda: ones(200, 50).sum(),
    "array": lambda: ones(60, 20) + 1,
    "array slices": lambda: ones(90, 30)[5:70:3, ::-1],
    "matrix product": lambda: ones(120, 40) @ ones(120, 60).rechunk(40),
    "svd": lambda: da.linalg.svd(
        da.random.RandomState(1).random_sample((400, 10), chunks=(100, 10))
    )[1],
    "qr": lambda: da.linalg.qr(da.random.RandomState(1).random_sample((400, 10), chunks=(100, 10)))[
        1
    ],
    "rechunk": lambda: ones(60, 10).rechunk((60, 5)).sum(axis=0),
    "array from memory": lambda: da.from_array(np.arange(10_000.0), chunks=1000).cumsum(axis=0),
    "from large memory": lambda: da.from_array(np.arange(300_000.0), chunks=50_000).sum(),
    "data frame groupby": lambda: frame().groupby("k").v.mean(),
    "data frame": lambda: frame()[frame().v > 30],
    "data frame merge": left_and_right,
    "data frame shuffle": lambda: frame().set_index("w").v.cumsum(),
    "bag": lambda: db.from_sequence(range(100), npartitions=7).map(inc).filter(lambda x: x % 2),
    "bag fold": lambda: db.from_sequence(range(100), npartitions=7).fold(operator.add),
    "bag of text": lambda: (
        db.from_sequence(["a b", "b c"] * 10).str.split().flatten().frequencies()
    ),
}


def same(found: Any, expected: Any) -> None:
    match expected:
        case pd.DataFrame():
            pd.testing.assert_frame_equal(found, expected)
        case pd.Series():
            pd.testing.assert_series_equal(found, expected)
        case np.ndarray() | np.generic():
            np.testing.assert_allclose(found, expected)
            assert type(found) is type(expected)
        case _:
            assert found == expected


@pytest.mark.parametrize("name", COLLECTIONS)
async def test_collections(client: WukongClient, name: str) -> None:
    collection = COLLECTIONS[name]()
    expected = collection.compute(scheduler="sync")
    same(await client.compute(collection), expected)
    same(await asyncio.to_thread(collection.compute, scheduler=client.get), expected)


@pytest.mark.parametrize("name", COLLECTIONS)
async def test_collections_when_hardly_anything_fits_into_a_block(
    cluster: LocalCluster, name: str
) -> None:
    collection = COLLECTIONS[name]()
    tiny: dict[str, Any] = {"block_size": 300, "inline_limit": 10, "part_size": 1000}
    async with WukongClient(cluster, **tiny) as client:
        same(await client.compute(collection), collection.compute(scheduler="sync"))


async def test_results_are_writable_as_they_are_in_dask(client: WukongClient) -> None:
    found = await client.compute(da.ones((300, 300), chunks=100))
    found[0, 0] = 5
    assert found.sum() == 90_004


GRAPHS: dict[str, tuple[dict[Any, Any], Any]] = {
    "one task": ({"a": (inc, 1)}, "a"),
    "legacy tuples": ({"a": 1, "b": (inc, "a"), "c": (add, "a", "b")}, "c"),
    "nested tuples and lists": (
        {"a": 1, "b": (add, (inc, "a"), (inc, (inc, "a"))), "c": [["a", "b"], (inc, "b")]},
        "c",
    ),
    "task-spec nodes": (
        {"a": DataNode("a", 1), "b": Task("b", inc, TaskRef("a")), "c": Alias("c", "b")},
        ["a", "b", "c"],
    ),
    "aliases": ({"a": (inc, 1), "b": "a", "c": "b", "d": (add, "b", "c", "a")}, ["d", "c"]),
    "nested keys": (
        {("x", i): (inc, i) for i in range(4)},
        [[("x", 0), ("x", 1)], [[("x", 2)], ("x", 3)]],
    ),
    "inner keys": ({"a": (inc, 1), "b": (inc, "a"), "c": (inc, "b")}, ["a", "b", "c"]),
    "the same key twice": ({"a": (inc, 1)}, ["a", "a"]),
    "literals only": ({"a": 1, "b": None, "c": "text"}, ["a", "b", "c"]),
    "a literal and a task": ({"a": 1, "b": (inc, "a")}, ["a", "b"]),
    "the same input twice": ({"a": (inc, 1), "b": (add, "a", "a")}, "b"),
    "None everywhere": (
        {"a": (returns_none,), "b": (returns_none, "a"), "c": (identity, "b")},
        ["a", "c"],
    ),
    "exceptions as values": (
        {"a": (identity, ValueError), "b": (identity, "a"), "c": (str, (KeyError, "k"))},
        ["b", "c"],
    ),
    "values that are names of keys": (
        {
            "b": (inc, 1),
            "a": (lambda text, _: text.lower(), "B", "b"),
            "c": (identity, "a"),
            "d": (list, ["a", "b", "c"]),
        },
        ["a", "b", "c", "d"],
    ),
    "an alias that is named like a value": (
        {"a": (str.lower, "D"), "b": "a", "d": (str.upper, "b")},
        ["a", "b", "d"],
    ),
    "None in a fan-in": (
        {f"n{i}": (returns_none,) for i in range(10)}
        | {"all": (list, [f"n{i}" for i in range(10)]), "none": (returns_none, "all")},
        ["all", "none", "n0", "n9"],
    ),
    "None inside a value": (
        {"a": (dict, [["k", None]]), "b": (dict.get, "a", "k"), "c": (identity, "b")},
        ["a", "b", "c"],
    ),
    "integer and float keys": ({1: 5, 2.5: (inc, 1)}, 2.5),
    "no keys": ({"a": 1}, []),
    "an empty graph": ({}, []),
    "several outputs": ({f"x{i}": (inc, i) for i in range(30)}, [f"x{i}" for i in range(30)]),
    "a diamond": (
        {"a": (inc, 1), "b": (inc, "a"), "c": (inc, "a"), "d": (add, "b", "c", "a")},
        "d",
    ),
    "fan-out, fan-in": (
        {"a": (inc, 1)}
        | {f"b{i}": (add, "a", i) for i in range(50)}
        | {"c": (add, *(f"b{i}" for i in range(50)))},
        "c",
    ),
    "what is not needed may fail": ({"a": (inc, 1), "b": (fails,), "c": (inc, "b")}, "a"),
}


@pytest.mark.parametrize("name", GRAPHS)
async def test_graphs(client: WukongClient, name: str) -> None:
    dsk, keys = GRAPHS[name]
    expected = dask.get(dsk, keys)
    assert await client.compute(dsk, keys) == expected
    assert await client.compute(dsk, keys=keys) == expected
    assert await asyncio.to_thread(client.get, dsk, keys) == expected


async def test_an_exception_that_is_returned_is_a_value(client: WukongClient) -> None:
    # Two leaves in two executors, so that one of them crosses the store.
    dsk = {
        "made": (ValueError, "one", 1),
        "given": ValueError("two", 2),
        "other": (identity, "given"),
        "both": (identity, ["made", "other"]),
    }
    both, made, given, other = await client.compute(dsk, ["both", "made", "given", "other"])
    for found, arguments in zip(
        [*both, made, given, other],
        [("one", 1), ("two", 2), ("one", 1), ("two", 2), ("two", 2)],
        strict=True,
    ):
        assert type(found) is ValueError
        assert found.args == arguments
    assert await client.compute({"a": (type, (RuntimeError, "x"))}, "a") is RuntimeError


async def test_a_string_that_equals_a_key_stays_a_string(client: WukongClient) -> None:
    key = delayed(inc)(1).key
    dsk = {key: Task(key, inc, 1), "b": Task("b", identity, key), "c": Task("c", len, TaskRef("b"))}
    assert await client.compute(dsk, ["b", "c"]) == dask.get(dsk, ["b", "c"]) == (key, len(key))
    inner = delayed(inc)(1, dask_key_name="shared-name")
    outer = delayed(add)(inner, delayed(len)("shared-name"))
    assert await client.compute(outer) == 2 + len("shared-name")


@pytest.mark.parametrize("size", [0, 1, 16_300, 16_384, 16_385, 17_000, 5_000_000])
async def test_sizes_around_the_limit(client: WukongClient, size: int) -> None:
    # Two leaves in two executors, so that the values cross the store.
    x, y = delayed(bytes)(size), delayed(bytes)(size)
    both = delayed(add_lengths)(x, y)
    assert await client.compute(both, x) == (2 * size, bytes(size))


async def test_values_in_many_parts(cluster: Any) -> None:
    async with WukongClient(cluster, part_size=10_000) as client:
        x = da.random.RandomState(0).random_sample((300, 300), chunks=100)
        np.testing.assert_array_equal(await client.compute(x), x.compute(scheduler="sync"))


@pytest.mark.parametrize("width", [1, 2, 8, 9, 10, 16, 17, 18, 24, 25, 26, 32, 33, 34, 64, 65])
async def test_fan_ins_of_all_widths(client: WukongClient, width: int) -> None:
    assert await client.compute(delayed(add)(*(delayed(inc)(i) for i in range(width)))) == sum(
        range(1, width + 1)
    )


async def test_a_wide_fan_in(spread: WukongClient) -> None:
    leaves = [delayed(inc)(i) for i in range(5000)]
    assert await spread.compute(delayed(sum)(leaves)) == sum(range(1, 5001))
    assert spread.history[-1].commits == 3


async def test_a_wide_round_of_small_outputs(client: WukongClient) -> None:
    # 48 MB in values that would each fit into a commit.
    leaves = [delayed(bytes)(16_000) for _ in range(3000)]
    assert await client.compute(delayed(add_lengths)(*leaves)) == 48_000_000


async def test_functions_of_all_kinds(client: WukongClient) -> None:
    offset = 10

    def closure(x: int) -> int:
        return x + offset

    class Callable_:  # noqa: N801
        def __call__(self, x: int) -> int:
            return x + offset

    functions = [closure, lambda x: x * 2, Callable_(), inc, operator.neg, abs]
    found = await client.compute(*(delayed(f)(5) for f in functions))
    assert found == (15, 10, 15, 6, -5, 5)


async def test_classes_of_this_process_come_back_as_themselves(client: WukongClient) -> None:
    class Local:
        def __init__(self, x: int) -> None:
            self.x = x

    found = await client.compute(delayed(Local)(delayed(inc)(1)))
    assert type(found) is Local
    assert found.x == 2


async def test_mixed_collections(client: WukongClient) -> None:
    x = da.ones(10, chunks=5).sum()
    y = delayed(inc)(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert await client.compute(x, y, {"z": [y, 3]}, 7) == (10.0, 2, {"z": [2, 3]}, 7)


async def test_one_container_is_one_result(client: WukongClient) -> None:
    assert await client.compute([delayed(inc)(1), delayed(inc)(2)]) == [2, 3]
    assert await client.compute({"a": delayed(inc)(1)}) == {"a": 2}
    assert await client.compute(5) == 5
    assert await client.compute("text", 5) == ("text", 5)


async def test_a_graph_without_keys_gives_its_sinks(client: WukongClient) -> None:
    dsk = {"a": (inc, 1), "b": (inc, "a"), "c": (inc, "a")}
    assert await client.compute(dsk) == {"b": 3, "c": 3}
    assert await client.compute({}) == {}
    x = da.ones(4, chunks=2)
    found = await client.compute(x.sum().__dask_graph__())
    assert list(found.values()) == [4.0]


async def test_graph_optimisation_can_be_left_out(client: WukongClient) -> None:
    x = (da.ones(100, chunks=10) + 1) * 2
    await client.compute(x)
    optimised = client.history[-1].tasks
    np.testing.assert_array_equal(await client.compute(x, optimize_graph=False), np.full(100, 4.0))
    assert client.history[-1].tasks > optimised


async def test_a_bag_is_shuffled_through_the_store(client: WukongClient) -> None:
    bag = db.range(1000, 8).groupby(lambda x: x % 10).map(lambda kv: (kv[0], len(kv[1])))
    assert sorted(await client.compute(bag)) == [(i, 100) for i in range(10)]


async def test_iterators_in_a_graph_are_left_alone(client: WukongClient) -> None:
    assert await client.compute({"a": (list, iter([1, 2, 3]))}, "a") == [1, 2, 3]


async def test_a_literal_of_unknown_weight_travels_once(
    client: WukongClient, cluster: LocalCluster
) -> None:
    model = delayed(Model(500_000), pure=False)
    before = cluster.stats().store_bytes_in
    total = delayed(sum)([delayed(predict)(model, i) for i in range(40)])
    assert await client.compute(total) == 40 * 500_000 + sum(range(40))
    assert cluster.stats().store_bytes_in - before < 1_000_000


async def test_two_containers_of_collections_are_no_graph(client: WukongClient) -> None:
    one, two = delayed(inc)(1), delayed(inc)(2)
    assert await client.compute({"a": one}, {"b": two}) == ({"a": 2}, {"b": 3})
    assert await client.compute({"a": one}, [two]) == ({"a": 2}, [3])
