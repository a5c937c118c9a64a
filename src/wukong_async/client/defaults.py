"""What Dask does by default while clients are entered.

`dask.config.set` as a context puts back what it found, so contexts that end in another order than
they began leave the values of a client that is closed. Here the client that was entered last and
is still open decides, whatever the order.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import dask.config

_lock = threading.Lock()
_entered: list[tuple[object, Mapping[str, Any]]] = []
_before: dict[str, Any] = {}
"""Setting → its value when the first client took it over."""


def enter(owner: object, settings: Mapping[str, Any], unless_set: Mapping[str, Any]) -> None:
    """Let `settings` hold until `owner` leaves, and those of `unless_set` that nobody has set."""
    with _lock:
        found = {name: _before.get(name, dask.config.get(name, None)) for name in unless_set}
        wanted = {**{n: value for n, value in unless_set.items() if not found[n]}, **settings}
        for name, value in wanted.items():
            _before.setdefault(name, dask.config.get(name, None))
            dask.config.set({name: value})
        _entered.append((owner, wanted))


def leave(owner: object) -> None:
    """End what `owner` has entered, if anything. What others set meanwhile stays."""
    with _lock:
        ours = [settings for who, settings in _entered if who is owner]
        _entered[:] = [entry for entry in _entered if entry[0] is not owner]
        for name, value in (item for settings in ours for item in settings.items()):
            others = [settings[name] for _, settings in _entered if name in settings]
            if dask.config.get(name, None) == value:
                dask.config.set({name: others[-1] if others else _before.get(name)})
            if not others:
                _before.pop(name, None)
