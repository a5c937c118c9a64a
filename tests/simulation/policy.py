"""What executors share, at random: any policy would do something like it, less often."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import TypeVar

from wukong_async.engine import Engine, State
from wukong_async.protocol import TaskSpec

T = TypeVar("T")


@dataclass
class Policy:
    """How often executors share what they have, each a probability per opportunity."""

    arrive: float = 0.0
    probe: float = 0.0
    offer: float = 0.0
    hand_over: float = 0.0
    cut_short: float = 0.0
    """How often one hands over while a task uses up what was made here."""
    spill: float = 0.0
    """How often one writes and forgets all that it holds."""
    ask: float = 0.0
    """How often one commits nothing, to hear what is new."""
    take_back: float = 0.0
    """How often what is behind a running task is made ready again."""
    last: float = 0.0
    """How often what an input made here waits for is told, or probed, with nothing else to do."""
    known: float = 1.0
    """How often it is known how long a task takes: else it ends a Run."""
    urgent: float = 0.0
    """How often somebody is said to wait for a task of the frontier."""

    def whims(self, rng: Random) -> None:
        """Choose the rest, in a way that leaves other choices of the seed as they are."""
        if self.arrive or self.probe or self.offer:
            self.spill, self.ask = rng.choice((0.0, 0.0, 0.02)), rng.choice((0.0, 0.0, 0.02))
            self.last, self.known = rng.choice((0.0, 0.3)), rng.choice((1.0, 1.0, 0.7))
        self.take_back = rng.choice((0.0, 0.3, 1.0))
        if self.offer:
            self.urgent = rng.choice((0.0, 0.3))

    @classmethod
    def random(cls, rng: Random) -> Policy:
        if rng.random() < 0.2:
            return cls()
        choices = (0.0, 0.05, 0.3)
        arrive, probe, offer = (rng.choice(choices) for _ in range(3))
        hand_over, cut_short = rng.choice((0.0, 0.0, 0.01, 0.05)), rng.choice((0.0, 0.0, 0.1))
        return cls(arrive, probe, offer, hand_over, cut_short)

    def at_whim(self, engine: Engine, rng: Random) -> None:
        """What an executor may do beside sharing."""
        if engine.state is not State.WORK:
            return
        if rng.random() < self.spill:
            engine.spill()
        elif rng.random() < self.ask:
            engine.share(ask=True)

    def share(self, engine: Engine, rng: Random) -> None:
        """Have an executor say something to others, if it can and luck will have it."""
        if engine.state is not State.WORK or not (self.arrive or self.probe or self.offer):
            return

        def some(items: Sequence[T], chance: float) -> list[T]:
            return [item for item in items if rng.random() < chance]

        waiting = list(engine.pending) if self.arrive or self.probe else []
        probe = some(waiting, self.probe)
        arrive = [c for c in some(waiting, self.arrive) if c not in probe]
        ready = some(engine.offerable(), self.offer) if self.offer else []
        rng.shuffle(ready)
        cuts = sorted(rng.randint(0, len(ready)) for _ in range(rng.randint(0, 2)))
        engine.share(arrive, probe, [ready[a:b] for a, b in pairwise([0, *cuts, len(ready)])])


@dataclass
class Guess:
    """What an engine is told of tasks: anything."""

    policy: Policy
    rng: Random

    def seconds_of(self, task: TaskSpec) -> float:
        return 0.0 if self.rng.random() < self.policy.known else math.inf

    def bytes_of(self, task: TaskSpec) -> float:
        return 0.0

    def may_read_ahead(self) -> bool:
        return self.policy.known == 1.0 or self.rng.random() < self.policy.known

    def urgent(self, engine: Engine, tasks: Sequence[int]) -> Collection[int]:
        urgent = self.policy.urgent
        return {task for task in tasks if urgent and self.rng.random() < urgent}

    def meanwhile(self, engine: Engine, size: float) -> tuple[Iterable[int], Iterable[int]]:
        return self.at_last(engine.pending)

    def at_last(
        self, pending: Mapping[int, Sequence[tuple[int, int]]]
    ) -> tuple[Iterable[int], Iterable[int]]:
        tell: list[int] = []
        probe: list[int] = []
        for consumer in pending:
            if self.rng.random() < self.policy.last:
                (tell if self.rng.random() < 0.5 else probe).append(consumer)
        return tell, probe
