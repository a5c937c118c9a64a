"""From what the store has of a job's results to values by key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping
from typing import Any

from wukong_async import failure, wire
from wukong_async.errors import SerializationError, StoreLost
from wukong_async.protocol import JobState, Outcome
from wukong_async.store import JobStore

LARGE = 1_000_000
"""Results of more bytes than this are unpickled off the loop."""


async def collect(
    store: JobStore,
    outcome: Outcome,
    wanted: Iterable[int],
    name_of: Callable[[int], str],
    in_thread: Callable[..., Awaitable[dict[int, Any]]],
) -> dict[int, Any]:
    """The results of a job, by number; none unless it is done.

    Parameters
    ----------
    wanted
        The numbers of its results.

    Raises
    ------
    StoreLost
        When one is not there any more.
    SerializationError
        When one cannot be unpickled here.
    """
    if outcome.state is not JobState.DONE:
        return {}
    frames = await store.resolve(outcome.results)
    lost = [task for task in wanted if frames.get(task) is None]
    if lost:
        raise StoreLost(
            f"The store has lost the result {name_of(lost[0])} of job {store.job_id}."
            f" {failure.WHY_LOST}"
        )
    if sum(len(frame) for frame in frames.values() if frame) > LARGE:
        return await in_thread(_unpickle, frames, name_of)
    return _unpickle(frames, name_of)


def named(
    values: Mapping[int, Any], results: Mapping[Hashable, int], constants: Mapping[Hashable, Any]
) -> dict[Hashable, Any]:
    """Values by key: those of `results`, which have numbers, and those that were never computed."""
    return {**constants, **{key: values[number] for key, number in results.items()}}


def _unpickle(
    frames: dict[int, wire.Buffer | None], name_of: Callable[[int], str]
) -> dict[int, Any]:
    values = {}
    for task in list(frames):
        frame = frames.pop(task)
        assert frame is not None
        try:
            values[task] = wire.loads(frame)
        except (Exception, SystemExit) as error:  # SystemExit would end the loop that hears it.
            raise SerializationError(
                f"The result of task {name_of(task)} cannot be unpickled here:"
                f" {type(error).__name__}: {error}"
            ) from error
    return values
