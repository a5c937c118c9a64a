"""Jobs that outlast the function's time, and a task that does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from dask import delayed

from tests.acceptance.functions import add, inc_slowly, sleep_through
from tests.conftest import keys_of
from wukong_async import LocalCluster, WukongClient
from wukong_async.errors import TaskTimeout

TIMEOUT = 5.0


@pytest.fixture
def short_lived() -> Iterator[LocalCluster]:
    """Sandboxes that are killed when an invocation takes long.

    For one test: their connections, over which they invoke, end with them.
    """
    with LocalCluster(2, timeout=TIMEOUT) as cluster:
        yield cluster
        assert keys_of(cluster) == []


def chain(length: int, seconds: float) -> Any:
    value = delayed(0)
    for _ in range(length):
        value = delayed(inc_slowly)(value, seconds)
    return value


async def test_a_chain_of_tasks_outlasts_the_function(short_lived: LocalCluster) -> None:
    async with WukongClient(short_lived) as client:
        assert await client.compute(chain(20, TIMEOUT / 10)) == 20
        summary = client.history[-1]
    assert summary.begins >= 3
    assert summary.commits == summary.begins
    # It is for the executor to invoke itself: the watcher would take until the grace is over.
    assert summary.invocations < summary.begins


async def test_a_fan_out_that_is_cut_short_goes_on(short_lived: LocalCluster) -> None:
    root = delayed(inc_slowly)(0, 0.1)
    middle = [delayed(inc_slowly)(root, TIMEOUT / 8) for _ in range(12)]
    async with WukongClient(short_lived) as client:
        assert await client.compute(delayed(add)(*middle, root)) == 12 * 2 + 1
        assert client.history[-1].begins >= 2


async def test_what_runs_at_the_end_is_run_again_from_its_start(short_lived: LocalCluster) -> None:
    tasks = [delayed(sleep_through)(i, TIMEOUT * 0.6) for i in range(4)]
    async with WukongClient(short_lived) as client:
        assert await client.compute(delayed(add)(*tasks)) == 6
        assert client.history[-1].begins >= 4


@pytest.mark.parametrize("task", [inc_slowly, sleep_through])
async def test_a_task_that_takes_all_of_the_functions_time(
    short_lived: LocalCluster, task: Any
) -> None:
    async with WukongClient(short_lived) as client:
        with pytest.raises(TaskTimeout, match=r"Task 'endless' did not end within the 5 s") as info:
            await client.compute(delayed(task)(0, 60.0, dask_key_name="endless"))
    assert task.__name__ in str(info.value.__cause__)
