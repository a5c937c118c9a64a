"""Counts that a run leaves in the store and at the endpoint: no noise, and not our bookkeeping.

Commands are what clients have sent, read off the server's MONITOR stream, which marks what scripts
have run; bytes are the server's own count of another run, since MONITOR is traffic itself. A server
that is monitored moves 30 MB/s, and executors that have measured that keep their work to
themselves: so it is the last that a cluster does. What is shared depends on how long tasks take, on
a machine that does other things as well: so a job is counted in a few clusters, and medians are
told.

Beside them, `per_edge` says what it would take if each task read each of its inputs from a store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.shapes import tasks_of
from wukong_async import LocalCluster, WukongClient, wire
from wukong_async.local import ClusterStats
from wukong_async.plan import make_plan

GB_SECOND = 0.0000166667
REQUEST = 0.20 / 1e6
"""Dollars: AWS Lambda's list prices for x86 in us-east-1 (aws.amazon.com/lambda/pricing)."""
MEMORY_MB = 3008
"""What a function has in the original."""
TIMEOUT = 60.0
WARM_UPS = 3
TIMES = 5
ENOUGH = 20.0
"""Seconds of counting after which a job is not counted once more."""


@dataclass(frozen=True)
class Counts:
    """What one job took."""

    tasks: int
    invocations: int
    commits: int
    store_commands: int
    """Sent by the client and the executors."""
    store_calls: int
    """Those, and what the scripts among them have run."""
    store_bytes_in: int
    store_bytes_out: int
    store_peak_bytes: int
    billed_ms: int

    @property
    def usd(self) -> float:
        """What Lambda would take for it."""
        gb_seconds = self.billed_ms / 1000 * MEMORY_MB / 1024
        return gb_seconds * GB_SECOND + self.invocations * REQUEST


def counted(
    start: Callable[[], AbstractContextManager[tuple[LocalCluster, WukongClient]]],
    call: Callable[[WukongClient], Any],
    times: int,
) -> Counts:
    """Run a job in so many new clusters, `TIMES` at the most, and count: the medians."""
    due = time.monotonic() + ENOUGH
    found: list[Counts] = []
    while not found or (len(found) < min(times, TIMES) and time.monotonic() < due):
        with start() as (cluster, client):
            for _ in range(WARM_UPS):
                call(client)
            found.append(_counted_once(cluster, client, partial(call, client)))
    rows = zip(*map(dataclasses.astuple, found), strict=True)
    return Counts(*map(statistics.median_low, rows))


def _counted_once(cluster: LocalCluster, client: WukongClient, run: Callable[[], Any]) -> Counts:
    """Run a job twice, and count."""
    before = _settled(cluster)
    run()
    after = _settled(cluster)
    job = client.history[-1]
    (url,) = cluster.settings["redis_endpoints"]
    with _monitor(url.removeprefix("unix://")) as stop:
        run()
        _settled(cluster)
        lines = [line for line in stop() if b'"INFO"' not in line]  # It is us who ask that.
    scripted = sum(b" lua] " in line for line in lines)
    return Counts(
        tasks=job.tasks,
        invocations=after.invocations - before.invocations,
        commits=job.commits,
        store_commands=len(lines) - scripted,
        store_calls=len(lines),
        store_bytes_in=after.store_bytes_in - before.store_bytes_in,
        store_bytes_out=after.store_bytes_out - before.store_bytes_out,
        store_peak_bytes=after.store_bytes_peak,
        billed_ms=after.billed_ms - before.billed_ms,
    )


def _settled(cluster: LocalCluster) -> ClusterStats:
    """Wait for the executors, who end after their job has; what has been counted by then."""
    due = time.monotonic() + TIMEOUT
    while time.monotonic() < due:
        stats = cluster.stats()
        if stats.idle == cluster.n_workers and stats.deliveries >= stats.invocations:
            return stats
        time.sleep(0.005)
    raise RuntimeError(f"executors still run {TIMEOUT:.0f} s after their job")


@dataclass(frozen=True)
class PerEdge:
    """What a graph takes with one write and one read for each edge, computed and not run."""

    tasks: int
    edges: int
    bytes: int
    """Of the outputs, pickled, each as often as it has an edge: written, and read as well."""

    @property
    def commands(self) -> int:
        """Of the store."""
        return 2 * self.edges


def per_edge(collection: Any) -> PerEdge:
    """Run the graph of a collection here, in order, and weigh what would travel along its edges.

    Not the public API: the graph and the frames have to be those of the engine.
    """
    tasks = tasks_of(collection)
    plan = make_plan(tasks.dependencies(), [k for k in tasks.outputs.values() if k in tasks.nodes])
    values = dict(tasks.literals)
    weight = 0
    last = {d: spec.number for spec in plan.specs for d in spec.inputs}
    for key, spec in zip(plan.keys, plan.specs, strict=True):
        value = tasks.nodes[key]({n: values[source] for n, source in tasks.sources(key).items()})
        if spec.consumers:
            values[key] = value
            weight += len(spec.consumers) * wire.size(wire.dumps(value))
        for d in spec.inputs:
            if last[d] == spec.number:
                del values[plan.keys[d]]
    return PerEdge(len(plan), sum(len(spec.inputs) for spec in plan.specs), weight)


@contextlib.contextmanager
def _monitor(path: str) -> Iterator[Callable[[], list[bytes]]]:
    """Watch the server; the function yields what it did until it was called."""
    with _connect(path) as watcher, _connect(path) as marker:
        watcher.sendall(b"MONITOR\r\n")
        stream = watcher.makefile("rb")
        if stream.readline() != b"+OK\r\n":
            raise RuntimeError("the server does not let itself be monitored")

        def stop() -> list[bytes]:
            mark = secrets.token_hex(8)
            marker.sendall(f"ECHO {mark}\r\n".encode())
            lines: list[bytes] = []
            while mark.encode() not in (line := stream.readline()):
                lines.append(line)
            return lines

        yield stop


@contextlib.contextmanager
def _connect(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(TIMEOUT)
        connection.connect(path)
        yield connection
