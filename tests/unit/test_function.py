"""What the loopback Lambda does with requests, without any process or clock."""

from __future__ import annotations

from typing import Any

import pytest

from wukong_async.errors import ConfigError
from wukong_async.local.function import EventInvokeConfig, Function, InvocationType, Request


def event(name: str, received: float = 0.0) -> Request:
    return Request(name, b"{}", InvocationType.EVENT, received)


def call(name: str) -> Request:
    return Request(name, b"{}", InvocationType.REQUEST_RESPONSE, 0.0)


def assigned(function: Function, now: float = 0.0) -> list[tuple[int, str]]:
    return [(sandbox, request.request_id) for sandbox, request in function.assign(now)[0]]


def test_events_queue_in_order_until_a_sandbox_is_free() -> None:
    function = Function(2)
    for name in "abc":
        assert function.admit(event(name))
    assert assigned(function) == []
    function.ready(0)
    function.ready(1)
    assert assigned(function) == [(1, "a"), (0, "b")]
    function.ended(1, failed=False, now=1.0)
    function.ready(1)
    assert assigned(function) == [(1, "c")]


def test_synchronous_calls_are_throttled_at_the_limit_and_events_are_not() -> None:
    function = Function(1)
    assert function.admit(call("a"))
    assert not function.admit(call("b"))
    assert function.admit(event("c"))
    function.ready(0)
    assert assigned(function) == [(0, "a")]
    assert not function.admit(call("d"))
    function.ended(0, failed=False, now=0.0)
    assert function.admit(call("e"))


def test_the_warmest_sandbox_is_used_first() -> None:
    function = Function(2)
    function.ready(0)
    function.ready(1)
    function.admit(event("a"))
    assert assigned(function) == [(1, "a")]
    function.ended(1, failed=False, now=0.0)
    function.ready(1)
    function.admit(event("b"))
    assert assigned(function) == [(1, "b")]


def test_old_events_are_discarded() -> None:
    function = Function(1, EventInvokeConfig(maximum_event_age=60))
    function.admit(event("old", received=0.0))
    function.admit(event("new", received=50.0))
    function.ready(0)
    pairs, expired = function.assign(61.0)
    assert [request.request_id for request in expired] == ["old"]
    assert [request.request_id for _, request in pairs] == ["new"]


def test_failed_events_are_retried_after_one_and_two_minutes() -> None:
    function = Function(1, EventInvokeConfig(maximum_retry_attempts=2))
    function.admit(event("a"))
    now = 0.0
    for delay in (60.0, 120.0):
        function.ready(0)
        assert assigned(function, now) == [(0, "a")]
        request, again = function.ended(0, failed=True, now=now)
        assert request is not None
        assert again
        assert function.next_due() == now + delay
        function.ready(0)
        assert assigned(function, now + delay - 1) == []
        function.idle.clear()
        now += delay
    function.ready(0)
    assert assigned(function, now) == [(0, "a")]
    _, again = function.ended(0, failed=True, now=now)
    assert not again


def test_a_failed_synchronous_call_is_its_callers_business() -> None:
    function = Function(1, EventInvokeConfig(maximum_retry_attempts=2))
    function.admit(call("a"))
    function.ready(0)
    function.assign(0.0)
    _, again = function.ended(0, failed=True, now=0.0)
    assert not again


def test_a_sandbox_that_is_gone_gets_nothing() -> None:
    function = Function(1)
    function.ready(0)
    function.lost(0)
    function.lost(0)
    function.admit(event("a"))
    assert assigned(function) == []
    refused = function.refuse()
    assert refused is not None
    assert refused.request_id == "a"
    assert function.refuse() is None


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("maximum_retry_attempts", [3, -1, True, 1.0, "1", NAN, None]),
        ("maximum_event_age", [0, -1, True, "60", NAN, INF, None, 10**400]),
        ("retry_delays", [1, (1,), (1, 2, 3), (1, "2"), (1, -1), (NAN, 1), (1, INF), "12", None]),
    ],
)
def test_limits_of_the_event_invoke_config(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=rf"{name} must be .*, not "):
            EventInvokeConfig(**{name: value})


def test_events_may_be_retried_at_once() -> None:
    assert EventInvokeConfig(maximum_retry_attempts=2, retry_delays=(0, 0.5)).retry_delays[0] == 0
