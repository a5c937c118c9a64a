from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from wukong_async.collector import Freezer


@pytest.fixture
def freezer() -> Iterator[Freezer]:
    made = Freezer()
    yield made
    made.close()
    gc.unfreeze()


def test_what_outlives_a_full_collection_is_set_apart(freezer: Freezer) -> None:
    before = gc.get_freeze_count()
    freezer.freeze()
    assert gc.get_freeze_count() == before, "nobody has collected"
    gc.collect(0)
    freezer.freeze()
    assert gc.get_freeze_count() == before, "not everything"
    kept = [[] for _ in range(1000)]  # type: list[list[None]]
    gc.collect()
    freezer.freeze()
    assert gc.get_freeze_count() > before + len(kept)


def test_a_freezer_that_is_closed_hears_nothing() -> None:
    before = len(gc.callbacks)
    Freezer().close()
    assert len(gc.callbacks) == before
