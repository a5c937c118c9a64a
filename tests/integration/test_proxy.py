"""The proxy: what it does for its peers, and what it does to strangers."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import msgpack
import pytest

from wukong_async import LocalCluster, WukongClient
from wukong_async.config import Settings
from wukong_async.errors import ConfigError, FunctionNotFound, InvocationError
from wukong_async.proxy import FrameError, ProxyClient, ProxyServer
from wukong_async.proxy.frames import MOST_BYTES, NONCE_BYTES, prove

SECRET = "shared secret"
NOBODY = b'{"wukong":1,"job":"nobody","executor":"0","versions":{}}'
"""An event for a job that does not exist: its executor exits at once."""


@pytest.fixture
async def server(cluster: LocalCluster) -> AsyncIterator[ProxyServer]:
    settings = Settings.load({**cluster.settings, "proxy_secret": SECRET})
    async with ProxyServer(settings, "127.0.0.1", 0) as running:
        yield running


def peer(server: ProxyServer, secret: str = SECRET, port: int | None = None) -> ProxyClient:
    return ProxyClient(
        Settings(proxy_address="127.0.0.1", proxy_port=port or server.port, proxy_secret=secret)
    )


async def raw(server: ProxyServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A peer that knows the secret, after the handshake."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(prove(SECRET, await reader.readexactly(NONCE_BYTES)))
    await reader.readexactly(32)
    return reader, writer


async def test_events_are_fired(server: ProxyServer, cluster: LocalCluster) -> None:
    before = cluster.stats().invocations
    await peer(server).fire([NOBODY] * 50)
    assert cluster.stats().invocations - before == 50
    assert server.fired == 50


async def test_a_wide_job_goes_through_the_proxy(
    server: ProxyServer, cluster: LocalCluster
) -> None:
    settings: dict[str, Any] = {
        "proxy_address": "127.0.0.1",
        "proxy_port": server.port,
        "proxy_secret": SECRET,
        "max_task_fanout": 3,
        "max_concurrency": 8,
    }
    dsk = {f"x{i}": (abs, -i) for i in range(8)} | {"sum": (sum, [f"x{i}" for i in range(8)])}
    async with WukongClient(cluster, **settings) as client:
        assert await client.compute(dsk, "sum") == 28
        assert server.fired == 8
        assert await client.compute({"a": (abs, -1)}, "a") == 1
        assert server.fired == 8, "a narrow one does not"


async def test_without_its_proxy_a_job_is_slower_and_not_stuck(cluster: LocalCluster) -> None:
    settings: dict[str, Any] = {
        "proxy_address": "127.0.0.1",
        "proxy_port": 9,
        "proxy_secret": SECRET,
        "max_task_fanout": 0,
    }
    async with WukongClient(cluster, **settings) as client:
        assert await client.compute({"a": (abs, -1)}, "a") == 1


async def test_a_cluster_brings_its_own() -> None:
    async with LocalCluster(1, use_local_proxy=True) as cluster:
        async with WukongClient(cluster, max_task_fanout=0) as client:
            assert await client.compute({"a": (abs, -1)}, "a") == 1
        assert cluster._proxy is not None
        assert cluster._proxy.fired == 1


@pytest.mark.parametrize("secret", ["wrong", ""])
async def test_strangers_are_refused(
    server: ProxyServer, cluster: LocalCluster, secret: str
) -> None:
    client = ProxyClient(
        Settings(proxy_address="127.0.0.1", proxy_port=server.port, proxy_secret=secret or None)
    )
    with pytest.raises((FrameError, OSError)):
        await client.fire([NOBODY])
    assert server.fired == 0
    await peer(server).fire([NOBODY])


async def test_a_peer_refuses_a_false_proxy() -> None:
    hung_up = asyncio.Event()

    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"n" * NONCE_BYTES)
        await reader.readexactly(32)
        writer.write(b"x" * 32)
        await reader.read()
        writer.close()
        hung_up.set()

    async with await asyncio.start_server(impostor, "127.0.0.1", 0) as false:
        port = false.sockets[0].getsockname()[1]
        settings = Settings(proxy_address="127.0.0.1", proxy_port=port, proxy_secret=SECRET)
        with pytest.raises(FrameError, match="not our proxy"):
            await ProxyClient(settings).fire([NOBODY])
        await hung_up.wait()


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack("!I", MOST_BYTES + 1),
        struct.pack("!I", 3) + b"\xc1\xc1\xc1",
        struct.pack("!I", 100) + b"short",
        b"\x00",
        *(
            struct.pack("!I", len(body)) + body
            for body in map(msgpack.packb, [None, 7, {"invoke": 1}, {"invoke": ["text"]}, {}])
        ),
    ],
)
async def test_a_bad_frame_ends_its_connection_only(server: ProxyServer, frame: bytes) -> None:
    reader, writer = await raw(server)
    writer.write(frame)
    writer.write_eof()
    assert await reader.read() == b""
    writer.close()
    await peer(server).fire([NOBODY])


async def test_what_lambda_refuses_is_reported(server: ProxyServer, cluster: LocalCluster) -> None:
    with pytest.raises(InvocationError, match=r"1 events were refused: .*parse request body"):
        await peer(server).fire([NOBODY, b"{nonsense"])


async def test_it_drains(cluster: LocalCluster) -> None:
    settings = Settings.load({**cluster.settings, "proxy_secret": SECRET})
    async with ProxyServer(settings, "127.0.0.1", 0) as running:
        reader, writer = await raw(running)
        idle_reader, idle_writer = await raw(running)
        body = msgpack.packb({"invoke": [NOBODY] * 20})
        writer.write(struct.pack("!I", len(body)) + body)
        (length,) = struct.unpack("!I", await reader.readexactly(4))
        assert msgpack.unpackb(await reader.readexactly(length))["sent"] == 20
        assert "connections=2" in repr(running)
    assert await idle_reader.read() == b""
    for each in (writer, idle_writer):
        each.close()
    with pytest.raises(OSError):
        await peer(running).fire([NOBODY])


async def test_a_peer_that_does_not_read_does_not_hold_up_the_end(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answering = asyncio.Event()

    async def answer_at_length(server: ProxyServer, request: Any) -> dict[str, Any]:
        answering.set()
        return {"sent": 0, "failed": [[0, "x" * (MOST_BYTES - 100)]]}

    monkeypatch.setattr(ProxyServer, "_answer", answer_at_length)
    monkeypatch.setattr("wukong_async.proxy.server.DRAIN_TIMEOUT", 0.2)
    settings = Settings.load({**cluster.settings, "proxy_secret": SECRET})
    async with asyncio.timeout(20), ProxyServer(settings, "127.0.0.1", 0) as running:
        reader, writer = await raw(running)
        body = msgpack.packb({"invoke": []})
        writer.write(struct.pack("!I", len(body)) + body)
        await answering.wait()
    assert "1 connections were cut off after 0.2 s" in caplog.text
    assert len(await reader.read()) < MOST_BYTES - 100, "the rest is not sent after the end"
    writer.close()


async def test_a_function_that_is_not_there(cluster: LocalCluster) -> None:
    settings = Settings.load(
        {**cluster.settings, "proxy_secret": SECRET, "function_name": "nothing"}
    )
    async with ProxyServer(settings, "127.0.0.1", 0) as running:
        with pytest.raises(InvocationError, match="There is no function 'nothing'"):
            await peer(running).fire([NOBODY])
    assert issubclass(FunctionNotFound, InvocationError)


def test_no_secret_no_proxy() -> None:
    with pytest.raises(ConfigError, match=r"wukong.proxy_secret is not set"):
        ProxyServer(Settings(), "127.0.0.1", 0)


def test_the_service(cluster: LocalCluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = Settings.load({**cluster.settings, "proxy_port": port, "proxy_secret": SECRET})
    with subprocess.Popen(
        [sys.executable, "-m", "proxy_service"],
        env={**os.environ, **settings.environment()},
        stdout=subprocess.PIPE,
        text=True,
    ) as service:
        assert service.stdout is not None
        assert service.stdout.readline() == f"proxy on port {port}\n"
        client = ProxyClient(settings.replace(proxy_address="127.0.0.1"))
        asyncio.run(client.fire([NOBODY] * 3))
        service.send_signal(signal.SIGTERM)
        assert service.wait(20) == 0


def test_the_service_says_what_it_lacks() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "proxy_service"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "proxy_service: wukong.proxy_secret is not set" in done.stderr
