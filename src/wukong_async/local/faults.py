"""Misbehaviour of the loopback Lambda on purpose: what Lambda does rarely, as often as you like.

Pure: it draws what is to go wrong and carries nothing out. Each kind of fault has a random
sequence of its own, so that a fault of one kind does not shift those of another.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from wukong_async.errors import ConfigError
from wukong_async.local.function import check_int, check_seconds

AGAIN_WITHIN = 0.5
"""Seconds within which a duplicate follows its event: often while that is still worked on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How a `LocalCluster` misbehaves: probabilities from 0 to 1, each for one opportunity.

    The same requests in the same order meet the same faults. A synchronous call can only be
    throttled and killed; a dry run meets no faults.

    Raises
    ------
    ConfigError
        For a value out of range, with the field's name.
    """

    seed: int = 0
    duplicate: float = 0.0
    """That an asynchronous event is delivered a second time."""
    drop: float = 0.0
    """That an asynchronous event is accepted and never delivered."""
    delay: float = 0.0
    """That an asynchronous event is delivered late."""
    throttle: float = 0.0
    """That a call is answered 429, TooManyRequestsException."""
    kill: float = 0.0
    """That a delivery is given a moment at which its sandbox is killed; it may be over by then."""
    delay_seconds: float = 5.0
    """Longest delay."""
    kill_within: float = 1.0
    """Seconds from the delivery to the latest such moment."""

    def __post_init__(self) -> None:
        check_int("seed", self.seed, 0)
        for kind in KINDS:
            _check_probability(kind, getattr(self, kind))
        check_seconds("delay_seconds", self.delay_seconds)
        check_seconds("kill_within", self.kill_within)


KINDS = ("duplicate", "drop", "delay", "throttle", "kill")


class Injector:
    """Draws what goes wrong, one opportunity after the other."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.injected = dict.fromkeys(KINDS, 0)
        """Faults by kind. Kills are counted by whoever kills: a delivery may be over before."""
        self._random = {kind: random.Random(f"{faults.seed} {kind}") for kind in KINDS}

    def throttles(self) -> bool:
        """Whether a call is answered 429."""
        return self._happens("throttle")

    def deliveries(self) -> list[float]:
        """When an accepted event is delivered, in seconds from now: once each."""
        if self._happens("drop"):
            return []
        first = self._within("delay", self.faults.delay_seconds) if self._happens("delay") else 0.0
        if self._happens("duplicate"):
            return [first, first + self._within("duplicate", AGAIN_WITHIN)]
        return [first]

    def kill_after(self) -> float | None:
        """How long after its delivery began a sandbox is killed, in seconds."""
        if self._random["kill"].random() >= self.faults.kill:
            return None
        return self._within("kill", self.faults.kill_within)

    def _happens(self, kind: str) -> bool:
        happens: bool = self._random[kind].random() < getattr(self.faults, kind)
        self.injected[kind] += happens
        return happens

    def _within(self, kind: str, seconds: float) -> float:
        return self._random[kind].uniform(0, seconds)


def _check_probability(name: str, value: object) -> None:
    # Written so that nan is no probability.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigError(f"{name} must be a probability from 0 to 1, not {value!r}.")
