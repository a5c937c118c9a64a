"""What a task costs beyond itself, phase by phase, on a local cluster with one sandbox.

Nothing in the engine is made for this: functions of the client and of the executor are wrapped
from outside, each in the process where it always runs (`timed_handler.py` for the sandbox). Each
moment of a job counts for one phase, the first in this list that was on its way:

    graph      making the low-level graph from the collection
    plan       reading and numbering it
    pickle     serialising it
    upload     all else until the first executor is invoked: requests, creating the job
    task       the tasks themselves: what their nodes take in a bare loop, in this process
    run        running them, beyond that
    unpickle   of blocks and inputs
    schedule   engine and policy, while no task runs
    fetch      taking the record, reading blocks and inputs
    commit     serialising outputs, putting and committing them
    result     from the last commit to the values in the caller's hands
    rest       what the executor does besides, and hand-overs between its threads
    invoke     from sending the event to the executor's first line

`sum` is their sum, and `wall` the time of the whole job: what is missing was in no phase. All are
medians over runs, so the sum need not be exact.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import socket
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import document, timed_handler
from benchmarks.phases import Span, now, shares, watching
from benchmarks.shapes import tasks_of
from benchmarks.workloads import WORKLOADS, Workload, chain
from wukong_async import LocalCluster, WukongClient
from wukong_async import graph as graphs
from wukong_async import plan as plans
from wukong_async.local import cluster as local
from wukong_async.scheduler.job import Job
from wukong_async.scheduler.scheduler import Scheduler
from wukong_async.scheduler.upload import Upload
from wukong_async.watcher import Watcher

EMPTY = Workload("empty", "one task", chain, {"length": 1}, {"length": 1})
MEASURED = {
    w.name: w
    for w in (EMPTY, *(WORKLOADS[name] for name in ("chain1000", "tr1024", "wide5000", "noop10k")))
}
USUAL = ["empty", "chain1000", "tr1024", "wide5000"]
WARM_UPS = 3
TIMEOUT = 60.0
MOST_DATAGRAM = 1 << 20
CLIENT = (
    (graphs, "request", "graph"),
    (graphs, "materialise", "graph"),
    (Upload, "prepare", "plan"),
    (Scheduler, "in_thread", "pickle"),
    (Job, "_upload", "upload"),
    (Job, "_start", "upload"),
    (Watcher, "invoke", "invoke"),
)
PRIORITY = ("graph", "plan", "run", "unpickle", "schedule", "fetch", "commit", "result", "rest",
            "invoke", "pickle", "upload")  # fmt: skip
PHASES = ("graph", "plan", "pickle", "upload", "invoke", "fetch", "unpickle", "schedule", "task",
          "run", "rest", "commit", "result")  # fmt: skip
MOST_MICROSECONDS, MOST_EMPTY = 10.0, 10.0
"""What an executor may take for a task of a chain beyond itself, and an empty job in ms."""
BEYOND = ("schedule", "run", "rest")
ROW = "{:<10} {:>6}  {:<8} {:>10} {:>10}"


class Measurement:
    """A cluster whose sandbox tells what it does, and its client."""

    def __init__(self, client: WukongClient, listener: socket.socket) -> None:
        self._client = client
        self._listener = listener

    def run(self, make: Callable[[], Any]) -> dict[str, float]:
        """Seconds of one job, by phase."""
        collection = make()
        gc.collect()
        with watching(CLIENT) as spans:
            begin = now()
            self._client.compute(collection)
            end = now()
        found = [*spans, *self._told(self._client.history[-1].job_id)]
        invoked = min(span.begin for span in found if span.phase == "invoke")
        started = min(span.begin for span in found if span.phase == "rest")
        committed = max(s.end for s in found if s.phase == "commit" and s.end <= end)
        found += [Span("invoke", invoked, started), Span("result", committed, end)]
        seconds = shares(found, PRIORITY, begin, end)
        seconds["task"] = min(seconds["run"], bare(collection))
        seconds["run"] -= seconds["task"]
        del seconds[""]
        return {**seconds, "sum": sum(seconds.values()), "wall": end - begin}

    def _told(self, job_id: str) -> list[Span]:
        """The spans of the job's executor, once it is through."""
        while True:
            job, spans = json.loads(self._listener.recv(MOST_DATAGRAM))
            if job == job_id:
                return [Span(*span) for span in spans]


