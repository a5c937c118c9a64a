"""The last one to leave: runs Valkey, and ends everything when its parent is gone.

A program of its own (`python -I -S guard.py DIRECTORY COMMAND…`), standard library only, so that
it starts in milliseconds and outlives a parent that is killed. The parent holds the other end of
its standard input: lines `+PID` and `-PID` register and forget the sandboxes' process groups, and
the end of the file, which the kernel brings about whatever happens to the parent, means: kill the
registered groups and COMMAND, delete DIRECTORY, exit.

If COMMAND ends before that, the file `ended` appears in DIRECTORY. The guard stays: there are still
sandboxes to end and a directory to delete, and until then the parent can read the log.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent() -> None:
    """Have the kernel kill this process when the guard is gone: nobody guards the guard."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(directory: str, command: list[str]) -> None:
    """Run `command` until standard input ends."""
    # Ctrl-C reaches the parent, which decides; a terminal that closes ends our input.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    with open(os.path.join(directory, "valkey.log"), "wb") as log:
        try:
            server = subprocess.Popen(
                command,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 - one thread
            )
        except OSError as error:
            log.write(f"{error}\n".encode())
            server = None

    def report() -> None:
        if server is not None:
            server.wait()
        open(os.path.join(directory, "ended"), "wb").close()

    reporter = threading.Thread(target=report)
    reporter.start()
    try:
        for line in sys.stdin:
            pid = int(line[1:])
            if line.startswith("+"):
                groups.add(pid)
            else:
                groups.discard(pid)
    finally:
        for pid in groups:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        if server is not None:
            server.kill()
        reporter.join()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
