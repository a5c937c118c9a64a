"""What an executor holds in memory: decoded plan blocks, literals, and the values of tasks."""

from __future__ import annotations

import os
import resource
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

from wukong_async.blocks import Block, Program

MB = 1024 * 1024
LITERAL_BYTES = 64 * MB
"""Literals kept for the next task that reads them: models and tables are read by many."""


def resident_mb() -> int:
    """Memory that this process has now; where that is not known, the most that it has had."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most // (MB if sys.platform == "darwin" else 1024)
    return pages * resource.getpagesize() // MB


def limit_mb() -> int:
    """Memory that the function may have; 0 if that is not known."""
    return int(os.environ.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "0"))


class PlanCache:
    """The plan of one job, as far as this sandbox has read it. Immutable data only."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.programs: dict[int, Program] = {}
        self._blocks: dict[int, Block] = {}
        self._literals: OrderedDict[int, tuple[int, Any]] = OrderedDict()
        self._literal_bytes = 0

    def block(self, index: int) -> Block | None:
        """A block that was read before."""
        return self._blocks.get(index)

    def add_block(self, index: int, block: Block) -> None:
        """Remember a block."""
        self._blocks[index] = block
        self.programs.update(block.programs)

    def literal(self, number: int) -> tuple[int, Any] | None:
        """A literal that was read before, with its size in bytes."""
        found = self._literals.get(number)
        if found is not None:
            self._literals.move_to_end(number)
        return found

    def add_literal(self, number: int, size: int, value: Any) -> None:
        """Remember a literal; the least recently used ones make room."""
        self._literals[number] = (size, value)
        self._literal_bytes += size
        while self._literal_bytes > LITERAL_BYTES and len(self._literals) > 1:
            _, (dropped, _) = self._literals.popitem(last=False)
            self._literal_bytes -= dropped