@contextlib.contextmanager
def measurement() -> Iterator[Measurement]:
    """With a cluster of one sandbox, so that a job has one executor."""
    with (
        tempfile.TemporaryDirectory(prefix="wukong-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener,
    ):
        address = str(Path(folder) / "spans")
        listener.bind(address)
        listener.settimeout(TIMEOUT)
        with (
            mock.patch.object(local, "HANDLER", f"{timed_handler.__name__}.handler"),
            LocalCluster(1, environment={timed_handler.ADDRESS: address}) as cluster,
            WukongClient(cluster, set_as_default=False) as client,
        ):
            yield Measurement(client, listener)


def bare(collection: Any) -> float:
    """Seconds that the nodes of a collection take, called one after the other."""
    tasks = tasks_of(collection)
    outputs = [key for key in tasks.outputs.values() if key in tasks.nodes]
    plan = plans.make_plan(tasks.dependencies(), outputs)
    values = dict(tasks.literals)
    steps = [(key, tasks.nodes[key], tasks.sources(key)) for key in plan.keys]
    begin = now()
    for key, node, sources in steps:
        values[key] = node({name: values[source] for name, source in sources.items()})
    return now() - begin


def measure(measuring: Measurement, workload: Workload, repeat: int) -> list[dict[str, Any]]:
    """The rows of a workload: medians."""
    tasks = len(tasks_of(workload.make()).nodes)
    for _ in range(WARM_UPS):
        measuring.run(workload.make)
    runs = [measuring.run(workload.make) for _ in range(repeat)]
    rows = []
    for phase in (*PHASES, "sum", "wall"):
        seconds = statistics.median(run[phase] for run in runs)
        rows.append(
            {
                "workload": workload.name,
                "tasks": tasks,
                "phase": phase,
                "us_per_task": 1e6 * seconds / tasks,
                "ms_per_job": 1e3 * seconds,
            }
        )
    return rows


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `overhead` command."""
    parser = commands.add_parser("overhead", help="what a task costs beyond itself, by phase")
    parser.add_argument(
        "workloads",
        nargs="*",
        type=_workload,
        default=USUAL,
        metavar="WORKLOAD",
        help=f"of {', '.join(MEASURED)}; default: {' '.join(USUAL)}",
    )
    parser.add_argument("--repeat", type=int, default=11, help="timed runs of each")
    document.outputs(parser)
    parser.set_defaults(call=run)


def _workload(name: str) -> str:
    if name not in MEASURED:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(MEASURED)}")
    return name


def run(options: argparse.Namespace) -> int:
    """The `overhead` command."""
    rows: list[dict[str, Any]] = []
    print(ROW.format("workload", "tasks", "phase", "µs/task", "ms/job"))
    with measurement() as measuring:
        for name in options.workloads:
            rows += measure(measuring, MEASURED[name], options.repeat)
            _show([row for row in rows if row["workload"] == name])
    _show_targets(rows)
    settings = {"workers": 1, "blas_threads": 1, "repeat": options.repeat}
    document.write(options, document.document("overhead", settings, rows))
    return 0


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        figures = f"{row['us_per_task']:.2f}", f"{row['ms_per_job']:.2f}"
        print(ROW.format(row["workload"], row["tasks"], row["phase"], *figures), flush=True)


def _show_targets(rows: Sequence[Mapping[str, Any]]) -> None:
    """What was measured beside what it should be."""
    found = {(row["workload"], row["phase"]): row for row in rows}
    if ("chain1000", "run") in found:
        beyond = sum(found["chain1000", phase]["us_per_task"] for phase in BEYOND)
        _show_target(f"chain1000: {' + '.join(BEYOND)}", "µs per task", beyond, MOST_MICROSECONDS)
    if ("empty", "wall") in found:
        wall = found["empty", "wall"]["ms_per_job"]
        _show_target("empty: wall", "ms", wall, MOST_EMPTY)


def _show_target(what: str, unit: str, found: float, most: float) -> None:
    print(f"{what} ≤ {most:g} {unit}: {found:.2f}, {'met' if found <= most else 'not met'}")
