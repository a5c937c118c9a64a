"""Values that are too large for the servers, and go through a bucket."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dask import delayed

from tests.acceptance.functions import add, ones, touch_and_wait
from tests.conftest import S3, eventually
from wukong_async import LocalCluster, WukongClient
from wukong_async.errors import BucketError

LARGE = 5_000_000
"""Numbers of 8 bytes: more than one request takes."""


async def test_large_values_go_through_the_bucket(
    cluster: LocalCluster, s3: S3, tmp_path: Path
) -> None:
    """A literal, what executors tell each other, and a result."""
    touched, awaited = tmp_path / "touched", tmp_path / "awaited"
    literal: Any = np.arange(LARGE)
    makes = [delayed(np.add)(literal, i) for i in range(3)]
    waiting = delayed(touch_and_wait)(str(touched), str(awaited), 1)
    before = cluster.stats().store_bytes_in
    async with WukongClient(cluster, **s3.settings) as client:
        computing = asyncio.ensure_future(client.compute(delayed(add)(*makes, waiting)))
        async with asyncio.timeout(60):
            while len(s3.names()) < 3:
                await asyncio.sleep(0.05)
        assert all(key.startswith("wukong/") for key in s3.names())
        awaited.touch()
        total = await computing
        assert np.array_equal(total, 3 * literal + 4)
        assert len(client.history) == 1
    assert cluster.stats().store_bytes_in - before < 1_000_000
    assert s3.names() == [], "once the job is over"


async def test_small_values_do_not(cluster: LocalCluster, s3: S3) -> None:
    async with WukongClient(cluster, **s3.settings) as client:
        literal: Any = np.arange(10_000)
        total = await client.compute(delayed(np.add)(literal, 1))
        assert np.array_equal(total, literal + 1)
    async with WukongClient(cluster, **{**s3.settings, "s3_bucket": "none"}) as client:
        assert np.array_equal(await client.compute(delayed(np.add)(literal, 1)), total)


async def test_what_the_bucket_has_lost_is_made_again(
    cluster: LocalCluster, s3: S3, tmp_path: Path
) -> None:
    touched, awaited = tmp_path / "touched", tmp_path / "awaited"
    large = [delayed(ones)(1) for _ in range(3)]
    waiting = delayed(touch_and_wait)(str(touched), str(awaited), 1)
    async with WukongClient(cluster, **s3.settings) as client:
        computing = asyncio.ensure_future(client.compute(delayed(add)(*large, waiting)))
        async with asyncio.timeout(60):
            while len(s3.names()) < 2:
                await asyncio.sleep(0.05)
        s3.delete(*s3.names())
        awaited.touch()
        assert (await computing == 4).all()
        assert len(client.history) == 1
    eventually(lambda: "they are computed again" in cluster.log())


async def test_a_bucket_that_does_not_exist_is_named(cluster: LocalCluster, s3: S3) -> None:
    settings = {**s3.settings, "s3_bucket": "no-such-bucket"}
    literal: Any = np.arange(LARGE)
    async with WukongClient(cluster, **settings) as client:
        for graph in (delayed(ones)(1), delayed(np.sum)(literal)):  # There, and here.
            with pytest.raises(BucketError) as caught:
                await client.compute(graph)
            assert str(caught.value).startswith(
                "The bucket 'no-such-bucket' (wukong.s3_bucket) cannot be used: "
            )
            assert "NoSuchBucket" in str(caught.value)


async def test_credentials_that_are_missing_are_missed(
    cluster: LocalCluster, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    literal: Any = np.arange(LARGE)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nowhere")
    async with WukongClient(cluster, **s3.settings) as client:
        with pytest.raises(BucketError, match=r"wukong\.s3_bucket.*credentials"):
            await client.compute(delayed(np.sum)(literal))


def test_results_in_a_bucket_reach_synchronous_code(cluster: LocalCluster, s3: S3) -> None:
    with WukongClient(cluster, **s3.settings) as client:
        found = delayed(np.arange)(100_000).compute(scheduler=client.get)
    assert np.array_equal(found, np.arange(100_000))
