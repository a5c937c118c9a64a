"""A job seen from another process than its client's."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from dask import delayed

from tests.acceptance.functions import inc, touch_and_wait
from tests.acceptance.processes import (
    QUICK,
    client_process,
    jobs_of,
    lines,
    owner_of,
    proxy,
    store_of,
    until,
)
from tests.conftest import keys_of
from wukong_async import LocalCluster, WukongClient
from wukong_async.errors import JobCancelled, JobError, JobNotFound

NESTED = """
dsk = {
    "a": (touch_and_wait, touched, awaited, 1),
    "b": (inc, "a"),
    "large": (bytes, (add, "b", 99_998)),
    "constant": {"any": "thing"},
    "alias": "b",
}
client.compute(dsk, [["b", "large"], ["constant", "alias", "b"]])
"""
EXPECTED = ((2, bytes(100_000)), ({"any": "thing"}, 2, 2))
FAILING = """
client.compute({"a": (touch_and_wait, touched, awaited, "on purpose"), "f": (fails, "a")}, "f")
"""


@pytest.mark.parametrize("inline_limit", [0, 16_384])
async def test_the_result_of_a_job_whose_client_sleeps(
    cluster: LocalCluster, tmp_path: Path, inline_limit: int
) -> None:
    async with (
        client_process(cluster, tmp_path, NESTED, running=1, inline_limit=inline_limit) as process,
        WukongClient(cluster) as client,
    ):
        (job_id,) = jobs_of(cluster)
        job = client.attach(job_id)
        assert await job.state() == "running"
        progress = await job.progress()
        assert (progress.tasks, progress.passed, progress.executors) == (3, 0, 1)
        waiting = [asyncio.ensure_future(job.result()) for _ in range(2)]
        await until(lambda: client._scheduler is not None and bool(client._scheduler._running))
        process.send_signal(signal.SIGSTOP)
        await until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
        (tmp_path / "awaited").touch()
        assert await asyncio.gather(*waiting) == [EXPECTED, EXPECTED]
        assert await job.state() == "done"
        assert (await job.progress()).passed == 3
        assert client.jobs() == ()
        process.send_signal(signal.SIGCONT)
        assert await process.wait() == 0
        assert keys_of(cluster) == []
        with pytest.raises(
            JobNotFound, match=rf"no job '{job_id}'.*its own client has its results"
        ):
            await job.result()


async def test_whoever_waits_takes_the_place_of_a_client_that_was_killed(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    async with WukongClient(cluster) as client:
        async with client_process(cluster, tmp_path, NESTED, running=1, result_ttl=3) as process:
            (job_id,) = jobs_of(cluster)
            owner = owner_of(cluster, job_id)
            job = client.attach(job_id)
            waiting = asyncio.ensure_future(job.result())
            process.kill()
            await process.wait()
        (sandbox,) = map(int, (tmp_path / "touched").read_text().split())
        os.kill(sandbox, signal.SIGKILL)
        await until(lambda: lines(tmp_path / "touched") == 2)
        await until(lambda: owner_of(cluster, job_id) != owner)
        (tmp_path / "awaited").touch()
        assert await waiting == EXPECTED
        assert jobs_of(cluster) == [], "it was let go of"
        assert await client.attach(job_id).result() == EXPECTED
        await until(lambda: keys_of(cluster) == [])
        for verb in (job.result, job.state, job.progress, job.cancel):
            with pytest.raises(JobNotFound, match=r"longer than wukong\.result_ttl ago"):
                await verb()


@pytest.mark.parametrize("through", ["a proxy", "whoever waits"])
async def test_a_failure_is_raised_with_its_task_s_name(
    cluster: LocalCluster, tmp_path: Path, through: str
) -> None:
    async with WukongClient(cluster) as client:
        async with client_process(cluster, tmp_path, FAILING, running=1) as process:
            (job_id,) = jobs_of(cluster)
            process.kill()
            await process.wait()
        (tmp_path / "awaited").touch()
        async with store_of(cluster, job_id):
            if through == "a proxy":
                async with proxy(cluster):
                    await until(lambda: jobs_of(cluster) == [])
            for _ in range(2):
                with pytest.raises(ValueError, match="on purpose") as caught:
                    await client.attach(job_id).result()
                assert caught.value.__notes__[0].startswith("wukong: task 'f' failed in executor 0")
            assert await client.attach(job_id).state() == "failed"


@pytest.mark.parametrize("client_lives", [True, False])
def test_cancelling_in_synchronous_use(
    cluster: LocalCluster, tmp_path: Path, client_lives: bool
) -> None:
    async def first() -> str:
        async with client_process(cluster, tmp_path, NESTED, running=1) as process:
            (job_id,) = jobs_of(cluster)
            if client_lives:
                await asyncio.to_thread(cancel, job_id)
                assert await process.wait() == 1
        return job_id

    def cancel(job_id: str) -> None:
        with WukongClient(cluster) as client:
            job = client.attach(job_id)
            assert job.cancel() is None
            assert repr(job) == f"<Job {job_id}>"

    job_id = asyncio.run(first())
    if not client_lives:
        cancel(job_id)
        with WukongClient(cluster) as client:
            job = client.attach(job_id)
            assert job.state() == "cancelled"
            with pytest.raises(JobCancelled, match="by a client that attached to it"):
                job.result()

        async def forget() -> None:
            async with store_of(cluster, job_id):
                pass

        asyncio.run(forget())
    assert keys_of(cluster) == []
    (tmp_path / "awaited").touch()


async def test_an_unknown_job(client: WukongClient) -> None:
    with pytest.raises(JobNotFound) as caught:
        await client.attach("nothing").result()
    assert str(caught.value).startswith("The store knows of no job 'nothing'. Either")
    assert isinstance(caught.value, (JobError, KeyError))


async def test_a_client_knows_its_jobs(cluster: LocalCluster, tmp_path: Path) -> None:
    touched, awaited = tmp_path / "touched", tmp_path / "awaited"
    async with WukongClient(cluster, **QUICK) as client:
        leaf = delayed(touch_and_wait)(str(touched), str(awaited), 1)
        computing = asyncio.ensure_future(client.compute(delayed(inc)(leaf)))
        await until(lambda: lines(touched) == 1)
        (job_id,) = client.jobs()
        attached = asyncio.ensure_future(client.attach(job_id).result())
        await until(lambda: bool(client._scheduler and len(client._scheduler._running) == 2))
        awaited.touch()
        assert await computing == 2
        assert client.history[-1].job_id == job_id
        assert client.jobs() == ()
        said: Any = (await asyncio.gather(attached, return_exceptions=True))[0]
        assert said == (2,) or "its own client has its results" in str(said)


async def test_a_client_that_is_closed_stops_waiting(cluster: LocalCluster, tmp_path: Path) -> None:
    touched, awaited = tmp_path / "touched", tmp_path / "awaited"
    async with WukongClient(cluster, **QUICK) as client:
        leaf = delayed(touch_and_wait)(str(touched), str(awaited), 1)
        computing = asyncio.ensure_future(client.compute(leaf))
        await until(lambda: lines(touched) == 1)
        async with WukongClient(cluster) as another:
            attached = asyncio.ensure_future(another.attach(client.jobs()[0]).result())
            await until(lambda: bool(another._scheduler and another._scheduler._running))
        with pytest.raises(RuntimeError, match="client was closed"):
            await attached
        awaited.touch()
        assert await computing == 1
