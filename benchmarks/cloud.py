"""A cloud on one machine: thousands of executors that sleep, on a few cores.

Real are the client, its plan, Valkey, the Invoke API over HTTP, aiobotocore, and what an invocation
runs (`Service` and all below it). What is modelled is the platform: how long an event takes, cold
starts, how fast environments are added, how many there may be, and how far away the store is.

A sandbox is a `Service` with threads of its own. Those of one process share its event loop, its
connections to the store and its client of AWS: what each had for itself would be CPU and open
files, of which one machine has less than a thousand.

**Time is dilated.** An executor takes milliseconds of CPU, and in the cloud it has a vCPU for that.
So all that is modelled takes `dilation` times as long here, tasks included, and what is measured is
divided by that: CPU weighs so much less. With less than 1 it weighs more. Only that of the client,
which has a machine of its own there, weighs as much as ever: what it takes to plan is added (see
scale.py), and its events, which it sends one by one, begin as far apart in the model as it has sent
them here.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import heapq
import itertools
import json
import math
import os
import random
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from http.client import HTTPConnection
from typing import Any, Generic, Self, TypeVar

import psutil
from redis import Redis

from wukong_async import policy, wire
from wukong_async.config import Settings
from wukong_async.errors import ClusterError
from wukong_async.executor import Service, incarnation
from wukong_async.invocation import PING, Invocation
from wukong_async.invoker import Invoker
from wukong_async.local.cluster import python_path
from wukong_async.local.function import InvocationType
from wukong_async.local.valkey import Valkey
from wukong_async.loops import new_event_loop
from wukong_async.policy import Costs, remembered
from wukong_async.store import Connections
from wukong_async.store.job import SEEN

E = TypeVar("E")
T = TypeVar("T")

HOST = "127.0.0.1"
FUNCTION = "wukong-executor"
ARN = f"arn:aws:lambda:us-east-1:000000000000:function:{FUNCTION}"
PROCESSES = 2
"""That sandboxes are in."""
MOST_CLIENTS = 19_000
"""Connections to the store: some less than the files that a process may have open."""
MOST_LINE = 4 * 1024 * 1024
"""Bytes of an event on its way to a sandbox."""
STACK = 256 * 1024
"""Bytes of a thread's stack: there are thousands of threads."""
LEAST_PAUSE = 0.001
"""Seconds: the loop's timers are no finer."""
STRETCHED = (
    (policy, "LEAST_START"),
    (policy, "LEAST_WORK"),
    (policy, "LEAST_LATE"),
    (incarnation, "LONGEST_START"),
    (incarnation, "TICK"),
)
"""What the engine holds to be seconds of a cloud; what it says of CPU stays."""
SETTLE_TIMEOUT = 60.0
"""Seconds until the last executor of a job is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What is modelled of AWS Lambda, and of the way to the store. Times are seconds."""

    executors: int = 1000
    """Environments at the most; what is invoked above that waits."""
    latency: float = 0.05
    """From an Invoke call to the handler of a warm environment."""
    accept: float = 0.015
    """Until the Invoke call returns."""
    cold: float = 0.25
    """More, where the environment does not exist yet."""
    jitter: float = 0.4
    """By which share `latency` and `cold` vary, evenly, both ways."""
    burst: int = 1000
    """Environments that can be added at once;"""
    refill: float = 100.0
    """and so many a second after that: AWS allows 1,000 every ten seconds."""
    round_trip: float = 0.001
    """What a request to the store takes, beside the work."""
    timeout: float = 900.0
    """Of one invocation."""
    seed: int = 0

    @property
    def start(self) -> float:
        """What the first task waits for at the least, on the average."""
        return self.latency + self.cold

    def ideal(self, tasks: int, seconds: float, path: int = 1) -> float:
        """The best that is possible for `tasks` that take as long each, `path` of them in a row.

        All environments are asked for at time 0, come when the platform lets them, and are never
        idle; nothing but tasks takes any time.
        """
        each = min(self.executors, tasks)
        ready = [self.start + max(0, i + 1 - self.burst) / self.refill for i in range(each)]
        last = self.start + path * seconds
        for _ in range(tasks):
            end = ready[0] + seconds
            heapq.heapreplace(ready, end)
            last = max(last, end)
        return last


