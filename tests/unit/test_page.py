"""The page of a benchmark document needs nothing else; its plots are drawn from any document."""

from __future__ import annotations

import base64
import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from benchmarks import plots, units
from benchmarks.page import page

COMMANDS = ("run", "scale", "plan", "overhead")
HOSTILE = """<script src="http://x">alert('$x^{$')</script>&amp;\0\n"""
EMBEDDED = "data:image/svg+xml;base64,"
VOID = {"meta", "img"}


def document(command: str, name: str = "wide") -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    match command:
        case "run":
            rows = [
                {
                    "workload": name,
                    "size": "small",
                    "backend": backend,
                    "entry": entry,
                    "wall_s": {"min": 0.9 * wall, "median": wall, "max": 2 * wall},
                    "ratio": {"min": wall, "median": wall, "max": wall},
                    "correct": True,
                    "tasks": 1000,
                    "store_commands": commands,
                    "store_bytes_in": 0,
                    "store_bytes_out": commands,
                    "invocations": commands,
                    "optimise_s": 0.25 if entry == "get" else None,
                }
                for backend, wall, commands in (("wukong", 1.0, 16), (name, 50.0, None))
                for entry in ("get", "compute")
            ]
            lanes = [
                {"lane": name, "spans": [[0.0, 0.5, name], [0.5, 0.9, "b"]]},
                {"lane": "2", "spans": []},
            ]
            more = {"timelines": [{"workload": name, "backend": "wukong", "lanes": lanes}]}
        case "scale":
            rows = [
                {
                    "curve": curve,
                    "engine": engine,
                    "executors": executors,
                    "tasks": 64,
                    "task_s": 0.1,
                    "wall_s": 7.0 / executors,
                    "ideal_s": 6.4 / executors,
                    "efficiency": 0.9,
                }
                for curve in ("strong", "weak", "map")
                for engine in ("wukong", name, "ideal")
                for executors in (1, 8)
            ]
        case "plan":
            rows = [
                {
                    "shape": name,
                    "tasks": tasks,
                    **dict.fromkeys(plots.STAGES, tasks * 1e-5),
                    "us_per_task": 40.0,
                    "bytes_per_task": 90,
                    "peak_over_graph": 1.9,
                }
                for tasks in (1000, 10_000)
            ]
        case "overhead":
            rows = [
                {
                    "workload": name,
                    "tasks": 10,
                    "phase": phase,
                    "us_per_task": us,
                    "ms_per_job": us / 100,
                }
                for phase, us in (("run", 3.0), (name, 5.0), ("sum", 8.0), ("wall", 9.0))
            ]
        case _:
            rows = [{"case": name, "wall_s": 0.0123}]
    return {
        "command": command,
        "machine": {"cores": 2, "system": name},
        "versions": {"python": "3.12", "ray": None},
        "settings": {"repeat": 5, "backends": [name]},
        "results": rows,
        **more,
    }


class Page(HTMLParser):
    """What a page is made of; fails where an element is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def images(self) -> list[ET.Element]:
        sources = [image["src"] or "" for image in self.all("img")]
        assert all(source.startswith(EMBEDDED) for source in sources)
        return [ET.fromstring(base64.b64decode(s.removeprefix(EMBEDDED))) for s in sources]


@pytest.mark.parametrize(
    ("command", "images"), [("run", 5), ("scale", 3), ("plan", 4), ("overhead", 1), ("model", 0)]
)
def test_a_page_needs_nothing_else_and_says_what_its_images_show(command: str, images: int) -> None:
    found = Page(page(document(command)))
    assert len(found.images()) == images
    assert {tag for tag, _ in found.elements}.isdisjoint({"script", "link", "iframe", "svg"})
    assert all(name != "href" for _, attributes in found.elements for name in attributes)
    assert all(image["alt"] for image in found.all("img"))
    assert all(cell["scope"] in {"col", "row"} for cell in found.all("th"))
    for image in found.images():
        links = [v for e in image.iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert all(link.startswith("#") for link in links)


@pytest.mark.parametrize("command", [*COMMANDS, HOSTILE])
def test_what_stands_in_a_document_is_text(command: str) -> None:
    found = Page(page(document(command, HOSTILE)))
    assert not found.all("script")
    assert plots.plain(HOSTILE) in found.text
    assert all(image.find(".//{*}script") is None for image in found.images())


def test_names_in_plots_are_as_they_are_in_the_document() -> None:
    (image,) = Page(page(document("overhead", "$a_b^{<&$"))).images()
    assert "$a_b^{<&$" in "".join(image.itertext())


@pytest.mark.parametrize("command", [*COMMANDS, "model"])
def test_no_results_are_no_plots(command: str) -> None:
    empty = {"command": command, "machine": {}, "versions": {}, "settings": {}, "results": []}
    found = Page(page(empty))
    assert not found.images()
    assert not found.all("table")


def test_rows_without_times_or_counts_are_left_out_of_the_plots() -> None:
    counted = document("run")
    for row in counted["results"]:
        row["wall_s"] = row["ratio"] = None
    found = Page(page(counted))
    assert len(found.images()) == 4
    counted["results"] = [{"workload": "wide", "backend": "ray", "store_commands": None}]
    del counted["timelines"]
    assert not Page(page(counted)).images()


def test_the_table_has_units() -> None:
    row = {
        "wall_s": {"min": 0.9, "median": 1.0, "max": 2.0},
        "ratio": {"min": 50.0, "median": 50.0, "max": 50.0},
        "us_per_task": 40.25,
        "store_bytes_in": 1500,
        "correct": True,
        "usd": None,
        "tasks": 1234,
    }
    text = Page(page({"command": "other", "results": [row]})).text
    for cell in ("1 s (900 ms to 2 s)", "50× (50× to 50×)", "40.2 µs", "1.5 kB", "yes–1,234"):
        assert cell in text


@pytest.mark.parametrize(
    ("told", "text"),
    [
        (units.seconds(0), "0"),
        (units.seconds(1.494), "1.49 s"),
        (units.seconds(0.9996), "1 s"),
        (units.seconds(0.043), "43 ms"),
        (units.seconds(12.5e-6), "12.5 µs"),
        (units.seconds(1e-12), "0.001 ns"),
        (units.seconds(-2), "−2 s"),
        (units.size(16), "16 B"),
        (units.size(1_240_000), "1.24 MB"),
        (units.digits(123_456), "123,456"),
    ],
)
def test_figures_have_three_digits_and_a_unit_that_fits(told: str, text: str) -> None:
    assert told == text


def test_plots_of_a_document_are_the_same_files_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "few.json").write_text(json.dumps(document("scale")))
    for folder in ("a", "b"):
        assert plots.main([str(tmp_path / "few.json"), "--into", str(tmp_path / folder)]) == 0
    first, second = map(Path, capsys.readouterr().out.split())
    assert first == tmp_path / "a" / "few-scaling.svg"
    assert first.read_bytes() == second.read_bytes()


def test_without_matplotlib_there_is_the_table_and_how_to_get_plots(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = Page(page(document("plan")))
    assert "Plots need matplotlib: pip install" in found.text
    assert found.all("table")
    (tmp_path / "plan.json").write_text(json.dumps(document("plan")))
    with pytest.raises(SystemExit):
        plots.main([str(tmp_path / "plan.json"), "--into", str(tmp_path)])
    assert capsys.readouterr().err.startswith("Plots need matplotlib")
