"""`wukong demo`: the original's eight examples, computed by real executors and checked.

The graphs are those of the original's README; the numerical ones are smaller by default, with the
same number of chunks, so that everything takes about a minute. Each result is compared with what
Dask's synchronous scheduler makes of the same graph.
"""

from __future__ import annotations

import operator
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dask import delayed

from wukong_async.client import WukongClient
from wukong_async.local import LocalCluster

ROW = "{:<26} {:>7} {:>9} {:>9} {:>6} {:>7} {:>8} {:>9} {:>9}"
EXTRA = "pip install 'wukong-async[demo]'"


@dataclass(frozen=True)
class Example:
    """One of the examples: `make(scale)` returns the collection to compute."""

    name: str
    make: Callable[[int], Any]
    shrink: int = 1
    """How many times smaller each dimension is than in the original, unless run in full."""
    needs: str | None = None
    """A package that not everybody has."""


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


def demo(*, full: bool, workers: int | None) -> int:
    """Compute all examples; 0 if every result is right."""
    wrong = 0
    started = time.perf_counter()
    # Advice on chunk sizes: these graphs are given.
    warnings.filterwarnings("ignore", message="Increasing number of chunks")
    with LocalCluster(workers) as cluster, WukongClient(cluster) as client:
        print(
            f"{cluster.n_workers} sandboxes and a Valkey are up in"
            f" {time.perf_counter() - started:.1f} s.\n"
        )
        print(
            ROW.format(
                "example",
                "result",
                "seconds",
                "dask sync",
                "tasks",
                "invoked",
                "commits",
                "MB in",
                "MB out",
            )
        )
        for example in EXAMPLES:
            row, right = _run(example, client, cluster, full=full)
            wrong += not right
            print(ROW.format(*row), flush=True)
    print(
        f"\n{len(EXAMPLES) - wrong} of {len(EXAMPLES)} right,"
        f" {time.perf_counter() - started:.1f} s in all. MB: through Valkey."
    )
    return 1 if wrong else 0


def _run(
    example: Example, client: WukongClient, cluster: LocalCluster, *, full: bool
) -> tuple[Iterator[object] | list[object], bool]:
    try:
        collection = example.make(1 if full else example.shrink)
    except ImportError as error:
        return [example.name, f"skipped: {error}; {EXTRA}", *[""] * 7], False
    before = cluster.stats()
    started = time.perf_counter()
    result = collection.compute(scheduler=client.get)
    seconds = time.perf_counter() - started
    after = cluster.stats()
    job = client.history[-1]
    started = time.perf_counter()
    expected = collection.compute(scheduler="synchronous")
    synchronous = time.perf_counter() - started
    right = _same(result, expected)
    return [
        example.name,
        "right" if right else "WRONG",
        f"{seconds:.3f}",
        f"{synchronous:.3f}",
        job.tasks,
        after.invocations - before.invocations,
        job.commits,
        f"{(after.store_bytes_in - before.store_bytes_in) / 1e6:.3f}",
        f"{(after.store_bytes_out - before.store_bytes_out) / 1e6:.3f}",
    ], right


def _same(result: Any, expected: Any) -> bool:
    if not hasattr(expected, "shape"):
        return bool(result == expected)
    import numpy as np

    # BLAS sums in another order on another number of threads.
    return bool(np.allclose(result, expected))
