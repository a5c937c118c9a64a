"""Invocations through aiobotocore: the only room that talks to AWS Lambda.

AWS and the local cluster differ by `endpoint_url`, so there is one invoker. Throttling is retried
by botocore's standard mode (exponential backoff with full jitter). An event that could not be sent
in the end is no harm by itself: its record exists, and the watcher sends it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import re
import time
from collections.abc import Iterable
from typing import Any, Self
from urllib.parse import urlsplit

from wukong_async._version import __version__
from wukong_async.collector import collector_paused
from wukong_async.config import Settings
from wukong_async.errors import ConfigError, FunctionNotFound, InvocationError
from wukong_async.invocation import PING
from wukong_async.loops import may_send, times_cancelled

log = logging.getLogger("wukong.invoker")

DEFAULT_REGION = "us-east-1"
ATTEMPTS = 8
"""Tries of one Invoke call, the first included: about 20 s of throttling."""
CHECK_TIMEOUT = 8.0
"""Seconds to find out at the start that the API does not answer; retries would take 40."""
PINGS = 5
"""How often in a row a function has to fail before it is called broken."""
PING_TIMEOUT = 55.0
"""Seconds to wait for an answer to a ping: less than the client waits for any answer."""
LOG_TIMEOUT = 5.0
"""Seconds to find the log of a request."""
LOG_AGE = 3600
"""Seconds back that it is looked for."""
LOG_PAGES = 20
MOST_LOG = 100_000
"""Characters of it, the last ones."""
NOT_FOUND = "ResourceNotFoundException"
THROTTLED = (
    *("TooManyRequestsException", "ThrottlingException", "EC2ThrottledException"),
    *("ServiceException", "ResourceConflictException", "ResourceNotReadyException"),
    *("ENINotReadyException", "SnapStartNotReadyException", "CodeArtifactUserPendingException"),
)
"""What Invoke answers when the same event may well be taken later."""
FUNCTION = re.compile(
    r"(?:arn:[\w-]+:lambda:(?P<region>[\w-]+):)?(?:(?P<account>\d{12}):)?(?:function:)?"
    r"(?P<name>[\w.-]+)(?::(?P<qualifier>[\w$-]+))?"
)
"""How a function may be named: `name`, `account:function:name`, an ARN; each with an alias or a
version."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LOOPBACK_KEY = "wukong-loopback"
"""Credentials for a local cluster, which does not look at them; botocore insists on some."""


def region_of(settings: Settings) -> str:
    """The region to call: the setting, else the AWS environment's, else a default."""
    named = settings.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return named or DEFAULT_REGION


