"""One job in the store: the scripts of the protocol, and its objects on the data shards.

How values and commits look there is said in values.py.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from msgpack.exceptions import UnpackException
from redis.asyncio import Redis
from redis.exceptions import RedisError

from wukong_async import wire
from wukong_async.compression import bandwidth
from wukong_async.config import Settings
from wukong_async.protocol import (
    Begun,
    JobState,
    Outcome,
    Reply,
    Status,
    Watch,
)
from wukong_async.store import bulk, scripts
from wukong_async.store.connections import Connections
from wukong_async.store.s3 import Bucket, is_elsewhere
from wukong_async.store.values import MANIFEST, Place, place_of

BATCH_BYTES = Settings.part_size
"""Most bytes that one request writes or asks for: bounds the buffers on both sides, and a request
has to get through before its connection is taken for dead, however slow the line is."""
BATCH_OBJECTS = 5000
SMALL_VALUE = Settings.inline_limit
"""Bytes that an inline value is reckoned with: the default."""
METADATA = (
    "job",
    "live",
    "rec",
    "cnt",
    "refs",
    "val",
    "res",
    "open",
    "arr",
    "taken",
    "dead",
)
MARK = "s3"
"""In the index of a job beside its metadata: that it has objects in a bucket as well."""
MARK_TTL = 3600.0
"""Seconds that it outlives a clean-up that has not come to its end."""
REGISTRY = "wukong:jobs"
"""On each server, its jobs and when the leases of their owners are over."""
SEEN = "wukong:seen:"
"""Before the name of tasks; on each server, what they were like in the jobs whose metadata it has
had."""
SEEN_TIMEOUT = 1.0
"""Seconds to write that."""
SEEN_TTL = 7 * 24 * 3600.0
"""Seconds for which that is remembered."""
MOST_LAPSED = 100
"""Jobs without an owner that one request asks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """What `create` needs. Times are seconds."""

    tasks: int
    want: int
    """Distinct tasks whose values are results."""
    channel: str
    """Where changes of state are announced."""
    slots: int
    lease: float
    grace: float
    attempts: int
    unstarted: int
    ttl: float
    facts: bytes
    """For the executors; opaque here."""
    values: Sequence[tuple[int, bytes]]
    """(literal, pointer): values of the plan that are objects of their own."""
    records: Sequence[tuple[str, Sequence[int]]]
    """(executor, frontier)."""
    timeout: float | None = None
    """How long it may run."""
    owner: str = ""
    """The token of whoever cleans up; see `watch`."""
    result_ttl: float = Settings.result_ttl
    """How long the results outlive the job if its owner is gone."""
    manifest: bytes = b""
    """What of the results others have to know; opaque here. A stored value."""
    versions: bytes = b""
    """What the client speaks; opaque here."""

    @property
    def taken(self) -> bytes:
        """The tasks of these frontiers, as bits."""
        tasks = [task for _, frontier in self.records for task in frontier]
        bits = bytearray((max(tasks, default=-1) >> 3) + 1)
        for task in tasks:
            bits[task >> 3] |= 0x80 >> (task & 7)
        return bytes(bits)


async def lapsed_jobs(connections: Connections, shard: int) -> list[str]:
    """Jobs of a server whose owner has fallen silent: whoever watches one takes it over."""
    found: list[str] = []
    while True:
        answer = await connections.call(shard, scripts.LAPSED, [REGISTRY], len(found), MOST_LAPSED)
        found += [job_id.decode() for job_id in answer]
        if len(answer) < MOST_LAPSED:
            return found


