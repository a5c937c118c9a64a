"""A loopback Lambda that misbehaves on purpose: each kind of fault, on real sandboxes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from tests.integration.test_loopback import Caller, loopback, sdk, until
from wukong_async import LocalCluster
from wukong_async.errors import ConfigError
from wukong_async.local.endpoint import Loopback
from wukong_async.local.faults import Faults
from wukong_async.local.valkey import Valkey


@contextlib.asynccontextmanager
async def misbehaving(
    valkey: Valkey, faults: Faults, concurrency: int = 1
) -> AsyncIterator[tuple[Loopback, Caller]]:
    async with loopback(valkey, faults=faults, concurrency=concurrency) as running:
        async with sdk(running.url) as caller:
            yield running, caller


def touch(path: Path) -> dict[str, str]:
    return {"do": "touch", "path": str(path)}


async def test_a_duplicate_is_the_same_request_and_runs_beside_it(
    valkey: Valkey, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    async with misbehaving(valkey, Faults(duplicate=1), concurrency=2) as (running, caller):
        pool = running.pool
        rid = await caller.send({"do": "wait for", "path": str(go)})
        await until(lambda: len(pool.deliveries) == 2)
        assert {d.request.request_id for d in pool.deliveries.values()} == {rid}
        go.touch()
        await until(lambda: not pool.deliveries)
        assert pool.log(rid).count("END RequestId") == 2
        assert (pool.counters.invocations, pool.counters.deliveries) == (1, 2)
        assert pool.injector.injected["duplicate"] == 1


async def test_a_dropped_event_is_accepted(valkey: Valkey, tmp_path: Path) -> None:
    async with misbehaving(valkey, Faults(drop=1)) as (running, caller):
        await caller.send(touch(tmp_path / "x"))
        assert running.pool.counters.invocations == 1
        # Whatever had been delivered would have been before this.
        assert await caller.value({"a": 1}) == {"a": 1}
        assert not (tmp_path / "x").exists()
        assert running.pool.counters.deliveries == 1
        assert running.pool.injector.injected["drop"] == 1


async def test_a_late_event_lets_others_pass(valkey: Valkey, tmp_path: Path) -> None:
    faults = Faults(delay=1, delay_seconds=0.5)
    async with misbehaving(valkey, faults) as (running, caller):
        sent = time.monotonic()
        await caller.send(touch(tmp_path / "x"))
        due = running.pool.function.next_due()
        assert due is not None
        assert await caller.value({"a": 1}) == {"a": 1}
        await until((tmp_path / "x").exists)
        assert sent < due <= time.monotonic()
        assert running.pool.injector.injected["delay"] == 1


@pytest.mark.parametrize("kind", ["Event", "RequestResponse"])
async def test_a_throttled_call(valkey: Valkey, kind: str) -> None:
    async with misbehaving(valkey, Faults(throttle=1)) as (running, caller):
        with pytest.raises(ClientError) as refused:
            await caller.call({}, InvocationType=kind)
        assert refused.value.response["Error"]["Code"] == "TooManyRequestsException"
        assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 429
        assert running.pool.counters.throttles == 1
        assert running.pool.counters.invocations == 0
        assert running.pool.injector.injected["throttle"] == 1


async def test_a_killed_delivery(valkey: Valkey) -> None:
    async with misbehaving(valkey, Faults(kill=1, kill_within=0.2)) as (running, caller):
        before = running.pool.sandboxes[0].pid
        answer = await caller.call({"do": "sleep", "seconds": 60})
        assert answer["FunctionError"] == "Unhandled"
        assert "signal: killed" in json.loads(answer["Payload"])["errorMessage"]
        await until(lambda: bool(running.pool.function.idle))
        assert running.pool.sandboxes[0].pid != before
        assert running.pool.injector.injected["kill"] == 1


async def test_a_delivery_that_is_over_by_then_is_not_killed(valkey: Valkey) -> None:
    async with misbehaving(valkey, Faults(kill=1, kill_within=1000)) as (running, caller):
        first, second = [await caller.value({"do": "count"}) for _ in range(2)]
        assert first["pid"] == second["pid"]
        assert running.pool.injector.injected["kill"] == 0


async def test_a_synchronous_call_is_neither_dropped_nor_doubled_nor_late(valkey: Valkey) -> None:
    faults = Faults(drop=1, duplicate=1, delay=1, delay_seconds=1000)
    async with misbehaving(valkey, faults) as (running, caller), asyncio.timeout(20):
        assert await caller.value({"a": 1}) == {"a": 1}
        assert running.pool.counters.deliveries == 1
        assert not any(running.pool.injector.injected.values())


def test_a_cluster_takes_faults_and_nothing_else() -> None:
    with pytest.raises(ConfigError, match=r"faults must be a Faults, not 0\.5"):
        LocalCluster(faults=0.5)  # type: ignore[arg-type]
