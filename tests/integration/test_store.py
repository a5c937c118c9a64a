"""The Lua scripts on a real server, rule by rule. The names say what would break without it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.integration.jobs import new_job
from wukong_async import wire
from wukong_async.protocol import (
    Begun,
    Commit,
    JobState,
    Payload,
    Reply,
    Status,
    child_name,
    digest,
    has_bit,
    told_after,
)
from wukong_async.store import (
    Connections,
    JobStore,
    Place,
    commit_body,
    lapsed_jobs,
    payload,
)
from wukong_async.store import job as job_module
from wukong_async.store.job import REGISTRY

VALUE = Payload(b"\x01small")
FRAME = [b"\x01", b"x" * 100]


class Job:
    """A job in the store, and what its executors would say."""

    def __init__(self, connections: Connections) -> None:
        self.store = JobStore(connections, secrets.token_hex(4))

    async def create(self, **changes: Any) -> None:
        await self.store.open(600)
        assert await self.store.create(new_job(**changes)) is Status.OK

    async def commit(
        self, executor: str, generation: int, sequence: int, commit: Commit, nonce: str = "n"
    ) -> Reply:
        tasks = [task for task, _ in commit.publish] + list(commit.results)
        error = b"\x91\xa4boom" * commit.failed
        payloads = dict.fromkeys(tasks, VALUE)
        return await self.send(executor, generation, sequence, commit, payloads, nonce, error)

    async def send(
        self,
        executor: str,
        generation: int,
        sequence: int,
        commit: Commit,
        payloads: Mapping[int, Payload],
        nonce: str = "n",
        error: bytes = b"",
    ) -> Reply:
        body = commit_body(commit, payloads, error, told=await self.told(executor))
        return await self.store.commit(executor, generation, nonce, sequence, body)

    async def told(self, executor: str) -> str:
        """What its last incarnation has been told, as its record has it."""
        key = f"wukong:{{{self.store.job_id}}}:rec"
        record = await self.store._connections.command(0, "HGET", key, executor)
        return wire.unpack(record)[9].decode() if record else ""

    async def leaf(self, executor: str, sequence: int = 1, generation: int = 1) -> Reply:
        task = int(executor)
        commit = Commit(stay=(), passed=1, publish=((task, 1),), arrivals=((2, 2, 1),))
        return await self.commit(executor, generation, sequence, commit)

    async def state(self) -> JobState | None:
        return (await self.store.outcome()).state

    async def expire(self, *executors: str) -> None:
        """Let leases be over, on the server's clock."""
        key = f"wukong:{{{self.store.job_id}}}:live"
        for executor in executors:
            await self.store._connections.command(0, "ZADD", key, "XX", 1, executor)

    async def lease(self, executor: str) -> float:
        """Seconds that an executor may still be silent."""
        command = self.store._connections.command
        over = float(await command(0, "ZSCORE", f"wukong:{{{self.store.job_id}}}:live", executor))
        seconds, micros = await command(0, "TIME")
        return over / 1000 - int(seconds) - int(micros) / 1e6

    async def end(self) -> None:
        await self.store.cancel(JobState.CANCELLED, b"")
        await self.store.finish()


@pytest.fixture
async def job(connections: Connections) -> Any:
    made = Job(connections)
    yield made
    await made.end()


async def test_a_job_from_begin_to_end(job: Job) -> None:
    await job.create()
    for executor in "01":
        begun = await job.store.begin(executor, "n")
        assert (begun.status, begun.generation, begun.sequence) == (Status.OK, 1, 0)
        assert begun.frontier == (int(executor),)
        assert begun.facts == b"facts"
        assert begun.lease == 60.0
    assert await job.leaf("0") == Reply(Status.OK, gone=True, free=1)
    assert await job.leaf("1") == Reply(Status.OK, (2,), free=1)
    assert await job.store.read([0, 1]) == {0: VALUE.inline, 1: VALUE.inline}
    last = Commit(stay=(), passed=1, results=(2,), reads=((0, 1), (1, 1)))
    assert await job.commit("1", 1, 2, last) == Reply(Status.OK, gone=True, free=2)
    outcome = await job.store.outcome()
    assert outcome.state is JobState.DONE
    assert outcome.results == {2: VALUE.inline}
    assert (outcome.tasks, outcome.passed, outcome.commits, outcome.begins) == (3, 3, 3, 2)
    assert await job.store.read([0, 1]) == {0: None, 1: None}, "freed by its last reader"


async def test_create_needs_the_upload_mark_and_is_idempotent(job: Job) -> None:
    assert await job.store.create(new_job()) is Status.GONE
    await job.create()
    await job.store.begin("0", "n")
    assert await job.store.create(new_job()) is Status.OK
    assert (await job.store.begin("0", "n")).generation == 1, "a late copy changes nothing"


