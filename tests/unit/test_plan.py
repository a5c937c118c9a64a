from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

import pytest

from wukong_async.errors import CycleError
from wukong_async.plan import make_plan


def test_dependencies_come_first_and_paths_stay_together() -> None:
    #     e
    #    / \
    #   c   d        depth first: a, c before b, d
    #   |   |
    #   a   b
    plan = make_plan({"e": ["c", "d"], "c": ["a"], "d": ["b"], "a": [], "b": []}, ["e"])
    assert plan.keys == ["a", "c", "b", "d", "e"]
    assert plan.leaves == [0, 2]
    assert plan.requested == (4,)


def test_specs_count_edges_in_both_directions() -> None:
    plan = make_plan({"a": [], "b": ["a"], "c": ["a", "b"]}, ["c", "a"])
    a, b, c = plan.specs
    assert (a.inputs, a.consumers, a.degrees, a.requested) == ((), (1, 2), (1, 2), True)
    assert (b.inputs, b.consumers, b.degrees, b.requested) == ((0,), (2,), (2,), False)
    assert (c.inputs, c.consumers, c.requested) == ((0, 1), (), True)


def test_only_what_is_asked_for_is_planned() -> None:
    plan = make_plan({"a": [], "b": ["a"], "c": ["a"]}, ["b"])
    assert plan.keys == ["a", "b"]


@pytest.mark.parametrize(
    "graph",
    [{"a": ["a"]}, {"a": ["b"], "b": ["a"]}, {"a": ["x", "b"], "b": ["c"], "c": ["a"], "x": []}],
)
def test_a_cycle_is_named(graph: dict[str, list[str]]) -> None:
    with pytest.raises(CycleError, match=r"has a cycle: '\w' needs .*'\w'\."):
        make_plan(graph, ["a"])


def test_a_diamond_is_no_cycle() -> None:
    plan = make_plan({"d": ["b", "c"], "b": ["a"], "c": ["a"], "a": []}, ["d"])
    assert len(plan) == 4


class Counted(Mapping[int, Sequence[int]]):
    """A graph that counts how often it is looked at."""

    def __init__(self, graph: dict[int, list[int]]) -> None:
        self.graph = graph
        self.looks = 0

    def __getitem__(self, key: int) -> Sequence[int]:
        self.looks += 1
        return self.graph[key]

    def __iter__(self) -> Iterator[int]:
        return iter(self.graph)

    def __len__(self) -> int:
        return len(self.graph)


def chain(length: int) -> dict[int, list[int]]:
    return {i: [i - 1] if i else [] for i in range(length)}


def test_a_chain_of_100_000_needs_no_recursion_and_no_copies() -> None:
    graph = Counted(chain(100_000))
    assert sys.getrecursionlimit() < 10_000
    plan = make_plan(graph, [99_999])
    assert plan.keys[:3] == [0, 1, 2]
    assert graph.looks <= 3 * len(graph), "each task is looked at a few times, not once per path"


def test_a_sequential_reduction_of_3_999_tasks_has_no_copies() -> None:
    # 2,000 leaves, each added to the sum so far: the original stored 2.0 million nodes for it.
    graph: dict[int, list[int]] = {0: []}
    graph |= {2 * i - 1: [] for i in range(1, 2000)}
    graph |= {2 * i: [2 * i - 1, 2 * i - 2] for i in range(1, 2000)}
    counted = Counted(graph)
    plan = make_plan(counted, [3998])
    assert len(plan) == 3999
    assert sum(len(spec.inputs) for spec in plan.specs) == 2 * 1999
    assert counted.looks <= 3 * len(graph)


def test_a_wide_fan_in_and_a_wide_fan_out() -> None:
    graph = {0: [], **{i: [0] for i in range(1, 10_001)}, 10_001: list(range(1, 10_001))}
    plan = make_plan(graph, [10_001])
    assert len(plan.specs[0].consumers) == 10_000
    assert set(plan.specs[0].degrees) == {1}
    assert set(plan.specs[1].degrees) == {10_000}


@pytest.mark.parametrize(("leaves", "count"), [(10, 3), (3, 10), (1, 1), (512, 2), (7, 7)])
def test_groups_are_contiguous_and_even(leaves: int, count: int) -> None:
    plan = make_plan({i: [] for i in range(leaves)}, range(leaves))
    groups = plan.groups(count)
    assert [leaf for group in groups for leaf in group] == plan.leaves
    assert len(groups) == min(leaves, count)
    sizes = {len(group) for group in groups}
    assert max(sizes) - min(sizes) <= 1
