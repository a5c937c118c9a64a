"""The handle of a job that another client has started."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from wukong_async.scheduler import AttachedJob

Verb = Callable[[AttachedJob], Coroutine[Any, Any, Any]]


class Job:
    """A job to ask about, to wait for and to cancel: see `WukongClient.attach`.

    Its verbs are awaitable in asynchronous use and block in synchronous use, like the client's. All
    of them raise `JobNotFound` when the store knows of no such job (any more).
    """

    def __init__(self, job_id: str, do: Callable[[str, Verb], Any]) -> None:
        self.job_id = job_id
        self._do = do

    def __repr__(self) -> str:
        return f"<Job {self.job_id}>"

    def state(self) -> Any:
        """`"running"`, `"done"`, `"failed"` or `"cancelled"`."""
        return self._do(self.job_id, AttachedJob.state)

    def progress(self) -> Any:
        """How many tasks it has, how many have passed, and how many executors it has now."""
        return self._do(self.job_id, AttachedJob.progress)

    def result(self) -> Any:
        """Wait for its end: its results, nested like the keys that were asked for.

        Raises
        ------
        What the job has failed with, as `compute` does.
        """
        return self._do(self.job_id, AttachedJob.result)

    def cancel(self) -> Any:
        """End it, if it runs."""
        return self._do(self.job_id, AttachedJob.cancel)
