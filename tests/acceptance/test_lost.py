"""Executors that vanish: the error names the task and says why, from the log of real processes."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.acceptance.functions import deadly, inc
from tests.conftest import eventually, keys_of
from wukong_async import Faults, LocalCluster, WukongClient, invoker
from wukong_async.errors import ExecutorLost
from wukong_async.scheduler import job

SAYS = (
    r"Executor 0 vanished 2 times \(wukong\.max_attempts\), at last in request [0-9a-f-]{36},"
    r" while it ran task 'deadly'( \(for \d s or more\))?\. "
)


@pytest.fixture(scope="module")
def shared() -> Iterator[LocalCluster]:
    with LocalCluster(2, memory_size=300) as running:
        yield running


@pytest.fixture
def small(shared: LocalCluster) -> Iterator[LocalCluster]:
    """Two sandboxes with little memory."""
    yield shared
    # Those that have died are replaced before the next test counts processes.
    eventually(lambda: shared.stats().idle == shared.n_workers)
    assert keys_of(shared) == []


async def cause(cluster: LocalCluster, *args: Any, lease: float = 0.6) -> str:
    """The likely cause, in the words of the error."""
    # The frontier is the task before it: who runs is known from the last words alone.
    dsk = {"first": (inc, 1), "deadly": (deadly, "first", *args)}
    async with WukongClient(cluster, lease=lease, grace=0.6, max_attempts=2) as client:
        with pytest.raises(ExecutorLost) as caught:
            await client.compute(dsk, "deadly")
    said = re.match(SAYS, str(caught.value))
    assert said is not None, str(caught.value)
    return str(caught.value)[said.end() :]


async def test_killed_by_itself(small: LocalCluster) -> None:
    said = await cause(small, "signal", signal.SIGKILL)
    assert said.startswith("Its process was killed (signal 9). The task or")
    assert "\n    about to signal\n" in said


async def test_an_interrupt(small: LocalCluster) -> None:
    """It reaches the thread that waits for the task: the process has to end without it."""
    said = await cause(small, "signal and wait", signal.SIGINT)
    assert said.startswith("Its process ended with exit status 1. The task or")
    assert "KeyboardInterrupt" in said


async def test_a_segmentation_fault(small: LocalCluster) -> None:
    said = await cause(small, "signal", signal.SIGSEGV)
    assert said.startswith("Its process crashed: segmentation fault. Most likely native code")
    assert "\n    about to signal\n" in said


async def test_the_end_of_the_process(small: LocalCluster) -> None:
    said = await cause(small, "exit", 3)
    assert said.startswith("Its process ended with exit status 3. The task or")
    assert "\n    about to exit\n" in said


async def test_more_memory_than_there_is(small: LocalCluster) -> None:
    said = await cause(small, "allocate", 400)
    assert re.match(
        r"Its process ran out of memory: it had \d+ MB, and the function may have 300 MB\. Give"
        r" the function more memory, or cut the data of its tasks into smaller chunks\.$",
        said,
    )


async def test_the_gil_held_for_longer_than_the_lease(small: LocalCluster) -> None:
    said = await cause(small, "hold the GIL", 4)
    assert said.startswith(
        "It fell silent, but its process has not ended. A task that holds Python's GIL for longer"
        " than wukong.lease looks like this"
    )


async def test_the_gil_held_for_longer_than_the_function_may_take() -> None:
    with LocalCluster(1, timeout=2) as cluster:
        said = await cause(cluster, "hold the GIL", 30, lease=1.2)
        assert said.startswith("The function reached its time limit of 2 s. An executor")
        assert cluster.stats().timeouts == 2
        async with WukongClient(cluster) as client:
            assert await client.compute({"a": (inc, 1)}, "a") == 2
        assert keys_of(cluster) == []


async def test_no_concurrency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "UNSTARTED", 1)
    monkeypatch.setattr(invoker, "ATTEMPTS", 1)
    with LocalCluster(1, faults=Faults(throttle=1)) as cluster:
        async with WukongClient(cluster, lease=0.3, grace=0.3) as client:
            with pytest.raises(ExecutorLost) as caught:
                await client.compute({"first": (inc, 1)}, "first")
        assert re.match(
            r"The invocation of executor 0 was sent again and again, but never began work on"
            r" 'first'\. All concurrency .*: Lambda said '.*Rate Exceeded.*'\. Wait, or raise",
            str(caught.value),
        )
        assert keys_of(cluster) == []
