"""wukong-async: a serverless engine for Dask graphs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from wukong_async._version import __version__

if TYPE_CHECKING:
    from wukong_async.client import Job, WukongClient
    from wukong_async.local import EventInvokeConfig, Faults, LocalCluster

__all__ = ["EventInvokeConfig", "Faults", "Job", "LocalCluster", "WukongClient", "__version__"]

# On first use: an executor imports this package too, and must not pay for a client.
_HOME = {
    "Job": "wukong_async.client",
    "WukongClient": "wukong_async.client",
    "LocalCluster": "wukong_async.local",
    "EventInvokeConfig": "wukong_async.local",
    "Faults": "wukong_async.local",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
