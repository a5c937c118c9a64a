"""Each rule of the protocol undone on purpose: the simulation has to notice.

A check that cannot fail is worth nothing. These are the mistakes that simpler protocols make; the
names say which rule is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import pytest

from tests.simulation.model import ModelStore, Record
from tests.simulation.world import Client, Executor, Faults, Policy, World
from wukong_async import wire
from wukong_async.protocol import Begun, Commit, JobState, Reply, Status, Watch
from wukong_async.store import NewJob

SEEDS = 1000


class ClaimsAreForgotten(ModelStore):
    """The frontier is replaced, but what was claimed does not join it."""

    def _claim(self, consumer: int, claims: list[int]) -> None:
        super()._claim(consumer, [])


class CommitsAreNotNumbered(ModelStore):
    """A commit that is sent again takes effect again."""

    def commit(
        self, executor: str, generation: int, nonce: str, sequence: int, body: bytes
    ) -> Reply:
        record = self.records.get(executor)
        if record is not None:
            record.sequence = sequence - 1
        return super().commit(executor, generation, nonce, sequence, body)


class BeginForgetsItsNonce(ModelStore):
    """A begin whose answer was lost finds its own record held by somebody else."""

    def begin(self, executor: str, nonce: str, request_id: str = "") -> Begun:
        record = self.records.get(executor)
        if record is not None and record.nonce == nonce:
            return Begun(Status.HELD)
        return super().begin(executor, nonce, request_id)


class TakeoverBeforeExpiry(ModelStore):
    """Any begin takes the record, also from a living executor."""

    def begin(self, executor: str, nonce: str, request_id: str = "") -> Begun:
        if executor in self.live and self.records[executor].nonce != nonce:
            self.live[executor] = self.now()
        return super().begin(executor, nonce, request_id)


class GenerationIsNotChecked(ModelStore):
    """A fenced incarnation's commit takes effect."""

    def commit(
        self, executor: str, generation: int, nonce: str, sequence: int, body: bytes
    ) -> Reply:
        record = self.records.get(executor)
        if record is not None:
            generation, nonce = record.generation, record.nonce
            sequence = record.sequence + 1
        return super().commit(executor, generation, nonce, sequence, body)


class RenewalIsNotFenced(ModelStore):
    """A late renewal leaves a ghost in `live`."""

    def renew(self, executor: str, generation: int, nonce: str, last_words: bytes = b"") -> Status:
        status = super().renew(executor, generation, nonce, last_words)
        if status is Status.FENCED and self.job is not None:
            self.live[executor] = self.now() + self.job.new.lease
        return status


class ClocksRunSlow(ModelStore):
    """The watcher's clock is not the server's: nobody's lease is ever over."""

    def watch(self, owner: str = "", most: int = 1000) -> Watch:
        clock, self.now = self.now, lambda: -1e9
        try:
            return super().watch(owner, most)
        finally:
            self.now = clock


class ReadersAreMiscounted(ModelStore):
    """An object starts with the readers that have finished already taken off twice."""

    def _pass(self, reads: Iterable[tuple[int, int]]) -> list[tuple[int, str]]:
        return super()._pass((task, count + 1) for task, count in reads)


class ReadersAreNotCounted(ModelStore):
    """An object goes when it was read once, not when its last reader has passed."""

    def _pass(self, reads: Iterable[tuple[int, int]]) -> list[tuple[int, str]]:
        return super()._pass((task, 1_000_000) for task, _ in reads)


class PutsNeedNoMark(ModelStore):
    """A zombie's write lands after the clean-up."""

    def put(self, objects: Mapping[str, bytes]) -> Status:
        for name, value in objects.items():
            self.objects.setdefault(name, value)
        self.index.update(objects)
        return Status.OK


class RecordsAreCreatedOneByOne(ModelStore):
    """An early finisher finds nobody else alive."""

    held_back: dict[str, Record]

    def create(self, new: NewJob) -> Status:
        first = self.job is None
        status = super().create(new)
        if first:
            self.held_back = {x: self.records.pop(x) for x, _ in new.records[1:]}
            for executor in self.held_back:
                del self.live[executor]
        return status

    def begin(self, executor: str, nonce: str, request_id: str = "") -> Begun:
        if self.job is not None and executor in self.held_back:
            self.records[executor] = self.held_back.pop(executor)
            self.live[executor] = self.now() + self.job.new.grace
        return super().begin(executor, nonce, request_id)


class ResultsAreNotHeld(ModelStore):
    """A result that others read as well goes with its last reader."""

    def commit(
        self, executor: str, generation: int, nonce: str, sequence: int, body: bytes
    ) -> Reply:
        parts = wire.unpack(body)
        requested = {task for task, _ in parts[3]}
        parts[2] = [
            [task, count - (task in requested and place != b""), place, value]
            for task, count, place, value in parts[2]
        ]
        body = wire.pack(parts)
        return super().commit(executor, generation, nonce, sequence, body)


