"""How values are stored: inline in a job's metadata, or in parts on the data shards.

A stored value is either a frame, or a *pointer* to where the frame is; pointers start with a tag
that no frame has, so both travel the same way. The names of the parts say which incarnation wrote
them: two make equal values, but not always equal pickles of them (the order of a set follows the
hash seed of its process), and a value must not be pieced together from both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from wukong_async import wire
from wukong_async.protocol import Commit, Payload

POINTER = b"\x00"
MANIFEST = 0
"""The number under which a manifest is stored; its writer is called so, and no executor is."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an object is: `parts` parts of about equal size, `size` bytes in all."""

    task: int
    writer: str
    parts: int
    size: int = 0

    @property
    def names(self) -> list[str]:
        """The objects on the data shards, in order."""
        return [f"o{self.task}.{self.writer}.{part}" for part in range(self.parts)]

    @property
    def part_size(self) -> int:
        """Bytes of each part but the last."""
        return -(-self.size // self.parts)

    @property
    def sizes(self) -> list[int]:
        """Bytes of each part."""
        step = self.part_size
        return [min(step, self.size - start) for start in range(0, self.parts * step, step)]

    @property
    def pointer(self) -> bytes:
        """As it stands in the metadata."""
        return POINTER + wire.pack([self.writer, self.parts, self.size])

    @property
    def token(self) -> str:
        """As the reader count carries it, opaque to the scripts: enough to delete the parts."""
        return f"{self.parts}:{self.writer}"

    @classmethod
    def from_token(cls, task: int, token: str) -> Self:
        """The inverse of `token`."""
        parts, _, writer = token.partition(":")
        return cls(task, writer, int(parts))


def place_of(task: int, stored: bytes) -> Place | None:
    """Where a stored value points to; None if it is the value itself."""
    if not stored.startswith(POINTER):
        return None
    writer, parts, size = wire.unpack(stored[len(POINTER) :])
    return Place(task, writer.decode(), parts, size)


def payload(
    task: int,
    segments: wire.Segments,
    *,
    writer: str,
    inline_limit: int,
    part_size: int,
) -> tuple[Payload, list[tuple[str, wire.Segments]]]:
    """How an output is stored: what of it is in a commit, and the objects to put before.

    Parameters
    ----------
    writer
        Whoever serialised it; no two processes have the same.
    """
    size = wire.size(segments)
    if size <= inline_limit:
        return Payload(wire.join(segments)), []
    place = Place(task, writer, math.ceil(size / part_size), size)
    pieces = _split(segments, place.part_size)
    return Payload(place.pointer, place.token), list(zip(place.names, pieces, strict=True))


def commit_body(
    commit: Commit, payloads: Mapping[int, Payload], error: bytes = b"", told: str = ""
) -> bytes:
    """A commit as it travels. It is formed once: sending it again means these bytes.

    Parameters
    ----------
    payloads
        The serialised outputs that the commit publishes or announces.
    error
        What went wrong, for a failed one.
    told
        `protocol.told_after` the commit before.
    """
    requested = commit.held.union(commit.results)

    def published(task: int, reads: int) -> list[object]:
        payload = payloads[task]
        # A result that is only pointed to must outlive its readers: it is held, by one more.
        reads += task in requested and payload.place != ""
        return [task, reads, payload.place, payload.inline]

    return wire.pack(
        [
            commit.passed,
            False if commit.stay is None else commit.stay,
            [published(task, reads) for task, reads in commit.publish],
            [[t, payloads[t].inline] for t in commit.results],
            commit.arrivals,
            commit.reads,
            error,
            commit.probes,
            commit.offers,
            commit.release,
            told,
        ]
    )


def block_name(index: int) -> str:
    """The object that is a block of the plan."""
    return f"b{index}"


def _split(segments: wire.Segments, size: int) -> Iterator[wire.Segments]:
    """The same bytes, cut into pieces of `size` without copying them."""
    piece: list[wire.Buffer] = []
    room = size
    for segment in segments:
        view = memoryview(segment)
        while len(view) >= room:
            piece.append(view[:room])
            view = view[room:]
            yield piece
            piece, room = [], size
        if len(view):
            piece.append(view)
            room -= len(view)
    if piece:
        yield piece
