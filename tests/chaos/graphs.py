"""What is computed: the demo's graphs, smaller, and random ones of known difficulty."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from dask import delayed

from tests.chaos.functions import blob, exclusive_or, fails, mix, number
from wukong_async.cli.examples import EXAMPLES

SHRINK = 100
"""How many times smaller the numerical examples are than in the original."""
EACH = 3
"""Random graphs of each shape."""
MB = 1_000_000


@dataclass(frozen=True)
class Case:
    """A collection, and what Dask's synchronous scheduler makes of it."""

    name: str
    collection: Any
    expected: Any

    def is_right(self, found: Any) -> bool:
        expected = self.expected
        if isinstance(expected, Exception):
            return type(found) is type(expected) and str(found) == str(expected)
        if isinstance(expected, np.ndarray):
            # BLAS sums in another order on another number of threads.
            return isinstance(found, np.ndarray) and np.allclose(found, expected)
        return bool(found == expected)


def make_cases(rng: random.Random) -> list[Case]:
    """All graphs of a run, computed once by Dask."""
    cases = [
        _case(example.name, example.make(SHRINK if example.needs else 1))
        for example in EXAMPLES
        # Its library takes longer to import than a sandbox lives here.
        if example.needs != "dask_ml"
    ]
    for shape in SHAPES:
        cases += [_case(shape.__name__.strip("_"), shape(rng)) for _ in range(EACH)]
    return cases


def _case(name: str, collection: Any) -> Case:
    try:
        expected = collection.compute(scheduler="synchronous")
    except ValueError as error:
        expected = error
    return Case(name, collection, expected)


def _tree(rng: random.Random) -> Any:
    level = [delayed(number)(rng.randrange(1000)) for _ in range(2 ** rng.randint(3, 7))]
    while len(level) > 1:
        level = [delayed(mix)(*level[i : i + 2]) for i in range(0, len(level), 2)]
    return level[0]


def _fan_in(rng: random.Random) -> Any:
    return delayed(mix)(*(delayed(number)(rng.randrange(1000)) for _ in range(500)))


def _fan_out(rng: random.Random) -> Any:
    root = delayed(number)(rng.randrange(1000))
    return delayed(mix)(*(delayed(mix)(root, i) for i in range(1000)))


def _chain(rng: random.Random) -> Any:
    last = delayed(number)(rng.randrange(1000))
    for i in range(rng.randint(50, 300)):
        last = delayed(mix)(last, i)
    return last


def _layers(rng: random.Random) -> Any:
    """Every task reads some of all that were made before it, so that nothing is anybody's own."""
    known = [delayed(number)(rng.randrange(1000)) for _ in range(8)]
    for _ in range(60):
        known.append(delayed(mix)(*rng.sample(known, rng.randint(1, 4))))
    return delayed(mix)(*known)


def _large_values(rng: random.Random) -> Any:
    blobs = [delayed(blob)(rng.randint(MB, 3 * MB), rng.randrange(1000)) for _ in range(4)]
    pairs = [delayed(exclusive_or)(*rng.sample(blobs, 2)) for _ in range(3)]
    return delayed(exclusive_or)(*pairs)


def _failure(rng: random.Random) -> Any:
    leaves = [delayed(number)(rng.randrange(1000)) for _ in range(20)]
    return delayed(mix)(*leaves, delayed(fails)(delayed(mix)(leaves[0], 1)))


SHAPES: tuple[Callable[[random.Random], Any], ...] = (
    _tree,
    _fan_in,
    _fan_out,
    _chain,
    _layers,
    _large_values,
    _failure,
)