class JobStore:
    """What can be said to the store about job `job_id`."""

    bucket = ""
    """The URL of the bucket that has its largest objects, if there is one: to clean up there. Its
    client knows; for others it is one of the facts of the plan."""

    def __init__(self, connections: Connections, job_id: str) -> None:
        self.job_id = job_id
        self._connections = connections
        self._shard = connections.shard(job_id)
        self._metadata = [*(self._key(name) for name in METADATA), REGISTRY]

    def __repr__(self) -> str:
        return f"<JobStore {self.job_id} on {self._connections!r}>"

    @property
    def bandwidth(self) -> float:
        """Bytes per second to the servers, as far as their URLs tell."""
        return bandwidth(self._connections.endpoints)

    # Metadata ---------------------------------------------------------------------------------

    async def create(
        self, job: NewJob, objects: Sequence[tuple[str, wire.Segments]] = ()
    ) -> Status:
        """Create the job with its first records. OK or GONE.

        Parameters
        ----------
        objects
            What is to be put before, if it has not been yet: perhaps in the same round trip.

        Raises
        ------
        BucketError
        """
        body = [
            self.job_id,
            job.channel,
            job.tasks,
            job.want,
            job.slots,
            _ms(job.lease),
            _ms(job.grace),
            job.attempts,
            job.unstarted,
            _ms(job.ttl),
            job.facts,
            job.values,
            [[executor, wire.pack(list(frontier))] for executor, frontier in job.records],
            job.taken,
            _ms(job.timeout or 0),
            job.owner,
            _ms(job.result_ttl),
            job.manifest,
            job.versions,
        ]
        packed = wire.pack(body)
        if objects and self._fit_into_one_request(objects):
            script = ("EVALSHA", scripts.CREATE.sha, len(self._metadata), *self._metadata)
            # It says GONE where the objects cannot be put.
            _, answer = await self._write(self._shard, objects, job.ttl, (*script, packed))
            return Status(answer.decode())
        if objects and await self.put(objects, job.ttl) is not Status.OK:
            return Status.GONE
        return Status((await self._call(scripts.CREATE, packed)).decode())

    async def begin(self, executor: str, nonce: str, request_id: str = "") -> Begun:
        """Take a record. OK, GONE or HELD."""
        answer = await self._call(scripts.BEGIN, executor, nonce, request_id)
        status = Status(answer[0].decode())
        if status is not Status.OK:
            return Begun(status)
        _, generation, sequence, told, lease, facts, frontier, marks, free, taken = answer
        return Begun(
            status,
            generation,
            sequence,
            told.decode(),
            lease / 1000,
            tuple(wire.unpack(frontier)),
            tuple((task, tuple(inputs)) for task, inputs in wire.unpack(marks)),
            facts,
            taken is not None,
            taken or b"",
            free,
        )

    async def commit(
        self, executor: str, generation: int, nonce: str, sequence: int, body: bytes
    ) -> Reply:
        """Send a commit made by `commit_body`. OK, FENCED, STOP, STALE or REJECTED."""
        answer = await self._call(scripts.COMMIT, executor, generation, nonce, sequence, body)
        status, claims, deletes, gone, accepted, already, free = wire.unpack(answer)
        return Reply(
            Status(status.decode()),
            tuple(claims),
            tuple((number, place.decode()) for number, place in deletes),
            gone,
            tuple(accepted),
            tuple(already),
            free,
        )

    async def renew(
        self, executor: str, generation: int, nonce: str, last_words: bytes = b""
    ) -> Status:
        """Extend a lease, and leave last words, if any. OK, FENCED or STOP."""
        answer = await self._call(scripts.RENEW, executor, generation, nonce, last_words)
        return Status(answer.decode())

    async def watch(self, owner: str = "", most: int = 1000) -> Watch:
        """Revive executors whose lease is over and keep the job from expiring.

        Parameters
        ----------
        owner
            The watcher's token, which takes the job over from an owner who has fallen silent;
            default: only watch.
        """
        answer = await self._call(scripts.WATCH, most, owner)
        if not answer:
            return Watch(None)
        state, passed, live, extended, revived, unheard, owned, pause = answer
        return Watch(
            JobState(state.decode()),
            tuple(executor.decode() for executor in revived),
            passed,
            live,
            extended / 1000,
            unheard,
            bool(owned),
            pause / 1000,
        )

    async def cancel(self, state: JobState, error: bytes) -> JobState | None:
        """End a running job. The job's state afterwards; None if it is unknown."""
        answer = await self._call(scripts.CANCEL, error, state.value)
        return JobState(answer.decode()) if answer else None

    async def outcome(self) -> Outcome:
        """How the job ended; while it runs, only its state."""
        answer = await self._call(scripts.OUTCOME)
        if not answer:
            return Outcome(None)
        state = JobState(answer[0].decode())
        if state is JobState.RUNNING:
            return Outcome(state)
        _, error, tasks, passed, commits, begins, peak, memory, flat = answer
        results = {int(flat[i]): flat[i + 1] for i in range(0, len(flat), 2)}
        return Outcome(state, error, results, tasks, passed, commits, begins, peak, memory)

    async def finish(self) -> bool:
        """Delete everything of a job that has ended, its metadata last; False if it runs."""
        elsewhere = await self._is_marked()
        if not elsewhere and len(self._connections) == 1:
            return await self._close_and_forget()
        # This one knows whether it runs; a job that has ended never runs again.
        mark = [self._key(MARK)] if elsewhere else []
        if not await self._close(self._shard, "finish", _ms(MARK_TTL) if mark else 0, mark):
            return False
        if elsewhere:
            # Until nothing is left there the mark stays, for whoever succeeds us.
            await self._sweep(())
            await self._close(self._shard, "finish")
        shards = set(range(len(self._connections))) - {self._shard}
        await asyncio.gather(*(self._close(shard, "finish") for shard in shards))
        await self._call(scripts.FINISH)
        return True

    async def retire(self, stays: Iterable[str] = ()) -> bool:
        """Delete of a job that has ended what nobody can ask for any more; False if it runs.

        The results stay for `result_ttl`, and so does what it takes to read them; unless its client
        has them, and was about to delete them.

        Parameters
        ----------
        stays
            More objects to keep.
        """
        outcome = await self.outcome()
        ttl, manifest = await self.notes("result_ttl", "manifest")
        if outcome.state is JobState.RUNNING:
            return False
        if manifest is None:  # Its client has the results, and has begun to delete it.
            return await self.finish()
        stored = [*outcome.results.items(), (MANIFEST, manifest)]
        places = [place_of(number, value) for number, value in stored]
        kept = [*stays, *(name for place in places if place for name in place.names)]
        names = [self._key(name) for name in kept]
        shards = range(len(self._connections))
        elsewhere = await self._is_marked()
        if elsewhere:
            names.append(self._key(MARK))
        await asyncio.gather(*(self._close(s, "retire", int(ttl or 0), names) for s in shards))
        if elsewhere:
            await self._sweep(name for name in kept if is_elsewhere(name))
        await self._call(scripts.RETIRE)
        return True

    async def listen(self, channel: str) -> bool:
        """Have the job's end announced on `channel` as well; False if there is no such job."""
        return bool(await self._call(scripts.LISTEN, channel) == b"OK")

    async def notes(self, *names: str) -> list[bytes | None]:
        """Fields of the job: `manifest`, `versions`, …; None for what is not there."""
        words = ("HMGET", self._key("job"), *names)
        found: list[bytes | None] = await self._connections.command(self._shard, *words)
        return found

    async def count(self) -> tuple[JobState | None, int, int, int]:
        """The job's state (None: unknown), its tasks, those that have passed, live executors."""
        state, tasks, passed = await self.notes("state", "tasks", "passed")
        if state is None:
            return None, 0, 0, 0
        live = await self._connections.command(self._shard, "ZCARD", self._key("live"))
        return JobState(state.decode()), int(tasks or 0), int(passed or 0), live

    async def is_open(self) -> bool:
        """Whether the other servers have the mark without which the job cannot write there.

        `watch` looks for the one beside the metadata.
        """
        words = ("EXISTS", self._key("open"))
        others = (s for s in range(len(self._connections)) if s != self._shard)
        return all(await asyncio.gather(*(self._connections.command(s, *words) for s in others)))

    async def extend(self, ttl: float) -> None:
        """Keep the job's objects on the data shards from expiring."""
        shards = range(len(self._connections))
        await asyncio.gather(
            *(self._connections.call(s, scripts.EXTEND, self._index(), _ms(ttl)) for s in shards)
        )

    async def remember(self, seen: Mapping[str, Sequence[float]]) -> None:
        """Keep for other jobs what tasks are like, by name. No key of the job.

        Once, and if that fails it is not worth a second try.
        """
        client = self._connections.client(self._shard)
        with suppress(RedisError, OSError, TimeoutError):
            async with asyncio.timeout(SEEN_TIMEOUT), client.pipeline(transaction=False) as pipe:
                for name, figures in seen.items():
                    pipe.set(f"{SEEN}{name}", wire.pack(list(figures)), px=_ms(SEEN_TTL))
                await pipe.execute()

    # Objects ----------------------------------------------------------------------------------

    async def open(self, ttl: float, names: Sequence[str] = ()) -> dict[str, Any]:
        """Allow writes for this job, on every shard.

        Parameters
        ----------
        names
            Of tasks.

        Returns
        -------
        dict
            What is remembered of them (see `remember`), perhaps by another version. Empty where the
            server's user may not read it: it only saves time.
        """
        words = ("SET", self._key("open"), 1, "PX", _ms(ttl))
        others = set(range(len(self._connections))) - {self._shard}
        recall = partial(_open_and_recall, words=words, names=names)
        recalled, *_ = await asyncio.gather(
            self._connections.ask(self._shard, recall),
            *(self._connections.command(shard, *words) for shard in others),
        )
        seen: dict[str, Any] = recalled
        return seen

    async def put(self, objects: Iterable[tuple[str, wire.Segments]], ttl: float) -> Status:
        """Write objects. OK or CLOSED; in the latter case the job is over.

        Raises
        ------
        BucketError
        """
        placed: dict[int, list[tuple[str, wire.Segments]]] = {}
        elsewhere: list[tuple[str, wire.Segments]] = []
        for name, segments in objects:
            if is_elsewhere(name):
                elsewhere.append((name, segments))
            else:
                shard = self._connections.shard(self._key(name))
                placed.setdefault(shard, []).append((name, segments))

        async def write(shard: int) -> Status:
            # One batch at a time and shard: more would only pile up in buffers.
            for batch in _batches(placed[shard], lambda item: wire.size(item[1])):
                if await self._put_batch(shard, batch, ttl) is not Status.OK:
                    return Status.CLOSED
            return Status.OK

        writes = [write(shard) for shard in placed]
        if elsewhere:
            writes.append(self._put_elsewhere(elsewhere, ttl))
        statuses = await asyncio.gather(*writes)
        return Status.CLOSED if Status.CLOSED in statuses else Status.OK

    async def get(self, names: Sequence[str], sizes: Sequence[int]) -> list[Any]:
        """Read objects whose sizes in bytes are known, at least roughly, in this order.

        As bytes, or as memory of their own; None for what is not there.
        """
        placed: dict[int, list[tuple[int, str, int]]] = {}
        elsewhere: list[tuple[int, str, int]] = []
        for index, (name, size) in enumerate(zip(names, sizes, strict=True)):
            if is_elsewhere(name):
                elsewhere.append((index, name, size))
                continue
            key = self._key(name)
            placed.setdefault(self._connections.shard(key), []).append((index, key, size))
        found: list[wire.Buffer | None] = [None] * len(names)
        memory = bulk.memory_for(names, sizes)

        async def read(shard: int) -> None:
            for batch in _batches(placed[shard], lambda item: item[2]):
                keys = [key for _, key, _ in batch]
                about = sum(size for _, _, size in batch)
                mine = partial(_of_batch, memory, batch)
                request = partial(bulk.read, keys=keys, about=about, memory=mine)
                values = await self._connections.ask(shard, request)
                for (index, _, _), value in zip(batch, values, strict=True):
                    found[index] = value

        async def read_elsewhere(index: int, name: str, size: int) -> None:
            bucket, key = self._elsewhere(name)
            found[index] = await self._connections.buckets.get(bucket, key, size)

        await asyncio.gather(
            *(read(shard) for shard in placed), *(read_elsewhere(*item) for item in elsewhere)
        )
        return found

    async def delete(self, objects: Iterable[tuple[int, str]]) -> None:
        """Delete objects, given as (object, place)."""
        placed: dict[int, list[str]] = {}
        elsewhere: list[str] = []
        for number, token in objects:
            for name in Place.from_token(number, token).names:
                if is_elsewhere(name):
                    elsewhere.append(name)
                    continue
                key = self._key(name)
                placed.setdefault(self._connections.shard(key), []).append(key)

        await self._delete_elsewhere(elsewhere)

        async def unlink(client: Redis, keys: list[str]) -> None:
            async with client.pipeline(transaction=False) as pipe:
                pipe.unlink(*keys)
                pipe.srem(self._key("idx"), *keys)
                await pipe.execute()

        for shard, keys in placed.items():
            for batch in _batches(keys, lambda _: 0):
                await self._connections.ask(shard, partial(unlink, keys=batch))

    async def read(self, objects: Sequence[int]) -> dict[int, Any]:
        """Objects, as frames; None for what the store does not have (any more)."""
        return await self.resolve(await self.look(objects))

    async def look(self, objects: Sequence[int]) -> dict[int, bytes | None]:
        """What the metadata holds of objects: small values, and pointers to the others.

        None for what is not there (any more).
        """
        stored: dict[int, bytes | None] = {}
        for some in _batches(objects, lambda _: SMALL_VALUE):
            values = await self._connections.command(self._shard, "HMGET", self._key("val"), *some)
            stored.update(zip(some, values, strict=True))
        return stored

    async def fetch(self, places: Sequence[Place]) -> dict[int, wire.Buffer | None]:
        """The frames at these places; None where a part is missing."""
        names = [name for place in places for name in place.names]
        sizes = [size for place in places for size in place.sizes]
        found = iter(await self.get(names, sizes))
        frames: dict[int, wire.Buffer | None] = {}
        for place in places:
            pieces = [piece for _, piece in zip(range(place.parts), found, strict=False)]
            there = [piece for piece in pieces if piece is not None]
            complete = len(there) == place.parts
            frames[place.task] = bulk.whole(there, place.size) if complete else None
        return frames

    async def resolve(self, stored: Mapping[int, bytes | None]) -> dict[int, Any]:
        """Follow the pointers among stored values: frames, or None."""
        places = [
            place
            for task, value in stored.items()
            if value is not None and (place := place_of(task, value)) is not None
        ]
        return {**stored, **await self.fetch(places)}

    # ------------------------------------------------------------------------------------------

    def _key(self, name: str) -> str:
        # The braces are a Redis Cluster hash tag: all metadata of a job in one slot.
        return f"wukong:{{{self.job_id}}}:{name}"

    def _fit_into_one_request(self, objects: Sequence[tuple[str, wire.Segments]]) -> bool:
        """Whether objects can be put together with a change of the metadata."""
        return (
            len(self._connections) == 1
            and len(objects) <= BATCH_OBJECTS
            and sum(wire.size(segments) for _, segments in objects) <= BATCH_BYTES
            and not any(is_elsewhere(name) for name, _ in objects)
        )

    def _elsewhere(self, name: str) -> tuple[Bucket, str]:
        """Where an object is that is in a bucket."""
        url, _, name = name.rpartition("#")
        bucket = Bucket.from_url(url)
        return bucket, f"{bucket.prefix}{self.job_id}/{name}"

    async def _put_elsewhere(
        self, objects: Sequence[tuple[str, wire.Segments]], ttl: float
    ) -> Status:
        # Before, so that whoever cleans up knows that there is something; and after: what comes
        # when the job is over may have come too late for that.
        if await self._mark(ttl) is not Status.OK:
            return Status.CLOSED
        buckets = self._connections.buckets
        for name, segments in objects:
            await buckets.put(*self._elsewhere(name), segments)
        status = await self._mark(ttl)
        if status is not Status.OK:
            await self._delete_elsewhere(name for name, _ in objects)
        return status

    async def _delete_elsewhere(self, names: Iterable[str]) -> None:
        keys: dict[Bucket, list[str]] = {}
        for name in names:
            bucket, key = self._elsewhere(name)
            keys.setdefault(bucket, []).append(key)
        for bucket, mine in keys.items():
            await self._connections.buckets.delete(bucket, mine)

    async def _mark(self, ttl: float) -> Status:
        """Note that the job has objects in a bucket. OK or CLOSED."""
        keys = [*self._index(), self._key(MARK)]
        answer = await self._connections.call(self._shard, scripts.CONFIRM, keys, _ms(ttl))
        return Status(answer.decode())

    async def _is_marked(self) -> bool:
        if not self.bucket:
            return False
        words = ("SISMEMBER", self._key("idx"), self._key(MARK))
        return bool(await self._connections.command(self._shard, *words))

    async def _sweep(self, stay: Iterable[str]) -> None:
        """Delete what the job has in its bucket, but for some."""
        bucket = Bucket.from_url(self.bucket)
        keys = {self._elsewhere(name)[1] for name in stay}
        prefix = f"{bucket.prefix}{self.job_id}/"
        await self._connections.buckets.sweep(bucket, prefix, keys)

    def _index(self) -> list[str]:
        return [self._key("open"), self._key("idx")]

    async def _call(self, script: scripts.Script, *args: Any) -> Any:
        return await self._connections.call(self._shard, script, self._metadata, *args)

    async def _close_and_forget(self) -> bool:
        """All of `finish` in one round trip, where there is but one server."""
        close = (scripts.CLOSE, [*self._index(), self._key("job")], ("finish", 0))
        forget = (scripts.FINISH, self._metadata, ())
        closed, _ = await self._connections.calls(self._shard, (close, forget))
        return bool(closed == b"OK")

    async def _close(
        self,
        shard: int,
        why: Literal["finish", "retire"],
        ttl: int = 0,
        stays: Sequence[str] = (),
    ) -> bool:
        keys = [*self._index(), self._key("job")]
        answer = await self._connections.call(shard, scripts.CLOSE, keys, why, ttl, *stays)
        return bool(answer == b"OK")

    async def _put_batch(
        self, shard: int, batch: Sequence[tuple[str, wire.Segments]], ttl: float
    ) -> Status:
        (answer,) = await self._write(shard, batch, ttl)
        return Status(answer.decode())

    async def _write(
        self,
        shard: int,
        batch: Sequence[tuple[str, wire.Segments]],
        ttl: float,
        then: Sequence[Any] = (),
    ) -> list[bytes]:
        """Put objects: the answer to that, and to one more command, if there is one."""
        values = [(self._key(name), segments) for name, segments in batch]
        keys = [*self._index(), *(key for key, _ in values)]
        # By its text: of a server that was restarted, a transaction would have had all effects but
        # this one, and nobody would know of the objects.
        confirm = ("EVAL", scripts.CONFIRM.source, len(keys), *keys, _ms(ttl))
        request = partial(bulk.write, values=values, milliseconds=_ms(ttl), last=confirm, then=then)
        return await self._connections.ask(shard, request)


