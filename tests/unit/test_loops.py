from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from wukong_async.collector import collector_paused
from wukong_async.loops import LoopThread, plain


def test_a_loop_in_a_thread() -> None:
    thread = LoopThread("wukong-test")

    async def where() -> str:
        return threading.current_thread().name

    assert thread.run(where()) == "wukong-test"
    thread.stop()
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

            def result() -> None:
                raise KeyboardInterrupt

            future.result = result  # type: ignore[assignment]
        return future

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", interrupt)
    with pytest.raises(KeyboardInterrupt):
        thread.run(work())
    assert cleaned_up.is_set()
    thread.stop()


def test_groups_are_not_shown_to_callers() -> None:
    error = ValueError("inside")
    assert plain(ExceptionGroup("outer", [ExceptionGroup("inner", [error]), OSError()])) is error
    assert plain(error) is error


def test_the_collector_comes_back_when_the_last_one_leaves() -> None:
    assert gc.isenabled()
    with collector_paused():
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled(), "as it was before"
    finally:
        gc.enable()
