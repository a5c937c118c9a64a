"""A loopback Lambda: the Invoke API for callers, the Runtime API for sandboxes.

Callers are unmodified AWS SDKs; sandboxes run AWS's own runtime client. What is decided about
requests is in function.py, what is done to processes in sandbox.py; this is the HTTP between them,
and Lambda's limits. Sources: the Lambda API reference (Invoke), the developer guide (Runtime API,
quotas), and the texts that the service itself answers with.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
import re
import sys
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

from aiohttp import web

from wukong_async.errors import ClusterError
from wukong_async.local.function import EventInvokeConfig, Function, InvocationType, Request
from wukong_async.local.sandbox import Sandbox
from wukong_async.local.valkey import Valkey

HOST = "127.0.0.1"
ACCOUNT = "000000000000"
MB = 1024 * 1024
MOST_SYNCHRONOUS = 6 * MB
MOST_ASYNCHRONOUS = 1 * MB
"""Bytes of a payload; and of a synchronous response."""
LOG_TAIL = 4 * 1024
"""Bytes of log that a caller can ask for."""
LOGS_KEPT = 1000
"""Requests whose log is remembered."""
MEMORY_PAUSE = 0.1
"""Seconds between two looks at the memory of busy sandboxes."""
RESPAWN_PAUSE = 1.0
"""Seconds before a sandbox that failed to initialise is tried again."""

_INVOKE = re.compile(r"/2015-03-31/functions/(?P<name>[^/]+)/invocations/?")
_RUNTIME = "/2018-06-01/runtime/"
_SCOPE = re.compile(r"Credential=[^/]+/\d+/(?P<region>[^/]+)/lambda/")
_NAME = re.compile(
    r"(?:arn:[\w-]+:lambda:(?P<region>[\w-]+):(?P<account>\d+):function:|\d+:function:)?"
    r"(?P<name>[\w-]+)(?::(?P<qualifier>[\w$-]+))?"
)


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


@dataclass(slots=True)
class Outcome:
    """How one delivery ended."""

    body: bytes
    error: bool
    log: str


@dataclass(slots=True)
class _Delivery:
    """A request in a sandbox."""

    request: Request
    started: float
    deadline: float
    timer: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class Loopback:
    """One function behind an HTTP endpoint on 127.0.0.1. An async context manager."""

    function_name: str
    region: str
    handler: str
    environment: Mapping[str, str]
    concurrency: int
    timeout: float
    """Seconds."""
    memory_size: int
    """MB."""
    config: EventInvokeConfig
    valkey: Valkey
    """Whose guard kills the sandboxes if this process dies."""
    counters: Counters = field(default_factory=Counters)
    url: str = ""
    _function: Function = field(init=False)
    _sandboxes: dict[int, Sandbox] = field(default_factory=dict)
    _polls: dict[int, asyncio.Future[_Delivery]] = field(default_factory=dict)
    _deliveries: dict[int, _Delivery] = field(default_factory=dict)
    _callers: dict[str, asyncio.Future[Outcome]] = field(default_factory=dict)
    _logs: OrderedDict[str, str] = field(default_factory=OrderedDict)
    _ready: asyncio.Future[None] = field(init=False)
    _busy: asyncio.Event = field(default_factory=asyncio.Event)
    _due: asyncio.TimerHandle | None = None
    _stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    _stopping: bool = False

    def __post_init__(self) -> None:
        self._function = Function(self.concurrency, self.config)

    def __repr__(self) -> str:
        return f"<Loopback {self.url} {self._function!r}>"

    # Life -------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._ready = asyncio.get_running_loop().create_future()
        runner = await self._serve(self._on_invoke)
        self.url = f"http://{HOST}:{_port(runner)}"
        group = await self._stack.enter_async_context(asyncio.TaskGroup())
        self._stack.callback(self._stop)
        for number in range(self.concurrency):
            group.create_task(self._keep_sandbox(number))
        group.create_task(self._watch_memory())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop()
        await self._stack.aclose()

    async def ready(self) -> None:
        """Wait until every sandbox has initialised.

        Raises
        ------
        ClusterError
            With what the first one that failed has written.
        """
        await asyncio.shield(self._ready)

    def _stop(self) -> None:
        self._stopping = True
        self._busy.set()
        for sandbox in self._sandboxes.values():
            sandbox.kill()
        if self._due is not None:
            self._due.cancel()

    async def _serve(self, handler: Any) -> web.ServerRunner:
        server = web.Server(handler, access_log=None)
        runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, HOST, 0).start()
        return runner

    # Sandboxes --------------------------------------------------------------------------------

    async def _keep_sandbox(self, number: int) -> None:
        """Have a sandbox in this place for as long as the endpoint is entered."""

        async def runtime(http: web.BaseRequest) -> web.StreamResponse:
            return await self._on_runtime(number, http)

        runner = await self._serve(runtime)
        environment = self._environment_of(number, _port(runner))
        while not self._stopping:
            sandbox = Sandbox(number, environment, self.handler)
            self._sandboxes[number] = sandbox
            self.counters.sandboxes += 1
            await sandbox.start()
            self.valkey.watch(sandbox.pid)
            if self._stopping:
                sandbox.kill()
            code = await sandbox.ended()
            self.valkey.forget(sandbox.pid)
            self._on_death(sandbox, code)
            if not sandbox.invoked and not self._stopping:
                await asyncio.sleep(RESPAWN_PAUSE)

    def _environment_of(self, number: int, port: int) -> dict[str, str]:
        """The variables that Lambda reserves, on top of the caller's."""
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return {
            **self.environment,
            "AWS_LAMBDA_RUNTIME_API": f"{HOST}:{port}",
            "AWS_LAMBDA_FUNCTION_NAME": self.function_name,
            "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
            "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(self.memory_size),
            "AWS_LAMBDA_INITIALIZATION_TYPE": "on-demand",
            "AWS_LAMBDA_LOG_GROUP_NAME": f"/aws/lambda/{self.function_name}",
            "AWS_LAMBDA_LOG_STREAM_NAME": f"sandbox-{number}",
            "AWS_EXECUTION_ENV": f"AWS_Lambda_python{version}",
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ENDPOINT_URL_LAMBDA": self.url,
            "LAMBDA_TASK_ROOT": str(Path.cwd()),
            "_HANDLER": self.handler,
        }

    def _on_death(self, sandbox: Sandbox, code: int) -> None:
        poll = self._polls.pop(sandbox.number, None)
        if poll is not None:
            poll.cancel()
        delivery = self._deliveries.get(sandbox.number)
        said = sandbox.take_output()
        if delivery is not None:
            kind, text = _death(sandbox, code, delivery)
            self._end(sandbox, _error_body(kind, text), error=True, log=said + text + "\n")
        self._function.lost(sandbox.number)
        if not sandbox.invoked and not self._stopping:
            self._on_init_failure(sandbox, code, said)
        self._pump()

    def _on_init_failure(self, sandbox: Sandbox, code: int, said: str) -> None:
        body = sandbox.init_error or _error_body(
            "Runtime.ExitError", f"Runtime exited with error: {_status(code)}"
        )
        if not self._ready.done():
            reported = json.loads(body)
            self._ready.set_exception(
                ClusterError(
                    f"A sandbox failed to initialise: {reported.get('errorType')}:"
                    f" {reported.get('errorMessage')}\n{said}"
                )
            )
        request = self._function.refuse()
        if request is not None:
            self.counters.errors += 1
            self._remember(request.request_id, said)
            self._answer(request, Outcome(body, error=True, log=said))

    async def _watch_memory(self) -> None:
        limit = self.memory_size * MB
        while not self._stopping:
            await self._busy.wait()
            for number in list(self._deliveries):
                if self._sandboxes[number].measure() > limit:
                    self.counters.out_of_memory += 1
                    self._sandboxes[number].kill("Runtime exited with error: signal: killed")
            await asyncio.sleep(MEMORY_PAUSE)

    # Requests ---------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Give sandboxes the work that there is for them."""
        now = time.monotonic()
        assigned, expired = self._function.assign(now)
        self.counters.discarded += len(expired)
        for number, request in assigned:
            delivery = _Delivery(request, now, now + self.timeout)
            self._deliveries[number] = delivery
            self.counters.deliveries += 1
            self._sandboxes[number].max_rss = 0
            delivery.timer = asyncio.get_running_loop().call_later(
                self.timeout, self._on_timeout, number
            )
            self._polls.pop(number).set_result(delivery)
        if self._deliveries:
            self._busy.set()
        elif not self._stopping:
            self._busy.clear()
        due = self._function.next_due()
        if due is not None and due > now:
            if self._due is not None:
                self._due.cancel()
            self._due = asyncio.get_running_loop().call_later(due - now, self._pump)

    def _on_timeout(self, number: int) -> None:
        self.counters.timeouts += 1
        self._sandboxes[number].kill(f"Task timed out after {self.timeout:.2f} seconds")

    def _end(self, sandbox: Sandbox, body: bytes, *, error: bool, log: str) -> None:
        """A delivery has ended, in whatever way."""
        delivery = self._deliveries.pop(sandbox.number)
        assert delivery.timer is not None
        delivery.timer.cancel()
        request = delivery.request
        now = time.monotonic()
        sandbox.measure()
        duration = (now - delivery.started) * 1000
        self.counters.billed_ms += math.ceil(duration)
        self.counters.errors += error
        rid = request.request_id
        log = (
            f"START RequestId: {rid} Version: $LATEST\n{log}END RequestId: {rid}\n"
            f"REPORT RequestId: {rid}\tDuration: {duration:.2f} ms\t"
            f"Billed Duration: {math.ceil(duration)} ms\tMemory Size: {self.memory_size} MB\t"
            f"Max Memory Used: {sandbox.max_rss // MB} MB\t\n"
        )
        self._remember(rid, log)
        _, again = self._function.ended(sandbox.number, failed=error, now=now)
        if error and not again and request.kind is InvocationType.EVENT:
            self.counters.discarded += 1
        if not again:
            self._answer(request, Outcome(body, error, log))

    def _answer(self, request: Request, outcome: Outcome) -> None:
        caller = self._callers.pop(request.request_id, None)
        if caller is not None and not caller.done():
            caller.set_result(outcome)

    def _remember(self, request_id: str, log: str) -> None:
        self._logs[request_id] = self._logs.pop(request_id, "") + log
        while len(self._logs) > LOGS_KEPT:
            self._logs.popitem(last=False)

    def log(self, request_id: str | None = None) -> str:
        """What a request has written, as CloudWatch would show it; of all requests by default."""
        if request_id is not None:
            return self._logs.get(request_id, "")
        return "".join(self._logs.values())

    def sandbox_pids(self) -> list[int]:
        """The sandboxes' processes, by number."""
        return [sandbox.pid for _, sandbox in sorted(self._sandboxes.items())]

    # The Invoke API ---------------------------------------------------------------------------

    async def _on_invoke(self, http: web.BaseRequest) -> web.StreamResponse:
        request_id = str(uuid.uuid4())
        try:
            return await self._invoke(http, request_id)
        except _Refused as refused:
            return web.Response(
                status=refused.status,
                body=json.dumps(refused.body).encode(),
                content_type="application/json",
                headers={
                    "x-amzn-RequestId": request_id,
                    "x-amzn-ErrorType": refused.code,
                    **refused.headers,
                },
            )

    async def _invoke(self, http: web.BaseRequest, request_id: str) -> web.StreamResponse:
        matched = _INVOKE.fullmatch(http.path)
        if matched is None or http.method != "POST":
            raise _Refused(
                HTTPStatus.NOT_FOUND,
                "UnknownOperationException",
                f"The loopback Lambda does not know {http.method} {http.path}.",
            )
        self._check_signature(http.headers.get("Authorization", ""))
        self._check_function(unquote(matched["name"]), http.query.get("Qualifier"))
        kind = self._invocation_type(http)
        most = MOST_ASYNCHRONOUS if kind is InvocationType.EVENT else MOST_SYNCHRONOUS
        payload = await self._payload(http, most)
        headers = {"x-amzn-RequestId": request_id}
        if kind is InvocationType.DRY_RUN:
            return web.Response(status=HTTPStatus.NO_CONTENT, headers=headers)
        request = Request(
            request_id,
            payload,
            kind,
            time.monotonic(),
            http.headers.get("X-Amz-Client-Context"),
        )
        self._admit(request)
        if kind is InvocationType.EVENT:
            self._pump()
            return web.Response(status=HTTPStatus.ACCEPTED, headers=headers)
        caller = self._callers[request_id] = asyncio.get_running_loop().create_future()
        self._pump()
        outcome = await caller
        headers["X-Amz-Executed-Version"] = "$LATEST"
        if outcome.error:
            headers["X-Amz-Function-Error"] = "Unhandled"
        if http.headers.get("X-Amz-Log-Type") == "Tail":
            tail = outcome.log.encode()[-LOG_TAIL:]
            headers["X-Amz-Log-Result"] = base64.b64encode(tail).decode()
        return web.Response(body=outcome.body, headers=headers, content_type="application/json")

    def _admit(self, request: Request) -> None:
        if not self._function.admit(request):
            self.counters.throttles += 1
            raise _Refused(
                HTTPStatus.TOO_MANY_REQUESTS,
                "TooManyRequestsException",
                "Rate Exceeded.",
                {"Reason": "ReservedFunctionConcurrentInvocationLimitExceeded"},
                {"Retry-After": "1"},
            )
        self.counters.invocations += 1

    def _check_signature(self, authorization: str) -> None:
        """Not who signs (it is one machine), but for which region, as a user may have it wrong."""
        scope = _SCOPE.search(authorization)
        if scope is None:
            raise _Refused(
                HTTPStatus.FORBIDDEN,
                "MissingAuthenticationTokenException",
                "Missing Authentication Token",
            )
        if scope["region"] != self.region:
            raise _Refused(
                HTTPStatus.FORBIDDEN,
                "InvalidSignatureException",
                f"Credential should be scoped to a valid region. This function is in"
                f" {self.region!r}, not {scope['region']!r}.",
            )

    def _check_function(self, name: str, qualifier: str | None) -> None:
        matched = _NAME.fullmatch(name)
        qualifier = qualifier or (matched and matched["qualifier"]) or "$LATEST"
        if matched is None or matched["name"] != self.function_name or qualifier != "$LATEST":
            wanted = matched["name"] if matched else name
            suffix = "" if qualifier == "$LATEST" else f":{qualifier}"
            raise _Refused(
                HTTPStatus.NOT_FOUND,
                "ResourceNotFoundException",
                f"Function not found: arn:aws:lambda:{self.region}:{ACCOUNT}:function:"
                f"{wanted}{suffix}",
            )

    def _invocation_type(self, http: web.BaseRequest) -> InvocationType:
        named = http.headers.get("X-Amz-Invocation-Type", InvocationType.REQUEST_RESPONSE)
        try:
            return InvocationType(named)
        except ValueError:
            raise _Refused(
                HTTPStatus.BAD_REQUEST,
                "InvalidParameterValueException",
                f"{named!r} is not one of {', '.join(InvocationType)}.",
            ) from None

    async def _payload(self, http: web.BaseRequest, most: int) -> bytes:
        payload = bytearray()
        size = 0
        # Read to the end, or the caller would be cut off before it hears the answer.
        async for chunk in http.content.iter_any():
            size += len(chunk)
            if size <= most:
                payload += chunk
        if size > most:
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                "RequestTooLargeException",
                f"Request must be smaller than {most} bytes for the InvokeFunction operation",
            )
        try:
            json.loads(payload or b"{}")
        except ValueError as error:
            raise _Refused(
                HTTPStatus.BAD_REQUEST,
                "InvalidRequestContentException",
                f"Could not parse request body into json: {error}",
            ) from None
        return bytes(payload or b"{}")

    # The Runtime API --------------------------------------------------------------------------

    async def _on_runtime(self, number: int, http: web.BaseRequest) -> web.StreamResponse:
        sandbox = self._sandboxes[number]
        path = http.path.removeprefix(_RUNTIME)
        if http.method == "GET" and path == "invocation/next":
            return await self._next(sandbox)
        if http.method != "POST" or path == http.path:
            return web.Response(status=HTTPStatus.NOT_FOUND)
        # Read in full whatever its size: the limit is on what the caller gets.
        body = b"".join([chunk async for chunk in http.content.iter_any()])
        match path.split("/"):
            case ["init", "error"]:
                sandbox.init_error = body
            case ["invocation", request_id, "response" | "error" as kind]:
                delivery = self._deliveries.get(number)
                if delivery is None or delivery.request.request_id != request_id:
                    return web.Response(status=HTTPStatus.BAD_REQUEST)
                self._on_response(sandbox, body, error=kind == "error")
            case _:
                return web.Response(status=HTTPStatus.NOT_FOUND)
        return web.json_response({"status": "OK"}, status=HTTPStatus.ACCEPTED)

    def _on_response(self, sandbox: Sandbox, body: bytes, *, error: bool) -> None:
        if len(body) > MOST_SYNCHRONOUS:
            body = _error_body(
                "Function.ResponseSizeTooLarge",
                f"Response payload size ({len(body)} bytes) exceeded maximum allowed payload size"
                f" ({MOST_SYNCHRONOUS} bytes).",
            )
            error = True
        self._end(sandbox, body, error=error, log=sandbox.take_output())

    async def _next(self, sandbox: Sandbox) -> web.StreamResponse:
        if not sandbox.invoked:
            sandbox.invoked = True
            self._remember(f"init-{sandbox.number}", sandbox.take_output())
            if not self._ready.done() and all(s.invoked for s in self._sandboxes.values()):
                self._ready.set_result(None)
        poll = asyncio.get_running_loop().create_future()
        self._polls[sandbox.number] = poll
        self._function.ready(sandbox.number)
        self._pump()
        try:
            delivery: _Delivery = await poll
        except asyncio.CancelledError:
            return web.Response(status=HTTPStatus.GONE)
        request = delivery.request
        remaining = delivery.deadline - time.monotonic()
        headers = {
            "Lambda-Runtime-Aws-Request-Id": request.request_id,
            "Lambda-Runtime-Deadline-Ms": str(int((time.time() + remaining) * 1000)),
            "Lambda-Runtime-Invoked-Function-Arn": (
                f"arn:aws:lambda:{self.region}:{ACCOUNT}:function:{self.function_name}"
            ),
            "Lambda-Runtime-Trace-Id": f"Root=1-{int(time.time()):08x}-{uuid.uuid4().hex[:24]}",
        }
        if request.client_context:
            context = base64.b64decode(request.client_context).decode()
            headers["Lambda-Runtime-Client-Context"] = context
        return web.Response(body=request.payload, headers=headers, content_type="application/json")


class _Refused(Exception):
    """An error answer of the Invoke API."""

    def __init__(
        self,
        status: HTTPStatus,
        code: str,
        message: str,
        body: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.body = {"Type": "User", "message": message, **(body or {})}
        self.headers = dict(headers or {})


def _port(runner: web.ServerRunner) -> int:
    return int(runner.addresses[0][1])


def _error_body(kind: str, text: str) -> bytes:
    return json.dumps({"errorType": kind, "errorMessage": text}).encode()


def _status(code: int) -> str:
    return f"signal: {-code}" if code < 0 else f"exit status {code}"


def _death(sandbox: Sandbox, code: int, delivery: _Delivery) -> tuple[str, str]:
    """The type and the text of the error that a caller sees when a sandbox dies."""
    rid = delivery.request.request_id
    if sandbox.killed_for and sandbox.killed_for.startswith("Task timed out"):
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        return "Sandbox.Timedout", f"{stamp} {rid} {sandbox.killed_for}"
    reason = sandbox.killed_for or f"Runtime exited with error: {_status(code)}"
    return "Runtime.ExitError", f"RequestId: {rid} Error: {reason}"