class Invoker:
    """A Lambda client with bounded concurrency. An async context manager."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client: Any = None
        self._stack = contextlib.AsyncExitStack()
        self._slots = asyncio.Semaphore(settings.invoke_concurrency)
        self.sent = 0
        """Events that Lambda has accepted."""
        self.throttled = ""
        """Lambda's words, if it did not take the last ping, or an event since."""

    @property
    def function_name(self) -> str:
        """The function that is invoked."""
        return self._settings.function_name

    async def __aenter__(self) -> Self:
        """Make the client; nothing is sent.

        Raises
        ------
        ConfigError
            If the region, the endpoint or the configuration of AWS cannot be.
        """
        from botocore.exceptions import BotoCoreError

        try:
            make = self._service("lambda", self._settings.endpoint_url)
            self._client = await self._stack.enter_async_context(make)
            # It is signed and all then, which takes longer than to create a job.
            self._client.meta.events.register("before-send.lambda.Invoke", _before_send)
        except (BotoCoreError, ValueError) as error:
            culprits = {
                "InvalidRegionError": "wukong.region or AWS_REGION",
                "ProfileNotFound": "AWS_PROFILE",
                "ValueError": "wukong.endpoint_url or AWS_ENDPOINT_URL",
            }
            culprit = culprits.get(type(error).__name__, "The configuration of AWS")
            raise ConfigError(f"{culprit}: {error}") from error
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def _service(self, name: str, endpoint_url: str | None) -> Any:
        """A client of one of AWS's services, to be entered."""
        # Half a second of imports that an executor does not need to pay for.
        from aiobotocore.config import AioConfig

        settings = self._settings
        loopback = _host(endpoint_url) in LOOPBACK
        config = AioConfig(
            # A proxy of the environment cannot reach what listens on this machine alone.
            proxies={} if loopback else None,
            max_pool_connections=settings.invoke_concurrency,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            connect_timeout=10,
            read_timeout=60,
            # Put together for each call, botocore's own takes a fifth of it; what is sent is ours.
            user_agent=f"wukong-async/{__version__}",
            parameter_validation=False,
        )
        credentials = {}
        if loopback:
            credentials = {
                "aws_access_key_id": LOOPBACK_KEY,
                "aws_secret_access_key": LOOPBACK_KEY,
            }
        return _session().create_client(
            name,
            region_name=region_of(settings),
            endpoint_url=endpoint_url,
            config=config,
            **credentials,
        )

    async def check(self) -> None:
        """Prove that the function exists and may be invoked, without running it.

        Raises
        ------
        FunctionNotFound, InvocationError
        """
        try:
            async with asyncio.timeout(CHECK_TIMEOUT):
                await self._call(InvocationType="DryRun", Payload=b"{}")
        except TimeoutError:
            raise InvocationError(
                f"The Lambda API for region {region_of(self._settings)}"
                f" ({self._settings.endpoint_url or 'AWS'}) cannot be reached: no answer for"
                f" {CHECK_TIMEOUT:.0f} s. Check wukong.region and wukong.endpoint_url."
            ) from None

    def is_for(self, function: str) -> bool:
        """Whether `function`, a name or an ARN, is the one that is invoked.

        What only one of the two says of account and region is not compared.
        """
        theirs, mine = _parts(function), _parts(self._settings.function_name)
        mine = {"region": region_of(self._settings), **mine}
        return "name" in mine and all(
            theirs.get(part) == mine.get(part)
            for part in ("region", "account", "name", "qualifier")
            if part in ("name", "qualifier") or (part in theirs and part in mine)
        )

    async def invoke(self, payload: bytes) -> bool:
        """Send one event; whether Lambda has accepted it.

        It has not if it throttles for longer than this tries again, which is logged and no error.

        Raises
        ------
        FunctionNotFound, InvocationError
        """
        async with self._slots:
            try:
                await self._call(InvocationType="Event", Payload=payload)
            except _Throttled as error:
                self.throttled = str(error)
                log.warning("an event was not accepted; the watcher sends it again: %s", error)
                return False
            self.sent += 1
            return True

    async def ping(self) -> str | None:
        """Run the function to learn why events are not begun: what is wrong with it, or None.

        It has to be wrong several times in a row: any sandbox may die.
        None as well if that cannot be told: while all concurrency is in use, or when it is silent.

        Raises
        ------
        FunctionNotFound, InvocationError
        """
        wrong = None
        for _ in range(PINGS):
            wrong = await self._ping_once()
            if wrong is None:
                break
        return wrong

    async def _ping_once(self) -> str | None:
        try:
            async with asyncio.timeout(PING_TIMEOUT):
                answer = await self._call(Payload=json.dumps(PING).encode())
                said = json.loads(await answer["Payload"].read())
        except TimeoutError:
            return None
        except _Throttled as error:
            self.throttled = str(error)
            return None
        except InvocationError:
            raise
        except Exception as error:  # It is cut off, or no JSON.
            log.warning("the answer to a ping cannot be read: %r", error)
            return None
        self.throttled = ""
        match said:
            case {"errorMessage": text} if "FunctionError" in answer:
                return f"{said.get('errorType')}: {text}"
            case {"error": str(text)}:
                return text
        return None

    async def invoke_all(self, payloads: Iterable[bytes]) -> None:
        """Send events concurrently."""
        # Not a TaskGroup: it cancels its parent to end it, and nobody could tell the two apart.
        cancelled = times_cancelled()
        calls = [asyncio.create_task(self.invoke(payload)) for payload in payloads]
        try:
            # None of what botocore allocates is cyclic garbage; to look costs a fifth of the time.
            with collector_paused() if len(calls) > 1 else contextlib.nullcontext():
                await asyncio.gather(*calls)
        except Exception:
            # A call that fails at the same moment makes `gather` forget that it was cancelled.
            if times_cancelled() > cancelled:
                raise asyncio.CancelledError from None
            raise
        finally:
            for call in calls:
                call.cancel()
            if calls:
                await asyncio.wait(calls)

    async def log_of(self, request_id: str) -> str:
        """What the function's log has of a request that ran lately.

        Empty if it cannot be had: not everybody who may invoke a function may read its log.
        """
        try:
            async with asyncio.timeout(LOG_TIMEOUT):
                return await self._read_log(request_id)
        except Exception as error:  # The log only explains an error; it must not become another.
            log.debug("the log of request %s cannot be read: %r", request_id, error)
            return ""

    async def _read_log(self, request_id: str) -> str:
        endpoint = self._settings.endpoint_url
        if (_host(endpoint) or "").endswith(".amazonaws.com"):
            endpoint = None  # That is Lambda's own.
        async with self._service("logs", endpoint) as client:
            since = round((time.time() - LOG_AGE) * 1000)
            pattern = f'"{request_id}"'
            named, _ = await self._events(client, filterPattern=pattern, startTime=since)
            if not named:
                return ""
            # What tasks write does not name the request, but stands between the lines that do.
            stream = named[-1]["logStreamName"]
            times = [e["timestamp"] for e in named if e["logStreamName"] == stream]
            events, all_there = await self._events(
                client, logStreamNames=[stream], startTime=min(times), endTime=max(times)
            )
        lines = [e["message"].rstrip("\n") + "\n" for e in (events if all_there else named)]
        return "".join(lines)[-MOST_LOG:]

    async def _events(self, client: Any, **which: Any) -> tuple[list[Any], bool]:
        """Events of the function's log, and whether these are all."""
        group = f"/aws/lambda/{_name(self._settings.function_name)}"
        events: list[Any] = []
        for _ in range(LOG_PAGES):
            answer = await client.filter_log_events(logGroupName=group, **which)
            events += answer["events"]
            if not answer.get("nextToken"):
                return events, True
            which["nextToken"] = answer["nextToken"]
        return events, False

    async def _call(self, **arguments: Any) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        name = self._settings.function_name
        where = self._settings.endpoint_url or "AWS"
        try:
            return await self._client.invoke(FunctionName=name, **arguments)
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code == NOT_FOUND:
                raise FunctionNotFound(
                    f"There is no function {name!r} in region {region_of(self._settings)}"
                    f" ({where}). Set wukong.function_name, wukong.region or wukong.endpoint_url."
                ) from error
            if code in THROTTLED:
                raise _Throttled(str(error)) from error
            raise InvocationError(
                f"Invoking {name!r} in region {region_of(self._settings)} ({where}) failed: {error}"
            ) from error
        except (BotoCoreError, OSError) as error:
            raise InvocationError(
                f"The Lambda API for region {region_of(self._settings)} ({where}) cannot be"
                f" reached or used: {error} Check wukong.region, wukong.endpoint_url and the AWS"
                " credentials."
            ) from error


