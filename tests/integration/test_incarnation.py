"""One incarnation of an executor in this process, on a real server."""

from __future__ import annotations

import asyncio
import io
import secrets
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dask._task_spec import DataNode, Task, TaskRef

from tests.acceptance.functions import touch_and_wait
from tests.integration.jobs import new_job
from wukong_async import engine as engine_module
from wukong_async import wire
from wukong_async.blocks import PlanFacts, Program, Unreadable
from wukong_async.compression import Compression
from wukong_async.config import Settings
from wukong_async.engine import Publish, State
from wukong_async.executor import incarnation as incarnation_module
from wukong_async.executor.incarnation import Incarnation
from wukong_async.executor.memory import GLANCE, PlanCache, Values
from wukong_async.executor.worker import Worker
from wukong_async.invocation import Hints, Invocation
from wukong_async.last_words import LastWords
from wukong_async.policy import Meter
from wukong_async.protocol import JobState, Reply, Status
from wukong_async.scheduler.upload import Upload
from wukong_async.store import Connections, JobStore, block_name


@pytest.fixture
def worker() -> Iterator[Worker]:
    thread = Worker()
    yield thread
    thread.close(wait=True)


class Job:
    """A planned graph in the store; executor 0 has all of its leaves."""

    def __init__(self, connections: Connections, worker: Worker) -> None:
        self.store = JobStore(connections, secrets.token_hex(4))
        self.worker, self.reader, self.writer = worker, Worker(), Worker()
        self.workers = [worker]
        self.invoked: list[str] = []

    async def create(
        self,
        dsk: dict[str, Any],
        keys: str | list[str],
        leaves: slice = slice(None),
        settings: Settings = Settings(),  # noqa: B008 - it is frozen
        **annotations: Any,
    ) -> Upload:
        wanted = [keys] if isinstance(keys, str) else keys
        upload = Upload.prepare(dsk, wanted, settings, annotations)
        await self.store.open(600)
        for batch in upload.batches():
            await self.store.put(batch, 600)
        new = new_job(
            tasks=len(upload.plan),
            want=len(upload.plan.requested),
            slots=1,
            lease=0.3,
            facts=upload.facts.pack(),
            values=upload.values,
            records=[("0", upload.plan.leaves[leaves])],
        )
        assert await self.store.create(new) is Status.OK
        return upload

    def incarnation(
        self, remaining: float = 600, threads: int = 1, hints: Hints | None = None
    ) -> Incarnation:
        job_id = self.store.job_id
        invocation = Invocation(job_id, "0", hints=hints)
        return Incarnation(
            invocation,
            self.store,
            PlanCache(job_id),
            self.workers,
            self.reader,
            self.writer,
            request_id="request",
            remaining=remaining,
            invoke=self.invoke,
            meter=Meter(),
            threads=threads,
        )

    async def invoke(self, invocations: Sequence[Invocation]) -> None:
        self.invoked += [each.executor for each in invocations]

    async def record(self, field: str) -> bytes:
        """A field of the executors' records; empty if there is none."""
        key = f"wukong:{{{self.store.job_id}}}:rec"
        return bytes(await self.store._connections.command(0, "HGET", key, field) or b"")

    async def take_over(self) -> None:
        """Have another incarnation begin, as if the first had been silent."""
        live = f"wukong:{{{self.store.job_id}}}:live"
        status = Status.HELD
        while status is Status.HELD:  # It may be renewed in between.
            await self.store._connections.command(0, "ZADD", live, "XX", 1, "0")
            status = (await self.store.begin("0", "other")).status
        assert status is Status.OK


@pytest.fixture
async def job(connections: Connections, worker: Worker) -> AsyncIterator[Job]:
    made = Job(connections, worker)
    yield made
    await made.store.cancel(JobState.CANCELLED, b"")
    await made.store.finish()
    for thread in (*made.workers, made.reader, made.writer):
        thread.close(wait=True)


async def test_a_renewal_says_what_runs(job: Job, tmp_path: Path) -> None:
    touched, awaited = tmp_path / "touched", tmp_path / "awaited"
    upload = await job.create(
        {"first": (len, "x"), "slow": (touch_and_wait, str(touched), str(awaited), "first")}, "slow"
    )
    words = None
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        running = group.create_task(job.incarnation().run())
        try:
            while words is None or words.task is None:
                await asyncio.sleep(0.01)
                words = LastWords.unpack(await job.record("0/n"))
        finally:
            awaited.touch()
    assert running.result() is Status.OK
    assert words.task == upload.plan.numbers["slow"]
    assert 10 < words.resident < 10_000
    assert 500 < words.left < 600
    assert await job.record("0/n") == b"", "it goes with the record"


