from __future__ import annotations

import os
from collections.abc import Hashable, Iterator
from operator import add
from typing import Any

import numpy as np
import pytest
from dask._task_spec import Task, TaskRef

from wukong_async import blocks, wire
from wukong_async.blocks import Call, Calls, Entry, Limits, PlanFacts
from wukong_async.protocol import TaskSpec


def entries(count: int, size: int = 0) -> list[Entry]:
    nodes = [Task(f"k{i}", add, TaskRef("x"), bytes([i % 256]) * size) for i in range(count)]
    return [(node, ("x",), (i,), None, (), (), False, None) for i, node in enumerate(nodes)]


def test_tasks_survive() -> None:
    node = Task("k", add, TaskRef("x"), TaskRef("y"))
    entry: Entry = (node, ("x",), (3,), {"y": 10}, (8, 9), (2, 1), True, None)
    count, frame = blocks.encode([entry], 1000)
    block = blocks.decode(wire.join(frame), first=7, edge=20)
    assert count == 1
    (spec,) = block.specs
    assert spec == TaskSpec(7, (3,), (8, 9), (2, 1), True, (), 20, name="k")
    assert block.programs[7].run({3: 5}) == 15


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("add-6ce1f5a1-4d07-4d75-8353-abcdefabcdef", "add"),
        (("random_sample-6ce1f5a14d075d754353abcdefabcdef", 0, 1), "random_sample"),
        ("sum-aggregate-6ce1f5a14d075d754353abcdefabcdef", "sum-aggregate"),
        ("x-1-2", "x"),
        ("load", "load"),
        (("a", 1), "a"),
        (3, "int"),
        ((), "tuple"),
        (None, ""),
    ],
)
def test_tasks_that_do_the_same_have_one_name(key: Hashable, name: str) -> None:
    assert blocks.name_of(key) == name


def test_one_input_under_two_names_is_one_edge() -> None:
    node = Task("k", add, TaskRef("x"), TaskRef("y"))
    _, frame = blocks.encode([(node, ("x", "y"), (3, 3), None, (), (), False, None)], 1000)
    (spec,) = blocks.decode(wire.join(frame), 4, 0).specs
    assert spec.inputs == (3,)


def test_large_literals_are_no_inputs() -> None:
    node = Task("k", add, TaskRef("x"), TaskRef("y"))
    _, frame = blocks.encode([(node, ("x", "y"), (3, -1), None, (), (), False, None)], 1000)
    block = blocks.decode(wire.join(frame), 4, 0)
    assert block.specs[0].inputs == (3,)
    assert block.specs[0].literals == (-1,)
    assert block.programs[4].run({3: 1, -1: 2}) == 3


@pytest.mark.parametrize("most", [100, 5_000, 50_000, 10**9])
def test_blocks_are_cut_to_size(most: int) -> None:
    made = list(cut(entries(100, size=500), most))
    assert sum(count for count, _ in made) == 100
    for count, frame in made:
        assert count == 1 or wire.size(frame) <= most
    starts = [0]
    for count, _ in made:
        starts.append(starts[-1] + count)
    decoded = [
        spec.number
        for start, (_, frame) in zip(starts, made, strict=False)
        for spec in blocks.decode(wire.join(frame), start, 0).specs
    ]
    assert decoded == list(range(100))


def test_an_executor_finds_the_block_of_a_task() -> None:
    starts = [0, 10, 11, 50]
    assert [blocks.block_of(starts, task) for task in (0, 9, 10, 11, 49, 50, 99)] == [
        *(0, 0, 1, 2, 2, 3, 3)
    ]


def test_facts_survive() -> None:
    facts = PlanFacts(
        [0, 256],
        [0, 300],
        16384,
        1 << 26,
        3600.0,
        slots=7,
        hold=0.5,
        seen={"": [0.05, 0.001, 1e8, 0.001], "add": [3, 0.5, 8.0]},
        compression="lz4",
        bucket="s3://b/p",
        bucket_limit=5,
    )
    assert PlanFacts.unpack(facts.pack()) == facts


def test_shared_strings_are_pickled_once() -> None:
    def many(names: list[str]) -> Any:
        nodes = [Task(f"k{i}", add, TaskRef(n), 1) for i, n in enumerate(names)]
        return [(n, tuple(n.dependencies), (0,), None, (), (), False, None) for n in nodes]

    same = "a-rather-long-key-" * 10
    _, frame = blocks.encode(many([same] * 200), 10**9)
    assert wire.size(frame) < 200 * 100


