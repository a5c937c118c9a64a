"""Random small graphs, numbered by the real planner, with a function to compute them by."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from wukong_async.plan import Plan, make_plan
from wukong_async.protocol import TaskSpec

WIDE = 0.0005
"""How many graphs are a hundred times as large as the others: their runs take as much longer."""


@dataclass(frozen=True)
class Workload:
    """A plan, what each task yields, and what an executor may know of it."""

    plan: Plan
    specs: list[TaskSpec]
    """Those of the plan, with the literals that tasks read."""
    literals: dict[int, int]
    large: frozenset[int]
    """Tasks whose output does not fit into a commit."""
    failing: int | None

    def compute(self, task: int, values: Mapping[int, int]) -> int:
        """The output of a task: any function of its inputs that depends on all of them."""
        spec = self.specs[task]
        read = sorted((*spec.inputs, *spec.literals))
        return hash((task, tuple(values[n] for n in read))) & 0xFFFFFFFF

    def expected(self) -> dict[int, int]:
        """Every task's output, computed in order."""
        values = dict(self.literals)
        for task in range(len(self.plan)):
            values[task] = self.compute(task, values)
        return {task: values[task] for task in range(len(self.plan))}


def random_workload(rng: random.Random) -> Workload:
    dependencies = (_wide if rng.random() < WIDE else rng.choice(SHAPES))(rng)
    sinks = set(dependencies) - {d for ds in dependencies.values() for d in ds}
    outputs = sorted(sinks)
    # Results that other tasks read as well.
    outputs += [k for k in dependencies if k not in sinks and rng.random() < 0.1]
    plan = make_plan(dependencies, outputs)
    literals = {-1 - i: rng.randrange(1000) for i in range(rng.choice((0, 0, 1, 3)))}
    specs = [
        spec._replace(literals=tuple(n for n in literals if rng.random() < 0.3))
        for spec in plan.specs
    ]
    large = frozenset(n for n in range(len(plan)) if rng.random() < 0.3)
    failing = rng.randrange(len(plan)) if rng.random() < 0.05 else None
    return Workload(plan, specs, literals, large, failing)


def _wide(rng: random.Random) -> dict[int, list[int]]:
    """A thousand tasks between one and one, or between nothing and one, or one and nothing."""
    width = rng.choice((200, 1000))
    head, tail = rng.choice(((1, 1), (1, 0), (0, 1)))
    graph = {i: [0] * head for i in range(head, head + width)}
    if head:
        graph = {0: [], **graph}
    if tail:
        graph[head + width] = list(range(head, head + width))
    return graph


def _chain(rng: random.Random) -> dict[int, list[int]]:
    return {i: [i - 1] if i else [] for i in range(rng.randint(1, 12))}


def _fan_in(rng: random.Random) -> dict[int, list[int]]:
    width = rng.randint(2, 12)
    return {**{i: [] for i in range(width)}, width: list(range(width))}


def _fan_out(rng: random.Random) -> dict[int, list[int]]:
    return {0: [], **{i: [0] for i in range(1, rng.randint(2, 12))}}


def _fork_join(rng: random.Random) -> dict[int, list[int]]:
    graph: dict[int, list[int]] = {0: []}
    last = 0
    for _ in range(rng.randint(1, 3)):
        width = rng.randint(2, 6)
        middle = list(range(last + 1, last + 1 + width))
        graph.update({i: [last] for i in middle})
        last = middle[-1] + 1
        graph[last] = middle
    return graph


def _tree(rng: random.Random) -> dict[int, list[int]]:
    level = list(range(2 ** rng.randint(1, 4)))
    graph: dict[int, list[int]] = {i: [] for i in level}
    while len(level) > 1:
        above = [len(graph) + i for i in range(len(level) // 2)]
        graph.update({n: level[2 * i : 2 * i + 2] for i, n in enumerate(above)})
        level = above
    return graph


def _layers(rng: random.Random) -> dict[int, list[int]]:
    graph: dict[int, list[int]] = {}
    for _ in range(rng.randint(1, 5)):
        known = list(graph)
        for _ in range(rng.randint(1, 5)):
            count = min(len(known), rng.randint(0, 3))
            graph[len(graph)] = sorted(rng.sample(known, count))
    return graph


def _single(rng: random.Random) -> dict[int, list[int]]:
    return {i: [] for i in range(rng.choice((1, 1, 5)))}


SHAPES = (_chain, _fan_in, _fan_out, _fork_join, _tree, _layers, _layers, _single)
