"""The invoker against a Lambda API that counts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from wukong_async.config import Settings
from wukong_async.errors import InvocationError, StoreLost
from wukong_async.invoker import Invoker
from wukong_async.loops import sending_after

HOST = "127.0.0.1"


class Lambda:
    """Answers no call before `expected` are in flight."""

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.url = ""
        self.calls = self.in_flight = self.peak = 0
        self.full = asyncio.Event()

    async def answer(self, _: web.BaseRequest) -> web.Response:
        self.calls += 1
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        if self.in_flight >= self.expected:
            self.full.set()
        await self.full.wait()
        for _turn in range(100):  # Whoever else has been sent arrives meanwhile.
            await asyncio.sleep(0)
        self.in_flight -= 1
        return web.Response(status=202)


@contextlib.asynccontextmanager
async def lambda_api(expected: int) -> AsyncIterator[Lambda]:
    api = Lambda(expected)
    runner = web.ServerRunner(web.Server(api.answer))
    await runner.setup()
    try:
        site = web.TCPSite(runner, HOST, 0)
        await site.start()
        address: Any = runner.addresses[0]
        api.url = f"http://{HOST}:{address[1]}"
        yield api
    finally:
        await runner.cleanup()


async def test_calls_in_flight_are_as_many_as_allowed_and_no_more() -> None:
    # More than botocore's own pool of 10 would let through.
    limit = 16
    async with lambda_api(limit) as api:
        settings = Settings(endpoint_url=api.url, invoke_concurrency=limit)
        async with asyncio.timeout(30), Invoker(settings) as invoker:
            await invoker.invoke_all([b"{}"] * 50)
            assert invoker.sent == api.calls == 50
        assert api.peak == limit


class Refusing:
    """A client that refuses one event while the others are on their way."""

    def __init__(self) -> None:
        self.cancel = asyncio.Event()
        self.refused: Callable[[], object] = lambda: None

    async def invoke(self, *, Payload: bytes, **_: object) -> None:  # noqa: N803 - botocore's
        if Payload == b"refused":
            self.refused()
            raise OSError("refused")
        try:
            await asyncio.Event().wait()
        finally:
            self.cancel.set()
            for _turn in range(10):  # Connections take a while to close.
                await asyncio.sleep(0)


async def test_whoever_is_cancelled_while_an_invocation_fails_is_cancelled() -> None:
    invoker = Invoker(Settings())
    invoker._client = client = Refusing()
    calling = asyncio.create_task(invoker.invoke_all([b"waits", b"refused"]))
    async with asyncio.timeout(20):
        await client.cancel.wait()
    calling.cancel()
    await asyncio.wait([calling])
    assert calling.cancelled()


async def test_an_invocation_that_fails_is_not_a_cancellation() -> None:
    invoker = Invoker(Settings())
    invoker._client = Refusing()
    for payloads in ([b"refused"], [b"waits", b"refused", b"waits"]):
        with pytest.raises(InvocationError, match="refused"):
            await invoker.invoke_all(payloads)
    me = asyncio.current_task()
    assert me is not None
    assert not me.cancelling()


async def test_whoever_is_cancelled_in_the_same_moment_is_cancelled() -> None:
    invoker = Invoker(Settings())
    invoker._client = client = Refusing()
    calling = asyncio.create_task(invoker.invoke_all([b"waits", b"refused"]))
    client.refused = calling.cancel
    await asyncio.wait([calling])
    assert calling.cancelled()


async def test_events_are_sent_when_what_has_to_be_done_before_is_done() -> None:
    done = asyncio.Event()
    async with lambda_api(1) as api:
        settings = Settings(endpoint_url=api.url)
        async with asyncio.timeout(30), Invoker(settings) as invoker:
            before = asyncio.create_task(done.wait())
            with sending_after(before):
                sending = asyncio.create_task(invoker.invoke_all([b"{}"] * 3))
            await invoker.invoke(b"{}")  # Another job's.
            assert api.calls == 1
            assert not sending.done()
            done.set()
            await sending
            assert invoker.sent == api.calls == 4


async def test_events_are_not_sent_if_what_has_to_be_done_before_fails() -> None:
    async def fail() -> None:
        raise StoreLost("It is gone.")

    async with lambda_api(1) as api:
        settings = Settings(endpoint_url=api.url)
        async with asyncio.timeout(30), Invoker(settings) as invoker:
            before = asyncio.create_task(fail())
            with sending_after(before), pytest.raises(StoreLost, match="It is gone"):
                await invoker.invoke_all([b"{}"] * 3)
            assert invoker.sent == api.calls == 0
