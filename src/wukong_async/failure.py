"""Why a job failed: how an executor or the store says it, and how the caller hears it.

A failure is a msgpack list that starts with its kind; the scripts write some kinds themselves, so
this page and store/lua must agree:

    task       number, tries, pickled exception or empty,
               type, text, traceback, request id, executor
    timeout    number, tries or 0 (all of the function's time), seconds,
               traceback, request id, executor
    unreadable what: plan | value, number, type, text, traceback, request id, executor
    input      the objects that are missing
    full       what the store said
    bucket     what S3 said
    mismatch   what differs
    lost       executor, attempts, packed frontier, request id, packed LastWords or empty
    unstarted  executor, attempts, packed frontier, request id, packed LastWords or empty
    data       what the store has lost of the job
    overtime   limit in ms, tasks that had passed, tasks
    protocol   what was found
    cancelled  by whom or why
"""

from __future__ import annotations

import concurrent.futures
import pickle
import traceback
from collections.abc import Callable, Sequence
from itertools import dropwhile
from types import TracebackType
from typing import Any, Literal, NamedTuple

from wukong_async import wire
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
from wukong_async.last_words import LastWords, likely_cause

MOST_TEXT = 100_000
MOST_PICKLE = 1_000_000
NOT_TO_RAISE = (StopIteration, concurrent.futures.CancelledError)
"""Python gives these a meaning of its own where a coroutine or a future raises them."""
WHY_LOST = "Check its memory limit and eviction policy (`noeviction` is required)."
NAMED = 5
"""Tasks that a message names before it says how many more there are."""


def task_failed(
    task: int,
    error: BaseException,
    *,
    tries: int = 1,
    hidden: Callable[[str], bool],
    request_id: str,
    executor: str,
) -> bytes:
    """The failure of a task.

    Parameters
    ----------
    tries
        How often it was run.
    hidden
        Says of a file name whether its frames, at the top of the traceback, are ours.
    """
    name, text, story = _told(error, hidden)
    # It travels as text. Where tblib is installed it would be pickled too, with our frames.
    # Not by assignment, which a frozen dataclass forbids.
    BaseException.with_traceback(error, None)
    told = (name, text, story, request_id, executor)
    return wire.pack(["task", task, tries, _pickled(error), *told])


def task_timed_out(
    task: int,
    seconds: float,
    stack: Sequence[traceback.FrameSummary],
    *,
    tries: int = 1,
    along: Sequence[int] = (),
    hidden: Callable[[str], bool],
    request_id: str,
    executor: str,
) -> bytes:
    """A task has taken longer than the `seconds` of its `timeout`, in the last of its tries.

    Parameters
    ----------
    tries
        0 if `seconds` are all that the function may take.
    along
        Tasks that had to run in the same time: what they made can be gone through only once.
    stack
        The calls that it was in, the innermost last, below those of its thread and ours.
    """
    ours = dropwhile(lambda call: not hidden(call.filename), stack)
    calls = dropwhile(lambda call: hidden(call.filename), ours)
    story = "".join(["Interrupted here (most recent call last):\n", *traceback.format_list(calls)])
    told = (_text(story), request_id, executor)
    return wire.pack(["timeout", task, tries, seconds, list(along), *told])


def unreadable(
    what: Literal["plan", "value"],
    number: int,
    error: BaseException,
    *,
    hidden: Callable[[str], bool],
    request_id: str,
    executor: str,
) -> bytes:
    """Something cannot be unpickled in the function: a task's part of the plan, or a value."""
    told = _told(error, hidden)
    return wire.pack(["unreadable", what, number, *told, request_id, executor])


def input_lost(objects: Sequence[int]) -> bytes:
    """Objects that a task has to read are not in the store."""
    return wire.pack(["input", list(objects)[:NAMED]])


def data_lost(what: str) -> bytes:
    """Something of the job itself is not in the store any more."""
    return wire.pack(["data", what])


def is_loss(blob: bytes) -> bool:
    """Whether the job failed for what the store has lost, so that it may be run once more.

    A fan-in whose count was lost is never complete: the job breaks a promise of ours, and ends.
    """
    match wire.unpack(blob):
        case [b"input" | b"data" | b"protocol", *_]:
            return True
    return False


def store_full(said: str) -> bytes:
    """There is no room in the store for what a task has made."""
    return wire.pack(["full", _text(said)])


def bucket_refused(said: str) -> bytes:
    """What a task has made, or reads, cannot be in the bucket."""
    return wire.pack(["bucket", _text(said)])


def versions_differ(difference: str) -> bytes:
    """Client and function do not fit together."""
    return wire.pack(["mismatch", difference])


def cancelled(reason: str) -> bytes:
    """Somebody who may has cancelled the job."""
    return wire.pack(["cancelled", _text(reason)])