class Environments(Generic[E]):
    """Which events begin when, and where. Pure: time is an argument, in seconds of the model."""

    def __init__(self, platform: Platform) -> None:
        self.running = 0
        self.cold_starts = 0
        self._platform = platform
        self._random = random.Random(platform.seed)
        self._idle: list[int] = []
        """The one used last at the end: it is the warmest."""
        self._coming: list[tuple[float, int, E]] = []
        self._order = itertools.count()
        self._waiting: deque[E] = deque()
        self._tokens = float(platform.burst)
        self._filled = 0.0

    @property
    def quiet(self) -> bool:
        """Whether nothing runs, and nothing is to."""
        return not (self.running or self._coming or self._waiting)

    @property
    def full(self) -> bool:
        """Whether a synchronous call would be throttled."""
        return self.running + len(self._waiting) >= self._platform.executors

    def invoke(self, event: E, now: float) -> None:
        """An event is accepted."""
        due = now + self._varied(self._platform.latency)
        heapq.heappush(self._coming, (due, next(self._order), event))

    def begin(self, now: float) -> list[tuple[E, int, float]]:
        """What begins now: an event, its environment, and seconds until that is there."""
        while self._coming and self._coming[0][0] <= now:
            self._waiting.append(heapq.heappop(self._coming)[2])
        begun = []
        while self._waiting:
            if self._idle:
                place, pause = self._idle.pop(), 0.0
            elif self.cold_starts < self._platform.executors and self._take_token(now):
                place, pause = self.cold_starts, self._varied(self._platform.cold)
                self.cold_starts += 1
            else:
                break
            self.running += 1
            begun.append((self._waiting.popleft(), place, pause))
        return begun

    def drop(self) -> None:
        """Forget what has not begun."""
        self._coming.clear()
        self._waiting.clear()

    def end(self, place: int) -> None:
        """An environment is through with its event."""
        self.running -= 1
        self._idle.append(place)

    def next_time(self, now: float) -> float:
        """When to ask again, if nothing ends before; infinite if there is no reason to."""
        due = self._coming[0][0] if self._coming else math.inf
        if self._waiting and self.cold_starts < self._platform.executors:
            due = min(due, now + max(0.0, 1 - self._tokens) / self._platform.refill)
        return due

    def _take_token(self, now: float) -> bool:
        platform = self._platform
        grown = (now - self._filled) * platform.refill
        self._tokens, self._filled = min(platform.burst, self._tokens + grown), now
        if self._tokens < 1 - 1e-9:
            return False
        self._tokens -= 1
        return True

    def _varied(self, seconds: float) -> float:
        return seconds * (1 + self._platform.jitter * self._random.uniform(-1, 1))


@dataclass(frozen=True, slots=True)
class Used:
    """What has happened since the last reset. Times are seconds of the model but for CPU."""

    invocations: int
    cold_starts: int
    billed: float
    sandbox_cpu: float
    store_cpu: float


