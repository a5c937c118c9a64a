"""`python -m proxy_service`: run the proxy on `wukong.proxy_port` of all interfaces.

`--health` asks the one that runs, at `wukong.proxy_address` or on this machine: it prints the
counters as JSON, and exits with 1 if there is no answer. That is what a container's health check
calls.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
from collections.abc import Sequence

from wukong_async.config import Settings
from wukong_async.errors import WukongError
from wukong_async.fanout import ProxyClient
from wukong_async.loops import new_event_loop
from wukong_async.proxy import ProxyServer

HOST = "0.0.0.0"  # noqa: S104 - peers are authenticated; a deployment's network does the rest
HERE = "127.0.0.1"


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with ProxyServer(settings, HOST, settings.proxy_port) as server:
        print(f"proxy on port {server.port}", flush=True)  # noqa: T201
        await stop.wait()


async def show_health(settings: Settings) -> None:
    """Print what the running proxy has counted."""
    where = settings.proxy_address or HERE
    settings = settings.replace(use_local_proxy=False, proxy_address=where)
    print(json.dumps(await ProxyClient(settings).health()))  # noqa: T201


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the service, or ask after it; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m proxy_service",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--health", action="store_true", help="ask the proxy that runs")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    try:
        work = (show_health if options.health else serve)(Settings.load())
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(work)
    except (WukongError, OSError) as error:
        print(f"proxy_service: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
