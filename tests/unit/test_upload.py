"""What a plan weighs in the store, counted in bytes."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from functools import partial
from operator import add
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from dask import delayed
from dask._task_spec import Task, TaskRef

from wukong_async import blocks, graph, wire
from wukong_async.config import Settings
from wukong_async.errors import GraphError, SerializationError
from wukong_async.scheduler import upload as uploads
from wukong_async.scheduler.upload import Upload


class Model:
    def __init__(self, weights: bytes) -> None:
        self.weights = weights

    def predict(self, x: int) -> int:
        return len(self.weights) + x


WEIGHTS = os.urandom(1_000_000)
MODEL = Model(os.urandom(1_000_000))
TABLE = np.arange(100_000.0)


class Sampler:
    """Has a state, and a table that weighs something."""

    def __init__(self) -> None:
        self.table = np.arange(50_000.0)
        self.drawn = 0

    def draw(self, _: int) -> int:
        self.drawn += 1
        return self.drawn


def closure() -> Callable[[int], float]:
    weights = np.frombuffer(os.urandom(1_000_000))

    def call(x: int) -> float:
        return len(weights) + x

    return call


CLOSURE = closure()


def look_up(table: Any, x: int) -> float:
    return float(table[x])


class Holds:
    def __init__(self, held: Any) -> None:
        self.held = held


def is_held(part: Any, holder: Holds) -> bool:
    return holder.held is part


def stored(dsk: Any, keys: Any, **settings: Any) -> tuple[Upload, dict[str, bytes]]:
    """A plan, and what it puts into the store."""
    upload = Upload.prepare(dsk, keys, Settings(**settings))
    return upload, {
        name: wire.join(segments) for batch in upload.batches() for name, segments in batch
    }


def results(upload: Upload, objects: dict[str, bytes]) -> dict[int, Any]:
    """What an executor would compute that does everything in plan order."""
    values: dict[int, Any] = {}
    for literal, _ in upload.values:
        parts = [data for name, data in objects.items() if name.startswith(f"o{literal}.")]
        values[literal] = wire.loads(b"".join(parts))
    for index, firsts in enumerate(zip(upload.starts, upload.edges, strict=True)):
        block = blocks.decode(objects[f"b{index}"], *firsts)
        for number, program in block.programs.items():
            values[number] = program.run(values)
    return values


@pytest.mark.parametrize(
    "task",
    [
        lambda key, i: Task(key, add, WEIGHTS, bytes([i % 256])),
        lambda key, i: Task(key, MODEL.predict, i),
        lambda key, i: Task(key, CLOSURE, i),
        lambda key, i: (add, WEIGHTS, bytes([i % 256])),
    ],
    ids=["an argument", "a method", "a function", "a legacy task"],
)
def test_what_tasks_of_many_blocks_share_is_stored_once(task: Callable[..., Any]) -> None:
    dsk = {f"t{i}": task(f"t{i}", i) for i in range(1000)}
    upload, objects = stored(dsk, list(dsk))
    assert len(upload.starts) >= 4
    assert sum(map(len, objects.values())) < 1_400_000


def test_what_is_set_apart_comes_back() -> None:
    dsk: dict[str, Any] = {
        f"t{i}": Task(f"t{i}", add, WEIGHTS, bytes([i % 256])) for i in range(400)
    }
    dsk["m"] = Task("m", MODEL.predict, 7)
    dsk["n"] = Task("n", add, TaskRef("m"), 1)
    upload, objects = stored(dsk, list(dsk), part_size=300_000)
    values = results(upload, objects)
    assert values[upload.plan.numbers["t300"]] == WEIGHTS + bytes([300 % 256])
    assert values[upload.plan.numbers["n"]] == 1_000_008
    assert {upload.name(n) for n, _ in upload.values} == {
        "argument 0 of task 't0'",
        "function of task 'm'",
    }


def test_a_plan_is_serialised_again_from_the_beginning() -> None:
    dsk: dict[str, Any] = {f"t{i}": Task(f"t{i}", add, WEIGHTS, b"x") for i in range(400)}
    upload, first = stored({**dsk, "w": WEIGHTS, "u": (len, "w")}, [*dsk, "u"])
    told = upload.facts.pack(), list(upload.values), upload.name(-1)
    for _ in zip(range(2), upload._blocks(), strict=False):
        pass  # The store loses its data after some blocks.
    second = {name: wire.join(s) for batch in upload.batches() for name, s in batch}
    assert (upload.facts.pack(), list(upload.values), upload.name(-1)) == told
    assert second == first


def test_a_manifest_is_small_or_an_object_or_impossible() -> None:
    dsk = {"a": (abs, -1), "b": 2, "c": "a", "large": WEIGHTS, "lock": threading.Lock()}

    def manifest(*keys: str) -> tuple[Any, int]:
        upload = Upload.prepare(dsk, list(keys), Settings())
        inline, objects = upload.manifest([list(keys)])
        return wire.loads(b"".join(wire.join(s) for _, s in objects) or inline), len(objects)

    assert manifest("a", "b", "c") == (([["a", "b", "c"]], {"a": 0, "c": 0}, {"b": 2}), 0)
    found, objects = manifest("a", "large")
    assert found[2] == {"large": WEIGHTS}
    assert objects == 1
    assert manifest("a", "lock") == (None, 0)


def test_equal_parts_of_tasks_stay_two_objects() -> None:
    dsk = {f"t{i}": Task(f"t{i}", Sampler().draw, i) for i in range(3)}
    upload, objects = stored(dsk, list(dsk))
    assert len(upload.values) == 3
    assert set(results(upload, objects).values()) > {1}
    assert [results(upload, objects)[n] for n in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("size", [10_000, 100_000])
def test_what_parts_of_one_task_share_they_share_there(size: int) -> None:
    held = np.arange(float(size))
    upload, objects = stored({"t": Task("t", is_held, held, Holds(held))}, ["t"])
    assert results(upload, objects)[0] is True


def test_what_small_parts_share_is_stored_once_for_a_block() -> None:
    dsk = {f"t{i}": Task(f"t{i}", partial(look_up, TABLE, i)) for i in range(256)}
    upload, objects = stored(dsk, list(dsk))
    assert upload.starts == [0]
    assert sum(map(len, objects.values())) < 900_000
    assert results(upload, objects)[255] == upload.plan.keys.index("t255")


def test_keys_may_be_named_like_what_is_set_apart() -> None:
    dsk = {-1: Task(-1, abs, -3), "a": Task("a", Model.predict, MODEL, TaskRef(-1))}
    upload, objects = stored(dsk, ["a"])
    assert [number for number, _ in upload.values] == [-1]
    assert results(upload, objects)[upload.plan.numbers["a"]] == 1_000_003


def test_chunks_of_an_array_are_no_part_of_the_plan() -> None:
    array = da.from_array(np.arange(1_000_000.0), chunks=100_000) + 1
    request = graph.request([array.sum()], True)
    assert request is not None
    upload, objects = stored(request.graph, graph.flat(request.keys))
    assert len(upload.values) == 10
    assert sum(len(data) for name, data in objects.items() if name.startswith("b")) < 50_000
    values = results(upload, objects)
    (number,) = upload.plan.requested
    assert values[number] == np.arange(1_000_000.0).sum() + 1_000_000


def test_a_small_plan_is_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "set_apart", None)
    stored({f"t{i}": (add, i, i) for i in range(1000)}, ["t0", "t999"])


def test_what_does_not_pickle_is_named_in_a_heavy_block() -> None:
    dsk = {"heavy": Task("heavy", add, WEIGHTS, b""), "bad": Task("bad", add, (i for i in "a"), 1)}
    with pytest.raises(SerializationError, match=r"^Task 'bad' cannot travel: argument 0, a gener"):
        stored(dsk, ["heavy", "bad"])


def test_what_no_string_of_the_store_can_hold_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uploads, "MOST_BLOCK", 100_000)
    many = [os.urandom(1000) for _ in range(1000)]
    with pytest.raises(GraphError, match=r"Task 'fat' carries 1 MB .* a list or an array"):
        stored({"fat": Task("fat", max, *many)}, ["fat"])
    stored({"fat": Task("fat", max, many)}, ["fat"])


class Anonymous(str):
    __slots__ = ()

    def __repr__(self) -> str:
        raise RuntimeError("no name")


def test_a_key_without_a_name_has_a_number() -> None:
    upload = Upload.prepare({Anonymous("a"): (add, 1, 2)}, [Anonymous("a")], Settings())
    assert upload.name(0) == "<a Anonymous whose repr raises RuntimeError>"
    assert upload.name(-5) == "number -5"
    assert pickle.loads(pickle.dumps(upload.plan.keys)) == ["a"]


def test_limits_are_written_for_the_tasks_that_have_any() -> None:
    with dask.annotate(retries=2, timeout="1 minute"):
        x = delayed(add)(1, 2, dask_key_name="x")
    y = delayed(add)(x, 1, dask_key_name="y")
    upload = Upload.prepare(y.dask, ["y"], Settings())
    (frame,) = (frame for batch in upload.batches() for _, frame in batch)
    programs = blocks.decode(wire.join(frame), 0, 0).programs
    assert programs[0].limits == (2, 60.0)
    assert programs[1].limits == (0, None)
