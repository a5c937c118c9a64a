from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.conftest import of_jobs
from wukong_async.local.valkey import Valkey
from wukong_async.store import Connections


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    """A real server for all tests of this folder."""
    server = Valkey()
    asyncio.run(server.started())
    yield server
    server.stop()


@pytest.fixture
async def connections(valkey: Valkey) -> AsyncIterator[Connections]:
    """Connections to it; fails a test that leaves a key there."""
    async with Connections([valkey.url], timeout=5) as opened:
        await opened.check()
        yield opened
        keys = await opened.command(0, "KEYS", "*")
        await opened.command(0, "FLUSHALL")
        assert of_jobs(keys) == []
