"""The cases of the timing model: maps, trees and fork-joins, and the workloads of the papers.

The order of hashes decides what Dask fuses: shapes are the same only with one PYTHONHASHSEED, which
`python -m benchmarks model` sets.

What tasks of the workloads take and make was measured on one core, and rounded; figures of the
larger ones follow from the operations that they count.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks import shapes, workloads
from benchmarks.shapes import Key
from benchmarks.timing import COLD, LOCAL, SMALL, Case
from benchmarks.workloads import WORKLOADS

MB = 1e6
NO_OP = 1e-6


def spread(mean: float) -> Callable[[Key], float]:
    """Figures that are spread like the times between random events: many short, a few long."""

    def figure(key: Key) -> float:
        chance = (zlib.crc32(str(key).encode()) + 0.5) / 2**32
        return -mean * math.log(chance)

    return figure


def straggler(seconds: float, times: float, key: Key) -> Callable[[Key], float]:
    """All alike, but for one that takes so many times as long."""
    return lambda each: seconds * (times if each == key else 1)


def late_bloomers(key: Key) -> float:
    """Who has seen the first ones expects nothing of the others."""
    return 1e-5 if int(str(key).rpartition("-")[2]) < 1000 else 0.1


def _dask(make: Callable[[], Any]) -> Callable[[], shapes.Shape]:
    return partial(shapes.of, make)


GEMM_SECONDS = {"random-x": 0.002, "random-y": 0.002, "matmul": 0.005, "add": 0.004,
                "chunk": 0.001, "sum": 0.001}  # fmt: skip
GEMM_BYTES = {"random-x": 2 * MB, "random-y": 2 * MB, "matmul": 2 * MB, "add": 2 * MB,
              "chunk": SMALL, "sum": SMALL}  # fmt: skip
# 5,000 × 200 in each block.
TSQR_SECONDS = {
    "random": 0.01, "qr": 0.11, "r": 1e-5, "q": 1e-5, "stack": 0.001, "inner": 0.05,
    "part": 1e-5, "dot": 0.03, "norm": 0.001, "total": 0.001,
}  # fmt: skip
TSQR_BYTES = {
    "random": 8 * MB, "qr": 8.3 * MB, "r": 0.3 * MB, "q": 8 * MB, "stack": 6.4 * MB,
    "inner": 6.4 * MB, "part": 0.3 * MB, "dot": 8 * MB, "norm": SMALL, "total": SMALL,
}  # fmt: skip
HUGE_SECONDS = {"leaf": 0.25, "add": 0.003, "total": 0.003}
FORK_2 = {"fork": 0.002, "join": 0.001}
FORK_60 = {"fork": 0.06, "join": 0.001}

TABLE = [
    Case("1,000 × 1 ms", partial(shapes.independent, 1000), 0.001),
    Case("1,000 × 60 ms", partial(shapes.independent, 1000), 0.06),
    Case("10 × fork-join of 100 × 60 ms", partial(shapes.fork_joins, 10, 100), FORK_60),
    Case("10 × fork-join of 100 × 2 ms", partial(shapes.fork_joins, 10, 100), FORK_2),
    Case("tree reduction 1,024, 100 ms", partial(shapes.tree, 512), 0.1),
    Case(
        "16 × 100 MB, tree, blind",
        partial(shapes.tree, 16),
        0.03,
        {"leaf": 100 * MB, "add": 100 * MB, "total": SMALL},
    ),
    Case(
        "16 × 400 MB, tree, blind",
        partial(shapes.tree, 16),
        HUGE_SECONDS,
        {"leaf": 400 * MB, "add": 400 * MB, "total": SMALL},
    ),
    Case("GEMM 8×8 blocks, 2 slots", partial(shapes.gemm, 8), GEMM_SECONDS, GEMM_BYTES, LOCAL),
    Case("TSQR 20 blocks, AWS", partial(shapes.tsqr, 20), TSQR_SECONDS, TSQR_BYTES),
    Case("map of 10,000 × 1 s", partial(shapes.independent, 10_000), 1.0),
]
"""Those for which docs/design.md has figures of other rules."""

# Of what Dask makes: see benchmarks/workloads.py. Names are Dask's own.
DASK_SVD_SECONDS = {
    "random_sample": 0.008, "qr": 0.24, "getitem": 2e-5, "stack": 0.0006, "svd": 0.028,
    "getitem-finalize-hlgfinalizecompute": 0.014,
}  # fmt: skip
DASK_SVD_BYTES = {
    "random_sample": 8 * MB, "qr": 8.3 * MB, "getitem": 0.32 * MB, "stack": 6.4 * MB,
    "svd": 0.64 * MB, "getitem-finalize-hlgfinalizecompute": 1800.0,
}  # fmt: skip
# Five times as many columns and twice the rows: 2 m n² operations, at 20 a nanosecond, twice over.
DASK_SVD_LARGE_SECONDS = {**DASK_SVD_SECONDS, "random_sample": 0.08, "qr": 4.0, "svd": 1.2,
                          "stack": 0.05, "getitem-r-inner": 2e-5}  # fmt: skip
DASK_SVD_LARGE_BYTES = {
    "random_sample": 80 * MB, "qr": 88 * MB, "getitem": 8 * MB, "stack": 160 * MB, "svd": 16 * MB,
    "getitem-r-inner": 8 * MB, "getitem-finalize-hlgfinalizecompute": 8000.0,
}  # fmt: skip
DASK_TSQR_SECONDS = {
    "random_sample": 0.008, "qr": 0.16, "getitem": 1e-5, "stack": 0.0003, "sum": 0.017,
    "getitem-sum-sum-aggregate": 0.0085, "sum-partial": 6e-5, "sum-aggregate": 3e-5,
    "add-finalize-hlgfinalizecompute": 0.0002,
}  # fmt: skip
DASK_TSQR_BYTES = {
    "random_sample": 8.4 * MB, "qr": 8.5 * MB, "getitem": 8.4 * MB, "getitem>stack": 0.13 * MB,
    "getitem*": 0.13 * MB, "stack": 4.2 * MB, "sum": SMALL, "getitem-sum-sum-aggregate": SMALL,
    "sum-partial": SMALL, "sum-aggregate": SMALL, "add-finalize-hlgfinalizecompute": SMALL,
}  # fmt: skip
DASK_SVC_SECONDS = {"normal-_predict": 0.064, "finalize-hlgfinalizecompute": 0.0001}
DASK_SVC_BYTES = {"normal-_predict": 16_200.0, "finalize-hlgfinalizecompute": 0.32 * MB}
DASK_SVC_LARGE_SECONDS = {"normal-_predict": 1.3, "finalize-hlgfinalizecompute": 0.002}
DASK_SVC_LARGE_BYTES = {"normal-_predict": 0.32 * MB, "finalize-hlgfinalizecompute": 6.4 * MB}
DASK_GEMM_SECONDS = {
    "random_sample": 0.0066, "chunk_sum": 0.015, "_chunk_sum-partial": 0.0058,
    "chunk_sum-aggregate": 0.0004, "sum-partial": 6e-5,
    "sum-aggregate-finalize-hlgfinalizecompute": 0.0002,
}  # fmt: skip
DASK_GEMM_BYTES = {
    "random_sample": 2 * MB, "chunk_sum": 2 * MB, "_chunk_sum-partial": 2 * MB,
    "chunk_sum-aggregate": SMALL, "sum-partial": SMALL,
    "sum-aggregate-finalize-hlgfinalizecompute": SMALL,
}  # fmt: skip
DASK_CHOLESKY_SECONDS = {
    "random_sample": 0.012, "eye": 0.0002, "add": 0.03, "cholesky": 3e-5, "cholesky-upper": 0.05,
    "cholesky-lt": 0.075, "cholesky-cholesky-upper": 0.0007, "sum": 0.0005, "sum-partial": 0.0001,
    "sum-aggregate-finalize-hlgfinalizecompute": 0.0002,
}  # fmt: skip
DASK_CHOLESKY_BYTES = {
    "random_sample": 8 * MB, "eye": 8 * MB, "add": 8 * MB, "cholesky": 8 * MB,
    "cholesky-upper": 8 * MB, "cholesky-lt": 8 * MB, "cholesky-cholesky-upper": SMALL,
    "sum": SMALL, "sum-partial": SMALL, "sum-aggregate-finalize-hlgfinalizecompute": SMALL,
}  # fmt: skip
SHUFFLE_SECONDS = {"read": 0.004, "group": 0.0007, "split": 3e-6, "merge": 0.0006, "count": 0.0005,
                   "total": 0.001}  # fmt: skip
SHUFFLE_16 = {"read": 0.5 * MB, "group": 0.66 * MB, "split": 0.042 * MB, "merge": 0.66 * MB,
              "count": SMALL, "total": SMALL}  # fmt: skip
SHUFFLE_40 = {**SHUFFLE_16, "read": 25 * MB, "group": 25 * MB, "split": 0.63 * MB,
              "merge": 25 * MB}  # fmt: skip
SHUFFLE_40_SECONDS = {"read": 0.2, "group": 0.04, "split": 0.0001, "merge": 0.03, "count": 0.02,
                      "total": 0.001}  # fmt: skip
DASK_GROUPBY_SECONDS = {
    "getitem-random_sample-concatenate": 0.0003, "astype-getitem-randint-concatenate": 0.0003,
    "rechunk-merge-from-dask-array": 0.0012, "getitem": 0.0003, "_to_string_dtype": 0.0001,
    "_mean_chunk": 0.0058, "reset_index": 0.0002, "operation": 0.0012, "repartitiontofewer": 0.0006,
    "group-taskshuffle": 0.0006, "split-taskshuffle": 7e-6, "taskshuffle": 0.002,
    "_call_with_list_arg": 0.001,
}  # fmt: skip
DASK_GROUPBY_BYTES = {
    "getitem-random_sample-concatenate": 0.4 * MB, "astype-getitem-randint-concatenate": 0.4 * MB,
    "rechunk-merge-from-dask-array": 1.2 * MB, "getitem": 0.7 * MB, "_to_string_dtype": 0.8 * MB,
    "_mean_chunk": 0.025 * MB, "reset_index": 0.025 * MB, "operation": 0.045 * MB,
    "repartitiontofewer": 0.23 * MB, "group-taskshuffle": 0.33 * MB, "split-taskshuffle": 0.17 * MB,
    "taskshuffle": 0.33 * MB, "_call_with_list_arg": 9000.0,
}  # fmt: skip


def _svd_compressed(count: int, chunk: int, random: float, product: float) -> Case:
    """Seconds of making a chunk, and of its product with a few columns."""
    seconds = {
        "standard_normal": 0.0005, "random_sample": random, "sum": product,
        "sum-aggregate": 0.0003, "qr": 0.0004, "qr-sum-aggregate-getitem": 0.0007, "getitem": 6e-6,
        "stack-qr": 0.0003, "stack": 3e-5, "svd": 0.0001, "sum-partial": 0.0003,
        "getitem-finalize-hlgfinalizecompute": 0.0002,
    }  # fmt: skip
    column = 20 * 8.0 * chunk
    size = {
        **dict.fromkeys(seconds, column), "random_sample": 8.0 * chunk**2,
        "getitem": column, "getitem>stack": 3200.0, "getitem*": 3200.0,
        "stack-qr": 16_300.0, "stack": 13_000.0, "svd": 6800.0,
        "getitem-finalize-hlgfinalizecompute": 200.0,
    }  # fmt: skip
    make = partial(workloads.svd_compressed, count * chunk, chunk)
    return Case(f"svd_compressed, {count}×{count} chunks of {chunk:,}²", _dask(make), seconds, size)


PAPERS = [
    Case("tree reduction 1,024, no-op", partial(shapes.tree, 512), NO_OP),
    Case("tree reduction 1,024, 500 ms", partial(shapes.tree, 512), 0.5),
    Case("tree reduction 8,192, no-op", partial(shapes.tree, 4096), NO_OP),
    Case("tree reduction 8,192, 100 ms", partial(shapes.tree, 4096), 0.1),
    Case("tree reduction 8,192, 500 ms", partial(shapes.tree, 4096), 0.5),
    Case("chain of 1,000 × 1 ms", partial(shapes.chain, 1000), 0.001),
    Case("GEMM 8×8 blocks, AWS", partial(shapes.gemm, 8), GEMM_SECONDS, GEMM_BYTES),
    Case(
        "GEMM 4,000², 64 chunks (Dask)",
        _dask(WORKLOADS["gemm"].make),
        DASK_GEMM_SECONDS,
        DASK_GEMM_BYTES,
    ),
    Case(
        "SVD 100,000 × 200, 20 chunks (Dask)",
        _dask(WORKLOADS["svd1"].make),
        DASK_SVD_SECONDS,
        DASK_SVD_BYTES,
    ),
    Case(
        "SVD 200,000 × 1,000, 20 chunks (Dask)",
        _dask(partial(workloads.svd_tall, 200_000, 1000, 10_000)),
        DASK_SVD_LARGE_SECONDS,
        DASK_SVD_LARGE_BYTES,
    ),
    _svd_compressed(4, 1000, 0.012, 0.0037),
    _svd_compressed(5, 2000, 0.048, 0.013),
    Case(
        "TSQR 262,144 × 128, 32 chunks (Dask)",
        _dask(WORKLOADS["tsqr"].make),
        DASK_TSQR_SECONDS,
        DASK_TSQR_BYTES,
    ),
    Case(
        "Cholesky 4,000², 16 chunks (Dask)",
        _dask(WORKLOADS["cholesky"].make),
        DASK_CHOLESKY_SECONDS,
        DASK_CHOLESKY_BYTES,
    ),
    Case(
        "SVC 40,000, 20 chunks (Dask)",
        _dask(WORKLOADS["svc"].make),
        DASK_SVC_SECONDS,
        DASK_SVC_BYTES,
    ),
    Case(
        "SVC 800,000, 20 chunks (Dask)",
        _dask(WORKLOADS["svc"].make),
        DASK_SVC_LARGE_SECONDS,
        DASK_SVC_LARGE_BYTES,
    ),
    Case("5,000 no-ops into one", partial(shapes.fan_in, 5000), NO_OP),
    Case("1 → 1,000 → 1, 100 ms", partial(shapes.fork_joins, 1, 1000), {"fork": 0.1, "join": 0.01}),
    Case(
        "shuffle 16×16, 0.7 MB parts", partial(shapes.all_to_all, 16), SHUFFLE_SECONDS, SHUFFLE_16
    ),
    Case(
        "shuffle 40×40, 25 MB parts", partial(shapes.all_to_all, 40), SHUFFLE_40_SECONDS, SHUFFLE_40
    ),
    Case(
        "groupby, 20 parts (Dask)",
        _dask(WORKLOADS["groupby"].make),
        DASK_GROUPBY_SECONDS,
        DASK_GROUPBY_BYTES,
    ),
    Case("map of 10,000 no-ops", partial(shapes.independent, 10_000), NO_OP),
    Case(
        "1 → 10,000 → 1, 100 ms, cold",
        partial(shapes.fork_joins, 1, 10_000),
        {"fork": 0.1, "join": 0.001},
        place=COLD,
    ),
]
"""Workloads of the papers on this way of running Dask, on AWS."""

UNEVEN = [
    Case("1,000 × 60 ms, spread", partial(shapes.independent, 1000), spread(0.06)),
    Case("tree reduction 1,024, 100 ms, spread", partial(shapes.tree, 512), spread(0.1)),
    Case(
        "1,000 × 20 ms, one of 2 s",
        partial(shapes.independent, 1000),
        straggler(0.02, 100, "map-700"),
    ),
    Case("1,000 × 10 µs, then 200 × 100 ms", partial(shapes.independent, 1200), late_bloomers),
]
"""Names that say little."""


def _local(cases: Iterable[Case]) -> list[Case]:
    return [
        replace(case, name=f"{case.name.removesuffix(', AWS')}, 2 slots", place=LOCAL)
        for case in cases
    ]


def _named(*starts: str) -> list[Case]:
    found = [case for case in (*TABLE, *PAPERS) if case.name.startswith(starts)]
    assert len(found) == len(starts)
    return found


NEARBY = [
    *_local(
        _named(
            "1,000 × 1 ms",
            "10 × fork-join of 100 × 2 ms",
            "16 × 100 MB",
            "TSQR 20 blocks",
            "tree reduction 1,024, no-op",
            "tree reduction 8,192, no-op",
            "SVD 100,000",
            "svd_compressed, 4×4",
            "SVC 40,000",
            "shuffle 16×16",
            "TSQR 262,144",
            "Cholesky",
        )
    ),
    Case("tree reduction 1,024, 1 ms, 2 slots", partial(shapes.tree, 512), 0.001, place=LOCAL),
]
"""Some of them on a local cluster."""

CASES = {case.name: case for case in (*TABLE, *PAPERS, *UNEVEN, *NEARBY)}
