"""From which fan-out on does the proxy pay? What sending events costs an executor, either way.

The executor's own code sends the events, in a process of its own: `cold` is its first fan-out,
which loads and makes a client of AWS where it invokes by itself; `warm` is a later one. The Lambda
API is a stub in another process, which accepts an event after some time.

Not the public API: a part is measured here, and not a job.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.arguments import positive
from benchmarks.document import document, outputs, write
from wukong_async.config import Settings

FANOUTS = (1, 2, 5, 10, 20, 50, 100, 500, 1000)
LATENCIES = (0.0, 0.05)
WAYS = ("own", "proxy")
CLEARLY = 0.95
"""What costs so much of something else is cheaper; differences below are noise."""
HOST = "127.0.0.1"
FUNCTION = "wukong-executor"
HEAD = "{:>7} {:>7}" + "  {:^19}" * 4
ROW = "{:>7} {:>7}" + "  {:>9} {:>9}" * 4


@dataclass(frozen=True)
class Cost:
    """Of one fan-out to whoever asks for it."""

    wall: float
    """Seconds until it is free again."""
    cpu: float
    """Seconds of its process."""


@dataclass(frozen=True)
class Row:
    """One fan-out: medians."""

    latency: float
    events: int
    own_cold: Cost
    own_warm: Cost
    proxy_cold: Cost
    proxy_warm: Cost


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `fanout`."""
    parser = commands.add_parser("fanout", help="measure wide fan-outs of invocations")
    parser.add_argument("--repeat", type=positive, default=3, help="processes of each")
    parser.add_argument("--events", type=positive, nargs="+", default=FANOUTS, help="how many")
    outputs(parser)
    parser.set_defaults(call=run)


def run(options: argparse.Namespace) -> int:
    """The `fanout` command."""
    rows = measure(options.events, options.repeat)
    write(options, document("fanout", {"repeat": options.repeat}, rows))
    return 0


def measure(fanouts: Sequence[int], repeat: int) -> list[dict[str, Any]]:
    """Measure and print; the rows."""
    rows: list[Row] = []
    print(HEAD.format("", "", *(f"{way}, {state}" for way in WAYS for state in ("cold", "warm"))))
    print(ROW.format("latency", "events", *("wall ms", "CPU ms") * 4))
    for latency in LATENCIES:
        with _service("benchmarks.fanout", "lambda", str(latency)) as api:
            settings = Settings(
                endpoint_url=f"http://{HOST}:{api}",
                region="us-east-1",
                proxy_address=HOST,
                proxy_port=_free_port(),
                proxy_secret="secret",  # noqa: S106
            )
            with _service("proxy_service", settings=settings):
                for events in fanouts:
                    rows.append(_measure(settings, latency, events, repeat))
                    _show(rows[-1])
    for latency in LATENCIES:
        for state in ("cold", "warm"):
            found = _break_even([row for row in rows if row.latency == latency], state)
            print(f"{latency * 1000:.0f} ms, {state}: the proxy saves {found}")
    return [asdict(row) for row in rows]


def _measure(settings: Settings, latency: float, events: int, repeat: int) -> Row:
    costs: dict[str, list[Cost]] = {}
    for _ in range(repeat):
        for way in WAYS:  # In turn, so that a machine that changes its speed does so for both.
            used = settings.replace(max_task_fanout=0)
            if way == "own":
                used = used.replace(proxy_address=None)
            command = [sys.executable, "-m", "benchmarks.fanout", "executor", str(events)]
            environment = {**os.environ, **used.environment()}
            said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
            cold, *warm = (Cost(*each) for each in json.loads(said.stdout))
            costs.setdefault(f"{way}_cold", []).append(cold)
            costs.setdefault(f"{way}_warm", []).extend(warm)
    return Row(latency, events, **{name: _median(each) for name, each in costs.items()})


def _median(costs: Sequence[Cost]) -> Cost:
    return Cost(
        statistics.median(cost.wall for cost in costs),
        statistics.median(cost.cpu for cost in costs),
    )


def _show(row: Row) -> None:
    costs = (row.own_cold, row.own_warm, row.proxy_cold, row.proxy_warm)
    shown = [f"{1000 * each:.1f}" for cost in costs for each in (cost.wall, cost.cpu)]
    print(ROW.format(f"{1000 * row.latency:.0f} ms", row.events, *shown), flush=True)


def _break_even(rows: Sequence[Row], state: str) -> str:
    """The fan-out from which on the proxy takes less time, and that from which on less CPU."""
    found = []
    for what in ("wall", "cpu"):
        least: int | None = None
        for row in reversed(rows):
            own, proxy = (getattr(getattr(row, f"{way}_{state}"), what) for way in WAYS)
            if proxy > CLEARLY * own:
                break
            least = row.events
        name = "time" if what == "wall" else "CPU"
        found.append(f"{name} from {least} events on" if least else f"no {name}")
    return ", ".join(found)


@contextlib.contextmanager
def _service(module: str, *arguments: str, settings: Settings | None = None) -> Iterator[int]:
    """A process that says its port at the end of its first line; SIGTERM ends it."""
    environment = {**os.environ, **(settings.environment() if settings else {})}
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline().split()[-1])
        finally:
            process.terminate()


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as free:
        return int(free.getsockname()[1])


# Processes ------------------------------------------------------------------------------------

WARM_RUNS = 5


def executor(events: int) -> None:
    """Send events as an executor does; print what it has cost, the first time and later."""
    from wukong_async.executor import Service
    from wukong_async.invocation import Invocation

    service = Service(Settings.load())
    invocations = [Invocation("c0ffee" * 3, f"0.1.{number}") for number in range(events)]
    costs = []
    for _ in range(1 + WARM_RUNS):
        wall, cpu = time.perf_counter(), time.process_time()
        service._loop.run_until_complete(service._invoke(FUNCTION, invocations))
        costs.append((time.perf_counter() - wall, time.process_time() - cpu))
    print(json.dumps(costs))
    service.close()


async def lambda_api(latency: float) -> None:
    """Accept every event after some time, for ever."""
    from aiohttp import web

    async def accept(http: web.BaseRequest) -> web.Response:
        await http.read()
        await asyncio.sleep(latency)
        return web.Response(status=202)

    runner = web.ServerRunner(web.Server(accept))
    await runner.setup()
    await web.TCPSite(runner, HOST, 0).start()
    address: Any = runner.addresses[0]
    print(address[1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["executor", count]:
            executor(int(count))
        case ["lambda", seconds]:
            from wukong_async.loops import new_event_loop

            with asyncio.Runner(loop_factory=new_event_loop) as loop:
                loop.run(lambda_api(float(seconds)))
