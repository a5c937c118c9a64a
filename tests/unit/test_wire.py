from __future__ import annotations

import sys
from typing import Any

import cloudpickle
import numpy as np
import pandas as pd
import pytest

from wukong_async import wire
from wukong_async.errors import SerializationError


def round_trip(value: Any) -> Any:
    return wire.loads(wire.join(wire.dumps(value)))


@pytest.mark.parametrize(
    "value", [None, 0, "text", b"\x00\xff", {"a": [1, 2.5, None]}, (), ValueError("as a value")]
)
def test_small_values(value: object) -> None:
    copy = round_trip(value)
    assert type(copy) is type(value)
    assert repr(copy) == repr(value)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(10),
        np.arange(10_000.0),
        np.arange(10_000.0).reshape(100, 100).T,
        np.arange(10_000)[::3],
        np.array([], dtype="f8"),
        np.array([None, "object"]),
        np.zeros((3, 0, 4)),
    ],
    ids=str,
)
def test_arrays(array: np.ndarray[Any, Any]) -> None:
    copy = round_trip(array)
    np.testing.assert_array_equal(copy, array)
    assert copy.dtype == array.dtype
    assert copy.flags.writeable, "Cython code refuses read-only memory"


def test_a_read_only_array_stays_read_only_and_is_not_copied() -> None:
    array = np.arange(10_000.0)
    array.flags.writeable = False
    frame = wire.join(wire.dumps(array))
    copy = wire.loads(frame)
    assert not copy.flags.writeable
    assert np.shares_memory(copy, np.frombuffer(frame, dtype="u1"))


@pytest.mark.parametrize("count", [1, 8])
def test_what_is_most_of_a_writable_frame_stays_in_it(count: int) -> None:
    arrays: list[Any] = [np.arange(10_000.0) + i for i in range(count)]
    frame = bytearray(wire.join(wire.dumps(arrays)))
    copies = wire.loads(frame)
    whole = np.frombuffer(frame, dtype="u1")
    for copy, array in zip(copies, arrays, strict=True):
        np.testing.assert_array_equal(copy, array)
        assert copy.flags.writeable
        assert np.shares_memory(copy, whole) == (count == 1), "one of many must not keep them all"


def test_large_buffers_are_not_copied_when_dumped() -> None:
    array = np.arange(1_000_000.0)
    segments = wire.dumps(array)
    largest = max(segments, key=len)
    assert np.shares_memory(array, np.frombuffer(largest, dtype="u1"))


def test_buffers_are_aligned() -> None:
    segments = wire.dumps([np.arange(1001.0), np.arange(777, dtype="i4")])
    offset = 0
    for segment in segments:
        if len(segment) > wire.SMALL_BUFFER:
            assert offset % wire.ALIGNMENT == 0
        offset += len(segment)


def test_a_data_frame() -> None:
    frame = pd.DataFrame({"a": range(5000), "b": ["x"] * 5000})
    pd.testing.assert_frame_equal(round_trip(frame), frame)


def test_functions_that_plain_pickle_cannot_move() -> None:
    offset = 3
    assert round_trip(lambda x: x + offset)(4) == 7


def test_main_is_pickled_by_value() -> None:
    # A function of a script: plain pickle would name a module that is another one elsewhere.
    main = sys.modules["__main__"]
    exec("def of_the_script(x): return x + 1", vars(main))
    try:
        function = vars(main)["of_the_script"]
        frame = wire.join(wire.dumps(function))
        del vars(main)["of_the_script"]
        assert wire.loads(frame)(1) == 2
    finally:
        vars(main).pop("of_the_script", None)


def test_modules_registered_by_value_are_pickled_by_value() -> None:
    from tests.unit import by_value

    cloudpickle.register_pickle_by_value(by_value)
    try:
        frame = wire.join(wire.dumps(by_value.inc))
    finally:
        cloudpickle.unregister_pickle_by_value(by_value)
    assert b"co_code" in frame or len(frame) > 200


def test_what_does_not_pickle_is_an_error_with_its_cause() -> None:
    with pytest.raises(SerializationError, match="cannot pickle a generator") as caught:
        wire.dumps(x for x in (1, 2))
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.parametrize("frame", [b"", b"\x07abc", wire.join(wire.dumps(np.zeros(999)))[:-5]])
def test_a_damaged_frame_is_an_error(frame: bytes) -> None:
    with pytest.raises(SerializationError):
        wire.loads(frame)


@pytest.mark.parametrize("value", [[1, [b"a", b"\xff\x00" * 200]], [2**40, -1, 0.5, True, None]])
def test_msgpack_for_lua(value: list[object]) -> None:
    assert wire.unpack(wire.pack(value)) == value
