"""The log of a request, from a Logs API that answers in pages, refuses, or is silent."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from wukong_async import LocalCluster, invoker
from wukong_async.config import Settings
from wukong_async.invoker import Invoker

HOST = "127.0.0.1"
Answer = Callable[[dict[str, Any]], dict[str, Any]]


@contextlib.asynccontextmanager
async def logs_api(answer: Answer, status: int = 200) -> AsyncIterator[Settings]:
    """What reaches an API that answers FilterLogEvents."""

    async def respond(http: web.BaseRequest) -> web.Response:
        assert http.headers["X-Amz-Target"] == "Logs_20140328.FilterLogEvents"
        body = json.dumps(answer(json.loads(await http.read())))
        return web.Response(text=body, status=status, content_type="application/x-amz-json-1.1")

    runner = web.ServerRunner(web.Server(respond))
    await runner.setup()
    try:
        await web.TCPSite(runner, HOST, 0).start()
        address: Any = runner.addresses[0]
        arn = "arn:aws:lambda:eu-west-1:000000000000:function:f:alias"
        yield Settings(endpoint_url=f"http://{HOST}:{address[1]}", function_name=arn)
    finally:
        await runner.cleanup()


def event(time: int, message: str, stream: str = "s") -> dict[str, Any]:
    return {"timestamp": time, "message": message, "logStreamName": stream}


async def test_what_tasks_have_written_is_found_between_the_lines_that_name_the_request() -> None:
    asked: list[dict[str, Any]] = []

    def answer(wanted: dict[str, Any]) -> dict[str, Any]:
        asked.append(wanted)
        if "filterPattern" not in wanted:
            return {"events": [event(5, "START r"), event(6, "a task"), event(7, "END r\n")]}
        if "nextToken" not in wanted:
            return {"events": [], "nextToken": "more"}
        return {"events": [event(1, "START r", "other"), event(5, "START r"), event(7, "END r")]}

    async with logs_api(answer) as settings, Invoker(settings) as caller:
        assert await caller.log_of("r") == "START r\na task\nEND r\n"
    assert {wanted["logGroupName"] for wanted in asked} == {"/aws/lambda/f"}
    assert [wanted.get("filterPattern") for wanted in asked] == ['"r"', '"r"', None]
    last = asked[-1]
    assert (last["logStreamNames"], last["startTime"], last["endTime"]) == (["s"], 5, 7)


async def test_of_an_endless_log_there_are_the_lines_that_name_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(invoker, "MOST_LOG", 13)
    pages = 0

    def answer(wanted: dict[str, Any]) -> dict[str, Any]:
        nonlocal pages
        if "filterPattern" in wanted:
            return {"events": [event(5, "START r"), event(7, "ERROR r"), event(7, "END r")]}
        pages += 1
        return {"events": [event(5, "a task")], "nextToken": "more"}

    async with logs_api(answer) as settings, Invoker(settings) as caller:
        assert await caller.log_of("r") == "ERROR r\nEND r\n"[-13:]
    assert pages == invoker.LOG_PAGES


async def test_a_request_that_nobody_knows_has_no_log() -> None:
    async with logs_api(lambda _: {"events": []}) as settings, Invoker(settings) as caller:
        assert await caller.log_of("r") == ""


async def test_a_log_that_may_not_be_read_is_none() -> None:
    refusal = {"__type": "AccessDeniedException", "message": "no"}
    async with logs_api(lambda _: refusal, 400) as settings, Invoker(settings) as caller:
        assert await caller.log_of("r") == ""


async def test_an_api_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invoker, "LOG_TIMEOUT", 0.01)
    accepted: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: accepted.append(writer), HOST, 0)
    async with server:
        settings = Settings(endpoint_url=f"http://{HOST}:{server.sockets[0].getsockname()[1]}")
        async with Invoker(settings) as caller, asyncio.timeout(20):
            assert await caller.log_of("r") == ""
        for writer in accepted:
            writer.close()


async def test_the_loopback_has_the_log_of_a_request(cluster: LocalCluster) -> None:
    settings = Settings.load(cluster.settings)
    async with Invoker(settings) as caller:
        answer = await caller._call(Payload=b'"no invocation"')
        answer["Payload"].close()
        rid = answer["ResponseMetadata"]["RequestId"]
        log = await caller.log_of(rid)
        assert log.startswith(f"START RequestId: {rid} ")
        assert log == cluster.log(rid)
        assert "Traceback" in log, "which does not name the request"
        assert await caller.log_of("another") == ""
    async with Invoker(settings.replace(function_name="other")) as caller:
        assert await caller.log_of(rid) == ""
