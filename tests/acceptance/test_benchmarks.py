"""The benchmarks, as far as they need a cluster, in the smallest size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dask import delayed

from benchmarks import counting
from benchmarks.__main__ import main
from benchmarks.apart import Apart
from benchmarks.workloads import WORKLOADS, Sized, Workload

SMALLEST = ("chain1000", "--size", "length=2")
COUNTS = (
    "tasks",
    "invocations",
    "commits",
    "store_commands",
    "store_calls",
    "store_bytes_in",
    "store_bytes_out",
    "store_peak_bytes",
    "billed_ms",
    "usd",
)


@pytest.fixture(autouse=True)
def counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "TIMES", 1)
    monkeypatch.setattr(counting, "WARM_UPS", 1)


def written(tmp_path: Path, *words: str) -> dict[str, Any]:
    file = tmp_path / "results.json"
    assert main([*words, "--json", str(file)]) == 0
    document: dict[str, Any] = json.loads(file.read_text())
    assert document["command"] == words[0]
    return document


def test_a_run(tmp_path: Path) -> None:
    backends = ("--backend", "wukong,dask-sync", "--repeat", "2")
    document = written(tmp_path, "run", *SMALLEST, *backends)
    rows = document["results"]
    assert [(row["backend"], row["entry"]) for row in rows] == [
        ("wukong", "get"),
        ("wukong", "compute"),
        ("dask-sync", "get"),
    ]
    for row in rows:
        assert set(row) == {
            *("workload", "size", "backend", "entry", "wall_s", "ratio", "correct", "optimise_s"),
            *COUNTS,
        }
        assert (row["workload"], row["size"]) == ("chain1000", "small,length=2")
        assert row["correct"] is True
        for name in ("wall_s", "ratio"):
            assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"]
        counts = [row[name] for name in COUNTS]
        assert all(counts) if row["backend"] == "wukong" else not any(counts)
        assert (row["optimise_s"] is not None) == (row["entry"] == "get")
    assert rows[0]["tasks"] == 2
    assert rows[1]["ratio"] == {"min": 1, "median": 1, "max": 1}, "the first backend's"
    (timeline,) = document["timelines"]
    assert (timeline["workload"], timeline["backend"]) == ("chain1000", "wukong")
    assert [lane["lane"] for lane in timeline["lanes"]] == ["sandbox 0", "sandbox 1"]
    ((begin, end, label),) = [span for lane in timeline["lanes"] for span in lane["spans"]]
    assert 0 <= begin < end
    assert label == "executor 1"


def test_counts_only(tmp_path: Path) -> None:
    words = ("run", *SMALLEST, "--counts", "--backend", "paper-mode,dask-sync")
    rows = written(tmp_path, *words)["results"]
    assert [row["backend"] for row in rows] == ["paper-mode", "per-edge"]
    assert all(row["wall_s"] is None for row in rows)
    assert [row["tasks"] for row in rows] == [2, 2]
    assert rows[-1]["store_commands"] == 2, "one edge, written and read"


def test_chaos(tmp_path: Path) -> None:
    (row,) = written(tmp_path, "chaos", *SMALLEST, "--seconds", "0.1", "--seed", "103")["results"]
    assert row["correct"] is True
    assert row["runs"] >= 1
    assert row["calm_invocations"] == row["calm_begins"] == 1
    assert min(row["invocations"], row["begins"]) >= 1
    assert min(row["faults"][kind] for kind in ("throttle", "duplicate")) >= 1, "by that seed"


def broken(message: str) -> Any:
    return delayed(refuse)(message)


def refuse(message: str) -> None:
    raise LookupError(message)


def test_a_backend_apart_raises_what_it_raises_there() -> None:
    size: Any = {"message": "not there"}
    each = Sized(Workload("broken", "", broken, size, size), "small", size)
    with Apart("dask-sync") as backend:
        with pytest.raises(LookupError, match="not there"):
            backend.value("get", each)
        assert backend.entries == ["get"]
        assert not backend.counts
        assert backend.value("get", WORKLOADS["chain1000"].sized(["length=3"])) == 3
        assert backend.seconds("get", WORKLOADS["chain1000"].sized(["length=3"])) > 0


def test_a_backend_apart_may_die() -> None:
    with Apart("dask-sync") as backend:
        backend._process.kill()
        with pytest.raises(RuntimeError, match="dask-sync has died"):
            backend.value("get", WORKLOADS["chain1000"].sized(["length=3"]))
