"""Frames between the proxy and its peers: u32 length, then msgpack. No pickle at all.

A connection starts with a challenge: the server sends a random nonce, the peer answers with its
HMAC-SHA256 under the shared secret, and the server with the HMAC of the answer, so that each knows
the other. After that the peer sends requests and the server answers them in order::

    {"invoke": [event, …]}   →   {"sent": n, "failed": [[index, reason], …]}
"""

from __future__ import annotations

import asyncio
import hmac
import struct
from typing import Any

import msgpack

from wukong_async.errors import InvocationError

MOST_BYTES = 16 * 1024 * 1024
"""Of one frame: 16 times what Lambda accepts as one event."""
NONCE_BYTES = 32
DIGEST_BYTES = 32

_LENGTH = struct.Struct("!I")


class FrameError(InvocationError):
    """A peer of the proxy does not keep to the protocol."""


async def read_frame(reader: asyncio.StreamReader) -> Any:
    """The next frame; None at the end of the connection.

    Raises
    ------
    FrameError
        If it is too large, cut short, or not msgpack.
    """
    try:
        head = await reader.readexactly(_LENGTH.size)
    except asyncio.IncompleteReadError as cut:
        if not cut.partial:
            return None
        raise FrameError("the connection ended inside a frame") from cut
    (length,) = _LENGTH.unpack(head)
    if length > MOST_BYTES:
        raise FrameError(f"a frame of {length} bytes exceeds the limit of {MOST_BYTES}")
    try:
        return msgpack.unpackb(await reader.readexactly(length))
    except asyncio.IncompleteReadError as cut:
        raise FrameError("the connection ended inside a frame") from cut
    except (ValueError, msgpack.UnpackException) as error:
        raise FrameError(f"a frame is not msgpack: {error}") from error


async def write_frame(writer: asyncio.StreamWriter, message: Any) -> None:
    """Send a frame."""
    body = msgpack.packb(message)
    if len(body) > MOST_BYTES:
        raise FrameError(f"a frame of {len(body)} bytes exceeds the limit of {MOST_BYTES}")
    writer.write(_LENGTH.pack(len(body)))
    writer.write(body)
    await writer.drain()


def prove(secret: str, challenge: bytes) -> bytes:
    """The answer to a challenge."""
    return hmac.digest(secret.encode(), challenge, "sha256")


def is_proof(secret: str, challenge: bytes, answer: bytes) -> bool:
    """Whether the answer was made by somebody who knows the secret."""
    return hmac.compare_digest(prove(secret, challenge), answer)
