"""The model of the simulation against the Lua scripts on a real server.

Whole simulated jobs, faults included, are run on both at once; every answer has to be the same.
The scripts are the real ones but for the clock, which is the simulation's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import random
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from functools import partial
from threading import Thread
from typing import Any, Self, TypeVar

import pytest

from tests.integration.jobs import new_job
from tests.simulation.model import Arrival, ModelStore
from tests.simulation.world import World
from wukong_async import wire
from wukong_async.local.valkey import Valkey
from wukong_async.protocol import Begun, JobState, Outcome, Reply, Status, Watch
from wukong_async.store import Connections, JobStore, NewJob, lapsed_jobs, place_of, scripts
from wukong_async.store.job import REGISTRY
from wukong_async.store.scripts import Script

T = TypeVar("T")

SEEDS = 150
EPOCH = round(time.time() * 1000)
"""The simulation's time 0 on the server, which deletes what has expired by its own clock."""
CLOCK = "test:clock"
SERVER_TIME = """\
  local t = call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
"""


class Server:
    """A server and a loop to talk to it on, from a thread with another loop. A context manager."""

    def __init__(self, url: str) -> None:
        self.connections = Connections([url], timeout=5)
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        self.ask(self.connections.__aenter__())
        self.ask(self.connections.check())
        return self

    def __exit__(self, *_: object) -> None:
        self.ask(self.connections.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def ask(self, request: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(request, self._loop).result()


class BothStores(ModelStore):
    """The model, and the real thing beside it."""

    server: Server

    def __init__(self, now: Callable[[], float], announce: Callable[[], None]) -> None:
        super().__init__(lambda: round(now() * 1000) / 1000, announce)
        self.real = JobStore(self.server.connections, secrets.token_hex(8))

    def _same(self, model: T, request: Coroutine[Any, Any, T]) -> T:
        command = self.server.connections.command
        self.server.ask(command(0, "SET", CLOCK, EPOCH + round(self.now() * 1000)))
        real = self.server.ask(request)
        assert real == model, f"Lua says {real}, the model {model}"
        return model

    def memory(self) -> dict[str, Any]:
        command = self.server.connections.command
        keys = [key for key in self.real._metadata if not key.endswith(":open")]
        dumps = {key: self.server.ask(command(0, "DUMP", key)) for key in keys}
        return {**super().memory(), "dumps": dumps}

    def remember(self, memory: dict[str, Any]) -> None:
        dumps = memory.pop("dumps")
        super().remember(memory)
        command = self.server.connections.command
        for key, dump in dumps.items():
            if dump is None:
                self.server.ask(command(0, "DEL", key))
            else:
                self.server.ask(command(0, "RESTORE", key, 10**9, dump, "REPLACE"))

    def open(self) -> None:
        super().open()
        self.server.ask(self.real.open(10**6))

    def create(self, new: NewJob) -> Status:
        timely = dataclasses.replace(new, ttl=10**6)
        return self._same(super().create(new), self.real.create(timely))

    def begin(self, executor: str, nonce: str, request_id: str = "") -> Begun:
        return self._same(
            super().begin(executor, nonce, request_id), self.real.begin(executor, nonce, request_id)
        )

    def commit(
        self, executor: str, generation: int, nonce: str, sequence: int, body: bytes
    ) -> Reply:
        model = super().commit(executor, generation, nonce, sequence, body)
        return self._same(model, self.real.commit(executor, generation, nonce, sequence, body))

    def renew(self, executor: str, generation: int, nonce: str, last_words: bytes = b"") -> Status:
        return self._same(
            super().renew(executor, generation, nonce, last_words),
            self.real.renew(executor, generation, nonce, last_words),
        )

    def watch(self, owner: str = "", most: int = 1000) -> Watch:
        return self._same(super().watch(owner, most), self.real.watch(owner, most))

    def retire(self) -> bool:
        results = self.outcome().results.items()
        places = [place for n, value in results if (place := place_of(n, value)) is not None]
        if super().close("retire"):
            super().sweep([name for place in places for name in place.names])
        return self._same(super().retire(), self.real.retire())

    def lose(self, *, metadata: bool, data: bool) -> None:
        """Everything, since there is one server."""
        super().lose(metadata=True, data=True)
        command = self.server.connections.command
        keys = self.server.ask(command(0, "KEYS", self.real._key("*")))
        if keys:
            self.server.ask(command(0, "DEL", *keys))
        self.server.ask(command(0, "ZREM", REGISTRY, self.real.job_id))

    def lapsed(self) -> bool:
        async def ask() -> bool:
            return self.real.job_id in await lapsed_jobs(self.server.connections, 0)

        return self._same(super().lapsed(), ask())

    def cancel(self, state: JobState, error: bytes) -> JobState | None:
        return self._same(super().cancel(state, error), self.real.cancel(state, error))

    def outcome(self) -> Outcome:
        return self._same(super().outcome(), self.real.outcome())

    def notes(self, names: Iterable[str]) -> list[bytes | None]:
        return self._same(super().notes(names), self.real.notes(*names))

    def close(self, why: str) -> bool:
        """Left to `forget` and `retire`: all parts are one coroutine in the real store."""
        return not self._runs

    def sweep(self, stays: Iterable[str] = ()) -> None:
        """Left to them as well."""

    def forget(self) -> bool:
        if super().close("finish"):
            super().sweep()
        return self._same(super().forget(), self.real.finish())

    def put(self, objects: Mapping[str, bytes]) -> Status:
        if not objects:
            return super().put(objects)
        segments = [(name, [value]) for name, value in objects.items()]
        return self._same(super().put(objects), self.real.put(segments, 10**6))

    def get(self, names: Iterable[str]) -> list[bytes | None]:
        names = list(names)
        return self._same(super().get(names), self.real.get(names, [1] * len(names)))

    def delete(self, outputs: Iterable[tuple[int, str]]) -> None:
        outputs = list(outputs)
        super().delete(outputs)
        self.server.ask(self.real.delete(outputs))

    def read_values(self, tasks: Sequence[int]) -> dict[int, bytes | None]:
        model = super().read_values(tasks)
        real = self._same(super().resolve(model), self.real.read(tasks))
        assert set(real) == set(tasks)
        return model


@pytest.fixture
def server(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name, script in list(vars(scripts).items()):
        if isinstance(script, Script) and SERVER_TIME in script.source:
            simulated = f"  return tonumber(call('GET', '{CLOCK}'))\n"
            source = script.source.replace(SERVER_TIME, simulated)
            sha = hashlib.sha1(source.encode()).hexdigest()
            monkeypatch.setattr(scripts, name, Script(script.name, source, sha))
    patched = tuple(s for s in vars(scripts).values() if isinstance(s, Script))
    monkeypatch.setattr(scripts, "ALL", patched)
    with Server(valkey.url) as server:
        yield server
        keys = server.ask(server.connections.command(0, "KEYS", "*"))
        server.ask(server.connections.command(0, "FLUSHALL"))
    assert keys == [CLOCK.encode()]


def _run_all(store: type[ModelStore]) -> None:
    for seed in range(SEEDS):
        World(seed, store_class=store).run()


def test_lua_and_the_model_agree(server: Server) -> None:
    store = type("Store", (BothStores,), {"server": server})
    faults = 0
    for seed in range(SEEDS):
        try:
            world = World(seed, store_class=store)
            world.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        faults += sum(world.injected.values())
    assert faults > SEEDS


def test_both_agree_on_owners_and_limits(server: Server) -> None:
    store = type("Store", (BothStores,), {"server": server})
    seen: set[object] = set()
    for seed in range(SEEDS):
        rng = random.Random(seed)
        clock = [0.0]
        both = store(partial(max, clock), lambda: None)
        both.open()
        limit = rng.choice((None, 3.0, 10.0))
        both.create(
            new_job(lease=1.0, grace=1.5, owner="a", timeout=limit, attempts=rng.choice((2, 100)))
        )
        for _ in range(30):
            clock[0] += rng.choice((0.0, 0.1, 1.0, 1.999, 2.0, 12.0))
            match rng.choice(("watch", "begin", "renew", "lapsed", "cancel", "retire")):
                case "watch":
                    watch = both.watch(rng.choice("abc") * rng.choice((0, 1, 1)))
                    seen.add(("watch", watch.state, watch.owned))
                case "begin":
                    both.begin("0", rng.choice("pqr"))
                case "renew":
                    seen.add(both.renew("0", rng.choice((1, 2)), rng.choice("pqr")))
                case "lapsed":
                    seen.add(("lapsed", both.lapsed()))
                case "cancel" if rng.random() < 0.1:
                    both.cancel(JobState.CANCELLED, b"")
                case "retire":
                    seen.add(("retire", both.retire()))
            error = both.outcome().error
            seen.add(wire.unpack(error)[0] if error else b"")
        both.cancel(JobState.CANCELLED, b"")
        both.forget()
        assert both.is_empty()
    states = (JobState.RUNNING, JobState.FAILED, JobState.CANCELLED)
    assert seen >= {("watch", state, owned) for state in states for owned in (True, False)}
    assert seen >= {("retire", True), ("retire", False), ("lapsed", True), ("lapsed", False)}
    assert seen >= {Status.OK, Status.STOP, b"lost", b"unstarted", b"overtime"}


def test_a_difference_is_noticed(server: Server) -> None:
    class Wrong(BothStores):
        def _arrive(self, arrivals: Iterable[Arrival]) -> list[int]:
            return super()._arrive(list(arrivals)[::-1])

    store = type("Store", (Wrong,), {"server": server})
    with pytest.raises(AssertionError, match="Lua says"):
        _run_all(store)
    server.ask(server.connections.command(0, "FLUSHALL"))
    server.ask(server.connections.command(0, "SET", CLOCK, 0))
