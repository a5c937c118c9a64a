"""AWS Lambda's entry point: environment → settings → executor.

The function's handler is `lambda_handler.handler`. The service is made while the environment
starts, where Lambda gives a whole vCPU and bills no duration of ours.
"""

from __future__ import annotations

import gc
from typing import Any

from wukong_async.config import Settings
from wukong_async.executor import Service

_service = Service(Settings.load())
# What was imported until now lives as long as the sandbox: the cycle collector need not look.
gc.freeze()


def handler(event: Any, context: Any) -> dict[str, str]:
    """Run one executor to its end."""
    return _service.handle(event, context)
