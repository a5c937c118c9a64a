"""The client, proxies, and who attaches: their real code, on a simulated store and network."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

from tests.simulation.model import ModelStore
from wukong_async import wire
from wukong_async.config import Settings
from wukong_async.errors import InvocationError, JobNotFound
from wukong_async.invocation import Invocation
from wukong_async.invoker import Invoker
from wukong_async.loops import may_send
from wukong_async.protocol import JobState, Outcome, Status, Watch
from wukong_async.proxy.keeper import keep
from wukong_async.scheduler.attached import AttachedJob
from wukong_async.scheduler.job import Job
from wukong_async.scheduler.upload import Upload
from wukong_async.store import JobStore, NewJob, payload, scripts

if TYPE_CHECKING:
    from tests.simulation.world import World

T = TypeVar("T")

LEASE = 2.0
GRACE = 2.0
TICK = 1.0
ATTEMPTS = 10_000


class Died(Exception):
    """The process is no more: whatever it still wants to do."""


@cache
def settings(groups: int, ttl: float = Settings.ttl) -> Settings:
    """Those of a client that starts so many executors at first."""
    return Settings(
        lease=LEASE, grace=GRACE, max_attempts=ATTEMPTS, max_concurrency=groups, ttl=ttl
    )


class Process:
    """What jobs are run by in a process of its own: `scheduler.job.Shared`."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.channel = name
        self.asleep_until = 0.0
        self.invoker = SimulatedInvoker(self)
        self.announcements = self
        self.task: asyncio.Task[None] | None = None
        self.knows = False
        self._changed: list[asyncio.Event] = []
        self._asked: set[asyncio.Future[Any]] = set()

    def __repr__(self) -> str:
        return f"<{self.name}>"

    # Being alive ------------------------------------------------------------------------------

    def start(self) -> None:
        """Do what it is there for."""
        self.task = self.world.loop.create_task(self._live())
        self.world.processes.append(self)

    async def _live(self) -> None:
        try:
            await self.main()
        except Died:
            pass
        except asyncio.CancelledError:
            if self.alive:
                raise

    async def main(self) -> None:
        """What it is there for."""
        raise NotImplementedError

    @property
    def ended(self) -> bool:
        """Whether it has done all that it is there for."""
        return self.alive and self.task is not None and self.task.done()

    def die(self) -> None:
        """From now on, nothing that it says is heard."""
        self.alive = False
        for asked in self._asked:
            if not asked.done():
                asked.set_exception(Died())
        if self.task is not None:
            self.task.cancel()

    def when_awake(self, event: Callable[[], None]) -> None:
        """Something reaches this process, which may be suspended for a while."""
        world = self.world
        if world.happens("suspend"):
            self.asleep_until = world.time + world.a_while()
        if self.asleep_until > world.time:
            world.after(self.asleep_until - world.time, event)
        else:
            event()

    # Shared -----------------------------------------------------------------------------------

    def store(self, job_id: str) -> JobStore:
        return SimulatedStore(self, job_id)

    @contextlib.contextmanager
    def expect(self, job_id: str) -> Iterator[asyncio.Event]:
        changed = asyncio.Event()
        self._changed.append(changed)
        try:
            yield changed
        finally:
            self._changed.remove(changed)

    def hear(self) -> None:
        """An announcement arrives."""
        for changed in self._changed:
            changed.set()

    async def fire(self, events: Sequence[bytes]) -> None:
        await self.invoker.invoke_all(events)

    async def in_thread(self, work: Callable[..., T], *args: Any) -> T:
        return work(*args)

    async def ask(self, what: str, request: Callable[[], T]) -> T:
        """Ask the store, until it has answered."""
        if self.asleep_until > self.world.time:
            await asyncio.sleep(self.asleep_until - self.world.time)
        if not self.alive:
            raise Died
        answer: asyncio.Future[T] = self.world.loop.create_future()

        def answered(said: T) -> None:
            if not answer.done():
                answer.set_result(said)

        self._asked.add(answer)
        try:
            self.world.ask(self, what, request, answered, lambda: not answer.done())
            return await answer
        finally:
            self._asked.discard(answer)


