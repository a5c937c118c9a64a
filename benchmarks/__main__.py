"""`python -m benchmarks`: what the engine takes, beside what a user would pick instead.

python -m benchmarks list                              # workloads and their sizes
python -m benchmarks run tr1024 --json FILE            # times and counts, beside others
python -m benchmarks compare OLD.json NEW.json         # what has become better or worse
python -m benchmarks plan                              # what planning costs as graphs grow
python -m benchmarks scale                             # up to 10,000 executors, simulated
python -m benchmarks overhead                          # what a task costs beyond itself
python -m benchmarks chaos                             # what faults cost
python -m benchmarks run --help                        # likewise for the others
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # Before numpy is imported, here and in the workers: one thread for BLAS, everywhere.
    for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[_name] = "1"

import argparse
from collections.abc import Sequence

from benchmarks import chaos, compare, copies, fanout, model, overhead, planning, running, scale
from benchmarks.arguments import UsageError

COMMANDS = (running, compare, planning, scale, overhead, chaos, fanout, copies, model)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands)
    options = parser.parse_args(arguments)
    try:
        code: int = options.call(options)
    except UsageError as error:
        print(f"{parser.prog} {options.command}: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