@pytest.mark.parametrize("width", [1, 100])
@pytest.mark.parametrize("size", [100, 30_000])
async def test_inputs_are_read_in_two_round_trips_however_many(
    job: Job, connections: Connections, width: int, size: int
) -> None:
    await job.create(records=[("0", list(range(width)))], tasks=width + 1)
    await job.store.begin("0", "n")
    payloads: dict[int, Payload] = {}
    for task in range(width):  # The others are small.
        frame = [b"\x01", bytes([task]) * (size if task % 2 == 0 else 10)]
        payloads[task], objects = payload(
            task, frame, writer="n", inline_limit=1000, part_size=20_000
        )
        await job.store.put(objects, 600)
    publish = tuple((task, 1) for task in range(width))
    assert (await job.send("0", 1, 1, Commit(publish=publish), payloads)).status is Status.OK
    await connections.command(0, "CONFIG", "RESETSTAT")
    found = await job.store.read(range(width))
    calls = await connections.client(0).info("commandstats")
    asked = {name.removeprefix("cmdstat_"): each["calls"] for name, each in calls.items()}
    asked.pop("config|resetstat")
    assert asked == {"hmget": 1} | ({"mget": 1} if size > 1000 else {})
    assert [frame and len(frame) for frame in found.values()] == [
        1 + (size if task % 2 == 0 else 10) for task in range(width)
    ]


async def test_a_job_without_tasks_is_done_at_once(job: Job) -> None:
    await job.create(tasks=0, want=0, records=[])
    assert await job.state() is JobState.DONE


async def test_begin_that_is_repeated_is_answered_the_same(job: Job) -> None:
    await job.create()
    first = await job.store.begin("0", "n")
    assert await job.store.begin("0", "n") == first


async def test_begin_of_a_duplicate_is_held_off_until_the_lease_is_over(job: Job) -> None:
    await job.create()
    await job.store.begin("0", "n")
    assert (await job.store.begin("0", "other")).status is Status.HELD
    await job.expire("0")
    taken = await job.store.begin("0", "other")
    assert (taken.status, taken.generation) == (Status.OK, 2)
    assert 119 < await job.lease("0") <= 120, "longer each time that it was begun in vain"
    assert taken.lease == 60.0, "but renewed as often"
    assert (await job.leaf("0")).status is Status.FENCED


async def test_begin_without_a_record_or_a_job_is_gone(job: Job, connections: Connections) -> None:
    await job.create()
    assert (await job.store.begin("7", "n")).status is Status.GONE
    assert (await JobStore(connections, "nothing").begin("0", "n")).status is Status.GONE
    await job.store.cancel(JobState.CANCELLED, b"")
    assert (await job.store.begin("0", "n")).status is Status.GONE


async def test_the_attempts_are_bounded_and_counted_in_begin(job: Job) -> None:
    await job.create(attempts=2)
    for nonce in "ab":
        assert (await job.store.begin("0", nonce)).status is Status.OK
        await job.expire("0")
    assert (await job.store.begin("0", "c")).status is Status.GONE
    outcome = await job.store.outcome()
    assert outcome.state is JobState.FAILED
    assert wire.unpack(outcome.error) == [b"lost", b"0", 2, wire.pack([0]), b"", b""]


async def test_what_an_executor_was_told_goes_with_each_commit(job: Job) -> None:
    """Of where its record comes from, and since: client and server reckon alike."""
    await job.create(slots=3)
    begun = await job.store.begin("0", "n")
    told = begun.told
    assert told == digest("", "n") == (await job.store.begin("0", "n")).told
    for sequence, commit in enumerate(
        (Commit(offers=((7,), (8,))), Commit(arrivals=((5, 1, (3,)),)), Commit(reads=((1, 1),))), 1
    ):
        reply = await job.commit("0", 1, sequence, commit)
        told = told_after(told, reply)
        assert await job.told("0") == told, commit
    first = digest(begun.told, "1.0")
    assert await job.told(child_name("0", 1, 0)) == first
    assert (await job.store.begin(child_name("0", 1, 0), "m")).told == digest(first, "m")
    body = commit_body(Commit(), {}, told=begun.told)
    reply = await job.store.commit("0", 1, "n", 4, body)
    assert reply.status is Status.REJECTED, "it has not heard of an answer"


async def test_a_commit_that_is_repeated_has_its_effect_once(job: Job) -> None:
    await job.create()
    await job.store.begin("0", "n")
    await job.store.begin("1", "n")
    await job.leaf("0")
    first = await job.leaf("1")
    assert first.claims == (2,)
    assert await job.leaf("1") == first
    assert (await job.store.outcome()).state is JobState.RUNNING
    again = Commit(stay=(), passed=1, results=(2,))
    assert (await job.commit("1", 1, 3, again)).status is Status.REJECTED
    assert (await job.commit("1", 1, 0, again)).status is Status.STALE


