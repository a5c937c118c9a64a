"""What is measured. Each workload makes a fresh collection; making it is not part of the time."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dask import delayed


@dataclass(frozen=True)
class Workload:
    """A named collection to compute."""

    name: str
    make: Callable[[], Any]
    about: str


def increment(x: int) -> int:
    """The smallest task that does something."""
    return x + 1


def tree_reduction(leaves: int) -> Any:
    """The sum of `range(leaves)`, pair by pair."""
    level: list[Any] = list(range(leaves))
    while len(level) > 1:
        level = list(map(delayed(operator.add), level[0::2], level[1::2]))
    return level[0]


def chain(length: int) -> Any:
    """One task after the other."""
    x: Any = delayed(increment)(0)
    for _ in range(length - 1):
        x = delayed(increment)(x)
    return x


def wide_fan_in(width: int) -> Any:
    """No-ops into one sum."""
    return delayed(sum)([delayed(increment)(i) for i in range(width)])


def gemm(size: int, chunk: int) -> Any:
    """The product of two square matrices, summed."""
    import dask.array as da

    state = da.random.RandomState(0)
    x, y = (state.random_sample((size, size), chunks=chunk) for _ in range(2))
    return da.matmul(x, y).sum()


def svd_tall(rows: int, columns: int, chunk: int) -> Any:
    """The singular values of a tall-and-skinny matrix."""
    import dask.array as da

    matrix = da.random.RandomState(0).random_sample((rows, columns), chunks=(chunk, columns))
    return da.linalg.svd(matrix)[1]


def svd_compressed(size: int, chunk: int) -> Any:
    """The largest five singular values of a square matrix, approximately."""
    import dask.array as da

    matrix = da.random.RandomState(0).random_sample((size, size), chunks=chunk)
    return da.linalg.svd_compressed(matrix, k=5, seed=0)[1]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("tr1024", lambda: tree_reduction(1024), "tree reduction of 1,024 numbers"),
        Workload("tr8192", lambda: tree_reduction(8192), "tree reduction of 8,192 numbers"),
        Workload("chain1000", lambda: chain(1000), "1,000 tasks in a row"),
        Workload("wide5000", lambda: wide_fan_in(5000), "5,000 no-ops into one sum"),
        Workload("gemm", lambda: gemm(4000, 500), "product of two 4,000² matrices, summed"),
        Workload("svd1", lambda: svd_tall(100_000, 200, 5000), "SVD of a 100,000 × 200 matrix"),
        Workload("svd2", lambda: svd_compressed(4000, 1000), "approximate SVD of a 4,000² matrix"),
    )
}
