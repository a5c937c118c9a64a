"""The plan of a job: tasks numbered in one depth-first order, leaves in groups.

Pure and without Dask: keys are opaque, dependencies are given. Everything is O(tasks + edges) in
time and memory, and nothing recurses.

The numbering is the path generation: dependencies come first and each task follows the last of
its inputs as closely as possible, so a run of consecutive numbers is a path that one executor can
follow without asking anybody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, repeat
from typing import Any, TypeAlias

from wukong_async.errors import CycleError
from wukong_async.protocol import TaskSpec

Key: TypeAlias = Any
"""Anything hashable. (`Hashable` itself would not do: mappings are invariant in their keys.)"""


@dataclass(frozen=True, slots=True)
class Plan:
    """`keys[n]` and `specs[n]` belong to task number n."""

    keys: list[Key]
    specs: list[TaskSpec]
    numbers: dict[Key, int]
    requested: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def leaves(self) -> list[int]:
        """Tasks without inputs, in plan order."""
        return [spec.number for spec in self.specs if not spec.inputs]

    def groups(self, count: int) -> list[list[int]]:
        """The leaves in at most `count` contiguous groups of nearly the same size."""
        leaves = self.leaves
        count = min(count, len(leaves))
        bounds = [round(len(leaves) * i / count) for i in range(count + 1)] if count else []
        return [leaves[a:b] for a, b in pairwise(bounds)]


def make_plan(dependencies: Mapping[Key, Sequence[Key]], outputs: Iterable[Key]) -> Plan:
    """Number the tasks that `outputs` need.

    Parameters
    ----------
    dependencies
        Task → the distinct tasks that it needs; every task named is a key.
    outputs
        The tasks whose values are wanted.

    Raises
    ------
    CycleError
        Naming the tasks on the cycle.
    """
    outputs = list(dict.fromkeys(outputs))
    numbers = _depth_first(dependencies, outputs)
    keys = list(numbers)
    number_of = numbers.__getitem__
    inputs = [tuple(map(number_of, dependencies[key])) for key in keys]
    readers: list[list[int]] = [[] for _ in keys]
    for number, producers in enumerate(inputs):
        for producer in producers:
            readers[producer].append(number)
    consumers = list(map(tuple, readers))
    degree_of = list(map(len, inputs)).__getitem__
    degrees = [tuple(map(degree_of, each)) for each in consumers]
    requested = {numbers[key] for key in outputs}
    wanted = map(requested.__contains__, range(len(keys)))
    edges = accumulate(map(len, consumers), initial=0)
    columns = (range(len(keys)), inputs, consumers, degrees, wanted, repeat(()), edges)
    specs = list(map(TaskSpec, *columns))
    return Plan(keys, specs, numbers, tuple(sorted(requested)))


def _depth_first(
    dependencies: Mapping[Key, Sequence[Key]], outputs: Iterable[Key]
) -> dict[Key, int]:
    """Each task's number, in order. A task is met twice: on the way down and on the way up."""
    numbers: dict[Key, int] = {}
    entered: set[Key] = set()
    for output in outputs:
        stack = [output]
        while stack:
            key = stack.pop()
            if key in numbers:
                continue
            pending = [d for d in dependencies[key] if d not in numbers]
            if not pending:
                numbers[key] = len(numbers)
            elif key in entered:
                raise CycleError(_describe_cycle(dependencies, key, numbers))
            else:
                entered.add(key)
                stack.append(key)
                pending.reverse()
                stack += pending
    return numbers


def _describe_cycle(
    dependencies: Mapping[Key, Sequence[Key]], start: Key, numbered: Mapping[Key, int]
) -> str:
    """Every unnumbered task below `start` leads back to one: follow the first until one repeats."""
    trail: dict[Key, int] = {}
    key = start
    while key not in trail:
        trail[key] = len(trail)
        key = next(d for d in dependencies[key] if d not in numbered)
    cycle = list(trail)[trail[key] :]
    shown = [repr(k) for k in cycle[:6]] + (["…"] if len(cycle) > 6 else [])
    return f"The graph has a cycle: {' needs '.join([*shown, repr(key)])}."