async def test_a_commit_of_a_finished_executor_is_fenced(job: Job) -> None:
    await job.create()
    await job.store.begin("0", "n")
    assert (await job.leaf("0")).gone
    assert (await job.leaf("0")).status is Status.FENCED


async def test_a_failure_ends_the_job_and_nothing_else_of_the_commit_counts(job: Job) -> None:
    await job.create()
    await job.store.begin("0", "n")
    await job.store.begin("1", "n")
    commit = Commit(failed=True, passed=1, arrivals=((2, 2, 1),))
    assert (await job.commit("0", 1, 1, commit)).status is Status.STOP
    outcome = await job.store.outcome()
    assert outcome.state is JobState.FAILED
    assert outcome.error == b"\x91\xa4boom"
    assert outcome.passed == 0
    assert await job.store.renew("1", 1, "n") is Status.STOP
    assert (await job.leaf("1")).status is Status.STOP, "all other executors stop"
    assert (await job.leaf("1")).status is Status.FENCED, "and their records are gone"


async def test_the_state_changes_once(job: Job) -> None:
    await job.create()
    assert await job.store.cancel(JobState.CANCELLED, b"a") is JobState.CANCELLED
    assert await job.store.cancel(JobState.FAILED, b"b") is JobState.CANCELLED
    assert (await job.store.outcome()).error == b"a"


async def test_a_renewal_extends_the_lease_and_is_fenced(job: Job) -> None:
    await job.create()
    await job.store.begin("0", "n")
    await job.expire("0")
    assert await job.store.renew("0", 1, "n") is Status.OK
    assert (await job.store.watch()).revived == ()
    assert await job.store.renew("0", 2, "n") is Status.FENCED
    await job.leaf("0")
    assert await job.store.renew("0", 1, "n") is Status.FENCED
    assert (await job.store.watch()).live == 1, "no ghost"


async def test_the_watcher_revives_the_silent_only(job: Job) -> None:
    await job.create()
    await job.store.begin("0", "n")
    assert (await job.store.watch()).revived == ()
    await job.expire("0", "1")
    watch = await job.store.watch()
    assert set(watch.revived) == {"0", "1"}
    assert (await job.store.watch()).revived == (), "their grace has begun"
    assert (await job.store.begin("0", "other")).generation == 2
    assert (await job.store.begin("1", "first")).generation == 1, "it had never begun"


async def test_a_zombie_may_finish_as_long_as_nobody_took_over(job: Job) -> None:
    await job.create()
    await job.store.begin("0", "n")
    await job.expire("0")
    await job.store.watch()
    assert (await job.leaf("0")).gone
    assert (await job.store.begin("0", "other")).status is Status.GONE


async def test_what_never_begins_is_given_up_in_the_end(job: Job) -> None:
    await job.create(unstarted=2)
    for _ in range(2):
        await job.expire("0")
        assert (await job.store.watch()).revived == ("0",)
    await job.expire("0")
    assert (await job.store.watch()).state is JobState.FAILED
    assert wire.unpack((await job.store.outcome()).error)[0] == b"unstarted"


async def test_nobody_left_and_results_missing_is_a_failure_and_no_hang(job: Job) -> None:
    await job.create(records=[("0", [0])])
    await job.store.begin("0", "n")
    assert (await job.leaf("0")).gone
    outcome = await job.store.outcome()
    assert outcome.state is JobState.FAILED
    assert b"no executor is left" in outcome.error


async def test_done_with_tasks_missing_is_a_failure(job: Job) -> None:
    await job.create(records=[("0", [0])])
    await job.store.begin("0", "n")
    await job.commit("0", 1, 1, Commit(stay=(), passed=1, results=(2,)))
    assert b"1 of 3 tasks passed" in (await job.store.outcome()).error


@pytest.mark.parametrize("who", ["a watcher", "an executor"])
async def test_a_job_that_takes_too_long_fails_whoever_notices(
    job: Job, connections: Connections, who: str
) -> None:
    await job.create(timeout=300)
    await job.store.begin("0", "n")
    await job.leaf("0")
    await job.store.begin("1", "n")
    assert await job.store.renew("1", 1, "n") is Status.OK
    assert (await job.store.watch()).state is JobState.RUNNING
    await connections.command(0, "HSET", f"wukong:{{{job.store.job_id}}}:job", "limit", 1)
    if who == "a watcher":
        assert (await job.store.watch()).state is JobState.FAILED
    else:
        assert await job.store.renew("1", 1, "n") is Status.STOP
    assert wire.unpack((await job.store.outcome()).error) == [b"overtime", 300_000, 1, 3]


