"""Tasks that are tried again, and tasks that take too long."""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask import delayed

from tests.acceptance.functions import add, identity, inc
from tests.conftest import eventually
from wukong_async import LocalCluster, WukongClient
from wukong_async.errors import ConfigError, GraphError, JobError, TaskTimeout

LONG = 60
"""Seconds: a test that waits for it fails."""


class Flaky(Exception):
    """Raised by a task that has not been tried often enough."""


@pytest.fixture
def flaky(tmp_path: Path) -> Callable[..., Any]:
    """A function that fails, in all processes together, until it is called the nth time."""

    def call(value: Any, *, works: int, name: str = "tries", how: str = "raise") -> Any:
        path = tmp_path / name
        with path.open("a") as file:
            file.write("x")
        if len(path.read_text()) >= works:
            return value
        match how:
            case "raise":
                raise Flaky(f"try {len(path.read_text())}")
            case "exit":
                raise SystemExit(3)
            case "sleep":
                time.sleep(2)
            case "loop":
                while True:
                    pass
        return "too late"

    return call


def tries(path: Path, name: str = "tries") -> int:
    return len((path / name).read_text())


# Retries ------------------------------------------------------------------------------------------


async def test_a_task_is_run_again_until_it_works(
    client: WukongClient, flaky: Callable[..., Any], tmp_path: Path
) -> None:
    with dask.annotate(retries=2):
        x = delayed(flaky)(1, works=3)
    assert await client.compute(delayed(inc)(x)) == 2
    assert tries(tmp_path) == 3
    assert client.history[-1].begins == 1, "in the executor that it is in"


async def test_the_last_exception_is_raised_and_says_how_many_there_were(
    client: WukongClient, flaky: Callable[..., Any], tmp_path: Path
) -> None:
    with dask.annotate(retries=2):
        x = delayed(flaky)(1, works=9, dask_key_name="flaky")
    with pytest.raises(Flaky, match="try 3") as caught:
        await client.compute(x)
    assert tries(tmp_path) == 3
    assert "task 'flaky' failed" in caught.value.__notes__[0]
    assert caught.value.__notes__[0].endswith("in the last of 3 tries")
    assert "raise Flaky" in "".join(traceback.format_exception(caught.value))


async def test_only_the_annotated_layer_is_tried_again(
    client: WukongClient, flaky: Callable[..., Any], tmp_path: Path
) -> None:
    with dask.annotate(retries=1):
        x = delayed(flaky)(1, works=2, name="annotated")
    y = delayed(flaky)(x, works=2, name="plain")
    with pytest.raises(Flaky, match="try 1"):
        await client.compute(y)
    assert (tries(tmp_path, "annotated"), tries(tmp_path, "plain")) == (2, 1)


async def test_an_annotation_wins_over_the_call(
    client: WukongClient, flaky: Callable[..., Any], tmp_path: Path
) -> None:
    with dask.annotate(retries=0):
        x = delayed(flaky)(1, works=2, name="annotated")
    y = delayed(flaky)(1, works=2, name="plain")
    assert await client.compute(y, retries=1) == 1
    with pytest.raises(Flaky, match="try 1"):
        await client.compute(x, retries=1)


@pytest.mark.parametrize("graph", [False, True])
async def test_a_graph_has_the_retries_of_its_call(
    client: WukongClient, flaky: Callable[..., Any], graph: bool
) -> None:
    task = (dask.utils.apply, flaky, [1], {"works": 2})
    if graph:
        assert await client.compute({"a": task}, "a", retries=1) == 1
    else:
        assert await asyncio.to_thread(client.get, {"a": task}, "a", retries=1) == 1


async def test_dask_passes_retries_on(client: WukongClient, flaky: Callable[..., Any]) -> None:
    x = delayed(flaky)(1, works=2, name="first")
    with dask.annotate(retries=2):
        y = delayed(flaky)(2, works=3, name="second")
    compute = delayed(add)(x, y).compute
    assert await asyncio.to_thread(compute, scheduler=client.get, retries=1) == 3


