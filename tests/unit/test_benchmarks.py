"""The benchmarks' command line: what is asked for, what is compared, what is written."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks import running
from benchmarks.__main__ import main
from benchmarks.counting import Counts
from benchmarks.document import document, outputs, write
from benchmarks.levels import levels
from benchmarks.running import line, same, spread
from benchmarks.workloads import WORKLOADS

NAMES = (
    "tr1024 tr8192 chain1000 noop10k wide5000 fan gemm svd1 svd2 tsqr qr cholesky svc groupby merge"
    " shuffle bag"
)
TINY = {
    "tr1024": "leaves=5,sleep=0.001",
    "tr8192": "leaves=4",
    "chain1000": "length=3",
    "noop10k": "count=3",
    "wide5000": "width=3",
    "fan": "stages=2,width=3",
    "gemm": "size=4,chunk=2",
    "svd1": "rows=8,columns=2,chunk=4",
    "svd2": "size=40,chunk=20",
    "tsqr": "rows=8,columns=2,chunk=4",
    "qr": "rows=8,columns=2,chunk=4",
    "cholesky": "size=4,chunk=2",
    "groupby": "partitions=2,rows=10",
    "merge": "partitions=2,rows=10",
    "shuffle": "partitions=2,rows=10",
    "bag": "partitions=2,numbers=10",
}


# Sizes --------------------------------------------------------------------------------------------


def test_the_workloads() -> None:
    assert list(WORKLOADS) == NAMES.split()
    for workload in WORKLOADS.values():
        assert list(workload.small) == list(workload.paper)


@pytest.mark.parametrize("name", TINY)
def test_each_can_be_made_anew_in_any_size(name: str) -> None:
    sized = WORKLOADS[name].sized(TINY[name].split(","))
    assert same(sized.make().compute(scheduler="threads"), sized.expected())


def test_what_they_compute() -> None:
    def value(name: str) -> Any:
        return WORKLOADS[name].sized(TINY[name].split(",")).expected()

    assert value("tr1024") == sum(range(5))
    assert value("chain1000") == 3
    assert value("bag") == sum(range(1, 11))
    assert set(value("merge").index) == {"id", "x_x", "y_x", "x_y", "y_y"}
    assert list(value("shuffle").index) == ["x", "y"] * 2, "the sums of two partitions"


def test_sizes() -> None:
    tree = WORKLOADS["tr1024"]
    assert tree.sized([]).size == tree.small == {"leaves": 1024, "sleep": 0.0}
    assert tree.sized([]).label == "small"
    gemm = WORKLOADS["gemm"]
    assert gemm.sized(["paper"]).size == gemm.paper == {"size": 10_000, "chunk": 1000}
    sized = tree.sized(["sleep=0.5", "paper", "leaves=8", "leaves=16"])
    assert sized.size == {"leaves": 16, "sleep": 0.5}
    assert sized.label == "paper,leaves=16,sleep=0.5"
    assert str(sized) == "tr1024 (leaves=16,sleep=0.5): the sum of numbers, pair by pair"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "rows=3",
            "tr1024 has no size 'rows=3': it has small, paper, and the parameters leaves, s",
        ),
        ("large", "tr1024 has no size 'large'"),
        ("leaves", "tr1024 has no size 'leaves'"),
        ("leaves=0", "leaves of tr1024 must be a whole number, at least 1, not '0'"),
        ("leaves=1.5", "leaves of tr1024 must be a whole number, at least 1, not '1.5'"),
        ("sleep=-1", "sleep of tr1024 must be seconds, not negative, not '-1'"),
        ("sleep=nan", "sleep of tr1024 must be seconds, not negative, not 'nan'"),
    ],
)
def test_sizes_that_there_are_not(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "tr1024", "--size", word]) == 2
    assert f"python -m benchmarks run: {said}" in capsys.readouterr().err


# Command lines ------------------------------------------------------------------------------------


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[::3]] == NAMES.split()
    assert "small: rows=100000,columns=200,chunk=5000" in said
    assert "paper: rows=200000,columns=1000,chunk=10000" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run nothing", "'nothing' is not one of tr1024, "),
        ("run", "required: WORKLOAD"),
        ("run tr1024 --backend wukong,spark", "'spark' is not one of wukong, "),
        ("run tr1024 --repeat 0", "'0' is not a whole number, at least 1"),
        ("run tr1024 --json /nowhere/at/all.json", "is not a file in a directory that exists"),
        ("chaos nothing", "'nothing' is not one of tr1024, "),
    ],
)
def test_mistakes(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(words.split())
    assert exited.value.code == 2
    assert said in capsys.readouterr().err


def test_a_time_for_chaos_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chaos", "--seconds", "0"]) == 2
    assert "--seconds must be positive, not 0.0" in capsys.readouterr().err


def test_backends_that_are_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "is_installed", lambda name: name == "dask-sync")
    assert main(["run", "chain1000", "--backend", "lithops,ray"]) == 2
    said = capsys.readouterr().err
    for name in ("lithops", "ray"):
        assert f"{name} is skipped, since it is not installed: pip install 'wukong-async[c" in said
    assert "No backend is left" in said
    words = "run chain1000 --size length=3 --backend ray,dask-sync --repeat 1"
    assert main(words.split()) == 0
    assert "dask-sync" in capsys.readouterr().out


# Rows ---------------------------------------------------------------------------------------------


def test_equal_results() -> None:
    frame = pd.DataFrame({"a": [1.0, 2.0]}, index=[3, 4])
    for value in (1, 1.5, "a", (1, 2.0), np.array([1.0, np.nan]), np.float64(2), frame, frame.a):
        assert same(copy.deepcopy(value), value)
    assert same(1.5 + 1e-12, 1.5)
    assert same((np.array([1.5 + 1e-12]), 1), (np.array([1.5]), 1))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (1, 2),
        (1.5, 1.6),
        ((1,), (1, 2)),
        ((1, 2), [1, 2]),
        (np.ones(2), np.ones(3)),
        (np.ones((1, 2)), np.ones(2)),
        (1.0, np.ones(2)),
        (None, np.ones(2)),
        (pd.Series([1.0]), pd.Series([2.0])),
        (pd.Series([1.0], index=[1]), pd.Series([1.0], index=[2])),
        (np.ones(1), pd.Series([1.0])),
        (pd.DataFrame({"a": [1]}), pd.DataFrame({"b": [1]})),
    ],
)
def test_different_results(found: Any, expected: Any) -> None:
    assert not same(found, expected)


def test_a_row_for_people() -> None:
    row = {
        "backend": "wukong",
        "entry": "get",
        "wall_s": spread([0.25, 0.5, 1.0]),
        "ratio": spread([1.0, 2.0, 4.0]),
        "correct": False,
        "optimise_s": 0.1,
        "tasks": 1023,
        "invocations": 1,
        "commits": 1,
        "store_commands": 16,
        "store_bytes_in": 2 << 20,
        "store_bytes_out": 100,
        "store_peak_bytes": 2 << 30,
        "billed_ms": 120,
        "usd": 0.0000061,
    }
    said = line(row).split()
    assert said[:8] == ["wukong", "get", "0.2500", "0.5000", "1.0000", "2.0×", "(1.0-4.0)", "NO"]
    assert said[8:13] == ["20%", "1023", "1", "1", "16"]
    assert " ".join(said[13:]) == "2.00 MiB 100 B 2.00 GiB 120 6.1"
    assert len(line(row)) <= 160
    nothing = dict.fromkeys(row) | {"backend": "x", "entry": "get", "correct": True}
    assert set(line(nothing).split()) == {"x", "get", "yes", "-"}


def test_dollars() -> None:
    counts = Counts(1, 1_000_000, 1, 1, 1, 1, 1, 1, billed_ms=1000 * 1024)
    assert counts.usd == pytest.approx(0.20 + 3008 * 0.0000166667)


def test_levels() -> None:
    assert levels({"c": ("a", "b"), "a": (), "b": ("a",), "d": ()}) == [["a", "d"], ["b"], ["c"]]


# Documents ----------------------------------------------------------------------------------------


def test_a_document(tmp_path: Path) -> None:
    made = document("plan", {"a": 1}, [{"b": 2}], timelines=[])
    parts = ["command", "machine", "versions", "settings", "results", "timelines"]
    assert list(made) == parts
    assert made["results"] == [{"b": 2}]
    assert made["versions"]["dask"]
    parser = argparse.ArgumentParser()
    outputs(parser)
    files = [tmp_path / "x.json", tmp_path / "x.html"]
    write(parser.parse_args([]), made)
    assert not any(file.exists() for file in files)
    write(parser.parse_args(["--json", str(files[0]), "--html", str(files[1])]), made)
    assert json.loads(files[0].read_text()) == made
    assert "plan" in files[1].read_text()


# Comparisons --------------------------------------------------------------------------------------


def run_row(low: float, high: float, **more: Any) -> dict[str, Any]:
    return {
        "workload": "tr1024",
        "size": "small",
        "backend": "wukong",
        "entry": "get",
        "wall_s": {"min": low, "median": (low + high) / 2, "max": high},
        "ratio": {"min": 1.0, "median": 1.0, "max": 1.0},
        "correct": True,
        "commits": 10,
        "usd": None,
        **more,
    }


def plan_row(**more: Any) -> dict[str, Any]:
    return {"shape": "tree", "tasks": 10, "edges": 9, "graph_s": 0.1, **more}


def scale_row(**more: Any) -> dict[str, Any]:
    key = {"curve": "map", "engine": "wukong", "executors": 2, "tasks": 10, "task_s": 0.1}
    return {**key, "wall_s": 1.0, "efficiency": 0.8, **more}


class Files:
    """Two documents, compared."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.old, self.new = directory / "old.json", directory / "new.json"
        self._capsys = capsys

    def compare(self, command: str, old: Any, new: Any, new_command: str | None = None) -> int:
        self.old.write_text(json.dumps(document(command, {}, [old])))
        self.new.write_text(json.dumps(document(new_command or command, {}, [new])))
        return self.run()

    def run(self) -> int:
        code = main(["compare", str(self.old), str(self.new)])
        captured = self._capsys.readouterr()
        self.said = captured.out + captured.err
        return code


