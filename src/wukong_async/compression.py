"""Whether compressing a value pays, and LZ4 to do it.

The client decides for a job (`mode_for`), and only for what it can read itself; an executor without
the `lz4` package does not compress. A look at a few slices of a value decides for the value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import inf

from wukong_async.errors import ConfigError, SerializationError

AUTO, LZ4, NONE = MODES = ("auto", "lz4", "none")
"""Of the setting: where it pays, wherever it makes values smaller, and not at all."""
LEAST = 64 * 1024
"""Bytes below which a round trip costs more than the bytes do."""
SLICES, SLICE = 3, 32 * 1024
"""How many slices of how many bytes are compressed to see what comes of it."""
TCP = 100e6
"""Bytes per second that a Lambda function and a server have between them, lasting."""
COMPRESSED = 500e6
"""Bytes per second that LZ4 compresses, and decompresses, on half a core."""
SMALLER = 0.9
"""What is left of a value that is worth the trouble if time is not asked for."""


def bandwidth(endpoints: Sequence[str]) -> float:
    """Bytes per second to the servers, as far as their URLs tell."""
    return TCP if any(not url.startswith("unix:") for url in endpoints) else inf


def pays(ratio: float, bandwidth: float, compressed: float = COMPRESSED) -> bool:
    """Whether a value that shrinks to this part of itself is sooner there if it is compressed.

    It travels twice, to the server and to one reader, and is compressed and decompressed.

    Parameters
    ----------
    ratio
        Bytes afterwards to bytes before.
    bandwidth, compressed
        Bytes per second.
    """
    saved = 2 * (1 - ratio) / bandwidth
    return saved > 2 / compressed


def mode_for(setting: str) -> str:
    """What a client tells its executors.

    Raises
    ------
    ConfigError
        If it could not read what it asks for.
    """
    if setting == LZ4 and not _available():
        raise ConfigError(f"wukong.compression is {LZ4!r}, but {_MISSING}")
    return setting if _available() else NONE


@dataclass(frozen=True, slots=True)
class Compression:
    """What is done to the values of a job."""

    mode: str = NONE
    bandwidth: float = inf

    def applied(self, segments: Sequence[bytes | bytearray | memoryview]) -> list[bytes] | None:
        """These bytes, compressed; None if that does not pay."""
        size = sum(map(len, segments))
        if self.mode == NONE or size < LEAST or not _available():
            return None
        if self.mode == AUTO and not pays(0.0, self.bandwidth):
            return None
        ratio = _ratio(segments, size)
        if not (ratio < SMALLER if self.mode == LZ4 else pays(ratio, self.bandwidth)):
            return None
        return _compressed(segments, size)


def decompressed(data: memoryview, size: int) -> bytearray:
    """The inverse, in memory of its own.

    Raises
    ------
    SerializationError
        Where the package is missing, or the data is damaged.
    """
    if not _available():
        raise SerializationError(f"a value was compressed with LZ4, but {_MISSING}")
    import lz4.frame

    try:
        whole: bytearray = lz4.frame.decompress(data, return_bytearray=True)
    except RuntimeError as error:
        raise SerializationError(f"a compressed frame is damaged: {error}") from error
    if len(whole) != size:
        raise SerializationError(f"a compressed frame has {len(whole)} bytes instead of {size}")
    return whole


_MISSING = "there is no package `lz4` here: install `wukong-async[lz4]`."


@cache
def _available() -> bool:
    return find_spec("lz4") is not None


def _ratio(segments: Sequence[bytes | bytearray | memoryview], size: int) -> float:
    import lz4.block

    before = after = 0
    for some in _samples(segments, size):
        before += len(some)
        after += len(lz4.block.compress(some, store_size=False))
    return after / before


def _samples(segments: Sequence[bytes | bytearray | memoryview], size: int) -> Iterator[memoryview]:
    """Slices from all over the bytes; short ones where a segment ends."""
    places = [size * (2 * index + 1) // (2 * SLICES) for index in range(SLICES)]
    start = 0
    for segment in segments:
        end = start + len(segment)
        while places and places[0] < end:
            offset = places.pop(0) - start
            yield memoryview(segment)[offset : offset + SLICE]
        start = end


def _compressed(segments: Sequence[bytes | bytearray | memoryview], size: int) -> list[bytes]:
    import lz4.frame

    # Segment by segment, since they lie apart.
    compressor = lz4.frame.LZ4FrameCompressor(block_size=lz4.frame.BLOCKSIZE_MAX1MB)
    pieces = [compressor.begin(size)]
    pieces += (compressor.compress(segment) for segment in segments)
    pieces.append(compressor.flush())
    return pieces
