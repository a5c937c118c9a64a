"""What `create` needs, for tests to change."""

from __future__ import annotations

from typing import Any

from wukong_async.store import NewJob


def new_job(**changes: Any) -> NewJob:
    """Two leaves (0, 1) and their fan-in (2), which is the result."""
    usual: dict[str, Any] = {
        "tasks": 3,
        "want": 1,
        "channel": "channel",
        "slots": 2,
        "lease": 60.0,
        "grace": 60.0,
        "attempts": 3,
        "unstarted": 3,
        "ttl": 600.0,
        "facts": b"facts",
        "values": [],
        "records": [("0", [0]), ("1", [1])],
    }
    return NewJob(**{**usual, **changes})
