"""Frames between the proxy and its peers: u32 length, then msgpack. No pickle at all.

A connection starts with a handshake. The proxy sends a random nonce; the peer answers with a nonce
of its own and the HMAC-SHA256 of both under the shared secret; the proxy with another HMAC of both.
So each knows the other, and that what it hears was not said before. After that the peer sends
requests and the proxy answers them in order::

    {"invoke": [event, …], "function": name}
        →   {"sent": n, "throttled": [index, …], "failed": [[index, reason], …]}
        or  {"busy": reason}       it has taken none of them
        or  {"refused": reason}    it never will
    {"health": None}
        →   {"health": {counter: value, …}}
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import struct
from typing import Any

import msgpack

from wukong_async.errors import InvocationError

MOST_BYTES = 4 * 1024 * 1024
"""Of one frame: twice what as many events as are allowed take."""
MOST_EVENTS = 10_000
"""In one frame: about 10 s of a proxy's time, while its peer waits for the answer."""
NONCE_BYTES = 32
DIGEST_BYTES = 32

_LENGTH = struct.Struct("!I")
_PEER = b"wukong-async 1 peer"
_PROXY = b"wukong-async 1 proxy"
"""What is proved differs by role: nobody can have one side's proof made by another of that side."""
_CHUNK = 64 * 1024


class FrameError(InvocationError):
    """A peer of the proxy, or the proxy, does not keep to the protocol."""


async def read_length(reader: asyncio.StreamReader) -> int | None:
    """The size of the next frame; None at the end of the connection.

    Raises
    ------
    FrameError
        If it is too large or cut short.
    """
    try:
        head = await reader.readexactly(_LENGTH.size)
    except asyncio.IncompleteReadError as cut:
        if not cut.partial:
            return None
        raise FrameError("the connection ended inside a frame") from cut
    length: int = _LENGTH.unpack(head)[0]
    if length > MOST_BYTES:
        raise FrameError(f"a frame of {length} bytes exceeds the limit of {MOST_BYTES}")
    return length


async def read_body(reader: asyncio.StreamReader, length: int) -> Any:
    """What follows after the size.

    Raises
    ------
    FrameError
        If it is cut short, or not msgpack.
    """
    try:
        body = await reader.readexactly(length)
        return msgpack.unpackb(body, max_array_len=MOST_EVENTS, max_map_len=100)
    except asyncio.IncompleteReadError as cut:
        raise FrameError("the connection ended inside a frame") from cut
    except (ValueError, msgpack.UnpackException) as error:
        raise FrameError(f"a frame is not msgpack: {error}") from error


async def skip_body(reader: asyncio.StreamReader, length: int) -> None:
    """Read what follows after the size, and keep none of it."""
    while length:
        chunk = await reader.read(min(length, _CHUNK))
        if not chunk:
            raise FrameError("the connection ended inside a frame")
        length -= len(chunk)


async def read_frame(reader: asyncio.StreamReader) -> Any:
    """The next frame; None at the end of the connection."""
    length = await read_length(reader)
    return None if length is None else await read_body(reader, length)


async def write_frame(writer: asyncio.StreamWriter, message: Any) -> None:
    """Send a frame.

    Raises
    ------
    FrameError
        If it would be too large.
    """
    body = msgpack.packb(message)
    if len(body) > MOST_BYTES:
        raise FrameError(f"a frame of {len(body)} bytes exceeds the limit of {MOST_BYTES}")
    writer.write(_LENGTH.pack(len(body)))
    writer.write(body)
    await writer.drain()


async def welcome(secret: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The proxy's side of the handshake.

    Raises
    ------
    FrameError
        If the peer does not know the secret.
    asyncio.IncompleteReadError
        If it hangs up.
    """
    mine = secrets.token_bytes(NONCE_BYTES)
    writer.write(mine)
    nonces = mine + await reader.readexactly(NONCE_BYTES)
    proof = await reader.readexactly(DIGEST_BYTES)
    if not hmac.compare_digest(proof, _prove(secret, _PEER, nonces)):
        raise FrameError("a peer does not know the secret")
    writer.write(_prove(secret, _PROXY, nonces))


async def introduce(
    secret: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """The peer's side of the handshake.

    Raises
    ------
    FrameError
        If the proxy does not know the secret.
    asyncio.IncompleteReadError
        If it hangs up.
    """
    mine = secrets.token_bytes(NONCE_BYTES)
    nonces = await reader.readexactly(NONCE_BYTES) + mine
    writer.write(mine + _prove(secret, _PEER, nonces))
    if not hmac.compare_digest(
        await reader.readexactly(DIGEST_BYTES), _prove(secret, _PROXY, nonces)
    ):
        raise FrameError("this is not our proxy: it does not know the secret")


def _prove(secret: str, role: bytes, nonces: bytes) -> bytes:
    return hmac.digest(secret.encode(), role + nonces, "sha256")
