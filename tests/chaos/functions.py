"""What the tasks do. Light to import: a sandbox that was killed does it again and again."""

from __future__ import annotations

import random


def number(x: int) -> int:
    return x


def mix(*xs: int) -> int:
    """Depends on each of its inputs and on their order."""
    return hash(xs) & 0xFFFFFFFF


def blob(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def exclusive_or(*blobs: bytes) -> bytes:
    """As large as the largest, and different if one bit of one of them is."""
    total = 0
    for some in blobs:
        total ^= int.from_bytes(some, "little")
    return total.to_bytes(max(map(len, blobs)), "little")


def fails(x: int) -> None:
    raise ValueError(f"on purpose: {x}")
