"""What executors share, at random: any policy would do something like it, less often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import TypeVar

from wukong_async.engine import Engine, State

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

    @classmethod
    def random(cls, rng: Random) -> Policy:
        if rng.random() < 0.2:
            return cls()
        choices = (0.0, 0.05, 0.3)
        arrive, probe, offer = (rng.choice(choices) for _ in range(3))
        hand_over, cut_short = rng.choice((0.0, 0.0, 0.01, 0.05)), rng.choice((0.0, 0.0, 0.1))
        return cls(arrive, probe, offer, hand_over, cut_short)

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
