"""What a job leaves in a warm sandbox for the next one: nothing."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from wukong_async import LocalCluster, WukongClient

Surroundings = tuple[int, str, dict[str, str]]


@pytest.fixture
async def client() -> AsyncIterator[WukongClient]:
    """A client of a single sandbox, which is warm for the second job."""
    async with LocalCluster(1) as cluster, WukongClient(cluster) as entered:
        yield entered


async def test_a_job_does_not_meet_the_surroundings_of_an_earlier_one(client: WukongClient) -> None:
    # By value: a sandbox could import them only from where it is.
    def look() -> Surroundings:
        own = {k: v for k, v in os.environ.items() if k != "_X_AMZN_TRACE_ID"}
        return os.getpid(), str(Path.cwd()), own

    def spoil(directory: str) -> Surroundings:
        os.chdir(directory)
        os.environ["WUKONG_TEST_ADDED"] = "1"
        os.environ["AWS_REGION"] = "mars-1"
        del os.environ["PYTHONPATH"]
        return look()

    async def run(function: Any, *arguments: str) -> Surroundings:
        found: Surroundings = await client.compute({"x": (function, *arguments)}, "x")
        return found

    before = await run(look)
    spoiled = await run(spoil, os.sep)
    assert spoiled[0] == before[0], "the sandbox is warm"
    assert spoiled[1:] != before[1:]
    assert await run(look) == before


async def test_each_request_has_a_trace_of_its_own(client: WukongClient) -> None:
    def trace() -> str:
        return os.environ["_X_AMZN_TRACE_ID"]

    assert await client.compute({"x": (trace,)}, "x") != await client.compute({"x": (trace,)}, "x")
