"""`wukong demo`: the original's eight examples, computed by real executors and checked.

Each result is compared with what Dask's synchronous scheduler makes of the same graph.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

from wukong_async.cli.examples import EXAMPLES, Example
from wukong_async.client import WukongClient
from wukong_async.local import LocalCluster

ROW = "{:<26} {:>7} {:>9} {:>9} {:>6} {:>7} {:>8} {:>9} {:>9}"
EXTRA = "pip install 'wukong-async[demo]'"


def demo(*, full: bool, workers: int | None) -> int:
    """Compute all examples; 0 if every result is right."""
    wrong = skipped = 0
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
            if (missing := example.missing()) is not None:
                skipped += 1
                print(f"{example.name:<26} skipped: there is no {missing} here; {EXTRA}")
                continue
            row, right = _run(example, client, cluster, full=full)
            wrong += not right
            print(ROW.format(*row), flush=True)
    print(
        f"\n{len(EXAMPLES) - wrong - skipped} of {len(EXAMPLES)} right, {skipped} skipped,"
        f" {time.perf_counter() - started:.1f} s in all. MB: through Valkey."
    )
    return 1 if wrong else 0


def _run(
    example: Example, client: WukongClient, cluster: LocalCluster, *, full: bool
) -> tuple[list[object], bool]:
    collection = example.make(1 if full else example.shrink)
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