async def test_an_object_goes_with_its_last_reader(job: Job) -> None:
    await job.create(records=[("0", [0])], want=9)
    await job.store.begin("0", "n")
    big, parts = payload(0, FRAME, writer="0-1", inline_limit=10, part_size=40)
    assert len(parts) == 3
    assert await job.store.put(parts, 600) is Status.OK
    commit = Commit(stay=(), passed=1, publish=((0, 3),), arrivals=((5, 1, 1),))
    assert (await job.send("0", 1, 1, commit, {0: big})).claims == (5,)
    assert await job.store.read([0]) == {0: wire.join(FRAME)}
    reply = await job.commit("0", 1, 2, Commit(stay=(), reads=((0, 2),), arrivals=((6, 1, 1),)))
    assert reply.deletes == ()
    reply = await job.commit("0", 1, 3, Commit(stay=(), reads=((0, 1),), arrivals=((7, 1, 1),)))
    assert reply.deletes == ((0, big.place),)
    await job.store.delete(reply.deletes)
    assert await job.store.read([0]) == {0: None}
    names = Place.from_token(0, big.place).names
    assert names == [name for name, _ in parts]
    assert await job.store.get(names, [40] * 3) == [None] * 3


async def test_a_large_result_is_held(job: Job) -> None:
    await job.create(records=[("0", [0])], tasks=2, want=2)
    await job.store.begin("0", "n")
    big, parts = payload(0, FRAME, writer="0-1", inline_limit=10, part_size=1000)
    await job.store.put(parts, 600)
    commit = Commit(stay=(), passed=1, publish=((0, 1),), results=(0,), arrivals=((1, 1, 1),))
    await job.send("0", 1, 1, commit, {0: big})
    reply = await job.commit("0", 1, 2, Commit(stay=(), passed=1, reads=((0, 1),), results=(1,)))
    assert reply.deletes == (), "its reader has passed, but the caller has not seen it"
    outcome = await job.store.outcome()
    assert (await job.store.resolve(outcome.results))[0] == wire.join(FRAME)


async def test_a_put_after_the_end_takes_itself_back(job: Job) -> None:
    await job.create()
    await job.end()
    assert await job.store.put([("o0.0", FRAME)], 600) is Status.CLOSED


async def test_finish_waits_for_the_end(job: Job) -> None:
    await job.create()
    assert await job.store.put([("o0.0", FRAME)], 600) is Status.OK
    assert not await job.store.finish()
    assert await job.state() is JobState.RUNNING
    assert await job.store.get(["o0.0"], [100]) == [wire.join(FRAME)]
    assert await job.store.put([("o1.0", FRAME)], 600) is Status.OK


async def test_everything_expires(job: Job, connections: Connections) -> None:
    await job.create()
    await job.store.begin("0", "n")
    await job.store.put([("o0.0", FRAME)], 600)
    await job.leaf("0")
    keys = await connections.command(0, "KEYS", "*")
    assert len(keys) >= 8
    for key in keys:
        assert 0 < await connections.command(0, "PTTL", key) <= 600_000, key


async def test_a_watcher_moves_the_deadline_of_everything(
    job: Job, connections: Connections
) -> None:
    await job.create()
    await job.store.put([("o0.0", FRAME)], 600)
    assert not (await job.store.watch()).extended
    key = f"wukong:{{{job.store.job_id}}}:job"
    now = await connections.command(0, "TIME")
    await connections.command(0, "HSET", key, "deadline", int(now[0]) * 1000 + 100_000)
    for each in await connections.command(0, "KEYS", "*"):
        await connections.command(0, "PEXPIRE", each, 100_000)
    assert (await job.store.watch()).extended
    await job.store.extend(600)
    for each in await connections.command(0, "KEYS", "*"):
        assert await connections.command(0, "PTTL", each) > 500_000, each


async def lapse(job: Job) -> None:
    """Let the owner's lease be over."""
    await job.store._connections.command(0, "ZADD", REGISTRY, "XX", 1, job.store.job_id)


async def test_a_silent_owner_is_succeeded_by_one_of_its_watchers(
    job: Job, connections: Connections
) -> None:
    await job.create(owner="client")
    assert (await job.store.watch("client")).owned
    assert not (await job.store.watch("proxy")).owned, "its lease is not over"
    assert not (await job.store.watch()).owned
    assert await lapsed_jobs(connections, 0) == []
    await lapse(job)
    assert await lapsed_jobs(connections, 0) == [job.store.job_id]
    assert not (await job.store.watch()).owned, "it only watches"
    assert (await job.store.watch("proxy")).owned
    assert await lapsed_jobs(connections, 0) == []
    assert not (await job.store.watch("another")).owned
    assert not (await job.store.watch("client")).owned, "it was given up"


