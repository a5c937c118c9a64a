"""Jobs whose client is killed: a proxy sees them through."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import redis

from tests.acceptance.processes import (
    client_process,
    jobs_of,
    lines,
    proxy,
    store_of,
    until,
)
from tests.conftest import keys_of
from wukong_async import LocalCluster
from wukong_async.store.job import REGISTRY

LARGE = """
leaves = [delayed(touch_and_wait)(touched, awaited, i) for i in range(2)]
large = delayed(bytes)(delayed(add)(*leaves, 99_999))
client.compute(delayed(inc)(delayed(len)(large)), large)
"""


@pytest.mark.parametrize("killed", ["the client", "and the sandboxes", "and the proxy"])
async def test_a_job_outlives_its_client(
    cluster: LocalCluster, tmp_path: Path, killed: str
) -> None:
    async with client_process(cluster, tmp_path, LARGE) as process:
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
    async with client_process(cluster, tmp_path, LARGE) as process, proxy(cluster) as server:
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
