"""Jobs whose client is killed: a proxy sees them through."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis

from tests.conftest import keys_of
from tests.paths import ROOT
from wukong_async import LocalCluster
from wukong_async.config import Settings
from wukong_async.proxy import ProxyServer
from wukong_async.store import Connections, JobStore
from wukong_async.store.job import REGISTRY

CLIENT = """
import sys
from dask import delayed
from tests.acceptance.functions import add, inc, touch_and_wait
from wukong_async import WukongClient

touched, awaited = sys.argv[1:]
leaves = [delayed(touch_and_wait)(touched, awaited, i) for i in range(2)]
large = delayed(bytes)(delayed(add)(*leaves, 99_999))
with WukongClient(lease=0.5, grace=0.5, max_attempts=10) as client:
    client.compute(delayed(inc)(delayed(len)(large)), large)
"""


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def client_process(
    cluster: LocalCluster, tmp_path: Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A client of the cluster with a job that waits for `awaited`."""
    program = tmp_path / "client.py"
    program.write_text(CLIENT)
    settings = Settings.load(cluster.settings)
    environment = {**os.environ, **settings.environment(), "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    arguments = [str(program), str(tmp_path / "touched"), str(tmp_path / "awaited")]
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, env=environment)
    try:
        await until(lambda: lines(tmp_path / "touched") >= 2)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def jobs_of(cluster: LocalCluster) -> list[str]:
    (url,) = cluster.settings["redis_endpoints"]
    with redis.Redis.from_url(url) as connection:
        return [job_id.decode() for job_id in connection.zrange(REGISTRY, 0, -1)]


def proxy(cluster: LocalCluster) -> ProxyServer:
    settings = Settings.load({**cluster.settings, "proxy_secret": "secret"})
    return ProxyServer(settings, "127.0.0.1", 0, look_every=0.1)


@asynccontextmanager
async def store_of(cluster: LocalCluster, job_id: str) -> AsyncIterator[JobStore]:
    """A job, whose keys are deleted in the end."""
    async with Connections(cluster.settings["redis_endpoints"], 5) as connections:
        store = JobStore(connections, job_id)
        yield store
        await store.finish()


@pytest.mark.parametrize("killed", ["the client", "and the sandboxes", "and the proxy"])
async def test_a_job_outlives_its_client(
    cluster: LocalCluster, tmp_path: Path, killed: str
) -> None:
    async with client_process(cluster, tmp_path) as process:
        (job_id,) = jobs_of(cluster)
        process.kill()
        await process.wait()
    async with store_of(cluster, job_id) as store:
        async with proxy(cluster) as first:
            await until(lambda: first.keeper.jobs == (job_id,))
            if killed == "and the sandboxes":
                for pid in set(map(int, (tmp_path / "touched").read_text().split())):
                    os.kill(pid, signal.SIGKILL)
                await until(lambda: lines(tmp_path / "touched") >= 4)
            if killed != "and the proxy":
                (tmp_path / "awaited").touch()
                await until(lambda: jobs_of(cluster) == [])
        if killed == "and the proxy":
            assert jobs_of(cluster) == [job_id]
            async with proxy(cluster) as second:
                await until(lambda: second.keeper.jobs == (job_id,))
                (tmp_path / "awaited").touch()
                await until(lambda: jobs_of(cluster) == [])
        outcome = await store.outcome()
        values = await store.resolve(outcome.results)
        assert sorted(len(value or b"") for value in values.values())[1] > 100_000
        left = [key.rpartition(":")[2] for key in keys_of(cluster)]
        assert sorted(name for name in left if name[0] != "o") == ["idx", "job", "res"]


async def test_a_living_client_is_left_alone(cluster: LocalCluster, tmp_path: Path) -> None:
    (url,) = cluster.settings["redis_endpoints"]
    async with client_process(cluster, tmp_path) as process, proxy(cluster) as server:
        with redis.Redis.from_url(url) as connection:
            ends = {connection.zrange(REGISTRY, 0, -1, withscores=True)[0][1]}

            def renewed() -> bool:
                ends.add(connection.zrange(REGISTRY, 0, -1, withscores=True)[0][1])
                return len(ends) > 4

            await until(renewed)
        assert server.keeper.jobs == ()
        (tmp_path / "awaited").touch()
        assert await process.wait() == 0
        assert server.keeper.jobs == ()