def test_a_block_that_is_cut_is_pickled_once_and_a_little() -> None:
    class Counted(bytes):
        pickled = 0

        def __reduce__(self) -> Any:
            Counted.pickled += 1
            return bytes, (bytes(self),)

    tasks = [entry(Counted(os.urandom(10_000))) for _ in range(64)]
    made = list(cut(tasks, 30_000))
    assert sum(count for count, _ in made) == 64
    assert max(wire.size(frame) for _, frame in made) <= 30_000
    # Two tasks fit; of each three one is met, weighed alone, and left for the next block.
    assert Counted.pickled <= 64 + 2 * len(made)


def test_what_tasks_share_is_not_repeated() -> None:
    shared = os.urandom(1_000_000)
    count, frame = blocks.encode([entry(shared) for _ in range(100)], 10_000)
    assert count == 100
    assert wire.size(frame) < 1_100_000


def entry(constant: object) -> Entry:
    return (Task("k", str, TaskRef("x")), (), (), {"x": constant}, (), (), False, None)


def cut(tasks: list[Entry], most: int) -> Iterator[tuple[int, wire.Segments]]:
    while tasks:
        count, frame = blocks.encode(tasks, most)
        yield count, frame
        tasks = tasks[count:]


class Loud:
    """Pickles, and says so when it comes back."""

    def __call__(self) -> None:
        """Could be called."""

    def __reduce__(self) -> Any:
        return _boom, ()


def _boom() -> None:
    raise SystemExit("boom")


def test_the_task_that_does_not_come_back_is_named() -> None:
    _, frame = blocks.encode([*entries(5), entry(Loud()), *entries(5)], 10**6)
    with pytest.raises(blocks.Unreadable) as caught:
        blocks.decode(wire.join(frame), 100, 0)
    assert caught.value.number == 105
    assert isinstance(caught.value.__cause__, SystemExit)


@pytest.mark.parametrize("damaged", [b"", b"?", b"\x01\x80\x05N.", b"\x01\x80\x05K\x01"])
def test_a_damaged_block_cannot_be_read(damaged: bytes) -> None:
    with pytest.raises(blocks.Unreadable) as caught:
        blocks.decode(damaged, 100, 0)
    assert caught.value.number == 100
    assert caught.value.__cause__ is not None


def test_the_task_that_does_not_pickle_is_named() -> None:
    with pytest.raises(wire.ItemError, match="generator") as caught:
        blocks.encode([*entries(5), entry(i for i in "a")], 10**6)
    assert caught.value.index == 5


def test_arrays_of_many_tasks_are_rebuilt_where_they_lie() -> None:
    arrays: list[Any] = [np.arange(1000.0) + i for i in range(3)]
    count, frame = blocks.encode([entry(array) for array in arrays], 10**6)
    assert count == 3
    assert len(frame) > 3, "out of band"
    programs = blocks.decode(wire.join(frame), 0, 0).programs
    for task, array in enumerate(arrays):
        constants = programs[task].constants
        assert isinstance(constants, dict)
        np.testing.assert_array_equal(constants["x"], array)


def test_limits_travel_with_their_task() -> None:
    node = Task("k", add, 1, 2)
    tasks: list[Entry] = [
        (node, (), (), None, (), (), False, limits) for limits in (None, (2, None), (0, 1.5))
    ]
    _, frame = blocks.encode(tasks, 10**6)
    block = blocks.decode(wire.join(frame), 0, 0)
    assert [program.limits for program in block.programs.values()] == [
        *(Limits(), Limits(retries=2), Limits(timeout=1.5))
    ]
    assert [spec.limited for spec in block.specs] == [False, False, True]


def call(function: Any, takes: str, constants: Any = (), sources: Any = (), **more: Any) -> Entry:
    rest = {"consumers": (), "degrees": (), "requested": False, "limits": None, **more}
    made = Call(("k", 1), "k", function, takes, constants)
    return (made, (), sources, None, *rest.values())


def columns(tasks: list[Entry]) -> Calls:
    calls = [task[0] for task in tasks if isinstance(task[0], Call)]
    sources = [task[2] for task in tasks]
    return Calls(
        keys=[call.key for call in calls],
        names=[call.name for call in calls],
        calls=[(c.function, c.takes, c.constants, s) for c, s in zip(calls, sources, strict=True)],
        inputs=[len({s for s in each if s >= 0}) for each in sources],
        counts=[len(task[4]) for task in tasks],
        consumers=[consumer for task in tasks for consumer in task[4]],
        degrees=[degree for task in tasks for degree in task[5]],
        requested=[place for place, task in enumerate(tasks) if task[6]],
        limits={place: task[7] for place, task in enumerate(tasks) if task[7]},
    )