class Cloud:
    """Valkey, the endpoint, and the processes with the sandboxes. A context manager.

    Raises
    ------
    ClusterError
        On entering: if one of them does not start.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._url = ""
        self._processes: list[psutil.Process] = []
        self._cpu = (0.0, 0.0)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._valkey = valkey = Valkey()
            stack.callback(valkey.stop)
            asyncio.run(valkey.started())
            store = stack.enter_context(contextlib.closing(Redis.from_url(valkey.url)))
            store.config_set("maxclients", MOST_CLIENTS)
            self._store = store
            guard = psutil.Process(valkey.guard_pid)
            self._server = guard.children()[0]
            path = str(valkey.directory / "sandboxes.sock")
            port = int(stack.enter_context(_process(valkey, "front", path)))
            self._url = f"http://{HOST}:{port}"
            pids = [
                int(stack.enter_context(_process(valkey, "sandboxes", path, valkey.url)))
                for _ in range(PROCESSES)
            ]
            self._processes = [psutil.Process(pid) for pid in pids]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def reset(self, platform: Platform, dilation: float) -> dict[str, Any]:
        """A platform without any environment, and so much slower; settings for clients."""
        self._ask("POST", "/reset", {"platform": asdict(platform), "dilation": dilation})
        self._cpu = self._cpu_now()
        slow = max(1.0, dilation)
        return {
            "function_name": FUNCTION,
            "region": "us-east-1",
            "endpoint_url": self._url,
            "redis_endpoints": (self._valkey.url,),
            "proxy_address": None,
            "use_local_proxy": False,
            "max_concurrency": platform.executors,
            "threads_per_executor": 1,
            "lease": Settings.lease * slow,
            "grace": Settings.grace * slow,
            "ttl": Settings.ttl * slow,
            "store_timeout": Settings.store_timeout * slow,
        }

    def forget(self, dilation: float) -> None:
        """Forget what tasks were like, and believe of costs what a client of AWS believes."""
        self._store.flushall()
        costs = Costs()
        seen = dataclasses.replace(
            costs,
            start=costs.start * dilation,
            round_trip=costs.round_trip * dilation,
            bandwidth=costs.bandwidth / dilation,
            invoke=costs.invoke * dilation,
        )
        self._store.set(SEEN, wire.pack(remembered({}, seen)[""]))

    def used(self) -> Used:
        """What has happened since the last reset, once all executors are gone.

        Events that have not begun by now would only find that the job has ended.
        """
        self._ask("POST", "/drop")
        deadline = time.monotonic() + SETTLE_TIMEOUT
        while not (said := self._ask("GET", "/counters"))["quiet"]:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"Executors of a job that has ended go on for {SETTLE_TIMEOUT} s."
                )
            time.sleep(0.01)
        sandboxes, store = (b - a for a, b in zip(self._cpu, self._cpu_now(), strict=True))
        return Used(said["invocations"], said["cold_starts"], said["billed"], sandboxes, store)

    def _cpu_now(self) -> tuple[float, float]:
        """Seconds of the sandboxes, and of the store."""
        return sum(map(_cpu_of, self._processes)), _cpu_of(self._server)

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        connection = HTTPConnection(self._url.removeprefix("http://"))
        with contextlib.closing(connection):
            connection.request(method, path, json.dumps(body))
            answer = connection.getresponse()
            if answer.status != HTTPStatus.OK:
                raise ClusterError(f"The cloud says {answer.status} to {path}.")
            return json.loads(answer.read())


def _cpu_of(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextlib.contextmanager
def _process(valkey: Valkey, *arguments: str) -> Iterator[str]:
    """A process of this module: the first thing that it says."""
    environment = {
        **os.environ,
        "PYTHONPATH": python_path(),
        "MALLOC_ARENA_MAX": "2",  # Each of thousands of threads would have its own.
    }
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.cloud", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        valkey.watch(process.pid)
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if not said:
                raise ClusterError(f"benchmarks.cloud {arguments[0]} does not start.")
            yield said
        finally:
            process.kill()
            process.wait()
            valkey.forget(process.pid)


@contextlib.contextmanager
def stretched(dilation: float) -> Iterator[None]:
    """Have this process's engine take its seconds for seconds of the model."""
    before = [getattr(module, name) for module, name in STRETCHED]
    try:
        for (module, name), seconds in zip(STRETCHED, before, strict=True):
            setattr(module, name, seconds * dilation)
        yield
    finally:
        for (module, name), seconds in zip(STRETCHED, before, strict=True):
            setattr(module, name, seconds)


# The endpoint -------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class _Request:
    event: Any
    kind: InvocationType
    answer: asyncio.Future[Any]
    began: float = 0.0


