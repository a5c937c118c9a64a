"""Values that the store loses while somebody still has to read them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import redis.asyncio
from dask import delayed

from tests.acceptance.functions import add, inc, ones, touch_and_wait
from tests.conftest import SPREAD, eventually
from wukong_async import LocalCluster, WukongClient


async def test_lost_values_are_made_again(cluster: LocalCluster, tmp_path: Path) -> None:
    """With all that they were made from, if that is gone as well."""
    touched, awaited = tmp_path / "touched", tmp_path / "awaited"
    # The first executor has two large values, and is done; the second one waits.
    large = [delayed(ones)(delayed(inc)(0)) for _ in range(3)]
    waiting = delayed(touch_and_wait)(str(touched), str(awaited), 1)
    (url,) = cluster.settings["redis_endpoints"]
    async with (
        WukongClient(cluster, **SPREAD) as client,
        redis.asyncio.Redis.from_url(url) as store,
    ):
        computing = asyncio.ensure_future(client.compute(delayed(add)(*large, waiting)))
        async with asyncio.timeout(20):
            while len(keys := [k async for k in store.scan_iter("wukong:*:o[0-9]*")]) < 2:
                await asyncio.sleep(0.01)
        await store.delete(*keys)
        awaited.touch()
        total = await computing
        assert total.shape == (125_000,)
        assert (total == 4).all()
        assert len(client.history) == 1
        assert client.history[-1].begins == 2
    # What a sandbox prints may come after what it has computed.
    eventually(lambda: "they are computed again" in cluster.log())
