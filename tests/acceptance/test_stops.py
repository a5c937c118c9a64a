"""What ends a job early, and what stops with it."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dask import delayed

from tests.acceptance.functions import fails, inc, touch_and_wait
from tests.acceptance.test_faults import QUICK, appears
from tests.conftest import SPREAD, keys_of
from wukong_async import LocalCluster, WukongClient
from wukong_async.errors import StoreLost
from wukong_async.invoker import Invoker
from wukong_async.protocol import Outcome, Status
from wukong_async.scheduler.upload import Upload
from wukong_async.store import JobStore, NewJob

LARGE = 100_000
"""Bytes of a value that goes to the data shards."""


@pytest.fixture
def awaited(tmp_path: Path) -> Iterator[Path]:
    """What tasks wait for; it is there in the end, whatever happens."""
    path = tmp_path / "awaited"
    yield path
    path.touch()


async def becomes(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in another process."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def objects_of(cluster: LocalCluster) -> list[str]:
    """The keys of values on the data shards."""
    return [key for key in keys_of(cluster) if re.search(r":o\d+\.", key)]


def lengths(*values: bytes) -> int:
    return sum(map(len, values))


# Failures -----------------------------------------------------------------------------------------


async def test_a_failure_stops_the_other_executors(
    cluster: LocalCluster, tmp_path: Path, awaited: Path
) -> None:
    touched, left, later = tmp_path / "touched", tmp_path / "left", tmp_path / "later"

    def slow() -> None:
        try:
            touch_and_wait(str(touched), str(awaited))
        finally:
            left.touch()

    def fails_once_the_other_runs(path: str) -> None:
        touch_and_wait(os.devnull, path)
        fails("early")

    after = delayed(touch_and_wait)(str(later), str(awaited), delayed(slow)())
    async with WukongClient(cluster, **QUICK) as client:
        with pytest.raises(ValueError, match="early"):
            await client.compute(
                delayed(lengths)(after, delayed(fails_once_the_other_runs)(str(touched)))
            )
        assert keys_of(cluster) == [], "nothing is left although somebody still runs"
        # Both sandboxes are free again although nobody has told `slow` to go on.
        await becomes(lambda: cluster.stats().idle == cluster.n_workers)
        awaited.touch()
        await becomes(left.exists)
        for _ in range(10):
            assert await client.compute(delayed(inc)(1), delayed(inc)(2)) == (2, 3)
        assert not later.exists()


# Cancelling ---------------------------------------------------------------------------------------


class Gate:
    """Holds up the first call of a method, before or after it has taken effect."""

    def __init__(self, original: Callable[..., Any], *, late: bool) -> None:
        self.original = original
        self.late = late
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    async def __call__(self, *args: Any) -> Any:
        if self.reached.is_set():
            return await self.original(*args)
        answer = await self.original(*args) if self.late else None
        self.reached.set()
        await self.opened.wait()
        return answer if self.late else await self.original(*args)


PHASES: dict[str, tuple[type, str]] = {
    "open": (JobStore, "open"),
    "upload": (JobStore, "put"),
    "create": (JobStore, "create"),
    "invoke": (Invoker, "invoke_all"),
    "watch": (JobStore, "watch"),
    "wait": (JobStore, "outcome"),
    "collect": (JobStore, "resolve"),
    "finish": (JobStore, "finish"),
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("phase", PHASES)
async def test_cancelling_in_any_phase_leaves_nothing(
    cluster: LocalCluster,
    awaited: Path,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    late: bool,
) -> None:
    owner, name = PHASES[phase]
    gate = Gate(getattr(owner, name), late=late)
    monkeypatch.setattr(owner, name, lambda *args: gate(*args))
    if phase != "watch":  # A watcher looks at jobs that take their time.
        awaited.touch()
    if phase == "upload":  # What fits into one batch goes with `create`.
        monkeypatch.setattr("wukong_async.scheduler.upload.BATCH_BYTES", LARGE // 2)
    async with WukongClient(cluster, **QUICK) as client:
        leaves = [delayed(touch_and_wait)(os.devnull, str(awaited), bytes(LARGE)) for _ in range(2)]
        computing = asyncio.ensure_future(client.compute(delayed(lengths)(*leaves), *leaves))
        async with asyncio.timeout(20):
            await gate.reached.wait()
            computing.cancel()
            gate.opened.set()  # What must not be interrupted goes on.
            with pytest.raises(asyncio.CancelledError):
                await computing
        assert keys_of(cluster) == []
        awaited.touch()
        assert await client.compute(delayed(inc)(1)) == 2


async def test_cancelling_while_the_graph_is_planned_leaves_nothing(
    client: WukongClient, cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, opened = threading.Event(), threading.Event()
    prepare = Upload.prepare

    def held_up(*args: Any) -> Upload:
        reached.set()
        assert opened.wait(20)
        return prepare(*args)

    monkeypatch.setattr(Upload, "prepare", held_up)
    computing = asyncio.ensure_future(client.compute(delayed(inc)(1)))
    try:
        await becomes(reached.is_set)
        computing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await computing
    finally:
        opened.set()
    assert await client.compute(delayed(inc)(2)) == 3
    assert keys_of(cluster) == []


# A store that forgets -----------------------------------------------------------------------------


async def forget(store: JobStore, *keys: str) -> None:
    assert await store._connections.command(0, "UNLINK", *keys) == len(keys)


async def test_an_input_that_the_store_forgets_is_made_again(
    cluster: LocalCluster, tmp_path: Path, awaited: Path
) -> None:
    touched = tmp_path / "touched"
    dsk = {
        "large": (bytes, LARGE),
        "slow": (touch_and_wait, str(touched), str(awaited), b""),
        "both": (lengths, "large", "slow"),
    }
    async with WukongClient(cluster, **QUICK) as client:
        assert client._scheduler is not None
        computing = asyncio.ensure_future(client.compute(dsk, "both"))
        await appears(touched)
        await becomes(lambda: bool(objects_of(cluster)))
        await client._scheduler.connections.command(0, "UNLINK", *objects_of(cluster))
        awaited.touch()
        async with asyncio.timeout(20):
            assert await computing == LARGE
        assert await client.compute(delayed(inc)(1)) == 2


@pytest.mark.loses_data
async def test_a_result_that_the_store_forgets_is_named(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = JobStore.outcome

    async def forgotten(self: JobStore) -> Outcome:
        found = await outcome(self)
        if found.results:
            await forget(self, *objects_of(cluster))
        return found

    async with WukongClient(cluster) as client:
        with monkeypatch.context() as patched:
            patched.setattr(JobStore, "outcome", forgotten)
            async with asyncio.timeout(20):
                with pytest.raises(StoreLost, match="has lost the result 'large'"):
                    await client.compute({"large": (bytes, LARGE)}, "large")
        assert keys_of(cluster) == []
        assert await client.compute(delayed(inc)(1)) == 2


@pytest.mark.loses_data
async def test_a_plan_that_the_store_forgets(
    cluster: LocalCluster, tmp_path: Path, awaited: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = JobStore.create

    async def forgotten(self: JobStore, job: NewJob, objects: Any) -> Status:
        status = await create(self, job, objects)  # No event leaves before this has returned.
        await forget(self, *(key for key in keys_of(cluster) if key.endswith(":b0")))
        return status

    # Two leaves and executors, since the first one has this block with its event. It waits, or the
    # second one might come into the same sandbox, where this block is known.
    first = delayed(touch_and_wait)(str(tmp_path / "touched"), str(awaited), 0)
    total = delayed(max)(first, delayed(inc)(1))
    async with WukongClient(cluster, **SPREAD) as client:
        with monkeypatch.context() as patched:
            patched.setattr(JobStore, "create", forgotten)
            async with asyncio.timeout(20):
                with pytest.raises(StoreLost, match="lost a part of the plan"):
                    await client.compute(total)
        awaited.touch()
        assert await client.compute(total) == 2


async def test_what_a_job_still_needs_does_not_expire_while_it_runs(
    cluster: LocalCluster, tmp_path: Path, awaited: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extensions = 0
    extend = JobStore.extend

    async def counted(self: JobStore, ttl: float) -> None:
        nonlocal extensions
        extensions += 1
        await extend(self, ttl)

    monkeypatch.setattr(JobStore, "extend", counted)
    slow = delayed(touch_and_wait)(str(tmp_path / "touched"), str(awaited), b"")
    async with WukongClient(cluster, **QUICK, ttl=1.5) as client:
        computing = asyncio.ensure_future(
            client.compute(delayed(lengths)(delayed(bytes)(LARGE), slow))
        )
        # Each is due when a third has gone: with the fifth, a ttl is over.
        await becomes(lambda: extensions == 5)
        assert objects_of(cluster)
        awaited.touch()
        assert await computing == LARGE
