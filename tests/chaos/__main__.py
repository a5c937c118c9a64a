"""Jobs on a real cluster while everything fails that may fail.

python -m tests.chaos --seconds 60 --seed 1

The seed chooses the graphs, the jobs of each client, the sandboxes to kill, and the faults that
events meet. The operating system chooses the rest, so a run is alike another one and not its equal.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import psutil
import redis.asyncio

from tests.chaos.graphs import Case, make_cases
from tests.conftest import of_jobs
from tests.reruns import reruns
from wukong_async import Faults, LocalCluster, WukongClient
from wukong_async.local import cluster as local

SANDBOXES = 4
CLIENTS = 3
JOBS_AT_ONCE = 3
"""Of each client."""
HANG = 120.0
"""Seconds after which a job hangs. Undisturbed, each takes less than one; disturbed, up to 40."""
QUIET = 20.0
"""Seconds after the last job in which all that was sent has to have been delivered."""
SETTINGS: dict[str, Any] = {"lease": 0.5, "grace": 0.5, "max_attempts": 1000}
PROBLEMS = ("wrong", "hung", "failed", "run again", "leaked keys", "leaked processes")
KILLS = {"sandbox": 2.0, "normal": 8.0, "pubsub": 4.0}
"""How often per second one of the sandboxes is killed, and all connections of a type: the clients'
are among the normal ones, and among those that listen."""
FAULTS: dict[str, Any] = {
    "duplicate": 0.3,
    "drop": 0.1,
    "delay": 0.2,
    "throttle": 0.2,
    "kill": 0.1,
    "delay_seconds": 1.0,
    "kill_within": 0.2,
}


@dataclass
class Report:
    """What has happened, and what should not have."""

    jobs: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    problems: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in PROBLEMS})
    longest: float = 0.0
    """Seconds of one job."""

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.jobs.total()} jobs, each within {self.longest:.1f} s: {dict(self.jobs)}",
                f"{self.faults.total()} faults: {dict(self.faults)}",
                *(f"{kind}: {what}" for kind, some in self.problems.items() for what in some),
                ", ".join(f"{len(some)} {kind}" for kind, some in self.problems.items()),
            ]
        )


async def chaos(seconds: float, seed: int) -> Report:
    """Start jobs for so long, and see all of them to their end."""
    report = Report()
    with reruns() as again:  # Nothing here makes the store lose anything.
        await _chaos(seconds, seed, report)
    report.problems["run again"] += again
    return report


async def _chaos(seconds: float, seed: int, report: Report) -> None:
    cases = make_cases(random.Random(seed))
    processes = _processes()
    local.HANDLER = "tests.chaos.handler.handler"  # Executors that share.
    async with LocalCluster(SANDBOXES, faults=Faults(seed=seed, **FAULTS)) as cluster:
        (url,) = cluster.settings["redis_endpoints"]
        async with redis.asyncio.Redis.from_url(url) as store:
            deadline = time.monotonic() + seconds
            async with asyncio.TaskGroup() as group:
                killer = random.Random(f"{seed} kill")
                group.create_task(_kill(cluster, store, killer, deadline, report.faults))
                for number in range(CLIENTS):
                    group.create_task(_client(cluster, cases, f"{seed} {number}", deadline, report))
            await _quiet(cluster, report)
            # Only now: whoever ran on, or was delivered late, may have written.
            keys = [key async for key in store.scan_iter()]
            report.problems["leaked keys"] += of_jobs(keys)
        report.faults.update(cluster.stats().faults)
    report.problems["leaked processes"] += map(repr, _processes() - processes)


async def _client(
    cluster: LocalCluster, cases: list[Case], seed: str, deadline: float, report: Report
) -> None:
    async with WukongClient(cluster, **SETTINGS) as client:

        async def jobs(rng: random.Random) -> None:
            await _job(client, rng.choice(cases), report)  # One at least, however short it is.
            while time.monotonic() < deadline:
                await _job(client, rng.choice(cases), report)

        await asyncio.gather(*(jobs(random.Random(f"{seed} {i}")) for i in range(JOBS_AT_ONCE)))


async def _job(client: WukongClient, case: Case, report: Report) -> None:
    started = time.monotonic()
    try:
        async with asyncio.timeout(HANG) as bound:
            found = await client.compute(case.collection)
    except Exception as error:
        if bound.expired():
            report.problems["hung"].append(f"{case.name}, for {HANG:.0f} s")
            return
        found = error
    report.jobs[case.name] += 1
    report.longest = max(report.longest, time.monotonic() - started)
    if case.is_right(found):
        return
    kind = "failed" if isinstance(found, Exception) else "wrong"
    report.problems[kind].append(f"{case.name}: {found!r:.1000}")


async def _kill(
    cluster: LocalCluster,
    store: redis.asyncio.Redis,
    rng: random.Random,
    deadline: float,
    faults: Counter[str],
) -> None:
    """Kill sandboxes and connections, one kind after the other."""
    while time.monotonic() < deadline:
        await asyncio.sleep(rng.expovariate(sum(KILLS.values())))
        (kind,) = rng.choices(list(KILLS), list(KILLS.values()))
        if kind == "sandbox":
            pid = rng.choice(cluster.sandbox_pids())
            # It may have died by itself, and has no process while it starts.
            if pid > 0 and psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
                faults["sandbox killed"] += 1
        else:
            killed = await store.execute_command("CLIENT", "KILL", "TYPE", kind)  # type: ignore[no-untyped-call]
            faults[f"{kind} connection killed"] += killed


async def _quiet(cluster: LocalCluster, report: Report) -> None:
    """Wait until all that was sent has been delivered, and no sandbox works any more."""
    assert cluster._loopback is not None
    function = cluster._loopback.pool.function
    try:
        async with asyncio.timeout(QUIET):
            while function.queue or function.running or len(function.idle) < SANDBOXES:
                await asyncio.sleep(0.05)
    except TimeoutError:
        report.problems["hung"].append(f"a sandbox, {QUIET:.0f} s after the last job: {function!r}")


def _processes() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # Advice on chunk sizes: these graphs are given.
    warnings.filterwarnings("ignore", message="Increasing number of chunks")
    report = asyncio.run(chaos(arguments.seconds, arguments.seed))
    print(report)
    return 1 if any(report.problems.values()) or not report.jobs else 0


if __name__ == "__main__":
    sys.exit(main())