def frame_of(tasks: list[Entry], *, by_columns: bool) -> bytes:
    if by_columns:
        return wire.join(blocks.encode_calls(columns(tasks)))
    count, frame = blocks.encode(tasks, 10**6)
    assert count == len(tasks)
    return wire.join(frame)


by_columns = pytest.mark.parametrize("by_columns", [True, False])


@by_columns
@pytest.mark.parametrize(
    ("entry", "value"),
    [
        (call(add, "SS", (), (3, 4)), 11),
        (call(add, "SS", (), (3, 3)), 10),
        (call(pow, "SC", (2,), (3,)), 25),
        (call(pow, "CS", (2,), (3,)), 32),
        (call(pow, "CC", (2, 3)), 8),
        (call(int, ""), 0),
        (call(sum, "L", (), (3, 4, -1)), 21),
    ],
)
def test_calls_survive(entry: Entry, value: int, by_columns: bool) -> None:
    program = blocks.decode(frame_of([entry], by_columns=by_columns), 0, 0).programs[0]
    assert program.key == ("k", 1)
    assert program.run({3: 5, 4: 6, -1: 10}) == value


@by_columns
def test_calls_are_the_same_tasks_as_nodes(by_columns: bool) -> None:
    told = {"consumers": (8, 9), "degrees": (2, 1), "requested": True, "limits": (2, 1.5)}
    tasks = [
        call(add, "SS", (), (3, -1), **told),
        call(add, "SS", (), (4, 4)),
        call(sum, "L", (), (5, 3, -2, -2)),
    ]
    block = blocks.decode(frame_of(tasks, by_columns=by_columns), first=7, edge=20)
    assert block.specs == [
        TaskSpec(7, (3,), (8, 9), (2, 1), True, (-1,), 20, limited=True, name="k"),
        TaskSpec(8, (4,), (), (), False, (), 22, name="k"),
        TaskSpec(9, (5, 3), (), (), False, (-2,), 22, name="k"),
    ]
    assert block.programs[7].limits == Limits(2, 1.5)


@pytest.mark.parametrize("most", [200, 2_000, 10**6])
def test_calls_may_be_cut_and_be_among_nodes(most: int) -> None:
    tasks = [call(add, "CC", (i, 1)) for i in range(50)] + entries(50, size=50)
    made = list(cut(tasks, most))
    values, start = [], 0
    for count, frame in made:
        block = blocks.decode(wire.join(frame), start, 0)
        values += [block.programs[n].run({n - 50: b"x"}) for n in range(start, start + count)]
        start += count
    assert values == [*range(1, 51), *(b"x" + bytes([i]) * 50 for i in range(50))]


def test_calls_with_distinct_inputs_are_read_as_they_are() -> None:
    tasks = [
        call(add, "SS", (), (3, 4), consumers=(9,), degrees=(1,)),
        call(abs, "C", (1,), consumers=(8, 9), degrees=(2, 2)),
        call(sum, "L", (), (5, 6), requested=True),
    ]
    block = blocks.decode(frame_of(tasks, by_columns=True), first=7, edge=20)
    assert block.specs == [
        TaskSpec(7, (3, 4), (9,), (1,), False, (), 20, name="k"),
        TaskSpec(8, (), (8, 9), (2, 2), False, (), 21, name="k"),
        TaskSpec(9, (5, 6), (), (), True, (), 23, name="k"),
    ]
    assert [program.run({5: 1, 6: 2, 3: 5, 4: 6}) for program in block.programs.values()] == [
        *(11, 1, 3)
    ]


@by_columns
def test_a_function_that_does_not_come_back_is_named_by_its_first_task(by_columns: bool) -> None:
    tasks = [call(add, "CC", (1, 2)), call(Loud(), ""), call(Loud(), "")]
    frame = frame_of(tasks, by_columns=by_columns)
    with pytest.raises(blocks.Unreadable) as caught:
        blocks.decode(frame, 100, 0)
    assert caught.value.number == 101
    assert isinstance(caught.value.__cause__, SystemExit)


@by_columns
def test_a_function_that_does_not_pickle_is_named_by_its_first_task(by_columns: bool) -> None:
    tasks = [call(add, "CC", (1, 2)), call((i for i in "a"), "")]
    with pytest.raises(wire.ItemError, match="generator") as caught:
        frame_of(tasks, by_columns=by_columns)
    assert caught.value.index == 1
