"""What an executor says of itself with a renewal: on a real server and in the model alike."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

import pytest

from tests.integration.jobs import new_job
from tests.simulation.model import ModelStore
from wukong_async import wire
from wukong_async.protocol import JobState, Status
from wukong_async.store import Connections, JobStore


class Both:
    """The same job in the real store and in the model."""

    def __init__(self, connections: Connections) -> None:
        self.real = JobStore(connections, secrets.token_hex(4))
        self.model = ModelStore(lambda: 0.0)
        self._connections = connections

    async def create(self, attempts: int) -> None:
        new = new_job(attempts=attempts)
        await self.real.open(600)
        self.model.open()
        assert await self.real.create(new) is self.model.create(new) is Status.OK

    async def begin(self, nonce: str, request_id: str) -> Status:
        real = await self.real.begin("0", nonce, request_id)
        assert real == self.model.begin("0", nonce, request_id)
        return real.status

    async def renew(self, generation: int, nonce: str, last_words: bytes) -> Status:
        said = ("0", generation, nonce, last_words)
        status = await self.real.renew(*said)
        assert status is self.model.renew(*said)
        return status

    async def expire(self) -> None:
        """Let the lease of executor 0 be over."""
        live = f"wukong:{{{self.real.job_id}}}:live"
        await self._connections.command(0, "ZADD", live, "XX", 1, "0")
        self.model.live["0"] = 0.0

    async def failure(self) -> bytes:
        outcome = await self.real.outcome()
        assert outcome == self.model.outcome()
        assert outcome.state is JobState.FAILED
        return outcome.error


@pytest.fixture
async def both(connections: Connections) -> AsyncIterator[Both]:
    made = Both(connections)
    yield made
    await made.real.cancel(JobState.CANCELLED, b"")
    await made.real.finish()


def lost(tries: int, request_id: str, last_words: str) -> bytes:
    return wire.pack(["lost", "0", tries, wire.pack([0]), request_id, last_words])


@pytest.mark.parametrize("by", ["begin", "watch"])
async def test_the_failure_has_the_last_request_and_the_last_words(both: Both, by: str) -> None:
    await both.create(attempts=2)
    await both.begin("a", "request a")
    assert await both.renew(1, "a", b"first") is Status.OK
    assert await both.renew(1, "a", b"words of a") is Status.OK
    await both.expire()
    await both.begin("b", "request b")
    await both.expire()
    # The second had no time to say anything: what the first has said is all there is.
    if by == "begin":
        assert await both.begin("c", "request c") is Status.GONE
    else:
        await both.real.watch()
        both.model.watch()
    assert await both.failure() == lost(2, "request b", "words of a")


async def test_only_the_incarnation_that_holds_the_record_is_heard(both: Both) -> None:
    await both.create(attempts=2)
    await both.begin("a", "request a")
    await both.expire()
    await both.begin("b", "request b")
    assert await both.renew(1, "a", b"a ghost") is Status.FENCED
    assert await both.renew(2, "b", b"words of b") is Status.OK
    await both.expire()
    assert await both.begin("c", "request c") is Status.GONE
    assert await both.failure() == lost(2, "request b", "words of b")


async def test_nobody_has_to_say_anything(both: Both) -> None:
    await both.create(attempts=1)
    await both.begin("a", "")
    assert await both.renew(1, "a", b"") is Status.OK
    await both.expire()
    assert await both.begin("b", "") is Status.GONE
    assert await both.failure() == lost(1, "", "")


async def test_last_words_go_with_the_record(both: Both, connections: Connections) -> None:
    await both.create(attempts=2)
    await both.begin("a", "request a")
    await both.renew(1, "a", b"words of a")
    await both.real.cancel(JobState.CANCELLED, b"")
    await both.real.commit("0", 1, "a", 1, b"")
    fields = await connections.command(0, "HKEYS", f"wukong:{{{both.real.job_id}}}:rec")
    assert sorted(fields) == [b"1", b"1/f"]
