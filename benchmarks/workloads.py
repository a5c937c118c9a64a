"""What is measured. Each workload makes a fresh collection; making it is not part of the time."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from dask import delayed

Size: TypeAlias = Mapping[str, float]
"""Arguments, by name: whole numbers, but for seconds of `sleep`."""
SLEEP = "sleep"


@dataclass(frozen=True)
class Workload:
    """A collection to compute, in sizes."""

    name: str
    about: str
    function: Callable[..., Any]
    small: Size
    paper: Size
    """The original's; where it has none, one that is well beyond `small`."""

    def make(self) -> Any:
        """A fresh collection, small."""
        return self.function(**self.small)

    def sized(self, words: Iterable[str]) -> Sized:
        """It in the size that `small`, `paper` and KEY=VALUE say; the last of a kind counts.

        Raises
        ------
        ValueError
            For a word that is none of these, with the workload's parameters.
        """
        base, changes = "small", dict[str, float]()
        for word in words:
            name, equals, text = word.partition("=")
            if word in {"small", "paper"}:
                base = word
            elif equals and name in self.small:
                changes[name] = self._value(name, text)
            else:
                raise ValueError(
                    f"{self.name} has no size {word!r}: it has small, paper, and the parameters"
                    f" {', '.join(self.small)}, as KEY=VALUE."
                )
        size = {**(self.small if base == "small" else self.paper), **changes}
        label = ",".join([base, *(f"{name}={changes[name]}" for name in size if name in changes)])
        return Sized(self, label, size)

    def _value(self, name: str, text: str) -> float:
        try:
            value = float(text) if name == SLEEP else int(text)
        except ValueError:
            value = -1
        if not (0 <= value < float("inf") if name == SLEEP else value > 0):
            kind = "seconds, not negative" if name == SLEEP else "a whole number, at least 1"
            raise ValueError(f"{name} of {self.name} must be {kind}, not {text!r}.")
        return value


@dataclass(frozen=True)
class Sized:
    """A workload in one size."""

    workload: Workload
    label: str
    size: Size

    def __str__(self) -> str:
        return f"{self.workload.name} ({describe(self.size)}): {self.workload.about}"

    def make(self) -> Any:
        """A fresh collection."""
        return self.workload.function(**self.size)

    def expected(self) -> Any:
        """Its value, by Dask in this thread. Nobody sleeps: that does not change it."""
        awake = {SLEEP: 0.0} if SLEEP in self.size else {}
        return self.workload.function(**{**self.size, **awake}).compute(scheduler="synchronous")


def describe(size: Size) -> str:
    """Parameters and values, as on the command line."""
    return ",".join(f"{name}={value}" for name, value in size.items())


def increment(x: int) -> int:
    """The smallest task that does something."""
    return x + 1


def slow_add(x: int, y: int, seconds: float) -> int:
    """A sum that takes its time."""
    time.sleep(seconds)
    return x + y


