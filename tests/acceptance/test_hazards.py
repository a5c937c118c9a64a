"""What goes wrong in the original Wukong, and must not here. One test for each hazard."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import numpy as np
import psutil
import pytest
from dask import delayed

from tests.acceptance.functions import add, fails, identity, inc, remember, returns_none
from tests.conftest import SPREAD
from wukong_async import LocalCluster, WukongClient
from wukong_async.errors import FunctionNotFound
from wukong_async.local.function import Function, Request
from wukong_async.local.pool import Pool
from wukong_async.scheduler.announcements import Announcements

# Graphs on which it hangs for ever ----------------------------------------------------------------


def chain(length: int) -> tuple[dict[Any, Any], Any]:
    dsk: dict[Any, Any] = {("c", 0): (inc, 0)}
    dsk |= {("c", i): (inc, ("c", i - 1)) for i in range(1, length)}
    return dsk, ("c", length - 1)


@pytest.mark.parametrize("length", [1000, 20_000])
async def test_a_long_chain(client: WukongClient, length: int) -> None:
    dsk, key = chain(length)
    assert await client.compute(dsk, key) == length
    summary = client.history[-1]
    assert (summary.invocations, summary.commits) == (1, 1)


async def test_a_task_that_returns_none(client: WukongClient) -> None:
    dsk = {"a": (returns_none,), "b": (identity, "a"), "c": (add, (len, ["b"]), 1)}
    assert await client.compute(dsk, ["b", "c"]) == (None, 2)


async def test_a_task_that_raises(client: WukongClient) -> None:
    with pytest.raises(ValueError, match="on purpose"):
        await client.compute(delayed(fails)())


async def test_a_fan_out_of_12_with_default_settings(client: WukongClient) -> None:
    root = delayed(inc)(0)
    found = await client.compute(*(delayed(add)(root, i) for i in range(12)))
    assert found == tuple(range(1, 13))


# Delivery -----------------------------------------------------------------------------------------


async def test_every_event_delivered_twice(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    admit = Function.admit

    def twice(self: Function, request: Request) -> bool:
        again = Request(
            f"{request.request_id}-again", request.payload, request.kind, request.received
        )
        return admit(self, request) and admit(self, again)

    monkeypatch.setattr(Function, "admit", twice)
    before = cluster.stats().deliveries
    async with WukongClient(cluster, **SPREAD) as client:
        for _ in range(10):
            level = [delayed(inc)(i) for i in range(33)]
            assert await client.compute(delayed(add)(*level)) == sum(range(1, 34))
            summary = client.history[-1]
            assert summary.begins == summary.invocations == 2, "the copies began nothing"
            assert summary.commits == 3
    async with asyncio.timeout(20):
        while cluster.stats().deliveries - before < 40:
            await asyncio.sleep(0.01)


async def test_an_event_that_gets_lost_is_sent_again(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    admit = Function.admit
    lost: list[Request] = []

    def first_is_lost(self: Function, request: Request) -> bool:
        if not lost:
            lost.append(request)
            return True
        return admit(self, request)

    monkeypatch.setattr(Function, "admit", first_is_lost)
    async with WukongClient(cluster, grace=0.2) as client:
        assert await client.compute(delayed(inc)(1)) == 2
        assert client.history[-1].invocations == 2


async def test_no_announcement_is_ever_heard(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Announcements, "_wake", lambda *_: None)
    async with WukongClient(cluster, lease=0.4, grace=0.4) as client:
        assert await client.compute(delayed(inc)(1)) == 2


async def test_the_announcements_connection_is_killed_again_and_again(
    cluster: LocalCluster,
) -> None:
    # The leases are long: only announcements, and looking again after a loss, are fast.
    async with WukongClient(cluster, lease=300, grace=300) as client:
        assert client._scheduler is not None
        connections = client._scheduler.connections
        for _ in range(10):
            computing = asyncio.ensure_future(client.compute(delayed(inc)(1)))
            for _ in range(5):
                await connections.command(0, "CLIENT", "KILL", "TYPE", "pubsub")
            async with asyncio.timeout(30):
                assert await computing == 2


async def test_every_connection_is_killed_while_a_job_runs(cluster: LocalCluster) -> None:
    async with WukongClient(cluster, lease=2, grace=2) as client:
        assert client._scheduler is not None
        connections = client._scheduler.connections
        for _ in range(5):
            level = [delayed(inc)(i) for i in range(500)]
            computing = asyncio.ensure_future(client.compute(delayed(sum)(level)))
            while not computing.done():
                await connections.command(0, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                await asyncio.sleep(0.003)
            assert await computing == sum(range(1, 501))


# State that is shared or left ---------------------------------------------------------------------


async def test_the_same_graph_twice_on_the_same_executors(client: WukongClient) -> None:
    for value in (1, 2, 3):
        dsk = {"a": (identity, value), "b": (inc, "a"), "c": (add, "a", "b")}
        assert await client.compute(dsk, ["a", "b", "c"]) == (value, value + 1, 2 * value + 1)


async def test_a_warm_sandbox_remembers_no_job() -> None:
    async with LocalCluster(1) as cluster, WukongClient(cluster) as client:
        first = {"data": np.arange(10_000), "a": (len, "data"), "b": (inc, "a")}
        second = {"data": np.arange(20_000), "a": (len, "data"), "b": (inc, "a")}
        assert await client.compute(first, "b") == 10_001
        assert await client.compute(second, "b") == 20_001
        # A user's own module is theirs; it lives as long as the process, as on AWS.
        assert await client.compute({"a": (remember, 1)}, "a") == [1]
        assert await client.compute({"a": (remember, 2)}, "a") == [1, 2]


# Size ---------------------------------------------------------------------------------------------


async def test_a_sequential_reduction_of_3_999_tasks(client: WukongClient) -> None:
    total: Any = delayed(identity)(0)
    for i in range(1, 2000):
        total = delayed(add)(total, delayed(identity)(i))
    assert await client.compute(total) == sum(range(2000))
    assert client.history[-1].tasks == 3999
    # With its inputs made elsewhere each step would have to wait for a commit.
    assert client.history[-1].commits <= 4


async def test_payloads_are_measured_and_not_guessed(client: WukongClient) -> None:
    # sys.getsizeof says 56 bytes of each of these.
    nested = [[bytes(100_000)] for _ in range(30)]
    leaves = [delayed(identity)(nested) for _ in range(2)]
    assert await client.compute(delayed(count_bytes)(*leaves)) == 6_000_000


def count_bytes(*values: list[list[bytes]]) -> int:
    return sum(len(piece) for value in values for inner in value for piece in inner)


# Openness -----------------------------------------------------------------------------------------


async def test_nothing_listens_but_on_this_machine(cluster: LocalCluster) -> None:
    assert cluster._valkey is not None
    (server,) = psutil.Process(cluster._valkey.guard_pid).children()
    assert server.net_connections(kind="inet") == [], "the store is a unix socket"
    mine = psutil.Process().net_connections(kind="inet")
    listening = {c.laddr.ip for c in mine if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


async def test_an_event_is_not_unpickled(cluster: LocalCluster) -> None:
    async with WukongClient(cluster) as client:
        assert client._scheduler is not None
        for event in (b'"gASVHgAAAA=="', b"{}", b'{"wukong": 1, "job": "x", "executor": "0"}'):
            await client._scheduler.invoker.invoke(event)
        assert await client.compute(delayed(inc)(1)) == 2


# Invoking -----------------------------------------------------------------------------------------


async def test_throttling_is_retried(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = Pool.submit
    refused = 0

    def throttled(self: Pool, request: Request) -> Any:
        nonlocal refused
        if refused == 3:
            return submit(self, request)
        refused += 1
        return None

    async with WukongClient(cluster) as client:
        monkeypatch.setattr(Pool, "submit", throttled)
        assert await client.compute(delayed(inc)(1)) == 2
    assert refused == 3


async def test_an_invocation_that_is_refused_fails_its_job_only(cluster: LocalCluster) -> None:
    async with WukongClient(cluster) as client:
        loopback = cluster._loopback
        assert loopback is not None
        known = loopback._configuration
        loopback._configuration = dataclasses.replace(known, function_name="renamed")
        try:
            with pytest.raises(FunctionNotFound):
                await client.compute(delayed(inc)(1))
        finally:
            loopback._configuration = known
        assert await client.compute(delayed(inc)(1)) == 2
