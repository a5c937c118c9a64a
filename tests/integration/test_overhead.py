"""The benchmark of overheads accounts for the time of a job, with a sandbox that tells."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.overhead import MEASURED, PHASES, Measurement, measure, measurement
from benchmarks.workloads import Workload, tree_reduction

SIZE = {"leaves": 16, "sleep": 0}
TREE = Workload("tree", "a small tree reduction", tree_reduction, SIZE, SIZE)


@pytest.fixture
def measuring() -> Iterator[Measurement]:
    with measurement() as made:
        yield made


def test_the_phases_of_a_job_are_parts_of_its_time(measuring: Measurement) -> None:
    seconds = measuring.run(lambda: tree_reduction(64, 0))
    assert seconds.keys() == {*PHASES, "sum", "wall"}
    assert all(seconds[phase] >= 0 for phase in PHASES)
    came = ("graph", "plan", "pickle", "upload", "invoke", "fetch", "unpickle", "schedule")
    assert all(seconds[phase] > 0 for phase in (*came, "task", "rest", "commit", "result"))
    assert seconds["sum"] == pytest.approx(sum(seconds[phase] for phase in PHASES))
    assert seconds["sum"] <= seconds["wall"]


def test_there_is_a_row_for_each_phase(measuring: Measurement) -> None:
    rows = measure(measuring, TREE, 1)
    (empty,) = {row["tasks"] for row in measure(measuring, MEASURED["empty"], 1)}
    assert empty == 1
    assert [row["phase"] for row in rows] == [*PHASES, "sum", "wall"]
    for row in rows:
        assert row.keys() == {"workload", "tasks", "phase", "us_per_task", "ms_per_job"}
        assert (row["workload"], row["tasks"]) == ("tree", 15)
        assert row["us_per_task"] * 15 == pytest.approx(row["ms_per_job"] * 1000)
