"""The JSON document of a command."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("wukong-async", "dask", "distributed", "numpy")


def outputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where to write."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with charts there")


def document(
    command: str, settings: dict[str, Any], rows: Sequence[dict[str, Any]], **more: Any
) -> dict[str, Any]:
    """The rows, and where they come from."""
    return {
        "command": command,
        "machine": {
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "settings": settings,
        "results": list(rows),
        **more,
    }


def write(options: argparse.Namespace, made: dict[str, Any]) -> None:
    """Put the document into the files that were asked for."""
    if options.json is not None:
        options.json.write_text(json.dumps(made, indent=2) + "\n")
    if options.html is not None:
        from benchmarks.page import page

        options.html.write_text(page(made))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
