from __future__ import annotations

import random
from math import inf
from typing import Any

import numpy as np
import pytest

from wukong_async import compression, wire
from wukong_async.blocks import PlanFacts
from wukong_async.compression import LEAST, TCP, Compression, bandwidth, mode_for, pays
from wukong_async.config import Settings
from wukong_async.errors import ConfigError, SerializationError
from wukong_async.scheduler.upload import Upload

REPETITIVE: Any = np.arange(100_000) % 100
NOISE: Any = np.frombuffer(random.Random(0).randbytes(800_000), "u1")
ALWAYS = Compression("lz4")
IF_IT_PAYS = Compression("auto", TCP)


@pytest.fixture
def without_lz4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "_available", lambda: False)


@pytest.mark.parametrize(
    ("ratio", "bandwidth", "answer"),
    [
        (0.5, 100e6, True),
        (0.79, 100e6, True),
        (0.81, 100e6, False),
        (1.0, 1e6, False),
        (1.01, 1e6, False),
        (0.1, 1e9, False),
        (0.0, inf, False),
        (0.985, 10e6, False),
        (0.97, 10e6, True),
    ],
)
def test_it_pays_if_it_is_faster_than_the_line(
    ratio: float, bandwidth: float, answer: bool
) -> None:
    assert pays(ratio, bandwidth) is answer


def test_a_faster_machine_compresses_more() -> None:
    assert not pays(0.5, 400e6, compressed=500e6)
    assert pays(0.5, 400e6, compressed=1e9)


def test_the_bandwidth_is_known_by_the_kind_of_endpoint() -> None:
    assert bandwidth(["unix:///a.sock"]) == inf
    assert bandwidth(["unix:///a.sock", "redis://h:1"]) == bandwidth(["rediss://h:1"]) == TCP


@pytest.mark.parametrize(
    ("value", "policy", "smaller"),
    [
        (REPETITIVE, ALWAYS, True),
        (REPETITIVE, IF_IT_PAYS, True),
        (REPETITIVE, Compression("auto", inf), False),
        (REPETITIVE, Compression("none", TCP), False),
        (REPETITIVE[: LEAST // 16], ALWAYS, False),
        (NOISE, ALWAYS, False),
        (NOISE, IF_IT_PAYS, False),
        ([*(NOISE[i:] for i in range(6)), REPETITIVE], IF_IT_PAYS, False),
        ([NOISE, REPETITIVE, REPETITIVE, REPETITIVE], IF_IT_PAYS, True),
        (bytes(LEAST), ALWAYS, True),
    ],
)
def test_a_value_that_may_be_compressed_comes_back(
    value: Any, policy: Compression, smaller: bool
) -> None:
    plain = wire.dumps(value)
    segments = wire.compressed(plain, policy)
    assert (segments is not plain) == smaller
    assert (wire.size(segments) < wire.size(plain)) == smaller
    frame = wire.join(segments)
    assert wire.weight(frame) == wire.size(plain)
    copy = wire.loads(frame)
    assert type(copy) is type(value)
    same = zip(copy, value, strict=True) if isinstance(value, list) else [(copy, value)]
    assert all(np.array_equal(one, other) for one, other in same)


def test_an_array_that_was_writable_is_not_copied_again() -> None:
    array: Any = np.arange(100_000) % 100
    copy = wire.loads(wire.join(wire.compressed(wire.dumps(array), ALWAYS)))
    assert copy.flags.writeable
    assert isinstance(copy.base, memoryview | bytearray | np.ndarray)


@pytest.mark.parametrize("cut", [-5, -1000, 9, 20])
def test_a_damaged_frame_is_an_error(cut: int) -> None:
    frame = wire.join(wire.compressed(wire.dumps(REPETITIVE), ALWAYS))
    with pytest.raises(SerializationError):
        wire.loads(frame[:cut])


def test_a_wrong_length_is_an_error() -> None:
    frame = bytearray(wire.join(wire.compressed(wire.dumps(REPETITIVE), ALWAYS)))
    frame[1] ^= 1
    with pytest.raises(SerializationError, match="bytes instead of"):
        wire.loads(frame)


def test_what_was_compressed_elsewhere_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = wire.join(wire.compressed(wire.dumps(REPETITIVE), ALWAYS))
    monkeypatch.setattr(compression, "_available", lambda: False)
    with pytest.raises(SerializationError, match=r"install `wukong-async\[lz4\]`"):
        wire.loads(frame)


@pytest.mark.usefixtures("without_lz4")
def test_without_the_package_nothing_is_compressed() -> None:
    plain = wire.dumps(REPETITIVE)
    assert wire.compressed(plain, ALWAYS) is plain
    assert [mode_for(mode) for mode in ("auto", "none")] == ["none", "none"]
    with pytest.raises(ConfigError, match=r"wukong.compression is 'lz4', but there is no package"):
        Upload.prepare({"x": 1}, ["x"], Settings(compression="lz4"))


@pytest.mark.parametrize("mode", ["auto", "lz4", "none"])
def test_the_executors_are_told_what_the_client_wants(mode: str) -> None:
    upload = Upload.prepare({"x": (len, "y")}, ["x"], Settings(compression=mode))
    assert PlanFacts.unpack(upload.facts.pack()).compression == mode


@pytest.mark.parametrize(("mode", "smaller"), [("auto", False), ("lz4", True)])
def test_literals_are_compressed_only_if_that_is_asked_for(mode: str, smaller: bool) -> None:
    """Whether the function can read them is not known."""
    graph = {"x": REPETITIVE, "y": (len, "x")}
    upload = Upload.prepare(graph, ["y"], Settings(compression=mode))
    put = [wire.size(segments) for batch in upload.batches() for _, segments in batch]
    assert (max(put) < REPETITIVE.nbytes) == smaller
