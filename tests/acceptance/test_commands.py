"""The command lines, as a user types them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import eventually
from tests.paths import ROOT
from wukong_async import __version__
from wukong_async.cli import main


def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **more},
    )


WUKONG = ("-c", "import sys; from wukong_async.cli import main; sys.exit(main())")


def test_version() -> None:
    assert run(*WUKONG, "--version").stdout == f"wukong-async {__version__}\n"


def test_the_demo() -> None:
    done = run(*WUKONG, "demo", "--workers", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" right ") == 8
    assert "8 of 8 right" in done.stdout
    assert "Warning" not in done.stderr


def test_a_mistake_in_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["demo"], ["local", "up"]):
        assert main([*command, "--workers", "0"]) == 1
        said = capsys.readouterr()
        assert said.err == "wukong: n_workers must be an int of at least 1, not 0.\n"
        assert said.out == ""


def test_a_cluster_to_share(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, *WUKONG, "local", "up", "--workers", "1"],
        stdout=subprocess.PIPE,
        text=True,
    ) as cluster:
        assert cluster.stdout is not None
        said = ""
        while "Ctrl-C" not in said:
            line = cluster.stdout.readline()
            assert line, said
            said += line
        exports = dict(re.findall(r'export (DASK_WUKONG__\w+)="(.*)"', said))
        assert "DASK_WUKONG__REDIS_ENDPOINTS" in exports
        program = tmp_path / "program.py"
        program.write_text(
            "from dask import delayed\n"
            "from wukong_async import WukongClient\n"
            "def double(x):\n"
            "    return 2 * x\n"
            "with WukongClient() as client:\n"
            "    print(delayed(double)(21).compute(), client)\n"
        )
        for _ in range(2):  # Two clients, one after the other.
            done = run(str(program), **exports)
            assert done.stdout.startswith("42 "), done.stderr
        arguments = re.search(r"WukongClient\((function_name=.*)\)", said)
        assert arguments is not None
        program.write_text(
            "from dask import delayed\n"
            "from wukong_async import WukongClient\n"
            f"with WukongClient({arguments[1]}) as client:\n"
            "    print(delayed(abs)(-42).compute())\n"
        )
        assert run(str(program)).stdout == "42\n"
        cluster.send_signal(signal.SIGINT)
        assert cluster.wait(20) == 0
        assert "stopped" in cluster.stdout.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["it starts", "it is up"])
def test_a_cluster_to_share_ends_cleanly(number: signal.Signals, moment: str) -> None:
    with subprocess.Popen(
        [sys.executable, *WUKONG, "local", "up", "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        if moment == "it is up":
            assert "is up" in process.stdout.readline()
        us = psutil.Process(process.pid)
        eventually(lambda: bool(us.children()))
        started = us.children(recursive=True)
        process.send_signal(number)
        said, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
        assert said.endswith("stopped\n")
        assert errors == ""
        if moment == "it starts" and " is up" not in said:  # It may be up before the signal comes.
            assert said == "stopped\n"
        eventually(lambda: not any(map(psutil.Process.is_running, started)))


def test_the_benchmark_counts_what_the_design_promises(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    done = run(
        *("-m", "benchmarks", "run", "tr1024"),
        *("--backend", "wukong,distributed", "--repeat", "2", "--json", str(file)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(file.read_text())
    assert document["command"] == "run"
    rows = {(row["backend"], row["entry"]): row for row in document["results"]}
    assert set(rows) == {
        (backend, entry) for backend in ("wukong", "distributed") for entry in ("get", "compute")
    }
    for row in rows.values():
        assert row["workload"] == "tr1024"
        assert row["correct"] is True
        assert set(row["wall_s"]) == {"min", "median", "max"}
    for entry in ("get", "compute"):
        row = rows["wukong", entry]
        assert row["tasks"] == 1023
        assert row["invocations"] <= 4
        assert row["commits"] <= 4
        assert row["store_commands"] <= 40
        assert 50_000 < row["store_bytes_in"] < 400_000
        # The plan goes along with the event, and is not read.
        assert 1_000 < row["store_bytes_out"] < 50_000


def test_the_benchmark_of_fan_outs(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    arguments = ("--events", "1", "20", "--repeat", "1", "--json", str(file))
    done = run("-m", "benchmarks", "fanout", *arguments)
    assert done.returncode == 0
    assert done.stderr == "", "all events were sent, and through the proxy where they should"
    assert "0 ms, cold: the proxy saves " in done.stdout
    rows = json.loads(file.read_text())["results"]
    assert [(row["latency"], row["events"]) for row in rows] == [
        (latency, events) for latency in (0.0, 0.05) for events in (1, 20)
    ]
    assert all(row["proxy_warm"]["cpu"] > 0 for row in rows)


def test_benchmark_mistakes() -> None:
    done = run("-m", "benchmarks", "run", "tr1024", "--backend", "spark")
    assert done.returncode == 2
    assert "'spark' is not one of wukong, " in done.stderr
    assert "distributed" in done.stderr
    assert "tr1024" in run("-m", "benchmarks", "list").stdout


def test_the_readme_s_programs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        program = tmp_path / "program.py"
        program.write_text(block)
        done = run("-W", "error", str(program))
        assert done.returncode == 0, done.stderr
        promised = re.findall(r"print\(.*# (\d+)", block)
        assert done.stdout.split()[: len(promised)] == promised
