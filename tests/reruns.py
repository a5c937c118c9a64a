"""Jobs that are run once more: only the loss of data in the store is a reason for it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def reruns() -> Iterator[list[str]]:
    """What is said of such jobs meanwhile."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "is run once more" in record.getMessage():
                said.append(record.getMessage())

    logger, listener = logging.getLogger("wukong"), Listener()
    logger.addHandler(listener)
    try:
        yield said
    finally:
        logger.removeHandler(listener)
