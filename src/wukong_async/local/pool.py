"""The sandboxes of one function, and the requests that they work on.

Carries out what function.py decides about requests, on the processes of sandbox.py; knows nothing
of HTTP. Everything happens on one loop, and each change of state in one step between two awaits.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import math
import random
import signal
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from wukong_async.errors import ClusterError
from wukong_async.local.faults import Faults, Injector
from wukong_async.local.function import EventInvokeConfig, Function, InvocationType, Request
from wukong_async.local.sandbox import Sandbox
from wukong_async.local.valkey import Valkey

log = logging.getLogger("wukong.local")

ACCOUNT = "000000000000"
MB = 1024 * 1024
LOGS_KEPT = 1000
"""Requests whose log is remembered."""
DELIVERIES_KEPT = 10_000
"""Deliveries of which it is remembered when they were."""
MEMORY_PAUSE = 0.1
"""Seconds between two looks at the memory of busy sandboxes."""
INIT_TIMEOUT = 30.0
"""Seconds that an initialisation may take: Lambda's 10, and some more on a busy machine."""
RESPAWN_PAUSE = 1.0
"""Seconds before a sandbox that failed to initialise twice is tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionConfiguration:
    """What Lambda knows of a function."""

    function_name: str
    region: str
    handler: str
    environment: Mapping[str, str]
    concurrency: int
    timeout: float
    """Seconds."""
    memory_size: int
    """MB."""
    event_invoke_config: EventInvokeConfig
    init_timeout: float = INIT_TIMEOUT
    """Seconds."""
    faults: Faults = field(default_factory=Faults)

    @property
    def arn(self) -> str:
        """The function's ARN, in an account that nobody has."""
        return f"arn:aws:lambda:{self.region}:{ACCOUNT}:function:{self.function_name}"


@dataclass(slots=True)
class Counters:
    """What has happened since the start. The endpoint's own count, not its callers'."""

    invocations: int = 0
    """Requests accepted."""
    deliveries: int = 0
    """Times that a request was handed to a sandbox."""
    errors: int = 0
    """Deliveries that ended in a function error, time-outs and deaths included."""
    timeouts: int = 0
    out_of_memory: int = 0
    throttles: int = 0
    discarded: int = 0
    """Asynchronous events given up: too old, or out of retries."""
    billed_ms: int = 0
    sandboxes: int = 0
    """Processes started."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one delivery ended."""

    body: bytes
    error: bool
    log: str


@dataclass(slots=True)
class Served:
    """When a sandbox was busy with a request, delivered again or not. Times are monotonic."""

    sandbox: int
    request_id: str
    begin: float
    end: float | None = None
    """None as long as it is busy with it."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A request in a sandbox. Times are of the monotonic clock."""

    request: Request
    served: Served
    deadline: float
    timers: tuple[asyncio.TimerHandle, ...]


