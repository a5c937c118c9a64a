"""A loopback Lambda: the Invoke API for callers, the Runtime API for sandboxes; and its logs.

Callers are unmodified AWS SDKs; sandboxes run AWS's own runtime client. This is the HTTP between
them and pool.py, and Lambda's limits. Sources: the Lambda API reference (Invoke), the developer
guide (Runtime API, quotas), the CloudWatch Logs API reference (FilterLogEvents), and the texts
that the services themselves answer with.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Self
from urllib.parse import unquote

from aiohttp import web

from wukong_async.local.function import InvocationType, Request
from wukong_async.local.pool import ACCOUNT, MB, FunctionConfiguration, Pool, error_body
from wukong_async.local.valkey import Valkey
from wukong_async.loops import plain

HOST = "127.0.0.1"
MOST_SYNCHRONOUS = 6 * MB
MOST_ASYNCHRONOUS = 1 * MB
"""Bytes of a payload; and of a synchronous response."""
LOG_TAIL = 4 * 1024
"""Bytes of log that a caller can ask for."""

_INVOKE = re.compile(r"/2015-03-31/functions/(?P<name>[^/]+)/invocations/?")
_FILTER_LOG_EVENTS = "Logs_20140328.FilterLogEvents"
_RUNTIME = "/2018-06-01/runtime/"
_SCOPE = re.compile(r"Credential=[^/]+/\d+/(?P<region>[^/]+)/(?:lambda|logs)/")
_NAME = re.compile(
    r"(?:arn:[\w-]+:lambda:(?P<region>[\w-]+):(?P<account>\d+):function:|\d+:function:)?"
    r"(?P<name>[\w-]+)(?::(?P<qualifier>[\w$-]+))?"
)


class Loopback:
    """One function behind an HTTP endpoint on 127.0.0.1. An async context manager.

    Each sandbox has a port of its own for the Runtime API: the runtime client does not say who
    it is.
    """

    def __init__(self, configuration: FunctionConfiguration, valkey: Valkey) -> None:
        self._configuration = configuration
        self.pool = Pool(configuration, valkey)
        self.url = ""
        self._stack = contextlib.AsyncExitStack()

    def __repr__(self) -> str:
        return f"<Loopback {self.url} {self.pool!r}>"

    async def __aenter__(self) -> Self:
        self.url = f"http://{HOST}:{await self._serve(self._on_invoke)}"
        group = await self._stack.enter_async_context(asyncio.TaskGroup())
        self._stack.callback(self.pool.stop)
        for number in range(self._configuration.concurrency):
            runtime_api = f"{HOST}:{await self._serve(self._runtime_of(number))}"
            group.create_task(self.pool.keep(number, runtime_api, self.url))
        group.create_task(self.pool.watch_memory())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.pool.stop()  # First, or the servers would wait for the sandboxes' polls.
        try:
            await self._stack.aclose()
        except BaseExceptionGroup as many:
            raise plain(many) from None

    async def _serve(self, handler: Callable[..., Awaitable[web.StreamResponse]]) -> int:
        """Answer requests on a port of this machine's choice; the port."""
        runner = web.ServerRunner(web.Server(handler, access_log=None), shutdown_timeout=0.1)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, HOST, 0).start()
        return int(runner.addresses[0][1])

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
        if http.headers.get("X-Amz-Target") == _FILTER_LOG_EVENTS:
            return await self._filter_log_events(http, request_id)
        matched = _INVOKE.fullmatch(http.path)
        if matched is None or http.method != "POST":
            raise _Refused(
                HTTPStatus.NOT_FOUND,
                "UnknownOperationException",
                f"The loopback Lambda does not know {http.method} {http.path}.",
            )
        self._check_signature(http.headers.get("Authorization", ""))
        self._check_function(unquote(matched["name"]), http.query.get("Qualifier"))
        client_context = self._client_context(http)
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
            client_context,
        )
        waiting = self.pool.submit(request)
        if waiting is None:
            raise _Refused(
                HTTPStatus.TOO_MANY_REQUESTS,
                "TooManyRequestsException",
                "Rate Exceeded.",
                {"Reason": "ReservedFunctionConcurrentInvocationLimitExceeded"},
                {"Retry-After": "1"},
            )
        if kind is InvocationType.EVENT:
            return web.Response(status=HTTPStatus.ACCEPTED, headers=headers)
        outcome = await waiting
        headers["X-Amz-Executed-Version"] = "$LATEST"
        if outcome.error:
            headers["X-Amz-Function-Error"] = "Unhandled"
        if http.headers.get("X-Amz-Log-Type") == "Tail":
            tail = outcome.log.encode()[-LOG_TAIL:]
            headers["X-Amz-Log-Result"] = base64.b64encode(tail).decode()
        return web.Response(body=outcome.body, headers=headers, content_type="application/json")

    async def _filter_log_events(
        self, http: web.BaseRequest, request_id: str
    ) -> web.StreamResponse:
        """Lines of the log, each request's in a stream of its own; times are not kept."""
        self._check_signature(http.headers.get("Authorization", ""))
        wanted = json.loads(await http.read())
        group = f"/aws/lambda/{self._configuration.function_name}"
        if wanted.get("logGroupName") != group:
            raise _Refused(
                HTTPStatus.BAD_REQUEST,
                "ResourceNotFoundException",
                "The specified log group does not exist.",
            )
        pattern = wanted.get("filterPattern", "").strip('"')
        streams = wanted.get("logStreamNames")
        events = [
            {"logStreamName": stream, "timestamp": 0, "ingestionTime": 0, "message": line}
            for stream, log in self.pool.logs()
            if streams is None or stream in streams
            for line in log.removesuffix("\n").split("\n")
            if pattern in line
        ]
        return web.Response(
            body=json.dumps({"events": events}).encode(),
            content_type="application/x-amz-json-1.1",
            headers={"x-amzn-RequestId": request_id},
        )

    def _check_signature(self, authorization: str) -> None:
        """Not who signs (it is one machine), but for which region, as a user may have it wrong."""
        scope = _SCOPE.search(authorization)
        if scope is None:
            raise _Refused(
                HTTPStatus.FORBIDDEN,
                "MissingAuthenticationTokenException",
                "Missing Authentication Token",
            )
        region = self._configuration.region
        if scope["region"] != region:
            raise _Refused(
                HTTPStatus.FORBIDDEN,
                "InvalidSignatureException",
                f"Credential should be scoped to a valid region. This function is in"
                f" {region!r}, not {scope['region']!r}.",
            )

    def _check_function(self, name: str, qualifier: str | None) -> None:
        matched = _NAME.fullmatch(name)
        qualifier = qualifier or (matched and matched["qualifier"]) or "$LATEST"
        configuration = self._configuration
        known = matched is not None and matched["name"] == configuration.function_name
        if not known or qualifier != "$LATEST":
            wanted = matched["name"] if matched else name
            suffix = "" if qualifier == "$LATEST" else f":{qualifier}"
            raise _Refused(
                HTTPStatus.NOT_FOUND,
                "ResourceNotFoundException",
                f"Function not found: arn:aws:lambda:{configuration.region}:{ACCOUNT}:function:"
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

    def _client_context(self, http: web.BaseRequest) -> str | None:
        """The context, as one line of ASCII: it travels on in a header."""
        encoded = http.headers.get("X-Amz-Client-Context")
        if encoded is None:
            return None
        try:
            return json.dumps(json.loads(base64.b64decode(encoded, validate=True)))
        except ValueError as error:
            raise _Refused(
                HTTPStatus.BAD_REQUEST,
                "InvalidRequestContentException",
                f"Client context must be a valid Base64-encoded JSON object. ({error})",
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

    def _runtime_of(
        self, number: int
    ) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
        async def runtime(http: web.BaseRequest) -> web.StreamResponse:
            return await self._on_runtime(number, http)

        return runtime

    async def _on_runtime(self, number: int, http: web.BaseRequest) -> web.StreamResponse:
        path = http.path.removeprefix(_RUNTIME)
        if http.method == "GET" and path == "invocation/next":
            return await self._next(number)
        if http.method != "POST" or path == http.path:
            return web.Response(status=HTTPStatus.NOT_FOUND)
        try:
            # Read in full whatever its size: the limit is on what the caller gets.
            body = b"".join([chunk async for chunk in http.content.iter_any()])
        except ConnectionError:
            return web.Response(status=HTTPStatus.BAD_REQUEST)  # It was killed meanwhile.
        match path.split("/"):
            case ["init", "error"]:
                self.pool.init_failed(number, body)
            case ["invocation", request_id, "response" | "error" as kind]:
                if not self._respond(number, request_id, body, error=kind == "error"):
                    return web.Response(status=HTTPStatus.BAD_REQUEST)
            case _:
                return web.Response(status=HTTPStatus.NOT_FOUND)
        return web.json_response({"status": "OK"}, status=HTTPStatus.ACCEPTED)

    def _respond(self, number: int, request_id: str, body: bytes, *, error: bool) -> bool:
        if len(body) > MOST_SYNCHRONOUS:
            text = (
                f"Response payload size ({len(body)} bytes) exceeded maximum allowed payload size"
                f" ({MOST_SYNCHRONOUS} bytes)."
            )
            body, error = error_body("Function.ResponseSizeTooLarge", text), True
        return self.pool.respond(number, request_id, body, error=error)

    async def _next(self, number: int) -> web.StreamResponse:
        try:
            delivery = await self.pool.next_delivery(number)
        except asyncio.CancelledError:
            return web.Response(status=HTTPStatus.GONE)
        request = delivery.request
        remaining = delivery.deadline - time.monotonic()
        headers = {
            "Lambda-Runtime-Aws-Request-Id": request.request_id,
            "Lambda-Runtime-Deadline-Ms": str(int((time.time() + remaining) * 1000)),
            "Lambda-Runtime-Invoked-Function-Arn": self._configuration.arn,
            "Lambda-Runtime-Trace-Id": f"Root=1-{int(time.time()):08x}-{uuid.uuid4().hex[:24]}",
        }
        if request.client_context:
            headers["Lambda-Runtime-Client-Context"] = request.client_context
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
