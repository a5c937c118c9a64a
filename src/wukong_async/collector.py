"""Bulk allocation without the cycle collector.

Planning and unpickling make millions of small containers, none of them garbage. The collector walks
all of them again and again meanwhile: measured on a chain of 100,000 tasks, it costs 2 of 3 µs of
planning and 8 of 13 µs of decoding per task.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_pauses = 0
_resume = False


@contextmanager
def collector_paused() -> Iterator[None]:
    """No automatic collections while any thread is in here; afterwards as it was before."""
    global _pauses, _resume  # noqa: PLW0603 - the collector is global
    with _lock:
        if _pauses == 0:
            _resume = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses -= 1
            if _pauses == 0 and _resume:
                gc.enable()