class SimulatedInvoker(Invoker):
    """Sends events in the world."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.throttled = ""
        self._sent: set[tuple[str, str]] = set()

    @property
    def function_name(self) -> str:
        return "simulated"

    async def invoke_all(self, events: Iterable[bytes]) -> None:
        await may_send()
        world = self._process.world
        for event in events:
            told = Invocation.from_event(json.loads(event))
            again = (told.job_id, told.executor) in self._sent
            if again and world.happens("refuse_event"):
                raise InvocationError("The event is refused, and the others are not sent.")
            self._sent.add((told.job_id, told.executor))
            world.invoke(told.job_id, told.executor)

    async def ping(self) -> str | None:
        await asyncio.sleep(self._process.world.rng.uniform(0.01, 2 * GRACE))
        if self._process.world.happens("refuse_event"):
            raise InvocationError("The ping is refused.")
        return None

    async def log_of(self, request_id: str) -> str:
        return ""


class SimulatedStore(JobStore):
    """Says what a `JobStore` says to the model, over the world's network."""

    def __init__(self, process: Process, job_id: str) -> None:
        self.job_id = job_id
        self._process = process
        self._model: ModelStore = process.world.store_of(job_id)
        self._connections = cast(Any, [None] * process.world.servers)  # Not more than their number.
        self._shard = 0

    def __repr__(self) -> str:
        return f"<SimulatedStore {self.job_id}>"

    async def _ask_about(self, what: str, request: Callable[[], T]) -> T:
        """The same; the process then knows whether there is such a job for others."""

        def seen() -> tuple[T, bool]:
            job = self._model.job
            return request(), job is not None and job.manifest is not None

        answer, self._process.knows = await self._ask(what, seen)
        return answer

    async def _ask(self, what: str, request: Callable[[], T]) -> T:
        return await self._process.ask(what, request)

    async def open(self, ttl: float, names: Sequence[str] = ()) -> dict[str, list[float]]:
        await self._ask("open", self._model.open)
        return {}

    async def put(self, objects: Iterable[tuple[str, wire.Segments]], ttl: float) -> Status:
        joined = {name: wire.join(segments) for name, segments in objects}
        return await self._ask("put", lambda: self._model.put(joined))

    async def create(
        self, job: NewJob, objects: Sequence[tuple[str, wire.Segments]] = ()
    ) -> Status:
        # Others may come between the two.
        if objects and await self.put(objects, job.ttl) is not Status.OK:
            return Status.GONE
        # A client starts as many executors as may run; here more of them may, later.
        roomy = replace(job, slots=self._process.world.slots)
        return await self._ask("create", lambda: self._model.create(roomy))

    async def watch(self, owner: str = "", most: int = 1000) -> Watch:
        return await self._ask("watch", lambda: self._model.watch(owner, most))

    async def cancel(self, state: JobState, error: bytes) -> JobState | None:
        return await self._ask("cancel", lambda: self._model.cancel(state, error))

    async def outcome(self) -> Outcome:
        def seen() -> Outcome:
            outcome = self._model.outcome()
            if outcome.state is JobState.DONE:
                self._process.world.check_references(self._model)
            return outcome

        return await self._ask_about("outcome", seen)

    async def listen(self, channel: str) -> bool:
        return await self._ask_about("listen", lambda: self._model.job is not None)

    async def notes(self, *names: str) -> list[bytes | None]:
        return await self._ask_about("notes", lambda: self._model.notes(names))

    async def count(self) -> tuple[JobState | None, int, int, int]:
        def counted() -> tuple[JobState | None, int, int, int]:
            job = self._model.job
            if job is None:
                return None, 0, 0, 0
            return job.state, job.new.tasks, job.passed, len(self._model.live)

        return await self._ask("count", counted)

    async def is_open(self) -> bool:
        if self._process.world.servers == 1:
            return True
        return await self._ask("is_open", lambda: self._model.is_open)

    async def get(self, names: Sequence[str], sizes: Sequence[int]) -> list[bytes | None]:
        if not names:
            return []
        return await self._ask("get", lambda: self._model.get(names))

    async def _call(self, script: scripts.Script, *args: Any) -> Any:
        ends = {scripts.FINISH: self._model.forget, scripts.RETIRE: self._model.retire}
        return await self._ask(script.name, ends[script])

    async def _close_and_forget(self) -> bool:
        # Others may come between the two.
        return await self._close(0, "finish") and bool(await self._call(scripts.FINISH))

    async def _close(self, shard: int, why: str, ttl: int = 0, stays: Sequence[str] = ()) -> bool:
        names = [name.removeprefix(self._key("")) for name in stays]
        last = len(self._connections) - 1

        def closed() -> bool:
            if shard == 0 and not self._model.close(why):
                return False
            if shard == last:
                self._model.sweep(names)
            return True

        return await self._ask(f"{why} {shard}", closed)