async def test_the_registry_heals_and_forgets(job: Job, connections: Connections) -> None:
    await job.create(owner="client")
    await connections.command(0, "DEL", REGISTRY)
    assert (await job.store.watch("client")).owned
    assert await connections.command(0, "PTTL", REGISTRY) > 500_000
    await lapse(job)
    await connections.command(0, "DEL", f"wukong:{{{job.store.job_id}}}:job")
    assert await lapsed_jobs(connections, 0) == [job.store.job_id]
    assert (await job.store.watch("proxy")).state is None
    assert await connections.command(0, "EXISTS", REGISTRY) == 0


async def test_all_lapsed_jobs_are_told_of(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "MOST_LAPSED", 2)
    for count in range(6):
        assert len(await lapsed_jobs(connections, 0)) == count
        await connections.command(0, "ZADD", REGISTRY, count, f"job-{count}")
    await connections.command(0, "DEL", REGISTRY)


async def test_what_is_retired_keeps_its_results_for_a_while(
    job: Job, connections: Connections
) -> None:
    await job.create(records=[("0", [0])], tasks=2, want=2, result_ttl=5, manifest=b"m")
    await job.store.begin("0", "n")
    big, parts = payload(0, FRAME, writer="0-1", inline_limit=10, part_size=40)
    await job.store.put([*parts, ("b0", FRAME)], 600)
    commit = Commit(passed=1, publish=((0, 1),), results=(0,), arrivals=((1, 1, 1),))
    await job.send("0", 1, 1, commit, {0: big})
    assert not await job.store.retire(), "it runs"
    await job.commit("0", 1, 2, Commit(passed=1, reads=((0, 1),), results=(1,)))
    for _ in range(2):
        assert await job.store.retire()
        outcome = await job.store.outcome()
        assert outcome.state is JobState.DONE
        frames = await job.store.resolve(outcome.results)
        assert frames == {0: wire.join(FRAME), 1: VALUE.inline}
        assert await job.store.notes("manifest") == [b"m"]
    keys = await connections.command(0, "KEYS", "*")
    assert len(keys) == 3 + len(parts), keys
    for key in keys:
        assert 0 < await connections.command(0, "PTTL", key) <= 5000, key
    assert await job.store.put([("o1.0", FRAME)], 600) is Status.CLOSED
    # A late copy of what had been written in time deletes nothing.
    assert await job.store.put(parts, 600) is Status.CLOSED
    assert await job.store.resolve(outcome.results) == frames
    assert len(await connections.command(0, "KEYS", "*")) == len(keys)
    assert not (await job.store.watch("somebody")).owned
    assert await lapsed_jobs(connections, 0) == []


async def test_of_a_failure_only_the_words_are_kept(job: Job, connections: Connections) -> None:
    await job.create(result_ttl=5)
    await job.store.put([("b0", FRAME)], 600)
    await job.store.cancel(JobState.FAILED, b"because")
    assert await job.store.retire()
    assert (await job.store.outcome()).error == b"because"
    assert len(await connections.command(0, "KEYS", "*")) == 1


async def test_a_finisher_that_dies_half_way_is_succeeded(
    job: Job, connections: Connections
) -> None:
    await job.create(result_ttl=5, manifest=b"m")
    await job.store.cancel(JobState.FAILED, b"because")
    assert await job.store._close(0, "finish")
    assert await job.store.notes("manifest", "error") == [None, b"because"]
    # Its client has had what it wanted: nothing of it has to be kept.
    assert await job.store.retire()
    assert await connections.command(0, "KEYS", "*") == []


async def test_what_a_client_has_uploaded_before_it_died_expires(
    job: Job, connections: Connections
) -> None:
    await job.store.open(600)
    await job.store.put([("b0", FRAME), ("b1", FRAME)], 600)
    keys = await connections.command(0, "KEYS", "*")
    assert len(keys) == 4, "the mark, the index and two objects"
    for key in keys:
        assert 0 < await connections.command(0, "PTTL", key) <= 600_000, key


async def test_who_begins_notices_that_nobody_knows_what_is_taken(
    job: Job, connections: Connections
) -> None:
    await job.create()
    await connections.command(0, "DEL", f"wukong:{{{job.store.job_id}}}:taken")
    assert (await job.store.begin("0", "n")).status is Status.GONE
    assert wire.unpack((await job.store.outcome()).error)[0] == b"data"


