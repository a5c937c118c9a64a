"""Executors share what is worth it, and hold what they have within bounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from dask import delayed

from tests.acceptance.functions import add, inc, touch_and_wait
from wukong_async import LocalCluster, WukongClient, wire
from wukong_async.store import Connections, JobStore


def meet(directory: str, me: str, other: str) -> str:
    """Wait for another task that runs at the same time."""
    Path(directory, me).touch()
    while not Path(directory, other).exists():
        time.sleep(0.002)
    return me


def meet_once(directory: str, me: str, other: str) -> str:
    """The same, under a name that other jobs do not have: they may still write what they saw."""
    return meet(directory, me, other)


def meeting(tmp_path: Path, function: Callable[..., str] = meet) -> Any:
    """Two tasks of which none ends before the other one has begun."""
    names = [delayed(function)(str(tmp_path), *pair) for pair in (("a", "b"), ("b", "a"))]
    return delayed(sorted)(names)


async def test_an_executor_gives_away_what_waits_too_long(
    client: WukongClient, tmp_path: Path
) -> None:
    assert await client.compute(meeting(tmp_path)) == ["a", "b"]
    assert client.history[-1].begins >= 2
    assert client.history[-1].invocations == 1, "the client has started one"


@pytest.mark.parametrize(("slots", "threads"), [(2, 1), (1, 2)])
async def test_what_was_to_be_quick_does_not_hold_up_others(
    tmp_path: Path, slots: int, threads: int
) -> None:
    def waits(touched: str, awaited: str, value: object) -> Any:
        paths = str(tmp_path / touched), str(tmp_path / awaited)
        return delayed(touch_and_wait)(*paths, value)

    known = delayed(add)(*[waits(f"quick {i}", f"quick {i}", i) for i in range(20)])
    # Each ends when the other one has begun, and by what is known of them they are to run together.
    pair = waits("left", "right", known), waits("right", "left", known)
    with LocalCluster(slots, threads_per_executor=threads) as cluster:
        async with WukongClient(cluster) as client:
            assert await client.compute(delayed(add)(*pair)) == 2 * sum(range(20))
            assert client.history[-1].begins >= slots


class Touchy:
    """Does not pickle while something happens to it: at the first two tries."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def __reduce__(self) -> Any:
        with self.path.open("a") as file:
            file.write("x")
        if len(self.path.read_text()) <= 2:
            raise RuntimeError("dictionary changed size during iteration")
        return Touchy, (str(self.path),)


def look_at(touchy: Touchy, seconds: float) -> int:
    time.sleep(seconds)
    return len(touchy.path.name)


async def test_what_does_not_pickle_while_a_task_reads_it_is_pickled_afterwards(
    tmp_path: Path,
) -> None:
    touchy = delayed(Touchy)(str(tmp_path / "log"))
    readers = [delayed(look_at)(touchy, seconds) for seconds in (0.3, 0.0, 0.0)]
    with LocalCluster(2) as cluster:
        async with WukongClient(cluster, hold=0) as client:
            assert await client.compute(delayed(add)(*readers)) == 9
    assert len((tmp_path / "log").read_text()) >= 3


async def test_what_is_trivial_stays_with_one(client: WukongClient) -> None:
    total = delayed(sum)([delayed(inc)(i) for i in range(50)])
    for _ in range(2):  # The first time it may have to import something.
        assert await client.compute(total) == sum(range(1, 51))
    assert client.history[-1].begins == 1
    assert client.history[-1].commits == 1


async def test_what_is_remembered_decides_how_many_begin(
    client: WukongClient, cluster: LocalCluster, tmp_path: Path
) -> None:
    endpoints = cluster.settings["redis_endpoints"]
    async with Connections(endpoints, 10) as connections:
        seen = {"meet_once": [4, 5.0, 50.0]}
        await JobStore(connections, "any").remember(seen)
        other = JobStore(connections, "other")
        assert await other.open(600, ["meet_once", "unknown"]) == seen
        assert await other.finish()
        assert await client.compute(meeting(tmp_path, meet_once)) == ["a", "b"]
        assert client.history[-1].invocations == 2
        for key in await connections.command(0, "KEYS", "wukong:seen:*"):
            assert 0 < await connections.command(0, "PTTL", key) <= 7 * 24 * 3600 * 1000
            await connections.command(0, "DEL", key)