def tree_reduction(leaves: int, sleep: float) -> Any:
    """The sum of `range(leaves)`, pair by pair, each after so many seconds of sleep."""
    level: list[Any] = list(range(leaves))
    add = partial(delayed(slow_add), seconds=sleep) if sleep else delayed(operator.add)
    while len(level) > 1:
        odd = level[len(level) // 2 * 2 :]
        level = [*map(add, level[0::2], level[1::2]), *odd]
    return delayed(level[0])


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


def _frame(partitions: int, rows: int, *, ids: int = 1000, seed: int = 0) -> Any:
    """A data frame with as many rows in each partition, of so many ids."""
    import dask.array as da
    import dask.dataframe as dd

    state = da.random.RandomState(seed)
    shape = {"size": partitions * rows, "chunks": rows}
    columns = {
        "id": state.randint(0, ids, **shape),
        "x": state.random_sample(**shape),
        "y": state.random_sample(**shape),
    }
    arrays = [array.astype(float)[:, None] for array in columns.values()]
    return dd.from_dask_array(da.concatenate(arrays, axis=1).rechunk({1: -1}), columns=[*columns])


def groupby(partitions: int, rows: int) -> Any:
    """Means of a column of a data frame, for each value of another."""
    return _frame(partitions, rows).groupby("id").x.mean()


def merge(partitions: int, rows: int) -> Any:
    """The sums of two data frames joined by their ids, of which there are as many as rows."""
    left, right = (_frame(partitions, rows, ids=partitions * rows, seed=seed) for seed in range(2))
    return left.merge(right, on="id", shuffle_method="tasks", broadcast=False).sum()


def shuffle(partitions: int, rows: int) -> Any:
    """A data frame indexed by its ids, from all partitions to all; then the sums of each."""
    # Given: Dask would look for them, and compute for that, before it is asked to.
    divisions = [1000 * number / partitions for number in range(partitions + 1)]
    indexed = _frame(partitions, rows).set_index(
        "id", divisions=divisions, shuffle_method="tasks", max_branch=partitions
    )
    return indexed.map_partitions(sums)


def sums(frame: Any) -> Any:
    """Of each column."""
    return frame.sum()


def bag(partitions: int, numbers: int) -> Any:
    """The sum of some numbers, by a fold over a bag."""
    import dask.bag as db

    return db.range(numbers, partitions).map(increment).fold(operator.add)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "tr1024",
            "the sum of numbers, pair by pair",
            tree_reduction,
            small={"leaves": 1024, SLEEP: 0.0},
            paper={"leaves": 1024, SLEEP: 0.0},
        ),
        Workload(
            "tr8192",
            "the same of more numbers",
            tree_reduction,
            small={"leaves": 8192, SLEEP: 0.0},
            paper={"leaves": 65_536, SLEEP: 0.0},
        ),
        Workload(
            "chain1000",
            "tasks in a row",
            chain,
            small={"length": 1000},
            paper={"length": 10_000},
        ),
        Workload(
            "noop10k",
            "no-ops that have nothing to do with each other",
            independent,
            small={"count": 10_000},
            paper={"count": 100_000},
        ),
        Workload(
            "wide5000",
            "no-ops into one sum",
            wide_fan_in,
            small={"width": 5000},
            paper={"width": 20_000},
        ),
        Workload(
            "fan",
            "one to many to one, again and again",
            fan,
            small={"stages": 10, "width": 100},
            paper={"stages": 10, "width": 1000},
        ),
        Workload(
            "gemm",
            "the product of two square matrices, summed",
            gemm,
            small={"size": 4000, "chunk": 500},
            paper={"size": 10_000, "chunk": 1000},
        ),
        Workload(
            "svd1",
            "SVD of a tall-and-skinny matrix",
            svd_tall,
            small={"rows": 100_000, "columns": 200, "chunk": 5000},
            paper={"rows": 200_000, "columns": 1000, "chunk": 10_000},
        ),
        Workload(
            "svd2",
            "approximate SVD of a square matrix",
            svd_compressed,
            small={"size": 4000, "chunk": 1000},
            paper={"size": 10_000, "chunk": 2000},
        ),
        Workload(
            "tsqr",
            "both factors of a tall-and-skinny matrix",
            tsqr,
            small={"rows": 262_144, "columns": 128, "chunk": 8192},
            paper={"rows": 262_144, "columns": 128, "chunk": 8192},
        ),
        Workload(
            "qr",
            "R of a tall matrix",
            qr,
            small={"rows": 100_000, "columns": 200, "chunk": 5000},
            paper={"rows": 200_000, "columns": 1000, "chunk": 10_000},
        ),
        Workload(
            "cholesky",
            "Cholesky factor of a square matrix",
            cholesky,
            small={"size": 4000, "chunk": 1000},
            paper={"size": 10_000, "chunk": 1000},
        ),
        Workload(
            "svc",
            "what a support vector classifier predicts",
            svc,
            small={"samples": 40_000, "chunks": 20},
            paper={"samples": 800_000, "chunks": 20},
        ),
        Workload(
            "groupby",
            "means of a data frame's rows, by group",
            groupby,
            small={"partitions": 20, "rows": 50_000},
            paper={"partitions": 100, "rows": 100_000},
        ),
        Workload(
            "merge",
            "two data frames, joined",
            merge,
            small={"partitions": 16, "rows": 20_000},
            paper={"partitions": 32, "rows": 100_000},
        ),
        Workload(
            "shuffle",
            "a data frame, indexed anew",
            shuffle,
            small={"partitions": 16, "rows": 20_000},
            paper={"partitions": 32, "rows": 100_000},
        ),
        Workload(
            "bag",
            "a fold over a bag of numbers",
            bag,
            small={"partitions": 100, "numbers": 1_000_000},
            paper={"partitions": 1000, "numbers": 10_000_000},
        ),
    )
}
