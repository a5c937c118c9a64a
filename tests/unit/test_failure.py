from __future__ import annotations

import concurrent.futures
import copyreg
import dataclasses
import threading
import traceback
from typing import Any

import pytest

from wukong_async import failure, wire
from wukong_async.errors import (
    BucketError,
    ExecutorLost,
    JobCancelled,
    JobTimeout,
    ProtocolError,
    RemoteTraceback,
    SerializationError,
    StoreFull,
    StoreLost,
    TaskError,
    TaskTimeout,
    VersionMismatch,
)
from wukong_async.last_words import LastWords

KEYS = ["a", ("x", 1), "c", "d", "e", "f", "g"]


def name_of(number: int) -> str:
    return repr(KEYS[number]) if number >= 0 else "argument 0 of task 'a'"


class Picky(Exception):
    """An exception that does not survive a plain pickle, like many."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text for you")


def travel(error: BaseException) -> Exception:
    try:
        raise error
    except BaseException as caught:
        blob = failure.task_failed(
            1,
            caught,
            hidden=lambda _: False,
            request_id="request-1",
            executor="0",
        )
    return failure.rebuild(blob, name_of)


@pytest.mark.parametrize(
    "error",
    [ValueError("no"), KeyError("k"), ZeroDivisionError(), OSError(2, "missing", "file")],
    ids=repr,
)
def test_the_original_exception_comes_back(error: Exception) -> None:
    copy = travel(error)
    assert type(copy) is type(error)
    assert copy.args == error.args
    assert isinstance(copy.__cause__, RemoteTraceback)
    assert "test_failure.py" in str(copy.__cause__)
    (note,) = copy.__notes__
    assert note == "wukong: task ('x', 1) failed in executor 0, request request-1"


def test_the_remote_story_is_printed_once() -> None:
    text = "".join(traceback.format_exception(travel(ValueError("no"))))
    assert text.count("raise error") == 1
    assert "direct cause" in text


def test_a_cause_is_part_of_the_story() -> None:
    try:
        raise ValueError("outer") from KeyError("inner")
    except ValueError as error:
        copy = travel(error)
    assert "KeyError: 'inner'" in str(copy.__cause__)


@pytest.mark.parametrize("error", [Picky(404, "gone"), SystemExit(3)], ids=repr)
def test_what_cannot_be_rebuilt_still_tells_its_type_text_and_traceback(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where tblib is installed (distributed brings it), almost every exception pickles.
    monkeypatch.setattr(failure, "_pickled", lambda _: b"")
    copy = travel(error)
    assert isinstance(copy, TaskError)
    text = str(copy)
    assert type(error).__name__ in text
    assert "test_failure.py" in text
    assert "task ('x', 1)" in text


def test_an_exception_whose_text_raises() -> None:
    copy = travel(Unprintable())
    assert isinstance(copy, Unprintable)
    assert "Unprintable" in str(copy.__cause__)


def test_an_exception_that_only_its_own_process_can_load_is_told_as_text() -> None:
    class Local(Exception):
        pass

    assert isinstance(travel(Local(threading.Lock())), TaskError)


class Catching(Exception):
    def __getattr__(self, name: str) -> str:
        return name


class Unnoted(Exception):
    __notes__ = None  # type: ignore[assignment]


class Noted(Exception):
    @property
    def __notes__(self) -> Any:  # type: ignore[override]
        raise ZeroDivisionError


class Caused(Exception):
    @property
    def __cause__(self) -> Any:  # type: ignore[override]
        return None


@pytest.mark.parametrize("kind", [Catching, Unnoted, Noted, Caused])
def test_an_exception_with_attributes_of_its_own(kind: type[Exception]) -> None:
    copy = travel(kind("my text"))
    assert type(copy) is kind
    assert str(copy) == "my text"


def test_what_is_registered_for_a_class_does_not_spoil_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tblib, which dask.multiprocessing installs, does with what is kept in C."""
    for kind in (UnicodeDecodeError, SyntaxError):
        monkeypatch.setitem(copyreg.dispatch_table, kind, lambda e: (type(e).__new__, (type(e),)))
    error = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    copy = travel(error)
    assert type(copy) is UnicodeDecodeError
    assert str(copy) == str(error)
    assert type(travel(SyntaxError("no", ("file", 1, 2, "text", 1, 3)))) is SyntaxError


