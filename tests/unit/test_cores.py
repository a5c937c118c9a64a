"""How many tasks run at once, and what is left for linear algebra."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from wukong_async import LocalCluster
from wukong_async.config import Settings
from wukong_async.cores import BLAS_THREADS, blas_environment, threads_for, usable_cores
from wukong_async.errors import ConfigError
from wukong_async.executor import Service


@pytest.mark.parametrize(
    ("memory", "cores", "threads"),
    [
        (0, 8, 1),
        (128, 2, 1),
        (1769, 2, 1),
        (3008, 2, 1),
        (3538, 2, 2),
        (10240, 6, 5),
        (10240, 2, 2),
    ],
)
def test_a_task_for_each_core_that_the_memory_brings(memory: int, cores: int, threads: int) -> None:
    assert threads_for(memory, cores) == threads


@pytest.mark.parametrize(("threads", "cores", "each"), [(1, 6, 6), (2, 6, 3), (5, 6, 1), (8, 2, 1)])
def test_the_cores_are_shared_among_the_tasks(threads: int, cores: int, each: int) -> None:
    assert blas_environment(threads, cores, {}) == dict.fromkeys(BLAS_THREADS, str(each))


def test_what_the_user_has_set_stays() -> None:
    found = blas_environment(1, 6, {"MKL_NUM_THREADS": "4", "BLIS_NUM_THREADS": ""})
    assert "MKL_NUM_THREADS" not in found
    assert found["BLIS_NUM_THREADS"] == "6"
    found = blas_environment(1, 6, {"OMP_NUM_THREADS": "2"})
    assert "OMP_NUM_THREADS" not in found
    assert set(found.values()) == {"2"}, "most libraries would take it for themselves"


def test_the_function_is_set_up_by_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "10240")
    for settings, threads in (
        (Settings(), min(5, usable_cores())),
        (Settings(threads_per_executor=7), 7),
    ):
        service = Service(settings)
        assert service.threads == threads
        service.close()


def test_the_handler_tells_blas_before_numpy_is_there() -> None:
    program = (
        "import lambda_handler, os, sys; assert 'numpy' not in sys.modules;"
        "print(os.environ['OPENBLAS_NUM_THREADS'], os.environ['MKL_NUM_THREADS'],"
        "lambda_handler._service.threads)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in BLAS_THREADS}
    environment["MKL_NUM_THREADS"] = "3"
    environment["DASK_WUKONG__THREADS_PER_EXECUTOR"] = str(4 * usable_cores())
    said = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.split() == ["1", "3", str(4 * usable_cores())]


@pytest.mark.parametrize("threads", [0, 1.5, "2"])
def test_a_cluster_with_a_wrong_number_of_threads(threads: object) -> None:
    with pytest.raises(ConfigError, match="threads_per_executor"):
        LocalCluster(threads_per_executor=threads)  # type: ignore[arg-type]