@pytest.mark.parametrize("how", ["async", "get"])
async def test_what_is_annotated_around_a_call_holds_for_all_of_its_tasks(
    client: WukongClient, flaky: Callable[..., Any], how: str
) -> None:
    frame = dd.from_pandas(pd.DataFrame({"a": range(4)}), npartitions=2)
    counted = frame.map_partitions(flaky, works=2, meta=frame._meta)
    with dask.annotate(retries=1):
        if how == "async":
            found = await client.compute(counted)
        else:
            found = await asyncio.to_thread(counted.compute, scheduler=client.get)
    assert found.a.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("optimize_graph", [True, False])
async def test_arrays_keep_their_annotations(
    client: WukongClient, flaky: Callable[..., Any], optimize_graph: bool
) -> None:
    x = da.ones(4, chunks=2)
    with dask.annotate(retries=1):
        y = (x + 1).map_blocks(flaky, works=2, dtype=float)
    total = (y * 2).sum()
    assert await client.compute(total, optimize_graph=optimize_graph) == 16


@pytest.mark.parametrize("optimize_graph", [True, False])
async def test_bags_keep_their_annotations(
    client: WukongClient, flaky: Callable[..., Any], optimize_graph: bool
) -> None:
    with dask.annotate(retries=1):
        bag = db.from_sequence(range(4), npartitions=2).map(flaky, works=2)
    found = await client.compute(bag.map(inc), optimize_graph=optimize_graph)
    assert found == [1, 2, 3, 4]


async def test_what_dask_hands_to_get_keeps_its_annotations(
    client: WukongClient, flaky: Callable[..., Any]
) -> None:
    with dask.annotate(retries=1):
        y = da.ones(4, chunks=2).map_blocks(flaky, works=2, dtype=float)
        bag = db.from_sequence(range(4), npartitions=2).map(flaky, works=2, name="bag")
    found, listed = await asyncio.to_thread(dask.compute, y + 1, bag, scheduler=client.get)
    np.testing.assert_array_equal(found, 2 * np.ones(4))
    assert listed == [0, 1, 2, 3]


async def test_annotations_may_be_functions_of_the_key(
    client: WukongClient, flaky: Callable[..., Any]
) -> None:
    def second_only(key: Any) -> int:
        return 1 if key == "second" else 0

    with dask.annotate(retries=second_only):
        x = delayed(flaky)(1, works=2, name="x", dask_key_name="first")
        y = delayed(flaky)(1, works=2, name="y", dask_key_name="second")
    assert await client.compute(y) == 1
    with pytest.raises(Flaky, match="try 1"):
        await client.compute(x)


