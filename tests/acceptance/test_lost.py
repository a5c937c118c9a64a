"""Executors that vanish: the error names the task and says why, from the log of real processes."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.acceptance.functions import allocate, exit_process, inc
from tests.conftest import keys_of
from wukong_async import LocalCluster, WukongClient
from wukong_async.errors import ExecutorLost

SAYS = (
    r"Executor 0 vanished 2 times \(wukong\.max_attempts\) while it ran task 'deadly'"
    r"(, for \d s when it was heard last)?\. Its last request was [0-9a-f-]{36}\. Likely cause: "
)


def deadly(_: int, way: str, argument: int) -> None:
    """Take its process along, when a renewal has had the time to say what runs."""
    time.sleep(0.4)
    print(f"about to {way}", flush=True)
    match way:
        case "signal":
            os.kill(os.getpid(), argument)
        case "hold the GIL":
            ctypes.PyDLL(None).sleep(argument)
        case "allocate":
            allocate(argument)
        case "exit":
            exit_process(argument)


@pytest.fixture(scope="module")
def small() -> Iterator[LocalCluster]:
    with LocalCluster(2, memory_size=300) as running:
        yield running
        assert keys_of(running) == []


async def cause(cluster: LocalCluster, *args: Any, lease: float = 0.6) -> str:
    """The likely cause, in the words of the error."""
    # The frontier is the task before it: who runs is known from the last words alone.
    dsk = {"first": (inc, 1), "deadly": (deadly, "first", *args)}
    async with WukongClient(cluster, lease=lease, grace=0.6, max_attempts=2) as client:
        with pytest.raises(ExecutorLost) as caught:
            await client.compute(dsk, "deadly")
    said = re.match(SAYS, str(caught.value))
    assert said is not None, str(caught.value)
    print(caught.value)
    return str(caught.value)[said.end() :]


async def test_killed_by_itself(small: LocalCluster) -> None:
    said = await cause(small, "signal", signal.SIGKILL)
    assert said.startswith("a crash: its process ended with signal: killed. ")
    assert "\n    about to signal\n" in said


async def test_a_segmentation_fault(small: LocalCluster) -> None:
    said = await cause(small, "signal", signal.SIGSEGV)
    assert said.startswith("a crash: its process ended with signal: segmentation fault. Native")
    assert "\n    about to signal\n" in said


async def test_the_end_of_the_process(small: LocalCluster) -> None:
    said = await cause(small, "exit", 3)
    assert said.startswith("a crash: its process ended with exit status 3. Something that a task")
    assert "\n    about to exit\n" in said


async def test_more_memory_than_there_is(small: LocalCluster) -> None:
    said = await cause(small, "allocate", 400)
    assert re.match(
        r"out of memory: its process had \d+ MB of the 300 MB that the function may have\. Give the"
        r" function more memory, or cut the data of its tasks into smaller chunks\.$",
        said,
    )


async def test_the_gil_held_for_longer_than_the_lease(small: LocalCluster) -> None:
    said = await cause(small, "hold the GIL", 6)
    assert said.startswith(
        "it fell silent, but its process has not ended. A task that holds Python's GIL for longer"
        " than wukong.lease looks like this"
    )


async def test_the_gil_held_for_longer_than_the_function_may_take() -> None:
    with LocalCluster(1, timeout=2) as cluster:
        said = await cause(cluster, "hold the GIL", 30, lease=1.2)
        assert said.startswith("the time limit: the function was ended after 2 s. An executor")
        assert keys_of(cluster) == []
