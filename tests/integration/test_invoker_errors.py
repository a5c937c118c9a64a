"""What the invoker says about settings that AWS's client refuses, and about Lambda's refusals."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import botocore
import pytest
from botocore.exceptions import ClientError

from wukong_async.config import Settings
from wukong_async.errors import ConfigError, InvocationError
from wukong_async.invoker import THROTTLED, Invoker


class Body:
    def __init__(self, data: bytes) -> None:
        self.data = data

    async def read(self) -> bytes:
        return self.data


@pytest.mark.parametrize(
    ("settings", "variables", "says"),
    [
        ({"region": "us east"}, {}, "wukong.region or AWS_REGION: .*'us east'"),
        ({}, {"AWS_REGION": "us east"}, "wukong.region or AWS_REGION: .*'us east'"),
        ({"endpoint_url": "nonsense"}, {}, "wukong.endpoint_url: 'nonsense' is no http"),
        ({"endpoint_url": "http://"}, {}, "wukong.endpoint_url: 'http://' is no http"),
        ({"endpoint_url": "http://[::1"}, {}, r"wukong.endpoint_url: 'http://\[::1' is no http"),
        ({"endpoint_url": "http://h:99999"}, {}, "wukong.endpoint_url: 'http://h:99999' is no"),
        ({"endpoint_url": "http://h h"}, {}, "wukong.endpoint_url or .*: .*http://h h"),
        ({}, {"AWS_ENDPOINT_URL_LAMBDA": "nonsense"}, "or AWS_ENDPOINT_URL: .*nonsense"),
        ({}, {"AWS_PROFILE": "nobody"}, "AWS_PROFILE: .*nobody"),
        ({}, {"AWS_CONFIG_FILE": __file__}, "The configuration of AWS: .*test_invoker"),
    ],
)
async def test_what_aws_s_client_refuses_is_named(
    settings: dict[str, str],
    variables: dict[str, str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=says):
        await Invoker(Settings.load(settings)).__aenter__()


def test_all_reasons_to_try_later_are_errors_of_invoke() -> None:
    folder = Path(botocore.__file__).parent / "data" / "lambda" / "2015-03-31"
    model = json.loads(gzip.decompress((folder / "service-2.json.gz").read_bytes()))
    known = {error["shape"] for error in model["operations"]["Invoke"]["errors"]}
    # The one that no service lists, since all of them may answer with it.
    assert set(THROTTLED) - known == {"ThrottlingException"}


@pytest.mark.parametrize(
    ("code", "harmless"), [("EC2ThrottledException", True), ("KMSDisabledException", False)]
)
async def test_an_event_that_lambda_may_take_later_is_no_error(
    code: str, harmless: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class Client:
        async def invoke(self, **_: object) -> None:
            raise ClientError({"Error": {"Code": code, "Message": "because"}}, "Invoke")

    invoker = Invoker(Settings())
    invoker._client = Client()
    if harmless:
        await invoker.invoke(b"{}")
        assert "an event was not accepted" in caplog.text
    else:
        with pytest.raises(InvocationError, match="because"):
            await invoker.invoke(b"{}")
    assert invoker.sent == 0


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"Payload": Body(b"")}, None),
        ({"Payload": Body(b"<html>")}, None),
        ({"Payload": Body(b"null"), "FunctionError": "Unhandled"}, None),
        ({"Payload": Body(b"[1]")}, None),
        ({"Payload": Body(b"{}")}, None),
        ({"Payload": Body(b'{"error": "no store"}')}, "no store"),
        (
            {
                "Payload": Body(b'{"errorType": "T", "errorMessage": "m"}'),
                "FunctionError": "Unhandled",
            },
            "T: m",
        ),
    ],
)
async def test_a_ping_fails_a_job_only_with_what_the_function_says(
    answer: dict[str, Any], said: str | None
) -> None:
    class Client:
        async def invoke(self, **_: object) -> dict[str, Any]:
            return answer

    invoker = Invoker(Settings())
    invoker._client = Client()
    assert await invoker.ping() == said


async def test_that_there_is_no_room_is_remembered_until_there_is() -> None:
    class Client:
        code = "TooManyRequestsException"

        async def invoke(self, **_: object) -> dict[str, Any]:
            if self.code:
                raise ClientError({"Error": {"Code": self.code, "Message": "no room"}}, "Invoke")
            return {"Payload": Body(b"{}")}

    invoker = Invoker(Settings())
    invoker._client = Client()
    assert await invoker.ping() is None
    assert "no room" in invoker.throttled
    invoker._client.code = ""
    await invoker.invoke(b"{}")
    assert "no room" in invoker.throttled, "an event is only queued"
    assert await invoker.ping() is None
    assert invoker.throttled == ""
