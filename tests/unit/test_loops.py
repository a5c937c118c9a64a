from __future__ import annotations

import gc

from wukong_async.collector import collector_paused
from wukong_async.loops import plain


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