@pytest.fixture
def files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Files:
    return Files(tmp_path, capsys)


@pytest.mark.parametrize(
    ("old", "new", "code", "said"),
    [
        (run_row(1, 2), run_row(1.5, 3), 0, "within the spread"),
        (run_row(1, 2), run_row(2.1, 3), 1, "1.70×  SLOWER"),
        (run_row(2.1, 3), run_row(1, 2), 0, "faster"),
        (run_row(1, 2), run_row(3, 3), 0, "2.00×  of a single run"),
        (run_row(1, 2), run_row(1, 2, commits=20), 0, "2.00×  more"),
        (run_row(1, 2), run_row(1, 2, correct=False), 1, "WRONG now"),
        (run_row(1, 2), run_row(1, 2, usd=0.1), 0, "within the spread"),
    ],
)
def test_runs_are_compared(files: Files, old: Any, new: Any, code: int, said: str) -> None:
    assert files.compare("run", old, new) == code
    assert said in files.said
    assert "tr1024 small wukong get" in files.said


def test_small_changes_of_counts_are_not_told(files: Files) -> None:
    assert files.compare("run", run_row(1, 2, commits=20), run_row(1, 2, commits=21)) == 0
    assert "commits" not in files.said


@pytest.mark.parametrize(
    ("command", "old", "new", "code"),
    [
        ("plan", plan_row(), plan_row(graph_s=0.109), 0),
        ("plan", plan_row(), plan_row(graph_s=0.2), 1),
        ("plan", plan_row(), plan_row(graph_s=0.05), 0),
        ("scale", scale_row(), scale_row(efficiency=0.95), 0),
        ("scale", scale_row(), scale_row(efficiency=0.5), 1),
        ("scale", scale_row(), scale_row(wall_s=2.0), 1),
    ],
)
def test_figures_without_a_range_are_compared(
    files: Files, command: str, old: Any, new: Any, code: int
) -> None:
    assert files.compare(command, old, new) == code
    assert ("WORSE" in files.said) == (code == 1)


