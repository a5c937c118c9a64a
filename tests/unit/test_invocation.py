from __future__ import annotations

import json

import pytest

from wukong_async.errors import InvocationError
from wukong_async.invocation import Invocation, mismatch, versions


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
