"""`python -m benchmarks`: measure workloads on backends, in turn, in one run.

    python -m benchmarks list
    python -m benchmarks run tr1024 --backend wukong,distributed --repeat 5 --json FILE
    python -m benchmarks run svd1 tsqr --counts    # what is sent and stored; no times
    python -m benchmarks model              # the policy in simulated time, beside other rules
    python -m benchmarks fanout             # from which fan-out on the proxy pays
    python -m benchmarks copies                 # memory and speed of moving large values
    python -m benchmarks scale                  # strong and weak scaling in a simulated cloud

Each result is compared with Dask's synchronous one before anything is timed. Backends take turns
(A B A B …), so that a machine that changes its speed changes it for all: compare ratios, not
seconds.
"""

from __future__ import annotations

import os

# Before numpy is imported, here and in the workers: one thread for BLAS, everywhere.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import contextlib
import dataclasses
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import copies, fanout, scale
from benchmarks.backends import BACKENDS, WORKERS, Backend
from benchmarks.counting import Counts, per_edge
from benchmarks.workloads import WORKLOADS, Workload

TIMED = ["wukong", "distributed"]
COUNTED = ["wukong", "paper-mode"]
PACKAGES = ("wukong-async", "dask", "distributed", "numpy")
HEAD = (
    "workload",
    "backend",
    "entry",
    "min s",
    "median s",
    "max s",
    "ratio",
    "correct",
    "tasks",
    "invoked",
    "commits",
    "commands",
    "kB in",
    "kB out",
)
ROW = "{:<10} {:<13} {:<8} {:>8} {:>8} {:>8} {:>14} {:>7} {:>6} {:>7} {:>7} {:>8} {:>9} {:>9}"


COUNTS_HEAD = (
    "workload",
    "backend",
    "correct",
    "tasks",
    "invoked",
    "commits",
    "commands",
    "kB in",
    "kB out",
    "billed ms",
)
COUNTS_ROW = "{:<10} {:<13} {:>7} {:>6} {:>7} {:>7} {:>8} {:>10} {:>10} {:>9}"


@dataclasses.dataclass
class Measured:
    """The runs of one workload on one backend through one entry."""

    backend: Backend
    entry: str
    correct: bool
    seconds: list[float] = dataclasses.field(default_factory=list)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)

    def row(self, workload: str) -> dict[str, Any]:
        """As it stands in the JSON."""
        return {
            "workload": workload,
            "backend": self.backend.name,
            "entry": self.entry,
            "wall_s": {
                "min": min(self.seconds),
                "median": statistics.median(self.seconds),
                "max": max(self.seconds),
            },
            "correct": self.correct,
            # Only some backends can be counted; the rows are alike all the same.
            **dict.fromkeys(field.name for field in dataclasses.fields(Counts)),
            **self.counts,
        }


def measure(workload: Workload, backends: Sequence[Backend], repeat: int) -> list[Measured]:
    """Check, warm up, then time the backends in turn."""
    expected = workload.make().compute(scheduler="synchronous")
    measured = [
        Measured(backend, entry, _same(call(workload.make()), expected))
        for backend in backends
        for entry, call in backend.entries.items()
    ]
    for _ in range(repeat):
        for each in measured:
            collection = workload.make()
            gc.collect()
            started = time.perf_counter()
            each.backend.entries[each.entry](collection)
            each.seconds.append(time.perf_counter() - started)
    for each in measured:
        if each.backend.count is not None:
            each.counts = dataclasses.asdict(each.backend.count(each.entry, workload.make))
    return measured


def _same(found: Any, expected: Any) -> bool:
    if not hasattr(expected, "shape"):
        return bool(found == expected)
    import numpy as np

    return bool(np.allclose(found, expected))


def show(workload: str, measured: Sequence[Measured]) -> None:
    """A row for each, with the ratio to the first backend's same entry, run by run."""
    for each in measured:
        base = next((m for m in measured if m.entry == each.entry), each)
        ratios = [b / a for a, b in zip(base.seconds, each.seconds, strict=True)]
        ratio = f"{statistics.median(ratios):.1f}×"
        if each is not base:
            ratio += f" ({min(ratios):.1f}-{max(ratios):.1f})"
        row = each.row(workload)
        wall = row["wall_s"]
        counts = each.counts
        print(
            ROW.format(
                workload,
                row["backend"],
                row["entry"],
                *(f"{wall[name]:.4f}" for name in ("min", "median", "max")),
                ratio,
                str(each.correct).lower(),
                *(counts.get(n, "-") for n in ("tasks", "invocations", "commits")),
                counts.get("store_commands", "-"),
                *(
                    f"{counts[name] / 1000:.1f}" if counts else "-"
                    for name in ("store_bytes_in", "store_bytes_out")
                ),
            ),
            flush=True,
        )


