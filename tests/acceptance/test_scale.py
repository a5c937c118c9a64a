"""`python -m benchmarks scale`, in milliseconds and with a few executors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.scale import Row, targets

TINY = ["--executors", "1,3", "--task", "0.005", "--dilation", "1"]
FIELDS = {
    *("curve", "engine", "executors", "tasks", "task_s", "wall_s", "ideal_s", "efficiency"),
    *("invocations", "billed_ms", "measured", "dilation", "cpu", "busy", "store"),
}


def scaled(path: Path, *arguments: str) -> list[dict[str, Any]]:
    assert main(["scale", *TINY, *arguments, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["command"] == "scale"
    rows: list[dict[str, Any]] = document["results"]
    return rows


def test_each_curve_has_each_engine_at_each_point(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--strong-tasks", "6", "--weak-tasks", "2", "--map-tasks", "9", "--tree-tasks", "4"]
    few = ["--cold", "0.02", "--latency", "0.005", "--accept", "0"]
    engines = ("wukong-first", "wukong", "one-per-task")
    which = ["--curve", "strong,weak,map,tree", "--engine", ",".join(engines)]
    rows = scaled(tmp_path / "rows.json", *which, *sizes, *few)
    assert all(row.keys() == FIELDS for row in rows)
    assert {(r["curve"], r["executors"], r["engine"]) for r in rows} == {
        (curve, executors, engine)
        for curve, executors in [
            *(("strong", 1), ("strong", 3), ("weak", 1), ("weak", 3)),
            *(("map", 3), ("tree", 1), ("tree", 3)),
        ]
        for engine in ("ideal", *engines)
    }
    assert {(r["curve"], r["executors"]): r["tasks"] for r in rows} == {
        ("strong", 1): 6,
        ("strong", 3): 6,
        ("weak", 1): 2,
        ("weak", 3): 6,
        ("map", 3): 9,
        ("tree", 1): 7,
        ("tree", 3): 7,
    }
    # `weak` and `strong` have a point in common, which is measured once.
    ours = [r for r in rows if (r["engine"], r["executors"], r["tasks"]) == ("wukong", 3, 6)]
    assert len({r["wall_s"] for r in ours}) == 1
    assert all(r["wall_s"] > 0 and r["invocations"] >= 1 for r in rows)
    said = capsys.readouterr().out
    assert "latency" in said
    assert "strong, wukong " in said


def test_a_single_executor_that_would_run_for_long_is_computed(tmp_path: Path) -> None:
    arguments = ["--curve", "strong", "--strong-tasks", "1000", "--executors", "1"]
    rows = scaled(tmp_path / "rows.json", *arguments, "--task", "10")
    assert [r["wall_s"] for r in rows] == [10_000.3] * 3
    assert not any(r["measured"] for r in rows)


@pytest.mark.parametrize(
    ("wall", "met"), [(1.1, [True, True]), (1.2, [True, False]), (2, [False] * 2)]
)
def test_targets(wall: float, met: list[bool]) -> None:
    rows = [
        Row(
            curve=curve,
            engine="wukong",
            executors=1000,
            tasks=10_000,
            task_s=1.0,
            wall_s=wall,
            ideal_s=1.0,
            efficiency=1 / wall,
            invocations=1,
            billed_ms=1,
        )
        for curve in ("strong", "map")
    ]
    assert [target.met for target in targets(rows)] == met
    assert not targets([replace(row, executors=10_000) for row in rows]), "there is none"


@pytest.mark.parametrize(
    "arguments",
    [["--curve", "steep"], ["--executors", "0"], ["--executors", "a"], ["--task", "-1"]],
)
def test_what_cannot_be_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["scale", *arguments])
    assert f"argument {arguments[0]}" in capsys.readouterr().err
