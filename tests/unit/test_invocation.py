from __future__ import annotations

import base64
import json
from dataclasses import replace

import pytest

from wukong_async.errors import InvocationError
from wukong_async.invocation import MOST_CARRIED, Hints, Invocation, mismatch, versions


def test_an_event_survives_lambda() -> None:
    invocation = Invocation("job", "0.1")
    assert Invocation.from_event(json.loads(invocation.to_json())) == invocation


def test_an_event_is_small() -> None:
    assert len(Invocation("x" * 20, "123").to_json()) < 256


@pytest.mark.parametrize(
    "event", [None, [], {}, {"wukong": 2, "job": "j", "executor": "0", "versions": {}}, {"a": 1}]
)
def test_somebody_elses_event_is_refused(event: object) -> None:
    with pytest.raises(InvocationError, match="not an invocation of wukong-async"):
        Invocation.from_event(event)


def test_versions_that_differ_are_listed() -> None:
    mine = versions()
    assert mismatch(mine, mine) is None
    theirs = {**mine, "dask": "1.0", "python": "2.7"}
    said = mismatch(mine, theirs)
    assert said is not None
    assert f"dask: client {mine['dask']}, function 1.0" in said
    assert f"python: client {mine['python']}, function 2.7" in said
    assert "cloudpickle" not in said


def test_packages_that_a_graph_may_do_without_count_where_both_have_them() -> None:
    mine = {**versions(), "numpy": "2.4"}
    assert mismatch(mine, {k: v for k, v in mine.items() if k != "numpy"}) is None
    assert mismatch(mine, {**mine, "numpy": "1.26"}) == "numpy: client 2.4, function 1.26"


SEEN = {"add": [1, 0.5, 8.0], "": [0.1, 0.1, 1e6, 0.1]}
HINTS = Hints(1.5, 3, 9, alone=True, seen=SEEN, blocks=(0, 2))
SECRET = b"0123456789abcdef"


def test_hints_survive_as_an_event() -> None:
    carrying = HINTS.carrying({"b0": b"\x01block", "12": bytes(100)}, SECRET)
    invocation = Invocation("job", "0", hints=carrying)
    read = Invocation.from_event(json.loads(invocation.to_json())).hints
    assert read == carrying
    assert read.carried(SECRET) == {"b0": b"\x01block", "12": bytes(100)}


def test_what_somebody_else_has_sent_along_is_not_taken() -> None:
    carrying = HINTS.carrying({"b0": b"\x01block"}, SECRET)
    assert carrying.carried(b"another") == {}
    forged = replace(carrying, objects={"b0": base64.b64encode(b"\x01forged").decode()})
    assert forged.carried(SECRET) == {}
    renamed = replace(carrying, objects={"b1": carrying.objects["b0"]})
    assert renamed.carried(SECRET) == {}
    assert HINTS.carried(SECRET) == {}


def test_an_event_carries_what_it_has_room_for() -> None:
    large = {"b0": bytes(MOST_CARRIED), "1": b"small", "2": bytes(MOST_CARRIED)}
    assert set(HINTS.carrying(large, SECRET).objects) == {"b0"}
    rest = {name: large[name] for name in ("1", "2")}
    assert set(HINTS.carrying(rest, SECRET).objects) == {"1"}
    event = Invocation("job", "0", hints=HINTS.carrying(large, SECRET)).to_json()
    assert len(event) < 128 * 1024


@pytest.mark.parametrize(
    "hints",
    [
        None,
        {},
        [],
        [1.5, 3],
        ["late", 3, 9, True, {}, None, [], {}, ""],
        [1.5, 3, 9, True, {"add": [1, "a", 2]}, None, [], {}, ""],
        [1.5, 3, 9, True, {"add": [1, -2, 2]}, None, [], {}, ""],
        [1.5, 3, 9, True, {"add": [1]}, None, [], {}, ""],
        [1.5, 3, 9, True, {}, "much", [], {}, ""],
        [1.5, 3, 9, True, {}, None, ["b0"], {}, ""],
        [1.5, 3, 9, True, {}, None, [-1], {}, ""],
        [1.5, 3, 9, True, {}, None, [0, 1, 2, 3, 4], {}, ""],
        [1.5, 3, 9, True, {}, None, [], {"b0": 7}, ""],
        [1.5, 3, 9, True, {}, None, [], {}, None],
    ],
)
def test_hints_that_make_no_sense_are_let_alone(hints: object) -> None:
    event = {**json.loads(Invocation("job", "0").to_json()), "hints": hints}
    assert Invocation.from_event(event) == Invocation("job", "0")