async def test_one_invocation_for_each_leaf_and_edge(cluster: LocalCluster) -> None:
    """How the Wukong paper does it."""
    x = da.ones((60, 60), chunks=20)
    expected = (x @ x.T).sum().compute(scheduler="synchronous")
    async with WukongClient(cluster, leaf_batch=1, hold=0, max_concurrency=20) as client:
        assert await client.compute((x @ x.T).sum()) == expected
        assert client.history[-1].invocations > 2


def filled(index: int) -> Any:
    return np.full(20_000_000 // 8, float(index))


def ends(first: Any, last: Any) -> float:
    return float(first[0] + last[-1])


def test_more_than_fits_into_the_memory() -> None:
    """40 arrays of 20 MB, all of which are read first and last, by a function that has 400 MB."""
    arrays = [delayed(filled)(i) for i in range(40)]
    first = [delayed(ends)(arrays[i], arrays[i - 1]) for i in range(40)]
    last = [delayed(ends)(arrays[i], arrays[-1 - i]) for i in range(40)]
    total = delayed(sum)([delayed(sum)(first), *last])
    expected = total.compute(scheduler="synchronous")
    with LocalCluster(1, memory_size=400) as cluster, WukongClient(cluster) as client:
        assert client.compute(total) == expected
        summary = client.history[-1]
        assert cluster.stats().out_of_memory == 0
        assert summary.begins == 1
        assert 200 < summary.executor_memory_mb < 400
        assert summary.store_peak_bytes > 20_000_000, "what did not fit was there meanwhile"
        assert summary.store_peak_bytes <= 40 * 20_000_400


async def test_the_store_keeps_what_is_needed_and_no_more(cluster: LocalCluster) -> None:
    """A chain of large values, each of which is needed by the next one only."""
    x: Any = delayed(filled)(0)
    for _ in range(10):
        x = delayed(np.add)(x, 1.0)
    async with WukongClient(cluster, leaf_batch=1, hold=0) as client:
        assert await client.compute(delayed(ends)(x, x)) == 20.0
        assert client.history[-1].store_peak_bytes <= 2 * 20_000_400


async def test_what_is_remembered_may_be_anything(
    client: WukongClient, cluster: LocalCluster
) -> None:
    """Another version has written it, or somebody else."""
    endpoints = cluster.settings["redis_endpoints"]
    total = delayed(sum)([delayed(inc)(i) for i in range(20)])
    for found in (b"", b"\xc1", b"\x93\x01\x02", wire.pack([1]), wire.pack([0.0] * 4), b"\xc0"):
        async with Connections(endpoints, 10) as connections:
            for name in ("", "inc", "sum"):
                await connections.command(0, "SET", f"wukong:seen:{name}", found)
        assert await client.compute(total) == sum(range(1, 21))


async def test_keys_that_cannot_be_remembered(client: WukongClient) -> None:
    strange = ["\udc80", "x" * 10_000, "a\nb", "ü-1", ("t\x00", 1)]
    graph: dict[Any, Any] = {key: (inc, i) for i, key in enumerate(strange)}
    assert await client.compute(graph, strange) == tuple(range(1, 6))


def many(index: int) -> Any:
    """30 arrays of 1 MB, each of which goes its own way."""
    return [np.full(131_072, index * 100.0 + j) for j in range(30)]


def pick(arrays: Any, index: int) -> Any:
    return arrays[index]


def total_of(*arrays: Any) -> float:
    return float(sum(array[0] for array in arrays))


def test_memory_that_is_freed_in_pieces() -> None:
    """All to all: the heap is full of holes, which the C library would keep."""
    sources = [delayed(many)(i) for i in range(30)]
    sums = [delayed(total_of)(*(delayed(pick)(s, j) for s in sources)) for j in range(30)]
    total = delayed(sum)(sums)
    expected = total.compute(scheduler="synchronous")
    with LocalCluster(1, memory_size=500) as cluster, WukongClient(cluster) as client:
        assert client.compute(total) == expected
        assert cluster.stats().out_of_memory == 0
