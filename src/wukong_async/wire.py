"""Bytes on the wire: values as pickle-5 frames.

A frame is a sequence of segments that are written one after the other:

    in band       tag 0x01 | pickle
    out of band   tag 0x02 | u32 length of the header | header | padding | pickle | buffers
    compressed    tag 0x03 | u64 length of one of the above | that one, as an LZ4 frame

The header is msgpack: `[length of the pickle, [[length, writable], …]]`. The pickle and every
buffer start at a multiple of `ALIGNMENT`, so that arrays are rebuilt where they lie. Buffers that
were writable come back writable: numpy and Cython code refuses to work on read-only memory. One
that is most of a writable frame stays where it lies; others are copied, so that a small part of a
value does not keep all of its frame. Read-only ones are views on the frame.

Plain pickle is tried first because it is several times faster; cloudpickle is the answer where
plain pickle fails or names what only this process can import (`__main__`, modules registered
for pickling by value).

A frame of many values (`dumps_some`) has their pickles one after the other, all made by one
pickler: what they share is written once, and whoever reads them knows which one cannot be read.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias, TypeVar

import cloudpickle
import msgpack

from wukong_async.compression import Compression, decompressed
from wukong_async.errors import SerializationError

Buffer: TypeAlias = bytes | bytearray | memoryview
Segments: TypeAlias = Sequence[Buffer]
T = TypeVar("T")

IN_BAND = 0x01
OUT_OF_BAND = 0x02
COMPRESSED = 0x03
ALIGNMENT = 64
SMALL_BUFFER = 1024
"""Buffers below this many bytes stay in the pickle: a header entry would cost as much."""
MOST_SHARED = 64 * 1024 * 1024
"""Bytes of a frame of many that stays whole for the sake of what its values share."""

_LENGTH = struct.Struct("<BI")
_RAW_LENGTH = struct.Struct("<BQ")


class ItemError(SerializationError):
    """One of many values does not pickle, or does not come back; `__cause__` says why."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


def dumps(value: object) -> Segments:
    """Serialise `value`.

    Raises
    ------
    SerializationError
        If neither pickle nor cloudpickle can; its cause is what cloudpickle raised.
    """

    def dump(module: Any) -> tuple[tuple[bytes, _Buffers], bool]:
        buffers = _Buffers()
        body = module.dumps(value, protocol=5, buffer_callback=buffers.keep)
        return (body, buffers), _names_local_code(body)

    try:
        body, buffers = _by_reference_or_value(dump)
    except Exception as error:
        raise SerializationError(_cannot(value, error)) from error
    return _frame(body, buffers)


def dumps_some(values: Sequence[object], most: int) -> tuple[int, Segments]:
    """Serialise the first of `values` into a frame of about `most` bytes: how many, and the frame.

    A value that would weigh as much in the next frame is left for it. So there is at least one, and
    more than `most` bytes only for a single value or for the sake of what the values share.

    Raises
    ------
    ItemError
        For the value that neither pickle nor cloudpickle can serialise.
    """
    count, body, buffers = _by_reference_or_value(partial(_dump_some, values, most))
    return count, _frame(body, buffers)


def dumps_all(values: Sequence[object]) -> Segments:
    """Serialise all of `values` into one frame, as `dumps_some` would.

    Raises
    ------
    ItemError
        For the value that neither pickle nor cloudpickle can serialise.
    """
    return dumps_some(values, sys.maxsize)[1]


def own_weights(values: Sequence[object]) -> list[int]:
    """The bytes of each of `values` that it does not share with others of them, at most.

    Pickled by one pickler, what several share counts for the first of them; in the other order
    for the last. So the smaller of the two figures has it for none.

    Raises
    ------
    ItemError
        For the value that neither pickle nor cloudpickle can serialise.
    """
    return _by_reference_or_value(partial(_own_weights, values))


def compressed(segments: Segments, compression: Compression) -> Segments:
    """A frame, compressed if that pays."""
    made = compression.applied(segments)
    return segments if made is None else [_RAW_LENGTH.pack(COMPRESSED, size(segments)), *made]


def weight(frame: Buffer) -> int:
    """Bytes of a frame before it was compressed: about those of its value in memory."""
    if frame[:1] != bytes((COMPRESSED,)):
        return len(frame)
    return int(_RAW_LENGTH.unpack_from(frame)[1])


def loads(frame: Buffer) -> Any:
    """The value of a frame; a writable one may be part of it from now on.

    Raises
    ------
    SerializationError
        If the frame is damaged. What unpickling itself raises passes through.
    """
    body, buffers = _parse(frame)
    return pickle.loads(body, buffers=buffers)


def text_of(error: BaseException) -> str:
    """What an error says, even if its `__str__` is the user's and raises."""
    try:
        return str(error)
    except BaseException as broken:
        return f"(its text cannot be shown: {type(broken).__name__})"


def loads_some(frame: Buffer) -> Iterator[Any]:
    """The values of a frame made by `dumps_some`.

    Raises
    ------
    ItemError
        For the value that cannot be unpickled.
    SerializationError
        If the frame is damaged.
    """
    body, buffers = _parse(frame)
    file = io.BytesIO(body)
    unpickler = pickle.Unpickler(file, buffers=iter(buffers))
    index = 0
    while file.tell() < len(body):
        try:
            value = unpickler.load()
        except BaseException as error:  # Whatever an import or a `__setstate__` may raise.
            raise ItemError(index, f"{type(error).__name__}: {text_of(error)}") from error
        yield value
        index += 1


