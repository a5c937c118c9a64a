"""Where the time goes: spans of functions that are wrapped from outside, in any process.

Spans are in seconds of `time.perf_counter`, which processes of one machine share.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, wraps
from types import MethodType
from typing import Any, NamedTuple, TypeAlias
from unittest import mock

now = time.perf_counter


class Span(NamedTuple):
    """A phase was on its way from then to then."""

    phase: str
    begin: float
    end: float


Watched: TypeAlias = tuple[object, str, str]
"""(module or class, name of its function, phase)."""


@contextlib.contextmanager
def watching(functions: Iterable[Watched]) -> Iterator[list[Span]]:
    """Collect a span for each call of these functions, until the block is left."""
    spans: list[Span] = []
    with contextlib.ExitStack() as stack:
        for owner, name, phase in functions:
            inner = getattr(owner, name)
            timed = _timed(inner, partial(Span, phase), spans.append)
            bound = isinstance(inner, MethodType)  # A class method has its class already.
            new = staticmethod(timed) if bound else timed
            stack.enter_context(mock.patch.object(owner, name, new))
        yield spans


def _timed(
    inner: Callable[..., Any],
    span: Callable[[float, float], Span],
    note: Callable[[Span], None],
) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(inner):

        @wraps(inner)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            begin = now()
            try:
                return await inner(*args, **kwargs)
            finally:
                note(span(begin, now()))

        return awaited

    @wraps(inner)
    def called(*args: Any, **kwargs: Any) -> Any:
        begin = now()
        try:
            return inner(*args, **kwargs)
        finally:
            note(span(begin, now()))

    return called


def shares(
    spans: Iterable[Span], phases: Sequence[str], begin: float, end: float
) -> dict[str, float]:
    """Seconds of each phase. Each moment counts once: for the first of `phases` that has it.

    What is left, in no phase, is that of the name "".
    """
    rank = {phase: index for index, phase in enumerate(phases)}
    edges: list[tuple[float, int, int]] = [(end, 0, 0)]
    for phase, *times in spans:
        since, until = (min(max(each, begin), end) for each in times)
        if since < until:
            edges += [(since, rank[phase], 1), (until, rank[phase], -1)]
    found = dict.fromkeys([*phases, ""], 0.0)
    open_now = [0] * len(phases)
    last = begin
    for when, index, change in sorted(edges):
        holder = next((p for p, count in zip(phases, open_now, strict=True) if count), "")
        found[holder] += when - last
        last = when
        if change:
            open_now[index] += change
    return found