def numbers(blob: bytes) -> list[int]:
    """The tasks (≥ 0) and literals (< 0) that the message of a failure will name."""
    match wire.unpack(blob):
        case [b"task" | b"timeout", int(number), *_] | [b"unreadable", _, int(number), *_]:
            return [number]
        case [b"input", [*objects]]:
            return objects
        case [b"lost" | b"unstarted", _, _, frontier, _, words]:
            last = LastWords.unpack(words)
            running = [last.task] if last is not None and last.task is not None else []
            return running + list(wire.unpack(frontier)[:NAMED])
    return []


def request_lost(blob: bytes) -> str:
    """The request whose log may tell more about this failure; empty if there is none."""
    match wire.unpack(blob):
        case [b"lost", _, _, _, request_id, _]:
            return _decoded(request_id)
    return ""


def rebuild(
    blob: bytes, name_of: Callable[[int], str], *, log: str = "", throttled: str = ""
) -> Exception:
    """The exception to raise in the caller.

    Parameters
    ----------
    name_of
        Number of a task (≥ 0) or a literal (< 0) → its name, for messages.
    log
        Of the request that `request_lost` names, if it can be had.
    throttled
        How Lambda has refused an invocation that it may take later, if it did so last.
    """
    match wire.unpack(blob):
        case [b"task", int(task), int(tries), pickled, *told]:
            return _task_error(name_of(task), tries, pickled, _Told(*map(_decoded, told)))
        case [b"timeout", int(task), int(tries), float(seconds), along, *told]:
            where = _Told("", "", *map(_decoded, told))
            names = _names(along, name_of)
            return _timeout_error(name_of(task), tries, seconds, names, where)
        case [b"unreadable", what, int(number), *told]:
            return _unreadable_error(what, number, name_of(number), _Told(*map(_decoded, told)))
        case [b"input", []]:
            return StoreLost(
                "The store has lost a part of the plan, which an executor still had to read."
                f" {WHY_LOST}"
            )
        case [b"input", objects]:
            return StoreLost(
                f"The store has lost {_names(objects, name_of)}, which a task still had to read."
                f" {WHY_LOST}"
            )
        case [b"data", what]:
            return StoreLost(
                f"The store has lost {_decoded(what)} while the job ran. {WHY_LOST} Was a server"
                " restarted, or flushed?"
            )
        case [b"full", said]:
            return StoreFull(_decoded(said))
        case [b"bucket", said]:
            return BucketError(_decoded(said))
        case [b"mismatch", difference]:
            return VersionMismatch(
                f"The client and the function differ: {_decoded(difference)}. Install the same"
                " versions on both sides."
            )
        case [b"lost", executor, attempts, frontier, request_id, words]:
            last = LastWords.unpack(words)
            return ExecutorLost(
                f"Executor {_decoded(executor)} vanished {attempts} times (wukong.max_attempts),"
                f" at last in request {_decoded(request_id)}, while it"
                f" {_doing(last, wire.unpack(frontier), name_of)}. {likely_cause(last, log)}"
            )
        case [b"unstarted", executor, _, frontier, *_]:
            why = (
                "Does the function start, and reach the store? Its log tells."
                if not throttled
                else "All concurrency that the function may have is in use, or none is reserved for"
                f" it: Lambda said {throttled!r}. Wait, or raise the concurrency of the function or"
                " the account."
            )
            return ExecutorLost(
                f"The invocation of executor {_decoded(executor)} was sent again and again, but"
                f" never began work on {_names(wire.unpack(frontier), name_of)}. {why}"
            )
        case [b"cancelled", reason]:
            return JobCancelled(f"The job was cancelled: {_decoded(reason)}.")
        case [b"overtime", limit, passed, tasks]:
            return JobTimeout(
                f"The job has run for longer than its limit of {limit / 1000:g} s, and {passed} of"
                f" its {tasks} tasks have passed. Raise job_timeout (or wukong.job_timeout), or"
                " wukong.max_concurrency if more could run at the same time."
            )
        case [b"protocol", found]:
            return ProtocolError(f"This should not happen, please report it: {_decoded(found)}.")
    return ProtocolError(f"The job failed for a reason that cannot be read: {blob!r:.200}")


class _Told(NamedTuple):
    """An error as text, and where it happened."""

    name: str
    text: str
    trace: str
    request_id: str
    executor: str

    @property
    def where(self) -> str:
        return f"in executor {self.executor}, request {self.request_id}"