@pytest.mark.parametrize("answer", [Status.STOP, Status.FENCED])
async def test_a_renewal_that_is_refused_ends_the_incarnation_in_the_middle_of_a_task(
    job: Job, tmp_path: Path, answer: Status
) -> None:
    touched, awaited = tmp_path / "touched", tmp_path / "awaited"
    after = tmp_path / "after"
    await job.create(
        {
            "slow": (touch_and_wait, str(touched), str(awaited)),
            "after": (touch_and_wait, str(after), str(awaited), "slow"),
        },
        "after",
    )
    thread = job.worker._pool  # What runs is left behind with it.
    running = asyncio.create_task(job.incarnation().run())
    try:
        async with asyncio.timeout(20):
            while not touched.exists():
                await asyncio.sleep(0.01)
            if answer is Status.STOP:
                await job.store.cancel(JobState.CANCELLED, b"")
            else:
                await job.take_over()
            assert await running is answer
    finally:
        awaited.touch()
        running.cancel()
        await asyncio.wait([running])
    await asyncio.to_thread(partial(thread.shutdown, wait=True))
    assert not after.exists(), "what was scheduled behind it does not run"
    outcome = await job.store.outcome()
    assert outcome.passed == 0


async def test_small_outputs_beyond_what_one_commit_takes_go_to_the_data_shards(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incarnation_module, "COMMIT_BYTES", 10_000)
    bodies: list[int] = []
    commit = JobStore.commit

    async def weighed(store: JobStore, *args: Any) -> Reply:
        bodies.append(len(args[-1]))
        return await commit(store, *args)

    monkeypatch.setattr(JobStore, "commit", weighed)
    leaves: dict[str, Any] = {f"x{i}": (bytes, 1000) for i in range(101)}
    # Somebody else would have the last leaf, so all the others have to travel.
    upload = await job.create({**leaves, "total": (list, list(leaves))}, "total", slice(100))
    assert await job.incarnation().run() is Status.OK
    (body,) = bodies
    assert 10_000 < body < 20_000, "a few values, and a pointer to each of the others"
    stored = await job.store.look(upload.plan.leaves[:100])
    inline = [v for v in stored.values() if v is not None and len(v) > 1000]
    assert len(inline) == 9
    found = await job.store.read(upload.plan.leaves[:100])
    assert all(frame is not None and bytes(1000) in bytes(frame) for frame in found.values())


