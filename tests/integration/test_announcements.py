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


async def test_whoever_is_told_to_end_while_subscribing_ends(connections: Connections) -> None:
    """Whenever it is: redis-py forgets a cancellation that comes with an answer."""
    for turns in range(0, 40, 3):
        entering = asyncio.create_task(Announcements(connections).__aenter__())
        for _ in range(turns):
            await asyncio.sleep(0)
        if entering.done():
            await entering.result().__aexit__(None, None, None)
            continue
        entering.cancel()
        done, _ = await asyncio.wait([entering], timeout=20)
        assert done, f"it goes on, told to end after {turns} turns of the loop"


async def test_a_server_that_refuses_does_not_disturb_the_others(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Connections([*connections.endpoints, *connections.endpoints], timeout=20) as two:
        listen_to = Announcements._listen_to
        opened = [0, 0]
        often = asyncio.Event()

        async def refused(self: Announcements, shard: int) -> None:
            opened[shard] += 1
            if opened[1] > 8:
                often.set()
            if shard == 1 and self._ready.is_set():
                raise ConnectionError
            await asyncio.wait_for(listen_to(self, shard), 0.01 if shard else None)

        monkeypatch.setattr(Announcements, "_listen_to", refused)
        async with asyncio.timeout(60), Announcements(two):
            await often.wait()
            assert opened[0] == 1