@dataclass(slots=True)
class _Front:
    """The Invoke API, and the platform behind it."""

    platform: Platform = field(default_factory=Platform)
    dilation: float = 1.0
    environments: Environments[_Request] = field(init=False)
    invocations: int = 0
    billed: float = 0.0
    url: str = ""
    _sandboxes: list[asyncio.StreamWriter] = field(default_factory=list)
    _requests: dict[int, _Request] = field(default_factory=dict)
    _first: float | None = None
    """When the client has sent its first event."""
    _delayed: set[asyncio.TimerHandle] = field(default_factory=set)
    """Events of the client that are still on their way out of it."""
    _ready: dict[asyncio.StreamWriter, asyncio.Event] = field(default_factory=dict)
    _timer: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self.environments = Environments(self.platform)

    async def serve(self, path: str) -> None:
        """For ever."""
        from aiohttp import web

        await asyncio.start_unix_server(self._attach, path, limit=MOST_LINE)
        runner = web.ServerRunner(web.Server(self._answer, access_log=None))
        await runner.setup()
        await web.TCPSite(runner, HOST, 0, backlog=4096).start()
        address: Any = runner.addresses[0]
        self.url = f"http://{HOST}:{address[1]}"
        print(address[1], flush=True)
        await asyncio.Event().wait()

    def _now(self) -> float:
        return asyncio.get_running_loop().time() / self.dilation

    async def _answer(self, http: Any) -> Any:
        from aiohttp import web

        body = json.loads(await http.read() or b"null")
        if http.path == "/counters":
            return web.json_response(
                {
                    "quiet": self.environments.quiet,
                    "invocations": self.invocations,
                    "cold_starts": self.environments.cold_starts,
                    "billed": self.billed,
                }
            )
        if http.path == "/drop":
            self.environments.drop()
            for delayed in self._delayed:
                delayed.cancel()
            self._delayed.clear()
            return web.json_response({})
        if http.path == "/reset":
            await self._reset(Platform(**body["platform"]), body["dilation"])
            return web.json_response({})
        kind = InvocationType(http.headers.get("X-Amz-Invocation-Type", "RequestResponse"))
        if kind is InvocationType.DRY_RUN:
            return web.Response(status=HTTPStatus.NO_CONTENT)
        if kind is InvocationType.REQUEST_RESPONSE and self.environments.full:
            return web.json_response(
                {"message": "Rate Exceeded."},
                status=HTTPStatus.TOO_MANY_REQUESTS,
                headers={"x-amzn-ErrorType": "TooManyRequestsException"},
            )
        request = _Request(body, kind, asyncio.get_running_loop().create_future())
        self.invocations += 1
        if kind is InvocationType.EVENT and _is_from_client(body):
            self._invoke_as_sent(request)
            await asyncio.sleep(self.platform.accept)  # To the client this takes what it takes.
            return web.Response(status=HTTPStatus.ACCEPTED)
        self._invoke(request)
        if kind is InvocationType.REQUEST_RESPONSE:
            return web.json_response(await request.answer)
        await asyncio.sleep(self.platform.accept * self.dilation)
        return web.Response(status=HTTPStatus.ACCEPTED)

    def _invoke(self, request: _Request) -> None:
        self.environments.invoke(request, self._now())
        self._pump()

    def _invoke_as_sent(self, request: _Request) -> None:
        """As much later than the client's first event as it was sent later, in the model's time."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._first = now if self._first is None else self._first

        def invoke() -> None:
            self._delayed.discard(timer)
            self._invoke(request)

        timer = loop.call_at(self._first + (now - self._first) * self.dilation, invoke)
        self._delayed.add(timer)

    async def _reset(self, platform: Platform, dilation: float) -> None:
        self.platform, self.dilation = platform, dilation
        self.environments = Environments(platform)
        # The clock began long ago, and no token was taken since.
        self.invocations, self.billed, self._first = 0, 0.0, None
        for writer, ready in self._ready.items():
            ready.clear()
            _write(writer, {"reset": asdict(platform), "dilation": dilation, "url": self.url})
        for ready in self._ready.values():
            await ready.wait()

    async def _attach(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A process with sandboxes."""
        self._sandboxes.append(writer)
        ready = self._ready[writer] = asyncio.Event()
        while line := await reader.readline():
            match json.loads(line):
                case {"place": int(place), "answer": answer}:
                    self._ended(place, answer)
                case _:
                    ready.set()

    def _pump(self) -> None:
        """Have begin what can."""
        loop = asyncio.get_running_loop()
        now = self._now()
        for request, place, pause in self.environments.begin(now):
            self._requests[place] = request
            loop.call_later(pause * self.dilation, self._deliver, place)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self.environments.next_time(now)
        if due < math.inf:
            self._timer = loop.call_later(max(0.0, due - now) * self.dilation, self._pump)

    def _deliver(self, place: int) -> None:
        request = self._requests[place]
        request.began = self._now()
        writer = self._sandboxes[place % len(self._sandboxes)]
        _write(writer, {"place": place, "event": request.event})

    def _ended(self, place: int, answer: object) -> None:
        request = self._requests.pop(place)
        self.billed += self._now() - request.began
        if not request.answer.done():
            request.answer.set_result(answer)
        self.environments.end(place)
        self._pump()


