"""Fixtures for all tests: a shared cluster, and a watch on everything that a test may leave."""

from __future__ import annotations

import asyncio
import gc
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import psutil
import pytest
import redis

from tests.reruns import reruns
from wukong_async import LocalCluster, WukongClient
from wukong_async.store.job import SEEN

ME = psutil.Process()
SPREAD: dict[str, Any] = {"leaf_batch": 1, "hold": 1000.0}
"""Settings with which as many executors begin as there are slots, and share nothing later, so that
what happens does not depend on how long it takes."""


class Footprint:
    """What this process holds that outlives a function call."""

    def __init__(self) -> None:
        # How many, not which: a cluster replaces a sandbox that was killed.
        self.children = len(ME.children(recursive=True))
        self.sockets = len(_sockets())
        self.threads = {t.name for t in threading.enumerate() if t.name.startswith("wukong")}

    def left_over(self, before: Footprint) -> list[str]:
        found = []
        if self.children > before.children:
            found.append(f"{self.children - before.children} processes")
        if self.sockets > before.sockets:
            found.append(f"{self.sockets - before.sockets} sockets")
        return found + [f"thread {name}" for name in self.threads - before.threads]


def _sockets() -> list[object]:
    """This process's sockets, but for what others hold open to a server that still listens here.

    A sandbox keeps its connection to the endpoint once it has invoked somebody.
    """
    found = ME.net_connections(kind="all")
    served = {c.laddr.port for c in found if c.status == psutil.CONN_LISTEN}
    return [
        c for c in found if not (c.status == psutil.CONN_ESTABLISHED and c.laddr.port in served)
    ]


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a process, a socket or a thread of ours."""
    before = Footprint()
    yield
    left = Footprint().left_over(before)
    if left:
        # Transports close on the next turn of their loop, cycles when they are collected.
        gc.collect()
        left = Footprint().left_over(before)
    assert not left, f"left behind: {left}"


@pytest.fixture(autouse=True)
def no_job_run_twice(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test one of whose jobs is run once more, unless it makes the store lose data.

    A mistake in the protocol may look like lost data, and would be made good for silently.
    """
    with reruns() as again:
        yield
    assert not again or request.node.get_closest_marker("loses_data"), again


@pytest.fixture(autouse=True)
async def no_task_left_pending() -> AsyncIterator[None]:
    """Fail a test that leaves a task on its loop."""
    before = asyncio.all_tasks()
    yield
    for _ in range(5):  # A connection that was closed tells its tasks on the next turns.
        await asyncio.sleep(0)
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not left, f"pending: {left}"


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[LocalCluster]:
    """Two warm sandboxes for everybody."""
    with LocalCluster(2) as running:
        yield running


@pytest.fixture
def cluster(shared_cluster: LocalCluster) -> Iterator[LocalCluster]:
    """The shared cluster; fails a test that leaves a key in its store."""
    yield shared_cluster
    # A sandbox that was killed is replaced, and connects: the next test's footprint begins after.
    eventually(lambda: shared_cluster.stats().idle == shared_cluster.n_workers)
    assert keys_of(shared_cluster) == []


@pytest.fixture
async def spread(cluster: LocalCluster) -> AsyncIterator[WukongClient]:
    """A client whose jobs begin with as many executors as there are slots."""
    async with WukongClient(cluster, **SPREAD) as client:
        yield client


@pytest.fixture
async def client(cluster: LocalCluster) -> AsyncIterator[WukongClient]:
    """An asynchronous client of the shared cluster."""
    async with WukongClient(cluster) as entered:
        yield entered


class S3:
    """A bucket on a server that answers as S3 does, and what is in it."""

    def __init__(self, url: str) -> None:
        import boto3

        self.url = url
        self.name = f"bucket-{secrets.token_hex(4)}"
        self._client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
        self._client.create_bucket(Bucket=self.name)

    @property
    def settings(self) -> dict[str, Any]:
        """For a client; what is larger than 100 kB goes there."""
        return {"s3_bucket": self.name, "s3_endpoint_url": self.url, "s3_limit": 100_000}

    def names(self) -> list[str]:
        """All objects."""
        found = self._client.list_objects_v2(Bucket=self.name).get("Contents", ())
        return [each["Key"] for each in found]

    def uploads(self) -> list[str]:
        """Those that have been begun, and are not complete."""
        found = self._client.list_multipart_uploads(Bucket=self.name).get("Uploads", ())
        return [each["Key"] for each in found]

    def delete(self, *keys: str) -> None:
        for key in keys:
            self._client.delete_object(Bucket=self.name, Key=key)

    def close(self) -> None:
        self._client.close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """A bucket of its own; fails a test that leaves something in it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    bucket = S3(s3_server)
    yield bucket
    assert bucket.names() == []
    assert bucket.uploads() == []
    bucket.close()


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in another process."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never happens"
        time.sleep(0.01)


def keys_of(cluster: LocalCluster) -> list[str]:
    """All keys of jobs in a cluster's store."""
    (url,) = cluster.settings["redis_endpoints"]
    with redis.Redis.from_url(url) as connection:
        return of_jobs(connection.scan_iter())


def of_jobs(keys: Iterable[bytes]) -> list[str]:
    """What tasks were like is remembered on purpose, for a week; all else should be gone."""
    return [key.decode() for key in keys if not key.startswith(SEEN.encode())]
