from __future__ import annotations

import os
import subprocess
import sys

from wukong_async.config import Settings


def test_settings_reach_another_process_through_its_environment() -> None:
    settings = Settings(
        redis_endpoints=("unix:///tmp/a b.sock", "redis://h:1"), lease=2.5, region="eu-west-1"
    )
    code = "from wukong_async.config import Settings; print(repr(Settings.load()))"
    environment = {**os.environ, **settings.environment()}
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == repr(settings)
