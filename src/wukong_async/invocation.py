"""What an invocation says: which record to look at. A hint, never work by itself.

JSON, because that is what Lambda passes to a Python function. Nothing is unpickled from it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import cloudpickle
import dask

from wukong_async._version import __version__
from wukong_async.errors import InvocationError

FORMAT = 1


PING: Mapping[str, object] = {"wukong": FORMAT, "ping": True}
"""The event that asks a function whether it starts and reaches the store."""


def versions() -> dict[str, str]:
    """What has to be equal in the client and in the function, or pickles do not fit."""
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "wukong-async": __version__,
        "dask": dask.__version__,
        "cloudpickle": cloudpickle.__version__,
    }


def mismatch(client: Mapping[str, str], function: Mapping[str, str]) -> str | None:
    """What differs between two answers of `versions`, in words; None if nothing does."""
    differences = [
        f"{name}: client {client.get(name, 'none')}, function {function.get(name, 'none')}"
        for name in sorted({*client, *function})
        if client.get(name) != function.get(name)
    ]
    return "; ".join(differences) or None


@dataclass(frozen=True, slots=True)
class Invocation:
    """Begin `executor` of job `job_id`."""

    job_id: str
    executor: str
    versions: Mapping[str, str] = field(default_factory=versions)

    def to_json(self) -> bytes:
        """The event."""
        return json.dumps(
            {
                "wukong": FORMAT,
                "job": self.job_id,
                "executor": self.executor,
                "versions": dict(self.versions),
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
            } if version == FORMAT:
                return cls(job_id, executor, client)
        raise InvocationError(
            f"This event is not an invocation of wukong-async (format {FORMAT}): {event!r:.200}"
        )
