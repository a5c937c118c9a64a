"""A Lambda function for the tests of the loopback: it does what its event says."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CALLS = 0


def handler(event: dict[str, Any], context: Any) -> Any:
    global CALLS  # noqa: PLW0603 - shows that the sandbox is warm
    CALLS += 1
    match event:
        case {"do": "count"}:
            return {"calls": CALLS, "pid": os.getpid()}
        case {"do": "context"}:
            return {
                "request_id": context.aws_request_id,
                "remaining": context.get_remaining_time_in_millis(),
                "memory": context.memory_limit_in_mb,
                "arn": context.invoked_function_arn,
                "name": context.function_name,
                "custom": context.client_context.custom if context.client_context else None,
            }
        case {"do": "print", "text": text}:
            print(text)
            print("to stderr", file=sys.stderr)
            return None
        case {"do": "raise"}:
            raise ValueError("asked to")
        case {"do": "exit", "code": code}:
            os._exit(code)
        case {"do": "sleep", "seconds": seconds}:
            time.sleep(seconds)
            return "slept"
        case {"do": "allocate", "mb": mb}:
            hoard = bytearray(mb * 1024 * 1024)
            hoard[::4096] = b"x" * len(hoard[::4096])
            time.sleep(30)
            return len(hoard)
        case {"do": "return", "bytes": size}:
            return "x" * size
        case {"do": "touch", "path": path}:
            with Path(path).open("a") as file:
                file.write("x")
            return None
        case {"do": "touch and raise", "path": path}:
            with Path(path).open("a") as file:
                file.write("x")
            raise ValueError("asked to")
        case {"do": "wait for", "path": path}:
            while not Path(path).exists():
                time.sleep(0.005)
            return "seen"
        case {"do": "spawn"}:
            return subprocess.Popen(["sleep", "1000"]).pid
        case {"do": "spawn away and sleep", "path": path}:
            child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
            Path(path).write_text(str(child.pid))
            time.sleep(1000)
        case {"do": "spawn and allocate", "mb": mb}:
            code = f"import time; hoard = b'x' * ({mb} * 1024 * 1024); time.sleep(1000)"
            return subprocess.run([sys.executable, "-c", code], check=True).returncode
        case {"do": "environment", "name": name}:
            return os.environ.get(name)
    return event