async def _before_send(**_: Any) -> None:
    await may_send()


def _session() -> Any:
    """A session of its own, since the environment may have changed, but for what takes longest:
    the descriptions of services are read once.
    """
    from aiobotocore.session import get_session

    session = get_session()
    session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
    return session


@functools.cache
def _loader(data_path: str | None) -> Any:
    from botocore.loaders import create_loader

    return create_loader(data_path)


def _name(function_name: str) -> str:
    """The name alone of a function that is given as an ARN, or with an alias."""
    return function_name.rpartition("function:")[2].partition(":")[0]


def _parts(function: str) -> dict[str, str]:
    """What a name or an ARN says of a function; nothing if it is neither."""
    matched = FUNCTION.fullmatch(function)
    said = {k: v for k, v in matched.groupdict().items() if v} if matched else {}
    return {"qualifier": "$LATEST", **said}


def _host(url: str | None) -> str | None:
    """The host of the endpoint, if one is set; botocore notices only some mistakes in its URL."""
    if url is None:
        return None
    try:
        parts = urlsplit(url)
        wrong = parts.scheme not in {"http", "https"} or not parts.hostname or parts.port == 0
    except ValueError:
        wrong = True
    if wrong:
        raise ConfigError(f"wukong.endpoint_url: {url!r} is no http:// or https:// URL.")
    return parts.hostname


class _Throttled(InvocationError):
    """Lambda has no room for the event now."""
