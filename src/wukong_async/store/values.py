"""How values are stored: inline in a job's metadata, in parts on the data shards, or in a bucket.

A stored value is either a frame, or a *pointer* to where the frame is; pointers start with a tag
that no frame has, so both travel the same way. The names of the parts say which incarnation wrote
them: two make equal values, but not always equal pickles of them (the order of a set follows the
hash seed of its process), and a value must not be pieced together from both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from wukong_async import wire
from wukong_async.protocol import Commit, Payload
from wukong_async.store.s3 import elsewhere

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
    bucket: str = ""
    """The URL of the bucket that has it, in one part; default: the data shards."""

    @property
    def names(self) -> list[str]:
        """The objects on the data shards, or the one in the bucket, in order."""
        if self.bucket:
            return [elsewhere(self.bucket, f"o{self.task}.{self.writer}")]
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
        return POINTER + wire.pack([self.writer, self.parts, self.size, self.bucket])

    @property
    def token(self) -> str:
        """As the reader count carries it: its bytes, for the scripts, and how to delete it."""
        bucket = [self.bucket] if self.bucket else []
        return ":".join((str(self.size), str(self.parts), self.writer, *bucket))

    @classmethod
    def from_token(cls, task: int, token: str) -> Self:
        """The inverse of `token`."""
        size, parts, writer, *bucket = token.split(":", 3)
        return cls(task, writer, int(parts), int(size), "".join(bucket))


def place_of(task: int, stored: bytes) -> Place | None:
    """Where a stored value points to; None if it is the value itself."""
    if not stored.startswith(POINTER):
        return None
    writer, parts, size, bucket = wire.unpack(stored[len(POINTER) :])
    return Place(task, writer.decode(), parts, size, bucket.decode())


def payload(
    task: int,
    segments: wire.Segments,
    *,
    writer: str,
    inline_limit: int,
    part_size: int,
    bucket: str = "",
    bucket_limit: int = 0,
) -> tuple[Payload, list[tuple[str, wire.Segments]]]:
    """How an output is stored: what of it is in a commit, and the objects to put before.

    Parameters
    ----------
    writer
        Whoever serialised it; no two processes have the same.
    bucket, bucket_limit
        Where those of more bytes go, if there is one.
    """
    size = wire.size(segments)
    if size <= inline_limit:
        return Payload(wire.join(segments)), []
    if bucket and size > bucket_limit:
        place = Place(task, writer, 1, size, bucket)
        return Payload(place.pointer, place.token), [(place.names[0], segments)]
    place = Place(task, writer, math.ceil(size / part_size), size)
    pieces = wire.split(segments, place.part_size)
    return Payload(place.pointer, place.token), list(zip(place.names, pieces, strict=True))


def commit_body(
    commit: Commit,
    payloads: Mapping[int, Payload],
    error: bytes = b"",
    told: str = "",
    memory: int = 0,
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
    memory
        MB that the executor has had at the most.
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
            memory,
        ]
    )


def block_name(index: int) -> str:
    """The object that is a block of the plan."""
    return f"b{index}"
