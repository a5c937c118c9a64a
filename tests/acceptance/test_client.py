"""The client as its users meet it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import pytest
import uvloop
from dask import delayed
from dask.delayed import Delayed

from tests.acceptance.functions import add, identity, inc, touch_and_wait
from tests.conftest import eventually, keys_of
from tests.paths import ROOT
from wukong_async import LocalCluster, WukongClient
from wukong_async.errors import ClientStateError, ConfigError, MissingKeyError
from wukong_async.loops import LoopThread


@pytest.fixture
def sync_client(cluster: LocalCluster) -> Iterator[WukongClient]:
    with WukongClient(cluster) as entered:
        yield entered


# Synchronous use ----------------------------------------------------------------------------------


def test_the_shim(sync_client: WukongClient) -> None:
    assert delayed(inc)(1).compute(scheduler=sync_client.get) == 2
    assert dask.compute(delayed(inc)(1), delayed(inc)(2), scheduler=sync_client.get) == (2, 3)
    assert da.ones(10, chunks=3).sum().compute(scheduler=sync_client.get) == 10


def test_the_client_is_the_default_scheduler_inside_the_block(cluster: LocalCluster) -> None:
    with WukongClient(cluster) as client:
        assert delayed(inc)(1).compute() == 2
        assert len(client.history) == 1
    assert dask.config.get("scheduler", None) is None
    assert delayed(inc)(1).compute() == 2
    assert len(client.history) == 1


def test_it_need_not_be(cluster: LocalCluster) -> None:
    with WukongClient(cluster, set_as_default=False) as client:
        assert delayed(inc)(1).compute() == 2
        assert not client.history


def test_compute_blocks_where_nothing_can_be_awaited(sync_client: WukongClient) -> None:
    assert sync_client.compute(delayed(inc)(1)) == 2
    assert sync_client.compute({"a": (inc, 1)}, "a") == 2


def test_without_a_with(cluster: LocalCluster) -> None:
    client = WukongClient(cluster).start()
    try:
        assert delayed(inc)(1).compute() == 2
    finally:
        client.close()
    client.close()
    with pytest.raises(ClientStateError, match="closed"):
        client.get({"a": (inc, 1)}, "a")


def test_get_starts_a_client_that_nobody_has_started(cluster: LocalCluster) -> None:
    client = WukongClient(cluster)
    assert "not started" in repr(client)
    assert client.get({"a": (inc, 1)}, "a") == 2
    client.close()
    assert "closed" in repr(client)


def test_a_client_without_a_cluster_brings_its_own() -> None:
    with WukongClient() as client:
        assert client.compute(delayed(inc)(1)) == 2


def test_a_cluster_that_the_client_has_started_is_closed_with_it() -> None:
    cluster = LocalCluster(1)
    with WukongClient(cluster) as client:
        assert cluster.running
        assert client.compute(delayed(inc)(1)) == 2
    assert not cluster.running
    with cluster:
        with WukongClient(cluster) as client:
            assert client.compute(delayed(inc)(1)) == 2
        assert cluster.running


def test_threads_share_a_client(sync_client: WukongClient) -> None:
    results: dict[int, int] = {}

    def work(i: int) -> None:
        results[i] = sync_client.get({"a": (inc, i)}, "a")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: i + 1 for i in range(8)}


def test_a_task_may_compute_by_itself(sync_client: WukongClient) -> None:
    def nested(x: int) -> int:
        result: int = delayed(inc)(x).compute()
        return result

    assert sync_client.compute(delayed(nested)(1)) == 2


# Asynchronous use ---------------------------------------------------------------------------------


async def test_jobs_run_side_by_side(client: WukongClient) -> None:
    found = await asyncio.gather(*(client.compute(delayed(inc)(i)) for i in range(10)))
    assert found == list(range(1, 11))
    assert len(client.history) == 10


async def test_it_is_not_the_default_scheduler(client: WukongClient) -> None:
    assert delayed(inc)(1).compute() == 2
    assert not client.history


async def test_get_on_the_client_s_loop_says_what_to_do(client: WukongClient) -> None:
    with pytest.raises(ClientStateError, match=r"use `await client.compute\(x\)`"):
        delayed(inc)(1).compute(scheduler=client.get)


async def test_get_in_a_thread(client: WukongClient) -> None:
    assert await asyncio.to_thread(client.get, {"a": (inc, 1)}, "a") == 2


async def test_a_synchronous_client_in_a_running_loop_says_what_to_do(
    cluster: LocalCluster,
) -> None:
    with pytest.raises(ClientStateError, match=r"use `async with WukongClient\(\)`"):
        WukongClient(cluster).start()
    with pytest.raises(ClientStateError, match="async with"):
        WukongClient(cluster).get({"a": (inc, 1)}, "a")


async def test_aclose(cluster: LocalCluster) -> None:
    client = await WukongClient(cluster).__aenter__()
    assert await client.compute(delayed(inc)(1)) == 2
    await client.aclose()
    with pytest.raises(ClientStateError, match="closed"):
        await client.compute(delayed(inc)(1))


async def test_a_client_is_entered_once(client: WukongClient, cluster: LocalCluster) -> None:
    with pytest.raises(ClientStateError, match="in use already"):
        await client.__aenter__()
    other = WukongClient(cluster)
    async with other:
        pass
    with pytest.raises(ClientStateError, match="closed"):
        await other.__aenter__()


async def test_a_client_that_was_not_entered(cluster: LocalCluster) -> None:
    with pytest.raises(ClientStateError, match="not started"):
        await WukongClient(cluster).compute(delayed(inc)(1))


def test_on_uvloop(cluster: LocalCluster) -> None:
    async def main() -> Any:
        async with WukongClient(cluster) as client:
            return await client.compute(delayed(inc)(1))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == 2


def test_uvloop_wherever_the_loop_is_ours(cluster: LocalCluster) -> None:
    with WukongClient(cluster) as client:
        assert isinstance(client._loop, uvloop.Loop)
    assert cluster._thread is not None
    assert isinstance(cluster._thread.loop, uvloop.Loop)


async def test_two_clients_run_the_same_graph_at_the_same_time(cluster: LocalCluster) -> None:
    level = [delayed(inc)(i, dask_key_name=f"leaf-{i}") for i in range(64)]
    total = delayed(add)(*level, dask_key_name="total")
    async with WukongClient(cluster) as one, WukongClient(cluster) as two:
        found = await asyncio.gather(
            *(client.compute(total) for _ in range(10) for client in (one, two))
        )
    assert found == [sum(range(1, 65))] * 20


async def test_the_same_graph_again_and_again(client: WukongClient) -> None:
    x = delayed(add)(*(delayed(identity)(i) for i in range(10)))
    assert [await client.compute(x) for _ in range(5)] == [45] * 5


async def test_the_summary_counts(spread: WukongClient, cluster: LocalCluster) -> None:
    before = cluster.stats()
    await spread.compute(delayed(add)(*(delayed(inc)(i) for i in range(10))))
    after = cluster.stats()
    summary = spread.history[-1]
    assert summary.tasks == 11
    assert summary.invocations == summary.begins == 2
    assert after.invocations - before.invocations == 2
    assert summary.commits == 3
    assert summary.seconds > 0


# Arguments ----------------------------------------------------------------------------------------


async def test_arguments_that_make_no_sense(client: WukongClient) -> None:
    with pytest.raises(TypeError, match="needs a collection or a graph"):
        await client.compute()
    with pytest.raises(TypeError, match="keys= goes with a graph"):
        await client.compute(delayed(inc)(1), keys="a")
    with pytest.raises(TypeError, match="one graph, and keys once"):
        await client.compute({"a": 1}, "a", keys="a")
    with pytest.raises(TypeError, match="does not understand the option 'priority'"):
        client.get({"a": 1}, "a", priority=3)


async def test_a_wrong_setting_is_an_error_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"wukong.leese is not a setting. Did you mean"):
        WukongClient(leese=3)
    with pytest.raises(ConfigError, match="redis_endpoints is not"):
        WukongClient(endpoint_url="http://127.0.0.1:1")


async def test_explicit_settings_instead_of_a_cluster(cluster: LocalCluster) -> None:
    async with WukongClient(**cluster.settings) as client:
        assert await client.compute(delayed(inc)(1)) == 2
    with dask.config.set({f"wukong.{k}": v for k, v in cluster.settings.items()}):
        async with WukongClient() as client:
            assert await client.compute(delayed(inc)(1)) == 2


async def test_a_client_goes_on_after_an_error(client: WukongClient) -> None:
    with pytest.raises(MissingKeyError):
        await client.compute({"a": (inc, 1)}, "b")
    assert await client.compute({"a": (inc, 1)}, "a") == 2


def test_a_closed_synchronous_client_says_so(cluster: LocalCluster) -> None:
    with WukongClient(cluster) as client:
        pass
    with pytest.raises(ClientStateError, match="closed"):
        client.compute(delayed(inc)(1))


async def test_more_blocking_callers_than_the_loop_has_threads(client: WukongClient) -> None:
    calls = [asyncio.to_thread(client.get, {"a": (inc, i)}, "a") for i in range(40)]
    assert await asyncio.gather(*calls) == list(range(1, 41))


def test_many_threads_may_start_a_client(cluster: LocalCluster) -> None:
    client = WukongClient(cluster)
    with ThreadPoolExecutor(8) as threads:
        values = list(threads.map(lambda i: client.get({"a": (inc, i)}, "a"), range(8)))
    client.close()
    assert values == list(range(1, 9))


async def test_a_start_that_is_cancelled_leaves_nothing() -> None:
    for patience in (0.02, 0.3):
        client = WukongClient()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.__aenter__(), patience)


async def test_a_local_cluster_has_nothing_to_do_with_a_proxy_of_the_environment(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    remote = {"wukong.proxy_address": "127.0.0.1", "wukong.proxy_secret": "s"}
    with dask.config.set(remote):
        async with WukongClient(cluster) as client:
            assert client._scheduler is not None
            assert client._scheduler.settings.proxy_address is None
            assert await client.compute(delayed(inc)(1)) == 2


async def test_two_clients_may_start_one_cluster() -> None:
    cluster = LocalCluster(1)
    first, second = WukongClient(cluster), WukongClient(cluster)
    await asyncio.gather(first.__aenter__(), second.__aenter__())
    assert await asyncio.gather(*(c.compute({"a": (inc, 1)}, "a") for c in (first, second))) == [
        2,
        2,
    ]
    await second.aclose()
    await first.aclose()
    assert not cluster.running


def test_clients_closed_in_any_order_leave_dask_as_it_was(cluster: LocalCluster) -> None:
    def default() -> Any:
        scheduler = dask.config.get("scheduler", None)
        return getattr(scheduler, "__self__", scheduler)

    with dask.config.set({"dataframe.shuffle.method": None}):
        first, second, third = (WukongClient(cluster).start() for _ in range(3))
        assert default() is third
        first.close()
        assert default() is third
        third.close()
        assert default() is second
        assert dask.config.get("dataframe.shuffle.method") == "tasks"
        dask.config.set(scheduler="sync")
        second.close()
        assert default() == "sync", "what the user has set meanwhile stays"
        assert dask.config.get("dataframe.shuffle.method") is None
        dask.config.set(scheduler=None)


def test_a_client_of_another_loop_says_so(cluster: LocalCluster) -> None:
    runner = asyncio.Runner()
    client = runner.run(WukongClient(cluster).__aenter__())
    with pytest.raises(ClientStateError, match="belongs to another event loop"):
        asyncio.run(client.compute({"a": (inc, 1)}, "a"))
    assert runner.run(client.compute({"a": (inc, 1)}, "a")) == 2
    runner.run(client.aclose())
    runner.close()


def test_an_interrupted_get_of_an_asynchronous_client_cancels_its_job(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    touched, awaited = tmp_path / "touched", tmp_path / "awaited"
    with somebody_s_loop() as run:
        client = run(WukongClient(cluster).__aenter__())
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        waiting = threading.Thread(target=interrupts_when_it_runs, args=(touched,))
        waiting.start()
        with pytest.raises(KeyboardInterrupt):
            client.get({"a": (touch_and_wait, str(touched), str(awaited))}, "a")
        waiting.join()
        assert keys_of(cluster) == []
        awaited.touch()
        run(client.aclose())


def interrupts_when_it_runs(touched: Path) -> None:
    eventually(touched.exists)
    os.kill(os.getpid(), signal.SIGALRM)


@contextlib.contextmanager
def somebody_s_loop() -> Iterator[Any]:
    thread = LoopThread("wukong-somebody-s-loop")
    yield thread.run
    thread.stop()


@pytest.mark.parametrize("what", ["collection", "graph"])
def test_a_client_that_is_closed_while_another_thread_plans(
    cluster: LocalCluster, what: str
) -> None:
    planning, go_on = threading.Event(), threading.Event()

    class Slow(dict[Any, Any]):
        def __iter__(self) -> Iterator[Any]:
            planning.set()
            go_on.wait(20)
            return super().__iter__()

        def keys(self) -> Any:
            return list(self)

        def items(self) -> Any:
            return [(key, self[key]) for key in self]

    graph: Any = Slow({"a": (inc, 1)})
    client = WukongClient(cluster).start()
    with ThreadPoolExecutor(1) as threads:
        argument = Delayed("a", graph) if what == "collection" else graph
        waiting = threads.submit(client.compute, argument)
        assert planning.wait(20)
        client.close()
        with pytest.raises(ClientStateError, match="closed while it computed"):
            waiting.result(20)
        go_on.set()


def test_a_client_starts_once_whoever_starts_it(cluster: LocalCluster) -> None:
    client = WukongClient(cluster)
    with ThreadPoolExecutor(6) as threads:
        started = [threads.submit(client.start) for _ in range(6)]
    errors = [each.exception() for each in started]
    assert sum(error is None for error in errors) == 1
    assert all(isinstance(error, ClientStateError) for error in errors if error is not None)
    client.close()


LEFT_OPEN = """
from dask import delayed
from dask.delayed import Delayed
from tests.acceptance.functions import inc
from wukong_async import WukongClient

client = WukongClient({arguments}).start()
print(delayed(inc)(1).compute())
"""


def test_a_client_that_is_left_open_ends_with_its_program(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(LEFT_OPEN.format(arguments="use_local_proxy=True"))
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


async def test_settings_of_a_cluster_that_the_client_brings() -> None:
    async with WukongClient(use_local_proxy=True, function_name="mine") as client:
        assert client._scheduler is not None
        assert client._scheduler.settings.function_name == "mine"
        assert client._scheduler.settings.proxy_address == "127.0.0.1"
        assert await client.compute(delayed(inc)(1)) == 2


def test_a_proxy_is_asked_of_the_cluster(cluster: LocalCluster) -> None:
    with pytest.raises(ConfigError, match=r"LocalCluster\(use_local_proxy=True\)"):
        WukongClient(cluster, use_local_proxy=True)