@pytest.mark.parametrize("key", ["live", "rec", "open"])
async def test_a_watcher_notices_what_the_server_has_lost(
    job: Job, connections: Connections, key: str
) -> None:
    await job.create()
    await job.expire("0", "1")
    await connections.command(0, "DEL", f"wukong:{{{job.store.job_id}}}:{key}")
    assert (await job.store.watch()).state is JobState.FAILED
    assert wire.unpack((await job.store.outcome()).error)[0] == b"data"


async def test_the_end_is_announced_to_all_who_listen(job: Job, connections: Connections) -> None:
    assert not await job.store.listen("nothing")
    await job.create()
    for channel in ("first", "second", "first"):
        assert await job.store.listen(channel)
    assert await job.store.notes("channel") == [b"channel first second"]
    async with connections.client(0).pubsub() as subscription:
        await subscription.subscribe("second")
        await job.store.cancel(JobState.CANCELLED, b"")
        async for message in subscription.listen():
            if message["type"] == "message":
                break
    assert message["data"] == job.store.job_id.encode()


async def test_a_change_of_state_is_announced(job: Job, connections: Connections) -> None:
    async with connections.client(0).pubsub() as subscription:
        await subscription.subscribe("channel")
        await job.create()
        await job.store.cancel(JobState.CANCELLED, b"")
        messages = []
        async for message in subscription.listen():
            messages.append((message["type"], message["data"]))
            if message["type"] == "message":
                break
    assert messages[-1] == ("message", job.store.job_id.encode())


@pytest.mark.parametrize("width", [10, 10_000])
async def test_wide_commits(job: Job, width: int) -> None:
    """More values than Lua's unpack takes."""
    await job.create(records=[("0", list(range(width)))], tasks=width + 1)
    await job.store.begin("0", "n")
    publish = tuple((i, 1) for i in range(width))
    commit = Commit(stay=(), passed=width, publish=publish, arrivals=((width, width + 1, width),))
    assert (await job.send("0", 1, 1, commit, dict.fromkeys(range(width), VALUE))).gone
    assert set((await job.store.read(range(width))).values()) == {VALUE.inline}


async def test_a_wide_fan_in_reads_and_frees_everything(job: Job) -> None:
    width = 5000
    await job.create(records=[("0", list(range(width)))], tasks=width + 1)
    await job.store.begin("0", "n")
    publish = tuple((i, 1) for i in range(width))
    commit = Commit(stay=(), passed=width, publish=publish, arrivals=((width, width, width),))
    reply = await job.send("0", 1, 1, commit, dict.fromkeys(range(width), VALUE))
    assert reply.claims == (width,)
    reads = tuple((i, 1) for i in range(width))
    await job.commit("0", 1, 2, Commit(stay=(), passed=1, reads=reads, results=(width,)))
    assert await job.state() is JobState.DONE
    assert await job.store.read([0, width - 1]) == {0: None, width - 1: None}


async def test_jobs_do_not_see_each_other(connections: Connections) -> None:
    jobs = [Job(connections) for _ in range(2)]
    for each in jobs:
        await each.create()
    assert (await jobs[0].store.begin("0", "n")).status is Status.OK
    await jobs[0].end()
    assert await jobs[1].state() is JobState.RUNNING
    assert (await jobs[1].store.begin("0", "n")).generation == 1
    await jobs[1].end()


async def test_many_at_once_claim_once(job: Job) -> None:
    width = 32
    records: Sequence[tuple[str, Sequence[int]]] = [(str(i), [i]) for i in range(width)]
    await job.create(records=records, slots=width, tasks=width + 1)

    async def leaf(i: int) -> Reply:
        await job.store.begin(str(i), "n")
        commit = Commit(stay=(), passed=1, publish=((i, 1),), arrivals=((99, width, 1),))
        return await job.commit(str(i), 1, 1, commit)

    replies = await asyncio.gather(*(leaf(i) for i in range(width)))
    assert sum(reply.claims == (99,) for reply in replies) == 1


# Commits that pass nothing --------------------------------------------------------------------


async def revive(job: Job, nonce: str, generation: int = 2) -> Begun:
    """Somebody else goes on with record 0."""
    await job.expire("0")
    begun = await job.store.begin("0", nonce)
    assert (begun.status, begun.generation) == (Status.OK, generation)
    return begun


async def say(job: Job, nonce: str, generation: int, sequence: int, commit: Commit) -> Reply:
    """A commit of record 0, with small values."""
    return await job.commit("0", generation, sequence, commit, nonce)


async def test_what_a_successor_brings_again_counts_once(job: Job) -> None:
    await job.create(records=[("0", [0, 1])], tasks=9)
    begun = await job.store.begin("0", "a")
    assert not begun.check
    told = Commit(publish=((0, 1),), arrivals=((5, 3, (10, 11)),))
    assert await say(job, "a", 1, 1, told) == Reply(Status.OK, free=1)
    assert (await revive(job, "b")).check
    assert (await say(job, "b", 2, 2, told)).claims == ()
    last = Commit(arrivals=((5, 3, (12,)),))
    assert (await say(job, "b", 2, 3, last)).claims == (5,)
    assert (await say(job, "b", 2, 4, last)).claims == (), "it is taken"
    assert (await revive(job, "c", 3)).frontier == (0, 1, 5)


