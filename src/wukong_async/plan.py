"""The plan of a job: tasks numbered in one depth-first order, leaves in groups.

Pure and without Dask: keys are opaque, dependencies are given. Everything is O(tasks + edges) in
time and memory, and nothing recurses.

The numbering is the path generation: dependencies come first and each task follows the last of
its inputs as closely as possible, so a run of consecutive numbers is a path that one executor can
follow without asking anybody.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import sub
from typing import Any, TypeAlias, TypedDict, overload

from wukong_async.errors import CycleError
from wukong_async.protocol import TaskSpec

Key: TypeAlias = Any
"""Anything hashable. (`Hashable` itself would not do: mappings are invariant in their keys.)"""


NUMBERS = "q"
"""The type code of arrays of tasks and edges."""
SOME = 256
"""Tasks that are made at once."""


class Columns(TypedDict):
    """What a plan has of some consecutive tasks."""

    inputs: list[int]
    """How many distinct inputs each has,"""
    counts: list[int]
    """and how many consumers."""
    consumers: list[int]
    """Of all of them, one after the other;"""
    degrees: list[int]
    """and the in-degree of each consumer."""


@dataclass(frozen=True, slots=True)
class Specs(Sequence[TaskSpec]):
    """The tasks of a plan, made when they are asked for: each would take as much as its node."""

    inputs: array[int]
    """Of all tasks, one after the other;"""
    first_inputs: array[int]
    """where those of each begin, and the last ones end."""
    degrees: array[int]
    consumers: array[int]
    first_edges: array[int]
    requested: frozenset[int]

    def __len__(self) -> int:
        return len(self.first_edges) - 1

    @overload
    def __getitem__(self, index: int) -> TaskSpec: ...

    @overload
    def __getitem__(self, index: slice) -> list[TaskSpec]: ...

    def __getitem__(self, index: int | slice) -> TaskSpec | list[TaskSpec]:
        numbers = range(len(self))[index]
        return self._made([numbers])[0] if isinstance(numbers, int) else self._made(numbers)

    def __iter__(self) -> Iterator[TaskSpec]:
        for first in range(0, len(self), SOME):
            yield from self[first : first + SOME]

    def columns(self, first: int, last: int) -> Columns:
        """What a block has of the tasks from `first` to before `last`."""
        edges, degrees = self.first_edges[first : last + 1], self.degrees
        consumers = self.consumers[edges[0] : edges[-1]].tolist()
        return {
            "inputs": degrees[first:last].tolist(),
            "counts": list(map(sub, edges[1:], edges)),
            "consumers": consumers,
            "degrees": list(map(degrees.__getitem__, consumers)),
        }

    def _made(self, numbers: Iterable[int]) -> list[TaskSpec]:
        inputs, firsts, degrees = self.inputs, self.first_inputs, self.degrees
        all_consumers, edges, requested = self.consumers, self.first_edges, self.requested
        made = []
        for number in numbers:
            edge, last = edges[number], edges[number + 1]
            consumers: tuple[int, ...]
            their: tuple[int, ...]
            if last - edge == 1:
                consumer = all_consumers[edge]
                consumers, their = (consumer,), (degrees[consumer],)
            else:
                consumers = tuple(all_consumers[edge:last])
                their = tuple([degrees[c] for c in consumers])
            mine = tuple(inputs[firsts[number] : firsts[number + 1]])
            made.append(TaskSpec(number, mine, consumers, their, number in requested, (), edge))
        return made


@dataclass(frozen=True, slots=True)
class Plan:
    """`keys[n]` and `specs[n]` belong to task number n."""

    keys: list[Key]
    specs: Sequence[TaskSpec]
    numbers: dict[Key, int]
    requested: tuple[int, ...]
    leaves: list[int]
    """Tasks without inputs, in plan order."""

    def __len__(self) -> int:
        return len(self.keys)

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
    inputs = array(NUMBERS)
    first_inputs = array(NUMBERS, [0])
    number_of = numbers.__getitem__
    for key in keys:
        inputs.extend(map(number_of, dependencies[key]))
        first_inputs.append(len(inputs))
    requested = {numbers[key] for key in outputs}
    consumers, first_edges = _turned(inputs, first_inputs)
    degrees = array(NUMBERS, [end - first for first, end in pairwise(first_inputs)])
    specs = Specs(inputs, first_inputs, degrees, consumers, first_edges, frozenset(requested))
    leaves = [number for number, degree in enumerate(degrees) if not degree]
    return Plan(keys, specs, numbers, tuple(sorted(requested)), leaves)


def _turned(inputs: array[int], first_inputs: array[int]) -> tuple[array[int], array[int]]:
    """The consumers of all tasks, one after the other, and where those of each begin."""
    degrees = array(NUMBERS, bytes(8 * len(first_inputs)))
    for producer in inputs:
        degrees[producer + 1] += 1
    first_edges = array(NUMBERS, accumulate(degrees))
    consumers = array(NUMBERS, bytes(8 * len(inputs)))
    free = first_edges[:]
    for number, (first, end) in enumerate(pairwise(first_inputs)):
        for producer in inputs[first:end]:
            consumers[free[producer]] = number
            free[producer] += 1
    return consumers, first_edges


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
