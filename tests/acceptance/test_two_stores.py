"""Jobs whose store is two servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from dask import delayed

from tests.acceptance.functions import touch_and_wait
from tests.conftest import SPREAD, of_jobs
from wukong_async import LocalCluster, WukongClient
from wukong_async.config import Settings
from wukong_async.local.valkey import Valkey
from wukong_async.scheduler.announcements import Announcements
from wukong_async.store import Connections

LEAVES = 40


@pytest.fixture
async def stores() -> AsyncIterator[Connections]:
    """Connections to two servers of its own; fails a test that leaves a key on one of them."""
    servers: list[Valkey] = []
    try:
        for _ in range(2):
            servers.append(Valkey())
            await servers[-1].started()
        async with Connections([server.url for server in servers], timeout=5) as opened:
            yield opened
            assert [await keys_on(opened, shard) for shard in range(2)] == [[], []]
    finally:
        for server in servers:
            server.stop()


async def keys_on(stores: Connections, shard: int, pattern: str = "*") -> list[bytes]:
    found: list[bytes] = await stores.command(shard, "KEYS", pattern)
    return [key.encode() for key in of_jobs(found)]


def lengths(*values: bytes) -> int:
    return sum(map(len, values))


async def test_announcements_of_both_are_heard(stores: Connections) -> None:
    async with Announcements(stores) as announcements:
        for shard in range(2):
            with (
                announcements.expect("mine") as mine,
                announcements.expect("another") as another,
            ):
                await stores.command(shard, "PUBLISH", announcements.channel, "mine")
                async with asyncio.timeout(20):
                    await mine.wait()
                assert not another.is_set()


async def test_a_lost_connection_to_either_wakes_every_job(stores: Connections) -> None:
    async def subscribed() -> None:
        """Wait until nothing is lost any more."""
        words = ("PUBSUB", "NUMSUB", announcements.channel)
        async with asyncio.timeout(20):
            while not all([(await stores.command(s, *words))[1] for s in range(2)]):
                await asyncio.sleep(0.01)

    async with Announcements(stores) as announcements:
        for shard in range(2):
            with announcements.expect("mine") as mine, announcements.expect("another") as another:
                await stores.command(shard, "CLIENT", "KILL", "TYPE", "pubsub")
                async with asyncio.timeout(20):
                    await asyncio.gather(mine.wait(), another.wait())
                await subscribed()


async def test_jobs_with_large_values_use_both_and_leave_nothing(
    stores: Connections, tmp_path: Path
) -> None:
    settings = Settings(redis_endpoints=stores.endpoints)
    async with LocalCluster(2, environment=settings.environment()) as cluster:
        async with WukongClient(
            cluster,
            redis_endpoints=stores.endpoints,
            lease=300,  # Only announcements are fast.
            grace=300,
            **SPREAD,
        ) as client:
            metadata: set[int] = set()
            number = 0
            while metadata != {0, 1}:
                number += 1
                awaited = tmp_path / f"awaited-{number}"
                gate = delayed(touch_and_wait)(str(tmp_path / "touched"), str(awaited), b"")
                leaves = [delayed(bytes)(50_000 + i) for i in range(LEAVES)]
                computing = asyncio.ensure_future(
                    client.compute(delayed(lengths)(*leaves, gate), *leaves[:3])
                )
                async with asyncio.timeout(30):
                    # What the other executor has made, while one waits.
                    while not all(
                        [await keys_on(stores, shard, "*}:o[0-9]*") for shard in range(2)]
                    ):
                        await asyncio.sleep(0.01)
                    metadata |= {s for s in range(2) if await keys_on(stores, s, "*}:job")}
                    awaited.touch()
                    total, *some = await computing
                assert total == sum(range(50_000, 50_000 + LEAVES))
                assert some == [bytes(50_000 + i) for i in range(3)]
