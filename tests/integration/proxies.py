"""Proxies that work, proxies that do not, and a Lambda API that says what it is told to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web

from wukong_async.config import Settings
from wukong_async.fanout.frames import introduce, read_frame, welcome, write_frame
from wukong_async.proxy import ProxyServer

HOST = "127.0.0.1"
SECRET = "shared secret"
FUNCTION = "wukong-executor"


class LambdaApi:
    """Takes every event, but for the first answers that are given; holds all while it is closed."""

    def __init__(self) -> None:
        self.answers: dict[bytes, list[tuple[int, str]]] = {}
        """What to say to an event at first: a status and the name of an error."""
        self.events: list[bytes] = []
        """Those that were accepted."""
        self.arrived = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()
        self.url = ""

    async def answer(self, http: web.BaseRequest) -> web.Response:
        event = await http.read()
        self.arrived.set()
        await self.open.wait()
        if self.answers.get(event):
            status, error = self.answers[event].pop(0)
            body = b'{"message": "not this one"}'
            return web.Response(status=status, body=body, headers={"x-amzn-ErrorType": error})
        self.events.append(event)
        return web.Response(status=202)


@contextlib.asynccontextmanager
async def lambda_api() -> AsyncIterator[LambdaApi]:
    api = LambdaApi()
    runner = web.ServerRunner(web.Server(api.answer), shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, HOST, 0).start()
        address: Any = runner.addresses[0]
        api.url = f"http://{HOST}:{address[1]}"
        yield api
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def proxy_of(api: LambdaApi, **settings: Any) -> AsyncIterator[ProxyServer]:
    """A proxy that invokes through that API, and watches no store."""
    made = Settings(endpoint_url=api.url, proxy_secret=SECRET, **settings)
    async with ProxyServer(made, HOST, 0) as running:
        yield running


Conversation = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def server_of(talk: Conversation) -> AsyncIterator[int]:
    """Something that listens; its port. Ends when all conversations have."""
    talking: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        me = asyncio.current_task()
        assert me is not None
        talking.add(me)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await talk(reader, writer)
        finally:
            writer.transport.abort()
            talking.discard(me)

    server = await asyncio.start_server(serve, HOST, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        if talking:
            await asyncio.wait(talking)


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Accepts, and says nothing."""
    await reader.read()


async def silent_later(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Takes the events, and says nothing."""
    await welcome(SECRET, reader, writer)
    await reader.read()


async def dying(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Takes the events, and dies."""
    await welcome(SECRET, reader, writer)
    await read_frame(reader)


def saying(answer: Any) -> Conversation:
    """Takes the events, and gives an answer."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await welcome(SECRET, reader, writer)
        await read_frame(reader)
        await write_frame(writer, answer)
        await reader.read()

    return talk


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A peer that knows the secret, after the handshake."""
    reader, writer = await asyncio.open_connection(HOST, port)
    await introduce(SECRET, reader, writer)
    return reader, writer
