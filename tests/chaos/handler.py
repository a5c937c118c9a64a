"""The function's handler, with executors that share what they have at random.

Set as the handler of the sandboxes: so the whole protocol is at work on real processes, whatever
policy the engine may follow by itself.
"""

from __future__ import annotations

import random
from typing import Any

from lambda_handler import handler
from tests.simulation.policy import Policy
from wukong_async.engine import Action, Engine
from wukong_async.executor import incarnation

__all__ = ["handler"]

POLICY = Policy(arrive=0.1, probe=0.1, offer=0.1, hand_over=0.002, spill=0.01, ask=0.01)


class SharingEngine(Engine):
    """Whenever it is asked what to do, it may have something to share."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._rng = random.Random()

    def next_actions(self) -> list[Action]:
        POLICY.share(self, self._rng)
        POLICY.at_whim(self, self._rng)
        if self._rng.random() < POLICY.hand_over:
            self.hand_over()
        return super().next_actions()


vars(incarnation)["Engine"] = SharingEngine
