from __future__ import annotations

import os
from operator import add
from typing import Any

import pytest
from dask._task_spec import Task, TaskRef

from wukong_async import blocks, wire
from wukong_async.blocks import Entry, PlanFacts


def entries(count: int, size: int = 0) -> list[Entry]:
    nodes = [Task(f"k{i}", add, TaskRef("x"), bytes([i % 256]) * size) for i in range(count)]
    return [(node, ("x",), (i,), None, (), (), False) for i, node in enumerate(nodes)]


def test_tasks_survive() -> None:
    node = Task("k", add, TaskRef("x"), TaskRef("y"))
    entry: Entry = (node, ("x",), (3,), {"y": 10}, (8, 9), (2, 1), True)
    ((count, frame),) = blocks.encode([entry], 1000)
    block = blocks.decode(wire.join(frame), first=7)
    assert count == 1
    (spec,) = block.specs
    assert spec == (7, (3,), (8, 9), (2, 1), True, ())
    assert block.programs[7].run({3: 5}) == 15


def test_one_input_under_two_names_is_one_edge() -> None:
    node = Task("k", add, TaskRef("x"), TaskRef("y"))
    ((_, frame),) = blocks.encode([(node, ("x", "y"), (3, 3), None, (), (), False)], 1000)
    (spec,) = blocks.decode(wire.join(frame), 4).specs
    assert spec.inputs == (3,)


def test_large_literals_are_no_inputs() -> None:
    node = Task("k", add, TaskRef("x"), TaskRef("y"))
    ((_, frame),) = blocks.encode([(node, ("x", "y"), (3, -1), None, (), (), False)], 1000)
    block = blocks.decode(wire.join(frame), 4)
    assert block.specs[0].inputs == (3,)
    assert block.specs[0].literals == (-1,)
    assert block.programs[4].run({3: 1, -1: 2}) == 3


@pytest.mark.parametrize("most", [100, 5_000, 50_000, 10**9])
def test_blocks_are_cut_to_size(most: int) -> None:
    made = list(blocks.encode(entries(100, size=500), most))
    assert sum(count for count, _ in made) == 100
    for count, frame in made:
        assert count == 1 or wire.size(frame) <= most
    starts = [0]
    for count, _ in made:
        starts.append(starts[-1] + count)
    decoded = [
        spec.number
        for start, (_, frame) in zip(starts, made, strict=False)
        for spec in blocks.decode(wire.join(frame), start).specs
    ]
    assert decoded == list(range(100))


def test_an_executor_finds_the_block_of_a_task() -> None:
    starts = [0, 10, 11, 50]
    assert [blocks.block_of(starts, task) for task in (0, 9, 10, 11, 49, 50, 99)] == [
        *(0, 0, 1, 2, 2, 3, 3)
    ]


def test_facts_survive() -> None:
    facts = PlanFacts([0, 256], 16384, 1 << 26, 3600.0)
    assert PlanFacts.unpack(facts.pack()) == facts


def test_shared_strings_are_pickled_once() -> None:
    def many(names: list[str]) -> Any:
        nodes = [Task(f"k{i}", add, TaskRef(n), 1) for i, n in enumerate(names)]
        return [(n, tuple(n.dependencies), (0,), None, (), (), False) for n in nodes]

    same = "a-rather-long-key-" * 10
    (_, frame) = next(iter(blocks.encode(many([same] * 200), 10**9)))
    assert wire.size(frame) < 200 * 100


def test_a_block_that_is_cut_is_pickled_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    pickled = 0
    real = wire.dumps

    def dumps(value: object) -> wire.Segments:
        nonlocal pickled
        segments = real(value)
        pickled += wire.size(segments)
        return segments

    monkeypatch.setattr(wire, "dumps", dumps)
    tasks = [entry(os.urandom(5000).hex()) for _ in range(64)]
    cut = list(blocks.encode(tasks, 30_000))
    assert sum(count for count, _ in cut) == 64
    assert max(wire.size(frame) for _, frame in cut) <= 30_000
    assert pickled < 3.1 * 64 * 10_000


def test_what_tasks_share_is_not_repeated() -> None:
    shared = os.urandom(1_000_000)
    ((count, frame),) = blocks.encode([entry(shared) for _ in range(100)], 10_000)
    assert count == 100
    assert wire.size(frame) < 1_100_000


def entry(constant: object) -> Entry:
    return (Task("k", str, TaskRef("x")), (), (), {"x": constant}, (), (), False)
