"""The protocol under attack: every seed is a graph, a schedule and a set of faults."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.simulation.__main__ import CHUNK, run_chunk, story

SEEDS = int(os.environ.get("WUKONG_SIMULATION_SEEDS", "20000"))


@pytest.mark.timeout(600)
def test_no_seed_breaks_a_promise() -> None:
    firsts = range(0, SEEDS, CHUNK)
    with ProcessPoolExecutor() as pool:
        chunks = list(pool.map(run_chunk, firsts, [CHUNK] * len(firsts)))
    failures = [failure for _, some in chunks for failure in some]
    assert not failures, "\n".join(
        f"seed {seed}: {what}\n  smallest: {story(seed)}" for seed, what in failures[:5]
    )
    faults = sum((faults.total() for faults, _ in chunks), 0)
    assert faults > 5 * SEEDS, "the seeds inject hardly any faults: this proves nothing"
