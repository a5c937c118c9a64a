"""Graphs for the timing model: drawn by hand, or read from what Dask makes of a collection."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import dask

from wukong_async import graph

Key: TypeAlias = Hashable


@dataclass(frozen=True)
class Shape:
    """A graph without its functions."""

    dependencies: Mapping[Key, Sequence[Key]]
    outputs: Sequence[Key]


def tasks_of(collection: Any) -> graph.TaskGraph:
    """The graph of a collection as the engine reads it.

    Not the public API: what is counted and modelled has to be what runs.

    Raises
    ------
    TypeError
        If it is no Dask collection.
    """
    # As it is while a client is entered.
    with dask.config.set({"dataframe.shuffle.method": "tasks"}):
        request = graph.request([collection], optimize_graph=True)
        if request is None:
            raise TypeError(f"{collection!r} is not a Dask collection")
        return graph.ingest(request.graph, graph.flat(request.keys))


def of(make: Callable[[], Any]) -> Shape:
    """The graph that Dask makes of a collection; nothing of it is run."""
    tasks = tasks_of(make())
    return Shape(tasks.dependencies(), [k for k in tasks.outputs.values() if k in tasks.nodes])


def independent(count: int) -> Shape:
    """A map without an end."""
    keys = [f"map-{i}" for i in range(count)]
    return Shape(dict.fromkeys(keys, ()), keys)


def fork_joins(stages: int, width: int) -> Shape:
    """One to many to one, again and again."""
    made: dict[Key, Sequence[Key]] = {"join-0": ()}
    for stage in range(1, stages + 1):
        forks = [f"fork-{stage}-{i}" for i in range(width)]
        made.update(dict.fromkeys(forks, (f"join-{stage - 1}",)))
        made[f"join-{stage}"] = forks
    return Shape(made, [f"join-{stages}"])


def fan_in(width: int) -> Shape:
    """Many to one."""
    forks = [f"fork-{i}" for i in range(width)]
    return Shape({**dict.fromkeys(forks, ()), "join-0": forks}, ["join-0"])


def tree(leaves: int) -> Shape:
    """A binary reduction of what the leaves make."""
    level = [f"leaf-{i}" for i in range(leaves)]
    made: dict[Key, Sequence[Key]] = dict.fromkeys(level, ())
    depth = 0
    while len(level) > 1:
        depth += 1
        above = [f"add-{depth}-{i}" for i in range(len(level) // 2)]
        made.update({key: level[2 * i : 2 * i + 2] for i, key in enumerate(above)})
        level = above + level[2 * len(above) :]
    made["total-0"] = level
    return Shape(made, ["total-0"])


def gemm(blocks: int) -> Shape:
    """Two matrices of random blocks, multiplied, and the product summed."""
    made: dict[Key, Sequence[Key]] = {}
    sums = []
    for i in range(blocks):
        for j in range(blocks):
            products = []
            for k in range(blocks):
                made.setdefault(f"random-x-{i}-{k}", ())
                made.setdefault(f"random-y-{k}-{j}", ())
                made[f"matmul-{i}-{j}-{k}"] = (f"random-x-{i}-{k}", f"random-y-{k}-{j}")
                products.append(f"matmul-{i}-{j}-{k}")
            made[f"add-{i}-{j}"] = products
            made[f"chunk-{i}-{j}"] = (f"add-{i}-{j}",)
            sums.append(f"chunk-{i}-{j}")
    made["sum-0"] = sums
    return Shape(made, ["sum-0"])


def tsqr(blocks: int) -> Shape:
    """QR of a tall matrix: small factors that meet, and the large ones multiplied by what follows.

    The large factors are wanted by somebody: so each has to wait for the small ones.
    """
    made: dict[Key, Sequence[Key]] = {}
    for i in range(blocks):
        made[f"random-{i}"] = ()
        made[f"qr-{i}"] = (f"random-{i}",)
        made[f"r-{i}"] = (f"qr-{i}",)
        made[f"q-{i}"] = (f"qr-{i}",)
    made["stack-0"] = [f"r-{i}" for i in range(blocks)]
    made["inner-0"] = ("stack-0",)
    for i in range(blocks):
        made[f"part-{i}"] = ("inner-0",)
        made[f"dot-{i}"] = (f"q-{i}", f"part-{i}")
        made[f"norm-{i}"] = (f"dot-{i}",)
    made["total-0"] = [f"norm-{i}" for i in range(blocks)]
    return Shape(made, ["total-0"])


def all_to_all(parts: int) -> Shape:
    """A shuffle: each part is split, and each new one is made of a piece of all."""
    made: dict[Key, Sequence[Key]] = {}
    for i in range(parts):
        made[f"read-{i}"] = ()
        made[f"group-{i}"] = (f"read-{i}",)
        made.update({f"split-{i}-{j}": (f"group-{i}",) for j in range(parts)})
    for j in range(parts):
        made[f"merge-{j}"] = [f"split-{i}-{j}" for i in range(parts)]
        made[f"count-{j}"] = (f"merge-{j}",)
    made["total-0"] = [f"count-{j}" for j in range(parts)]
    return Shape(made, ["total-0"])


def chain(length: int) -> Shape:
    """One after the other."""
    made: dict[Key, Sequence[Key]] = {"link-0": ()}
    made.update({f"link-{i}": (f"link-{i - 1}",) for i in range(1, length)})
    return Shape(made, [f"link-{length - 1}"])
