"""Bad input: a clear error within a bounded time, and the cluster usable for the next job."""

from __future__ import annotations

import asyncio
import importlib
import sys
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dask import delayed
from dask._task_spec import Task, TaskRef

from tests.acceptance.functions import (
    PickyError,
    Unpicklable,
    UnprintableError,
    add,
    add_lengths,
    exit_process,
    fails,
    fails_pickily,
    fails_unprintably,
    identity,
    inc,
    make_generator,
    make_home_leaver,
    make_only_there,
    system_exit,
)
from tests.conftest import eventually
from wukong_async import LocalCluster, WukongClient, invocation
from wukong_async.errors import (
    CycleError,
    ExecutorLost,
    FunctionNotFound,
    InvocationError,
    MissingDependencyError,
    MissingKeyError,
    RemoteTraceback,
    SerializationError,
    StoreUnreachable,
    TaskError,
    VersionMismatch,
)


@pytest.fixture(autouse=True)
async def still_usable(cluster: LocalCluster) -> AsyncIterator[None]:
    """After every one of these tests the cluster does its work."""
    yield
    async with WukongClient(cluster) as client:
        assert await client.compute(delayed(inc)(1)) == 2


# Graphs -------------------------------------------------------------------------------------------


async def test_a_cycle(client: WukongClient) -> None:
    with pytest.raises(CycleError, match="'a' needs 'b' needs 'a'"):
        await client.compute({"a": (inc, "b"), "b": (inc, "a")}, "a")


async def test_a_key_that_is_not_in_the_graph(client: WukongClient) -> None:
    with pytest.raises(MissingKeyError, match="The requested key 'z' is not in the graph"):
        await client.compute({"a": (inc, 1)}, ["a", "z"])


async def test_a_missing_dependency(client: WukongClient) -> None:
    dsk = {"a": Task("a", inc, TaskRef("z"))}
    with pytest.raises(MissingDependencyError, match=r"Task 'a' depends on a key .*'z'"):
        await client.compute(dsk, "a")


# What does not pickle -----------------------------------------------------------------------------


class Unreadable(dict[str, object]):
    """A graph whose tasks cannot be told."""

    def items(self) -> Any:
        raise StopIteration

    def __iter__(self) -> Any:
        raise StopIteration


async def test_a_graph_that_stops_iterating(client: WukongClient) -> None:
    with pytest.raises(RuntimeError, match="StopIteration was raised where a graph was read"):
        await client.compute(Unreadable(x=(inc, 1)), "x")


async def test_an_argument(client: WukongClient) -> None:
    dsk = {"good": (inc, 1), "bad": Task("bad", add, TaskRef("good"), Unpicklable())}
    with pytest.raises(SerializationError) as caught:
        await client.compute(dsk, "bad")
    assert str(caught.value) == (
        "Task 'bad' cannot travel: argument 1, a Unpicklable, does not pickle"
        " (this one stays at home)."
    )


async def test_a_function(client: WukongClient) -> None:
    generator = (i for i in range(3))

    def closes_over_it() -> Any:
        return generator

    with pytest.raises(SerializationError, match=r"Task 'bad' .*its function, a function, .*gener"):
        await client.compute({"bad": (closes_over_it,)}, "bad")


async def test_a_literal(client: WukongClient) -> None:
    dsk = {"data": Unpicklable(), "bad": (identity, "data")}
    with pytest.raises(SerializationError, match=r"Task 'bad' .*input 'data', a Unpicklable"):
        await client.compute(dsk, "bad")


async def test_a_large_literal(client: WukongClient) -> None:
    data = np.array([Unpicklable()] * 5000, dtype=object)
    with pytest.raises(SerializationError, match=r"Task 'bad' .*input 'data', a ndarray"):
        await client.compute({"data": data, "bad": (len, "data")}, "bad")


