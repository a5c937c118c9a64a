"""`python -m proxy_service`: run the proxy on `wukong.proxy_port` of all interfaces."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

from wukong_async.config import Settings
from wukong_async.errors import WukongError
from wukong_async.loops import new_event_loop
from wukong_async.proxy import ProxyServer

HOST = "0.0.0.0"  # noqa: S104 - peers are authenticated; a deployment's network does the rest


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with ProxyServer(settings, HOST, settings.proxy_port) as server:
        print(f"proxy on port {server.port}", flush=True)  # noqa: T201
        await stop.wait()


def main() -> int:
    """Run the service; the exit code."""
    logging.basicConfig(level=logging.INFO)
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(serve(Settings.load()))
    except (WukongError, OSError) as error:
        print(f"proxy_service: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
