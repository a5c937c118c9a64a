"""`LocalCluster`: what a user starts when there is no AWS account."""

from __future__ import annotations

import asyncio
import atexit
import os
import re
import secrets
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from wukong_async.config import Settings
from wukong_async.cores import blas_environment, usable_cores
from wukong_async.errors import ClusterError, ConfigError
from wukong_async.invoker import LOOPBACK_KEY
from wukong_async.local.endpoint import HOST, Loopback
from wukong_async.local.faults import Faults
from wukong_async.local.function import EventInvokeConfig, check_int, check_seconds
from wukong_async.local.pool import Counters, FunctionConfiguration, Served
from wukong_async.local.valkey import Valkey
from wukong_async.loops import LoopThread
from wukong_async.proxy import ProxyServer

HANDLER = "lambda_handler.handler"
REGION = "us-east-1"
START_TIMEOUT = 60.0
"""Seconds for all sandboxes to initialise; they take about one."""
FUNCTION_NAME = re.compile(r"[\w-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ClusterStats:
    """What the loopback Lambda and Valkey have counted since their start."""

    invocations: int
    deliveries: int
    errors: int
    timeouts: int
    out_of_memory: int
    throttles: int
    discarded: int
    billed_ms: int
    sandboxes: int
    idle: int
    """Sandboxes that are warm and wait for work now."""
    store_calls: int
    """Commands that Valkey has run, those inside scripts included."""
    store_bytes_in: int
    store_bytes_out: int
    store_bytes: int
    """Memory that Valkey uses now."""
    store_bytes_peak: int
    faults: Mapping[str, int]
    """Faults injected, by kind: those of the `Faults` that the cluster was given."""


def python_path() -> str:
    """The PYTHONPATH of a child that is to import what this process can."""
    return os.pathsep.join(str(Path.cwd()) if entry == "" else entry for entry in sys.path)


class LocalCluster:
    """A private Valkey and a loopback Lambda with `n_workers` sandboxes, on this machine.

    An async context manager and a plain one; or `start` and `close` it. Everything it has started
    ends with it, whether it is closed, interrupted, or its process is killed.

    Parameters
    ----------
    n_workers
        Sandboxes, each with one executor at a time; default: one per core.
    threads_per_executor
        Tasks that run at once in a sandbox; default: the setting of that name, or else 1.
    timeout
        Seconds that one invocation may take.
    memory_size
        MB of memory that a sandbox may use.
    event_invoke_config
        Retries and maximum age of asynchronous events.
    function_name
        The function's name.
    environment
        Variables for the sandboxes, on top of this process's.
    use_local_proxy
        Start a proxy in the cluster's own loop; default: the setting of that name.
    faults
        How to misbehave, to test with; default: not at all.

    Raises
    ------
    ClusterError
        On entering: when Valkey or a sandbox does not start, with what it has written.
    """

    def __init__(
        self,
        n_workers: int | None = None,
        *,
        threads_per_executor: int | None = None,
        timeout: float = 900.0,
        memory_size: int = 3008,
        event_invoke_config: EventInvokeConfig | None = None,
        function_name: str = "wukong-executor",
        environment: Mapping[str, str] | None = None,
        use_local_proxy: bool | None = None,
        faults: Faults | None = None,
    ) -> None:
        if n_workers is None:
            n_workers = usable_cores()
        check_int("n_workers", n_workers, 1)
        if threads_per_executor is None:
            threads_per_executor = Settings.load().threads_per_executor or 1
        check_int("threads_per_executor", threads_per_executor, 1)
        check_seconds("timeout", timeout)
        check_int("memory_size", memory_size, 1)
        if not isinstance(event_invoke_config, EventInvokeConfig | None):
            raise ConfigError(
                f"event_invoke_config must be an EventInvokeConfig, not {event_invoke_config!r}."
            )
        if not isinstance(faults, Faults | None):
            raise ConfigError(f"faults must be a Faults, not {faults!r}.")
        _check_name(function_name)
        _check_environment(environment)
        self.n_workers = n_workers
        self.threads_per_executor = threads_per_executor
        self._timeout = timeout
        self._memory_size = memory_size
        self._config = event_invoke_config or EventInvokeConfig()
        self._faults = faults or Faults()
        self._function_name = function_name
        self._environment = dict(environment or {})
        self._use_local_proxy = use_local_proxy
        self._listening: socket.socket | None = None
        self._proxy: ProxyServer | None = None
        self._proxy_secret = secrets.token_hex(16)
        self._thread: LoopThread | None = None
        self._up = False
        self._starting = threading.RLock()  # Several clients may enter it at once.
        self._valkey: Valkey | None = None
        self._loopback: Loopback | None = None

    def __repr__(self) -> str:
        state = self._loopback.url if self._loopback else "not running"
        return f"<LocalCluster {state} n_workers={self.n_workers}>"

    # Life -------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether it is started and not closed."""
        return self._up

    def start(self) -> Self:
        """Start and wait until every sandbox is warm. Does nothing if it runs already."""
        with self._starting:
            if self._up:
                return self
            self._thread = LoopThread("wukong-local-cluster")
            atexit.register(self.close)
            try:
                self._thread.run(self._start())
            except BaseException:
                self.close()
                raise
            self._up = True
            return self

    def close(self) -> None:
        """Stop everything. May be called twice."""
        self._up = False
        thread, self._thread = self._thread, None
        if thread is None:
            return
        atexit.unregister(self.close)
        if not thread.alive:
            return  # A forked process; the cluster is its parent's.
        try:
            thread.run(self._stop())
        finally:
            thread.stop()
            if self._valkey is not None:
                self._valkey.stop()
                self._valkey = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        starting = asyncio.ensure_future(asyncio.to_thread(self.start))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The thread does not hear of it: wait for it, and undo what it did.
            await asyncio.wait([starting])
            starting.exception()
            self.close()
            raise

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    async def _start(self) -> None:
        if self._wants_proxy():
            # Sandboxes are told of the proxy when they start, and it starts after them.
            self._listening = socket.create_server((HOST, 0))
        self._valkey = valkey = Valkey()
        configuration = FunctionConfiguration(
            function_name=self._function_name,
            region=REGION,
            handler=HANDLER,
            environment=self._sandbox_environment(valkey.url),
            concurrency=self.n_workers,
            timeout=self._timeout,
            memory_size=self._memory_size,
            event_invoke_config=self._config,
            faults=self._faults,
        )
        self._loopback = await Loopback(configuration, valkey).__aenter__()
        await valkey.started()
        try:
            async with asyncio.timeout(START_TIMEOUT):
                await self._loopback.pool.ready()
        except TimeoutError:
            raise ClusterError(
                f"The sandboxes did not initialise within {START_TIMEOUT:.0f} s:\n"
                f"{self._loopback.pool.log()}"
            ) from None

        await self._start_proxy()

    def _wants_proxy(self) -> bool:
        wanted = self._use_local_proxy
        return Settings.load().use_local_proxy if wanted is None else wanted

    async def _start_proxy(self) -> None:
        if self._listening is not None:
            settings = Settings.load(self.settings)
            port = self._listening.getsockname()[1]
            proxy = ProxyServer(settings, HOST, port, listening=self._listening)
            self._proxy = await proxy.__aenter__()

    async def _stop(self) -> None:
        proxy, self._proxy = self._proxy, None
        if proxy is not None:
            await proxy.__aexit__(None, None, None)
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.close()
        loopback, self._loopback = self._loopback, None
        if loopback is not None:
            await loopback.__aexit__(None, None, None)

    def _proxy_settings(self) -> dict[str, Any]:
        """Never somebody else's proxy: it would send our events to its own function."""
        if self._listening is None:
            return {"use_local_proxy": False, "proxy_address": None}
        return {
            "use_local_proxy": False,
            "proxy_address": HOST,
            "proxy_port": self._listening.getsockname()[1],
            "proxy_secret": self._proxy_secret,
        }

    # What clients need ------------------------------------------------------------------------

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that make a client use this cluster.

        Raises
        ------
        ClusterError
            If it is not running.
        """
        loopback, valkey = self._running()
        return {
            "function_name": self._function_name,
            "region": REGION,
            "endpoint_url": loopback.url,
            "redis_endpoints": (valkey.url,),
            "max_concurrency": self.n_workers,
            "threads_per_executor": self.threads_per_executor,
            **self._proxy_settings(),
        }

    # What users want to know ------------------------------------------------------------------

    def stats(self) -> ClusterStats:
        """What the loopback Lambda and Valkey have counted, reading it not included.

        Raises
        ------
        ClusterError
            If it is not running, or Valkey has ended.
        """
        loopback, valkey = self._running()
        info = valkey.info()
        return ClusterStats(
            **{name: getattr(loopback.pool.counters, name) for name in Counters.__slots__},
            idle=len(loopback.pool.function.idle),
            store_calls=info["total_commands_processed"],
            store_bytes_in=info["total_net_input_bytes"],
            store_bytes_out=info["total_net_output_bytes"],
            store_bytes=info["used_memory"],
            store_bytes_peak=info["used_memory_peak"],
            faults=dict(loopback.pool.injector.injected),
        )

    def log(self, request_id: str | None = None) -> str:
        """What a request has written, as CloudWatch would show it; of all requests by default."""
        return self._running()[0].pool.log(request_id)

    def requests(self) -> tuple[Served, ...]:
        """When each sandbox was busy with which request: the last 10,000 deliveries, in order."""
        return self._running()[0].pool.served()

    def sandbox_pids(self) -> list[int]:
        """The sandboxes' processes."""
        sandboxes = self._running()[0].pool.sandboxes
        return [sandboxes[number].pid for number in sorted(sandboxes)]

    # ------------------------------------------------------------------------------------------

    def _running(self) -> tuple[Loopback, Valkey]:
        if self._loopback is None or self._valkey is None:
            raise ClusterError("The local cluster is not running: enter or start() it first.")
        return self._loopback, self._valkey

    def _sandbox_environment(self, redis_url: str) -> dict[str, str]:
        # Said even where they are the defaults: the environment may say otherwise.
        settings = {
            "redis_endpoints": [redis_url],
            "preload": True,
            "threads_per_executor": self.threads_per_executor,
            **self._proxy_settings(),
        }
        cores = usable_cores() // self.n_workers
        # A sandbox imports what its parent can: the user's own modules included.
        return {
            **os.environ,
            **blas_environment(self.threads_per_executor, cores, os.environ),
            "PYTHONPATH": python_path(),
            "AWS_ACCESS_KEY_ID": LOOPBACK_KEY,
            "AWS_SECRET_ACCESS_KEY": LOOPBACK_KEY,
            **{f"DASK_WUKONG__{name.upper()}": repr(value) for name, value in settings.items()},
            **self._environment,
        }


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise ConfigError(
            f"function_name must be 1 to 64 letters, digits, hyphens or underscores, not {name!r}."
        )


def _check_environment(environment: object) -> None:
    if environment is None:
        return
    if not isinstance(environment, Mapping):
        raise ConfigError(f"environment must map str to str; it is a {type(environment).__name__}.")
    for name, value in environment.items():
        if not isinstance(name, str) or not re.fullmatch(r"[^=\0]+", name):
            raise ConfigError(f"environment: {name!r} is not the name of a variable.")
        if not isinstance(value, str) or "\0" in value:
            # Not shown: it may be a secret.
            raise ConfigError(
                f"environment: the value of {name!r} must be a str without a NUL; it is a"
                f" {type(value).__name__}."
            )