async def test_a_result(client: WukongClient) -> None:
    with pytest.raises(SerializationError, match=r"output of this task .*generator") as caught:
        await client.compute({"bad": (make_generator,)}, "bad")
    assert "task 'bad' failed" in caught.value.__notes__[0]


async def test_an_intermediate_result_that_stays_where_it_is_made_need_not_pickle(
    client: WukongClient,
) -> None:
    assert await client.compute({"a": (make_generator,), "b": (list, "a")}, "b") == [0, 1, 2]


async def test_a_result_that_cannot_be_unpickled_here(client: WukongClient) -> None:
    with pytest.raises(SerializationError, match=r"result of task 'bad' cannot be unpickled here"):
        await client.compute({"bad": (make_only_there,)}, "bad")


async def test_an_input_that_cannot_be_unpickled_there(spread: WukongClient) -> None:
    # Two leaves, so two executors: one of them has to read what the other has made.
    dsk = {"a": (make_only_there,), "b": (make_only_there,), "c": (add_lengths, "a", "b")}
    with pytest.raises(
        SerializationError,
        match=r"^The function cannot unpickle the output of task '[ab]': ImportError: cannot be ma",
    ):
        await spread.compute(dsk, "c")


@pytest.fixture
def only_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that the function lacks."""
    (tmp_path / "only_here.py").write_text(
        "def f(*_): return 1\nclass Large:\n    def __init__(self): self.data = bytes(100_000)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("only_here")
    del sys.modules["only_here"]


async def test_a_module_that_the_function_lacks(client: WukongClient, only_here: Any) -> None:
    dsk = {"a": (inc, 1), "b": Task("otherwise", only_here.f, TaskRef("a")), "c": (inc, "b")}
    with pytest.raises(
        SerializationError,
        match=r"cannot unpickle task 'b': ModuleNotFoundError: No module named 'only_here'. Does",
    ) as caught:
        await client.compute(dsk, "c")
    assert "in executor 0, request " in caught.value.__notes__[0]


@pytest.mark.parametrize("shape", ["literal", "argument"])
async def test_a_large_value_of_a_module_that_the_function_lacks(
    client: WukongClient, only_here: Any, shape: str
) -> None:
    large = only_here.Large()
    dsk: dict[str, Any] = {f"t{i}": Task(f"t{i}", inc, i) for i in range(5)}
    if shape == "literal":
        dsk |= {"data": large, "bad": (identity, "data")}
        named = "input 'data' of task 'bad'"
    else:
        dsk |= {"bad": Task("bad", add_lengths, large, bytes(300_000))}
        named = "argument 0 of task 'bad'"
    with pytest.raises(SerializationError, match=f"cannot unpickle {named}: ModuleNotFoundError"):
        await client.compute(dsk, [*(f"t{i}" for i in range(5)), "bad"])


async def test_a_result_that_would_end_this_process(client: WukongClient) -> None:
    with pytest.raises(SerializationError, match=r"result of task 'bad' .* SystemExit: at home"):
        await client.compute({"bad": (make_home_leaver,)}, "bad")


# Tasks that fail ----------------------------------------------------------------------------------


async def test_the_original_exception_with_its_story(client: WukongClient) -> None:
    with pytest.raises(ValueError, match="no luck") as caught:
        await client.compute(delayed(fails)("no luck", dask_key_name="unlucky"))
    error = caught.value
    assert isinstance(error.__cause__, RemoteTraceback)
    assert "in fails" in str(error.__cause__)
    assert "raise ValueError(message)" in str(error.__cause__)
    assert "wukong_async" not in str(error.__cause__), "our own frames are not their business"
    (note,) = error.__notes__
    assert note.startswith("wukong: task 'unlucky' failed in executor 0, request ")
    printed = "".join(traceback.format_exception(error))
    assert printed.index("in fails") < printed.index("direct cause")


async def test_the_request_is_in_the_log(client: WukongClient, cluster: LocalCluster) -> None:
    with pytest.raises(ValueError, match="purpose") as caught:
        await client.compute({"a": (fails,)}, "a")
    request_id = caught.value.__notes__[0].split()[-1]
    # The client may hear of it before the sandbox has answered.
    eventually(lambda: f"START RequestId: {request_id}" in cluster.log(request_id))


async def test_an_exception_that_does_not_pickle(client: WukongClient) -> None:
    with pytest.raises(PickyError, match="404: gone") as caught:
        await client.compute({"a": (fails_pickily,)}, "a")
    assert "task 'a' failed" in caught.value.__notes__[0]


async def test_an_exception_that_cannot_be_shown(client: WukongClient) -> None:
    # The client's fixture looks for keys that are left.
    with pytest.raises(UnprintableError):
        await client.compute({"a": (fails_unprintably,)}, "a")


async def test_a_task_that_leaves_python(client: WukongClient) -> None:
    with pytest.raises(TaskError, match="SystemExit: 3"):
        await client.compute({"a": (system_exit, 3)}, "a")


async def test_a_failure_among_many(client: WukongClient) -> None:
    leaves = [delayed(inc)(i) for i in range(200)]
    leaves[120] = delayed(fails)("one of many")
    with pytest.raises(ValueError, match="one of many"):
        await client.compute(delayed(sum)(leaves))


async def test_a_task_that_kills_its_executor_again_and_again(cluster: LocalCluster) -> None:
    async with WukongClient(cluster, lease=0.3, grace=0.3, max_attempts=2) as client:
        with pytest.raises(ExecutorLost, match=r"vanished 2 times .*'deadly'"):
            await client.compute({"deadly": (exit_process, 1)}, "deadly")


# Surroundings -------------------------------------------------------------------------------------


async def test_versions_that_differ(client: WukongClient, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {**invocation.versions(), "python": "2.7", "dask": "0.1"}
    monkeypatch.setattr("wukong_async.watcher.versions", lambda: theirs)
    with pytest.raises(VersionMismatch) as caught:
        await client.compute({"a": (inc, 1)}, "a")
    assert "dask: client 0.1, function " in str(caught.value)
    assert "python: client 2.7, function " in str(caught.value)


async def test_a_store_that_is_not_there(cluster: LocalCluster) -> None:
    settings = {**cluster.settings, "redis_endpoints": ["redis://127.0.0.1:9"]}
    with pytest.raises(StoreUnreachable, match=r"redis://127.0.0.1:9 has not answered"):
        async with WukongClient(**settings, store_timeout=0.2):
            pass


async def test_a_function_that_is_not_there(cluster: LocalCluster) -> None:
    with pytest.raises(FunctionNotFound, match=r"no function 'nothing' in region us-east-1"):
        async with WukongClient(cluster, function_name="nothing"):
            pass


async def test_a_region_that_is_wrong(cluster: LocalCluster) -> None:
    with pytest.raises(InvocationError, match=r"in region mars-1 .*not 'mars-1'"):
        async with WukongClient(cluster, region="mars-1"):
            pass


async def test_an_endpoint_that_is_not_there(cluster: LocalCluster) -> None:
    settings = {**cluster.settings, "endpoint_url": "http://127.0.0.1:9"}
    async with asyncio.timeout(60):
        with pytest.raises(InvocationError, match=r"http://127.0.0.1:9.* cannot be reached"):
            async with WukongClient(**settings):
                pass


async def test_a_closed_cluster() -> None:
    cluster = LocalCluster(1)
    async with cluster:
        client = await WukongClient(cluster, store_timeout=0.3).__aenter__()
    with pytest.raises((StoreUnreachable, InvocationError)):
        await client.compute({"a": (inc, 1)}, "a")
    await client.aclose()


async def test_large_arguments_travel(client: WukongClient) -> None:
    array = np.arange(1_000_000.0)
    assert await client.compute(delayed(np.sum)(array)) == array.sum()
