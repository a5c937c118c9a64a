"""A backend in a process of its own, as it has in its user's hands.

What idles in a process takes time from what is measured there: dask.distributed's scheduler lives
in the process of its client, and so does the endpoint of a local cluster.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection, Pipe
from typing import Any, Self

from benchmarks.backends import BACKENDS, Backend, Lane
from benchmarks.counting import Counts
from benchmarks.workloads import Sized
from wukong_async import wire
from wukong_async.local.cluster import python_path

GONE = (EOFError, BrokenPipeError, KeyboardInterrupt)
"""What a process hears when nobody wants to know any more."""


class Apart:
    """A backend by its name, from its start to its end. A context manager.

    Raises
    ------
    What the backend raises; RuntimeError if that does not pickle, or if its process dies.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries: list[str] = []
        self.counts = self.traces = False
        """Whether the backend can do that."""

    def __enter__(self) -> Self:
        self._pipe, theirs = Pipe()
        # Not by `multiprocessing`, which starts another process that stays.
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, self.name, str(theirs.fileno())],
                env={**os.environ, "PYTHONPATH": python_path()},
                pass_fds=[theirs.fileno()],
            )
        try:
            self.entries, self.counts, self.traces = self._answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.wait()

    def value(self, entry: str, each: Sized) -> Any:
        """What a workload comes to, called by an entry of `Backend.entries`."""
        return self._ask("value", entry, each)

    def seconds(self, entry: str, each: Sized) -> float:
        """How long that takes."""
        found: float = self._ask("seconds", entry, each)
        return found

    def count(self, entry: str, each: Sized, times: int) -> Counts:
        """See `Backend.count`."""
        counts: Counts = self._ask("count", entry, each, times)
        return counts

    def trace(self, each: Sized) -> list[Lane]:
        """See `Backend.trace`."""
        lanes: list[Lane] = self._ask("trace", each)
        return lanes

    def _ask(self, *words: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):  # It will not answer.
            self._pipe.send(words)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer, error = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise RuntimeError(f"The process of {self.name} has died.") from None
        if error is not None:
            raise error
        return answer


def _serve(name: str, pipe: Connection) -> None:
    """Answer until nobody asks any more."""
    with contextlib.suppress(*GONE), contextlib.ExitStack() as stack:
        try:
            backend = stack.enter_context(BACKENDS[name]())
            can = list(backend.entries), backend.count is not None, backend.trace is not None
        except Exception as error:
            pipe.send((None, _travelling(error)))
            return
        pipe.send((can, None))
        while True:
            words = pipe.recv()
            try:
                pipe.send((_done(backend, *words), None))
            except Exception as error:  # Perhaps the answer does not pickle.
                pipe.send((None, _travelling(error)))


def _done(backend: Backend, verb: str, *words: Any) -> Any:
    match verb, words:
        case "value", (entry, each):
            return backend.entries[entry](each.make())
        case "seconds", (entry, each):
            collection = each.make()
            gc.collect()
            started = time.perf_counter()
            backend.entries[entry](collection)
            return time.perf_counter() - started
        case "count", (entry, each, times):
            assert backend.count is not None
            return backend.count(entry, each.make, times)
        case "trace", (each,):
            assert backend.trace is not None
            return backend.trace(each.make())
    raise AssertionError(verb)


def _travelling(error: Exception) -> Exception:
    with contextlib.suppress(Exception):
        wire.loads(wire.join(wire.dumps(error)))
        return error
    return RuntimeError(f"{type(error).__name__}: {wire.text_of(error)}")


if __name__ == "__main__":
    _serve(sys.argv[1], Connection(int(sys.argv[2])))
