"""What faults cost: workloads while the local Lambda misbehaves, beside undisturbed ones.

    python -m benchmarks chaos                          # a minute
    python -m benchmarks chaos svd1 gemm --seconds 120 --seed 7 --json FILE

Two clusters take turns; in one of them events are doubled, lost and late, calls are throttled, and
sandboxes are killed. Each result is compared with Dask's synchronous one. The seed chooses the
faults; who meets them depends on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.arguments import UsageError
from benchmarks.backends import WORKERS
from benchmarks.document import document, outputs, write
from benchmarks.running import add_workloads, same, show_ratio, sized, spread
from benchmarks.workloads import Sized
from wukong_async import Faults, LocalCluster, WukongClient

WORKLOADS = ("tr1024", "fan", "svd1")
FAULTS: dict[str, float] = {
    "duplicate": 0.2,
    "drop": 0.1,
    "delay": 0.2,
    "throttle": 0.2,
    "kill": 0.1,
    "delay_seconds": 1.0,
    "kill_within": 0.2,
}
SETTINGS: dict[str, Any] = {
    "lease": 1.0,
    "grace": 1.0,
    "max_attempts": 1000,
    "job_timeout": 120.0,
}
"""Of both: what is lost is made up for soon, as often as it takes."""
HEAD = ("workload", "runs", "right", "s", "→", "ratio", "invoked", "→", "begun", "→", "faults")
ROW = "{:<10} {:>5} {:>5} {:>7} {:>7} {:>16} {:>7} {:>7} {:>7} {:>7}  {}"


@dataclass(frozen=True)
class Job:
    """What one of them took."""

    right: bool
    seconds: float
    invocations: int = 0
    begins: int = 0


@dataclass
class Side:
    """A cluster, and what it has done. The first job warms it up."""

    cluster: LocalCluster
    client: WukongClient
    jobs: list[Job] = field(default_factory=list)

    def compute(self, each: Sized, expected: Any) -> None:
        """One job more."""
        collection = each.make()
        started = time.perf_counter()
        try:
            found = self.client.compute(collection)
        except Exception as error:
            print(f"{each.workload.name}: {type(error).__name__}: {error}", file=sys.stderr)
            self.jobs.append(Job(False, time.perf_counter() - started))
            return
        seconds = time.perf_counter() - started
        took = self.client.history[-1]
        self.jobs.append(Job(same(found, expected), seconds, took.invocations, took.begins))

    def figures(self) -> dict[str, Any]:
        """Of the jobs that were warm."""
        warm = self.jobs[1:]
        return {
            "wall_s": spread([job.seconds for job in warm]),
            "invocations": statistics.fmean(job.invocations for job in warm),
            "begins": statistics.fmean(job.begins for job in warm),
        }


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `chaos`."""
    parser = commands.add_parser(
        "chaos",
        help="measure what faults cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_workloads(parser, default=WORKLOADS)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long, in all")
    parser.add_argument("--seed", type=int, default=0, help="chooses the faults")
    outputs(parser)
    parser.set_defaults(call=run)


def run(options: argparse.Namespace) -> int:
    """The `chaos` command."""
    chosen = sized(options)
    if not 0 < options.seconds < math.inf:
        raise UsageError(f"--seconds must be positive, not {options.seconds}.")
    if options.seed < 0:
        raise UsageError(f"--seed must not be negative, as {options.seed} is.")
    print("seconds, invocations and executors begun, for each job: undisturbed → with faults")
    print(ROW.format(*HEAD))
    with _silent("wukong"):  # It warns of each executor that is lost.
        rows = [measure(each, options.seconds / len(chosen), options.seed) for each in chosen]
    settings = {
        "workers": WORKERS,
        "seconds": options.seconds,
        "seed": options.seed,
        "faults": FAULTS,
        **SETTINGS,
    }
    write(options, document("chaos", settings, rows))
    return 0 if all(row["correct"] for row in rows) else 1


def measure(each: Sized, seconds: float, seed: int) -> dict[str, Any]:
    """Jobs in turn for so long, and one warm pair at least; the row."""
    expected = each.expected()
    with _side(Faults()) as calm, _side(Faults(seed=seed, **FAULTS)) as disturbed:
        due = time.monotonic() + seconds
        while len(calm.jobs) < 2 or time.monotonic() < due:
            calm.compute(each, expected)
            disturbed.compute(each, expected)
        faults = dict(disturbed.cluster.stats().faults)
    pairs = list(zip(calm.jobs, disturbed.jobs, strict=True))
    row = {
        "workload": each.workload.name,
        "size": each.label,
        "runs": len(pairs) - 1,
        "correct": all(job.right for pair in pairs for job in pair),
        **disturbed.figures(),
        **{f"calm_{name}": figure for name, figure in calm.figures().items()},
        "ratio": spread([b.seconds / a.seconds for a, b in pairs[1:]]),
        "faults": faults,
    }
    _show(row)
    return row


@contextlib.contextmanager
def _side(faults: Faults) -> Iterator[Side]:
    with (
        LocalCluster(WORKERS, faults=faults) as cluster,
        WukongClient(cluster, set_as_default=False, **SETTINGS) as client,
    ):
        yield Side(cluster, client)


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _show(row: dict[str, Any]) -> None:
    figures = ("calm_invocations", "invocations", "calm_begins", "begins")
    print(
        ROW.format(
            row["workload"],
            row["runs"],
            "yes" if row["correct"] else "NO",
            *(f"{row[name]['median']:.4f}"[:6] for name in ("calm_wall_s", "wall_s")),
            show_ratio(row["ratio"]),
            *(f"{row[name]:.1f}" for name in figures),
            ", ".join(f"{count} {kind}" for kind, count in row["faults"].items() if count)
            or "none",
        ),
        flush=True,
    )
