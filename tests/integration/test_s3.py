"""A job's objects in a bucket, whoever comes too late."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from tests.conftest import S3
from tests.integration.jobs import new_job
from wukong_async import wire
from wukong_async.blocks import PlanFacts
from wukong_async.errors import BucketError, StoreUnreachable
from wukong_async.protocol import Commit, JobState, Payload, Status
from wukong_async.store import Bucket, Connections, JobStore, Place, commit_body, payload, place_of
from wukong_async.store import s3 as s3_module
from wukong_async.store.s3 import PART, Buckets
from wukong_async.watcher import Watcher

FRAME = [b"\x01", bytes(1000)]


class Job:
    """A job whose client knows of a bucket."""

    def __init__(self, connections: Connections, s3: S3) -> None:
        self.bucket = Bucket(s3.name, "some/prefix-", "us-east-1", s3.url)
        self.store = JobStore(connections, secrets.token_hex(4))
        self.store.bucket = self.bucket.url

    async def create(self) -> None:
        await self.store.open(600)
        facts = PlanFacts((), (), 0, 0, 600.0, bucket=self.bucket.url)
        new = new_job(facts=facts.pack(), tasks=1, records=[("0", [0])], manifest=b"\x01m")
        assert await self.store.create(new) is Status.OK

    async def put(
        self, number: int, segments: wire.Segments, writer: str = "n"
    ) -> tuple[Payload, Status]:
        stored, objects = payload(
            number, segments, writer=writer, inline_limit=0, part_size=10, bucket=self.bucket.url
        )
        return stored, await self.store.put(objects, 600)

    async def put_all(self, *numbers: int) -> dict[int, Payload]:
        payloads = {}
        for number in numbers:
            payloads[number], status = await self.put(number, FRAME)
            assert status is Status.OK
        return payloads

    async def end(self) -> None:
        await self.store.cancel(JobState.CANCELLED, b"")

    def names(self, *numbers: int) -> list[str]:
        return [f"some/prefix-{self.store.job_id}/o{number}.n" for number in numbers]


@pytest.fixture
async def job(connections: Connections, s3: S3) -> AsyncIterator[Job]:
    made = Job(connections, s3)
    await made.create()
    yield made
    await made.end()
    assert await made.store.finish()


def test_a_url_says_where_a_bucket_is() -> None:
    for bucket in (
        Bucket("b", "wukong/", "eu-west-1"),
        Bucket("b.c", "", "us-east-1", "http://[::1]:90/?x=&y"),
        Bucket("b", "a b/é&?#", "us-east-1"),
    ):
        assert Bucket.from_url(bucket.url) == bucket
        place = Place(7, "w", 1, 5, bucket.url)
        assert place_of(7, place.pointer) == place
        assert Place.from_token(7, place.token).names == place.names
        assert place.names[0].rpartition("#")[0] == bucket.url


@pytest.mark.parametrize("size", [1, PART, PART + 1, 3 * PART - 1])
async def test_objects_of_all_sizes_there_and_back(job: Job, s3: S3, size: int) -> None:
    content = random.Random(size).randbytes(size)
    segments: wire.Segments = [content[: size // 3], memoryview(content)[size // 3 :]]
    stored, status = await job.put(0, segments)
    assert status is Status.OK
    assert s3.names() == job.names(0)
    place = place_of(0, stored.inline)
    assert place is not None
    assert await job.store.fetch([place]) == {0: content}
    await job.store.delete([(0, stored.place)])
    assert s3.names() == []
    assert await job.store.fetch([place]) == {0: None}


async def test_an_object_of_another_length_is_a_missing_one(job: Job) -> None:
    await job.put_all(0)
    for size in (wire.size(FRAME) - 1, wire.size(FRAME) + 1, 2 * PART):
        assert await job.store.fetch([Place(0, "n", 1, size, job.bucket.url)]) == {0: None}


async def test_nothing_is_left_when_a_job_is_finished(
    job: Job, s3: S3, connections: Connections
) -> None:
    await job.put_all(*range(5))
    assert not await job.store.finish(), "it runs"
    assert len(s3.names()) == 5
    await job.end()
    assert await job.store.finish()
    assert s3.names() == []
    assert await connections.command(0, "DBSIZE") == 0


async def test_a_clean_up_that_died_is_succeeded(
    job: Job, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dies(*_: object) -> None:
        raise StoreUnreachable("in the middle")

    await job.put_all(*range(5))
    await job.end()
    with monkeypatch.context() as patched:
        patched.setattr(Buckets, "sweep", dies)
        with pytest.raises(StoreUnreachable):
            await job.store.finish()
    assert len(s3.names()) == 5
    assert await job.store.finish()
    assert s3.names() == []


async def test_results_stay_when_a_job_is_retired(job: Job, s3: S3) -> None:
    payloads = await job.put_all(0, 1, 2)
    begun = await job.store.begin("0", "n")
    body = commit_body(Commit(stay=(), passed=1, results=(0,)), payloads, told=begun.told)
    assert (await job.store.commit("0", 1, "n", 1, body)).gone
    # Whoever takes a job over knows of the bucket from the plan, and from the pointers.
    other = JobStore(job.store._connections, job.store.job_id)
    for _ in range(2):
        watcher = await Watcher.of_another(other, cast(Any, None), cast(Any, None))
        await watcher.retire()
        assert s3.names() == job.names(0)
    results = (await other.outcome()).results
    assert await other.resolve(results) == {0: wire.join(FRAME)}
    assert await job.store.finish()
    assert s3.names() == []


async def test_what_comes_when_the_job_is_over_is_taken_back(
    job: Job, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Buckets.put

    async def late(*args: object) -> None:
        await job.end()
        await job.store.finish()
        await put(*args)  # type: ignore[arg-type]
        assert s3.names() == job.names(7)

    monkeypatch.setattr(Buckets, "put", late)
    _, status = await job.put(7, FRAME)
    assert status is Status.CLOSED
    assert s3.names() == []
    monkeypatch.setattr(Buckets, "put", None)
    assert (await job.put(7, FRAME))[1] is Status.CLOSED, "and is not even begun"


async def test_a_job_without_objects_there_does_not_look(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    await job.end()
    monkeypatch.setattr(s3_module, "import_module", None)
    assert await job.store.finish()


async def test_an_upload_in_parts_that_fails_is_aborted(
    job: Job, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = wire.join
    joined = 0

    def join(segments: wire.Segments) -> bytes:
        nonlocal joined
        joined += 1
        if joined == 2:
            raise OSError("in the second part")
        return whole(segments)

    monkeypatch.setattr(wire, "join", join)
    with pytest.raises(StoreUnreachable, match="in the second part"):
        await job.store._connections.buckets.put(job.bucket, "key", [bytes(PART), b"x"])
    assert s3.uploads() == []


async def test_a_server_that_is_not_there(
    connections: Connections, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "ATTEMPTS", 1)
    bucket = Bucket("b", "", "us-east-1", "http://127.0.0.1:1")
    for asked in (
        connections.buckets.put(bucket, "k", FRAME),
        connections.buckets.get(bucket, "k", 10),
    ):
        with pytest.raises(StoreUnreachable, match=r"The bucket 'b' \(wukong.s3_bucket\) does not"):
            await asked
    await connections.buckets.delete(bucket, ["k"])
    await connections.buckets.sweep(bucket, "k")


async def test_a_deletion_does_not_wait_for_ever(
    connections: Connections, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "PATIENCE", 0.2)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1000):
            pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        bucket = Bucket("b", "", "us-east-1", f"http://127.0.0.1:{port}")
        await connections.buckets.delete(bucket, ["k"])
        await connections.buckets.sweep(bucket, "k")
        await connections.buckets.aclose()


@pytest.mark.parametrize("name", ["no-such-bucket", "no such bucket"])
async def test_a_bucket_that_cannot_be(connections: Connections, s3: S3, name: str) -> None:
    bucket = Bucket(name, "", "us-east-1", s3.url)
    for asked in (
        connections.buckets.put(bucket, "k", FRAME),
        connections.buckets.put(bucket, "k", [bytes(PART + 1)]),
        connections.buckets.get(bucket, "k", 10),
    ):
        with pytest.raises(BucketError, match=rf"The bucket '{name}' \(wukong.s3_bucket\) cannot"):
            await asked
    await connections.buckets.delete(bucket, ["k"])
