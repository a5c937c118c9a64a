"""Values that are compressed on their way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from dask import delayed

from wukong_async import LocalCluster, WukongClient

NUMBERS = 200_000


@pytest.mark.parametrize(("mode", "compressed"), [("auto", False), ("lz4", True), ("none", False)])
async def test_values_are_compressed_if_that_is_asked_for(
    cluster: LocalCluster, mode: str, compressed: bool
) -> None:
    """Over a unix socket nothing else compresses them."""
    array = delayed(np.arange)(NUMBERS)
    literal: Any = np.arange(NUMBERS) % 100
    before = cluster.stats().store_bytes_in
    async with WukongClient(cluster, compression=mode) as client:
        found, total = await client.compute([array, delayed(np.add)(array, literal)])
    written = cluster.stats().store_bytes_in - before
    assert np.array_equal(found, np.arange(NUMBERS))
    assert np.array_equal(total, np.arange(NUMBERS) + literal)
    plain = 3 * 8 * NUMBERS
    assert (written < 0.8 * plain) == compressed, written / plain
