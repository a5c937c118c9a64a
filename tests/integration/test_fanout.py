"""Many invocations at once: through the proxy, and without it where it cannot be used."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from dask import delayed

from tests.acceptance.functions import inc_slowly
from tests.integration.proxies import (
    FUNCTION,
    HOST,
    SECRET,
    Conversation,
    LambdaApi,
    dying,
    lambda_api,
    proxy_of,
    saying,
    server_of,
    silent,
    silent_later,
)
from wukong_async import LocalCluster, WukongClient
from wukong_async.config import Settings
from wukong_async.executor import Service
from wukong_async.fanout import Fanout
from wukong_async.invocation import Invocation

EVENTS = [b"%d" % i for i in range(4)]
CLOSED = 9
"""A port where nobody listens."""


@pytest.fixture
async def api() -> AsyncIterator[LambdaApi]:
    async with asyncio.timeout(60), lambda_api() as running:
        yield running


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONNECT_TIMEOUT", "ANSWER_TIMEOUT"):
        monkeypatch.setattr(f"wukong_async.fanout.client.{name}", 0.2)


def of_proxy(port: int, most: int = 3) -> dict[str, Any]:
    return {
        "proxy_address": HOST,
        "proxy_port": port,
        "proxy_secret": SECRET,
        "max_task_fanout": most,
    }


class Alone:
    """Sends events without a proxy."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    async def __call__(self, events: Sequence[bytes]) -> None:
        self.sent += events


@contextlib.asynccontextmanager
async def something(talk: Conversation | None) -> AsyncIterator[int]:
    if talk is None:
        yield CLOSED
    else:
        async with server_of(talk) as port:
            yield port


BROKEN = pytest.mark.parametrize("talk", [None, silent, silent_later, dying, saying(7)])


@BROKEN
async def test_without_a_proxy_that_works_events_are_sent_all_the_same(
    impatient: None, talk: Conversation | None
) -> None:
    async with asyncio.timeout(20), something(talk) as port:
        alone = Alone()
        await Fanout(Settings(**of_proxy(port))).fire(FUNCTION, EVENTS, alone)
        assert alone.sent == EVENTS


async def test_a_proxy_whose_name_cannot_be() -> None:
    alone = Alone()
    settings = Settings(**{**of_proxy(CLOSED), "proxy_address": "x" * 100})
    await Fanout(settings).fire(FUNCTION, EVENTS, alone)
    assert alone.sent == EVENTS


async def test_few_events_do_not_go_through_it() -> None:
    alone = Alone()
    async with server_of(saying({"sent": 3, "throttled": [], "failed": []})) as port:
        await Fanout(Settings(**of_proxy(port))).fire(FUNCTION, EVENTS[:3], alone)
        assert alone.sent == EVENTS[:3]


async def test_few_events_do_so_where_they_would_take_a_client_of_aws() -> None:
    alone = Alone()
    async with server_of(saying({"sent": 1, "throttled": [], "failed": []})) as port:
        fanout = Fanout(Settings(**of_proxy(port)))
        await fanout.fire(FUNCTION, EVENTS[:1], alone, loaded=False)
        assert alone.sent == []
        await fanout.fire(FUNCTION, [], alone, loaded=False)


async def test_all_or_some_go_through_it() -> None:
    failures: list[list[int]] = [[], [1, 3]]
    for failed in failures:
        reasons = [[index, "no credentials"] for index in failed]
        answer = {"sent": 3 - len(failed), "throttled": [0], "failed": reasons}
        alone = Alone()
        async with server_of(saying(answer)) as port:
            await Fanout(Settings(**of_proxy(port))).fire(FUNCTION, EVENTS, alone)
        # One that was throttled is the watcher's.
        assert alone.sent == [EVENTS[index] for index in failed]


@pytest.mark.parametrize("again", [True, False])
async def test_a_proxy_that_failed_is_not_asked_at_once_again(
    monkeypatch: pytest.MonkeyPatch,
    again: bool,
) -> None:
    if again:
        monkeypatch.setattr("wukong_async.fanout.fanout.AVOID_FOR", 0.0)
    asked = 0

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1

    alone = Alone()
    async with server_of(hang_up) as port:
        fanout = Fanout(Settings(**of_proxy(port)))
        for _ in range(3):
            await fanout.fire(FUNCTION, EVENTS, alone)
    assert alone.sent == EVENTS * 3
    assert asked == (3 if again else 1)


async def test_a_busy_proxy_is_asked_again() -> None:
    asked = 0
    busy = saying({"busy": "for a test"})

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await busy(reader, writer)

    alone = Alone()
    async with server_of(talk) as port:
        fanout = Fanout(Settings(**of_proxy(port)))
        for _ in range(3):
            await fanout.fire(FUNCTION, EVENTS, alone)
    assert alone.sent == EVENTS * 3
    assert asked == 3


