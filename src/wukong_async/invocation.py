"""What an invocation says: which record to look at. A hint, never work by itself.

JSON, because that is what Lambda passes to a Python function. Nothing is unpickled from it.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Self

import cloudpickle
import dask

from wukong_async._version import __version__
from wukong_async.errors import InvocationError
from wukong_async.protocol import AHEAD_MOST

FORMAT = 1
MOST_CARRIED = 90 * 1024
"""Bytes of objects in one event, before they are encoded, which adds a third: a thousand tasks of a
plan. Lambda takes 256 KB to 1 MB."""


IF_BOTH_HAVE_IT = ("numpy", "pandas")
"""Packages that a graph may do without; their minor versions change what their pickles say."""
PING: Mapping[str, object] = {"wukong": FORMAT, "ping": True}
"""The event that asks a function whether it starts and reaches the store."""


@cache
def versions() -> Mapping[str, str]:
    """What has to be equal in the client and in the function, or pickles do not fit."""
    found = {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "wukong-async": __version__,
        "dask": dask.__version__,
        "cloudpickle": cloudpickle.__version__,
    }
    for name in IF_BOTH_HAVE_IT:  # Not imported for it: that takes a second.
        with contextlib.suppress(PackageNotFoundError):
            found[name] = ".".join(version(name).split(".")[:2])
    return found


def mismatch(client: Mapping[str, str], function: Mapping[str, str]) -> str | None:
    """What differs between two answers of `versions`, in words; None if nothing does."""
    differences = [
        f"{name}: client {client.get(name, 'none')}, function {function.get(name, 'none')}"
        for name in sorted({*client, *function})
        if client.get(name) != function.get(name)
        and (name not in IF_BOTH_HAVE_IT or (name in client and name in function))
    ]
    return "; ".join(differences) or None


@dataclass(frozen=True, slots=True)
class Hints:
    """What whoever invokes an executor knows of its work. Nothing of it has to be true."""

    sent: float
    """When, in seconds since the epoch."""
    first: int
    until: int
    """The tasks of the plan, first and last + 1, that nobody else was given."""
    alone: bool = False
    """Whether no other executor has ever existed."""
    seen: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """See `policy.Policy.seen`."""
    room: int | None = None
    """How many of the free slots are meant for it in the beginning."""
    blocks: tuple[int, ...] = ()
    """Blocks of the plan that its first tasks are in."""
    objects: Mapping[str, str] = field(default_factory=dict)
    """Objects of the store that are needed first, by name: their bytes in base 64."""
    mac: str = ""
    """That they come from the job's client or one of its executors: see `mac_of`."""

    def carrying(self, objects: Mapping[str, bytes], secret: bytes) -> Self:
        """With as many of these objects as there is room for."""
        taken: dict[str, str] = {}
        room = MOST_CARRIED
        for name, data in objects.items():
            if len(data) <= room:
                room -= len(data)
                taken[name] = base64.b64encode(data).decode()
        return replace(self, objects=taken, mac=mac_of(taken, secret)) if taken else self

    def carried(self, secret: bytes) -> dict[str, bytes]:
        """The objects that came along; none if somebody else has sent them."""
        if not hmac.compare_digest(self.mac, mac_of(self.objects, secret)):
            return {}
        return {name: base64.b64decode(data) for name, data in self.objects.items()}

    @classmethod
    def from_event(cls, found: object) -> Self | None:
        """As they stand in an event; None if there are none that make sense."""
        match found:
            case [
                int() | float() as sent,
                int(first),
                int(until),
                bool(alone),
                dict(seen),
                int() | None as room,
                list(blocks),
                dict(objects),
                str(mac),
            ] if (
                all(map(_is_figures, seen.values()))
                and len(blocks) <= AHEAD_MOST
                and all(type(block) is int and block >= 0 for block in blocks)
                and all(
                    isinstance(data, str) and data.isascii() and name.isascii()
                    for name, data in (*objects.items(), ("", mac))
                )
            ):
                ahead = tuple(blocks)
                return cls(float(sent), first, until, alone, seen, room, ahead, objects, mac)
        return None


def _is_figures(figures: object) -> bool:
    return (
        isinstance(figures, list)
        and len(figures) in (3, 4)
        and all(isinstance(each, int | float) and 0 <= each < math.inf for each in figures)
    )


def mac_of(objects: Mapping[str, str], secret: bytes) -> str:
    """The proof that who sent these objects knows a job's secret.

    They are unpickled, and the endpoint of a local cluster takes events from everybody.
    """
    mac = hmac.new(secret, digestmod="sha256")
    for name, data in objects.items():
        mac.update(f"{len(name)}:{name}{len(data)}:{data}".encode())
    return mac.hexdigest()


@dataclass(frozen=True, slots=True)
class Invocation:
    """Begin `executor` of job `job_id`."""

    job_id: str
    executor: str
    versions: Mapping[str, str] = field(default_factory=versions)
    hints: Hints | None = None
    """What is not needed, but saves time."""

    def to_json(self) -> bytes:
        """The event."""
        return json.dumps(
            {
                "wukong": FORMAT,
                "job": self.job_id,
                "executor": self.executor,
                "versions": dict(self.versions),
                **({"hints": astuple(self.hints)} if self.hints else {}),
            },
            separators=(",", ":"),
        ).encode()

    @classmethod
    def from_event(cls, event: object) -> Self:
        """Read an event.

        Raises
        ------
        InvocationError
            If somebody else's event reached the function.
        """
        match event:
            case {
                "wukong": int(version),
                "job": str(job_id),
                "executor": str(executor),
                "versions": dict(client),
                **rest,
            } if version == FORMAT:
                return cls(job_id, executor, client, Hints.from_event(rest.get("hints")))
        raise InvocationError(
            f"This event is not an invocation of wukong-async (format {FORMAT}): {event!r:.200}"
        )
