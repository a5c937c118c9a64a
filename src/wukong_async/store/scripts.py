"""The Lua scripts, as they are sent: `common.lua` in front of those on a job's metadata."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Script:
    """A script and the SHA-1 that Redis knows it by."""

    name: str
    source: str
    sha: str


def _read(name: str, *, prelude: str = "") -> Script:
    source = prelude + (files(__package__) / "lua" / f"{name}.lua").read_text("utf-8")
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


_COMMON = _read("common").source

CREATE = _read("create", prelude=_COMMON)
BEGIN = _read("begin", prelude=_COMMON)
COMMIT = _read("commit", prelude=_COMMON)
RENEW = _read("renew", prelude=_COMMON)
WATCH = _read("watch", prelude=_COMMON)
CANCEL = _read("cancel", prelude=_COMMON)
OUTCOME = _read("outcome", prelude=_COMMON)
FINISH = _read("finish", prelude=_COMMON)
RETIRE = _read("retire", prelude=_COMMON)
LISTEN = _read("listen", prelude=_COMMON)
CONFIRM = _read("confirm")
CLOSE = _read("close")
EXTEND = _read("extend")
LAPSED = _read("lapsed", prelude=_COMMON)

ALL = (
    *(CREATE, BEGIN, COMMIT, RENEW, WATCH, CANCEL, OUTCOME, FINISH, RETIRE, LISTEN),
    *(CONFIRM, CLOSE, EXTEND, LAPSED),
)