async def _open_and_recall(
    client: Redis, words: Sequence[Any], names: Sequence[str]
) -> dict[str, Any]:
    async with client.pipeline(transaction=False) as pipe:
        pipe.execute_command(*words)
        if names:
            pipe.mget([f"{SEEN}{name}" for name in names])
        opened, *rest = await pipe.execute(raise_on_error=False)
    if isinstance(opened, Exception):
        raise opened
    seen: dict[str, Any] = {}
    found = rest[0] if rest and not isinstance(rest[0], Exception) else [None] * len(names)
    for name, packed in zip(names, found, strict=True):
        with suppress(ValueError, UnpackException):
            if packed is not None:
                seen[name] = wire.unpack(packed)
    return seen


def _of_batch(
    memory: bulk.Memory, batch: Sequence[tuple[int, str, int]], index: int, length: int
) -> memoryview:
    return memory(batch[index][0], length)


def _batches(items: Sequence[Any], size: Any) -> Iterator[list[Any]]:
    """Runs of items with at most BATCH_OBJECTS items and, but for single items, BATCH_BYTES."""
    batch: list[Any] = []
    total = 0
    for item in items:
        if batch and (len(batch) >= BATCH_OBJECTS or total + size(item) > BATCH_BYTES):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size(item)
    if batch:
        yield batch


def _ms(seconds: float) -> int:
    return math.ceil(seconds * 1000)
