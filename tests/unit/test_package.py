"""What the package promises as a package."""

from __future__ import annotations

import re
import tomllib

import pytest

import wukong_async
from tests.paths import ROOT
from wukong_async import errors


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
