"""Jobs on a cluster that misbehaves on purpose."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import dask
from dask import delayed

from tests.acceptance.functions import add, inc
from tests.conftest import keys_of
from tests.paths import ROOT
from wukong_async import Faults, LocalCluster, WukongClient


async def test_a_mix_of_faults_changes_no_result_and_leaves_no_key() -> None:
    leaves = [delayed(inc)(i) for i in range(64)]
    large = [delayed(bytes)(50_000 + i) for i in range(8)]
    total = delayed(add)(*leaves, *(delayed(len)(blob) for blob in large))
    # The first draws of this seed have some of each kind.
    faults = Faults(
        duplicate=0.3, drop=0.2, delay=0.3, throttle=0.2, kill=0.5, delay_seconds=1, kill_within=0.1
    )
    async with LocalCluster(2, faults=faults) as cluster:
        async with WukongClient(cluster, lease=0.5, grace=0.5, max_attempts=100) as client:
            (expected,) = dask.compute(total, scheduler="synchronous")
            jobs = [client.compute(total) for _ in range(10)]
            async with asyncio.timeout(60):
                assert await asyncio.gather(*jobs) == [expected] * len(jobs)
        assert keys_of(cluster) == []
        injected = cluster.stats().faults
        assert all(injected[kind] for kind in ("duplicate", "drop", "delay", "throttle")), injected


def test_the_documented_example_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "testing.md").read_text()
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert example is not None
    program = tmp_path / "program.py"
    program.write_text(example[1])
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{'duplicate': ")
