"""What is printed of a failing seed."""

from __future__ import annotations

import shlex
import sys

import pytest

from tests.simulation import __main__ as simulation
from tests.simulation.test_mistakes import TheFenceIsOpen
from tests.simulation.world import CALM, World


class Wrong(World):
    """Anybody may commit."""

    def __post_init__(self) -> None:
        self.store_class = TheFenceIsOpen
        super().__post_init__()


def test_a_failing_seed_is_told_with_a_smaller_case_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(simulation, "World", Wrong)
    failing = (
        seed for first in range(100) for seed, _ in simulation.run_chunk(100 * first, 100)[1]
    )
    seed = next(failing)
    what, command = simulation.story(seed).split("\n")
    python, *arguments = shlex.split(command)
    assert python == sys.executable
    assert arguments[:4] == ["-m", "tests.simulation", "--seed", str(seed)]
    told = dict(zip(arguments[4::2], arguments[5::2], strict=True))
    without = frozenset(told.get("--without", "").split(",")) - {""}
    calm = float(told["--calm"])
    assert without or calm < CALM, "it is no smaller"
    assert simulation.fails(seed, without, calm) == what
    # The command does the same, and tells the story.
    monkeypatch.setattr(sys, "argv", arguments[1:])
    assert simulation.main() == 1
    shown = capsys.readouterr().out
    assert "commit" in shown
    assert f"seed {seed}: " in shown
