"""What an executor said last, and what it and its log tell of how it ended."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from wukong_async import wire

NEARLY_FULL = 0.95
"""Share of its memory that the platform has seen in use when it kills a function for that."""
RATHER_FULL = 0.8
"""The same, when the executor itself looked last, up to a second before."""
NO_TIME = 1.5
"""Seconds left that are none: an executor speaks every second."""
SHOWN = 10
"""Lines of a log that a message shows."""

# The platform's lines: what tasks write may look similar, but does not begin so.
_TIMED_OUT = re.compile(r"^\S+ \S+ Task timed out after ([\d.]+) seconds", re.MULTILINE)
_EXITED = re.compile(r"^RequestId: \S+ Error: Runtime exited with error: (.+)$", re.MULTILINE)
_REPORT = re.compile(r"^REPORT .*\bMemory Size: (\d+) MB\s+Max Memory Used: (\d+) MB", re.MULTILINE)
_PLATFORM = ("START ", "END ", "REPORT ")
_OUT_OF_MEMORY = re.compile(r"^REPORT .*\bRuntime\.OutOfMemory\b", re.MULTILINE)

MEMORY_ADVICE = "Give the function more memory, or cut the data of its tasks into smaller chunks."
TIME_ADVICE = (
    "An executor hands its work over before that, but not while a task holds Python's GIL. Cut the"
    " task into smaller ones, have it let go of the GIL, or give the function a longer timeout."
)
SILENCE = (
    "A task that holds Python's GIL for longer than wukong.lease looks like this, and so does a"
    " function that is frozen or cut off from the store. Have the task let go of the GIL, cut it"
    " into smaller ones, or set a longer wukong.lease."
)


class LastWords(NamedTuple):
    """What travels with the renewal of a lease."""

    task: int | None
    """What runs now."""
    seconds: float
    """It has been running for at least so long."""
    resident: int
    """MB of memory that the process has."""
    limit: int
    """MB that it may have; 0 if that is not known."""
    left: float
    """Seconds of the function's time."""

    def pack(self) -> bytes:
        """The bytes that the store keeps."""
        return wire.pack(list(self))

    @classmethod
    def unpack(cls, packed: bytes) -> LastWords | None:
        """The opposite of `pack`; None if nothing was said."""
        return cls(*wire.unpack(packed)) if packed else None


def likely_cause(words: LastWords | None, log: str) -> str:
    """Why an executor has vanished, and what to do about it, as sentences.

    Parameters
    ----------
    log
        Of its last request; empty if it cannot be had.
    """
    timed_out, exited, report = (_last(p, log) for p in (_TIMED_OUT, _EXITED, _REPORT))
    size, used = map(int, report.groups()) if report else (0, 0)
    full = used >= NEARLY_FULL * size > 0 or _is_full(words)
    if timed_out:
        return (
            f"the time limit: the function was ended after {float(timed_out[1]):g} s. {TIME_ADVICE}"
        )
    if _OUT_OF_MEMORY.search(log) or (exited and "killed" in exited[1] and full):
        return _out_of_memory(words, size, used)
    if exited:
        return _crashed(exited[1], log)
    if report:
        return (
            "the function ended by itself, and could not say so to the store. Can it reach the"
            f" store all the time?{_end_of(log)}"
        )
    # From here on it is not known to have ended: its last words have to do.
    if words and words.left < NO_TIME:
        return (
            f"the time limit: {max(0.0, words.left):.1f} s were left to the function. {TIME_ADVICE}"
        )
    if _is_full(words):
        return _out_of_memory(words, 0, 0)
    if log:
        return f"it fell silent, but its process has not ended. {SILENCE}"
    return (
        f"it fell silent. {SILENCE} If its process has ended, the function's log tells why; with"
        " the permission logs:FilterLogEvents it is said here."
    )


def _is_full(words: LastWords | None) -> bool:
    return words is not None and words.resident > RATHER_FULL * words.limit > 0


def _out_of_memory(words: LastWords | None, size: int, used: int) -> str:
    if words is not None and words.resident > used:
        size, used = words.limit, words.resident
    return (
        f"out of memory: its process had {used} MB, and the function may have {size} MB."
        f" {MEMORY_ADVICE}"
    )


def _crashed(status: str, log: str) -> str:
    if "killed" in status:
        what = (
            "A task or something that it calls has killed it, or its memory has grown too fast to"
            " be seen."
        )
    elif "signal" in status:
        what = "Most likely native code that the task calls has a bug."
    else:
        what = "Something that a task calls ends the process, as os._exit() does."
    return f"a crash: its process ended with {status}. {what}{_end_of(log)}"


def _end_of(log: str) -> str:
    lines = [x for x in log.splitlines() if x.strip() and not x.startswith(_PLATFORM)]
    return _indented("The end of its log:", lines[-SHOWN:]) if lines else ""


def _indented(title: str, lines: Sequence[str]) -> str:
    return "".join([f" {title}", *(f"\n    {line:.500}" for line in lines)])


def _last(pattern: re.Pattern[str], log: str) -> re.Match[str] | None:
    found = list(pattern.finditer(log))
    return found[-1] if found else None
