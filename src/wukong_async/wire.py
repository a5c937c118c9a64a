"""Bytes on the wire: values as pickle-5 frames.

A frame is a sequence of segments that are written one after the other:

    in band       tag 0x01 | pickle
    out of band   tag 0x02 | u32 length of the header | header | padding | pickle | buffers

The header is msgpack: `[length of the pickle, [[length, writable], …]]`. The pickle and every
buffer start at a multiple of `ALIGNMENT`, so that arrays are rebuilt where they lie. Buffers that
were writable come back writable (a copy: numpy and Cython code refuses to work on read-only
memory); read-only ones are views on the frame.

Plain pickle is tried first because it is several times faster; cloudpickle is the answer where
plain pickle fails or names what only this process can import (`__main__`, modules registered
for pickling by value).
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Sequence
from typing import Any, TypeAlias

import cloudpickle
import msgpack

from wukong_async.errors import SerializationError

Buffer: TypeAlias = bytes | bytearray | memoryview
Segments: TypeAlias = Sequence[Buffer]

IN_BAND = 0x01
OUT_OF_BAND = 0x02
ALIGNMENT = 64
SMALL_BUFFER = 1024
"""Buffers below this many bytes stay in the pickle: a header entry would cost as much."""

_LENGTH = struct.Struct("<BI")


def dumps(value: object) -> Segments:
    """Serialise `value`.

    Raises
    ------
    SerializationError
        If neither pickle nor cloudpickle can; its cause is what cloudpickle raised.
    """
    buffers: list[pickle.PickleBuffer] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        """Whether the buffer goes in band."""
        if buffer.raw().nbytes < SMALL_BUFFER:
            return True
        buffers.append(buffer)
        return False

    try:
        body = pickle.dumps(value, protocol=5, buffer_callback=keep)
        by_value = _names_local_code(body)
    except Exception:
        by_value = True
    if by_value:
        buffers.clear()
        try:
            body = cloudpickle.dumps(value, protocol=5, buffer_callback=keep)
        except Exception as error:
            raise SerializationError(
                f"cannot pickle a {type(value).__qualname__}: {error}"
            ) from error
    if not buffers:
        return [bytes((IN_BAND,)), body]
    return _frame(body, [buffer.raw() for buffer in buffers])


def loads(frame: Buffer) -> Any:
    """The value of a frame.

    Raises
    ------
    SerializationError
        If the frame is damaged. What unpickling itself raises passes through.
    """
    view = memoryview(frame)
    if not view:
        raise SerializationError("an empty frame is not a value")
    if view[0] == IN_BAND:
        return pickle.loads(view[1:])
    if view[0] != OUT_OF_BAND:
        raise SerializationError(f"unknown frame tag {view[0]:#04x}")
    _, header_length = _LENGTH.unpack_from(view)
    offset = _LENGTH.size + header_length
    length, described = msgpack.unpackb(view[_LENGTH.size : offset])
    offset = _aligned(offset)
    body = view[offset : offset + length]
    buffers: list[Buffer] = []
    for size, writable in described:
        offset = _aligned(offset + length)
        length = size
        part = view[offset : offset + size]
        if len(part) != size:
            raise SerializationError("the frame ends inside a buffer")
        buffers.append(bytearray(part) if writable else part.toreadonly())
    return pickle.loads(body, buffers=buffers)


def size(segments: Sequence[Buffer]) -> int:
    """Bytes of a frame."""
    return sum(len(segment) for segment in segments)


def join(segments: Sequence[Buffer]) -> bytes:
    """The frame in one piece."""
    return b"".join(segments)


def pack(value: object) -> bytes:
    """Msgpack in the dialect that Lua's cmsgpack reads: no `bin` type, strings are bytes."""
    packed: bytes = msgpack.packb(value, use_bin_type=False)
    return packed


def unpack(data: bytes) -> Any:
    """The inverse of `pack`; strings come back as bytes."""
    return msgpack.unpackb(data, raw=True, strict_map_key=False)


def _names_local_code(body: bytes) -> bool:
    if b"__main__" in body:
        return True
    registered = cloudpickle.list_registry_pickle_by_value()
    return any(name.encode() in body for name in registered)


def _frame(body: bytes, buffers: list[memoryview]) -> Segments:
    header = msgpack.packb([len(body), [(b.nbytes, not b.readonly) for b in buffers]])
    segments: list[Buffer] = [_LENGTH.pack(OUT_OF_BAND, len(header)), header]
    offset = _LENGTH.size + len(header)
    parts: list[Buffer] = [body, *buffers]
    for part in parts:
        segments.append(bytes(_aligned(offset) - offset))
        segments.append(part)
        offset = _aligned(offset) + len(part)
    return segments


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
