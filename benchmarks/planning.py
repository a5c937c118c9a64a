"""What planning and uploading cost a client as the graph grows.

Each graph is planned and uploaded in a process of its own, into the store of a local cluster, up to
the moment when its first executors would be invoked. The engine's own code does all of it, with
timers around some of its functions. Not the public API: a part of a job is measured, and not a job.

Graphs are dictionaries of Dask's task nodes with keys as `delayed` makes them: the nodes of
`delayed` collections. A million `delayed` objects would take minutes and most of the memory, which
is no cost of ours.

Memory is resident memory as the kernel counts it, its peak included, which costs no time and has
all of it: the graph, the plan, what is serialised and what is on its way to the store. Bytes in the
store are what the server says that each key of the job takes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import operator
import os
import random
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from dask._task_spec import List, Task, TaskRef

from benchmarks import document
from benchmarks.phases import now, shares, watching
from benchmarks.workloads import increment
from wukong_async import LocalCluster
from wukong_async import graph as graphs
from wukong_async.config import Settings
from wukong_async.loops import new_event_loop
from wukong_async.protocol import JobState
from wukong_async.scheduler.job import Job
from wukong_async.scheduler.scheduler import Scheduler
from wukong_async.scheduler.upload import Upload
from wukong_async.store import Connections

Graph: TypeAlias = dict[str, Any]

LEAST = 10_000
"""Tasks of the smallest graph; and of all in layers, of which only the edges grow."""
MOST_MICROSECONDS, MOST_BYTES, MOST_MEMORY = 15.0, 400.0, 1.5
"""What plan and upload may take: time and bytes of a task, and memory over that of the graph."""
WARM_UP = 1000
"""Tasks of the first graph of a process, which loads what is loaded once."""
BATCH = 1000
HEAD = ("shape", "tasks", "edges", "graph MB", "graph s", "ingest s", "number s", "pickle s",
        "upload s", "µs/task", "µs/edge", "B/task", "peak/graph")  # fmt: skip
ROW = "{:<7} {:>9} {:>9} {:>9} {:>8} {:>9} {:>9} {:>9} {:>9} {:>8} {:>8} {:>7} {:>11}"


# Graphs ---------------------------------------------------------------------------------------


class Names:
    """Keys as `delayed` makes them, the same in each run."""

    def __init__(self) -> None:
        self._random = random.Random(0)

    def new(self, name: str) -> str:
        """A key that has not been there."""
        return f"{name}-{uuid.UUID(int=self._random.getrandbits(128), version=4)}"


def _add(graph: Graph, key: str, function: Callable[..., Any], *args: Any) -> str:
    graph[key] = Task(key, function, *args)
    return key


def tree(size: int) -> tuple[Graph, str]:
    """Numbers are added pair by pair."""
    graph: Graph = {}
    name = Names().new
    leaves = (size + 1) // 2
    level = [_add(graph, name("add"), operator.add, 2 * i, 2 * i + 1) for i in range(leaves)]
    while len(level) > 1:
        pairs = zip(map(TaskRef, level[0::2]), map(TaskRef, level[1::2]), strict=False)
        above = [_add(graph, name("add"), operator.add, *pair) for pair in pairs]
        level = above + level[2 * len(above) :]
    return graph, level[0]


def wide(size: int) -> tuple[Graph, str]:
    """No-ops into one sum."""
    graph: Graph = {}
    name = Names().new
    refs = [TaskRef(_add(graph, name("increment"), increment, i)) for i in range(size - 1)]
    return graph, _add(graph, name("sum"), sum, List(*refs))


def chain(size: int) -> tuple[Graph, str]:
    """One task after the other."""
    graph: Graph = {}
    name = Names().new
    key = _add(graph, name("increment"), increment, 0)
    for _ in range(size - 1):
        key = _add(graph, name("increment"), increment, TaskRef(key))
    return graph, key


def layers(size: int) -> tuple[Graph, str]:
    """Each task reads all of the layer before, which is as wide as so many edges need."""
    tasks = min(size, LEAST)
    width = max(1, size // tasks)
    graph: Graph = {}
    name = Names().new
    layer = [_add(graph, name("increment"), increment, i) for i in range(width)]
    while len(graph) + width < tasks:
        refs = list(map(TaskRef, layer))
        layer = [_add(graph, name("sum"), sum, List(*refs)) for _ in range(width)]
    return graph, _add(graph, name("sum"), sum, List(*map(TaskRef, layer)))


SHAPES = {"tree": tree, "wide": wide, "chain": chain, "layers": layers}


def sizes(most: int) -> Iterator[int]:
    """Half-decades from `LEAST` on, the last one cut off."""
    size = LEAST
    while size < most:
        yield size
        size = 3 * size if str(size).startswith("1") else size // 3 * 10
    yield most


# One graph, in a process of its own -----------------------------------------------------------


class _Unfired(Scheduler):
    """Invokes nobody."""

    async def fire(self, events: Sequence[bytes]) -> None:
        """Nothing."""


class _Figures(NamedTuple):
    seconds: Mapping[str, float]
    bytes: int


async def measure(shape: str, size: int, settings: Settings) -> dict[str, Any]:
    """The row of a graph, in a process that has done nothing else before."""
    async with _Unfired(settings) as scheduler:
        await _upload(scheduler, *SHAPES[shape](WARM_UP))
        before = _memory("VmRSS")
        begun = now()
        graph, key = SHAPES[shape](size)
        graph_s = now() - begun
        after = _memory("VmRSS")
        figures = await _upload(scheduler, graph, key)
        peak = _memory("VmHWM")
    seconds = figures.seconds
    return {
        "shape": shape,
        "tasks": len(graph),
        "edges": sum(len(node.dependencies) for node in graph.values()),
        "graph_bytes": after - before,
        "graph_s": graph_s,
        "ingest_s": seconds["ingest"],
        "number_s": seconds["number"],
        "pickle_s": seconds["pickle"],
        "upload_s": seconds[""],
        "us_per_task": 1e6 * sum(seconds.values()) / len(graph),
        "store_bytes": figures.bytes,
        "bytes_per_task": figures.bytes / len(graph),
        "peak_bytes": peak - before,
        "peak_over_graph": (peak - before) / (after - before),
    }


async def _upload(scheduler: Scheduler, graph: Graph, key: str) -> _Figures:
    """Plan, upload, create the job, and take it back."""
    with watching(
        [
            (graphs, "ingest", "ingest"),
            (Upload, "prepare", "number"),
            # All else that is done in a thread goes before a request.
            (Scheduler, "in_thread", "pickle"),
        ]
    ) as spans:
        job = Job(scheduler, scheduler.settings)
        begin = now()
        upload = await scheduler.in_thread(Upload.prepare, graph, [key], scheduler.settings)
        await job._start(upload, *await job._upload(upload, key))
        end = now()
    stored = await _stored(scheduler.connections, job.job_id)
    await job._store.cancel(JobState.CANCELLED, b"")
    await job._store.finish()
    return _Figures(shares(spans, ("ingest", "number", "pickle"), begin, end), stored)


async def _stored(connections: Connections, job_id: str) -> int:
    """Bytes that a job's keys take, as the server counts them."""
    total = 0
    for shard in range(len(connections)):
        client = connections.client(shard)
        names = [name async for name in client.scan_iter(f"*{job_id}*", count=BATCH)]
        for first in range(0, len(names), BATCH):
            async with client.pipeline(transaction=False) as pipe:
                for name in names[first : first + BATCH]:
                    pipe.memory_usage(name, samples=0)
                total += sum(await pipe.execute())
    return total


