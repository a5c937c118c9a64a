"""The loopback Lambda, spoken to by an unmodified aiobotocore client."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiobotocore.session
import aiohttp
import psutil
import pytest
from aiobotocore.config import AioConfig
from botocore.exceptions import ClientError

from tests.integration.test_lifecycle import is_alive
from tests.paths import ROOT
from wukong_async.errors import ClusterError
from wukong_async.local.endpoint import Loopback
from wukong_async.local.function import EventInvokeConfig
from wukong_async.local.pool import FunctionConfiguration
from wukong_async.local.sandbox import MOST_LOG
from wukong_async.local.valkey import Valkey

HANDLER = "tests.integration.handlers.handler"


@contextlib.asynccontextmanager
async def loopback(valkey: Valkey, **changes: Any) -> AsyncIterator[Loopback]:
    usual: dict[str, Any] = {
        "function_name": "f",
        "region": "eu-west-1",
        "handler": HANDLER,
        "environment": {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        "concurrency": 1,
        "timeout": 60.0,
        "memory_size": 512,
        "event_invoke_config": EventInvokeConfig(),
    }
    configuration = FunctionConfiguration(**{**usual, **changes})
    async with Loopback(configuration, valkey) as running:
        await running.pool.ready()
        yield running


class Caller:
    """An AWS SDK."""

    def __init__(self, client: Any) -> None:
        self.client = client

    async def call(self, event: Any, **more: Any) -> Any:
        payload = event if isinstance(event, bytes) else json.dumps(event).encode()
        # A file: aiohttp advises against large bytes.
        answer = await self.client.invoke(FunctionName="f", Payload=io.BytesIO(payload), **more)
        async with answer["Payload"] as stream:
            answer["Payload"] = await stream.read()
        return answer

    async def value(self, event: Any) -> Any:
        answer = await self.call(event)
        assert "FunctionError" not in answer, answer["Payload"]
        return json.loads(answer["Payload"])

    async def send(self, event: Any) -> str:
        answer = await self.call(event, InvocationType="Event")
        assert answer["StatusCode"] == 202
        return str(answer["ResponseMetadata"]["RequestId"])


@contextlib.asynccontextmanager
async def sdk(url: str, region: str = "eu-west-1") -> AsyncIterator[Caller]:
    async with aiobotocore.session.get_session().create_client(
        "lambda",
        region_name=region,
        endpoint_url=url,
        aws_access_key_id="k",
        aws_secret_access_key="s",
        config=AioConfig(retries={"total_max_attempts": 1}),
    ) as client:
        yield Caller(client)


@pytest.fixture
async def running(valkey: Valkey) -> AsyncIterator[Loopback]:
    async with loopback(valkey) as entered:
        yield entered


@pytest.fixture
async def caller(running: Loopback) -> AsyncIterator[Caller]:
    async with sdk(running.url) as entered:
        yield entered


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in another process."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


# Kinds of invocation ------------------------------------------------------------------------------


async def test_a_synchronous_call(caller: Caller) -> None:
    answer = await caller.call({"a": [1, None]})
    assert answer["StatusCode"] == 200
    assert answer["ExecutedVersion"] == "$LATEST"
    assert json.loads(answer["Payload"]) == {"a": [1, None]}
    assert answer["ResponseMetadata"]["RequestId"]
    assert "FunctionError" not in answer
    assert "LogResult" not in answer


async def test_an_asynchronous_event(caller: Caller, tmp_path: Path) -> None:
    answer = await caller.call({"do": "touch", "path": str(tmp_path / "x")}, InvocationType="Event")
    assert answer["StatusCode"] == 202
    assert answer["Payload"] == b""
    await until((tmp_path / "x").exists)


async def test_a_dry_run_runs_nothing(caller: Caller, running: Loopback) -> None:
    answer = await caller.call({}, InvocationType="DryRun")
    assert answer["StatusCode"] == 204
    assert running.pool.counters.deliveries == 0


async def test_sandboxes_stay_warm(caller: Caller) -> None:
    first = await caller.value({"do": "count"})
    second = await caller.value({"do": "count"})
    assert second == {"calls": first["calls"] + 1, "pid": first["pid"]}


async def test_the_context_is_right(caller: Caller) -> None:
    context = base64.b64encode(b'{"custom": {"a": 1}}').decode()
    answer = await caller.call({"do": "context"}, ClientContext=context)
    said = json.loads(answer["Payload"])
    assert said["request_id"] == answer["ResponseMetadata"]["RequestId"]
    assert 50_000 < said["remaining"] <= 60_000
    assert said["memory"] == "512"
    assert said["name"] == "f"
    assert said["arn"].startswith("arn:aws:lambda:eu-west-1:")
    assert said["custom"] == {"a": 1}


async def test_names_and_arns_lead_to_the_function(caller: Caller) -> None:
    for name in ("f", "arn:aws:lambda:eu-west-1:000000000000:function:f", "f:$LATEST"):
        answer = await caller.client.invoke(FunctionName=name, Payload=b"1")
        assert answer["StatusCode"] == 200
        answer["Payload"].close()


# Logs ---------------------------------------------------------------------------------------------


async def test_the_log_tail(caller: Caller) -> None:
    answer = await caller.call({"do": "print", "text": "hello"}, LogType="Tail")
    log = base64.b64decode(answer["LogResult"]).decode()
    rid = answer["ResponseMetadata"]["RequestId"]
    assert log.startswith(f"START RequestId: {rid} Version: $LATEST\n")
    assert "hello\nto stderr\n" in log
    assert f"END RequestId: {rid}\nREPORT RequestId: {rid}\tDuration: " in log
    assert "Memory Size: 512 MB\tMax Memory Used: " in log


async def test_the_log_tail_is_the_last_4_kb(caller: Caller) -> None:
    answer = await caller.call({"do": "print", "text": "x" * 10_000 + "end"}, LogType="Tail")
    log = base64.b64decode(answer["LogResult"])
    assert len(log) == 4096
    assert b"end\n" in log


async def test_a_log_says_how_much_of_it_was_dropped(caller: Caller, running: Loopback) -> None:
    answer = await caller.call({"do": "print", "text": "x" * MOST_LOG + "end"})
    log = running.pool.log(answer["ResponseMetadata"]["RequestId"]).splitlines()
    dropped = len("end\n") + len("to stderr\n")
    assert log[1] == f"[{dropped} bytes dropped]"
    assert log[2] == "x" * (MOST_LOG - dropped) + "end"
    answer = await caller.call({"do": "print", "text": "short"})
    assert "dropped" not in running.pool.log(answer["ResponseMetadata"]["RequestId"])


async def test_logs_are_kept_apart_by_request(caller: Caller, running: Loopback) -> None:
    answers = [
        await caller.call({"do": "print", "text": f"text {i}"}, LogType="Tail") for i in range(3)
    ]
    for i, answer in enumerate(answers):
        log = running.pool.log(answer["ResponseMetadata"]["RequestId"])
        assert f"text {i}" in log
        assert log.count("text") == 1


# Errors -------------------------------------------------------------------------------------------


async def test_a_handler_that_raises(caller: Caller, running: Loopback) -> None:
    answer = await caller.call({"do": "raise"}, LogType="Tail")
    assert answer["StatusCode"] == 200
    assert answer["FunctionError"] == "Unhandled"
    body = json.loads(answer["Payload"])
    assert body["errorType"] == "ValueError"
    assert body["errorMessage"] == "asked to"
    assert body["stackTrace"]
    assert b"[ERROR] ValueError: asked to" in base64.b64decode(answer["LogResult"])
    assert running.pool.counters.errors == 1
    assert await caller.value({"do": "count"}), "the sandbox goes on"


async def test_a_sandbox_that_exits_is_replaced(caller: Caller, running: Loopback) -> None:
    answer = await caller.call({"do": "exit", "code": 3})
    assert answer["FunctionError"] == "Unhandled"
    body = json.loads(answer["Payload"])
    assert body["errorType"] == "Runtime.ExitError"
    assert "Runtime exited with error: exit status 3" in body["errorMessage"]
    assert (await caller.value({"do": "count"}))["calls"] == 1
    assert running.pool.counters.sandboxes == 2


async def test_a_timeout_kills_and_replaces(valkey: Valkey) -> None:
    async with loopback(valkey, timeout=0.3) as running, sdk(running.url) as caller:
        pid = (await caller.value({"do": "count"}))["pid"]
        answer = await caller.call({"do": "sleep", "seconds": 60})
        body = json.loads(answer["Payload"])
        assert "Task timed out after 0.30 seconds" in body["errorMessage"]
        assert running.pool.counters.timeouts == 1
        assert (await caller.value({"do": "count"}))["pid"] != pid
        assert not psutil.pid_exists(pid)


async def test_the_memory_limit_kills_and_replaces(valkey: Valkey) -> None:
    async with loopback(valkey, memory_size=200) as running, sdk(running.url) as caller:
        answer = await caller.call({"do": "allocate", "mb": 400})
        body = json.loads(answer["Payload"])
        assert body["errorType"] == "Runtime.ExitError"
        assert "signal: killed" in body["errorMessage"]
        assert running.pool.counters.out_of_memory == 1
        assert (await caller.value({"do": "count"}))["calls"] == 1


async def test_the_memory_of_child_processes_counts(valkey: Valkey) -> None:
    async with loopback(valkey, memory_size=200) as running, sdk(running.url) as caller:
        answer = await caller.call({"do": "spawn and allocate", "mb": 300}, LogType="Tail")
        assert "signal: killed" in json.loads(answer["Payload"])["errorMessage"]
        assert running.pool.counters.out_of_memory == 1
        used = re.search(rb"Max Memory Used: (\d+) MB", base64.b64decode(answer["LogResult"]))
        assert used is not None
        assert int(used[1]) > 300


async def test_even_the_shortest_request_uses_memory(caller: Caller) -> None:
    for event in ({"do": "count"}, {"do": "exit", "code": 0}):
        answer = await caller.call(event, LogType="Tail")
        log = base64.b64decode(answer["LogResult"])
        assert b"Max Memory Used: " in log
        assert b"Max Memory Used: 0 MB" not in log


async def test_what_left_the_session_ends_with_its_sandbox(valkey: Valkey, tmp_path: Path) -> None:
    async with loopback(valkey, timeout=1) as running, sdk(running.url) as caller:
        file = tmp_path / "pid"
        await caller.call({"do": "spawn away and sleep", "path": str(file)})
        child = int(file.read_text())
        await until(lambda: not is_alive(child))


async def test_what_a_task_has_started_ends_with_its_sandbox(caller: Caller) -> None:
    child = await caller.value({"do": "spawn"})
    assert psutil.pid_exists(child)
    await caller.call({"do": "exit", "code": 0})
    await until(lambda: not is_alive(child))


async def test_a_function_that_does_not_initialise(valkey: Valkey) -> None:
    with pytest.raises(ClusterError) as caught:
        async with loopback(valkey, handler="tests.integration.broken_handler.handler"):
            pass
    assert "Runtime.ImportModuleError" in str(caught.value)
    assert "no module named what_it_needs" in str(caught.value)
    assert "about to fail" in str(caught.value)


async def test_a_function_whose_initialisation_hangs(valkey: Valkey) -> None:
    with pytest.raises(ClusterError) as caught:
        async with loopback(
            valkey, handler="tests.integration.slow_handler.handler", init_timeout=2
        ):
            pass
    assert "Sandbox.InitTimeout: Initialization timed out after 2.00 seconds" in str(caught.value)
    assert "about to wait for ever" in str(caught.value)


async def test_an_init_error_is_what_the_caller_hears(valkey: Valkey, tmp_path: Path) -> None:
    flag = tmp_path / "sitecustomize.py"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), *sys.path]),
    }
    async with loopback(valkey, environment=environment) as running, sdk(running.url) as caller:
        flag.write_text("raise SystemExit('not today')")
        await caller.call({"do": "exit", "code": 0})
        answer = await caller.call({})
        assert answer["FunctionError"] == "Unhandled"
        assert json.loads(answer["Payload"])["errorType"] == "Runtime.ExitError"
        flag.unlink()
        await until(lambda: all(s.invoked for s in running.pool.sandboxes.values()))
        assert await caller.value([1]) == [1]


async def test_a_sandbox_killed_while_it_initialises_is_no_callers_business(
    valkey: Valkey, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, time\nwhile os.path.exists({str(flag)!r}): time.sleep(0.005)\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), *sys.path]),
    }
    async with loopback(valkey, environment=environment) as running, sdk(running.url) as caller:
        pool = running.pool

        async def killed_and_replaced() -> None:
            pid = pool.sandboxes[0].pid
            os.kill(pid, signal.SIGKILL)
            await until(lambda: pool.sandboxes[0].pid not in {pid, -1})

        flag.touch()
        await killed_and_replaced()
        waiting = asyncio.ensure_future(caller.call({"a": 1}))
        await until(lambda: bool(pool.function.waiting))
        await killed_and_replaced()
        flag.unlink()
        assert "FunctionError" not in await waiting
        assert pool.counters.sandboxes == 3


# Refusals -----------------------------------------------------------------------------------------


async def refused(call: Any) -> dict[str, Any]:
    with pytest.raises(ClientError) as caught:
        await call
    response: dict[str, Any] = caught.value.response
    return response


async def test_an_unknown_function(caller: Caller) -> None:
    answer = await refused(caller.client.invoke(FunctionName="g"))
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 404
    assert answer["Error"]["Code"] == "ResourceNotFoundException"
    assert answer["Error"]["Message"].endswith("function:g")
    assert (await refused(caller.client.invoke(FunctionName="f", Qualifier="7")))["Error"][
        "Message"
    ].endswith("function:f:7")


async def test_a_request_that_is_too_large(caller: Caller) -> None:
    six = json.dumps("x" * (6 * 1024 * 1024 - 2)).encode()
    assert (await caller.call(six))["StatusCode"] == 200
    answer = await refused(caller.call(six + b" "))
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 413
    assert answer["Error"]["Code"] == "RequestTooLargeException"
    one = json.dumps("x" * (1024 * 1024 - 2)).encode()
    await caller.call(one, InvocationType="Event")
    answer = await refused(caller.call(one + b" ", InvocationType="Event"))
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 413


async def test_a_response_that_is_too_large(caller: Caller) -> None:
    answer = await caller.call({"do": "return", "bytes": 7 * 1024 * 1024})
    assert answer["FunctionError"] == "Unhandled"
    assert json.loads(answer["Payload"])["errorType"] == "Function.ResponseSizeTooLarge"


async def test_too_many_synchronous_requests(
    caller: Caller, running: Loopback, tmp_path: Path
) -> None:
    busy = asyncio.create_task(caller.call({"do": "wait for", "path": str(tmp_path / "x")}))
    await until(lambda: running.pool.counters.deliveries == 1)
    answer = await refused(caller.call({}))
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 429
    assert answer["Error"]["Code"] == "TooManyRequestsException"
    assert answer["Reason"] == "ReservedFunctionConcurrentInvocationLimitExceeded"
    assert running.pool.counters.throttles == 1
    await caller.send({})  # An event waits instead.
    (tmp_path / "x").touch()
    assert json.loads((await busy)["Payload"]) == "seen"
    await until(lambda: running.pool.counters.deliveries == 2)


async def test_what_is_no_json(caller: Caller) -> None:
    answer = await refused(caller.call(b"{nonsense"))
    assert answer["Error"]["Code"] == "InvalidRequestContentException"


async def test_a_wrong_region(running: Loopback) -> None:
    async with sdk(running.url, region="us-west-2") as caller:
        answer = await refused(caller.call({}))
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 403
    assert "'eu-west-1', not 'us-west-2'" in answer["Error"]["Message"]


async def test_raw_http(running: Loopback) -> None:
    async with aiohttp.ClientSession() as http:
        path = f"{running.url}/2015-03-31/functions/f/invocations"
        async with http.post(path) as answer:
            assert answer.status == 403, "unsigned"
        async with http.get(path) as answer:
            assert answer.status == 404
        signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=k/20200101/eu-west-1/lambda/x"}
        headers = {**signed, "X-Amz-Invocation-Type": "Sideways"}
        async with http.post(path, headers=headers) as answer:
            assert answer.status == 400
            assert answer.headers["x-amzn-ErrorType"] == "InvalidParameterValueException"


# Asynchronous events ------------------------------------------------------------------------------


async def test_failed_events_are_retried(valkey: Valkey, tmp_path: Path) -> None:
    config = EventInvokeConfig(maximum_retry_attempts=2, retry_delays=(0.01, 0.02))
    async with loopback(valkey, event_invoke_config=config) as running, sdk(running.url) as caller:
        await caller.send({"do": "touch and raise", "path": str(tmp_path / "x")})
        await until(lambda: running.pool.counters.discarded == 1)
        assert (tmp_path / "x").read_text() == "xxx"
        assert running.pool.counters.deliveries == 3
        assert running.pool.counters.invocations == 1


async def test_old_events_are_discarded(valkey: Valkey, tmp_path: Path) -> None:
    config = EventInvokeConfig(maximum_event_age=0.2)
    async with loopback(valkey, event_invoke_config=config) as running, sdk(running.url) as caller:
        await caller.send({"do": "sleep", "seconds": 0.5})
        await caller.send({"do": "touch", "path": str(tmp_path / "x")})
        await until(lambda: running.pool.counters.discarded == 1)
        assert await caller.value([1]) == [1]
        assert not (tmp_path / "x").exists()


async def test_events_run_one_at_a_time_in_each_sandbox(valkey: Valkey, tmp_path: Path) -> None:
    async with loopback(valkey, concurrency=2) as running, sdk(running.url) as caller:
        blocker = tmp_path / "go"
        for _ in range(5):
            await caller.send({"do": "wait for", "path": str(blocker)})
        await until(lambda: running.pool.counters.deliveries == 2)
        assert len(running.pool.function.queue) == 3
        blocker.touch()
        await until(lambda: running.pool.counters.deliveries == 5)
        assert "running=" in repr(running)


async def test_when_a_sandbox_was_busy_with_what(valkey: Valkey, tmp_path: Path) -> None:
    go = tmp_path / "go"
    async with loopback(valkey) as running, sdk(running.url) as caller:
        pool = running.pool
        waiting = await caller.send({"do": "wait for", "path": str(go)})
        await until(lambda: len(pool.served()) == 1)
        (first,) = pool.served()
        assert (first.sandbox, first.request_id, first.end) == (0, waiting, None)
        exiting = await caller.send({"do": "exit", "code": 3})
        go.touch()
        await until(lambda: pool.counters.errors == 1)
        first, second = pool.served()
        assert (first.request_id, second.request_id) == (waiting, exiting)
        assert first.end is not None
        assert second.end is not None
        assert first.begin <= first.end <= second.begin <= second.end


async def test_a_client_that_hangs_up_disturbs_nobody(running: Loopback, caller: Caller) -> None:
    call = asyncio.create_task(caller.call({"do": "sleep", "seconds": 0.2}))
    await until(lambda: running.pool.counters.deliveries == 1)
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await call
    await until(lambda: not running.pool.deliveries)
    assert await caller.value([2]) == [2]