@dataclass(slots=True)
class Pool:
    """As many sandboxes as the function's concurrency, each replaced when it dies."""

    configuration: FunctionConfiguration
    valkey: Valkey
    """Whose guard kills the sandboxes if this process dies."""
    counters: Counters = field(default_factory=Counters)
    function: Function = field(init=False)
    injector: Injector = field(init=False)
    sandboxes: dict[int, Sandbox] = field(default_factory=dict)
    deliveries: dict[int, Delivery] = field(default_factory=dict)
    _polls: dict[int, asyncio.Future[Delivery]] = field(default_factory=dict)
    _callers: dict[str, asyncio.Future[Outcome]] = field(default_factory=dict)
    _logs: OrderedDict[str, str] = field(default_factory=OrderedDict)
    _served: deque[Served] = field(default_factory=lambda: deque(maxlen=DELIVERIES_KEPT))
    _ready: asyncio.Future[None] = field(init=False)
    _busy: asyncio.Event = field(default_factory=asyncio.Event)
    _due: asyncio.TimerHandle | None = None
    _stopping: bool = False

    def __post_init__(self) -> None:
        configuration = self.configuration
        self.function = Function(configuration.concurrency, configuration.event_invoke_config)
        self.injector = Injector(configuration.faults)
        self._ready = asyncio.get_running_loop().create_future()

    def __repr__(self) -> str:
        return f"<Pool {self.function!r}>"

    # Sandboxes --------------------------------------------------------------------------------

    async def ready(self) -> None:
        """Wait until every sandbox has initialised.

        Raises
        ------
        ClusterError
            With what the first one that failed has written.
        """
        await asyncio.shield(self._ready)

    async def keep(self, number: int, runtime_api: str, invoke_url: str) -> None:
        """Have a sandbox in this place until `stop`."""
        environment = self._environment(number, runtime_api, invoke_url)
        failures = 0
        while not self._stopping:
            sandbox = Sandbox(number, environment, self.configuration.handler)
            self.sandboxes[number] = sandbox
            self.counters.sandboxes += 1
            try:
                await sandbox.start()
            except (OSError, RuntimeError) as error:
                # Out of processes or files, or another loop spawns at this moment: not for ever.
                log.warning("a sandbox cannot be started: %s", error)
                await asyncio.sleep(random.uniform(0, RESPAWN_PAUSE))
                continue
            self.valkey.watch(sandbox.pid)
            if self._stopping:
                sandbox.kill()
            timer = asyncio.get_running_loop().call_later(
                self.configuration.init_timeout, self._on_init_timeout, sandbox
            )
            code = await sandbox.ended()
            timer.cancel()
            self.valkey.forget(sandbox.pid)
            failures = 0 if sandbox.invoked else failures + 1
            self._on_death(sandbox, code, failures)
            if failures > 1 and not self._stopping:
                await asyncio.sleep(RESPAWN_PAUSE)

    async def watch_memory(self) -> None:
        """Enforce the memory limit until `stop`."""
        limit = self.configuration.memory_size * MB
        while not self._stopping:
            await self._busy.wait()
            for number in list(self.deliveries):
                if self.sandboxes[number].measure(children=True) > limit:
                    self.counters.out_of_memory += 1
                    self.sandboxes[number].kill("Runtime exited with error: signal: killed")
            await asyncio.sleep(MEMORY_PAUSE)

    def stop(self) -> None:
        """Kill all sandboxes, and start no more."""
        self._stopping = True
        self._busy.set()
        for sandbox in self.sandboxes.values():
            sandbox.kill()
        if self._due is not None:
            self._due.cancel()

    def _environment(self, number: int, runtime_api: str, invoke_url: str) -> dict[str, str]:
        """The variables that Lambda reserves, on top of the function's."""
        configuration = self.configuration
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return {
            **configuration.environment,
            "AWS_LAMBDA_RUNTIME_API": runtime_api,
            "AWS_LAMBDA_FUNCTION_NAME": configuration.function_name,
            "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
            "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(configuration.memory_size),
            "AWS_LAMBDA_INITIALIZATION_TYPE": "on-demand",
            "AWS_LAMBDA_LOG_GROUP_NAME": f"/aws/lambda/{configuration.function_name}",
            "AWS_LAMBDA_LOG_STREAM_NAME": f"sandbox-{number}",
            "AWS_EXECUTION_ENV": f"AWS_Lambda_python{version}",
            "AWS_REGION": configuration.region,
            "AWS_DEFAULT_REGION": configuration.region,
            "AWS_ENDPOINT_URL_LAMBDA": invoke_url,
            "LAMBDA_TASK_ROOT": str(Path.cwd()),
            "_HANDLER": configuration.handler,
        }

    def _on_death(self, sandbox: Sandbox, code: int, init_failures: int) -> None:
        poll = self._polls.pop(sandbox.number, None)
        if poll is not None:
            poll.cancel()
        delivery = self.deliveries.get(sandbox.number)
        said = sandbox.take_output()
        if delivery is not None:
            kind, text = _death(sandbox, code, delivery)
            self._end(sandbox, error_body(kind, text), error=True, log=said + text + "\n")
        self.function.lost(sandbox.number)
        if init_failures and not self._stopping:
            self._on_init_failure(sandbox, code, said, init_failures)
        self._pump()

    def _on_init_timeout(self, sandbox: Sandbox) -> None:
        if not sandbox.invoked:
            limit = self.configuration.init_timeout
            sandbox.kill(f"Initialization timed out after {limit:.2f} seconds")

    def _on_init_failure(self, sandbox: Sandbox, code: int, said: str, failures: int) -> None:
        kind, text = "Runtime.ExitError", f"Runtime exited with error: {_status(code)}"
        if sandbox.killed_for:
            kind, text = "Sandbox.InitTimeout", sandbox.killed_for
        body = sandbox.init_error or error_body(kind, text)
        if not self._ready.done():
            reported = json.loads(body)
            self._ready.set_exception(
                ClusterError(
                    f"A sandbox failed to initialise: {reported.get('errorType')}:"
                    f" {reported.get('errorMessage')}\n{said}"
                )
            )
        # Lambda, too, initialises once more before a request hears of it.
        request = self.function.refuse() if failures > 1 else None
        if request is not None:
            self.counters.errors += 1
            self._remember(request.request_id, said)
            self._answer(request, Outcome(body, error=True, log=said))

    # Requests ---------------------------------------------------------------------------------

    def submit(self, request: Request) -> asyncio.Future[Outcome] | None:
        """Take a request; None if it is throttled, as a synchronous one over the limit is.

        The future of an asynchronous one is nobody's business, and never done.
        """
        if self.injector.throttles() or not self._admit(request):
            self.counters.throttles += 1
            return None
        self.counters.invocations += 1
        outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        if request.kind is not InvocationType.EVENT:
            self._callers[request.request_id] = outcome
        self._pump()
        return outcome

    def _admit(self, request: Request) -> bool:
        if request.kind is not InvocationType.EVENT:
            return self.function.admit(request)
        for delay in self.injector.deliveries():
            due = request.received + delay if delay else 0.0
            # A copy each: they are counted and retried apart, and are one request all the same.
            self.function.admit(dataclasses.replace(request, not_before=due))
        return True

    async def next_delivery(self, number: int) -> Delivery:
        """A sandbox asks for work and waits for it.

        Raises
        ------
        asyncio.CancelledError
            When the sandbox dies meanwhile.
        """
        sandbox = self.sandboxes[number]
        if not sandbox.invoked:
            sandbox.invoked = True
            self._remember(f"init-{number}", sandbox.take_output())
            sandbox.measure()
            if not self._ready.done() and all(s.invoked for s in self.sandboxes.values()):
                self._ready.set_result(None)
        poll: asyncio.Future[Delivery] = asyncio.get_running_loop().create_future()
        self._polls[number] = poll
        self.function.ready(number)
        self._pump()
        return await poll

    def respond(self, number: int, request_id: str, body: bytes, *, error: bool) -> bool:
        """A sandbox has finished a request; False if that is not what it was working on."""
        delivery = self.deliveries.get(number)
        if delivery is None or delivery.request.request_id != request_id:
            return False
        sandbox = self.sandboxes[number]
        self._end(sandbox, body, error=error, log=sandbox.take_output())
        return True

    def init_failed(self, number: int, report: bytes) -> None:
        """A sandbox says why it cannot initialise; it ends by itself."""
        self.sandboxes[number].init_error = report

    def served(self) -> tuple[Served, ...]:
        """The last deliveries, in the order in which they began; for any thread."""
        return tuple(map(dataclasses.replace, self._served.copy()))

    def _pump(self) -> None:
        """Give sandboxes the work that there is for them."""
        now = time.monotonic()
        loop = asyncio.get_running_loop()
        timeout = self.configuration.timeout
        assigned, expired = self.function.assign(now)
        self.counters.discarded += len(expired)
        for number, request in assigned:
            timers = [loop.call_later(timeout, self._on_timeout, number)]
            if (after := self.injector.kill_after()) is not None:
                timers.append(loop.call_later(after, self._on_kill, number))
            served = Served(number, request.request_id, now)
            self._served.append(served)
            delivery = Delivery(request, served, now + timeout, tuple(timers))
            self.deliveries[number] = delivery
            self.counters.deliveries += 1
            self.sandboxes[number].begin()
            self._polls.pop(number).set_result(delivery)
        if self.deliveries:
            self._busy.set()
        elif not self._stopping:
            self._busy.clear()
        due = self.function.next_due()
        if due is not None and due > now:
            if self._due is not None:
                self._due.cancel()
            self._due = loop.call_later(due - now, self._pump)

    def _on_timeout(self, number: int) -> None:
        self.counters.timeouts += 1
        timeout = self.configuration.timeout
        self.sandboxes[number].kill(f"Task timed out after {timeout:.2f} seconds")

    def _on_kill(self, number: int) -> None:
        self.injector.injected["kill"] += 1
        self.sandboxes[number].kill()

    def _end(self, sandbox: Sandbox, body: bytes, *, error: bool, log: str) -> None:
        """A delivery has ended, in whatever way."""
        delivery = self.deliveries.pop(sandbox.number)
        for timer in delivery.timers:
            timer.cancel()
        request = delivery.request
        now = time.monotonic()
        sandbox.measure()
        delivery.served.end = now
        duration = (now - delivery.served.begin) * 1000
        self.counters.billed_ms += math.ceil(duration)
        self.counters.errors += error
        rid = request.request_id
        log = (
            f"{_start(rid)}{log}END RequestId: {rid}\n"
            f"REPORT RequestId: {rid}\tDuration: {duration:.2f} ms\t"
            f"Billed Duration: {math.ceil(duration)} ms\t"
            f"Memory Size: {self.configuration.memory_size} MB\t"
            f"Max Memory Used: {sandbox.max_rss // MB} MB\t\n"
        )
        self._remember(rid, log)
        _, again = self.function.ended(sandbox.number, failed=error, now=now)
        if again:
            return
        if error and request.kind is InvocationType.EVENT:
            self.counters.discarded += 1
        self._answer(request, Outcome(body, error, log))

    def _answer(self, request: Request, outcome: Outcome) -> None:
        caller = self._callers.pop(request.request_id, None)
        if caller is not None and not caller.done():
            caller.set_result(outcome)

    # Logs -------------------------------------------------------------------------------------

    def log(self, request_id: str | None = None) -> str:
        """What a request has written, as CloudWatch would show it.

        By default what all have written, and the initialisations, those that have not ended too.
        """
        if request_id is not None:
            return self._logs.get(request_id, "")
        starting = (s.output() for s in self.sandboxes.values() if not s.invoked)
        return "".join([*self._logs.values(), *starting])

    def logs(self) -> Iterator[tuple[str, str]]:
        """(request, what it has written), those that have not ended last."""
        yield from self._logs.items()
        for number, delivery in self.deliveries.items():
            rid = delivery.request.request_id
            yield rid, _start(rid) + self.sandboxes[number].output()

    def _remember(self, request_id: str, log: str) -> None:
        self._logs[request_id] = self._logs.pop(request_id, "") + log
        while len(self._logs) > LOGS_KEPT:
            self._logs.popitem(last=False)


def _start(request_id: str) -> str:
    return f"START RequestId: {request_id} Version: $LATEST\n"


def error_body(kind: str, text: str) -> bytes:
    """A function error that the platform, not the function, reports."""
    return json.dumps({"errorType": kind, "errorMessage": text}).encode()


def _status(code: int) -> str:
    if code < 0:
        return f"signal: {(signal.strsignal(-code) or str(-code)).lower()}"
    return f"exit status {code}"


def _death(sandbox: Sandbox, code: int, delivery: Delivery) -> tuple[str, str]:
    """The type and the text of the error that a caller sees when a sandbox dies."""
    rid = delivery.request.request_id
    if sandbox.killed_for and sandbox.killed_for.startswith("Task timed out"):
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        return "Sandbox.Timedout", f"{stamp} {rid} {sandbox.killed_for}"
    reason = sandbox.killed_for or f"Runtime exited with error: {_status(code)}"
    return "Runtime.ExitError", f"RequestId: {rid} Error: {reason}"
