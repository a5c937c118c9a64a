"""Why a job failed, as far as its failure and the function's log tell."""

from __future__ import annotations

from collections.abc import Callable

from wukong_async import failure
from wukong_async.invoker import Invoker


async def explained(blob: bytes, name_of: Callable[[int], str], invoker: Invoker) -> Exception:
    """`failure.rebuild`, with what the function's log says where an executor was lost."""
    request_id = failure.request_lost(blob)
    log = await invoker.log_of(request_id) if request_id else ""
    return failure.rebuild(blob, name_of, log=log, throttled=invoker.throttled)
