"""The proxy: what it does for its peers, and what it does to strangers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from tests.conftest import SPREAD
from tests.integration.proxies import (
    FUNCTION,
    HOST,
    SECRET,
    LambdaApi,
    connect,
    lambda_api,
    proxy_of,
    saying,
    server_of,
)
from wukong_async import LocalCluster, WukongClient
from wukong_async.config import Settings
from wukong_async.errors import ConfigError, InvocationError
from wukong_async.fanout import Fired, FrameError, ProxyBusy, ProxyClient
from wukong_async.fanout.frames import (
    DIGEST_BYTES,
    MOST_BYTES,
    MOST_EVENTS,
    NONCE_BYTES,
    introduce,
    read_frame,
    write_frame,
)
from wukong_async.invoker import Invoker
from wukong_async.proxy import ProxyServer

NOBODY = b'{"wukong":1,"job":"nobody","executor":"0","versions":{}}'
"""An event for a job that does not exist: its executor exits at once."""


@pytest.fixture
async def server(cluster: LocalCluster) -> AsyncIterator[ProxyServer]:
    settings = Settings.load({**cluster.settings, "proxy_secret": SECRET})
    async with ProxyServer(settings, HOST, 0) as running:
        yield running


@pytest.fixture
async def api() -> AsyncIterator[LambdaApi]:
    async with asyncio.timeout(60), lambda_api() as running:
        yield running


def peer(port: int, secret: str | None = SECRET) -> ProxyClient:
    return ProxyClient(Settings(proxy_address=HOST, proxy_port=port, proxy_secret=secret))


def framed(message: Any) -> bytes:
    body = msgpack.packb(message)
    return struct.pack("!I", len(body)) + bytes(body)


async def fire(server: ProxyServer, *events: bytes) -> Fired:
    return await peer(server.port).fire(FUNCTION, events)


async def until_queued(server: ProxyServer, events: int) -> None:
    while server.health()["queued_events"] != events:
        await asyncio.sleep(0)


# Its work -------------------------------------------------------------------------------------


async def test_events_are_fired(server: ProxyServer, cluster: LocalCluster) -> None:
    before = cluster.stats().invocations
    assert await fire(server, *[NOBODY] * 50) == Fired(50, (), {})
    assert cluster.stats().invocations - before == 50
    assert server.counters.sent == 50


async def test_a_wide_job_goes_through_the_proxy(
    server: ProxyServer, cluster: LocalCluster
) -> None:
    settings: dict[str, Any] = {
        "proxy_address": HOST,
        "proxy_port": server.port,
        "proxy_secret": SECRET,
        "max_task_fanout": 3,
        "max_concurrency": 8,
        **SPREAD,
    }
    dsk = {f"x{i}": (abs, -i) for i in range(8)} | {"sum": (sum, [f"x{i}" for i in range(8)])}
    async with WukongClient(cluster, **settings) as client:
        assert await client.compute(dsk, "sum") == 28
        assert server.counters.sent == 8
        assert await client.compute({"a": (abs, -1)}, "a") == 1
        assert server.counters.sent == 8, "a narrow one does not"


async def test_calls_in_flight_are_bounded(api: LambdaApi, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = 0
    invoke = Invoker.invoke

    async def counted(invoker: Invoker, payload: bytes) -> bool:
        nonlocal begun
        begun += 1
        return await invoke(invoker, payload)

    monkeypatch.setattr(Invoker, "invoke", counted)
    api.open.clear()
    async with proxy_of(api, proxy_concurrency=3) as server:
        firing = asyncio.create_task(fire(server, *[b"{}"] * 20))
        await api.arrived.wait()
        assert begun == 3
        api.open.set()
        assert (await firing).sent == begun == 20


async def test_throttling_is_tried_again(api: LambdaApi) -> None:
    api.answers[b'"1"'] = [(429, "TooManyRequestsException")]
    async with proxy_of(api) as server:
        assert await fire(server, b'"0"', b'"1"') == Fired(2, (), {})
    assert sorted(api.events) == [b'"0"', b'"1"']


async def test_what_has_become_of_each_event_is_said(
    api: LambdaApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wukong_async.invoker.ATTEMPTS", 1)
    api.answers[b'"1"'] = [(429, "TooManyRequestsException")]
    api.answers[b'"3"'] = [(403, "AccessDeniedException")]
    async with proxy_of(api) as server:
        fired = await fire(server, *(b'"%d"' % i for i in range(5)))
        assert (fired.sent, fired.throttled, [*fired.failed]) == (3, (1,), [3])
        assert "AccessDeniedException" in fired.failed[3]
        counted = server.health()
    expected = {"events": 5, "sent": 3, "throttled": 1, "failed": 1, "queued_events": 0}
    assert {name: counted[name] for name in expected} == expected


async def test_an_event_fails_by_itself(api: LambdaApi, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(_: Invoker, event: bytes) -> bool:
        if event == b"broken":
            raise RuntimeError("x" * 1000)
        return True

    monkeypatch.setattr(Invoker, "invoke", broken)
    async with proxy_of(api) as server:
        fired = await fire(server, b"broken", b"{}")
    assert fired == Fired(1, (), {0: "x" * 200})


ARN = "arn:aws:lambda:us-east-1:000000000000:function:wukong-executor"


@pytest.mark.parametrize(
    ("mine", "theirs", "same"),
    [
        ("f", "f", True),
        ("f", "g", False),
        ("wukong-executor", ARN, True),
        (ARN, "wukong-executor", True),
        (ARN, f"{ARN}:$LATEST", True),
        (f"{ARN}:live", "wukong-executor:live", True),
        (f"{ARN}:live", ARN, False),
        ("wukong-executor", f"{ARN}:live", False),
        ("000000000000:function:wukong-executor", ARN, True),
        ("111111111111:function:wukong-executor", ARN, False),
        ("wukong-executor", ARN.replace("us-east-1", "eu-west-1"), False),
        ("f", "no function/at all", False),
        ("no function/at all", "no function/at all", False),
    ],
)
def test_the_function_that_is_meant(mine: str, theirs: str, same: bool) -> None:
    assert Invoker(Settings(function_name=mine, region="us-east-1")).is_for(theirs) is same


async def test_another_function_is_not_invoked(api: LambdaApi) -> None:
    async with proxy_of(api) as server:
        with pytest.raises(FrameError, match=r"refuses: it invokes wukong-executor, not other"):
            await peer(server.port).fire("other", [b"{}"])
    assert api.events == []


# Strangers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", ["wrong", None])
async def test_strangers_are_refused(api: LambdaApi, secret: str | None) -> None:
    async with proxy_of(api) as server:
        with pytest.raises((FrameError, OSError)):
            await peer(server.port, secret).fire(FUNCTION, [b"{}"])
        assert server.counters.frames == 0
        assert server.counters.closed == 1
        assert (await fire(server, b"{}")).sent == 1


class Recorded:
    """A proxy that keeps what a handshake with the true one looked like."""

    async def of(self, true: ProxyServer) -> tuple[bytes, bytes]:
        """What the peer said, and what the proxy said."""

        async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            upstream, forward = await asyncio.open_connection(HOST, true.port)
            nonce = await upstream.readexactly(NONCE_BYTES)
            writer.write(nonce)
            self.peer = await reader.readexactly(NONCE_BYTES + DIGEST_BYTES)
            forward.write(self.peer)
            self.proxy = nonce + await upstream.readexactly(DIGEST_BYTES)
            forward.transport.abort()

        async with server_of(between) as port:
            with pytest.raises((FrameError, OSError)):
                await peer(port).health()
        return self.peer, self.proxy


async def test_a_handshake_cannot_be_replayed(api: LambdaApi) -> None:
    async with proxy_of(api) as server:
        said, heard = await Recorded().of(server)
        reader, writer = await asyncio.open_connection(HOST, server.port)
        writer.write(said + framed({"invoke": [b"{}"], "function": FUNCTION}))
        writer.write_eof()
        assert len(await reader.read()) == NONCE_BYTES, "nothing but its challenge"
        writer.close()
        assert server.counters.frames == 0

    async def replay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(heard)
        await reader.read()

    async with server_of(replay) as port:
        with pytest.raises(FrameError, match="not our proxy"):
            await peer(port).health()


@pytest.mark.parametrize("proof", ["made up", "echoed"])
async def test_a_peer_refuses_a_false_proxy(proof: str) -> None:
    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"n" * NONCE_BYTES)
        await reader.readexactly(NONCE_BYTES)
        echo = await reader.readexactly(DIGEST_BYTES)
        writer.write(echo if proof == "echoed" else b"x" * DIGEST_BYTES)
        assert await reader.read() == b"", "it hears no events"

    async with server_of(impostor) as port:
        with pytest.raises(FrameError, match="not our proxy"):
            await peer(port).fire(FUNCTION, [b"{}"])


# Bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack("!I", MOST_BYTES + 1),
        struct.pack("!I", 3) + b"\xc1\xc1\xc1",
        struct.pack("!I", 100) + b"short",
        b"\x00",
        framed({"invoke": [b"{}"] * (MOST_EVENTS + 1), "function": FUNCTION}),
        *map(framed, [None, 7, {"invoke": 1}, {"invoke": ["text"], "function": FUNCTION}, {}]),
        framed({"invoke": [b"{}"]}),
    ],
)
async def test_a_bad_frame_ends_its_connection_only(api: LambdaApi, frame: bytes) -> None:
    async with proxy_of(api) as server:
        reader, writer = await connect(server.port)
        writer.write(frame)
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        assert server.counters.closed == 1
        assert server.health()["queued_bytes"] == 0
        assert (await fire(server, b"{}")).sent == 1


async def test_more_events_than_fit_are_not_sent_to_a_proxy() -> None:
    with pytest.raises(ProxyBusy, match="10001 events"):
        await peer(9).fire(FUNCTION, [b"{}"] * (MOST_EVENTS + 1))
    async with server_of(hang_up) as port:
        with pytest.raises((FrameError, OSError)):
            await peer(port).fire(FUNCTION, [b"x" * MOST_BYTES])


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Hang up."""


