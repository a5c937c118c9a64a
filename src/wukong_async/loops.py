"""One thread with one event loop: what carries this package's synchronous faces.

Owns the loop and the thread; knows nothing of what runs on them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")


def new_event_loop() -> asyncio.AbstractEventLoop:
    """The loop that this project uses wherever it owns one."""
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


class LoopThread:
    """A daemon thread that runs an event loop until `stop` is called."""

    def __init__(self, name: str) -> None:
        self.loop = new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            # Whoever waits for a coroutine in another thread must hear that it will not end.
            self.loop.run_until_complete(_cancel_all())
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()

    @property
    def alive(self) -> bool:
        """Whether the thread runs. It does not in a process that was forked off meanwhile."""
        return self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it: see `run_on`."""
        return run_on(self.loop, work)

    def stop(self) -> None:
        """Stop the loop and wait for the thread."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()


def run_on(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on another thread's loop and wait; cancel it if this thread is interrupted.

    The wait ends only when the coroutine has ended, so its clean-up is never cut short; a second
    interrupt does not wait any longer.
    """
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        # Not by `result` alone: in Python 3.11 it takes an exception that is false for none.
        error = future.exception()
        if error is not None:
            raise error
        return future.result()
    except (KeyboardInterrupt, SystemExit):
        future.cancel()
        concurrent.futures.wait([asyncio.run_coroutine_threadsafe(_settle(), loop)])
        raise


async def _cancel_all() -> None:
    await asyncio.sleep(0)  # What was submitted last becomes a task.
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


async def _settle() -> None:
    """Wait until what has been cancelled on this loop has ended."""
    me = asyncio.current_task()
    cancelled = [t for t in asyncio.all_tasks() if t is not me and t.cancelling()]
    if cancelled:
        await asyncio.wait(cancelled)


_before_sending: ContextVar[asyncio.Task[Any] | None] = ContextVar("before_sending", default=None)


@contextlib.contextmanager
def sending_after(done: asyncio.Task[Any]) -> Iterator[None]:
    """What is sent in the body is got ready at once, and goes out when `done` is; not if it fails.

    For senders that take CPU to get ready, and await `may_send`.
    """
    token = _before_sending.set(done)
    try:
        yield
    finally:
        _before_sending.reset(token)


async def may_send() -> None:
    """Wait until what is ready may be sent: see `sending_after`.

    Raises
    ------
    Whatever that has failed with which had to be done before.
    """
    done = _before_sending.get()
    if done is not None:
        await asyncio.wait([done])
        done.result()


def times_cancelled() -> int:
    """How often the current task was told to end.

    Compared with what it was before: `wait_for`, with which redis-py sends, and a TaskGroup one of
    whose tasks fails at that moment, forget a cancellation in Python 3.11.
    """
    me = asyncio.current_task()
    assert me is not None
    return me.cancelling()


def plain(error: BaseException) -> BaseException:
    """The first error in a group that is not a group: callers never meet our task groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
