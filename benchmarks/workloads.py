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


def independent(count: int) -> Any:
    """No-ops that have nothing to do with each other, in a bag."""
    import dask.bag as db

    return db.from_sequence(range(count), npartitions=count).map(increment)


def fan(stages: int, width: int) -> Any:
    """One to many to one, again and again."""
    x: Any = delayed(increment)(0)
    for _ in range(stages):
        x = delayed(sum)([delayed(operator.add)(x, i) for i in range(width)])
    return x


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


def tsqr(rows: int, columns: int, chunk: int) -> Any:
    """Both factors of a tall-and-skinny matrix, the large one summed."""
    import dask.array as da

    matrix = da.random.RandomState(0).random_sample((rows, columns), chunks=(chunk, columns))
    q, r = da.linalg.tsqr(matrix)
    return abs(q).sum() + abs(r).sum()


def qr(rows: int, columns: int, chunk: int) -> Any:
    """The triangular factor of a tall matrix, which is small."""
    import dask.array as da

    matrix = da.random.RandomState(0).random_sample((rows, columns), chunks=(chunk, columns))
    return da.linalg.qr(matrix)[1]


def cholesky(size: int, chunk: int) -> Any:
    """The trace of the Cholesky factor of a matrix that is positive definite."""
    import dask.array as da

    matrix = da.random.RandomState(0).random_sample((size, size), chunks=chunk)
    return da.linalg.cholesky(matrix + matrix.T + 2 * size * da.eye(size, chunks=chunk)).sum()


def svc(samples: int, chunks: int) -> Any:
    """What a support vector classifier says of many samples: one model, read by each chunk."""
    import dask_ml.datasets
    import sklearn.datasets
    from dask_ml.wrappers import ParallelPostFit
    from sklearn.svm import SVC

    known, labels = sklearn.datasets.make_classification(n_samples=1000, random_state=0)
    classifier = ParallelPostFit(SVC(gamma="scale"))
    classifier.fit(known, labels)
    unknown, _ = dask_ml.datasets.make_classification(
        n_samples=samples, random_state=0, chunks=samples // chunks
    )
    return classifier.predict(unknown)


def _frame(partitions: int, rows: int) -> Any:
    """A data frame with as many rows in each partition."""
    import dask.array as da
    import dask.dataframe as dd

    state = da.random.RandomState(0)
    shape = {"size": partitions * rows, "chunks": rows}
    columns = {
        "id": state.randint(0, 1000, **shape),
        "x": state.random_sample(**shape),
        "y": state.random_sample(**shape),
    }
    arrays = [array.astype(float)[:, None] for array in columns.values()]
    return dd.from_dask_array(da.concatenate(arrays, axis=1).rechunk({1: -1}), columns=[*columns])


def groupby(partitions: int, rows: int) -> Any:
    """Means of a column of a data frame, for each value of another."""
    return _frame(partitions, rows).groupby("id").x.mean()


def shuffle(partitions: int, rows: int) -> Any:
    """Rows of a data frame to where their ids belong, from all partitions to all; then counted."""
    moved = _frame(partitions, rows).shuffle(
        "id", shuffle_method="tasks", max_branch=partitions, force=True
    )
    return moved.map_partitions(len)


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
        Workload("tsqr", lambda: tsqr(262_144, 128, 8192), "TSQR of a 262,144 × 128 matrix"),
        Workload("qr", lambda: qr(100_000, 200, 5000), "R of a 100,000 × 200 matrix"),
        Workload("cholesky", lambda: cholesky(4000, 1000), "Cholesky factor of a 4,000² matrix"),
        Workload("svc", lambda: svc(40_000, 20), "an SVC's prediction for 40,000 samples"),
        Workload("fan", lambda: fan(10, 100), "1 to 100 to 1, ten times"),
        Workload("noop10k", lambda: independent(10_000), "10,000 independent no-ops"),
        Workload("groupby", lambda: groupby(20, 50_000), "means of a million rows by group"),
        Workload("shuffle", lambda: shuffle(16, 20_000), "320,000 rows, from 16 parts to 16"),
    )
}
