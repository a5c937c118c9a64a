"""What the command lines of the commands have in common."""

from __future__ import annotations

import argparse


class UsageError(Exception):
    """Arguments that do not fit together or cannot be used: the message says what to do."""


def positive(text: str) -> int:
    """A whole number, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, at least 1")
    return int(text)
