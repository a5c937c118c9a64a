"""AWS Lambda's entry point: environment → settings → executor.

The function's handler is `lambda_handler.handler`. The service is made while the environment
starts, where Lambda gives a whole vCPU and bills no duration of ours.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from typing import Any

from wukong_async.config import Settings
from wukong_async.cores import blas_environment, usable_cores
from wukong_async.executor import Service

_settings = Settings.load()
_service = Service(_settings)
# Before any task has numpy loaded, which reads them then.
os.environ.update(blas_environment(_service.threads, usable_cores(), os.environ))
# What was imported until now lives as long as the sandbox: the cycle collector need not look. Nor
# after each 700 objects, which is in the middle of every block: a plan's are no garbage.
gc.freeze()
gc.set_threshold(10_000)


def handler(event: Any, context: Any) -> dict[str, str]:
    """Run one executor to its end."""
    try:
        return _service.handle(event, context)
    except Exception:
        raise
    except BaseException:  # A task has interrupted this thread.
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # Python would wait for the thread that tasks run in, perhaps for ever.
