"""What is concluded from the last words of an executor and its log."""

from __future__ import annotations

import pytest

from wukong_async.last_words import SHOWN, LastWords, likely_cause

FINE = LastWords(task=7, seconds=2.5, resident=100, limit=256, left=50.0)
FULL = FINE._replace(resident=220)
LATE = FINE._replace(left=0.7)
START = "START RequestId: r Version: $LATEST\n"
EXITED = "RequestId: r Error: Runtime exited with error: "


def report(used: int = 100) -> str:
    return (
        "END RequestId: r\nREPORT RequestId: r\tDuration: 5.00 ms\tBilled Duration: 5 ms\t"
        f"Memory Size: 256 MB\tMax Memory Used: {used} MB\t\n"
    )


def log(line: str, used: int = 100) -> str:
    return f"{START}it was said\n{line}\n{report(used)}"


SILENT = "it fell silent, but its process has not ended."
TIME = "the time limit: the function was ended after 3 s. An executor hands"
TIMED_OUT = "2026-01-02T03:04:05.000Z r Task timed out after 3.00 seconds\n"


@pytest.mark.parametrize(
    ("words", "text", "says"),
    [
        # The log knows.
        (FINE, log(TIMED_OUT), TIME),
        (None, log(TIMED_OUT), TIME),
        (FULL, log(TIMED_OUT, 256), TIME),
        (FINE, log(EXITED + "signal: killed", 255), "out of memory: its process had 255 MB,"),
        (None, log(EXITED + "signal: killed", 256), "out of memory: its process had 256 MB,"),
        (FULL, log(EXITED + "signal: killed"), "out of memory: its process had 220 MB, and"),
        (
            None,
            report().replace("\n", "\tStatus: error\tError Type: Runtime.OutOfMemory\n"),
            "out of memory: its process had 100 MB, and",
        ),
        (
            FINE,
            log(EXITED + "signal: killed"),
            "a crash: its process ended with signal: killed. A task or",
        ),
        (None, log(EXITED + "exit status 3", 256), "a crash: its process ended with exit status 3"),
        (
            FULL,
            log(EXITED + "signal: segmentation fault (core dumped)"),
            "a crash: its process ended with signal: segmentation fault (core dumped). Most likely",
        ),
        (FULL, log("gives up: no answer"), "the function ended by itself, and could not say so"),
        # It does not: what was said last decides.
        (LATE, "", "the time limit: 0.7 s were left"),
        (LATE._replace(left=-2.0), "", "the time limit: 0.0 s were left"),
        (LATE, START, "the time limit: 0.7 s were left"),
        (FULL, "", "out of memory: its process had 220 MB, and the function may have 256"),
        (FULL._replace(limit=0), START, SILENT),
        (FINE, START, SILENT),
        (None, START, SILENT),
        (FINE, "", "it fell silent. A task that holds Python's GIL for longer than wukong.lease"),
        (None, "", "the permission logs:FilterLogEvents"),
        # What tasks write is no evidence.
        (FINE, START + "Task timed out after 3.00 seconds\n", SILENT),
        (FINE, START + "Runtime exited with error: signal: killed\n", SILENT),
        (FINE, START + "Runtime.OutOfMemory\n", SILENT),
        # An event that was delivered twice has two logs: the last counts.
        (None, log(EXITED + "exit status 3") + log(TIMED_OUT), TIME),
        (None, log(EXITED + "exit status 3") + log(EXITED + "exit status 4"), "exit status 4"),
    ],
)
def test_the_cause(words: LastWords | None, text: str, says: str) -> None:
    cause = likely_cause(words, text)
    assert says in cause
    assert "\n" not in cause or "The end of its log:\n" in cause


def test_a_crash_shows_the_end_of_the_log() -> None:
    said = "".join(f"line {i}\n" for i in range(50))
    cause = likely_cause(None, f"{START}{said}\n{EXITED}exit status 3\n{report()}")
    title, *lines = cause.split("\n")
    assert title.endswith("The end of its log:")
    assert len(lines) == SHOWN
    assert lines[-2:] == ["    line 49", f"    {EXITED}exit status 3"]


def test_last_words_travel() -> None:
    assert LastWords.unpack(FINE.pack()) == FINE
    silent = FINE._replace(task=None)
    assert LastWords.unpack(silent.pack()) == silent
    assert LastWords.unpack(b"") is None
