"""Functions for the tests' graphs, importable by the sandboxes."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any

SEEN: list[Any] = []


def inc(x: int) -> int:
    return x + 1


def add(*xs: int) -> int:
    return sum(xs)


def identity(x: Any) -> Any:
    return x


def returns_none(*_: Any) -> None:
    return None


def fails(message: str = "on purpose") -> None:
    raise ValueError(message)


def touch_and_wait(touched: str, awaited: str, value: Any = None) -> Any:
    """Say that this task runs, and wait to be allowed to go on."""
    with Path(touched).open("a") as file:
        file.write(f"{os.getpid()}\n")
    while not Path(awaited).exists():
        time.sleep(0.005)
    return value


def remember(x: Any) -> list[Any]:
    """What this function was ever called with in this process."""
    SEEN.append(x)
    return list(SEEN)


def exit_process(code: int) -> None:
    os._exit(code)


def system_exit(code: int) -> None:
    sys.exit(code)


def allocate(mb: int) -> int:
    hoard = bytearray(mb * 1024 * 1024)
    hoard[::4096] = b"x" * len(hoard[::4096])
    time.sleep(30)
    return len(hoard)


def deadly(_: int, way: str, argument: int) -> None:
    """Take its process along, when a renewal has had the time to say what runs."""
    time.sleep(0.4)
    print(f"about to {way}", flush=True)
    match way:
        case "signal":
            os.kill(os.getpid(), argument)
        case "signal and wait":
            os.kill(os.getpid(), argument)
            time.sleep(60)
        case "hold the GIL":
            ctypes.PyDLL(None).sleep(argument)
        case "allocate":
            allocate(argument)
        case "exit":
            exit_process(argument)


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text for you")


def fails_unprintably() -> None:
    raise UnprintableError


def spin(started: str, stopped: str) -> None:
    """Never ends by itself; says when somebody ends it."""
    Path(started).write_text(f"{os.getpid()}\n")
    try:
        while True:
            pass
    finally:
        Path(stopped).touch()


def ones(mb: int) -> Any:
    import numpy as np

    return np.ones(mb * 125_000)


class Model:
    """Weighs what nobody can guess without a look."""

    def __init__(self, size: int) -> None:
        self.data = bytes(size)


def predict(model: Model, x: int) -> int:
    return len(model.data) + x


def make_generator() -> Any:
    return (i for i in range(3))


class PickyError(Exception):
    """Does not survive a pickle, like many."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")


def fails_pickily() -> None:
    raise PickyError(404, "gone")


class Unpicklable:
    """Says what is wrong with it."""

    def __reduce__(self) -> Any:
        raise TypeError("this one stays at home")


class OnlyThere:
    """Pickles, but does not come back."""

    def __reduce__(self) -> Any:
        return (_not_here, ())


class SlowToLoad:
    """Takes its time to be unpickled, as what imports a large library does."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __reduce__(self) -> Any:
        return (_load_slowly, (self.seconds,))


def _load_slowly(seconds: float) -> SlowToLoad:
    time.sleep(seconds)
    return SlowToLoad(seconds)


def seconds_of(slow: SlowToLoad) -> float:
    return slow.seconds


def _not_here() -> None:
    raise ImportError("cannot be made here")


def make_only_there() -> OnlyThere:
    return OnlyThere()


class HomeLeaver:
    """Ends whoever unpickles it."""

    def __reduce__(self) -> Any:
        return sys.exit, ("at home",)


def make_home_leaver() -> HomeLeaver:
    return HomeLeaver()


def add_lengths(*values: Any) -> int:
    return sum(map(len, values))


def inc_slowly(x: int, seconds: float) -> int:
    """Takes its time, but can be interrupted."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
    return x + 1


def sleep_through(x: Any, seconds: float) -> Any:
    """Cannot be interrupted: it is in C code."""
    time.sleep(seconds)
    return x