class Hostile(Exception):
    def __reduce__(self) -> Any:
        raise SystemExit("not me")


def test_an_exception_that_ends_whoever_pickles_it_is_told_as_text() -> None:
    copy = travel(Hostile("my text"))
    assert "my text" in str(copy)


def test_an_exception_that_forbids_assignment() -> None:
    copy = travel(Frozen(7))
    assert copy == Frozen(7)
    assert isinstance(copy.__cause__, RemoteTraceback)
    assert copy.__notes__[0].startswith("wukong: task")


@pytest.mark.parametrize("kind", [StopIteration, concurrent.futures.CancelledError])
def test_an_exception_that_python_would_take_for_another(kind: type[Exception]) -> None:
    assert isinstance(travel(kind("x")), TaskError)


@pytest.mark.parametrize(
    ("blob", "kind", "says"),
    [
        (["lost", "3", 2, wire.pack([0]), "r", ""], ExecutorLost, "Executor 3 vanished 2 times"),
        (["lost", "3", 2, wire.pack(list(range(7))), "", ""], ExecutorLost, "'e' and 2 more"),
        (["unstarted", "0", 0, wire.pack([2]), "", ""], ExecutorLost, "never began work on 'c'"),
        (["cancelled", "by its client"], JobCancelled, "cancelled: by its client."),
        (["mismatch", "dask: client 1, function 2"], VersionMismatch, "dask: client 1, function 2"),
        (["input", [1]], StoreLost, "has lost ('x', 1)"),
        (["input", [-1]], StoreLost, "has lost argument 0 of task 'a'"),
        (["input", []], StoreLost, "has lost a part of the plan"),
        (["full", "it is full"], StoreFull, "it is full"),
        (["bucket", "there is none"], BucketError, "there is none"),
        (["protocol", "3 of 4 tasks passed"], ProtocolError, "3 of 4 tasks passed"),
        (["overtime", 1500, 3, 9], JobTimeout, "its limit of 1.5 s, and 3 of its 9 tasks"),
        (["data", "its mark"], StoreLost, "has lost its mark while the job ran"),
        (["novel"], ProtocolError, "cannot be read"),
    ],
)
def test_what_the_store_says_becomes_an_error(blob: Any, kind: type, says: str) -> None:
    error = failure.rebuild(wire.pack(blob), name_of)
    assert type(error) is kind
    assert says in str(error)


@pytest.mark.parametrize(
    ("blob", "numbers", "is_loss"),
    [
        (["task", 3, b"", "", "", "", "", ""], [3], False),
        (["unreadable", "value", -1, "", "", "", "", ""], [-1], False),
        (["input", [1, 2]], [1, 2], True),
        (["lost", "3", 2, wire.pack(list(range(7))), "", b""], [0, 1, 2, 3, 4], False),
        (["lost", "3", 2, wire.pack([0]), "", LastWords(8, 1.0, 1, 2, 3.0).pack()], [8, 0], False),
        (["data", "its mark"], [], True),
        (["protocol", "3 of 4 tasks passed"], [], True),
        (["overtime", 1500, 3, 9], [], False),
    ],
)
def test_what_a_failure_is_about(blob: Any, numbers: list[int], is_loss: bool) -> None:
    assert failure.numbers(wire.pack(blob)) == numbers
    assert failure.is_loss(wire.pack(blob)) is is_loss


@pytest.mark.parametrize(
    ("what", "number", "says"),
    [
        ("plan", 1, "cannot unpickle task ('x', 1): ImportError: no such thing. Does it lack"),
        ("value", 2, "cannot unpickle the output of task 'c': ImportError"),
        ("value", -1, "cannot unpickle argument 0 of task 'a': ImportError"),
    ],
)
def test_what_the_function_cannot_unpickle_is_named(what: Any, number: int, says: str) -> None:
    blob = failure.unreadable(
        what,
        number,
        ImportError("no such thing"),
        hidden=lambda _: False,
        request_id="request-1",
        executor="0",
    )
    error = failure.rebuild(blob, name_of)
    assert isinstance(error, SerializationError)
    assert says in str(error)
    assert error.__notes__ == ["wukong: in executor 0, request request-1"]


