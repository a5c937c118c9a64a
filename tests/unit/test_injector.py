"""What goes wrong on purpose, and how often."""

from __future__ import annotations

from typing import Any

import pytest

from wukong_async.errors import ConfigError
from wukong_async.local.faults import AGAIN_WITHIN, KINDS, Faults, Injector

ROUNDS = 1000


def draw(injector: Injector) -> list[tuple[bool, tuple[float, ...], float | None]]:
    return [
        (injector.throttles(), tuple(injector.deliveries()), injector.kill_after())
        for _ in range(ROUNDS)
    ]


def test_nothing_goes_wrong_by_default() -> None:
    injector = Injector(Faults())
    assert set(draw(injector)) == {(False, (0.0,), None)}
    assert injector.injected == dict.fromkeys(KINDS, 0)


def test_a_seed_says_what_goes_wrong() -> None:
    often: dict[str, Any] = dict.fromkeys(KINDS, 0.5)
    first, again, other = (draw(Injector(Faults(seed=seed, **often))) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_one_kind_does_not_shift_another() -> None:
    alone, beside = Faults(throttle=0.3), Faults(throttle=0.3, drop=0.7, kill=0.1)
    refused = [[round_[0] for round_ in draw(Injector(faults))] for faults in (alone, beside)]
    assert refused[0] == refused[1]


@pytest.mark.parametrize("kind", ["duplicate", "drop", "delay", "throttle"])
def test_faults_are_as_frequent_as_asked_for_and_counted(kind: str) -> None:
    only: dict[str, Any] = {kind: 0.25}
    injector = Injector(Faults(**only))
    draw(injector)
    assert 200 < injector.injected[kind] < 300
    assert sum(injector.injected.values()) == injector.injected[kind]


def test_a_dropped_event_is_never_delivered() -> None:
    assert Injector(Faults(drop=1, duplicate=1, delay=1)).deliveries() == []


def test_a_late_event_is_late_within_its_bound() -> None:
    injector = Injector(Faults(delay=1, delay_seconds=2))
    late = [delay for _, delays, _ in draw(injector) for delay in delays]
    assert len(late) == ROUNDS
    assert 0 < min(late) < 0.1
    assert 1.9 < max(late) < 2


def test_a_duplicate_follows_its_event_even_a_late_one() -> None:
    for faults in (Faults(duplicate=1), Faults(duplicate=1, delay=1)):
        for _, (first, second), _ in draw(Injector(faults)):
            assert first < second < first + AGAIN_WITHIN


def test_a_kill_has_its_moment_and_is_not_counted_before_it() -> None:
    injector = Injector(Faults(kill=0.5, kill_within=3))
    moments = [moment for *_, moment in draw(injector) if moment is not None]
    assert 450 < len(moments) < 550
    assert max(moments) < 3
    assert injector.injected["kill"] == 0


NAN = float("nan")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("value", [-0.1, 1.1, NAN, True, "1", None])
def test_probabilities_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a probability from 0 to 1, not "):
        Faults(**{name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("seed", [-1, 1.0, True, None]),
        ("delay_seconds", [0, -1, NAN, "1"]),
        ("kill_within", [0, -1, NAN, "1"]),
    ],
)
def test_other_fields_are_checked(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"{name} must be "):
            Faults(**{name: value})