# Executors ------------------------------------------------------------------------------------

EXECUTOR = """
import sys
from wukong_async.config import Settings
from wukong_async.executor import Service
from wukong_async.invocation import Invocation

service = Service(Settings.load())
invocations = [Invocation("job", str(i)) for i in range(int(sys.argv[1]))]
service._loop.run_until_complete(service._invoke("wukong-executor", invocations))
print("aiobotocore" in sys.modules)
service.close()
"""


@pytest.mark.parametrize("count", [1, 20])
async def test_an_executor_sends_one_frame_and_loads_nothing_for_it(
    api: LambdaApi, count: int
) -> None:
    async with proxy_of(api) as server:
        settings = Settings(endpoint_url=api.url, **of_proxy(server.port))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", EXECUTOR, str(count)),
            env={"PYTHONPATH": ":".join(sys.path), **settings.environment()},
            stdout=subprocess.PIPE,
        )
        said, _ = await process.communicate()
        assert said == b"False\n"
        assert (server.counters.frames, server.counters.sent) == (1, count)
    expected = [Invocation("job", str(i)).to_json() for i in range(count)]
    assert sorted(api.events) == sorted(expected)


@BROKEN
async def test_an_executor_invokes_for_itself(
    api: LambdaApi, impatient: None, talk: Conversation | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    invocations = [Invocation("job", str(i)) for i in range(20)]

    def executor(settings: Settings) -> None:
        service = Service(settings)
        service._loop.run_until_complete(service._invoke(FUNCTION, invocations))
        service.close()

    async with something(talk) as port:
        await asyncio.to_thread(executor, Settings(endpoint_url=api.url, **of_proxy(port)))
    assert sorted(api.events) == sorted(i.to_json() for i in invocations)


# Jobs -----------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {"lease": 1.0, "grace": 1.0}
TIMEOUT = 3.0
"""Seconds that an invocation may take: an executor hands over after 4/5 of it."""


def chain() -> Any:
    """A job that one invocation has no time for."""
    value = delayed(0)
    for _ in range(8):
        value = delayed(inc_slowly)(value, TIMEOUT / 6)
    return value


def in_sandboxes(settings: dict[str, Any]) -> dict[str, str]:
    return {f"DASK_WUKONG__{name.upper()}": repr(value) for name, value in settings.items()}


async def test_a_cluster_s_executors_go_through_its_proxy() -> None:
    environment = in_sandboxes({"max_task_fanout": 0})
    async with LocalCluster(
        1, timeout=TIMEOUT, use_local_proxy=True, environment=environment
    ) as cluster:
        assert cluster._proxy is not None
        async with WukongClient(cluster) as client:
            assert await client.compute(chain()) == 8
            summary = client.history[-1]
        # The client invokes by itself, as it always does for one; the rest are the executor's.
        assert cluster._proxy.counters.sent == summary.begins - 1 >= 1


@pytest.mark.parametrize("talk", [None, silent, dying])
async def test_a_job_whose_executors_have_no_proxy_that_works(talk: Conversation | None) -> None:
    async with something(talk) as port:
        environment = in_sandboxes(of_proxy(port, most=0))
        async with LocalCluster(1, timeout=TIMEOUT, environment=environment) as cluster:
            async with WukongClient(cluster, **QUICK) as client:
                assert await client.compute(chain()) == 8
            if talk is not silent:  # Then its time may be over before it can say so.
                assert "invoking without the proxy" in cluster.log()


@BROKEN
async def test_a_job_whose_client_has_no_proxy_that_works(
    cluster: LocalCluster, impatient: None, talk: Conversation | None
) -> None:
    async with something(talk) as port:
        async with WukongClient(cluster, **of_proxy(port, most=0)) as client:
            assert await client.compute({"a": (abs, -1)}, "a") == 1


async def test_a_cluster_s_sandboxes_use_nobody_else_s_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in in_sandboxes(of_proxy(CLOSED, most=0)).items():
        monkeypatch.setenv(name, value)
    async with LocalCluster(1, timeout=TIMEOUT) as cluster:
        async with WukongClient(cluster) as client:
            assert await client.compute(chain()) == 8
        assert "without the proxy" not in cluster.log()


async def test_a_cluster_brings_its_own() -> None:
    async with LocalCluster(1, use_local_proxy=True) as cluster:
        async with WukongClient(cluster, max_task_fanout=0) as client:
            assert await client.compute({"a": (abs, -1)}, "a") == 1
        assert cluster._proxy is not None
        assert cluster._proxy.counters.sent == 1
