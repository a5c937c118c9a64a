"""What an executor holds in memory."""

from __future__ import annotations

import io
import os
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from itertools import chain
from typing import Any, NoReturn

import numpy as np
import pytest

from wukong_async.executor import memory
from wukong_async.executor.memory import GLANCE, MOST_ORIGINS, Values, goes_once, resident_mb


def numbers() -> Iterator[int]:
    yield 1


class Hostile(dict[str, Any]):
    """It must not be asked."""

    def values(self) -> NoReturn:
        raise RuntimeError

    def __iter__(self) -> NoReturn:
        raise RuntimeError


class Pair(tuple[Any, ...]):
    __slots__ = ()

    def __iter__(self) -> NoReturn:
        raise RuntimeError


@pytest.mark.parametrize(
    "value",
    [
        iter([]),
        map(abs, []),
        io.BytesIO(),
        numbers(),
        [1, iter([])],
        (iter([]),),
        {"key": iter([])},
        {iter([])},
        [("key", [1, iter([])])],
        OrderedDict(key=[iter([])]),
        defaultdict(list, key=[iter([])]),
        deque([iter([])]),
        Hostile(key=iter([])),
        Pair((iter([]),)),
    ],
)
def test_what_goes_once(value: object) -> None:
    assert goes_once(value)
    assert goes_once(value, GLANCE)


@pytest.mark.parametrize(
    "value",
    [7, "text", None, [1, 2], [("key", [1])], {"key": {"key": 1}}, range(3), np.ones(3), Hostile()],
)
def test_what_can_be_read_again_and_again(value: object) -> None:
    assert not goes_once(value)


def test_a_list_in_itself_is_gone_through_once() -> None:
    endless: list[Any] = [1]
    endless.append(endless)
    assert not goes_once(endless)


def test_what_is_hidden_deep() -> None:
    value: Any = iter([])
    for _ in range(2000):
        value = [value]
    assert goes_once(value)
    assert not goes_once(value, GLANCE)


def test_a_glance_is_short() -> None:
    long = [*range(GLANCE), iter([])]
    assert goes_once(long)
    assert not goes_once(long, GLANCE)


@pytest.fixture
def values() -> Values:
    """0 and 1 are plain; 2 goes over 0, 3 over 2 and 1, 4 is the sum of 3 and 1."""
    values = Values()
    values.add(0, [1, 2], ())
    values.add(1, [3], ())
    values.add(2, iter(values[0]), (0,))
    values.drop([0])
    values.add(3, zip(values[2], values[1], strict=False), (2, 1))
    values.drop([2])
    return values


SOURCES: dict[int, tuple[int, ...]] = {0: (), 1: (), 2: (0,), 3: (2, 1), 4: (3, 1)}


def test_what_an_iterator_was_made_of_stays_as_long(values: Values) -> None:
    assert values.keys() == {1, 3}
    assert values.lasting(SOURCES) == {0: [1, 2], 1: [3]}
    assert values.used_up(SOURCES[4]) == [3]
    values.drop([3])
    assert values.lasting(SOURCES) == {1: [3]}


def test_what_a_task_that_is_cut_short_has_used_up(values: Values) -> None:
    found = values.spoilt(SOURCES[4], SOURCES.__getitem__, lambda _: True)
    assert found == ([3, 2], {0: [1, 2], 1: [3]})


def test_what_is_in_a_store_is_not_spoilt(values: Values) -> None:
    found = values.spoilt(SOURCES[4], SOURCES.__getitem__, lambda number: number != 2)
    assert found == ([3], {1: [3]})
    assert values.spoilt(SOURCES[4], SOURCES.__getitem__, lambda _: False) == ([], {})


def test_what_is_nowhere_any_more_cannot_be_handed_over(values: Values) -> None:
    values._origins.clear()
    assert values.spoilt(SOURCES[4], SOURCES.__getitem__, lambda _: True) is None


def test_plain_values_have_no_origins(values: Values) -> None:
    values.add(4, 7, (3, 1))
    assert values.drop([3, 4, 5])[1] == 7
    assert values == {1: [3]}
    assert not values._origins


def test_a_chain_of_iterators_does_not_keep_all_that_they_were_made_of() -> None:
    values = Values()
    values.add(0, iter([0]), ())
    for number in range(1, 200):
        values.add(-number, [number], ())
        values.add(number, chain(values[number - 1], values[-number]), (number - 1, -number))
        values.drop((number - 1, -number))
        assert len(values.lasting(range(-number, 0))) <= MOST_ORIGINS


def test_a_generator_has_origins() -> None:
    values = Values()
    values.add(0, [1], ())
    values.add(1, numbers(), (0,))
    values.drop([0])
    assert values.lasting([0]) == {0: [1]}


def test_memory_is_seen_to_grow_even_if_a_task_closes_files() -> None:
    before = resident_mb()
    held = np.ones(64 * memory.MB // 8)
    assert before + 60 <= resident_mb()
    os.close(memory._statm(os.getpid()))
    assert resident_mb() > 0
    del held
    assert 0 < resident_mb() < before + 60
    os.close(memory._statm(os.getpid()))
    memory._statm.cache_clear()
