"""Measure workloads on backends, in turn, in one run.

    python -m benchmarks run tr1024 --backend wukong,distributed --repeat 5 --json FILE
    python -m benchmarks run tr1024 --size leaves=512,sleep=0.1
    python -m benchmarks run gemm svd1 --size paper
    python -m benchmarks run svd1 tsqr --counts    # what is sent and stored; no times

Each result is compared with Dask's synchronous one before anything is timed. Backends take turns
(A B A B …), each in a process of its own: so a machine that changes its speed changes it for all
(compare ratios, not seconds), and none idles where another one is measured. `get` is
`x.compute(scheduler=…)`, `compute` is `client.compute(x)`. What our backends send and store is
counted in clusters of their own. On Lithops each task is a process: give it few.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dask.utils import format_bytes

from benchmarks.apart import Apart
from benchmarks.arguments import UsageError, positive
from benchmarks.backends import BACKENDS, WORKERS, is_installed
from benchmarks.counting import Counts, per_edge
from benchmarks.document import document, outputs, write
from benchmarks.workloads import WORKLOADS, Sized, describe
from wukong_async import graph

TIMED = ["wukong", "distributed"]
COUNTED = ["wukong", "paper-mode"]
OPTIMISED = 3
"""How often Dask's own optimisation is timed."""
HEAD = (
    "backend",
    "entry",
    "min s",
    "median",
    "max",
    "ratio",
    "right",
    "Dask's",
    "tasks",
    "invoked",
    "commits",
    "cmds",
    "in",
    "out",
    "peak",
    "billed ms",
    "µ$",
)
ROW = (
    "{:<12} {:<7} {:>6} {:>6} {:>6} {:>17} {:>5} {:>6} {:>6} {:>7} {:>7} {:>6} {:>10} {:>10} {:>10}"
    " {:>9} {:>7}"
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands `list` and `run`."""
    lister = commands.add_parser("list", help="what can be measured, and in which sizes")
    lister.set_defaults(call=show_workloads)
    runner = commands.add_parser(
        "run",
        help="measure workloads on backends",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_workloads(runner)
    runner.add_argument(
        "--backend",
        type=_backends,
        metavar="NAME,…",
        help=f"of {', '.join(BACKENDS)}; default: {','.join(TIMED)}, or {','.join(COUNTED)} with"
        " --counts",
    )
    runner.add_argument(
        "--repeat",
        type=positive,
        default=5,
        help="timed runs of each, and clusters that it is counted in (5 at most)",
    )
    runner.add_argument(
        "--counts",
        action="store_true",
        help="count only, beside one write and one read for each edge; nothing is timed",
    )
    outputs(runner)
    runner.set_defaults(call=run)


def add_workloads(parser: argparse.ArgumentParser, *, default: Iterable[str] = ()) -> None:
    """Add the names of workloads, which may be left out if there is a default, and `--size`."""
    names = [*default]
    parser.add_argument(
        "workloads",
        nargs="*" if names else "+",
        type=_workload,
        default=names,
        metavar="WORKLOAD",
        help="see `list`" + (f"; default: {' '.join(names)}" if names else ""),
    )
    parser.add_argument(
        "--size",
        type=lambda text: text.split(","),
        action="extend",
        default=[],
        metavar="small|paper|KEY=VALUE",
        help="how large, comma-separated or several times: a size, and changes to it",
    )


def sized(options: argparse.Namespace) -> list[Sized]:
    """The workloads that were asked for, in that size.

    Raises
    ------
    UsageError
        If one of them has no such parameter.
    """
    try:
        return [WORKLOADS[name].sized(options.size) for name in dict.fromkeys(options.workloads)]
    except ValueError as error:
        raise UsageError(str(error)) from None


def show_workloads(_: argparse.Namespace) -> int:
    """The `list` command."""
    for workload in WORKLOADS.values():
        print(f"{workload.name:<10} {workload.about}")
        print(f"{'':<10}   small: {describe(workload.small)}")
        print(f"{'':<10}   paper: {describe(workload.paper)}")
    return 0


def run(options: argparse.Namespace) -> int:
    """The `run` command."""
    chosen = sized(options)
    names = options.backend or (COUNTED if options.counts else TIMED)
    for name in names:
        if not is_installed(name):
            hint = "pip install 'wukong-async[compare]'"
            print(f"{name} is skipped, since it is not installed: {hint}", file=sys.stderr)
    names = list(filter(is_installed, names))
    if not names:
        raise UsageError("No backend is left.")
    rows: list[dict[str, Any]] = []
    timelines: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        backends = [stack.enter_context(Apart(name)) for name in names]
        for each in chosen:
            print(f"\n{each}\n{ROW.format(*HEAD)}".rstrip(), flush=True)
            if options.counts:
                rows += count(each, backends, options.repeat)
            else:
                rows += measure(each, backends, options.repeat)
                timelines += trace(each, backends)
    settings = {"workers": WORKERS, "blas_threads": 1, "repeat": options.repeat}
    write(options, document("run", settings, rows, timelines=timelines))
    return 0 if all(row["correct"] is not False for row in rows) else 1


@dataclasses.dataclass
class Measured:
    """The runs of one workload on one backend through one entry."""

    backend: Apart
    entry: str
    correct: bool
    seconds: list[float] = dataclasses.field(default_factory=list)


def measure(each: Sized, backends: Sequence[Apart], repeat: int) -> list[dict[str, Any]]:
    """Check, warm up, time the backends in turn, and count; the rows."""
    expected = each.expected()
    measured = [
        Measured(backend, entry, same(backend.value(entry, each), expected))
        for backend in backends
        for entry in backend.entries
    ]
    for _ in range(repeat):
        for some in measured:
            some.seconds.append(some.backend.seconds(some.entry, each))
    optimise = {
        ours: statistics.median(optimise_seconds(each.make(), ours=ours) for _ in range(OPTIMISED))
        for ours in (True, False)
    }
    rows = []
    for some in measured:
        base = next(m for m in measured if m.entry == some.entry)
        ratios = [b / a for a, b in zip(base.seconds, some.seconds, strict=True)]
        counts = some.backend.count(some.entry, each, repeat) if some.backend.counts else None
        rows.append(
            {
                **_row(each, some.backend.name, some.entry, some.correct, counts),
                "wall_s": spread(some.seconds),
                "ratio": spread(ratios),
                "optimise_s": optimise[counts is not None] if some.entry == "get" else None,
            }
        )
        print(line(rows[-1]), flush=True)
    return rows


def count(each: Sized, backends: Sequence[Apart], repeat: int) -> list[dict[str, Any]]:
    """Check, then count, and what one write and one read for each edge of the graph would be."""
    expected = each.expected()
    rows = []
    for backend in backends:
        if not backend.counts:
            continue
        correct = same(backend.value("compute", each), expected)
        counts = backend.count("compute", each, repeat)
        rows.append(_row(each, backend.name, "compute", correct, counts))
        print(line(rows[-1]), flush=True)
    edges = per_edge(each.make())
    rows.append(
        {
            **_row(each, "per-edge", "compute", None, None),
            "tasks": edges.tasks,
            "store_commands": edges.commands,
            "store_bytes_in": edges.bytes,
            "store_bytes_out": edges.bytes,
        }
    )
    print(line(rows[-1]), flush=True)
    return rows


def trace(each: Sized, backends: Sequence[Apart]) -> list[dict[str, Any]]:
    """One more run on each backend that tells who is busy when."""
    return [
        {
            "workload": each.workload.name,
            "backend": backend.name,
            "lanes": backend.trace(each),
        }
        for backend in backends
        if backend.traces
    ]


def _row(
    each: Sized, backend: str, entry: str, correct: bool | None, counts: Counts | None
) -> dict[str, Any]:
    """What stands in the JSON, but for times. Rows are alike whatever could be measured."""
    return {
        "workload": each.workload.name,
        "size": each.label,
        "backend": backend,
        "entry": entry,
        "wall_s": None,
        "ratio": None,
        "correct": correct,
        **dict.fromkeys(field.name for field in dataclasses.fields(Counts)),
        **(dataclasses.asdict(counts) if counts else {}),
        "usd": counts.usd if counts else None,
        "optimise_s": None,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """As it stands in the JSON."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def line(row: dict[str, Any]) -> str:
    """A row, for people."""

    def cell(name: str, show: Callable[[Any], str] = str) -> str:
        return "-" if row[name] is None else show(row[name])

    wall, ratio = row["wall_s"], row["ratio"]
    seconds = [f"{wall[name]:.4f}"[:6] for name in ("min", "median", "max")] if wall else ["-"] * 3
    own = row["optimise_s"]
    return ROW.format(
        row["backend"],
        row["entry"],
        *seconds,
        show_ratio(ratio) if ratio else "-",
        cell("correct", lambda right: "yes" if right else "NO"),
        f"{own / wall['median']:.0%}" if wall and own is not None else "-",
        *map(cell, ("tasks", "invocations", "commits", "store_commands")),
        *(cell(f"store_{name}", format_bytes) for name in ("bytes_in", "bytes_out", "peak_bytes")),
        cell("billed_ms"),
        cell("usd", lambda usd: f"{usd * 1e6:.1f}"),
    )


def show_ratio(ratio: dict[str, float]) -> str:
    """A ratio and its spread."""
    median, low, high = (
        f"{ratio[name]:.{0 if ratio[name] >= 100 else 1}f}" for name in ("median", "min", "max")
    )
    return f"{median}× ({low}-{high})"


def same(found: Any, expected: Any) -> bool:
    """Whether two results are equal, but for how floating-point numbers are rounded."""
    import numpy as np
    import pandas as pd

    if type(found) is not type(expected):
        return False
    if isinstance(expected, tuple | list):
        return len(found) == len(expected) and all(map(same, found, expected))
    try:
        if isinstance(expected, pd.DataFrame):
            pd.testing.assert_frame_equal(found, expected)
        elif isinstance(expected, pd.Series):
            pd.testing.assert_series_equal(found, expected)
        elif isinstance(expected, np.ndarray | np.generic | float):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8, strict=True)
        else:
            return bool(found == expected)
    except AssertionError:
        return False
    return True


class _Optimised(Exception):
    """Nothing is to be computed."""


def optimise_seconds(collection: Any, *, ours: bool) -> float:
    """What Dask takes to optimise a collection and to make its graph, before a scheduler begins.

    Parameters
    ----------
    ours
        As it is when our client asks for the graph, which does without what would only be culled.
        (Not the public API: there is nothing there to see it by.)
    """

    def stop(dsk: Any, _keys: object, **_: object) -> None:
        graph.materialise(graph.unculled(dsk) if ours else dsk)
        raise _Optimised

    started = time.perf_counter()
    with contextlib.suppress(_Optimised):
        collection.compute(scheduler=stop)
    return time.perf_counter() - started


def _backends(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in BACKENDS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(BACKENDS)}")
    return list(dict.fromkeys(names))


def _workload(text: str) -> str:
    if text not in WORKLOADS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(WORKLOADS)}")
    return text