def test_rows_of_one_document_only(files: Files) -> None:
    files.compare("plan", plan_row(), plan_row())
    document = json.loads(files.new.read_text())
    document["results"].append(plan_row(shape="chain"))
    files.new.write_text(json.dumps(document))
    assert files.run() == 0
    assert f"chain 10: only in {files.new}" in files.said


def test_documents_that_cannot_be_compared(files: Files) -> None:
    assert files.compare("run", run_row(1, 2), plan_row(), new_command="plan") == 2
    assert f"{files.old} is of `run` and {files.new} of `plan`" in files.said
    assert files.compare("plan", plan_row(), plan_row(tasks=11)) == 2
    assert "have no row in common" in files.said
    assert files.compare("model", {}, {}) == 2
    assert (
        f"{files.old} is of the command 'model'; those that can be compared are run" in files.said
    )
    assert files.compare("run", run_row(1, 2), {"workload": "tr1024"}) == 2
    assert f"{files.new} has a row without 'size'" in files.said
    for text, said in (("x", "is not JSON"), ("[]", "is not a document of `python -m benchmarks")):
        files.old.write_text(text)
        assert files.run() == 2
        assert f"{files.old} {said}" in files.said
    files.old.unlink()
    assert files.run() == 2
    assert f"{files.old} cannot be read: No such file" in files.said
