"""One sandbox: a process that runs AWS's runtime client around the function's handler.

Owns the process, its output and its clock; does not know what is in a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping

import psutil

MOST_LOG = 256 * 1024
"""Bytes of output kept of one request: CloudWatch's limit for one event."""
READ = 64 * 1024
CHILDREN_PAUSE = 1.0
"""Seconds between two looks for what a busy sandbox has started: that reads all of /proc."""


class Sandbox:
    """A process, from its start to its end. Replaced, not restarted."""

    def __init__(self, number: int, environment: Mapping[str, str], handler: str) -> None:
        self.number = number
        self.invoked = False
        """Whether it has ever asked for work: its initialisation succeeded."""
        self.init_error: bytes | None = None
        """What the runtime client reported about a failed initialisation."""
        self.killed_for: str | None = None
        """Why the endpoint has killed it, in Lambda's words."""
        self.started = time.monotonic()
        self.max_rss = 0
        """Bytes, of the running request."""
        self._rss = 0
        self._family: list[psutil.Process] = []
        """Its descendants when it was last looked for them, whatever group they are in."""
        self._looked = self.started
        self._environment = environment
        self._handler = handler
        self._process: asyncio.subprocess.Process | None = None
        self._ps: psutil.Process | None = None
        self._output = bytearray()
        self._dropped = 0
        self._read_fd = -1

    def __repr__(self) -> str:
        return f"<Sandbox {self.number} pid={self.pid}>"

    @property
    def pid(self) -> int:
        """The process, and its process group: it leads a session of its own."""
        return self._process.pid if self._process else -1

    async def start(self) -> None:
        """Start the process."""
        self._read_fd, write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                # -P: the working directory is on PYTHONPATH where the parent has it on its path.
                *("-P", "-m", "awslambdaric", self._handler),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=write_fd,
                stderr=write_fd,
                env=self._environment,
                start_new_session=True,
            )
        except BaseException:
            os.close(self._read_fd)
            raise
        finally:
            os.close(write_fd)
        with contextlib.suppress(psutil.NoSuchProcess):
            self._ps = psutil.Process(self._process.pid)
        asyncio.get_running_loop().add_reader(self._read_fd, self._drain)

    async def ended(self) -> int:
        """Wait for the process to end, and for the last of its output; its return code."""
        assert self._process is not None
        code = await self._process.wait()
        # Processes that a task started must not outlive the sandbox.
        self._kill_all()
        self._drain()
        asyncio.get_running_loop().remove_reader(self._read_fd)
        os.close(self._read_fd)
        self._read_fd = -1
        return code

    def kill(self, reason: str | None = None) -> None:
        """Kill the process and everything it has started."""
        self.killed_for = self.killed_for or reason
        if self._process is not None and self._process.returncode is None:
            self._look()  # Once it is dead, nobody knows whose its descendants were.
            self._kill_all()

    def output(self) -> str:
        """What was written since the last `take_output`, as far as it was read; for any thread."""
        dropped = f"[{self._dropped} bytes dropped]\n" if self._dropped else ""
        return dropped + self._output.decode("utf-8", "replace")

    def take_output(self) -> str:
        """The same, and begin anew.

        Complete once the runtime client has answered: it writes before it answers.
        """
        self._drain()
        text = self.output()
        self._output.clear()
        self._dropped = 0
        return text

    def begin(self) -> None:
        """A request begins: its maximum is its own, but never less than the process has."""
        self.max_rss = self._rss
        self._looked = time.monotonic()

    def measure(self, *, children: bool = False) -> int:
        """The resident set size now, in bytes; its maximum is kept in `max_rss`.

        With `children`, and not more often than they may be looked for, what its descendants
        have for themselves is added.
        """
        if self._ps is None:
            return 0
        try:
            self._rss = size = int(self._ps.memory_info().rss)
        except psutil.Error:
            return 0
        if children and time.monotonic() - self._looked >= CHILDREN_PAUSE:
            self._look()
            for process in self._family:
                with contextlib.suppress(psutil.Error):
                    size += int(process.memory_full_info().uss)
        self.max_rss = max(self.max_rss, size)
        return size

    def _look(self) -> None:
        self._looked = time.monotonic()
        with contextlib.suppress(psutil.Error):
            self._family = self._ps.children(recursive=True) if self._ps else []

    def _kill_all(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        for process in self._family:
            with contextlib.suppress(psutil.Error):  # It is gone, even if its number is not.
                process.kill()

    def _drain(self) -> None:
        while self._read_fd >= 0:
            try:
                data = os.read(self._read_fd, READ)
            except BlockingIOError:
                return
            if not data:
                asyncio.get_running_loop().remove_reader(self._read_fd)
                return
            self._output += data
            if len(self._output) > MOST_LOG:
                self._dropped += len(self._output) - MOST_LOG
                del self._output[:-MOST_LOG]