def _memory(name: str) -> int:
    """A figure of this process in bytes: `VmRSS`, resident now, or `VmHWM`, at the most.

    Not `ru_maxrss`: a new process inherits that from whoever has started it.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split(maxsplit=1)[0])


# The command ----------------------------------------------------------------------------------


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `plan` command."""
    parser = commands.add_parser("plan", help="what planning and uploading cost, by size of graph")
    parser.add_argument(
        "--tasks",
        type=_count,
        default=1_000_000,
        metavar="N",
        help="of the largest graph; for layers: edges; default: 1_000_000",
    )
    parser.add_argument(
        "--shape",
        choices=list(SHAPES),
        nargs="+",
        default=["tree"],
        help="of the graphs; default: tree",
    )
    document.outputs(parser)
    parser.set_defaults(call=run)


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < LEAST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tasks, from {LEAST:_} on")
    return count


def run(options: argparse.Namespace) -> int:
    """The `plan` command."""
    if not Path("/proc/self/status").exists():
        raise SystemExit("benchmarks plan reads memory from /proc: run it on Linux.")
    rows: list[dict[str, Any]] = []
    print(ROW.format(*HEAD))
    with LocalCluster(1) as cluster:
        for shape in options.shape:
            for size in sizes(options.tasks):
                rows.append(_in_process(shape, size, cluster.settings))
                _show(rows[-1])
    _show_targets(rows)
    settings = {"tasks": options.tasks, "shapes": options.shape}
    document.write(options, document.document("plan", settings, rows))
    return 0


def _in_process(shape: str, size: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.planning", shape, str(size)]
    environment = {**os.environ, **Settings.load(settings).environment()}
    said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    row: dict[str, Any] = json.loads(said.stdout)
    return row


def _show(row: Mapping[str, Any]) -> None:
    phases = ("graph_s", "ingest_s", "number_s", "pickle_s", "upload_s")
    print(
        ROW.format(
            row["shape"],
            row["tasks"],
            row["edges"],
            f"{row['graph_bytes'] / 1e6:.1f}",
            *(f"{row[name]:.3f}" for name in phases),
            f"{row['us_per_task']:.1f}",
            f"{row['us_per_task'] * row['tasks'] / max(1, row['edges']):.1f}",
            f"{row['bytes_per_task']:.0f}",
            f"{row['peak_over_graph']:.2f}×",
        ),
        flush=True,
    )


def _show_targets(rows: Sequence[Mapping[str, Any]]) -> None:
    """The largest graph of each shape beside what it should take; in layers, edges cost."""
    last = {row["shape"]: row for row in rows if row["shape"] != "layers"}
    for shape, row in last.items():
        for what, unit, name, most in (
            ("plan + upload", "µs per task", "us_per_task", MOST_MICROSECONDS),
            ("in the store", "bytes per task", "bytes_per_task", MOST_BYTES),
            ("peak memory over the graph's", "×", "peak_over_graph", MOST_MEMORY),
        ):
            met = "met" if row[name] <= most else "not met"
            print(f"{shape}, {row['tasks']:,}: {what} ≤ {most:g} {unit}: {row[name]:.2f}, {met}")


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=new_event_loop) as loop:
        print(json.dumps(loop.run(measure(sys.argv[1], int(sys.argv[2]), Settings.load()))))