def count(workload: Workload, backends: Sequence[Backend]) -> list[dict[str, Any]]:
    """Check, then count, and what one write and one read for each edge of the graph would be."""
    expected = workload.make().compute(scheduler="synchronous")
    rows: list[dict[str, Any]] = []
    for backend in backends:
        if backend.count is None:
            continue
        correct = _same(backend.entries["compute"](workload.make()), expected)
        counts = backend.count("compute", workload.make)
        row = {"workload": workload.name, "backend": backend.name, "correct": correct}
        rows.append({**row, **dataclasses.asdict(counts)})
        show_counts(rows[-1])
    edges = per_edge(workload.make())
    rows.append(
        {
            "workload": workload.name,
            "backend": "per-edge",
            "tasks": edges.tasks,
            "store_commands": edges.commands,
            "store_bytes_in": edges.bytes,
            "store_bytes_out": edges.bytes,
        }
    )
    show_counts(rows[-1])
    return rows


def show_counts(row: dict[str, Any]) -> None:
    """A row of counts."""
    print(
        COUNTS_ROW.format(
            row["workload"],
            row["backend"],
            str(row.get("correct", "-")).lower(),
            *(row.get(n, "-") for n in ("tasks", "invocations", "commits", "store_commands")),
            *(f"{row[name] / 1000:.1f}" for name in ("store_bytes_in", "store_bytes_out")),
            row.get("billed_ms", "-"),
        ),
        flush=True,
    )


def run(options: argparse.Namespace) -> int:
    """The `run` command."""
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        names = options.backend or (COUNTED if options.counts else TIMED)
        backends = [stack.enter_context(BACKENDS[name]()) for name in names]
        if options.counts:
            print(COUNTS_ROW.format(*COUNTS_HEAD))
            for name in options.workloads:
                rows += count(WORKLOADS[name], backends)
            write(options, {"workers": WORKERS, "blas_threads": 1}, rows)
            return 0 if all(row.get("correct", True) for row in rows) else 1
        print(ROW.format(*HEAD))
        for name in options.workloads:
            measured = measure(WORKLOADS[name], backends, options.repeat)
            show(name, measured)
            rows += [each.row(name) for each in measured]
    write(options, {"workers": WORKERS, "blas_threads": 1, "repeat": options.repeat}, rows)
    return 0 if all(row["correct"] for row in rows) else 1


def write(
    options: argparse.Namespace, settings: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> None:
    """Put the rows into the file that was asked for, with where they come from."""
    if options.json is None:
        return
    document = {
        "machine": {
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "settings": settings,
        "results": rows,
    }
    options.json.write_text(json.dumps(document, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _backends(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in BACKENDS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(BACKENDS)}")
    return names


def _model(options: argparse.Namespace) -> int:
    """The `model` command."""
    if os.environ.get("PYTHONHASHSEED") != "0":  # See benchmarks/cases.py.
        command = [sys.executable, *sys.orig_argv[1:]]
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        return subprocess.run(command, env=environment, check=False).returncode
    from benchmarks import model
    from benchmarks.cases import CASES

    starts = tuple(options.cases)
    chosen = [case for name, case in CASES.items() if not starts or name.startswith(starts)]
    if not chosen:
        print(f"No case begins like that. There are: {', '.join(CASES)}.", file=sys.stderr)
        return 2
    write(options, {}, model.run(chosen))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what can be measured")
    runner = commands.add_parser("run", help="measure workloads")
    runner.add_argument("workloads", nargs="+", choices=list(WORKLOADS), metavar="WORKLOAD")
    runner.add_argument(
        "--backend",
        type=_backends,
        help=f"comma-separated: {', '.join(BACKENDS)}; default: {','.join(TIMED)},"
        f" or {','.join(COUNTED)} with --counts",
    )
    runner.add_argument("--repeat", type=int, default=5, help="timed runs of each")
    runner.add_argument("--counts", action="store_true", help="count only; nothing is timed")
    modelled = commands.add_parser("model", help="run the policy in the timing model")
    modelled.add_argument("cases", nargs="*", metavar="CASE", help="names, or beginnings; all")
    fans = commands.add_parser("fanout", help="measure wide fan-outs of invocations")
    fans.add_argument("--repeat", type=int, default=3, help="processes of each")
    fans.add_argument("--events", type=int, nargs="+", default=fanout.FANOUTS, help="how many")
    for command in (runner, modelled, fans):
        command.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    mover = commands.add_parser("copies", help="measure what it costs to move large values")
    mover.add_argument("--repeat", type=int, default=5, help="the best of so many runs counts")
    scale.add(commands)
    options = parser.parse_args(arguments)
    if options.command == "scale":
        return int(options.call(options))
    if options.command == "copies":
        return copies.run(options.repeat)
    if options.command == "list":
        for workload in WORKLOADS.values():
            print(f"{workload.name:<10} {workload.about}")
        return 0
    if options.command == "model":
        return _model(options)
    if options.command == "fanout":
        write(options, {"repeat": options.repeat}, fanout.run(options.events, options.repeat))
        return 0
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