def _parse(frame: Buffer) -> tuple[memoryview, Sequence[Buffer]]:
    """The pickle of a frame and its buffers."""
    view = memoryview(frame)
    if not view:
        raise SerializationError("an empty frame is not a value")
    if view[0] == COMPRESSED:
        view = memoryview(decompressed(view[_RAW_LENGTH.size :], weight(view)))
    if view[0] == IN_BAND:
        return view[1:], ()
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
        if not writable:
            buffers.append(part.toreadonly())
        elif view.readonly or 2 * size < len(view):
            buffers.append(bytearray(part))
        else:
            buffers.append(part)
    return body, buffers


def size(segments: Sequence[Buffer]) -> int:
    """Bytes of a frame."""
    return sum(len(segment) for segment in segments)


def join(segments: Sequence[Buffer]) -> bytes:
    """The frame in one piece."""
    return b"".join(segments)


def split(segments: Segments, size: int) -> Iterator[Segments]:
    """The same bytes, cut into pieces of `size` without copying them."""
    piece: list[Buffer] = []
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


def pack(value: object) -> bytes:
    """Msgpack in the dialect that Lua's cmsgpack reads: no `bin` type, strings are bytes."""
    packed: bytes = msgpack.packb(value, use_bin_type=False)
    return packed


def unpack(data: bytes) -> Any:
    """The inverse of `pack`; strings come back as bytes."""
    return msgpack.unpackb(data, raw=True, strict_map_key=False)


def _by_reference_or_value(attempt: Callable[[Any], tuple[T, bool]]) -> T:
    """What `attempt` makes with pickle; with cloudpickle where that fails or names local code.

    Parameters
    ----------
    attempt
        Module → the result, and whether what was written names local code.
    """
    try:
        made, local = attempt(pickle)
    except Exception:
        local = True
    if local:
        made, _ = attempt(cloudpickle)
    return made


def _names_local_code(body: bytes) -> bool:
    if b"__main__" in body:
        return True
    registered = cloudpickle.list_registry_pickle_by_value()
    return any(name.encode() in body for name in registered)


class _Buffers(list[memoryview]):
    """Out-of-band buffers, as a pickler's `buffer_callback` collects them."""

    def keep(self, buffer: pickle.PickleBuffer) -> bool:
        """Whether the buffer goes in band."""
        raw = buffer.raw()
        if raw.nbytes < SMALL_BUFFER:
            return True
        self.append(raw)
        return False


def _dump_some(
    values: Sequence[object], most: int, module: Any
) -> tuple[tuple[int, bytes, _Buffers], bool]:
    buffers = _Buffers()
    file = io.BytesIO()
    pickler = module.Pickler(file, protocol=5, buffer_callback=buffers.keep)
    end, held, weight = 0, 0, 0
    count = len(values)
    for index in _dump_each(pickler, values, range(count)):
        position = file.tell()
        grown = position - end
        if len(buffers) > held:
            grown += sum(map(len, buffers[held:]))
        if index and weight + grown > most:
            alone = size(dumps(values[index]))
            if alone <= 2 * grown or weight + grown > MOST_SHARED:
                del buffers[held:]
                count = index
                break
            most += most  # It shares most of its weight: look again when there is as much more.
        end, held, weight = position, len(buffers), weight + grown
    body = file.getvalue()[:end]
    return (count, body, buffers), _names_local_code(body)


def _dump_each(pickler: Any, values: Sequence[object], order: range) -> Iterator[int]:
    """Pickle values in this order; the index of each, once it is written."""
    dump = pickler.dump
    for index in order:
        try:
            dump(values[index])
        except Exception as error:
            raise ItemError(index, _cannot(values[index], error)) from error
        yield index


def _cannot(value: object, error: Exception) -> str:
    return f"cannot pickle a {type(value).__qualname__}: {text_of(error)}"


class _Scale:
    """A file that only weighs what is written, and looks for what is local."""

    def __init__(self) -> None:
        self.weight = 0
        self.local = False

    def write(self, data: bytes) -> int:
        self.weight += len(data)
        self.local = self.local or _names_local_code(data)
        return len(data)

    def put_aside(self, buffer: pickle.PickleBuffer) -> None:
        self.weight += buffer.raw().nbytes


def _own_weights(values: Sequence[object], module: Any) -> tuple[list[int], bool]:
    order = range(len(values))
    forward, local = _weigh(values, order, module)
    backward, _ = _weigh(values, order[::-1], module)
    return list(map(min, forward, reversed(backward))), local


def _weigh(values: Sequence[object], order: range, module: Any) -> tuple[list[int], bool]:
    scale = _Scale()
    pickler = module.Pickler(scale, protocol=5, buffer_callback=scale.put_aside)
    totals = [0, *(scale.weight for _ in _dump_each(pickler, values, order))]
    return [after - before for before, after in pairwise(totals)], scale.local


def _frame(body: bytes, buffers: Sequence[memoryview]) -> Segments:
    if not buffers:
        return [bytes((IN_BAND,)), body]
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
