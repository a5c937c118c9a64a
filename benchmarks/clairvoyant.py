"""The best schedule that whoever knows everything finds for a case: a bar, not a bound."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.timing import INLINE, OVERHEAD, Case
from wukong_async.protocol import TaskSpec

NEAR = 8
"""Inputs of a task whose executors are considered for it."""


@dataclass(frozen=True)
class Single:
    """All of a case on one executor."""

    seconds: float
    """Until the result is announced."""
    cost: float
    """Seconds of the executor, its start included."""


def single(case: Case) -> Single:
    """What one executor takes that is started alone, takes its record, runs all, and commits."""
    costs = case.place.costs
    results = sum(case.sizes[n] for n in case.plan.requested if case.sizes[n] > INLINE)
    busy = sum(case.seconds) + OVERHEAD * len(case.plan) + results / costs.bandwidth
    cost = costs.start + busy + 2 * costs.round_trip
    return Single(cost + costs.invoke - costs.round_trip / 2, cost)


def clairvoyant(case: Case) -> float:
    """Seconds of the best schedule found by whoever knows everything.

    List scheduling by upward rank on k executors that are all started at once, for several k; each
    task goes where it ends first. What is moved takes a round trip, and the bytes twice.
    """
    plan, costs = case.plan, case.place.costs
    seconds = [each + OVERHEAD for each in case.seconds]
    moving = [
        costs.round_trip + (2 * size / costs.bandwidth if size > INLINE else 0.0)
        for size in case.sizes
    ]
    rank = [0.0] * len(plan)
    for spec in reversed(plan.specs):
        rank[spec.number] = seconds[spec.number] + max(
            (rank[c] for c in spec.consumers), default=0.0
        )
    order = sorted(range(len(plan)), key=lambda n: (-rank[n], n))
    best = math.inf
    count = 1
    while True:
        best = min(best, _listed(plan.specs, order, seconds, moving, count, costs.start))
        if count >= min(case.place.slots, len(plan)):
            return best + costs.round_trip
        count = min(count * 2, case.place.slots)


def _listed(
    specs: Sequence[TaskSpec],
    order: Sequence[int],
    seconds: Sequence[float],
    moving: Sequence[float],
    count: int,
    start: float,
) -> float:
    """Seconds until the last task has run, on `count` executors that begin after `start`."""
    free = [start] * count
    heap = [(start, m) for m in range(count)]
    end: dict[int, float] = {}
    where: dict[int, int] = {}
    for number in order:
        inputs = specs[number].inputs
        while heap[0][0] != free[heap[0][1]]:
            heapq.heapreplace(heap, (free[heap[0][1]], heap[0][1]))
        best = (math.inf, 0)
        for m in dict.fromkeys((*[where[d] for d in inputs[:NEAR]], heap[0][1])):
            ready = max(
                (end[d] + (0.0 if where[d] == m else moving[d]) for d in inputs), default=0.0
            )
            best = min(best, (max(ready, free[m]) + seconds[number], m))
        end[number], where[number] = best
        free[best[1]] = best[0]
    return max(end.values())
