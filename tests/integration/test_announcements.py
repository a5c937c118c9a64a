from __future__ import annotations

import asyncio

import pytest

from wukong_async.scheduler.announcements import Announcements
from wukong_async.store import Connections


async def test_a_connection_that_breaks_while_it_is_closed(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen_to = Announcements._listen_to

    async def breaks(self: Announcements, shard: int) -> None:
        try:
            await listen_to(self, shard)
        except asyncio.CancelledError:
            raise ConnectionError from None  # As if both happened on one turn of the loop.

    monkeypatch.setattr(Announcements, "_listen_to", breaks)
    async with asyncio.timeout(20):
        async with Announcements(connections):
            pass
