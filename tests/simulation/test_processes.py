"""What takes long, in simulated time: nothing may expire, or be taken over, meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest

from tests.simulation import processes
from tests.simulation.processes import Process, SimulatedStore
from tests.simulation.world import Faults, Violation, World
from wukong_async.errors import SerializationError, StoreUnreachable
from wukong_async.protocol import JobState
from wukong_async.scheduler.attached import _manifest

TTL = 30.0
SLOW = 12.0


def test_a_slow_upload_is_kept_from_expiring() -> None:
    extended: list[float] = []

    async def slow(_: Process, work: Callable[..., Any], *args: Any) -> Any:
        await asyncio.sleep(SLOW)
        return work(*args)

    async def extend(store: SimulatedStore, ttl: float) -> None:
        assert ttl == TTL
        extended.append(store._process.world.time)

    seed = next(s for s in range(100) if len(World(s).workload.literals) == 3)
    world = World(seed)
    world.faults = Faults()
    with (
        patch.object(processes, "settings", partial(processes.settings, ttl=TTL)),
        patch.object(Process, "in_thread", slow),
        patch.object(SimulatedStore, "extend", extend),
    ):
        world.run()
    assert len(extended) == 3


def test_nobody_takes_over_while_results_are_read() -> None:
    resolve = SimulatedStore.resolve
    read = 0

    async def slow(
        store: SimulatedStore, stored: Mapping[int, bytes | None]
    ) -> dict[int, bytes | None]:
        nonlocal read
        for _ in range(10):
            await asyncio.sleep(1)
            assert not store._model.lapsed()
        read += 1
        return await resolve(store, stored)

    world = World(2)
    world.faults = Faults()
    with patch.object(SimulatedStore, "resolve", slow):
        world.run()
    assert read == 1


def test_what_was_asked_for_cannot_be_unpickled() -> None:
    with pytest.raises(SerializationError, match="cannot be unpickled here"):
        _manifest(b"\x01not a pickle")


def test_a_job_is_ended_although_one_of_its_servers_is_silent() -> None:
    async def silent(_: SimulatedStore) -> bool:
        raise StoreUnreachable("The server of the data does not answer.")

    world = World(next(s for s in range(100) if World(s).servers == 2))
    world.faults = Faults(lose_event=1.0)
    with (
        patch.object(SimulatedStore, "is_open", silent),
        pytest.raises(Violation, match="does not answer"),
    ):
        world.run()
    assert world.store.job is not None
    assert world.store.job.state is JobState.FAILED
