"""The original Wukong's eight examples.

The graphs are those of its README; the numerical ones are smaller by default, with the same number
of chunks, so that everything takes about a minute.

A module of its own because executors import it, to find the functions of its tasks: with the
client and the cluster beside them, that would take half a second.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from dask import delayed


@dataclass(frozen=True)
class Example:
    """One of the examples: `make(scale)` returns the collection to compute."""

    name: str
    make: Callable[[int], Any]
    shrink: int = 1
    """How many times smaller each dimension is than in the original, unless run in full."""
    needs: str | None = None
    """A package that not everybody has."""

    def missing(self) -> str | None:
        """The package that is needed and is not here."""
        return self.needs if self.needs and find_spec(self.needs) is None else None


def incr(x: int) -> int:
    """One more."""
    return x + 1


def decr(x: int) -> int:
    """One less."""
    return x - 1


def double(x: int) -> int:
    """Twice as much."""
    return x * 2


def single_node(_: int) -> Any:
    """One task."""
    return delayed(incr)(5)


def linear(_: int) -> Any:
    """Three tasks in a row."""
    return delayed(double)(delayed(decr)(delayed(incr)(5)))


def fan_in(_: int) -> Any:
    """Two tasks and a third that needs both."""
    return delayed(operator.add)(delayed(incr)(3), delayed(decr)(7))


def tree_reduction(_: int) -> Any:
    """The sum of 1,024 numbers, pair by pair."""
    numbers: list[Any] = list(range(1024))
    while len(numbers) > 1:
        numbers = list(map(delayed(operator.add), numbers[0::2], numbers[1::2]))
    return numbers[0]


def svd_tall(shrink: int) -> Any:
    """SVD of a tall-and-skinny matrix: 200,000 × 1,000 in 20 chunks."""
    import dask.array as da

    rows, columns = 200_000 // shrink, 1_000 // shrink
    state = da.random.RandomState(0)
    _, _, v = da.linalg.svd(state.random_sample((rows, columns), chunks=(rows // 20, columns)))
    return v


def svd_compressed(shrink: int) -> Any:
    """Approximate SVD of a square matrix: 10,000² in 25 chunks."""
    import dask.array as da

    size = 10_000 // shrink
    matrix = da.random.RandomState(0).random_sample((size, size), chunks=size // 5)
    _, _, v = da.linalg.svd_compressed(matrix, k=5, seed=0)
    return v


def gemm(shrink: int) -> Any:
    """The product of two square matrices: 10,000² in 100 chunks."""
    import dask.array as da

    size = 10_000 // shrink
    state = da.random.RandomState(0)
    x, y = (state.random_sample((size, size), chunks=size // 10) for _ in range(2))
    return da.matmul(x, y)


def svc_prediction(shrink: int) -> Any:
    """Prediction with a support vector classifier: 800,000 samples in 20 chunks."""
    import dask_ml.datasets
    import sklearn.datasets
    from dask_ml.wrappers import ParallelPostFit
    from sklearn.svm import SVC

    samples = 800_000 // shrink**2
    known, labels = sklearn.datasets.make_classification(n_samples=1000, random_state=0)
    classifier = ParallelPostFit(SVC(gamma="scale"))
    classifier.fit(known, labels)
    unknown, _ = dask_ml.datasets.make_classification(
        n_samples=samples, random_state=0, chunks=samples // 20
    )
    return classifier.predict(unknown)


EXAMPLES = (
    Example("single node", single_node),
    Example("linear, 3 nodes", linear),
    Example("fan-in, 3 nodes", fan_in),
    Example("tree reduction, 1,024", tree_reduction),
    Example("SVD, tall and skinny", svd_tall, shrink=4, needs="numpy"),
    Example("svd_compressed, square", svd_compressed, shrink=4, needs="numpy"),
    Example("GEMM", gemm, shrink=4, needs="numpy"),
    Example("SVC prediction", svc_prediction, shrink=4, needs="dask_ml"),
)