class ArrivalBeforeData(Executor):
    """The commit goes out while its data is still on the way."""

    def publish(self, tasks: Sequence[int]) -> None:
        super().publish(tasks)
        if not self.engine.next_actions():
            self.engine.published()
            self.step()


class FencedButDeletes(Executor):
    """A fenced incarnation cleans up what it wrote: its successor's inputs."""

    def send(self, sequence: int, commit: Commit) -> None:
        places = {task: self.payloads[task].place for task, _ in commit.publish}
        self.written = [(task, place) for task, place in places.items() if place]
        super().send(sequence, commit)

    def step(self) -> None:
        fenced = self.alive and self.engine.state.name == "EXIT" and hasattr(self, "written")
        super().step()
        if fenced:
            self.world.store.delete(self.written)


class PartsAreNamedAlike(Executor):
    """Two incarnations write parts of one value under the same names."""

    @property
    def writer(self) -> str:
        return "anybody"


class NobodyLooksAgain(Client):
    """The client waits for the announcement alone."""

    def tick(self) -> None:
        pass


class DeafWorld(World):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.client = NobodyLooksAgain(self)


def _violations(make: Callable[[int], World]) -> int:
    for seed in range(SEEDS):
        try:
            make(seed).run()
        except (AssertionError, KeyError):
            return 1
    return 0


@pytest.mark.parametrize(
    "store",
    [
        ClaimsAreForgotten,
        CommitsAreNotNumbered,
        GenerationIsNotChecked,
        RenewalIsNotFenced,
        ClocksRunSlow,
        ReadersAreMiscounted,
        ReadersAreNotCounted,
        PutsNeedNoMark,
        RecordsAreCreatedOneByOne,
        ResultsAreNotHeld,
    ],
)
def test_a_mistake_in_the_store_is_noticed(store: type[ModelStore]) -> None:
    assert _violations(lambda seed: World(seed, store_class=store))


@pytest.mark.parametrize("executor", [ArrivalBeforeData, FencedButDeletes, PartsAreNamedAlike])
def test_a_mistake_in_the_executor_is_noticed(executor: type[Executor]) -> None:
    assert _violations(lambda seed: World(seed, executor_class=executor))


def test_a_client_that_never_looks_again_is_noticed() -> None:
    assert _violations(DeafWorld)


def test_no_mistake_no_violation() -> None:
    assert not _violations(World)


def _begins(faults: Faults, store: type[ModelStore] = ModelStore) -> tuple[int, int]:
    """(executors that began, records) over many seeds with these faults only."""
    begins = records = 0
    for seed in range(300):
        world = World(seed, store_class=store)
        world.faults = faults
        world.policy = Policy()
        world.run()
        begins += world.client.begins
        records += len(world.groups)
    return begins, records


def test_duplicated_events_start_nothing_twice() -> None:
    begins, records = _begins(Faults(repeat_event=1.0))
    assert begins == records


def test_a_begin_that_is_sent_again_is_answered_again() -> None:
    begins, records = _begins(Faults(lose_reply=0.05))
    assert begins == records


def test_a_takeover_before_expiry_is_noticed() -> None:
    begins, records = _begins(Faults(repeat_event=1.0), TakeoverBeforeExpiry)
    assert begins > records


def test_a_begin_that_burns_a_lease_is_noticed() -> None:
    begins, records = _begins(Faults(lose_reply=0.05), BeginForgetsItsNonce)
    assert begins > records


def test_lost_invocations_do_not_count_as_attempts() -> None:
    store = _store(attempts=2, unstarted=100)
    for _ in range(20):
        _time[0] += 1000
        assert store.watch().revived == ("0",)
    assert store.begin("0", "a").status is Status.OK


def test_a_function_that_never_starts_is_given_up() -> None:
    store = _store(attempts=2, unstarted=5)
    for _ in range(10):
        _time[0] += 1000
        store.watch()
    assert store.job is not None
    assert store.job.state is JobState.FAILED
    assert wire.unpack(store.job.error)[0] == b"unstarted"


def test_an_executor_that_dies_each_time_is_given_up() -> None:
    store = _store(attempts=2, unstarted=100)
    for attempt in range(2):
        assert store.begin("0", f"nonce {attempt}").status is Status.OK
        _time[0] += 1000
        store.watch()
    assert store.job is not None
    assert store.job.state is JobState.FAILED
    assert wire.unpack(store.job.error)[:3] == [b"lost", b"0", 2]


_time = [0.0]


def _store(*, attempts: int, unstarted: int) -> ModelStore:
    store = ModelStore(lambda: _time[0])
    store.open()
    store.create(
        NewJob(
            tasks=1,
            want=1,
            channel="",
            slots=1,
            lease=1,
            grace=1,
            attempts=attempts,
            unstarted=unstarted,
            ttl=1,
            facts=b"",
            values=[],
            records=[("0", [0])],
        )
    )
    return store
