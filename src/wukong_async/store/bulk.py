"""Large bodies on redis-py's connections, without the copies of its general way.

What redis-py connects, authenticates and encrypts stays its own; only the bodies go past it:

- A write hands the segments of a value to the transport one by one, where redis-py wants each
  argument in one piece.
- A read tells the transport to receive into the memory of the value itself, for as long as the
  reply takes. The general way copies each byte five times: into an object of the loop, the buffer
  of the stream, an object of its own, the parser's buffer, and at last one for the caller, who has
  to copy it again if it is to be writable, or a part of something.

A reply that looks otherwise than expected is given back, and redis-py says what it means.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as TimedOut

from wukong_async import wire

Memory: TypeAlias = Callable[[int, int], memoryview]
"""(index, length) of an object → where to receive it."""

SCRATCH = 64 * 1024
"""Bytes for what stands between bodies, and for the beginnings of bodies; so several small ones
come with one read."""
AT_ONCE = 256 * 1024
"""Bytes handed to the transport before the server has taken most of them. asyncio's own copies what
it cannot send at once."""
HUGE = 2 * 1024 * 1024
"""Bytes of a huge page: from here on memory comes from the kernel, in such pages if it has them.
To be given ordinary pages one by one takes longer than to receive what goes into them."""


def room(size: int) -> memoryview:
    """Writable memory for a value."""
    if size < HUGE:
        return memoryview(bytearray(size))
    whole = size // HUGE * HUGE
    # As long as whole pages are, since only then it begins where one may; its end is not used.
    mapped = mmap.mmap(-1, -(-size // HUGE) * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux, and not every one.
        with contextlib.suppress(OSError):
            mapped.madvise(mmap.MADV_HUGEPAGE, 0, whole)
    return memoryview(mapped)[:size]


def memory_for(names: Sequence[str], sizes: Sequence[int]) -> Memory:
    """Memory for objects of about these sizes: of one piece for the parts of one value."""
    offsets: list[int] = []
    totals: dict[str, int] = {}
    for name, size in zip(names, sizes, strict=True):
        offsets.append(totals.get(_value_of(name), 0))
        totals[_value_of(name)] = offsets[-1] + size
    rooms: dict[str, memoryview] = {}

    def memory(index: int, length: int) -> memoryview:
        value = _value_of(names[index])
        if length != sizes[index]:
            return room(length)
        if value not in rooms:
            rooms[value] = room(totals[value])
        return rooms[value][offsets[index] : offsets[index] + length]

    return memory


def whole(parts: Sequence[wire.Buffer], size: int) -> wire.Buffer:
    """A value of so many bytes in one piece; if its parts lie so, they are not copied."""
    views = [memoryview(part) for part in parts]
    mine = views[0].obj
    if all(view.obj is mine and not view.readonly for view in views):
        if len(views) == 1:
            return views[0]
        if sum(map(len, views)) == size:  # Then this memory was made for them.
            return memoryview(mine)[:size]
    return wire.join(parts)


def _value_of(name: str) -> str:
    """What the parts of a value have in common; see `Place.names`."""
    return name.rpartition(".")[0] or name


async def read(
    client: Redis, keys: Sequence[str], about: int, memory: Memory
) -> Sequence[wire.Buffer | None]:
    """Read strings of about so many bytes in all into memory; None for what is not there."""
    if about < SCRATCH:  # It would be copied as well, and take longer.
        small: list[bytes | None]
        small = await client.execute_command("MGET", *keys)  # type: ignore[no-untyped-call]
        return small
    pool: Any = client.connection_pool
    connection = await pool.get_connection()
    try:
        return await _read(connection, keys, memory)
    except BaseException:
        # In the middle of a reply, for all that is known.
        await connection.disconnect(nowait=True)
        raise
    finally:
        await pool.release(connection)


async def write(
    client: Redis,
    values: Sequence[tuple[str, wire.Segments]],
    milliseconds: int,
    last: Sequence[Any],
    then: Sequence[Any] = (),
) -> list[Any]:
    """Set strings that are not there yet, and run one more command, in one transaction.

    Parameters
    ----------
    then
        One more command, that is run behind the transaction.

    Returns
    -------
    list
        The answer to the last command, and to `then`, if there is one.
    """
    pool: Any = client.connection_pool
    connection = await pool.get_connection()
    try:
        packed: list[wire.Buffer] = connection.pack_command("MULTI")
        for key, segments in values:
            packed += _set_command(key, segments, milliseconds)
        packed += connection.pack_commands([last, ("EXEC",), *([then] if then else ())])
        await connection.check_health()
        for some in _rounds(packed):
            # Another connection would take the rest of a command for the beginning of one.
            if not connection.is_connected:
                raise Disconnected("Connection closed while a command was sent.")
            await connection.send_packed_command(some, check_health=False)
        del packed
        try:
            answers = [await _transaction(connection, len(values) + 2)]
        except ResponseError:
            if then:  # Or whoever uses the connection next would be given it.
                with contextlib.suppress(ResponseError):
                    await connection.read_response()
            raise
        if then:
            answers.append(await connection.read_response())
    except asyncio.CancelledError:
        await connection.disconnect(nowait=True)
        raise
    finally:
        await pool.release(connection)
    return answers


def _rounds(packed: Sequence[wire.Buffer]) -> Iterator[list[wire.Buffer]]:
    """The same bytes, in lists of `AT_ONCE`, without copying them."""
    some: list[wire.Buffer] = []
    left = AT_ONCE
    for buffer in packed:
        view = memoryview(buffer)
        while len(view) > left:
            some.append(view[:left])
            view = view[left:]
            yield some
            some, left = [], AT_ONCE
        some.append(view)
        left -= len(view)
    yield some


def _set_command(key: str, segments: wire.Segments, milliseconds: int) -> list[wire.Buffer]:
    name, life = key.encode(), str(milliseconds).encode()
    head = b"*6\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, wire.size(segments))
    tail = b"\r\n$2\r\nPX\r\n$%d\r\n%b\r\n$2\r\nNX\r\n" % (len(life), life)
    return [head, *segments, tail]


async def _transaction(connection: Any, commands: int) -> Any:
    """The last answer of a transaction, whose first so many replies say OK or QUEUED."""
    refused: ResponseError | None = None
    for _ in range(commands):
        try:
            await connection.read_response()
        except ResponseError as error:
            refused = refused or error
    try:
        answers = await connection.read_response()
    except ResponseError as error:  # It is aborted, or was not begun.
        raise refused or error from None
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers[-1]


async def _read(
    connection: Any, keys: Sequence[str], memory: Memory
) -> Sequence[wire.Buffer | None]:
    await connection.check_health()
    if not connection.is_connected:
        await connection.connect()
    transport = connection._writer.transport
    receiver = _Receiver(transport.get_protocol(), len(keys), memory)
    _switch(transport, receiver)
    try:
        async with asyncio.timeout(connection.socket_timeout):
            # Its own checks would wait for an answer that comes to us.
            await connection.send_command("MGET", *keys, check_health=False)
            ours = await receiver.done
    except TimeoutError:
        raise TimedOut(f"Timeout reading from {connection._host_error()}") from None
    finally:
        receiver.close()
        _switch(transport, receiver.inner)
    rest = receiver.rest()
    if rest:
        receiver.inner.data_received(rest)
    if ours:
        return receiver.found
    answers: list[bytes | None] = await connection.read_response()
    return answers


def _switch(transport: Any, protocol: asyncio.BaseProtocol) -> None:
    """Have another protocol receive."""
    if transport.is_closing():
        return
    # uvloop chooses the way to read when it begins to.
    transport.pause_reading()
    transport.set_protocol(protocol)
    transport.resume_reading()


class _Receiver(asyncio.BufferedProtocol):
    """Receives one reply to MGET into the memory of the values."""

    def __init__(self, inner: asyncio.Protocol, count: int, memory: Memory) -> None:
        self.inner = inner
        """The protocol that has the connection otherwise; told of all but what is received."""
        self.done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """Whether the reply was received; else somebody else has to read it."""
        self.found: list[memoryview | None] = []
        self._count = count
        self._memory = memory
        self._begun = False
        self._in_body = False
        self._body = memoryview(b"")
        """What is still to be received of a body."""
        self._scratch = bytearray(SCRATCH)
        self._start = self._end = 0

    def close(self) -> None:
        """Write to nobody's memory any more."""
        self._body = memoryview(b"")
        if not self.done.done():
            self.done.cancel()
        elif not self.done.cancelled():
            self.done.exception()  # Somebody has looked at it.

    def rest(self) -> bytes:
        """What has come and is not part of the reply, or all of one that is not ours."""
        return bytes(self._scratch[self._start : self._end])

    # What the transport calls -----------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to receive."""
        if self._body:
            return self._body
        if self._end == SCRATCH:  # Something is said where nothing is to be: not for ever.
            self._start = self._end = 0
        return memoryview(self._scratch)[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """So much was received."""
        if self._body:
            self._body = self._body[nbytes:]
        else:
            self._end += nbytes
        if self._body or self.done.done():
            return
        try:
            self._advance()
        except ValueError as error:
            self._fail(f"a reply that cannot be read: {error}")

    def eof_received(self) -> bool | None:
        """The server has closed the connection."""
        self._fail("Connection closed by server.")
        return self.inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._fail(f"Connection lost: {exc}")
        self.inner.connection_lost(exc)

    def pause_writing(self) -> None:
        """Whoever sends waits for the other protocol."""
        self.inner.pause_writing()

    def resume_writing(self) -> None:
        """See `pause_writing`."""
        self.inner.resume_writing()

    # ------------------------------------------------------------------------------------------

    def _fail(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(Disconnected(why))

    def _advance(self) -> None:
        """Read what stands in the scratch buffer."""
        if not self._begun and self._scratch[self._start] != ord("*"):
            self.done.set_result(False)
            return
        while len(self.found) < self._count or self._in_body or not self._begun:
            line = self._line()
            if line is None:
                return
            if self._in_body:  # The empty line behind it.
                self._in_body = False
            elif not self._begun:
                self._begun = True
                if int(line[1:]) != self._count:
                    raise ValueError(line)
            elif line in {b"_", b"$-1"}:
                self.found.append(None)
            elif line.startswith(b"$"):
                self._receive(int(line[1:]))
                if self._body:
                    return
            else:
                raise ValueError(line[:100])
        self.done.set_result(True)

    def _line(self) -> bytes | None:
        end = self._scratch.find(b"\r\n", self._start, self._end)
        if end >= 0:
            line = bytes(self._scratch[self._start : end])
            self._start = end + 2
            return line
        rest = self._scratch[self._start : self._end]
        if len(rest) == SCRATCH:
            raise ValueError("a line without an end")
        self._scratch[: len(rest)] = rest
        self._start, self._end = 0, len(rest)
        return None

    def _receive(self, length: int) -> None:
        """A body begins: the first of it may be here, the rest goes where it belongs."""
        body = self._memory(len(self.found), length)
        here = min(length, self._end - self._start)
        body[:here] = memoryview(self._scratch)[self._start : self._start + here]
        self._start += here
        if self._start == self._end:
            self._start = self._end = 0
        self._body = body[here:]
        self._in_body = True
        self.found.append(body)