async def test_a_task_that_exits_is_not_tried_again(
    client: WukongClient, flaky: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(JobError, match="SystemExit: 3"):
        await client.compute(delayed(flaky)(1, works=2, how="exit"), retries=5)
    assert tries(tmp_path) == 1


# Timeouts -----------------------------------------------------------------------------------------


def loop_until(path: str) -> None:
    """Byte code, which can be interrupted."""
    try:
        while not Path(path).exists():
            pass
    finally:
        Path(path).touch()


async def test_a_task_that_takes_too_long_is_interrupted(
    client: WukongClient, tmp_path: Path
) -> None:
    end = tmp_path / "end"
    with dask.annotate(timeout=0.2):
        x = delayed(loop_until)(str(end), dask_key_name="slow")
    began = time.monotonic()
    with pytest.raises(TaskTimeout, match=r"'slow' took longer than its timeout of 0\.2 s") as e:
        await client.compute(x)
    assert "dask.annotate(timeout=…)" in str(e.value)
    assert isinstance(e.value, TimeoutError)
    assert isinstance(e.value, JobError)
    story = str(e.value.__cause__)
    assert "while not Path(path).exists()" in story, "where it was"
    assert "incarnation.py" not in story
    assert "threading.py" not in story
    assert time.monotonic() - began < LONG
    eventually(end.exists)  # It got an exception.


async def test_a_task_that_sleeps_in_c_does_not_hold_the_job_up(client: WukongClient) -> None:
    began = time.monotonic()
    x = delayed(time.sleep)(5, dask_key_name="asleep")
    with pytest.raises(TaskTimeout, match=r"'asleep' .* 0\.1 s"):
        await client.compute(x, timeout="100ms")
    assert time.monotonic() - began < 4
    assert await client.compute(delayed(inc)(1)) == 2, "its sandbox goes on with another thread"


@pytest.mark.parametrize("how", ["sleep", "loop"])
async def test_a_task_that_took_too_long_is_tried_again(
    client: WukongClient, flaky: Callable[..., Any], tmp_path: Path, how: str
) -> None:
    with dask.annotate(retries=2, timeout=0.2):
        x = delayed(flaky)(1, works=3, how=how)
    assert await client.compute([delayed(identity)(x), x]) == [1, 1]
    assert tries(tmp_path) == 3
    assert client.history[-1].begins == 1


def stubborn(folder: str) -> str:
    """Its first try does not let itself be interrupted, and returns while the second one runs."""
    first, second, returned = (Path(folder, name) for name in ("first", "second", "returned"))
    if first.exists():
        second.touch()
        while not returned.exists():
            time.sleep(0.01)
        return "in time"
    first.touch()
    while not second.exists():
        with contextlib.suppress(BaseException):
            time.sleep(0.01)
    returned.touch()
    return "too late"


async def test_what_returns_too_late_is_not_heard(client: WukongClient, tmp_path: Path) -> None:
    x = delayed(stubborn)(str(tmp_path))
    assert await client.compute(x, retries=1, timeout=1) == "in time"


async def test_tries_that_take_too_long_are_counted(
    client: WukongClient, flaky: Callable[..., Any], tmp_path: Path
) -> None:
    x = delayed(flaky)(1, works=9, how="loop")
    with pytest.raises(TaskTimeout, match=r"0\.1 s, in the last of 2 tries"):
        await client.compute(x, retries=1, timeout=0.1)
    assert tries(tmp_path) == 2


async def test_a_lease_is_renewed_while_a_limited_task_runs(cluster: LocalCluster) -> None:
    async with WukongClient(cluster, lease=0.3, grace=5) as client:
        x = delayed(add)(delayed(time.sleep)(1) is None, 1)
        assert await client.compute(x, timeout=LONG) == 1
        assert client.history[-1].begins == 1


async def test_tasks_with_time_enough_compute_what_they_do_without(client: WukongClient) -> None:
    x = da.arange(100, chunks=10)
    y = (x * x[::-1]).sum()
    expected = y.compute(scheduler="synchronous")
    assert await client.compute(y, timeout=LONG) == expected
    with dask.annotate(timeout=lambda key: None if "sum" in key else LONG):
        z = delayed(sum)([delayed(inc)(i) for i in range(20)])
    assert await client.compute(z) == 210


# What is wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, 1.5, True, "2"])
async def test_bad_retries(client: WukongClient, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"retries must be an integer from 0 to 1_000"):
        await client.compute(delayed(inc)(1), retries=value)
    with dask.annotate(retries=lambda _: value):
        x = delayed(inc)(1, dask_key_name="annotated")
    with pytest.raises(GraphError, match="Task 'annotated': retries must be an integer"):
        await client.compute(x)


TIMES = [0, -1, float("nan"), float("inf"), True, "s", "soon", "1e400 s", [1]]


@pytest.mark.parametrize("value", TIMES)
async def test_bad_timeouts(client: WukongClient, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"timeout must be seconds, or a time such as '30 s'"):
        await asyncio.to_thread(client.get, {"a": 1}, "a", timeout=value)
    with dask.annotate(timeout=value):
        x = delayed(inc)(1, dask_key_name="annotated")
    with pytest.raises(GraphError, match="Task 'annotated': timeout must be seconds"):
        await client.compute(x)


async def test_an_annotation_that_raises(client: WukongClient) -> None:
    with dask.annotate(retries=lambda key: key[1]["?"]):
        x = delayed(inc)(1, dask_key_name="annotated")
    with pytest.raises(GraphError, match=r"'annotated': its annotation retries .* TypeError"):
        await client.compute(x)
