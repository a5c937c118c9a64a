"""Executors that die, jobs that are cancelled, and what is left afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from dask import delayed

from tests.acceptance.functions import (
    SlowToLoad,
    add,
    allocate,
    inc,
    ones,
    seconds_of,
    spin,
    touch_and_wait,
)
from tests.conftest import SPREAD, keys_of
from tests.paths import ROOT
from wukong_async import LocalCluster, WukongClient
from wukong_async.config import Settings
from wukong_async.errors import (
    ClientStateError,
    ConfigError,
    ExecutorLost,
    InvocationError,
    JobTimeout,
    StoreFull,
)

QUICK: dict[str, Any] = {"lease": 0.5, "grace": 0.5, **SPREAD}
"""Leases that make a dead executor noticed within a test's patience."""


async def appears(path: Path, lines: int = 1) -> list[int]:
    """Wait until tasks have written to `path`; what they wrote."""
    async with asyncio.timeout(30):
        while not path.exists() or path.read_text().count("\n") < lines:
            await asyncio.sleep(0.01)
    return [int(line) for line in path.read_text().split()]


async def test_a_sandbox_killed_in_the_middle_of_a_job(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    touched, awaited = tmp_path / "touched", tmp_path / "awaited"
    before = [delayed(inc)(i) for i in range(40)]
    middle = delayed(touch_and_wait)(str(touched), str(awaited), delayed(sum)(before))
    after = [delayed(add)(middle, i) for i in range(40)]
    async with WukongClient(cluster, **QUICK) as client:
        computing = asyncio.ensure_future(client.compute(delayed(sum)(after)))
        (pid,) = await appears(touched)
        os.kill(pid, signal.SIGKILL)
        awaited.touch()
        assert await computing == sum(sum(range(1, 41)) + i for i in range(40))
        assert client.history[-1].begins > 2


async def test_both_sandboxes_killed_twice(cluster: LocalCluster, tmp_path: Path) -> None:
    touched, awaited = tmp_path / "touched", tmp_path / "awaited"
    leaves = [delayed(touch_and_wait)(str(touched), str(awaited), i) for i in range(2)]
    async with WukongClient(cluster, **QUICK, max_attempts=5) as client:
        computing = asyncio.ensure_future(client.compute(delayed(add)(*leaves)))
        for round_ in (1, 2):
            for pid in (await appears(touched, 2 * round_))[-2:]:
                os.kill(pid, signal.SIGKILL)
        awaited.touch()
        assert await computing == 1


async def test_an_executor_that_only_sleeps_is_fenced_when_it_wakes(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    touched, awaited = tmp_path / "touched", tmp_path / "awaited"
    async with WukongClient(cluster, **QUICK) as client:
        leaf = delayed(touch_and_wait)(str(touched), str(awaited), 7)
        computing = asyncio.ensure_future(client.compute(leaf))
        (zombie,) = await appears(touched)
        os.kill(zombie, signal.SIGSTOP)
        second = (await appears(touched, 2))[1]
        assert second != zombie
        os.kill(zombie, signal.SIGCONT)
        awaited.touch()
        assert await computing == 7
        assert client.history[-1].begins == 2


async def test_leases_are_renewed_while_something_is_unpickled(cluster: LocalCluster) -> None:
    # Twice over: in a block of the plan, and as an input that travelled.
    made = [delayed(SlowToLoad)(1.5), delayed(SlowToLoad)(1.5)]
    constant = delayed(seconds_of)(SlowToLoad(1.5), dask_key_name="constant")
    total = delayed(add)(*(delayed(seconds_of)(slow) for slow in made), constant)
    joined = delayed(len)([*made, total])
    async with WukongClient(cluster, **QUICK, max_attempts=1) as client:
        assert await client.compute(joined, total, constant) == (3, 4.5, 1.5)
        assert client.history[-1].begins == client.history[-1].invocations


async def test_a_task_that_takes_too_much_memory() -> None:
    async with LocalCluster(1, memory_size=300) as cluster:
        async with WukongClient(cluster, **QUICK, max_attempts=1) as client:
            with pytest.raises(ExecutorLost, match="'greedy'"):
                await client.compute({"greedy": (allocate, 600)}, "greedy")
            assert cluster.stats().out_of_memory == 1
            assert await client.compute(delayed(inc)(1)) == 2


async def test_cancelling_a_computation_cancels_its_job(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    touched, awaited = tmp_path / "touched", tmp_path / "awaited"
    async with WukongClient(cluster, **QUICK) as client:
        leaf = delayed(touch_and_wait)(str(touched), str(awaited))
        computing = asyncio.ensure_future(client.compute(delayed(inc)(leaf)))
        await appears(touched)
        computing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await computing
        assert keys_of(cluster) == []
        awaited.touch()
        assert await client.compute(delayed(inc)(1)) == 2


INTERRUPTED = """
from tests.acceptance.functions import touch_and_wait
from dask import delayed
from wukong_async import WukongClient

with WukongClient() as client:
    delayed(touch_and_wait)({touched!r}, {awaited!r}).compute()
"""


def test_an_interrupt_cancels_the_job(cluster: LocalCluster, tmp_path: Path) -> None:
    touched, awaited = tmp_path / "touched", tmp_path / "awaited"
    program = tmp_path / "program.py"
    program.write_text(INTERRUPTED.format(touched=str(touched), awaited=str(awaited)))
    settings = Settings.load(cluster.settings)
    environment = {**os.environ, **settings.environment(), "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    with subprocess.Popen(
        [sys.executable, str(program)], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        asyncio.run(appears(touched))
        assert keys_of(cluster)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert keys_of(cluster) == []
    awaited.touch()


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13, 21, 34, 55])
async def test_cancelling_at_any_moment_leaves_nothing(client: WukongClient, turns: int) -> None:
    computing = asyncio.ensure_future(client.compute(delayed(inc)(1)))
    for _ in range(turns):
        await asyncio.sleep(0)
    computing.cancel()
    with contextlib.suppress(asyncio.CancelledError):  # Where turns are slow, it has ended.
        assert await computing == 2
    assert await client.compute(delayed(inc)(2)) == 3


async def test_a_timeout_around_a_computation(cluster: LocalCluster, tmp_path: Path) -> None:
    awaited = tmp_path / "awaited"
    async with WukongClient(cluster) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await client.compute(delayed(touch_and_wait)(os.devnull, str(awaited)))
        assert keys_of(cluster) == []
    awaited.touch()


@pytest.mark.parametrize("how", ["an argument", "an option of compute", "a setting"])
async def test_a_job_that_takes_too_long(cluster: LocalCluster, tmp_path: Path, how: str) -> None:
    touched, awaited = tmp_path / "touched", tmp_path / "awaited"
    leaf = delayed(touch_and_wait)(str(touched), str(awaited), delayed(inc)(1))
    limit = "300ms" if how == "a setting" else None
    async with WukongClient(cluster, job_timeout=limit) as client:
        computing = {
            "an argument": partial(client.compute, leaf, job_timeout=0.3),
            "an option of compute": partial(
                asyncio.to_thread, leaf.compute, scheduler=client.get, job_timeout=0.3
            ),
            "a setting": partial(client.compute, leaf),
        }[how]
        with pytest.raises(JobTimeout, match=r"limit of 0\.3 s, and [0-2] of its .*job_timeout"):
            await computing()
        assert keys_of(cluster) == []
        awaited.touch()
        assert await client.compute(delayed(inc)(1), job_timeout=30) == 2
        with pytest.raises(ConfigError, match=r"wukong.job_timeout: cannot read 'soon'"):
            await client.compute(delayed(inc)(1), job_timeout="soon")


async def test_a_client_that_is_closed_ends_its_jobs(cluster: LocalCluster, tmp_path: Path) -> None:
    touched, awaited = tmp_path / "touched", tmp_path / "awaited"
    async with WukongClient(cluster) as client:
        leaf = delayed(touch_and_wait)(str(touched), str(awaited))
        computing = asyncio.ensure_future(client.compute(leaf))
        await appears(touched)
    with pytest.raises(ClientStateError, match="closed while it computed"):
        await computing
    assert keys_of(cluster) == []
    awaited.touch()


async def test_200_jobs_in_a_row_leave_nothing_and_grow_nothing() -> None:
    async with LocalCluster(2) as cluster, WukongClient(cluster) as client:
        assert cluster._valkey is not None
        (server,) = psutil.Process(cluster._valkey.guard_pid).children()

        def memory() -> list[int]:
            """Of the client, the store and the sandboxes, in bytes."""
            gc.collect()
            pids = [os.getpid(), server.pid, *cluster.sandbox_pids()]
            return [psutil.Process(pid).memory_info().rss for pid in pids]

        processes = len(psutil.Process().children(recursive=True))
        baseline: list[int] = []
        for number in range(200):
            level = [delayed(bytes)(20_000 + i) for i in range(20)]
            assert await client.compute(delayed(len)(level)) == 20
            if number == 60:
                baseline = memory()
        grown = [after - before for before, after in zip(baseline, memory(), strict=True)]
        assert max(grown) < 4_000_000, grown
        assert keys_of(cluster) == []
        assert len(psutil.Process().children(recursive=True)) == processes
        assert cluster.stats().sandboxes == 2


async def test_a_task_that_nobody_wants_any_more_is_interrupted(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    started, stopped = tmp_path / "started", tmp_path / "stopped"
    async with WukongClient(cluster, **QUICK) as client:
        computing = asyncio.ensure_future(client.compute(delayed(spin)(str(started), str(stopped))))
        await appears(started)
        computing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await computing
        async with asyncio.timeout(20):
            while not stopped.exists():
                await asyncio.sleep(0.01)


async def test_a_warm_sandbox_does_not_keep_the_values_of_finished_jobs() -> None:
    async with LocalCluster(1, memory_size=900) as cluster:
        async with WukongClient(cluster) as client:
            for _ in range(4):
                assert (await client.compute({"a": (ones, 200)}, "a")).sum() == 25_000_000
        assert cluster.stats().out_of_memory == 0


@pytest.mark.parametrize(
    "graph", [delayed(len)(bytes(60_000_000)), delayed(ones)(60)], ids=["uploading", "running"]
)
async def test_a_store_that_is_full(graph: Any) -> None:
    impatient = {"DASK_WUKONG__STORE_TIMEOUT": "1"}
    async with LocalCluster(1, environment=impatient) as cluster:
        (url,) = cluster.settings["redis_endpoints"]
        with redis.Redis.from_url(url) as server:
            server.config_set("maxmemory", "30mb")
        async with WukongClient(cluster, **QUICK, store_timeout=1) as client:
            with pytest.raises(StoreFull, match="Raise its maxmemory"):
                await client.compute(graph)
            assert keys_of(cluster) == []
            assert await client.compute(delayed(inc)(1)) == 2


# Events that nobody begins ------------------------------------------------------------------------


async def test_a_function_that_does_not_start_any_more(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nif os.path.exists({str(broken)!r}): print('no such luck'); os._exit(7)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    async with LocalCluster(1, environment={"PYTHONPATH": path}) as cluster:
        broken.touch()
        os.kill(cluster.sandbox_pids()[0], signal.SIGKILL)
        async with WukongClient(cluster, **QUICK) as client:
            with pytest.raises(InvocationError, match=r"does not run: Runtime.ExitError: .* 7"):
                await client.compute(delayed(inc)(1))
            assert keys_of(cluster) == []


async def test_a_function_that_does_not_reach_the_store() -> None:
    elsewhere = {
        "DASK_WUKONG__REDIS_ENDPOINTS": "['redis://127.0.0.1:9']",
        "DASK_WUKONG__STORE_TIMEOUT": "0.2",
    }
    async with LocalCluster(1, environment=elsewhere) as cluster:
        async with WukongClient(cluster, **QUICK) as client:
            with pytest.raises(
                InvocationError, match=r"does not run: The store at redis://127.0.0.1:9 has not"
            ):
                await client.compute(delayed(inc)(1))
            assert keys_of(cluster) == []


async def test_waiting_for_a_sandbox_is_no_failure(tmp_path: Path) -> None:
    touched, awaited = tmp_path / "touched", tmp_path / "awaited"
    async with LocalCluster(1) as cluster, WukongClient(cluster, **QUICK) as client:
        busy = asyncio.ensure_future(
            client.compute(delayed(touch_and_wait)(str(touched), str(awaited), 1))
        )
        await appears(touched)
        waiting = asyncio.ensure_future(client.compute(delayed(inc)(1)))
        async with asyncio.timeout(30):
            while cluster.stats().throttles < 2:
                await asyncio.sleep(0.01)
        assert not waiting.done()
        awaited.touch()
        assert (await busy, await waiting) == (1, 2)