async def test_a_successor_is_told_what_is_taken_only_if_it_matters(job: Job) -> None:
    await job.create(records=[("0", [0, 1])], tasks=9)
    await job.store.begin("0", "a")
    assert not (await revive(job, "b")).check, "nobody has told anything"
    await say(job, "b", 2, 1, Commit(arrivals=((5, 1, (10,)),)))
    begun = await revive(job, "c", 3)
    assert begun.check
    assert [task for task in range(16) if has_bit(begun.taken, task)] == [0, 1, 5]


async def test_a_probe_of_the_last_inputs_claims_and_marks_them(job: Job) -> None:
    await job.create(records=[("0", [0, 1])], tasks=9, attempts=9)
    await job.store.begin("0", "a")
    await say(job, "a", 1, 1, Commit(publish=((8, 1),), arrivals=((5, 3, (12,)),)))
    probe = Commit(probes=((5, 3, ((10, 0), (11, 1))),))
    assert await say(job, "a", 1, 2, probe) == Reply(Status.OK, (5,), free=1)
    assert (await revive(job, "b")).marks == ((5, (0, 1)),)
    await say(job, "b", 2, 3, Commit(publish=((0, 1),)))
    assert (await revive(job, "c", 3)).marks == ((5, (1,)),), "what is published is marked no more"
    await say(job, "c", 3, 4, Commit(publish=((1, 1),)))
    assert (await revive(job, "d", 4)).marks == ()


async def test_a_probe_that_is_not_the_last_changes_nothing(job: Job) -> None:
    await job.create(records=[("0", [0, 1])], tasks=9)
    await job.store.begin("0", "a")
    probe = Commit(probes=((5, 3, ((10, 0), (11, 1))),))
    for sequence in (1, 2):
        assert await say(job, "a", 1, sequence, probe) == Reply(Status.OK, free=1)
    arrive = Commit(arrivals=((5, 3, (10, 11)),))
    assert (await say(job, "a", 1, 3, arrive)).claims == ()
    assert (await say(job, "a", 1, 4, Commit(arrivals=((5, 3, (12,)),)))).claims == (5,)


async def test_a_probe_says_which_inputs_were_brought_already(job: Job) -> None:
    await job.create(records=[("0", [0, 1])], tasks=9)
    await job.store.begin("0", "a")
    await say(job, "a", 1, 1, Commit(publish=((0, 1),), arrivals=((5, 2, (10,)),)))
    probe = Commit(probes=((5, 2, ((10, 0), (11, 1))),))
    reply = await say(job, "a", 1, 2, probe)
    assert (reply.already, reply.claims) == ((10,), (5,))
    assert (await revive(job, "b")).marks == ((5, (1,)),), "the other one is in the store"
    assert (await say(job, "b", 2, 3, probe)).already == (10, 11), "all of a taken one"


async def test_offers_are_accepted_while_there_are_slots(job: Job) -> None:
    await job.create(records=[("0", [0, 1, 2])], tasks=9, slots=2)
    await job.store.begin("0", "a")
    reply = await say(job, "a", 1, 1, Commit(offers=((1,), (2, 3))))
    assert (reply.accepted, reply.free, reply.gone) == ((True, False), 0, False)
    child = await job.store.begin("0.1.0", "c")
    assert (child.status, child.frontier, child.check) == (Status.OK, (1,), False)
    assert (await job.store.begin("0.1.1", "c")).status is Status.GONE
    begun = await revive(job, "b")
    assert begun.frontier == (0, 2)
    taken = [task for task in range(16) if has_bit(begun.taken, task)]
    assert taken == [0, 1, 2], "nobody has got the last one"
    for _ in range(2):
        again = await say(job, "b", 2, 2, Commit(offers=((2,),)))
        assert again.accepted == (False,)


async def test_the_children_of_a_successor_check_too(job: Job) -> None:
    await job.create(records=[("0", [0, 1])], tasks=9, slots=3)
    await job.store.begin("0", "a")
    await say(job, "a", 1, 1, Commit(arrivals=((5, 2, (10,)),)))
    await revive(job, "b")
    assert (await say(job, "b", 2, 2, Commit(offers=((1,),)))).accepted == (True,)
    assert (await job.store.begin("0.2.0", "c")).check


