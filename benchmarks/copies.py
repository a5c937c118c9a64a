"""What it costs to move a large value: memory beyond the value itself, and bytes per second.

An array is put as an executor puts an output, and read as another one reads it, over the unix
socket of an embedded Valkey. A copy needs memory, so the most that Python has allocated meanwhile
beyond the value itself, by `tracemalloc`, says how many there were at once. The kernel copies each
byte once more on each side; `raw` is what is left with nothing but that: SET and GET over a plain
socket, into memory that is there already.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.arguments import positive
from benchmarks.document import document, outputs, write
from wukong_async import wire
from wukong_async.local.valkey import Valkey
from wukong_async.loops import new_event_loop
from wukong_async.store import Connections, JobStore, bulk, payload, place_of

SIZES = {"16 kB": 16_000, "2 MB": 2_000_000, "64 MB": 64_000_000}
PART_SIZE = 16 * 1024 * 1024
MOVED = 256_000_000
"""Bytes of each size that are moved for one figure, in at most 500 values."""
HEAD = ("size", "put", "get", "put GB/s", "raw", "get GB/s", "raw")
FIGURES = ("put_copies", "get_copies", "put_gb_s", "raw_put_gb_s", "get_gb_s", "raw_get_gb_s")
ROW = "{:>6} {:>6} {:>6} {:>9} {:>6} {:>9} {:>6}"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `copies`."""
    parser = commands.add_parser("copies", help="measure what it costs to move large values")
    parser.add_argument(
        "--repeat", type=positive, default=5, help="the best of so many runs counts"
    )
    outputs(parser)
    parser.set_defaults(call=run)


def run(options: argparse.Namespace) -> int:
    """The `copies` command: a row for each size, the best of some runs."""
    repeat = options.repeat
    rows: list[dict[str, Any]] = []
    valkey = Valkey()
    try:
        asyncio.run(valkey.started())
        print("memory beyond the value, per byte, and speed; the best of", repeat)
        print(ROW.format(*HEAD))
        for name, size in SIZES.items():
            raw = _best(lambda size=size: _raw(str(valkey.socket), size), repeat)  # type: ignore[misc]
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                put, get = runner.run(_memory(valkey.url, size))
                ours = _best(
                    lambda size=size: runner.run(_ours(valkey.url, size)),  # type: ignore[misc]
                    repeat,
                )
            figures = (put, get, ours[0], raw[0], ours[1], raw[1])
            rows.append({"bytes": size, **dict(zip(FIGURES, figures, strict=True))})
            print(ROW.format(name, *(f"{figure:.2f}" for figure in figures)))
    finally:
        valkey.stop()
    write(options, document("copies", {"repeat": repeat}, rows))
    return 0


def _best(measure: Callable[[], tuple[float, float]], repeat: int) -> tuple[float, float]:
    runs = [measure() for _ in range(repeat)]
    return max(put for put, _ in runs), max(get for _, get in runs)


def _array(size: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, size, dtype="u1")


class _Mover:
    """Puts a value, and gets it back."""

    def __init__(self, store: JobStore, value: object) -> None:
        self._store = store
        self._value = value
        self._stored: Any = None

    async def put(self) -> None:
        segments = wire.dumps(self._value)
        self._stored, objects = payload(
            0, segments, writer="w", inline_limit=0, part_size=PART_SIZE
        )
        await self._store.put(objects, 600)

    async def get(self) -> Any:
        place = place_of(0, self._stored.inline)
        assert place is not None
        frame = (await self._store.fetch([place]))[0]
        assert frame is not None
        return wire.loads(frame)

    async def delete(self) -> None:
        await self._store.delete([(0, self._stored.place)])


async def _memory(url: str, size: int) -> tuple[float, float]:
    async with Connections([url], 30) as connections:
        store = JobStore(connections, "memory")
        await store.open(600)
        mover = _Mover(store, _array(size))
        await mover.put()  # What is made once and for all is no copy.
        await mover.get()
        await mover.delete()
        tracemalloc.start()
        await mover.put()
        _, put = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        tracemalloc.start()
        value = await mover.get()
        _, get = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        del value
        await mover.delete()
        mapped = size if size >= bulk.HUGE else 0  # It is not traced.
        return put / size, (get + mapped - size) / size


async def _ours(url: str, size: int) -> tuple[float, float]:
    async with Connections([url], 30) as connections:
        store = JobStore(connections, "speed")
        await store.open(600)
        mover = _Mover(store, _array(size))
        putting = getting = 0.0
        count = _count(size)
        for _ in range(count):
            started = time.perf_counter()
            await mover.put()
            put = time.perf_counter()
            value = await mover.get()
            getting += time.perf_counter() - put
            putting += put - started
            del value
            await mover.delete()
        return count * size / putting / 1e9, count * size / getting / 1e9


def _raw(path: str, size: int) -> tuple[float, float]:
    with socket.socket(socket.AF_UNIX) as server, server.makefile("rb", 0) as reader:
        server.connect(path)
        data, room = os.urandom(size), bytearray(size + 2)
        putting = getting = 0.0
        count = _count(size)
        for _ in range(count):
            started = time.perf_counter()
            server.sendall(b"*3\r\n$3\r\nSET\r\n$3\r\nraw\r\n$%d\r\n" % size)
            server.sendall(data)
            server.sendall(b"\r\n")
            reader.readline()
            put = time.perf_counter()
            server.sendall(b"*2\r\n$3\r\nGET\r\n$3\r\nraw\r\n")
            reader.readline()
            rest = memoryview(room)
            while rest:
                rest = rest[server.recv_into(rest) :]
            getting += time.perf_counter() - put
            putting += put - started
        return count * size / putting / 1e9, count * size / getting / 1e9


def _count(size: int) -> int:
    return min(500, max(1, MOVED // size))
