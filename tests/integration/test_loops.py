from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from wukong_async.loops import LoopThread


def test_a_loop_in_a_thread() -> None:
    thread = LoopThread("wukong-test")

    async def where() -> str:
        return threading.current_thread().name

    assert thread.run(where()) == "wukong-test"
    thread.stop()
    thread.stop()


class Errors(Exception):
    """As lists of errors are that are empty."""

    def __bool__(self) -> bool:
        return False


def test_an_exception_that_is_false_is_raised() -> None:
    async def fail() -> None:
        raise Errors

    thread = LoopThread("wukong-test")
    try:
        with pytest.raises(Errors):
            thread.run(fail())
    finally:
        thread.stop()


def test_an_interrupt_waits_for_the_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    thread = LoopThread("wukong-test")
    cleaned_up = threading.Event()
    submit = asyncio.run_coroutine_threadsafe
    interrupted: list[object] = []

    async def work() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(0)
            cleaned_up.set()

    def interrupt(coroutine: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> Any:
        future = submit(coroutine, loop)
        if not interrupted:
            interrupted.append(future)

            def waited_for() -> None:
                raise KeyboardInterrupt

            future.exception = waited_for  # type: ignore[assignment]
        return future

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", interrupt)
    with pytest.raises(KeyboardInterrupt):
        thread.run(work())
    assert cleaned_up.is_set()
    thread.stop()