async def test_blocks_are_read_while_the_record_is_taken_and_once(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = {f"x{i}": (bytes, 1000) for i in range(20)}
    upload = await job.create(
        {**leaves, "total": (list, list(leaves))}, "total", settings=Settings(block_size=500)
    )
    assert len(upload.starts) > 3
    begin, get = job.store.begin, job.store.get
    asked: list[str] = []
    is_asked = asyncio.Event()

    async def begin_late(*args: Any) -> Any:
        await asyncio.wait_for(is_asked.wait(), 20)
        return await begin(*args)

    async def noted(names: Sequence[str], sizes: Sequence[int]) -> list[Any]:
        asked.extend(names)
        is_asked.set()
        return await get(names, sizes)

    monkeypatch.setattr(job.store, "begin", begin_late)
    monkeypatch.setattr(job.store, "get", noted)
    hints = Hints(time.time(), 0, len(upload.plan), alone=True, blocks=(0, 1, 2))
    assert await job.incarnation(hints=hints).run() is Status.OK
    assert asked[:3] == [block_name(index) for index in range(3)]
    blocks = [name for name in asked if name.startswith("b")]
    assert sorted(blocks) == sorted(block_name(i) for i in range(len(upload.starts)))


async def test_a_block_that_is_not_there_is_not_missed_before_it_is_needed(job: Job) -> None:
    await job.create({"x": (len, "abc")}, "x")
    hints = Hints(time.time(), 0, 1, blocks=(0, 7))
    assert await job.incarnation(hints=hints).run() is Status.OK


async def test_a_block_that_came_along_and_is_read_ahead_as_well(job: Job) -> None:
    leaves = {f"x{i}": (bytes, 1000) for i in range(20)}
    upload = await job.create(
        {**leaves, "total": (list, list(leaves))}, "total", settings=Settings(block_size=500)
    )
    assert upload.first
    hints = Hints(time.time(), 0, len(upload.plan), alone=True, blocks=(0, 1))
    hints = hints.carrying(upload.first, upload.secret)
    assert await job.incarnation(hints=hints).run() is Status.OK


async def test_what_waits_behind_a_task_that_is_given_up_is_done_by_the_next_thread(
    job: Job, worker: Worker
) -> None:
    """Else what it has used up would never be known, and nothing handed over."""
    held = threading.Event()
    stuck = worker.submit(held.wait)
    waiting = asyncio.ensure_future(job.incarnation()._in_worker(lambda: "done"))
    await asyncio.sleep(0)
    worker.abandon()
    assert await waiting == "done"
    held.set()
    with pytest.raises(SystemExit):
        await asyncio.wrap_future(stuck)


def decoded(value: object) -> Any:
    """A value that has travelled."""
    frames: dict[int, wire.Buffer] = {1: wire.join(wire.dumps(value))}
    return incarnation_module._decode(frames, threading.Event())[1][1]


def test_a_module_that_another_thread_imports_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loads, tries = wire.loads, []

    def half_done(frame: wire.Buffer) -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise ImportError("cannot import name 'arange' from partially initialized module")
        return loads(frame)

    monkeypatch.setattr(wire, "loads", half_done)
    assert (
        incarnation_module._decode({1: wire.join(wire.dumps("value"))}, threading.Event())[1][1]
        == "value"
    )
    assert len(tries) == 2


def test_a_module_that_is_not_there_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def missing(_: wire.Buffer) -> Any:
        tries.append(1)
        raise ModuleNotFoundError("No module named 'users'")

    monkeypatch.setattr(wire, "loads", missing)
    with pytest.raises(Unreadable):
        decoded("value")
    assert len(tries) == 1


async def test_a_result_that_was_told_before_is_announced_after_other_commits(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that is cut tells of a result in one part, and of others in the next ones."""
    monkeypatch.setattr(engine_module, "COMMIT_MOST", 2)
    readers: dict[str, Any] = {f"y{i}": (max, "x", f"other{i}") for i in range(5)}
    others = {f"other{i}": (int, i) for i in range(5)}
    graph = {"x": (int, 7), **others, **readers, "total": (max, list(readers))}
    # Somebody else has the other leaves: x is told of five times.
    upload = await job.create(graph, ["x", "total"], slice(1))
    assert [upload.plan.keys[n] for n in upload.plan.leaves[:1]] == ["x"]
    assert await job.incarnation().run() is Status.OK
    stored = await job.store._connections.command(0, "HGETALL", job.store._key("res"))
    assert list(stored) == [b"0"]


async def test_who_only_reads_until_the_time_is_over_does_not_hand_over(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its successors would not come further, and nobody would count them."""
    await job.create({"x": (int, 7)}, "x")
    never = asyncio.Event()

    async def get(*_: Any) -> list[bytes | None]:
        await never.wait()
        return []

    monkeypatch.setattr(JobStore, "get", get)
    assert await job.incarnation(remaining=0.2).run() is Status.FENCED
    assert job.invoked == []
    record = wire.unpack(await job.record("0"))
    assert (record[2], record[5]) == (True, 1), "held still, and an attempt"


calls: list[str] = []
"""In this process, where incarnations of these tests run."""


def half_done(numbers: Iterator[int]) -> int:
    """Their sum; in the first try it meets a module that another thread is importing."""
    total = 0
    for number in numbers:
        total += number
        if number == 5 and not calls:
            calls.append("met")
            raise AttributeError("partially initialized module 'a' has no attribute 'b'")
    return total


async def test_a_task_that_meets_a_module_half_done_runs_again(job: Job) -> None:
    calls.clear()
    await job.create({**CONSUMED, "total": (half_done, "numbers")}, "total")
    assert await job.incarnation().run() is Status.OK
    assert calls == ["met"]
    assert await result(job) == sum(range(10)), "all of the iterator again"


def wrong(_: object) -> None:
    calls.append("tried")
    raise AttributeError("'int' object has no attribute 'b'")


async def test_an_attribute_that_is_not_there_is_not_waited_for(job: Job) -> None:
    calls.clear()
    await job.create({"x": (wrong, 1)}, "x")
    await job.incarnation().run()
    assert calls == ["tried"]


def at_first_wrong(_: object) -> None:
    """Raises, and takes for ever when it is tried again."""
    calls.append("tried")
    if len(calls) == 1:
        raise ValueError("the first try")
    while True:
        time.sleep(0.01)


def half_done_at_last(_: object) -> None:
    time.sleep(0.82)
    calls.append("met")
    raise ImportError("cannot import name 'b' from partially initialized module 'a'")


async def test_a_module_half_done_when_the_time_is_over_is_not_the_tasks_fault(job: Job) -> None:
    calls.clear()
    await job.create({"x": (half_done_at_last, 1)}, "x")
    assert await job.incarnation(remaining=1.0).run() is Status.FENCED
    assert calls == ["met"]
    assert (await job.store.outcome()).state is JobState.RUNNING, "it is an attempt"


@pytest.mark.parametrize("limits", [{}, {"timeout": 30}])
async def test_a_try_that_is_cut_short_after_others_have_failed(
    job: Job, limits: dict[str, Any]
) -> None:
    """The next incarnation would begin with the first try, and be cut short in the same one."""
    calls.clear()
    await job.create({"x": (at_first_wrong, 1)}, "x", retries=10**6, **limits)
    await job.incarnation(remaining=1.0).run()
    outcome = await job.store.outcome()
    kind, _, tried, *_ = wire.unpack(outcome.error)
    assert (kind, tried) == (b"task", 1)


async def test_reading_that_hangs_does_not_hold_up_the_next_job() -> None:
    reader, held = Worker(), threading.Event()
    hangs = reader.submit(held.wait)
    assert not await reader.settle(0.01)
    reader.abandon(interrupt=False)
    assert await asyncio.wrap_future(reader.submit(lambda: "read")) == "read"
    assert await reader.settle(20)
    held.set()
    assert await asyncio.wrap_future(hangs), "it was not interrupted"
    reader.close(wait=True)


def test_an_output_whose_error_cannot_be_shown() -> None:
    class Unshown(Exception):
        def __str__(self) -> str:
            raise ValueError

    class Stays:
        def __reduce__(self) -> Any:
            raise Unshown

    facts = PlanFacts((), (), 10, 10, 1.0)
    made = incarnation_module._encode(
        [1], {1: Stays()}, facts, "w", 10, Compression(), threading.Event()
    )
    assert isinstance(made, incarnation_module.Failed)
    assert "cannot be shown" in str(made.error)


def consume(numbers: Iterator[int]) -> int:
    """Their sum, slowly, or an error at the sixth in the first try."""
    total = 0
    for number in numbers:
        total += number
        time.sleep(0.004)
        if number == 5 and not consumed.is_set():
            consumed.set()
            raise OSError("only this time")
    return total


consumed = threading.Event()
"""In this process, where incarnations of these tests run."""
CONSUMED: dict[str, Any] = {
    "n": (int, 10),
    "numbers": (iter, (list, (range, "n"))),
    "pair": (lambda *items: items, "numbers", "n"),
}


async def result(job: Job) -> Any:
    outcome = await job.store.outcome()
    assert outcome.state is JobState.DONE, outcome
    ((_, frame),) = (await job.store.resolve(outcome.results)).items()
    return wire.loads(frame or b"")


@pytest.mark.parametrize("limits", [{}, {"timeout": 60}])
@pytest.mark.parametrize("graph", ["numbers", "pair"])
async def test_a_task_that_is_tried_again_does_not_go_on_with_half_an_iterator(
    job: Job, graph: str, limits: dict[str, Any]
) -> None:
    consumed.clear()
    work = consume if graph == "numbers" else lambda pair: consume(pair[0])
    await job.create({**CONSUMED, "total": (work, graph)}, "total", retries=1, **limits)
    assert await job.incarnation().run() is Status.OK
    assert consumed.is_set()
    assert await result(job) == sum(range(10))


def read(buffer: io.BytesIO, limit: int) -> bytes:
    """All of it, or an error in the first try."""
    found = buffer.read()
    if not consumed.is_set():
        consumed.set()
        raise OSError("only this time")
    return found[:limit]


async def test_a_file_in_the_graph_is_read_again(job: Job) -> None:
    consumed.clear()
    file = DataNode("file", io.BytesIO(bytes(200_000)))
    graph = {"file": file, "n": (int, 5), "x": (read, "file", "n")}
    await job.create(graph, "x", retries=1)
    incarnation = job.incarnation()
    assert await incarnation.run() is Status.OK
    assert await result(job) == bytes(5)
    assert incarnation._cache.literal(-1) is None, "the next task would get it as it is now"


BYTES = b"".join(b"%d\n" % number for number in range(220))


def go_through(lines: Any, _: object = None) -> int:
    """The sum of what is in them, slowly, or an error at the sixth in the first try."""
    return consume(map(int, lines))


def go_through_first(parts: Sequence[Any], _: object) -> int:
    return go_through(parts[0])


def lines_of(file: io.BytesIO, _: object) -> Iterator[bytes]:
    return map(bytes.strip, file)


def pairs(count: int) -> list[tuple[int, list[Iterator[int]]]]:
    return [(key, [iter(range(key, key + count))]) for key in range(2)]


def go_through_pairs(found: list[tuple[int, list[Iterator[int]]]]) -> int:
    return sum(consume(numbers) for _, each in found for numbers in each)


FILE: dict[str, Any] = {"file": DataNode("file", io.BytesIO(BYTES)), "n": (int, 220)}


def well_hidden(numbers: list[int]) -> list[Any]:
    """More than a glance takes in."""
    return [*range(GLANCE), iter(numbers)]


def go_through_last(found: list[Any]) -> int:
    return consume(found[-1])


GO_ONCE: dict[str, dict[str, Any]] = {
    "an iterator": {**CONSUMED, **FILE, "total": (consume, "numbers")},
    "a file in the graph": {**FILE, "total": (go_through, "file", "n")},
    "an argument": {**FILE, "total": Task("total", go_through, io.BytesIO(BYTES), TaskRef("n"))},
    "a large argument": {
        **FILE,
        "total": Task("total", go_through_first, [io.BytesIO(BYTES), bytes(500_000)], TaskRef("n")),
    },
    "an iterator over a file": {
        **FILE,
        "lines": (lines_of, "file", "n"),
        "total": (go_through, "lines"),
    },
    "an iterator over an iterator": {
        **CONSUMED,
        **FILE,
        "absolute": (map, abs, "numbers"),
        "total": (consume, "absolute"),
    },
    "a well hidden iterator": {
        **FILE,
        "numbers": (list, (range, "n")),
        "hidden": (well_hidden, "numbers"),
        "total": (go_through_last, "hidden"),
    },
    "iterators in containers": {**FILE, "p": (pairs, "n"), "total": (go_through_pairs, "p")},
}


TOTAL = dict.fromkeys(GO_ONCE, sum(range(220)))
TOTAL["iterators in containers"] = sum(range(220)) + sum(range(1, 221))


@pytest.mark.parametrize("limits", [{}, {"timeout": 60}])
@pytest.mark.parametrize("kind", GO_ONCE)
async def test_what_goes_once_is_whole_in_the_second_try(
    job: Job, kind: str, limits: dict[str, Any]
) -> None:
    consumed.clear()
    await job.create(GO_ONCE[kind], "total", retries=1, **limits)
    assert await job.incarnation().run() is Status.OK
    assert consumed.is_set()
    assert await result(job) == TOTAL[kind]


@pytest.mark.parametrize("kind", GO_ONCE)
async def test_what_goes_once_is_handed_over_whole(job: Job, kind: str) -> None:
    consumed.set()
    await job.create(GO_ONCE[kind], "total")
    first, second = job.incarnation(remaining=0.8), job.incarnation()
    second._cache = first._cache  # In the same sandbox, which is warm.
    assert await first.run() is Status.OK
    assert job.invoked == ["0"], "it was handed over"
    assert await second.run() is Status.OK
    assert await result(job) == TOTAL[kind]


class Hoard:
    """Something large."""


hoards: list[weakref.ref[Hoard]] = []


def hoard() -> int:
    """How much of the tries that have failed is still there."""
    large = Hoard()
    hoards.append(weakref.ref(large))
    if len(hoards) < 3:
        try:
            raise OSError
        except OSError as error:
            raise ValueError(large.__doc__) from error
    return sum(each() is not None for each in hoards[:-1])


@pytest.mark.parametrize("limits", [{}, {"timeout": 60}])
async def test_what_a_try_has_held_is_free_for_the_next(job: Job, limits: dict[str, Any]) -> None:
    hoards.clear()
    await job.create({"x": (hoard,)}, "x", retries=2, **limits)
    assert await job.incarnation().run() is Status.OK
    assert await result(job) == 0


async def test_who_cannot_get_ready_to_invoke_hands_over_all_the_same(job: Job) -> None:
    consumed.set()
    await job.create(GO_ONCE["an iterator"], "total")
    incarnation, never = job.incarnation(remaining=0.8), asyncio.Event()

    async def invoke(invocations: Sequence[Invocation]) -> None:
        if not invocations:
            await never.wait()
        await job.invoke(invocations)

    incarnation._invoke = invoke
    assert await incarnation.run() is Status.OK
    assert job.invoked == ["0"]


@pytest.mark.parametrize(("remaking", "state"), [(0, State.BEGIN), (1, State.EXIT)])
async def test_who_makes_again_what_is_lost_until_the_time_is_over_leaves(
    job: Job, remaking: int, state: State
) -> None:
    """Nothing could be handed over before that is through."""
    incarnation = job.incarnation(remaining=0.1)
    incarnation._ran, incarnation._remaking = 1, remaking
    await incarnation._hand_over()
    assert incarnation._engine.state is state


def test_a_failed_try_whose_attributes_cannot_be_read() -> None:
    class Closed(Exception):
        def __getattribute__(self, name: str) -> Any:
            raise RuntimeError(name)

    def fails(_: object) -> None:
        raise Closed

    program = Program(fails, (), (), None)
    assert type(incarnation_module._try(1, program, Values())) is Closed


def load(count: int) -> list[int]:
    calls.append("load")
    return list(range(count))


def lazily(numbers: list[int]) -> Iterator[int]:
    calls.append("lazily")
    return map(abs, numbers)


LAZY: dict[str, Any] = {
    "n": (int, 220),
    "loaded": (load, "n"),
    "lazy": (lazily, "loaded"),
    "total": (consume, "lazy"),
}


async def test_what_an_iterator_was_made_of_is_not_made_again(job: Job) -> None:
    calls.clear()
    consumed.clear()
    await job.create(LAZY, "total", retries=1)
    assert await job.incarnation(remaining=0.9).run() is Status.OK, "in the second try"
    assert calls == ["load", "lazily", "lazily"]
    assert await job.incarnation().run() is Status.OK
    assert calls == ["load", "lazily", "lazily", "lazily"]
    assert await result(job) == sum(range(220))


async def test_what_goes_once_and_had_another_reader_is_handed_over_whole(job: Job) -> None:
    consumed.set()
    graph = {
        "n": (int, 220),
        "pairs": (pairs, "n"),
        "count": (len, "pairs"),
        "total": (lambda found, _: go_through_pairs(found), "pairs", "count"),
    }
    await job.create(graph, ["total", "count"])
    assert await job.incarnation(remaining=0.8).run() is Status.OK
    assert await job.incarnation().run() is Status.OK
    outcome = await job.store.outcome()
    frames = await job.store.resolve(outcome.results)
    values = sorted(wire.loads(frame or b"") for frame in frames.values())
    assert values == [2, TOTAL["iterators in containers"]]


async def test_a_task_and_its_iterator_that_need_all_of_the_time_are_too_long(job: Job) -> None:
    """What made the iterator has run, and would have to again: the next one would not get on."""
    consumed.set()
    await job.create({"i": (iter, list(range(220))), "total": (consume, "i")}, "total")
    assert await job.incarnation(remaining=0.6).run() is Status.STOP
    outcome = await job.store.outcome()
    kind, task, _, _, along, *_ = wire.unpack(outcome.error)
    assert (kind, task, along) == (b"timeout", 1, [0])


def chained(numbers: Iterator[int]) -> Iterator[int]:
    """The same, made with an error in the second try."""
    first = next(numbers)
    calls.append("chained")
    if len(calls) == 2:
        raise OSError("only this time")
    return chain([first], numbers)


async def test_what_is_made_again_has_its_retries(job: Job) -> None:
    calls.clear()
    consumed.clear()
    graph = {**CONSUMED, "chained": (chained, "numbers"), "total": (consume, "chained")}
    await job.create(graph, "total", retries=1)
    assert await job.incarnation().run() is Status.OK
    assert len(calls) == 3
    assert await result(job) == sum(range(10))


@pytest.mark.parametrize("limits", [{}, {"timeout": 60}])
async def test_tries_that_do_not_fit_into_the_functions_time_end(
    job: Job, limits: dict[str, Any]
) -> None:
    """Each incarnation would begin with the first one, for ever."""

    def fails() -> None:
        time.sleep(0.01)
        raise ValueError("always")

    await job.create({"x": (fails,)}, "x", retries=10**6, **limits)
    await job.incarnation(remaining=0.5).run()
    outcome = await job.store.outcome()
    assert outcome.state is JobState.FAILED
    assert wire.unpack(outcome.error)[0] == b"task"


async def test_what_is_published_by_half_is_not_told(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something else has failed, and stops what is done for nothing."""

    def stopped(*args: Any) -> Any:
        args[-1].set()
        return {}, []

    monkeypatch.setattr(incarnation_module, "_encode", stopped)
    incarnation = job.incarnation()
    monkeypatch.setattr(incarnation._engine, "published", lambda: pytest.fail("it was told"))
    await incarnation._perform(Publish((1, 2)))


async def test_nobody_waits(job: Job) -> None:
    """While an executor is there, something runs, or is read, written or asked for."""
    blocks: dict[str, Any] = {f"x{i}": (np.full, 100_000, float(i)) for i in range(20)}
    blocks |= {f"y{i}": (np.add, f"x{i}", f"x{i - 1}") for i in range(1, 20)}
    blocks["total"] = (len, [f"y{i}" for i in range(1, 20)])
    await job.create(blocks, ["total", "y7", "x3"])
    incarnation = job.incarnation()
    begun = asyncio.get_running_loop().time()
    assert await incarnation.run() is Status.OK
    assert asyncio.get_running_loop().time() > begun
    assert incarnation.idle == 0


# Several tasks at once ------------------------------------------------------------------------

SOON = 20.0
"""Seconds that tasks wait for each other; then they are not run at the same time."""
meeting = threading.Barrier(2)
"""In this process, where incarnations of these tests run."""
released = threading.Event()


def meet(value: Any, *_: Any) -> Any:
    """Wait until another task is here, too."""
    meeting.wait(SOON)
    return value


@pytest.fixture(autouse=True)
def nobody_waits() -> Iterator[None]:
    meeting.reset()
    released.clear()
    yield
    released.set()
    meeting.abort()


PAIR: dict[str, Any] = {"a": (meet, 1), "b": (meet, 2), "total": (sum, ["a", "b"])}


@pytest.mark.parametrize("limits", [{}, {"timeout": 60}])
@pytest.mark.parametrize("threads", [2, 3])
async def test_tasks_that_wait_for_each_other(
    job: Job, threads: int, limits: dict[str, Any]
) -> None:
    await job.create(PAIR, "total", **limits)
    incarnation = job.incarnation(threads=threads)
    assert await incarnation.run() is Status.OK
    assert await result(job) == 3
    assert len(incarnation._values) == 0
    assert len(job.workers) == threads


async def test_a_job_says_how_many_tasks_run_at_once(job: Job) -> None:
    await job.create(PAIR, "total", settings=Settings(threads_per_executor=2))
    assert await job.incarnation(threads=1).run() is Status.OK
    assert await result(job) == 3


async def test_what_a_fan_out_leads_to_runs_at_once(job: Job) -> None:
    graph = {"root": (int, 5), "a": (meet, "root"), "b": (meet, "root", 1)}
    await job.create({**graph, "total": (sum, ["a", "b", "root"])}, "total")
    assert await job.incarnation(threads=2).run() is Status.OK
    assert await result(job) == 15


def fails_beside() -> None:
    meeting.wait(SOON)
    raise ValueError("on purpose")


def goes_on(*_: Any) -> int:
    meeting.wait(SOON)
    released.wait()
    return 1


async def test_a_task_that_fails_beside_another_one(job: Job) -> None:
    upload = await job.create({"a": (fails_beside,), "b": (goes_on,), "c": (max, "a", "b")}, "c")
    assert await job.incarnation(threads=2).run() is Status.STOP
    outcome = await job.store.outcome()
    assert wire.unpack(outcome.error)[:2] == [b"task", upload.plan.numbers["a"]]
    released.set()


def again() -> int:
    """Raises, then waits for another task in the second try."""
    calls.append("tried")
    if len(calls) == 1:
        raise OSError("only this time")
    meeting.wait(SOON)
    return len(calls)


@pytest.mark.parametrize("limits", [{}, {"timeout": 60}])
async def test_a_task_is_tried_again_beside_another_one(job: Job, limits: dict[str, Any]) -> None:
    calls.clear()
    graph = {"a": (again,), "b": (meet, 5), "total": (max, "a", "b")}
    await job.create(graph, "total", retries=1, **limits)
    assert await job.incarnation(threads=2).run() is Status.OK
    assert calls == ["tried", "tried"]
    assert await result(job) == 5


def waits_at_first() -> int:
    """Too long for its time, but not in the second try."""
    calls.append("tried")
    if len(calls) == 1:
        released.wait()
    return len(calls)


def waits_for_the_other() -> int:
    """Until that is tried again."""
    while len(calls) < 2:
        released.wait(0.01)
    return 5


async def test_a_thread_that_is_given_up_is_not_that_of_another_task(job: Job) -> None:
    calls.clear()
    graph = {"a": (waits_at_first,), "b": (waits_for_the_other,), "total": (sum, ["a", "b"])}
    await job.create(graph, "total", retries=1, timeout=0.3)
    assert await job.incarnation(threads=2).run() is Status.OK
    assert await result(job) == 7
    released.set()


async def test_last_words_name_the_task_that_runs_for_longest(job: Job, tmp_path: Path) -> None:
    begun, awaited, after = (tmp_path / name for name in ("begun", "awaited", "after"))
    graph = {
        "slow": (touch_and_wait, str(begun), str(awaited)),
        "quick": (len, "x"),
        "later": (touch_and_wait, str(after), str(awaited), "quick"),
    }
    upload = await job.create(graph, ["slow", "later"])
    numbers = upload.plan.numbers
    incarnation = job.incarnation(threads=2)
    running = asyncio.create_task(incarnation.run())
    try:
        async with asyncio.timeout(SOON):
            while not (begun.exists() and after.exists()):
                await asyncio.sleep(0.01)
        words = LastWords.unpack(incarnation._last_words())
        since = {progress.task: progress.since for progress in incarnation._runs}
    finally:
        awaited.touch()
        assert await running is Status.OK
    assert since.keys() == {numbers["slow"], numbers["later"]}
    assert words is not None
    assert words.task == min(since, key=since.__getitem__)


TWICE: dict[str, Any] = {
    "n": (int, 220),
    "a": (iter, (list, (range, "n"))),
    "b": (iter, (list, (range, "n"))),
    "left": (consume, "a"),
    "right": (consume, "b"),
    "total": (sum, ["left", "right"]),
}


async def test_two_tasks_that_are_cut_short_are_handed_over_whole(job: Job) -> None:
    consumed.set()
    await job.create(TWICE, "total")
    assert await job.incarnation(remaining=0.8, threads=2).run() is Status.OK
    assert job.invoked == ["0"], "it was handed over"
    assert await job.incarnation(threads=2).run() is Status.OK
    assert await result(job) == 2 * sum(range(220))


async def test_two_iterators_that_are_used_up_are_nothing_that_was_done(job: Job) -> None:
    """Each of the tasks would find that the other one's has run, and all would begin anew."""
    consumed.set()
    graph = {**TWICE, "a": (iter, list(range(220))), "b": (iter, list(range(220)))}
    del graph["n"]
    await job.create(graph, "total")
    assert await job.incarnation(remaining=0.6, threads=2).run() is Status.STOP
    outcome = await job.store.outcome()
    assert wire.unpack(outcome.error)[0] == b"timeout"


async def test_what_is_done_beside_a_task_that_is_cut_short_passes(job: Job) -> None:
    consumed.set()
    quick = {f"x{i}": (int, i) for i in range(50)}
    graph = {"i": (iter, list(range(220))), "slow": (consume, "i"), **quick}
    graph["total"] = (sum, [*quick, "slow"])
    await job.create(graph, "total")
    assert await job.incarnation(remaining=0.8, threads=2).run() is Status.OK
    passed = await job.store._connections.command(0, "HGET", job.store._key("job"), "passed")
    assert int(passed) >= 50, "all but what was cut short, and what it has used up"
    assert await job.incarnation(threads=2).run() is Status.OK
    assert await result(job) == sum(range(220)) + sum(range(50))


class Heavy:
    """A value that says how many of its kind there are."""

    alive = 0
    peak = 0

    def __init__(self) -> None:
        Heavy.alive += 1
        Heavy.peak = max(Heavy.peak, Heavy.alive)

    def __del__(self) -> None:
        Heavy.alive -= 1


def heavy(*_: Any) -> Heavy:
    return Heavy()


def release(_: Heavy) -> None:
    released.set()


def wait_for_release() -> bool:
    return released.wait(SOON)


async def test_values_are_freed_while_another_task_runs(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "RUN_LIMIT", 10)
    Heavy.peak = 0
    graph: dict[str, Any] = {"h0": (heavy,)}
    graph |= {f"h{i}": (heavy, f"h{i - 1}") for i in range(1, 100)}
    graph |= {"done": (release, "h99"), "beside": (wait_for_release,)}
    await job.create(graph, ["done", "beside"])
    assert await job.incarnation(threads=2).run() is Status.OK
    assert 0 < Heavy.peak < 60, "not all of them"
