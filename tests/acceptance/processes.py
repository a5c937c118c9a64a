"""Clients in processes of their own, and what is left of them."""

from __future__ import annotations

import asyncio
import os
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import redis

from tests.conftest import SPREAD
from tests.paths import ROOT
from wukong_async import LocalCluster
from wukong_async.config import Settings
from wukong_async.proxy import ProxyServer
from wukong_async.store import Connections, JobStore
from wukong_async.store.job import REGISTRY

CLIENT = """
import sys
from dask import delayed
from tests.acceptance.functions import *
from wukong_async import WukongClient

touched, awaited = sys.argv[1:]
with WukongClient() as client:
"""
QUICK: dict[str, Any] = {"lease": 0.5, "grace": 0.5, "max_attempts": 10, **SPREAD}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def client_process(
    cluster: LocalCluster, tmp_path: Path, job: str, *, running: int = 2, **settings: object
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A client of the cluster with a job, of which `running` tasks have said that they run."""
    program = tmp_path / "client.py"
    program.write_text(CLIENT + textwrap.indent(job, "    "))
    made = Settings.load({**cluster.settings, **QUICK, **settings})
    environment = {**os.environ, **made.environment(), "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    arguments = [str(program), str(tmp_path / "touched"), str(tmp_path / "awaited")]
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, env=environment)
    try:
        await until(lambda: lines(tmp_path / "touched") >= running)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def jobs_of(cluster: LocalCluster) -> list[str]:
    (url,) = cluster.settings["redis_endpoints"]
    with redis.Redis.from_url(url) as connection:
        return [job_id.decode() for job_id in connection.zrange(REGISTRY, 0, -1)]


def owner_of(cluster: LocalCluster, job_id: str) -> str:
    (url,) = cluster.settings["redis_endpoints"]
    with redis.Redis.from_url(url) as connection:
        return str(connection.hget(f"wukong:{{{job_id}}}:job", "owner"))


def proxy(cluster: LocalCluster) -> ProxyServer:
    settings = Settings.load({**cluster.settings, "proxy_secret": "secret"})
    return ProxyServer(settings, "127.0.0.1", 0, look_every=0.1)


@asynccontextmanager
async def store_of(cluster: LocalCluster, job_id: str) -> AsyncIterator[JobStore]:
    """A job, whose keys are deleted in the end."""
    async with Connections(cluster.settings["redis_endpoints"], 5) as connections:
        store = JobStore(connections, job_id)
        yield store
        await store.finish()
