"""The `wukong` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from wukong_async._version import __version__
from wukong_async.errors import WukongError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(
        prog="wukong", description="A serverless engine for Dask graphs."
    )
    parser.add_argument("--version", action="version", version=f"wukong-async {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="compute the original Wukong's eight examples")
    demo.add_argument(
        "--full", action="store_true", help="the original's sizes: minutes, and 8 GB of memory"
    )
    _workers(demo)

    local = commands.add_parser("local", help="a cluster on this machine")
    actions = local.add_subparsers(dest="action", required=True, metavar="ACTION")
    up = actions.add_parser("up", help="run one in the foreground, for several clients to share")
    _workers(up)

    options = parser.parse_args(arguments)
    try:
        if options.command == "demo":
            from wukong_async.cli.demo import demo as run_demo

            return run_demo(full=options.full, workers=options.workers)
        from wukong_async.cli.local import up as run_up

        return run_up(options.workers)
    except WukongError as error:
        print(f"wukong: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="sandboxes (default: one per core)",
    )
