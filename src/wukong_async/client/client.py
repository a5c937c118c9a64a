"""The client: asyncio-native, with a synchronous face that is one thread and one loop.

Owns a `Scheduler` and, if it was given none, a `LocalCluster`. Everything asynchronous happens on
one loop: the caller's after `async with`, one of its own after `with` or `start()`.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, Protocol, Self, TypeVar

from wukong_async import graph as graphs
from wukong_async.client import defaults
from wukong_async.client.job import Job, Verb
from wukong_async.config import Settings
from wukong_async.errors import ClientStateError, ConfigError
from wukong_async.local import LocalCluster
from wukong_async.loops import LoopThread, run_on
from wukong_async.scheduler import AttachedJob, JobSummary, Options, Scheduler

T = TypeVar("T")

HISTORY = 100
"""Finished jobs whose summary is kept."""


class Cluster(Protocol):
    """Something that runs executors: what it needs of a client are settings."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What to set, by name."""
        ...


class WukongClient:
    """Computes Dask graphs on executors that schedule themselves.

    ::

        async with WukongClient() as client:
            result = await client.compute(x)

        with WukongClient() as client:
            x.compute()                          # the default scheduler inside the block
            x.compute(scheduler=client.get)
            client.compute(x)                    # blocks, as nothing here can be awaited

    Parameters
    ----------
    cluster
        What runs the executors, such as a `LocalCluster`. One that is not running is started, and
        closed with the client. Default: what the settings name; if they name no store, a
        `LocalCluster`.
    set_as_default
        Make this client Dask's default scheduler while it is entered. Default: in synchronous use
        only. Where a loop runs, whatever Dask computes by itself (`set_index` looks for its
        divisions) would block that loop, and is better left to Dask's own threads.
    **settings
        Settings of `wukong.*`, over those of `dask.config` and of the cluster.

    Raises
    ------
    ConfigError
        On construction: an unknown or ill-typed setting.
    StoreUnreachable, FunctionNotFound, InvocationError, ClusterError
        On entering.
    """

    def __init__(
        self,
        cluster: Cluster | None = None,
        *,
        set_as_default: bool | None = None,
        **settings: Any,
    ) -> None:
        self._overrides = settings
        configured = Settings.load(settings)
        self._own_cluster: LocalCluster | None = None  # Started by us, so ours to close.
        if cluster is None and not configured.redis_endpoints:
            if configured.endpoint_url is not None:
                raise ConfigError(
                    "wukong.endpoint_url is set but wukong.redis_endpoints is not: name the store"
                    " as well, or neither, to start a LocalCluster."
                )
            cluster = LocalCluster(
                function_name=configured.function_name,
                use_local_proxy=configured.use_local_proxy,
            )
            self._overrides = {**settings, "use_local_proxy": False}
        elif settings.get("use_local_proxy"):
            raise ConfigError(
                "wukong.use_local_proxy concerns the cluster: LocalCluster(use_local_proxy=True)."
            )
        self._cluster = cluster
        self._set_as_default = set_as_default
        self._scheduler: Scheduler | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: LoopThread | None = None
        self._closed = False
        self._synchronous = False  # Stays as it was when the client is closed.
        self._starting = threading.RLock()
        self.history: deque[JobSummary] = deque(maxlen=HISTORY)
        """What the last jobs took, the newest last."""

    def __repr__(self) -> str:
        if self._scheduler is None:
            return f"<WukongClient {'closed' if self._closed else 'not started'}>"
        return f"<WukongClient {'async' if self._thread is None else 'sync'} {self._scheduler!r}>"

    # Life -------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._claim()
        if isinstance(self._cluster, LocalCluster) and not self._cluster.running:
            self._own_cluster = await self._cluster.__aenter__()
        try:
            self._scheduler = await self._make_scheduler().__aenter__()
        except BaseException:
            await self._close_own_cluster()
            raise
        self._loop = asyncio.get_running_loop()
        self._become_default()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> Self:
        """Start for synchronous use, as entering a `with` block does."""
        self._forbid_loop("with WukongClient()", "async with WukongClient()")
        with self._starting:
            self._claim()
            if isinstance(self._cluster, LocalCluster) and not self._cluster.running:
                self._own_cluster = self._cluster.start()
            self._synchronous = True
            thread = self._thread = LoopThread("wukong-client")
            self._loop = thread.loop
            atexit.register(self.close)
            try:
                self._scheduler = thread.run(self._make_scheduler().__aenter__())
            except BaseException:
                self.close()
                raise
            self._become_default()
        return self

    def close(self) -> None:
        """End synchronous use. May be called twice."""
        thread, self._thread = self._thread, None
        self._closed = True
        if thread is None:
            return
        defaults.leave(self)
        atexit.unregister(self.close)
        if not thread.alive:
            return  # A forked process; the client is its parent's.
        try:
            thread.run(self._close_scheduler())
        finally:
            thread.stop()
            # From this thread: at the end of the interpreter no other one can be had.
            cluster, self._own_cluster = self._own_cluster, None
            if cluster is not None:
                cluster.close()

    async def aclose(self) -> None:
        """End asynchronous use, as leaving an `async with` block does."""
        self._closed = True
        defaults.leave(self)
        try:
            await self._close_scheduler()
        finally:
            await self._close_own_cluster()

    async def _close_scheduler(self) -> None:
        scheduler, self._scheduler = self._scheduler, None
        if scheduler is not None:
            await scheduler.__aexit__(None, None, None)

    async def _close_own_cluster(self) -> None:
        cluster, self._own_cluster = self._own_cluster, None
        if cluster is not None:
            await cluster.__aexit__(None, None, None)

    def _claim(self) -> None:
        if self._closed:
            raise ClientStateError("This client is closed: make a new one.")
        if self._scheduler is not None or self._thread is not None:
            raise ClientStateError("This client is in use already; it cannot be entered twice.")

    def _make_scheduler(self) -> Scheduler:
        cluster = self._cluster.settings if self._cluster is not None else {}
        return Scheduler(Settings.load({**cluster, **self._overrides}))

    def _become_default(self) -> None:
        wanted = self._set_as_default
        if wanted is None:
            wanted = self._thread is not None
        defaults.enter(
            self,
            {"scheduler": self.get} if wanted else {},
            # Dask's own choice is a directory of this machine, which executors do not share.
            unless_set={"dataframe.shuffle.method": "tasks"},
        )

    # Verbs ------------------------------------------------------------------------------------

    def compute(
        self,
        *args: Any,
        keys: Any = None,
        optimize_graph: bool = True,
        retries: int | None = None,
        timeout: float | str | None = None,
        job_timeout: float | str | None = None,
    ) -> Any:
        """Compute Dask collections, or keys of a graph.

        Parameters
        ----------
        *args
            Collections, or containers of collections; or one graph (mapping, `HighLevelGraph` or
            expression) and, optionally, keys as the second argument.
        keys
            A key or a nested list of keys of the graph. Default: a `{key: value}` dictionary of
            the tasks that no other task needs.
        optimize_graph
            Whether Dask may optimise the collections first.
        retries
            How often a task that raises, or takes too long, is run again.
        timeout
            Seconds, or Dask's notation, that each try of a task may take. This and `retries` hold
            for tasks that `dask.annotate(retries=…, timeout=…)` says nothing of.
        job_timeout
            How long the job may run, in seconds or in Dask's notation; default: the setting.

        Returns
        -------
        For one collection its value, for several a tuple, for a graph what `dask.get` returns. An
        awaitable of it in asynchronous use.

        Raises
        ------
        The exception of a task that failed, whatever its type, with the remote traceback as its
        cause; else a `wukong_async.errors.WukongError`.
        """
        options = Options(graphs.annotations_of_call(retries, timeout), job_timeout)
        return self._do(self._compute(args, keys, optimize_graph, options))

    def get(
        self,
        dsk: object,
        keys: Any,
        *,
        retries: int | None = None,
        timeout: float | str | None = None,
        job_timeout: float | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """A Dask scheduler: `x.compute(scheduler=client.get)`. Blocks, in any kind of use.

        The options `retries`, `timeout` and `job_timeout` are those of `compute`.

        Raises
        ------
        ClientStateError
            When called on the client's own loop, which it would block.
        TypeError
            For options that are not understood.
        """
        ignored = {"num_workers", "pool", "chunksize"}  # They say how to use this machine.
        if unknown := sorted(set(kwargs) - ignored):
            raise TypeError(f"WukongClient.get does not understand the option {unknown[0]!r}.")
        options = Options(graphs.annotations_of_call(retries, timeout), job_timeout)
        with self._starting:
            if self._scheduler is None and not self._closed and self._thread is None:
                self.start()
        self._forbid_loop(
            "client.get, x.compute() or dask.compute(x)",
            "await client.compute(x)` of an `async with WukongClient()",
        )
        return self._block(self._get(dsk, keys, options))

    def jobs(self) -> tuple[str, ...]:
        """The ids of the jobs that this client runs now; `history` has those of finished ones."""
        return self._active().jobs

    def attach(self, job_id: str) -> Job:
        """A job that another client has started, in this process or in another one.

        It has to be in one of this client's stores. As long as its own client lives, that one
        deletes it when it has the results; else they are kept for `wukong.result_ttl`.
        """
        if not isinstance(job_id, str):
            raise TypeError(f"A job's id is a str, as in client.jobs(), not {job_id!r}.")
        return Job(job_id, lambda name, verb: self._do(self._about(name, verb)))

    async def _compute(
        self,
        args: tuple[Any, ...],
        keys: Any,
        optimize_graph: bool,
        options: Options,
    ) -> Any:
        self._check_loop()
        if not args:
            raise TypeError("compute needs a collection or a graph.")
        if keys is None and len(args) == 2 and graphs.are_keys_of(args[1], args[0]):
            keys, args = args[1], args[:1]
        if keys is not None and len(args) == 1 and graphs.is_graph(args[0]):
            # Nothing is looked for in the graph: that takes longer than planning, and would use up
            # the iterators in it.
            return await self._get(args[0], keys, options)

        def request() -> graphs.Request | None:
            found = graphs.request(args, optimize_graph)
            if found is not None and keys is not None:
                raise TypeError("keys= goes with a graph, not with collections.")
            return found

        values = await self._run(request, options)
        if values is not None:  # A tuple, with an item for each argument.
            return values if len(args) > 1 else values[0]
        if not graphs.is_graph(args[0]):
            return args if len(args) > 1 else args[0]
        if len(args) > 1:
            raise TypeError("compute takes one graph, and keys once.")
        return await self._run(partial(graphs.request_of_sinks, args[0]), options)

    async def _get(self, dsk: object, keys: Any, options: Options) -> Any:
        return await self._run(lambda: graphs.Request(dsk, keys), options)

    async def _run(self, make: Callable[[], graphs.Request | None], options: Options) -> Any:
        """What is requested; None if nothing is."""
        made = await self._active().run(make, options)
        if made is None:
            return None
        values, summary = made
        self.history.append(summary)
        return values

    async def _about(self, job_id: str, verb: Verb) -> Any:
        self._check_loop()
        scheduler = self._active()
        return await scheduler.supervise(verb(AttachedJob(scheduler, job_id)))

    # Two faces --------------------------------------------------------------------------------

    def _active(self) -> Scheduler:
        if self._scheduler is None:
            if self._closed:
                raise ClientStateError("This client is closed: make a new one.")
            raise ClientStateError(
                "This client is not started: use `async with`, `with` or start()."
            )
        return self._scheduler

    def _check_loop(self) -> None:
        if self._loop not in {None, asyncio.get_running_loop()}:
            raise ClientStateError(
                "This client belongs to another event loop: enter one in each loop that computes."
            )

    def _do(self, work: Coroutine[Any, Any, T]) -> Any:
        """The coroutine in asynchronous use, its result in synchronous use."""
        if self._synchronous:
            return self._block(work)
        return work

    def _block(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            self._active()
        except ClientStateError:
            work.close()
            raise
        assert self._loop is not None
        try:
            return run_on(self._loop, work)
        except concurrent.futures.CancelledError:
            if not self._closed:
                raise
            raise ClientStateError("The client was closed while it computed.") from None

    def _forbid_loop(self, used: str, instead: str) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return
        raise ClientStateError(
            f"{used} blocks, and an event loop is running in this thread: use `{instead}`."
        )
