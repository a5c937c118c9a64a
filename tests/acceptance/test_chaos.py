"""A short run of `make chaos`, so that it is known to work."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.paths import ROOT


def test_a_few_seconds_of_chaos() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--seconds", "2", "--seed", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"[1-9]\d* jobs", done.stdout)
    faults = re.search(r"^(\d+) faults", done.stdout, re.MULTILINE)
    assert faults is not None
    assert int(faults[1]) > 20
