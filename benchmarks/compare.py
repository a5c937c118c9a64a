"""Compare two documents of the same command: what has become better, or worse.

    python -m benchmarks compare OLD.json NEW.json

Times of several runs differ if their ranges, from the shortest to the longest, do not overlap; of a
single run nothing is said. Figures without a range differ if they do by more than 10 %; only such
ones are shown. What `run` and `chaos` count is shown as well, but does not decide: it depends on
how long tasks take. The exit code is 1 if something has become worse.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.arguments import UsageError

Row: TypeAlias = Mapping[str, Any]
KEYS: Mapping[str, tuple[str, ...]] = {
    "run": ("workload", "size", "backend", "entry"),
    "chaos": ("workload", "size"),
    "scale": ("curve", "engine", "executors", "tasks", "task_s"),
    "plan": ("shape", "tasks"),
    "overhead": ("workload", "tasks", "phase"),
}
"""What a row of each command is known by."""
LEFT_OUT = ("ratio",)
"""Beside another backend's runs, or undisturbed ones: they are rows and figures of their own."""
INFORMATIVE = ("run", "chaos")
"""Commands whose rows have ranges that decide, and figures without one that do not."""
LARGER_IS_BETTER = ("efficiency",)
TOLERANCE = 0.1
LINE = "{:<44} {:<18} {:>12} {:>12} {:>8}  {}"


@dataclass(frozen=True)
class Change:
    """A figure of a row that both documents have."""

    row: str
    figure: str
    old: float
    new: float
    ratio: float | None
    """New over old; None where there is nothing to divide."""
    verdict: str
    worse: bool


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `compare`."""
    parser = commands.add_parser(
        "compare",
        help="compare two documents",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.set_defaults(call=run)


def run(options: argparse.Namespace) -> int:
    """The `compare` command."""
    old, new = (read(path) for path in (options.old, options.new))
    if old["command"] != new["command"]:
        raise UsageError(
            f"{options.old} is of `{old['command']}` and {options.new} of `{new['command']}`:"
            " only documents of the same command can be compared."
        )
    keys = KEYS[old["command"]]
    before, after = (_by_key(document["results"], keys) for document in (old, new))
    if not before.keys() & after.keys():
        raise UsageError(f"{options.old} and {options.new} have no row in common.")
    for part in ("machine", "versions", "settings"):
        if old.get(part) != new.get(part):
            print(f"not the same {part}: {_different(old.get(part), new.get(part))}")
    print(LINE.format("", "", "old", "new", "ratio", "").rstrip())
    worse = False
    for key, row in before.items():
        if key not in after:
            print(f"{_name(key)}: only in {options.old}")
            continue
        for change in changes(old["command"], _name(key), row, after[key]):
            ratio = "" if change.ratio is None else f"{change.ratio:.2f}×"
            figures = (f"{change.old:.6g}", f"{change.new:.6g}", ratio)
            print(LINE.format(change.row, change.figure, *figures, change.verdict))
            worse |= change.worse
    for key in after.keys() - before.keys():
        print(f"{_name(key)}: only in {options.new}")
    return int(worse)


def read(path: Path) -> dict[str, Any]:
    """A document.

    Raises
    ------
    UsageError
        If the file cannot be used, with the reason.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}.") from None
    if not isinstance(document, dict) or not isinstance(document.get("results"), list):
        raise UsageError(f"{path} is not a document of `python -m benchmarks … --json`.")
    command: Any = document.get("command")
    keys = KEYS.get(command)
    if keys is None:
        raise UsageError(
            f"{path} is of the command {command!r}; those that can be compared are"
            f" {', '.join(KEYS)}."
        )
    for row in document["results"]:
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise UsageError(f"{path} has a row without {missing[0]!r}.")
    return document


def changes(command: str, name: str, old: Row, new: Row) -> Iterator[Change]:
    """What is to be said of a row: all ranges, and the figures that have changed."""
    for figure in old:
        a: Any = old[figure]
        b: Any = new.get(figure)
        if figure == "correct" and a != b:
            verdict = "WRONG now" if a else "right now"
            yield Change(name, figure, bool(a), bool(b), None, verdict, worse=bool(a))
        elif _is_range(a) and _is_range(b) and figure not in LEFT_OUT:
            yield _of_ranges(name, figure, a, b)
        elif _is_figure(a) and _is_figure(b) and figure not in KEYS[command]:
            ratio = _ratio(a, b)
            if abs(ratio - 1) > TOLERANCE:
                verdict, worse = _of_figures(figure, ratio, decides=command not in INFORMATIVE)
                yield Change(name, figure, a, b, ratio, verdict, worse)


def _of_ranges(name: str, figure: str, old: Row, new: Row) -> Change:
    ratio = _ratio(old["median"], new["median"])
    if old["min"] == old["max"] or new["min"] == new["max"]:
        verdict = "of a single run, so nobody knows"
        return Change(name, figure, old["median"], new["median"], ratio, verdict, worse=False)
    slower, faster = new["min"] > old["max"], new["max"] < old["min"]
    verdict = "SLOWER" if slower else "faster" if faster else "within the spread"
    return Change(name, figure, old["median"], new["median"], ratio, verdict, slower)


def _of_figures(figure: str, ratio: float, *, decides: bool) -> tuple[str, bool]:
    """What is to be said of a change, and whether it is for the worse."""
    more = ratio > 1
    if not decides:
        return "more" if more else "less", False
    worse = more != (figure in LARGER_IS_BETTER)
    return "WORSE" if worse else "better", worse


def _ratio(old: float, new: float) -> float:
    if old == 0:
        return 1.0 if new == 0 else float("inf")
    return new / old


def _is_range(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {"min", "median", "max"}


def _is_figure(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _by_key(rows: list[Row], keys: tuple[str, ...]) -> dict[tuple[Any, ...], Row]:
    return {tuple(row[key] for key in keys): row for row in rows}


def _name(key: tuple[Any, ...]) -> str:
    return " ".join(map(str, key))


def _different(old: object, new: object) -> str:
    """What of two mappings is not alike."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return f"{old!r}, {new!r}"
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name)!r}, now {new.get(name)!r}" for name in names)