async def test_too_many_connections_are_told_so_and_then_closed(
    api: LambdaApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wukong_async.proxy.server.MOST_CONNECTIONS", 1)
    monkeypatch.setattr("wukong_async.proxy.server.SPARE_CONNECTIONS", 1)
    async with proxy_of(api) as server:
        _, first = await connect(server.port)
        with pytest.raises(ProxyBusy, match="2 connections are open"):
            await fire(server, b"{}")
        while server.health()["open_connections"] > 1:
            await asyncio.sleep(0)
        assert (await peer(server.port).health())["shed"] == 1, "its health can be asked for"
        while server.health()["open_connections"] > 1:
            await asyncio.sleep(0)
        _, second = await connect(server.port)
        with pytest.raises((FrameError, OSError)):
            await peer(server.port).health()
        for each in (first, second):
            each.transport.abort()
        while server.health()["open_connections"]:
            await asyncio.sleep(0)
        assert (await fire(server, b"{}")).sent == 1


async def test_more_events_than_it_can_send_in_time_are_shed(
    api: LambdaApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wukong_async.proxy.server.MOST_QUEUED_EVENTS", 5)
    api.open.clear()
    async with proxy_of(api) as server:
        firing = asyncio.create_task(fire(server, *[b"{}"] * 4))
        await until_queued(server, 4)
        with pytest.raises(ProxyBusy, match="4 events are queued"):
            await fire(server, b"{}", b"{}")
        also = asyncio.create_task(fire(server, b"{}"))
        await until_queued(server, 5)
        api.open.set()
        assert (await firing).sent == 4
        assert (await also).sent == 1
        assert (await fire(server, *[b"{}"] * 5)).sent == 5
        assert server.counters.shed == 1


async def test_more_bytes_than_there_is_memory_for_are_shed(
    api: LambdaApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wukong_async.proxy.server.MOST_QUEUED_BYTES", 1000)
    api.open.clear()
    async with proxy_of(api) as server:
        firing = asyncio.create_task(fire(server, b'"' + b"x" * 900 + b'"'))
        await until_queued(server, 1)
        reader, writer = await connect(server.port)
        await write_frame(writer, {"invoke": [b'"' + b"x" * 200_000 + b'"'], "function": FUNCTION})
        assert "bytes are queued" in (await read_frame(reader))["busy"]
        await write_frame(writer, {"health": None})
        assert (await read_frame(reader))["health"]["shed"] == 1, "the connection is as it was"
        writer.close()
        api.open.set()
        assert (await firing).sent == 1
        assert server.health()["queued_bytes"] == 0


@pytest.mark.parametrize("said", [b"", b"\x00\x00", framed({"health": None})[:-1]])
async def test_a_slow_peer_is_not_waited_for(
    api: LambdaApi, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr("wukong_async.proxy.server.PEER_TIMEOUT", 0.1)
    async with proxy_of(api) as server:
        reader, writer = await connect(server.port)
        writer.write(said)
        assert await reader.read() == b""
        writer.close()
        assert server.health()["queued_bytes"] == 0
        assert server.counters.closed == 1


async def test_a_peer_that_does_not_shake_hands_is_not_waited_for(
    api: LambdaApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wukong_async.proxy.server.HANDSHAKE_TIMEOUT", 0.1)
    async with proxy_of(api) as server:
        reader, writer = await asyncio.open_connection(HOST, server.port)
        writer.write(b"n" * NONCE_BYTES)
        assert len(await reader.read()) == NONCE_BYTES
        writer.close()
        assert server.counters.closed == 1


# Its end --------------------------------------------------------------------------------------


async def test_it_drains(
    api: LambdaApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("wukong_async.proxy.server.PEER_TIMEOUT", 1000.0)
    api.open.clear()

    async def look_on(idle: asyncio.StreamReader) -> None:
        assert await idle.read() == b"", "who has asked for nothing is let go"
        with pytest.raises((FrameError, OSError)):
            await fire(server, b"{}")
        assert not firing.done()
        api.open.set()

    async with proxy_of(api) as server:
        idle, idle_writer = await connect(server.port)
        firing = asyncio.create_task(fire(server, *[b"{}"] * 20))
        await until_queued(server, 20)
        assert "connections=2" in repr(server)
        looking = asyncio.create_task(look_on(idle))
    await looking
    assert (await firing).sent == 20, "what was accepted is finished"
    idle_writer.close()
    assert "cut off" not in caplog.text


async def test_a_peer_that_does_not_read_does_not_hold_up_the_end(
    api: LambdaApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answering = asyncio.Event()

    async def answer_at_length(server: ProxyServer, request: Any) -> dict[str, Any]:
        answering.set()
        return {"sent": 0, "failed": [[0, "x" * (MOST_BYTES - 100)]]}

    monkeypatch.setattr(ProxyServer, "_answer", answer_at_length)
    monkeypatch.setattr("wukong_async.proxy.server.DRAIN_TIMEOUT", 0.2)
    async with asyncio.timeout(20), proxy_of(api) as server:
        # A small buffer, or the answer would fit into it.
        plug = socket.socket()
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plug.setblocking(False)
        await asyncio.get_running_loop().sock_connect(plug, (HOST, server.port))
        reader, writer = await asyncio.open_connection(sock=plug)
        await introduce(SECRET, reader, writer)
        writer.write(framed({"health": None}))
        await answering.wait()
    assert "1 connections were cut off after 0.2 s" in caplog.text
    with pytest.raises((FrameError, OSError)):
        await read_frame(reader)
    writer.close()


def test_no_secret_no_proxy() -> None:
    with pytest.raises(ConfigError, match=r"wukong.proxy_secret is not set"):
        ProxyServer(Settings(), HOST, 0)


# The service ----------------------------------------------------------------------------------


def health_of(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "proxy_service", "--health"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


async def test_the_service(api: LambdaApi) -> None:
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    settings = Settings(endpoint_url=api.url, proxy_port=port, proxy_secret=SECRET)
    environment = {**os.environ, **settings.environment()}
    service = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy_service"),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert service.stdout is not None
        assert await service.stdout.readline() == f"proxy on port {port}\n".encode()
        assert (await peer(port).fire(FUNCTION, [b"{}"] * 3)).sent == 3
        health = await asyncio.to_thread(health_of, environment)
        assert health.returncode == 0
        assert json.loads(health.stdout)["sent"] == 3

        api.open.clear()
        api.arrived.clear()
        firing = asyncio.create_task(peer(port).fire(FUNCTION, [b"{}"] * 3))
        await api.arrived.wait()
        service.send_signal(signal.SIGTERM)
        while await listens(port):
            await asyncio.sleep(0)
        api.open.set()
        assert (await firing).sent == 3, "what was accepted is finished"
        assert await service.wait() == 0
    finally:
        if service.returncode is None:
            service.kill()
            await service.wait()
    health = await asyncio.to_thread(health_of, environment)
    assert health.returncode == 1
    assert health.stderr.startswith("proxy_service: ")


async def listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return False
    writer.transport.abort()
    return True


def test_the_service_says_what_it_lacks(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "proxy_service"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "proxy_service: wukong.proxy_secret is not set" in done.stderr


# The peer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        None,
        {},
        {"sent": 2, "throttled": [], "failed": []},
        {"sent": 3, "throttled": [0], "failed": []},
        {"sent": 1, "throttled": [1], "failed": [[1, "twice"]]},
        {"sent": 1, "throttled": [5], "failed": [[1, "where?"]]},
        {"sent": 1, "throttled": [[]], "failed": [[1, 2, 3]]},
    ],
)
async def test_an_answer_has_to_account_for_every_event(answer: Any) -> None:
    async with server_of(saying(answer)) as port:
        with pytest.raises(FrameError, match=r"answer (is not understood|does not fit)"):
            await peer(port).fire(FUNCTION, [b"{}"] * 3)
        with pytest.raises(InvocationError, match="not understood"):
            await peer(port).health()
