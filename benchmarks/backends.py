"""What computes the workloads: ours, and what a user would pick instead."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeAlias

from benchmarks.counting import Counts, counted
from wukong_async import LocalCluster, WukongClient

WORKERS = 2
WIDE = 1000
Lane: TypeAlias = dict[str, Any]
"""`lane`, who was busy, and `spans`: (start, end) in seconds since the job began, and with what."""


@dataclass(frozen=True)
class Backend:
    """Something that computes collections, warmed up."""

    name: str
    entries: dict[str, Callable[[Any], Any]]
    """How a user calls it: `get` is `x.compute(scheduler=…)`, `compute` is `client.compute(x)`."""
    count: Callable[[str, Callable[[], Any], int], Counts] | None = field(default=None)
    """What a job takes, by the entry that it is called by, what makes its collection, and how often
    it is counted."""
    trace: Callable[[Any], list[Lane]] | None = field(default=None)
    """Compute a collection, and see who is busy when."""


@contextlib.contextmanager
def wukong() -> Iterator[Backend]:
    """Two sandboxes of a local cluster."""
    with _ours("wukong") as backend:
        yield backend


@contextlib.contextmanager
def paper_mode() -> Iterator[Backend]:
    """The same, with an executor for each leaf and each edge of a fan-out, while slots are free."""
    with _ours("paper-mode", leaf_batch=1, hold=0) as backend:
        yield backend


@contextlib.contextmanager
def paper_wide() -> Iterator[Backend]:
    """The same with slots for all of them, as on AWS: those that have no sandbox wait for one."""
    with _ours("paper-wide", leaf_batch=1, hold=0, max_concurrency=WIDE) as backend:
        yield backend


@contextlib.contextmanager
def _ours(name: str, **settings: object) -> Iterator[Backend]:
    start = partial(_started, **settings)

    def count(entry: str, make: Callable[[], Any], times: int) -> Counts:
        return counted(start, lambda client: _entries(client)[entry](make()), times)

    with start() as (cluster, client):
        yield Backend(name, _entries(client), count, partial(_traced, cluster, client))


@contextlib.contextmanager
def _started(**settings: object) -> Iterator[tuple[LocalCluster, WukongClient]]:
    with (
        LocalCluster(WORKERS) as cluster,
        WukongClient(cluster, set_as_default=False, **settings) as client,
    ):
        yield cluster, client


def _traced(cluster: LocalCluster, client: WukongClient, collection: Any) -> list[Lane]:
    started = time.monotonic()
    client.compute(collection)
    ended = time.monotonic()
    spans: dict[int, list[list[Any]]] = {number: [] for number in range(cluster.n_workers)}
    executors: dict[str, int] = {}
    for request in cluster.requests():
        # Those of earlier jobs may linger; those of this one need not have answered yet.
        begin, end = max(request.begin, started), min(request.end or ended, ended)
        if begin < end:
            executor = executors.setdefault(request.request_id, len(executors) + 1)
            span = [begin - started, end - started, f"executor {executor}"]
            spans[request.sandbox].append(span)
    return [{"lane": f"sandbox {number}", "spans": some} for number, some in spans.items()]


def _entries(client: WukongClient) -> dict[str, Callable[[Any], Any]]:
    return {"get": lambda x: x.compute(scheduler=client.get), "compute": client.compute}


@contextlib.contextmanager
def distributed() -> Iterator[Backend]:
    """Two single-threaded workers of dask.distributed."""
    from distributed import Client
    from distributed import LocalCluster as DistributedCluster

    with (
        warnings.catch_warnings(),
        DistributedCluster(
            n_workers=WORKERS,
            threads_per_worker=1,
            dashboard_address=None,
            silence_logs=logging.ERROR,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        warnings.simplefilter("ignore")
        yield Backend(
            "distributed",
            {
                "get": lambda x: x.compute(scheduler=client.get),
                "compute": lambda x: client.compute(x, sync=True),
            },
        )


@contextlib.contextmanager
def dask_sync() -> Iterator[Backend]:
    """One core, no scheduler to speak of: the oracle."""
    yield Backend("dask-sync", {"get": lambda x: x.compute(scheduler="synchronous")})


@contextlib.contextmanager
def dask_threads() -> Iterator[Backend]:
    """Dask's own threads."""
    yield Backend(
        "dask-threads", {"get": lambda x: x.compute(scheduler="threads", num_workers=WORKERS)}
    )


@contextlib.contextmanager
def ray() -> Iterator[Backend]:
    """Ray's own scheduler of Dask graphs, on two of its workers."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.util.dask import ray_dask_get

    ray.init(
        num_cpus=WORKERS, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False
    )
    try:
        yield Backend("ray", {"get": lambda x: x.compute(scheduler=ray_dask_get)})
    finally:
        ray.shutdown()


@contextlib.contextmanager
def lithops() -> Iterator[Backend]:
    """Lithops, which knows no graphs: one map for each level, on two local processes."""
    from benchmarks.levels import Levels

    with Levels(WORKERS) as levels:
        yield Backend("lithops", {"get": lambda x: x.compute(scheduler=levels.get)})


BACKENDS = {
    "wukong": wukong,
    "distributed": distributed,
    "dask-threads": dask_threads,
    "dask-sync": dask_sync,
    "paper-mode": paper_mode,
    "paper-wide": paper_wide,
    "lithops": lithops,
    "ray": ray,
}
OPTIONAL = ("lithops", "ray")
"""Packages of the extra `compare`."""


def is_installed(name: str) -> bool:
    """Whether a backend can be had."""
    return name not in OPTIONAL or find_spec(name) is not None
