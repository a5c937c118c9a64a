"""The benchmark of planning measures what it says, on a real store."""

from __future__ import annotations

import pytest

from benchmarks import planning
from wukong_async import LocalCluster

FIELDS = {"shape", "tasks", "edges", "graph_bytes", "graph_s", "ingest_s", "number_s", "pickle_s",
          "upload_s", "us_per_task", "store_bytes", "bytes_per_task", "peak_bytes",
          "peak_over_graph"}  # fmt: skip


def test_a_row_has_all_figures_and_nothing_is_left_in_the_store(cluster: LocalCluster) -> None:
    row = planning._in_process("tree", planning.LEAST, cluster.settings)
    assert row.keys() == FIELDS
    assert all(value > 0 for name, value in row.items() if name != "shape")
    assert (row["tasks"], row["edges"]) == (9999, 9998)
    parts = sum(row[name] for name in ("ingest_s", "number_s", "pickle_s", "upload_s"))
    assert row["us_per_task"] == pytest.approx(1e6 * parts / row["tasks"])
    assert row["bytes_per_task"] == pytest.approx(row["store_bytes"] / row["tasks"])
    assert row["peak_over_graph"] == pytest.approx(row["peak_bytes"] / row["graph_bytes"])
