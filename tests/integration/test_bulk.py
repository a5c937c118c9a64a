"""Large bodies that go past redis-py's own way of reading and writing."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import random
import secrets
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as Disconnected

from wukong_async import wire
from wukong_async.errors import StoreError, StoreUnreachable
from wukong_async.local.valkey import Valkey
from wukong_async.protocol import Status
from wukong_async.store import Connections, JobStore, Place, payload, place_of
from wukong_async.store import bulk as bulk_module
from wukong_async.store.bulk import HUGE, SCRATCH, _Receiver, room

SIZES = (
    *(0, 1, 100, SCRATCH - 20, SCRATCH - 1, SCRATCH, SCRATCH + 1),
    *(3 * SCRATCH + 7, HUGE - 1, HUGE, 2 * HUGE + 1),
)


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Any], Any]]:
    """Each kind of loop has transports of its own."""
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield runner.run


@contextlib.asynccontextmanager
async def opened(url: str, timeout: float = 5) -> AsyncIterator[tuple[Connections, JobStore]]:
    async with Connections([url], timeout) as connections:
        await connections.check()
        store = JobStore(connections, secrets.token_hex(4))
        await store.open(600)
        yield connections, store
        await store.finish()


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


async def put(store: JobStore, number: int, segments: wire.Segments, parts: int = 1) -> Place:
    size = wire.size(segments)
    stored, objects = payload(
        number, segments, writer="w", inline_limit=-1, part_size=max(1, -(-size // parts))
    )
    assert await store.put(objects, 600) is Status.OK
    place = place_of(number, stored.inline)
    assert place is not None
    return place


async def there_and_back(url: str) -> None:
    async with opened(url) as (connections, store):
        frames = {n: content(size) for n, size in enumerate(SIZES[1:], 1)}
        places = [await put(store, n, [frame], 1 + n % 4) for n, frame in frames.items()]
        found = await store.fetch(places)
        assert {n: frame and bytes(frame) for n, frame in found.items()} == frames
        for place in places:
            assert await store.fetch([place]) == {place.task: frames[place.task]}
        # The connection is redis-py's again.
        assert await connections.command(0, "ECHO", "x") == b"x"
        gone = [place for place in places if place.task % 3 == 0]
        await store.delete([(place.task, place.token) for place in gone])
        found = await store.fetch(places)
        assert {n for n, frame in found.items() if frame is None} == {p.task for p in gone}
        assert all(frame == frames[n] for n, frame in found.items() if frame is not None)
        assert len(connections.client(0).connection_pool._available_connections) == 1


def test_values_of_all_sizes_there_and_back(run: Callable[[Any], Any], valkey: Valkey) -> None:
    run(there_and_back(valkey.url))


def test_the_same_through_tls(run: Callable[[Any], Any], valkey: Valkey, tmp_path: Path) -> None:
    certificate = tmp_path / "certificate.pem"
    certificate.write_bytes(self_signed())

    async def through_tls() -> None:
        async with relay(valkey, certificate) as port:
            await there_and_back(f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}")

    run(through_tls())


def test_sizes_need_not_be_known(run: Callable[[Any], Any], valkey: Valkey) -> None:
    async def guessed() -> None:
        async with opened(valkey.url) as (_, store):
            objects = {f"b{size}": content(size) for size in SIZES}
            assert await store.put([(n, [c]) for n, c in objects.items()], 600) is Status.OK
            for guess in (1, SCRATCH, HUGE):
                found = await store.get(list(objects), [guess] * len(objects))
                assert dict(zip(objects, found, strict=True)) == objects

    run(guessed())


def test_an_error_is_read_by_redis_py(run: Callable[[Any], Any], valkey: Valkey) -> None:
    async def forbidden() -> None:
        async with opened(valkey.url) as (connections, store):
            place = await put(store, 0, [content(2 * SCRATCH)])
            await connections.command(0, "ACL", "SETUSER", "u", "on", ">p", "~*", "+@all", "-mget")
            url = valkey.url.replace("unix://", "unix://u:p@")
            async with Connections([url], 5) as limited:
                with pytest.raises(StoreError, match=r"says: .*mget"):
                    await JobStore(limited, store.job_id).fetch([place])
            await connections.command(0, "ACL", "DELUSER", "u")

    run(forbidden())


def test_a_read_whose_connection_is_killed_is_asked_again(
    run: Callable[[Any], Any], valkey: Valkey
) -> None:
    async def killed() -> None:
        async with opened(valkey.url) as (connections, store), opened(valkey.url) as (admin, _):
            place = await put(store, 0, [content(4 * HUGE)], parts=3)
            for _ in range(10):
                found, _ = await asyncio.gather(
                    store.fetch([place]),
                    admin.command(0, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"),
                )
                assert found == {0: content(4 * HUGE)}
            assert await connections.command(0, "ECHO", "x") == b"x"

    run(killed())


def test_health_is_checked_before_and_not_in_between(
    run: Callable[[Any], Any], valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    get: Any = ConnectionPool.get_connection
    connected: set[Any] = set()

    async def noted(pool: ConnectionPool) -> Any:
        connection = await get(pool)
        connected.add(connection)
        return connection

    # Due whenever it is looked at, once a connection has said who it is.
    due = property(lambda self: -1 if self in connected else inf, lambda *_: None)
    monkeypatch.setattr(AbstractConnection, "next_health_check", due, raising=False)
    monkeypatch.setattr(ConnectionPool, "get_connection", noted)
    run(there_and_back(f"{valkey.url}?health_check_interval=1"))


def test_a_server_that_stops_in_a_body_is_named(run: Callable[[Any], Any]) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            words = []
            for _ in range(int(line[1:])):
                length = int((await reader.readline())[1:])
                words.append((await reader.readexactly(length + 2))[:-2])
            hello = b"%1\r\n+proto\r\n:3\r\n"
            answers = {b"HELLO": hello, b"MGET": b"*1\r\n$1000000\r\n" + bytes(99_999)}
            writer.write(answers.get(words[0], b"+OK\r\n"))
        writer.close()

    async def silent() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, Connections([f"redis://127.0.0.1:{port}"], timeout=0.3) as connections:
            with pytest.raises(StoreUnreachable, match="Timeout reading from 127"):
                await JobStore(connections, "j").fetch([Place(0, "w", 1, 1_000_000)])

    run(silent())


def test_a_reply_that_cannot_be_read_is_no_answer(run: Callable[[Any], Any]) -> None:
    async def read(reply: bytes) -> None:
        receiver = _Receiver(asyncio.Protocol(), 1, lambda _, length: room(length))
        feed(receiver, reply, len(reply))
        with pytest.raises(Disconnected, match="cannot be read"):
            await receiver.done

    for reply in (b"*2\r\n", b"*1\r\n:1\r\n", b"*1\r\n$x\r\n", b"*" + b"1" * SCRATCH):
        run(read(reply))


def feed(receiver: _Receiver, data: bytes, most: int) -> None:
    while data:
        buffer = receiver.get_buffer(-1)
        count = min(len(buffer), len(data), most)
        assert count
        buffer[:count] = data[:count]
        receiver.buffer_updated(count)
        data = data[count:]


@pytest.mark.parametrize("null", [b"_\r\n", b"$-1\r\n"])
@pytest.mark.parametrize("most", [1, 7, 1000, SCRATCH, 10**9])
async def test_a_reply_may_come_in_any_pieces(null: bytes, most: int) -> None:
    sizes = [0, 5, 17, SCRATCH - 30, 2 * SCRATCH] if most > 1 else [0, 5, 17]
    bodies = [content(size) for size in sizes]
    reply = b"*%d\r\n" % (2 * len(bodies))
    for body in bodies:
        reply += null + b"$%d\r\n%b\r\n" % (len(body), body)
    receiver = _Receiver(asyncio.Protocol(), 2 * len(bodies), lambda _, length: room(length))
    feed(receiver, reply + b">the next", most)
    assert await receiver.done
    assert receiver.found == [each for body in bodies for each in (None, body)]
    assert receiver.rest() == b">the next"


async def test_a_body_is_received_where_the_value_will_be(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = JobStore(connections, secrets.token_hex(4))
    await store.open(600)
    array = np.arange(1_000_000.0)
    rooms: list[memoryview] = []
    real = bulk_module.room

    def seen(size: int) -> memoryview:
        rooms.append(real(size))
        return rooms[-1]

    monkeypatch.setattr(bulk_module, "room", seen)
    segments = wire.dumps(array)
    place = await put(store, 0, segments, parts=3)
    frame = (await store.fetch([place]))[0]
    assert frame is not None
    copy = wire.loads(frame)
    assert np.array_equal(copy, array)
    assert copy.flags.writeable
    assert len(rooms) == 1
    assert np.shares_memory(copy, np.frombuffer(rooms[0], "u1")), "from the socket to the array"
    await store.finish()


@contextlib.asynccontextmanager
async def relay(valkey: Valkey, certificate: Path) -> AsyncIterator[int]:
    """The server behind TLS: the embedded one is built without."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    pumps: list[asyncio.Task[Any]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(str(valkey.socket))
        pumps.append(asyncio.create_task(pump(inner_reader, writer)))
        pumps.append(asyncio.create_task(pump(reader, inner_writer)))

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**20):
                writer.write(data)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]
        while pumps:
            await pumps.pop()


def self_signed() -> bytes:
    """A key and a certificate for 127.0.0.1."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "wukong")])
    now = dt.datetime.now(dt.UTC)
    addresses = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(addresses, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, raw = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    secret = key.private_bytes(pem, raw, serialization.NoEncryption())
    return secret + certificate.public_bytes(pem)
