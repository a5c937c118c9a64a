"""Several tasks at once in one executor: the same results, the same promises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from dask import delayed

from tests.acceptance.functions import add, fails, inc, inc_slowly, sleep_through, touch_and_wait
from tests.acceptance.test_graphs import COLLECTIONS, same
from tests.conftest import keys_of
from wukong_async import LocalCluster, WukongClient
from wukong_async.errors import TaskTimeout


@pytest.fixture(scope="module")
def threaded() -> Iterator[LocalCluster]:
    with LocalCluster(1, threads_per_executor=3) as cluster:
        yield cluster
        assert keys_of(cluster) == []


def pair(directory: Path, *values: int) -> Any:
    """Two tasks each of which ends only once the other one has begun."""
    left, right = str(directory / "left"), str(directory / "right")
    one = delayed(touch_and_wait)(left, right, *values)
    other = delayed(touch_and_wait)(right, left, *values)
    return one, other


async def test_two_tasks_that_wait_for_each_other_in_one_sandbox(
    threaded: LocalCluster, tmp_path: Path
) -> None:
    async with WukongClient(threaded) as client:
        assert await client.compute(delayed(add)(*pair(tmp_path, 4))) == 8
        assert client.history[-1].begins == 1, "in one executor"


async def test_a_client_that_wants_more_at_once(tmp_path: Path) -> None:
    with LocalCluster(1) as cluster:
        assert cluster.threads_per_executor == 1
        async with WukongClient(cluster, threads_per_executor=2) as client:
            assert await client.compute(delayed(add)(*pair(tmp_path, 1))) == 2


def test_a_cluster_takes_what_is_configured() -> None:
    with dask.config.set({"wukong.threads_per_executor": 5}):
        assert LocalCluster(1).threads_per_executor == 5
        assert LocalCluster(1, threads_per_executor=2).threads_per_executor == 2


@pytest.mark.parametrize("name", COLLECTIONS)
async def test_collections(threaded: LocalCluster, name: str) -> None:
    collection = COLLECTIONS[name]()
    async with WukongClient(threaded) as client:
        same(await client.compute(collection), collection.compute(scheduler="sync"))


async def test_collections_with_several_executors_of_several_threads() -> None:
    with LocalCluster(2, threads_per_executor=3) as cluster:
        async with WukongClient(cluster, leaf_batch=2, hold=0) as client:
            for make in COLLECTIONS.values():
                collection = make()
                same(await client.compute(collection), collection.compute(scheduler="sync"))
        assert keys_of(cluster) == []


async def test_a_task_that_fails_ends_the_others(threaded: LocalCluster, tmp_path: Path) -> None:
    never = delayed(touch_and_wait)(str(tmp_path / "begun"), str(tmp_path / "never"))
    async with WukongClient(threaded) as client:
        with pytest.raises(ValueError, match="on purpose"):
            await client.compute(delayed(add)(never, delayed(fails)()))
        assert await client.compute(delayed(inc)(1)) == 2, "the sandbox goes on"
    (tmp_path / "never").touch()


async def test_a_task_that_takes_too_long_beside_others(
    threaded: LocalCluster, tmp_path: Path
) -> None:
    never = tmp_path / "never"
    with dask.annotate(timeout=0.5):
        slow = delayed(touch_and_wait)(str(tmp_path / "begun"), str(never))
    others = [delayed(inc)(i) for i in range(20)]
    async with WukongClient(threaded) as client:
        with pytest.raises(TaskTimeout):
            await client.compute(delayed(add)(slow, *others), optimize_graph=False)
        assert await client.compute(delayed(add)(*others)) == sum(range(1, 21))
    never.touch()


async def test_a_job_of_several_threads_outlasts_the_function() -> None:
    with LocalCluster(1, timeout=4.0, threads_per_executor=2) as cluster:
        root = delayed(inc_slowly)(0, 0.1)
        middle = [delayed(inc_slowly)(root, 0.5) for _ in range(14)]
        long = [delayed(sleep_through)(i, 2.4) for i in range(3)]
        async with WukongClient(cluster) as client:
            assert await client.compute(delayed(add)(*middle, *long, root)) == 14 * 2 + 3 + 1
            assert client.history[-1].begins >= 2
        assert keys_of(cluster) == []
