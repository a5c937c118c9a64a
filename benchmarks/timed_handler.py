"""The function's handler, with timers around what an executor does.

Set as the handler of the sandboxes: so what is timed runs where it always does. What each
invocation has taken is sent to a datagram socket, whose path is in the environment.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

import lambda_handler
from benchmarks.phases import Span, now, watching
from wukong_async import blocks
from wukong_async.engine import Engine
from wukong_async.executor import incarnation
from wukong_async.executor.incarnation import Incarnation
from wukong_async.policy import Policy
from wukong_async.store import JobStore

ADDRESS = "BENCHMARK_SPANS"
"""The variable that has the path."""
WATCHED = (
    (JobStore, "begin", "fetch"),
    (JobStore, "get", "fetch"),
    (JobStore, "look", "fetch"),
    (blocks, "decode", "unpickle"),
    (incarnation, "_decode", "unpickle"),
    (incarnation, "_run_steps", "run"),
    (Incarnation, "_share", "schedule"),
    *((Engine, name, "schedule") for name in ("begun", "loaded", "fetched", "next_actions", "ran")),
    (Policy, "ran", "schedule"),
    (incarnation, "_encode", "commit"),
    (incarnation, "commit_body", "commit"),
    (JobStore, "put", "commit"),
    (JobStore, "commit", "commit"),
)


def handler(event: Any, context: Any) -> dict[str, str]:
    """Run one executor to its end, and tell."""
    begin = now()
    with watching(WATCHED) as spans:
        answer = lambda_handler.handler(event, context)
    if "job" in event:
        spans.append(Span("rest", begin, now()))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            message = json.dumps([event["job"], spans]).encode()
            sender.sendto(message, os.environ[ADDRESS])
    return answer
