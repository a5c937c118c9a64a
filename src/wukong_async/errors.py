"""Every error that this package raises on purpose.

The tree::

    WukongError
    ├── ConfigError             a setting is unknown, ill-typed or missing
    ├── GraphError              the graph cannot be planned
    │   ├── CycleError
    │   ├── MissingKeyError       a requested key is not in the graph
    │   └── MissingDependencyError
    ├── SerializationError      a task, a result or an exception does not pickle
    ├── StoreError
    │   ├── StoreUnreachable      no answer from Redis / Valkey
    │   ├── StoreFull             it has no memory left
    │   ├── BucketError           S3 refuses what is asked of it
    │   └── StoreLost             the store answers, but data of a running job is gone
    ├── InvocationError         AWS Lambda (or its loopback) refuses an invocation
    │   └── FunctionNotFound
    ├── ClusterError            an embedded cluster cannot start, or has died
    ├── ClientStateError        the client is closed, or used from the wrong place
    └── JobError                a job ended without its results
        ├── TaskError             a task raised something that cannot be rebuilt here
        ├── TaskTimeout           a task took longer than its `timeout`
        ├── ExecutorLost          executors vanished more often than `max_attempts`
        ├── VersionMismatch       client and function run different versions
        ├── JobCancelled
        ├── JobNotFound           the store knows of no such job (any more)
        ├── JobTimeout            it took longer than `job_timeout`
        └── ProtocolError         a broken promise of ours: please report it

A task that fails raises its **own** exception in the caller, whatever its type;
`RemoteTraceback` is then its `__cause__`. An error's docstring says what happened
and what to do about it; the message adds which task, setting or endpoint.
"""

from __future__ import annotations


class WukongError(Exception):
    """Something went wrong in wukong-async."""


class ConfigError(WukongError, ValueError):
    """A setting is unknown, has the wrong type, or is missing."""


class GraphError(WukongError, ValueError):
    """The graph cannot be planned."""


class CycleError(GraphError):
    """The graph has a cycle, so no order of its tasks exists."""


class MissingKeyError(GraphError, KeyError):
    """A requested key is not in the graph."""

    def __str__(self) -> str:  # KeyError would print the repr of the message.
        return str(self.args[0]) if self.args else ""


class MissingDependencyError(MissingKeyError):
    """A task depends on a key that is not in the graph."""


class SerializationError(WukongError, TypeError):
    """An object has to travel but does not pickle."""


class StoreError(WukongError):
    """The store (Redis or Valkey) failed."""


class StoreUnreachable(StoreError, ConnectionError):
    """The store does not answer."""


class StoreFull(StoreError):
    """The store has no memory left for a job's data."""


class BucketError(StoreError):
    """S3 refuses what is asked of it: the bucket does not exist, or access to it is denied."""


class StoreLost(StoreError):
    """The store answers, but the data of a running job is gone from it."""


class InvocationError(WukongError):
    """The function could not be invoked."""


class FunctionNotFound(InvocationError):
    """The function does not exist in this region and account."""


class ClusterError(WukongError):
    """An embedded cluster cannot start, or has died."""


class ClientStateError(WukongError, RuntimeError):
    """The client is closed, or is used from the wrong place."""


class JobError(WukongError):
    """A job ended without its results."""


class TaskError(JobError):
    """A task raised an exception that cannot be rebuilt in this process.

    Its type, text and traceback are in the message.
    """


class TaskTimeout(JobError, TimeoutError):
    """A task took longer than its `timeout`, as often as it was tried.

    Annotate it with a longer one, `dask.annotate(timeout=…)`, or give one to the call.
    """


class ExecutorLost(JobError):
    """Executors of a job vanished more often than `max_attempts` allows."""


class VersionMismatch(JobError):
    """The client and the function run versions that cannot work together."""


class JobCancelled(JobError):
    """The job was cancelled."""


class JobNotFound(JobError, KeyError):
    """The store knows of no such job: its results were collected, or they have expired."""

    def __str__(self) -> str:  # KeyError would print the repr of the message.
        return str(self.args[0]) if self.args else ""


class JobTimeout(JobError, TimeoutError):
    """The job took longer than its `job_timeout` allows."""


class ProtocolError(JobError):
    """A promise of wukong-async's own protocol was broken. Please report it."""


class RemoteTraceback(Exception):
    """The traceback of a task, as text, attached to its exception as `__cause__`."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'

    def __reduce__(self) -> tuple[type[RemoteTraceback], tuple[str]]:
        return RemoteTraceback, (self.text,)
