"""The thread that tasks run in, and a new one when it does not come back."""

from __future__ import annotations

import asyncio
import ctypes
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """One thread."""

    def __init__(self) -> None:
        self._pool = _new_pool()
        self._unfinished: set[Future[Any]] = set()

    @property
    def busy(self) -> bool:
        """Whether the thread still has something to do."""
        return bool(self._unfinished)

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Do `work` when what was submitted before is done."""
        future = self._pool.submit(work)
        self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        return future

    def stack(self) -> list[traceback.FrameSummary]:
        """The calls that the thread is in, the innermost last."""
        frames = sys._current_frames()
        inside = [frames[thread.ident] for thread in self._pool._threads if thread.ident in frames]
        calls = (call for frame in inside for call in traceback.walk_stack(frame))
        return list(reversed(traceback.StackSummary.extract(calls)))

    async def settle(self, seconds: float) -> bool:
        """Give the thread time to finish; whether it has."""
        waiting = [asyncio.wrap_future(future) for future in tuple(self._unfinished)]
        for future in waiting:
            future.add_done_callback(_heard)
        if waiting:
            await asyncio.wait(waiting, timeout=seconds)
        return all(future.done() for future in waiting)

    def abandon(self, *, interrupt: bool = True) -> None:
        """Go on with another thread.

        What was submitted after what runs is cancelled.

        Parameters
        ----------
        interrupt
            What runs gets an exception at its next byte code, and keeps its thread for as long as
            it does not reach one.
        """
        pool, self._pool = self._pool, _new_pool()
        self._unfinished = set()
        for thread in pool._threads if interrupt else ():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
            )
        pool.shutdown(wait=False, cancel_futures=True)

    def close(self, *, wait: bool = False) -> None:
        """End the thread after what it still has to do."""
        self._pool.shutdown(wait=wait)


def _heard(future: asyncio.Future[Any]) -> None:
    """Nobody wants to know any more how it ended."""
    if not future.cancelled():
        future.exception()


def _new_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="wukong-task")
