"""Graphs on Lithops, level by level.

Lithops maps a function over inputs and knows no dependencies. So a level of a graph, all tasks
whose inputs have been made by those before, is one map; its outputs are objects in Lithops' own
storage, which the tasks of later levels read.

Not the public API: the graph has to be that of the engine.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from graphlib import TopologicalSorter
from typing import Any, Self

import cloudpickle

from wukong_async import graph


class Levels:
    """A Lithops executor on this machine, and a Dask scheduler: `get`. A context manager."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        from lithops import FunctionExecutor

        # What Lithops starts imports what this process can.
        self._stack.enter_context(_environment(PYTHONPATH=os.pathsep.join(sys.path)))
        local = {
            "runtime": sys.executable,
            "worker_processes": self._workers,
            # A pool of processes for each map, each of which forks for each task; the default
            # starts an interpreter for each task.
            "version": 1,
        }
        config = {
            "lithops": {"backend": "localhost", "storage": "localhost"},
            "localhost": local,
        }
        self._executor = self._stack.enter_context(
            FunctionExecutor(config=config, log_level="ERROR")
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def get(self, dsk: object, keys: Any, **_: object) -> Any:
        """Compute the keys of a graph."""
        tasks = graph.ingest(dsk, graph.flat(keys))
        made: dict[graph.Key, Any] = {}
        for level in levels(tasks.dependencies()):
            work = [(self._pickled(tasks, key), self._inputs(tasks, key, made)) for key in level]
            # Modules are not sent along: they are there.
            self._executor.map(run_task, work, include_modules=None)
            found = self._executor.get_result(show_progressbar=False)
            made.update(zip(level, found, strict=True))
        load = self._executor.storage.get_cloudobject
        values = {
            key: tasks.literals[source]
            if source in tasks.literals
            else cloudpickle.loads(load(made[source]))
            for key, source in tasks.outputs.items()
        }
        self._executor.clean(cs=[*made.values()])
        return graph.nest(keys, values)

    def _pickled(self, tasks: graph.TaskGraph, key: graph.Key) -> bytes:
        literals = {
            name: tasks.literals[source]
            for name, source in tasks.sources(key).items()
            if source in tasks.literals
        }
        return bytes(cloudpickle.dumps((tasks.nodes[key], literals)))

    def _inputs(
        self, tasks: graph.TaskGraph, key: graph.Key, made: Mapping[graph.Key, Any]
    ) -> dict[graph.Key, Any]:
        return {
            name: made[source]
            for name, source in tasks.sources(key).items()
            if source not in tasks.literals
        }


def run_task(pickled: bytes, inputs: Mapping[graph.Key, Any], storage: Any) -> Any:
    """Run a task where Lithops wants it; the object with its output."""
    node, values = cloudpickle.loads(pickled)
    for name, place in inputs.items():
        values[name] = cloudpickle.loads(storage.get_cloudobject(place))
    return storage.put_cloudobject(cloudpickle.dumps(node(values)))


def levels(dependencies: Mapping[graph.Key, Sequence[graph.Key]]) -> list[list[graph.Key]]:
    """The keys of a graph, those of a level depending on earlier levels only."""
    sorter = TopologicalSorter(dependencies)
    sorter.prepare()
    found: list[list[graph.Key]] = []
    while sorter.is_active():
        found.append([*sorter.get_ready()])
        sorter.done(*found[-1])
    return found


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
