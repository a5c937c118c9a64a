"""The document that each command leaves, if it is asked to: its rows, and where they are from."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("wukong-async", "dask", "distributed", "numpy", "pandas", "lithops", "ray")


def outputs(parser: argparse.ArgumentParser) -> None:
    """Add the options `--json` and `--html`."""
    parser.add_argument("--json", type=_file, metavar="FILE", help="write the rows there")
    parser.add_argument("--html", type=_file, metavar="FILE", help="write a page of them there")


def document(
    command: str, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], **more: Any
) -> dict[str, Any]:
    """What a command has found, and on what; ready for JSON."""
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
        "settings": dict(settings),
        "results": list(rows),
        **more,
    }


def write(options: argparse.Namespace, document: Mapping[str, Any]) -> None:
    """Put it into the files that were asked for."""
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    if options.html is not None:
        from benchmarks.page import page

        options.html.write_text(page(document))


def _file(text: str) -> Path:
    """A file that can be written, as far as is known before: it may take hours until it is."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file in a directory that exists")
    return path


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