async def test_who_hands_everything_over_is_gone(job: Job) -> None:
    await job.create(records=[("0", [0])], tasks=9, slots=2)
    await job.store.begin("0", "a")
    reply = await say(job, "a", 1, 1, Commit(offers=((0,),)))
    assert (reply.accepted, reply.gone, reply.free) == ((True,), True, 1)
    assert await job.state() is JobState.RUNNING


async def test_a_record_that_is_given_back_can_be_taken_at_once(job: Job) -> None:
    await job.create(records=[("0", [0, 1])], tasks=9, attempts=2)
    for turn in range(5):
        begun = await job.store.begin("0", f"nonce {turn}")
        assert (begun.status, begun.sequence) == (Status.OK, turn), "and it is no attempt"
        release = Commit(stay=((0, ()), (1, (7,))), release=True)
        generation, sequence = begun.generation, turn + 1
        reply = await say(job, f"nonce {turn}", generation, sequence, release)
        assert (reply.status, reply.gone) == (Status.OK, False)
        assert (await say(job, f"nonce {turn}", generation, sequence, release)).status is (
            Status.FENCED
        )
        assert await job.store.renew("0", generation, f"nonce {turn}") is Status.FENCED
        assert (begun.frontier, begun.marks) == ((0, 1), ((1, (7,)),) if turn else ())


async def test_an_object_that_was_freed_is_not_written_back(job: Job) -> None:
    await job.create(records=[("0", [0, 1])], tasks=9)
    await job.store.begin("0", "a")
    first, _ = payload(0, FRAME, writer="a", inline_limit=10, part_size=1000)
    second, _ = payload(0, FRAME, writer="b", inline_limit=10, part_size=1000)
    told = Commit(publish=((0, 1),))
    await job.send("0", 1, 1, told, {0: first}, "a")
    await revive(job, "b")
    # While the first copy is there, it stays; and its reader frees it for good.
    reply = await job.send("0", 2, 2, told, {0: second}, "b")
    assert reply.deletes == ((0, second.place),)
    read = Commit(stay=((0, ()), (1, ())), reads=((0, 1),))
    assert (await say(job, "b", 2, 3, read)).deletes == ((0, first.place),)
    await revive(job, "c", 3)
    reply = await job.send("0", 3, 4, told, {0: second}, "c")
    assert reply.deletes == ((0, second.place),)
    assert await job.store.look([0]) == {0: None}


async def test_a_result_points_to_what_was_published_first(job: Job) -> None:
    await job.create(records=[("0", [0, 1])], tasks=2)
    await job.store.begin("0", "a")
    first, _ = payload(0, FRAME, writer="a", inline_limit=10, part_size=1000)
    second, _ = payload(0, FRAME, writer="b", inline_limit=10, part_size=1000)
    told = Commit(publish=((0, 1),), held=frozenset({0}))
    await job.send("0", 1, 1, told, {0: first}, "a")
    await revive(job, "b")
    passing = Commit(passed=2, stay=(), publish=((0, 1),), results=(0,), reads=((0, 1),))
    reply = await job.send("0", 2, 2, passing, {0: second}, "b")
    assert reply.deletes == ((0, second.place),), "the reader has passed, but it is held"
    assert (await job.store.outcome()).results == {0: first.inline}


async def test_progress_makes_up_for_attempts(job: Job) -> None:
    await job.create(records=[("0", [0])], tasks=9, attempts=2)
    for n in range(4):
        begun = await job.store.begin("0", f"nonce {n}")
        assert begun.status is Status.OK
        commit = Commit(passed=1, stay=(), arrivals=((n + 1, 1, 1),))
        await say(job, f"nonce {n}", n + 1, n + 1, commit)
        assert await job.lease("0") <= 60, "and a lease is as long as at first"
        await job.expire("0")


async def test_everything_that_a_soft_commit_creates_expires(
    job: Job, connections: Connections
) -> None:
    async def all_expire() -> set[str]:
        keys = await connections.command(0, "KEYS", "*")
        for key in keys:
            assert 0 < await connections.command(0, "PTTL", key) <= 600_000, key
        return {key.decode().rpartition(":")[2] for key in keys}

    await job.create(records=[("0", [0, 1])], tasks=9, slots=3)
    assert "taken" in await all_expire()
    await job.store.begin("0", "a")
    steps = (
        Commit(publish=((0, 1),), arrivals=((5, 2, (10,)),)),
        Commit(probes=((6, 1, ((20, 1),)),)),
        Commit(offers=((1,),)),
        Commit(stay=((0, ()),), reads=((0, 1),), arrivals=((7, 2, 1),)),
    )
    for sequence, commit in enumerate(steps, 1):
        assert (await say(job, "a", 1, sequence, commit)).status is Status.OK
        names = await all_expire()
    assert names >= {"arr", "taken", "dead", "cnt", "rec", "live"}