class SimulatedUpload(Upload):
    """A workload, as if it had come from a graph. Blocks are not uploaded: executors know them."""

    def __init__(self, world: World) -> None:
        plan = world.workload.plan
        super().__init__(cast(Any, None), plan, settings(len(world.groups)), [0], [0])
        self._literal_values = world.workload.literals
        self._groups = world.groups

    def names(self) -> list[str]:
        return []

    def groups(self) -> list[list[int]]:
        return self._groups

    @property
    def results(self) -> dict[Any, int]:
        return {task: task for task in self.plan.requested}

    @property
    def constants(self) -> dict[Any, Any]:
        return {}

    def batches(self) -> Iterator[list[tuple[str, wire.Segments]]]:
        self.values.clear()
        last = next(reversed(self._literal_values), None)
        for number, value in self._literal_values.items():
            self.is_serialised = number == last
            stored, parts = payload(
                number, freeze(value, 0), writer="plan", inline_limit=0, part_size=12
            )
            self.values.append((number, stored.inline))
            yield parts


class Client(Process):
    """Computes the workload."""

    def __init__(self, world: World, name: str = "client") -> None:
        super().__init__(world, name)
        self.begins = 0

    async def main(self) -> None:
        world = self.world
        job = Job(self, settings(len(world.groups)))
        keys = list(world.workload.plan.requested)
        try:
            values, outcome = await job.compute(SimulatedUpload(world), keys)
        except Died:
            raise
        except Exception as error:
            world.check_error(error, losses=2)
        except asyncio.CancelledError:
            if self.alive and not world.injected.get("cancel"):
                raise
        else:
            self.begins = outcome.begins
            world.check_results({task: values[task] for task in keys})


class Proxy(Process):
    """Takes over jobs whose client is gone."""

    async def main(self) -> None:
        world = self.world
        while not world.over:
            for job_id, model in tuple(world.stores.items()):
                if await self.ask("lapsed", model.lapsed):
                    await keep(self.store(job_id), self.invoker)
            await asyncio.sleep(2 * TICK)


class Attached(Process):
    """Attaches to the job of a client, some time."""

    def __init__(self, world: World, name: str, job_id: str) -> None:
        super().__init__(world, name)
        self.job_id = job_id
        self.job = AttachedJob(self, job_id)
        self.found = False

    async def main(self) -> None:
        world = self.world
        try:
            found = await self.job.result()
        except Died:
            raise
        except JobNotFound:
            world.check(not self.knows, "a job is there, but not found")
            return
        except Exception as error:
            world.check_error(error, losses=1)
        else:
            world.check_results(dict(zip(world.workload.plan.requested, found, strict=True)))
        self.found = True


class Canceller(Attached):
    """Attaches to the job of a client in order to cancel it."""

    async def main(self) -> None:
        with contextlib.suppress(JobNotFound):
            await self.job.cancel()
            self.world.check_cancelled(self.job_id)


def freeze(value: int, salt: int) -> wire.Segments:
    """A value as it travels.

    Equal values need not have equal pickles: sets, for one, follow the hash seed of their process.
    The salt stands for that.
    """
    return wire.dumps([value, salt, salt, salt])
