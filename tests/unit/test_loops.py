from __future__ import annotations

import gc

import pytest

from wukong_async.collector import collector_paused
from wukong_async.loops import LoopThread, plain


def test_groups_are_not_shown_to_callers() -> None:
    error = ValueError("inside")
    assert plain(ExceptionGroup("outer", [ExceptionGroup("inner", [error]), OSError()])) is error
    assert plain(error) is error


class Errors(Exception):
    """As lists of errors are that are empty."""

    def __bool__(self) -> bool:
        return False


def test_an_exception_that_is_false_is_raised() -> None:
    async def fail() -> None:
        raise Errors

    thread = LoopThread("test")
    try:
        with pytest.raises(Errors):
            thread.run(fail())
    finally:
        thread.stop()


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
