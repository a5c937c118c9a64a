"""More seeds than the tests run, or one seed with its story.

python -m tests.simulation --seeds 100000
python -m tests.simulation --seed 1234
python -m tests.simulation --seed 1234 --without crash,offer --calm 5
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tests.simulation.world import CALM, Violation, World

CHUNK = 500
MOMENT = 0.5
"""Simulated seconds in which it does not pay any more to look for less."""


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


def fails(seed: int, without: frozenset[str], calm: float) -> str:
    """What is wrong with this seed; empty if nothing is."""
    try:
        World(seed, without=without, calm=calm).run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def shrink(seed: int) -> tuple[frozenset[str], float]:
    """The kinds of faults that a failing seed does without, and how soon they may end."""
    world = World(seed)
    without: frozenset[str] = frozenset()
    for name, chance in {**vars(world.faults), **vars(world.policy)}.items():
        if chance and fails(seed, without | {name}, CALM):
            without |= {name}
    calm = CALM
    while calm > MOMENT and fails(seed, without, calm / 2):
        calm /= 2
    return without, calm


def story(seed: int) -> str:
    """The smallest case of a failing seed, and the command that replays it."""
    without, calm = shrink(seed)
    command = f"{sys.executable} -m tests.simulation --seed {seed} --calm {calm:g}"
    if without:
        command += f" --without {','.join(sorted(without))}"
    return f"{fails(seed, without, calm)}\n    {command}"


def replay(seed: int, without: frozenset[str], calm: float) -> int:
    world = World(seed, without=without, calm=calm, tracing=True)
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
    parser.add_argument("--without", default="", help="kinds of faults, separated by commas")
    parser.add_argument("--calm", type=float, default=CALM, help="seconds until faults end")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        without = frozenset(filter(None, arguments.without.split(",")))
        return replay(arguments.seed, without, arguments.calm)
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
        print(f"seed {seed}: {what}\n  smallest: {story(seed)}")
    print(f"{len(failures)} violations")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
