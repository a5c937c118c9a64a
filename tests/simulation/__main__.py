"""More seeds than the tests run, or one seed with its story.

python -m tests.simulation --seeds 100000
python -m tests.simulation --seed 1234
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tests.simulation.world import Violation, World

CHUNK = 500


def run_chunk(first: int, count: int) -> tuple[Counter[str], list[tuple[int, str]]]:
    """(faults by kind, failures) of a run of seeds."""
    faults: Counter[str] = Counter()
    failures: list[tuple[int, str]] = []
    for seed in range(first, first + count):
        world = World(seed)
        try:
            world.run()
        except Exception as error:
            failures.append((seed, f"{type(error).__name__}: {error}"))
        faults.update(world.injected)
    return faults, failures


def replay(seed: int) -> int:
    world = World(seed, tracing=True)
    try:
        world.run()
    except Exception as error:
        print(*world.trace, sep="\n")
        if isinstance(error, Violation):
            print(f"seed {seed}: {error}")
        else:
            traceback.print_exc()
        return 1
    print(*world.trace, sep="\n")
    print(f"seed {seed}: {len(world.workload.plan)} tasks, faults {world.injected}, no violation")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int)
    arguments = parser.parse_args()
    if arguments.seed is not None:
        return replay(arguments.seed)
    started = time.perf_counter()
    faults: Counter[str] = Counter()
    failures: list[tuple[int, str]] = []
    firsts = range(arguments.first, arguments.first + arguments.seeds, CHUNK)
    end = arguments.first + arguments.seeds
    with ProcessPoolExecutor() as pool:
        counts = [min(CHUNK, end - first) for first in firsts]
        for some_faults, some_failures in pool.map(run_chunk, firsts, counts):
            faults += some_faults
            failures += some_failures
    seconds = time.perf_counter() - started
    print(f"{arguments.seeds} runs in {seconds:.1f} s, {faults.total()} faults: {dict(faults)}")
    for seed, what in failures[:20]:
        print(f"seed {seed}: {what}\n    replay: python -m tests.simulation --seed {seed}")
    print(f"{len(failures)} violations")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
