"""Connections that get lost, servers that do not answer, several servers."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.conftest import of_jobs
from tests.integration.jobs import new_job
from wukong_async import wire
from wukong_async.errors import ConfigError, StoreError, StoreFull, StoreUnreachable
from wukong_async.local.valkey import Valkey
from wukong_async.protocol import Commit, JobState, Payload, Status
from wukong_async.scheduler.announcements import Announcements
from wukong_async.store import Connections, JobStore, NewJob, Place, commit_body
from wukong_async.store.connections import BUSY


def tiny_job() -> NewJob:
    return new_job(tasks=1, slots=1, records=[("0", [0])])


@contextlib.asynccontextmanager
async def another_valkey() -> AsyncIterator[Valkey]:
    server = Valkey()
    try:
        await server.started()
        yield server
    finally:
        server.stop()


@pytest.fixture
async def narrow(connections: Connections, monkeypatch: pytest.MonkeyPatch) -> JobStore:
    """A store of one job, whose requests take a kilobyte."""
    monkeypatch.setattr("wukong_async.store.job.BATCH_BYTES", 1000)
    store = JobStore(connections, secrets.token_hex(4))
    await store.open(600)
    return store


async def test_a_killed_connection_is_no_answer(connections: Connections) -> None:
    async def kill() -> None:
        await connections.command(0, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    store = JobStore(connections, secrets.token_hex(4))
    await store.open(600)
    await store.create(tiny_job())
    for attempt in range(20):
        await asyncio.gather(kill(), store.begin("0", "n"), store.renew("0", 1, "n"), kill())
        begun = await store.begin("0", "n")
        assert begun.generation == 1, attempt
    commit = Commit(passed=1, stay=(), results=(0,))
    body = commit_body(commit, {0: Payload(b"\x01x")}, told=begun.told)
    _, reply, _ = await asyncio.gather(kill(), store.commit("0", 1, "n", 1, body), kill())
    assert reply.status in {Status.OK, Status.FENCED}, "it took effect; the record is gone"
    assert (await store.outcome()).passed == 1
    await store.finish()


async def test_scripts_come_back_after_a_restart(connections: Connections) -> None:
    store = JobStore(connections, secrets.token_hex(4))
    await store.open(600)
    await connections.command(0, "SCRIPT", "FLUSH")
    assert await store.create(tiny_job()) is Status.OK
    await connections.command(0, "SCRIPT", "FLUSH")
    assert await store.put([("o0.0", [b"x"])], 600) is Status.OK
    await store.cancel(JobState.CANCELLED, b"")
    await store.finish()


async def test_what_a_job_needs_is_put_as_it_is_created(connections: Connections) -> None:
    store = JobStore(connections, secrets.token_hex(4))
    await store.open(600)
    await connections.command(0, "SCRIPT", "FLUSH")
    for _ in range(2):  # An answer may get lost.
        assert await store.create(tiny_job(), [("b0", [b"a", b"b"]), ("b1", [b"c"])]) is Status.OK
    assert await store.get(["b0", "b1"], [2, 1]) == [b"ab", b"c"]
    assert (await store.begin("0", "n")).status is Status.OK
    await store.cancel(JobState.CANCELLED, b"")
    await store.finish()
    assert await store.create(tiny_job(), [("b0", [b"late"])]) is Status.GONE
    assert of_jobs(await connections.command(0, "KEYS", "*")) == []


async def test_what_a_job_needs_may_be_too_much_for_one_request(
    connections: Connections, narrow: JobStore
) -> None:
    objects: list[tuple[str, wire.Segments]] = [(f"b{i}", [bytes([i]) * 700]) for i in range(3)]
    assert await narrow.create(tiny_job(), objects) is Status.OK
    assert await narrow.get(["b0", "b2"], [700, 700]) == [bytes(700), b"\2" * 700]
    await narrow.cancel(JobState.CANCELLED, b"")
    await narrow.finish()
    assert await narrow.create(tiny_job(), objects) is Status.GONE
    assert of_jobs(await connections.command(0, "KEYS", "*")) == []


@pytest.mark.parametrize("wrong", ["live", "idx"])
async def test_after_an_error_nothing_is_left_to_be_read(
    connections: Connections, wrong: str
) -> None:
    store = JobStore(connections, secrets.token_hex(4))
    await store.open(600)
    await connections.command(0, "SET", store._key(wrong), "of another kind")
    with pytest.raises(StoreError, match="WRONGTYPE"):
        await store.create(tiny_job(), [("b0", [b"x"])])
    assert await connections.command(0, "ECHO", "mine") == b"mine"
    await connections.command(0, "DEL", store._key(wrong), store._key("b0"))
    await store.cancel(JobState.FAILED, b"why")
    await store.finish()


async def test_a_server_that_is_not_there() -> None:
    async with Connections(["unix:///nowhere/valkey.sock"], timeout=0.2) as connections:
        with pytest.raises(StoreUnreachable, match=r"unix:///nowhere/valkey.sock has not answered"):
            await connections.check()


async def test_a_server_that_goes_away() -> None:
    async with another_valkey() as server:
        async with Connections([server.url], timeout=0.3) as connections:
            await connections.check()
            server.stop()
            with pytest.raises(StoreUnreachable):
                await connections.command(0, "PING")


async def test_a_password_that_is_wrong() -> None:
    async with another_valkey() as server:
        async with Connections([server.url], timeout=5) as connections:
            await connections.command(0, "CONFIG", "SET", "requirepass", "right")
        for secret in ("", ":wrong@"):
            url = server.url.replace("unix://", f"unix://{secret}")
            async with Connections([url], timeout=5) as connections:
                with pytest.raises(StoreUnreachable, match="refuses access") as caught:
                    await connections.check()
                assert "wrong" not in str(caught.value).replace("WRONGPASS", "")
        async with Connections(
            [server.url.replace("unix://", "unix://:right@")], timeout=5
        ) as connections:
            await connections.check()


async def test_an_answer_that_will_not_change_is_raised(connections: Connections) -> None:
    with pytest.raises(StoreError, match="unknown command"):
        await connections.command(0, "NONSENSE")


@pytest.mark.parametrize("endpoints", [[], ["redis://host:port"]])
async def test_endpoints_that_cannot_be(endpoints: list[str]) -> None:
    with pytest.raises(ConfigError, match="redis_endpoints"):
        await Connections(endpoints, timeout=1).__aenter__()


async def test_objects_spread_over_all_servers(valkey: Valkey) -> None:
    async with (
        another_valkey() as second,
        another_valkey() as third,
        Connections([valkey.url, second.url, third.url], timeout=5) as connections,
    ):
        await connections.check()
        store = JobStore(connections, secrets.token_hex(4))
        await store.open(600)
        await store.create(tiny_job())
        objects: list[tuple[str, wire.Segments]] = [
            (Place(i, "0-1", 1).names[0], [b"value", str(i).encode()]) for i in range(60)
        ]
        assert await store.put(objects, 600) is Status.OK
        names = [name for name, _ in objects]
        assert await store.get(names, [9] * 60) == [wire.join(s) for _, s in objects]
        counts = [len(await connections.command(s, "KEYS", "*:o*")) for s in range(3)]
        assert sum(counts) == 60 + 3, "with a mark on each"
        assert min(counts) > 5
        await store.delete([(i, Place(i, "0-1", 1).token) for i in range(30)])
        assert await store.get(names, [9] * 60) == [None] * 30 + [
            wire.join(s) for _, s in objects[30:]
        ]
        await store.cancel(JobState.CANCELLED, b"")
        await store.finish()
        for shard in range(3):
            assert of_jobs(await connections.command(shard, "KEYS", "*")) == []


async def test_a_shard_keeps_its_objects_when_another_joins() -> None:
    two = Connections(["redis://a:1", "redis://b:1"], timeout=1)
    three = Connections(["redis://a:1", "redis://b:1", "redis://c:1"], timeout=1)
    moved = [n for n in map(str, range(900)) if two.shard(n) != three.shard(n)]
    assert all(three.shard(name) == 2 for name in moved)
    assert 200 < len(moved) < 400


async def test_large_values_travel_in_parts_and_batches(narrow: JobStore) -> None:
    objects: list[tuple[str, wire.Segments]] = [(f"o{i}.0", [bytes([i]) * 700]) for i in range(10)]
    assert await narrow.put(objects, 600) is Status.OK
    found = await narrow.get([name for name, _ in objects], [700] * 10)
    assert found == [segments[0] for _, segments in objects]
    await narrow.finish()


@pytest.mark.parametrize("by", ["its client", "an executor"])
async def test_a_job_can_be_ended_and_cleaned_up_in_a_full_store(by: str) -> None:
    async with another_valkey() as server, Connections([server.url], 0.3) as connections:
        await connections.check()
        store = JobStore(connections, "j")
        await store.open(600)
        await store.put([("o0.0", [bytes(5_000_000)])], 600)
        await store.create(tiny_job())
        begun = await store.begin("0", "n")
        await connections.command(0, "CONFIG", "SET", "maxmemory", "1mb")
        with pytest.raises(StoreFull, match=r"has been full for 0\.\d s .*Raise its maxmemory"):
            await store.put([("o1.0", [b"x"])], 600)
        if by == "its client":
            await store.cancel(JobState.FAILED, b"why")
        else:
            body = commit_body(Commit(failed=True), {}, b"why", begun.told)
            assert (await store.commit("0", 1, "n", 1, body)).status is Status.STOP
        assert (await store.outcome()).state is JobState.FAILED
        assert await store.finish()
        assert await connections.command(0, "DBSIZE") == 0


async def test_a_server_that_takes_no_subscription_is_named() -> None:
    async with another_valkey() as server:
        async with Connections([server.url], timeout=5) as admin:
            await admin.command(0, "ACL", "SETUSER", "u", "on", ">pw", "~*", "+@all", "-subscribe")
        url = server.url.replace("unix://", "unix://u:pw@")
        async with Connections([url], timeout=0.3) as connections:
            await connections.check()
            with pytest.raises(StoreUnreachable) as caught:
                async with Announcements(connections):
                    pass
    assert f"The store at {server.url.replace('unix://', 'unix://u:***@')} has" in str(caught.value)
    assert "wukong.store_timeout" in str(caught.value)
    assert "permission" in str(caught.value)


async def test_a_server_that_is_silent_to_subscribers_is_named() -> None:
    async with another_valkey() as server, Connections([server.url], timeout=0.3) as connections:
        await connections.command(0, "CLIENT", "PAUSE", 60_000)
        with pytest.raises(StoreUnreachable, match=f"The store at {server.url} has not taken"):
            async with Announcements(connections):
                pass


async def test_a_cancellation_is_never_forgotten(connections: Connections) -> None:
    async def ask_for_ever() -> None:
        while True:
            await connections.command(0, "PING")

    for turns in range(60):
        asking = asyncio.create_task(ask_for_ever())
        for _ in range(turns):
            await asyncio.sleep(0)
        asking.cancel()
        done, _ = await asyncio.wait([asking], timeout=10)
        assert done, turns


async def test_a_put_to_a_server_that_has_forgotten_the_scripts_is_confirmed_at_once(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dies(*_: object) -> None:
        raise StoreError("before the scripts were loaded again")

    await connections.command(0, "SCRIPT", "FLUSH")
    monkeypatch.setattr(Connections, "_load_all", dies)
    store = JobStore(connections, secrets.token_hex(4))
    assert await store.put([("o0.w.0", [b"value"])], 600) is Status.CLOSED
    assert await connections.command(0, "DBSIZE") == 0


async def test_a_connection_that_is_dead_is_not_a_server_that_is_silent() -> None:
    """Packets of connections get lost while a function is frozen, or a server is replaced."""
    opened = 0
    dead = 0
    serving: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        mine = opened
        serving.append(asyncio.current_task())
        while line := await reader.readline():
            for _ in range(int(line[1:])):
                length = int((await reader.readline())[1:])
                word = await reader.readexactly(length + 2)
            if mine > dead:
                hello = b"%1\r\n+proto\r\n:3\r\n"
                writer.write(hello if word == b"3\r\n" else b"+OK\r\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, Connections([f"redis://127.0.0.1:{port}"], timeout=3) as connections:
        echoes = (connections.command(0, "ECHO", "x") for _ in range(3))
        assert await asyncio.gather(*echoes) == [b"OK"] * 3
        assert opened == 3
        dead = opened
        for _ in range(2):  # The second time, nothing that has lain idle is used again.
            assert await connections.command(0, "ECHO", "x") == b"OK"
            assert opened == 4
    await asyncio.gather(*filter(None, serving))


@pytest.mark.parametrize(
    "start", ["", "Command # 1 (SET k v) of pipeline caused error: ", "… caused error: ('"]
)
@pytest.mark.parametrize("reason", ["LOADING Redis is", "NOREPLICAS Not enough", "BUSY Redis"])
def test_what_a_server_says_when_it_means_not_now(start: str, reason: str) -> None:
    assert BUSY.match(f"{start}{reason} …")
    assert not BUSY.match(f"{start}ERR {reason}")


async def test_a_server_that_takes_no_writes_for_a_moment_is_asked_again() -> None:
    async with another_valkey() as server, Connections([server.url], timeout=20) as connections:
        await connections.check()
        store = JobStore(connections, "j")
        await store.open(600)
        writes: list[Callable[[], Awaitable[object]]] = [
            lambda: store.put([("o0.w.0", [b"value"])], 600),  # A transaction,
            lambda: store.delete([(0, Place(0, "w", 1).token)]),  # a pipeline,
            lambda: store.create(tiny_job()),  # and a script.
        ]
        for write in writes:
            await connections.command(0, "CONFIG", "SET", "min-replicas-to-write", 1)
            await connections.command(0, "CONFIG", "RESETSTAT")
            writing = asyncio.ensure_future(write())
            while not (await connections.client(0).info("errorstats")).get("errorstat_NOREPLICAS"):
                assert not writing.done(), writing
            await connections.command(0, "CONFIG", "SET", "min-replicas-to-write", 0)
            await writing
        assert await store.get(["o0.w.0"], [6]) == [None]


async def test_a_cancellation_that_comes_with_an_error_is_not_forgotten() -> None:
    async def fails(_: object) -> None:
        me = asyncio.current_task()
        assert me is not None
        me.cancel()
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            # As `wait_for` does when the connection breaks in the same turn.
            raise ConnectionError from None

    async with Connections(["unix:///nowhere/valkey.sock"], timeout=30) as connections:
        asking = asyncio.create_task(connections.ask(0, fails))
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert asking.cancelled()