def test_a_lost_executor_is_said_with_its_task_and_the_likely_cause() -> None:
    words = LastWords(task=1, seconds=3.0, resident=250, limit=256, left=50.0)
    blob = wire.pack(["lost", "3", 2, wire.pack([0, 2]), "request-1", words.pack()])
    assert failure.request_lost(blob) == "request-1"
    start = (
        "Executor 3 vanished 2 times (wukong.max_attempts), at last in request request-1, while it"
        " ran task ('x', 1) (for 3 s or more). "
    )
    assert str(failure.rebuild(blob, name_of)).startswith(
        start + "Most likely its process ran out of memory: "
    )
    log = "2026-01-02T03:04:05.000Z r Task timed out after 5.00 seconds\n"
    error = failure.rebuild(blob, name_of, log=log)
    assert str(error).startswith(start + "The function reached its time limit of 5 s. ")


def test_between_two_tasks_a_lost_executor_is_said_with_its_frontier() -> None:
    words = LastWords(task=None, seconds=3.0, resident=1, limit=256, left=50.0)
    blob = wire.pack(["lost", "3", 2, wire.pack([0, 2]), "request-1", words.pack()])
    assert "while it worked on 'a', 'c' and what follows." in str(failure.rebuild(blob, name_of))


def test_an_executor_that_never_began_is_said_to_be_throttled() -> None:
    blob = wire.pack(["unstarted", "3", 0, wire.pack([0]), "", ""])
    assert failure.request_lost(blob) == ""
    assert "Its log tells." in str(failure.rebuild(blob, name_of))
    error = failure.rebuild(blob, name_of, throttled="Rate Exceeded.")
    assert "Lambda said 'Rate Exceeded.'. Wait, or raise the concurrency" in str(error)


def test_how_often_a_task_was_tried_is_said() -> None:
    blob = failure.task_failed(
        1, ValueError("no"), tries=3, hidden=lambda _: False, request_id="r", executor="0"
    )
    (note,) = failure.rebuild(blob, name_of).__notes__
    assert note == ("wukong: task ('x', 1) failed in executor 0, request r, in the last of 3 tries")


@pytest.mark.parametrize(
    ("along", "said"),
    [
        ([], "did not end within the 5 s that the function may take. Cut it into smaller tasks,"),
        (
            [0, 2],
            (
                "and 'a', 'c', which made what it goes through, did not end within the 5 s that"
                " the function may take. An iterator cannot be handed over half used: return lists"
                " instead,"
            ),
        ),
    ],
)
def test_a_timeout_names_all_that_had_to_run_in_that_time(along: list[int], said: str) -> None:
    where: dict[str, Any] = {"hidden": lambda _: False, "request_id": "r", "executor": "0"}
    blob = failure.task_timed_out(1, 5.0, [], tries=0, along=along, **where)
    assert str(failure.rebuild(blob, name_of)) == (
        f"Task ('x', 1) {said} or give the function a longer timeout."
    )


@pytest.mark.parametrize(("tries", "said"), [(1, ""), (2, ", in the last of 2 tries")])
def test_a_timeout_names_the_task_its_limit_and_what_to_change(tries: int, said: str) -> None:
    stack = [
        traceback.FrameSummary(name, 7, "call", lookup_line=False, line=f"in {name}")
        for name in ("thread", "ours", "ours", "theirs", "ours", "inner")
    ]
    blob = failure.task_timed_out(
        *(1, 0.5, stack),
        tries=tries,
        hidden=lambda name: name == "ours",
        request_id="r",
        executor="0",
    )
    error = failure.rebuild(blob, name_of)
    assert type(error) is TaskTimeout
    assert str(error) == (
        f"Task ('x', 1) took longer than its timeout of 0.5 s{said}. Give it"
        " more with dask.annotate(timeout=…) where it is made, or with timeout=… in the call that"
        " computes it."
    )
    assert error.__notes__ == ["wukong: in executor 0, request r"]
    story = str(error.__cause__)
    assert [line.strip() for line in story.splitlines() if " in " in line] == [
        'File "theirs", line 7, in call',
        "in theirs",
        'File "ours", line 7, in call',
        "in ours",
        'File "inner", line 7, in call',
        "in inner",
    ]


def test_a_large_exception_is_not_pieced_together_to_be_thrown_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def joined(_: wire.Segments) -> bytes:
        raise AssertionError("it is as large as what it holds, a second time")

    monkeypatch.setattr(wire, "join", joined)
    error = ValueError("large", bytes(2 * failure.MOST_PICKLE))
    failure.task_failed(1, error, hidden=lambda _: False, request_id="r", executor="0")
