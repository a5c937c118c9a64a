"""What the policy makes of each case, in the timing model, beside other rules.

    python -m benchmarks model                      # all cases; takes minutes
    python -m benchmarks model "1,000 × 1 ms" --json FILE

Each figure is seconds until the result over those of the best known schedule, and what all
executors cost over the cheapest way: of the best that is known, be it a run of another rule or a
single executor. `moved` is what is large and was written or read.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.arguments import UsageError
from benchmarks.clairvoyant import Single, clairvoyant, single
from benchmarks.document import document, outputs, write
from benchmarks.timing import Case, Outcome, World

FEW_SLOTS = 2


def literal(case: Case) -> float:
    """What shipping a task costs, to the literal rule: a start, an input and an output."""
    return case.place.costs.start + 2 * case.place.costs.moving(statistics.fmean(case.sizes))


RULES: Mapping[str, Callable[[Case], World]] = {
    "blind": World,
    "known": lambda case: World(case, known=True),
    "literal": lambda case: World(case, hold=literal(case)),
    "paper": lambda case: World(case, hold=0, leaf_batch=1),
}
"""Ours, for tasks never seen before; ours, after such a job; each task on its own once it has
waited for as long as shipping costs; an executor for each leaf, and each edge but one of a
fan-out."""


@dataclass(frozen=True)
class Compared:
    """One case under all rules."""

    name: str
    slots: int
    best: float
    """Seconds of the best known schedule."""
    one: float
    """Seconds of a single executor."""
    cheapest: float
    """Seconds of all executors together."""
    outcomes: Mapping[str, Outcome]

    def ratios(self, rule: str) -> tuple[float, float]:
        """Makespan over the best known, and cost over the cheapest."""
        outcome = self.outcomes[rule]
        return outcome.seconds / self.best, outcome.cost / self.cheapest


def compare(case: Case, rules: Iterable[str] = RULES) -> Compared:
    """Run a case under some rules."""
    outcomes = {rule: RULES[rule](case).run() for rule in rules}
    one = single(case)
    every: list[Outcome | Single] = [one, *outcomes.values()]
    return Compared(
        case.name,
        case.place.slots,
        min(clairvoyant(case), *(outcome.seconds for outcome in every)),
        one.seconds,
        min(outcome.cost for outcome in every),
        outcomes,
    )


HEAD = "{:<45} {:>8} {:>8}" + "  {:^36}" * len(RULES)
CELLS = " {:>5} /{:>5} {:>6} {:>8} {:>6}"
EACH = CELLS.format("time", "cost", "starts", "MB", "idle")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `model`."""
    parser = commands.add_parser("model", help="run the policy in the timing model")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names, or beginnings; all")
    outputs(parser)
    parser.set_defaults(call=run)


def run(options: argparse.Namespace) -> int:
    """The `model` command."""
    if os.environ.get("PYTHONHASHSEED") != "0":  # See benchmarks/cases.py.
        command = [sys.executable, *sys.orig_argv[1:]]
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        return subprocess.run(command, env=environment, check=False).returncode
    from benchmarks.cases import CASES

    starts = tuple(options.cases)
    chosen = [case for name, case in CASES.items() if not starts or name.startswith(starts)]
    if not chosen:
        raise UsageError(f"No case begins like that. There are: {', '.join(CASES)}.")
    write(options, document("model", {}, compare_all(chosen)))
    return 0


def compare_all(cases: Iterable[Case]) -> list[dict[str, Any]]:
    """Compare and print; the rows."""
    print(HEAD.format("", "best s", "one s", *RULES))
    print(HEAD.format("", "", "", *[EACH] * len(RULES)))
    found: list[Compared] = []
    for case in cases:
        found.append(compare(case))
        _show(found[-1])
    _show_means("geometric mean", found)
    _show_means("geometric mean, 2 slots", [each for each in found if each.slots == FEW_SLOTS])
    return [asdict(each) for each in found]


def _show(compared: Compared) -> None:
    cells = [
        CELLS.format(
            *map(_ratio, compared.ratios(rule)),
            outcome.starts,
            f"{outcome.moved / 1e6:.0f}",
            f"{outcome.idle:.2f}",
        )
        for rule, outcome in compared.outcomes.items()
    ]
    print(
        HEAD.format(compared.name, f"{compared.best:.3f}", f"{compared.one:.2f}", *cells),
        flush=True,
    )


def _show_means(label: str, found: Sequence[Compared]) -> None:
    if not found:
        return
    cells = []
    for rule in RULES:
        times, costs = zip(*(each.ratios(rule) for each in found), strict=True)
        means = (_ratio(statistics.geometric_mean(ratios)) for ratios in (times, costs))
        cells.append(CELLS.format(*means, "", "", ""))
    print(HEAD.format(f"{label} ({len(found)})", "", "", *cells))


def _ratio(value: float) -> str:
    """Three digits."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{min(digits, 2)}f}"