def _is_from_client(event: Any) -> bool:
    """Whether it is for one of the first executors, whose names have no parents in them."""
    return "." not in event.get("executor", ".")


def _write(writer: asyncio.StreamWriter, message: object) -> None:
    writer.write(json.dumps(message).encode() + b"\n")


# The sandboxes ------------------------------------------------------------------------------------


class Distant(Connections):
    """A store that is as far away as the model says."""

    def __init__(self, endpoint: str, timeout: float, pause: float) -> None:
        super().__init__((endpoint,), timeout)
        self._pause = pause if pause >= LEAST_PAUSE else 0.0

    async def ask(self, shard: int, request: Callable[[Any], Awaitable[T]]) -> T:
        """Send a request, some time later."""
        if self._pause:
            await asyncio.sleep(self._pause)
        return await super().ask(shard, request)


@dataclass(slots=True)
class _Context:
    aws_request_id: str
    invoked_function_arn: str
    seconds: float

    def get_remaining_time_in_millis(self) -> int:
        return int(self.seconds * 1000)


@dataclass(slots=True)
class _Sandboxes:
    """Those of this process."""

    redis_url: str
    settings: Settings = field(init=False)
    timeout: float = 0.0
    _services: dict[int, Service] = field(default_factory=dict)
    _held: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    _connections: Connections | None = None
    _invoker: Invoker | None = None
    _running: set[asyncio.Task[None]] = field(default_factory=set)

    async def work(self, path: str) -> None:
        """For ever."""
        reader, writer = await asyncio.open_unix_connection(path, limit=MOST_LINE)
        print(os.getpid(), flush=True)
        while line := await reader.readline():
            match json.loads(line):
                case {"reset": dict(platform), "dilation": dilation, "url": str(url)}:
                    await self._reset(Platform(**platform), dilation, url)
                    _write(writer, {})
                case {"place": int(place), "event": event}:
                    task = asyncio.create_task(self._run(writer, place, event))
                    self._running.add(task)
                    task.add_done_callback(self._running.discard)

    async def _reset(self, platform: Platform, dilation: float, url: str) -> None:
        for service in self._services.values():
            for worker in (*service._workers, service._reader, service._writer):
                worker.close()
        self._services.clear()
        await self._held.aclose()
        self._held = contextlib.AsyncExitStack()
        gc.collect()
        self._held.enter_context(stretched(dilation))
        self.timeout = platform.timeout * dilation
        timeout = Settings.store_timeout * max(1.0, dilation)
        self.settings = Settings(
            function_name=ARN,
            region="us-east-1",
            endpoint_url=url,
            redis_endpoints=(self.redis_url,),
            store_timeout=timeout,
            threads_per_executor=1,
            invoke_concurrency=Settings.invoke_concurrency * max(1, platform.executors // 10),
        )
        distant = Distant(self.redis_url, timeout, platform.round_trip * dilation)
        self._connections = await self._held.enter_async_context(distant)
        await self._connections.check()
        self._invoker = await self._held.enter_async_context(Invoker(self.settings))

    async def _run(self, writer: asyncio.StreamWriter, place: int, event: Any) -> None:
        service = self._services.get(place)
        if service is None:
            service = self._services[place] = self._make()
        if event == PING:
            answer = await service._answer_ping()
        else:
            context = _Context(str(uuid.uuid4()), ARN, self.timeout)
            answer = await service._handle(Invocation.from_event(event), context)
        _write(writer, {"place": place, "answer": answer})

    def _make(self) -> Service:
        service = Service(self.settings)
        service._loop.close()
        service._loop = asyncio.get_running_loop()
        service._connections, service._invoker = self._connections, self._invoker
        return service


if __name__ == "__main__":
    threading.stack_size(STACK)
    # What the heaps of a thousand sandboxes hold together is looked through too often otherwise.
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    with asyncio.Runner(loop_factory=new_event_loop) as loop:
        match sys.argv[1:]:
            case ["front", path]:
                loop.run(_Front().serve(path))
            case ["sandboxes", path, redis_url]:
                loop.run(_Sandboxes(redis_url).work(path))
