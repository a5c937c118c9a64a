"""The platform that `python -m benchmarks scale` models, without any process or clock."""

from __future__ import annotations

import math

import pytest

from benchmarks.cloud import Environments, Platform

STEADY = Platform(executors=4, latency=1.0, cold=2.0, jitter=0.0, burst=2, refill=0.5)


def begun(environments: Environments[str], now: float) -> list[tuple[str, int, float]]:
    return environments.begin(now)


def invoked(platform: Platform, *events: str) -> Environments[str]:
    environments: Environments[str] = Environments(platform)
    for event in events:
        environments.invoke(event, 0.0)
    return environments


def test_an_event_takes_its_time() -> None:
    environments = invoked(STEADY, "a")
    assert environments.next_time(0.0) == 1.0
    assert begun(environments, 0.9) == []
    assert begun(environments, 1.0) == [("a", 0, 2.0)]


def test_a_warm_environment_starts_at_once_and_the_last_used_is_taken() -> None:
    environments = invoked(STEADY, "a", "b")
    begun(environments, 1.0)
    environments.end(1)
    environments.end(0)
    environments.invoke("c", 5.0)
    assert begun(environments, 6.0) == [("c", 0, 0.0)]
    assert environments.cold_starts == 2


def test_the_ramp_adds_environments_after_the_burst() -> None:
    environments = invoked(STEADY, "a", "b", "c", "d")
    assert [event for event, _, _ in begun(environments, 1.0)] == ["a", "b"]
    assert environments.next_time(1.0) == 3.0
    assert begun(environments, 2.9) == []
    assert begun(environments, 3.0) == [("c", 2, 2.0)]
    assert environments.next_time(3.0) == 5.0
    assert begun(environments, 5.0) == [("d", 3, 2.0)]


def test_tokens_are_no_more_than_the_burst() -> None:
    environments: Environments[str] = Environments(STEADY)
    for event in "abc":
        environments.invoke(event, 100.0)
    assert len(begun(environments, 101.0)) == 2


def test_no_more_run_than_the_limit_and_what_waits_begins_when_one_ends() -> None:
    platform = Platform(executors=2, latency=0.0, jitter=0.0)
    environments = invoked(platform, "a", "b", "c")
    assert len(begun(environments, 0.0)) == 2
    assert environments.full
    assert environments.next_time(0.0) == math.inf
    environments.end(1)
    assert begun(environments, 9.0) == [("c", 1, 0.0)]
    assert not environments.quiet
    environments.end(0)
    environments.end(1)
    assert environments.quiet


def test_jitter_is_the_seeds() -> None:
    def dues(seed: int) -> list[float]:
        environments = invoked(Platform(seed=seed), "a", "b", "c")
        found = []
        while not environments.quiet:
            found.append(environments.next_time(0.0))
            for _, place, _ in environments.begin(found[-1]):
                environments.end(place)
        return found

    assert dues(1) == dues(1) != dues(2)
    assert all(0.03 <= due <= 0.07 for due in dues(1))


@pytest.mark.parametrize(
    ("executors", "tasks", "path", "seconds"),
    [
        (1, 3, 1, 3.0 + 3 * 1.0),  # One does all.
        (2, 4, 1, 3.0 + 2 * 1.0),
        (2, 3, 3, 3.0 + 3 * 1.0),  # The path is longer.
        (3, 3, 1, 3.0 + 2 * 1.0),  # The third environment would be there after another is free.
        (4, 6, 1, 3.0 + 3 * 1.0),
    ],
)
def test_the_ideal(executors: int, tasks: int, path: int, seconds: float) -> None:
    platform = Platform(executors=executors, latency=1.0, cold=2.0, burst=2, refill=0.5)
    assert platform.ideal(tasks, 1.0, path) == seconds