def _task_error(key: str, tries: int, pickled: bytes, told: _Told) -> Exception:
    where = f"wukong: task {key} failed {told.where}{_after(tries)}"
    error: BaseException | None = None
    if pickled:
        try:
            error = wire.loads(pickled)
        except (Exception, SystemExit):  # SystemExit would end the loop that hears it.
            error = None
    if not isinstance(error, Exception) or isinstance(error, NOT_TO_RAISE):
        # It cannot be rebuilt here, or must not be raised here (SystemExit, KeyboardInterrupt).
        return TaskError(f"{told.name}: {told.text}\n{where}\n\n{told.trace}")
    return _noted(error, told.trace, where)


def _timeout_error(key: str, tries: int, seconds: float, along: str, told: _Told) -> Exception:
    if tries:
        text = (
            f"took longer than its timeout of {seconds:g} s{_after(tries)}. Give it more with"
            " dask.annotate(timeout=…) where it is made, or with timeout=… in the call that"
            " computes it."
        )
    elif along:
        text = (
            f"and {along}, which made what it goes through, did not end within the {seconds:.0f} s"
            " that the function may take. An iterator cannot be handed over half used: return lists"
            " instead, or give the function a longer timeout."
        )
    else:
        text = (
            f"did not end within the {seconds:.0f} s that the function may take. Cut it into"
            " smaller tasks, or give the function a longer timeout."
        )
    error = TaskTimeout(f"Task {key} {text}")
    return _noted(error, told.trace, f"wukong: {told.where}")


def _unreadable_error(what: bytes, number: int, key: str, told: _Told) -> Exception:
    if what == b"plan":
        subject = f"task {key}"
    else:
        subject = key if number < 0 else f"the output of task {key}"
    error = SerializationError(
        f"The function cannot unpickle {subject}: {told.name}: {told.text}. Does it lack a module"
        " that this graph uses?"
    )
    return _noted(error, told.trace, f"wukong: {told.where}")


def _noted(error: Exception, trace: str, note: str) -> Exception:
    # Around the class's own __setattr__: a frozen dataclass forbids it.
    # And around its attributes, which may raise.
    vars(BaseException)["__cause__"].__set__(error, RemoteTraceback(trace))
    attributes = object.__getattribute__(error, "__dict__")
    notes = attributes.get("__notes__")
    attributes["__notes__"] = [*(notes if isinstance(notes, list) else ()), note]
    return error


def _told(error: BaseException, hidden: Callable[[str], bool]) -> tuple[bytes, bytes, bytes]:
    """Type, text and traceback of an error, as they travel."""
    trace = error.__traceback__
    while trace is not None and hidden(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else _qualified(kind)
    return _text(name), _text(wire.text_of(error)), _text(_format(error, trace))


def _pickled(error: BaseException) -> bytes:
    """The exception, if it survives the journey."""
    # Its own way first: where tblib is installed, others would be taken. Many with an `__init__` of
    # their own do not by themselves, but do without calling it.
    for candidate in (_Itself(error), error, _Uninitialised(error)):
        try:
            segments = wire.dumps(candidate)
            if wire.size(segments) > MOST_PICKLE:
                continue
            frame = wire.join(segments)
            back = wire.loads(frame)
            same = type(back).__qualname__ == type(error).__qualname__
            same = same and wire.text_of(back) == wire.text_of(error)
            if same:
                return frame
        except BaseException:  # noqa: S112 - there is nothing to say but that it did not work
            continue
    return b""


class _Itself:
    """Pickles as an exception does of itself, whatever is registered for its class."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> str | tuple[Any, ...]:
        return self._error.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


class _Uninitialised:
    """Pickles as an exception that is rebuilt from its arguments and attributes alone."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> tuple[Any, ...]:
        error = self._error
        return _without_init, (type(error), error.args, dict(vars(error)))


def _without_init(
    kind: type[BaseException], args: tuple[Any, ...], attributes: dict[str, Any]
) -> BaseException:
    error = kind.__new__(kind, *args)
    vars(error).update(attributes)
    return error


def _format(error: BaseException, trace: TracebackType | None) -> str:
    try:
        return "".join(traceback.format_exception(type(error), error, trace))
    except BaseException as broken:  # A __str__ or __repr__ of the user's that raises.
        return f"(the traceback cannot be shown: {type(broken).__name__})"


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _text(text: str) -> bytes:
    return text[:MOST_TEXT].encode("utf-8", "replace")


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "replace")


def _after(tries: int) -> str:
    return f", in the last of {tries} tries" if tries > 1 else ""


def _doing(last: LastWords | None, frontier: Sequence[int], name_of: Callable[[int], str]) -> str:
    if last is None or last.task is None:
        return f"worked on {_names(frontier, name_of)} and what follows"
    since = f" (for {last.seconds:.0f} s or more)" if last.seconds >= 1 else ""
    return f"ran task {name_of(last.task)}{since}"


def _names(numbers: Sequence[int], name_of: Callable[[int], str]) -> str:
    more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
    return ", ".join(map(name_of, numbers[:NAMED])) + more
