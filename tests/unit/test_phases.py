"""Spans of wrapped functions, and the time that each phase is given."""

from __future__ import annotations

import pytest

from benchmarks import phases
from benchmarks.phases import Span, shares, watching
from benchmarks.planning import SHAPES, sizes


def test_each_moment_counts_for_the_first_phase_that_has_it() -> None:
    spans = [Span("a", 1, 3), Span("a", 2, 4), Span("b", 0.5, 5), Span("b", 7, 20)]
    assert shares(spans, ["a", "b"], 0, 10) == {"a": 3, "b": 4.5, "": 2.5}


def test_spans_outside_of_the_time_count_nothing() -> None:
    assert shares([Span("a", 0, 1), Span("a", 9, 10)], ["a"], 2, 5) == {"a": 0, "": 3}


class Room:
    def method(self, x: int) -> int:
        return x + 1

    @classmethod
    def of_class(cls, x: int) -> tuple[type, int]:
        return cls, x

    async def awaited(self) -> None:
        raise KeyError


async def test_functions_are_watched_while_the_block_lasts_and_do_what_they_do() -> None:
    watched = [(Room, "method", "a"), (Room, "of_class", "b"), (Room, "awaited", "c")]
    with watching(watched) as spans:
        begin = phases.now()
        assert Room().method(1) == 2
        assert Room.of_class(3) == (Room, 3)
        assert Room().of_class(3) == (Room, 3)
        with pytest.raises(KeyError):
            await Room().awaited()
        end = phases.now()
    assert [span.phase for span in spans] == ["a", "b", "b", "c"]
    times = [begin, *(time for _, *each in spans for time in each), end]
    assert times == sorted(times)
    Room().method(1)
    assert Room.of_class(4) == (Room, 4)
    assert len(spans) == 4


@pytest.mark.parametrize("shape", SHAPES)
def test_graphs_have_the_size_that_was_asked_for(shape: str) -> None:
    graph, key = SHAPES[shape](1001)
    assert 990 < len(graph) <= 1001
    assert key in graph
    read = {name for node in graph.values() for name in node.dependencies}
    assert graph.keys() - read == {key}


def test_layers_have_more_edges_and_not_more_tasks() -> None:
    graph, _ = SHAPES["layers"](100_000)
    assert 9_900 < len(graph) <= 10_000
    assert 95_000 < sum(len(node.dependencies) for node in graph.values()) <= 100_000


def test_sizes_are_half_decades() -> None:
    assert list(sizes(1_000_000)) == [10_000, 30_000, 100_000, 300_000, 1_000_000]
    assert list(sizes(40_000)) == [10_000, 30_000, 40_000]
    assert list(sizes(10_000)) == [10_000]
