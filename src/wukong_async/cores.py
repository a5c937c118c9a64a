"""How many tasks an executor runs at once, and how many threads each has for linear algebra."""

from __future__ import annotations

import os
from collections.abc import Mapping

CORE_MB = 1769
"""Memory of a function, in MB, with which AWS Lambda gives it one vCPU."""
BLAS_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
"""Variables that these libraries read when they are loaded. Most of them know the first one too."""


def usable_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def threads_for(memory: int, cores: int) -> int:
    """Tasks to run at once in a function with so many MB of memory (0: unknown) and cores."""
    return max(1, min(memory // CORE_MB, cores))


def blas_environment(threads: int, cores: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables to set, so that `threads` tasks at once do not fight for the cores.

    What `environment` has already stays, and where it has the first one that is taken for all.
    """
    each = environment.get(BLAS_THREADS[0]) or str(max(1, cores // threads))
    return {name: each for name in BLAS_THREADS if not environment.get(name)}
