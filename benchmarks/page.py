"""A benchmark document as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from benchmarks import units
from benchmarks.plots import Chart, Panel, charts, plain, svg

TITLES = {
    "run": "Workloads on several backends",
    "scale": "Scaling",
    "plan": "Planning",
    "overhead": "What a task costs",
}
ABOUT = ("machine", "versions", "settings")
NONE = "–"
STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #666; --shade: #8881; }
@media (prefers-color-scheme: dark) { :root { --dim: #aaa; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 1.5rem clamp(.9rem, 3vw, 2rem) 3rem;
  font: 1rem/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.2; margin: 0; }
h1 { font-size: 1.7rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: .95rem; text-transform: capitalize; }
p { margin: .4rem 0 .9rem; max-width: 46rem; color: var(--dim); }
.about { display: flex; flex-wrap: wrap; gap: 1rem 3rem; margin-top: 1rem; font-size: .875rem; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .8rem; margin: .2rem 0 0; }
dt { color: var(--dim); }
dd { margin: 0; overflow-wrap: anywhere; }
.panels { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); }
.panels img { display: block; width: 100%; height: auto; padding: .6rem; border-radius: .5rem;
  background: #fff; border: 1px solid var(--line); }
.table { width: fit-content; max-width: 100%; overflow-x: auto;
  border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
.text { text-align: left; }
thead th { background: var(--shade); vertical-align: bottom; }
tbody tr:last-child > * { border-bottom: 0; }
tbody tr:hover { background: var(--shade); }
"""


def page(document: Mapping[str, Any]) -> str:
    """The plots and the table of a document, and where its figures come from."""
    command = plain(document.get("command") or "results")
    title = TITLES.get(command, command)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)} – wukong-async</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            f"<h1>{escape(title)}</h1>",
            f"<p><code>python -m benchmarks {escape(command)}</code></p>",
            '<div class="about">',
            *(_list(name, document[name]) for name in ABOUT if document.get(name)),
            "</div>",
            *_charts(charts(document)),
            "<h2>All figures</h2>",
            _table(document.get("results") or ()),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _list(name: str, values: Mapping[str, Any]) -> str:
    items = "".join(
        f"<dt>{_text(_heading(key))}</dt><dd>{_text(_cell(key, value))}</dd>"
        for key, value in values.items()
    )
    return f"<section><h3>{name}</h3><dl>{items}</dl></section>"


def _charts(found: Iterable[Chart]) -> Iterable[str]:
    try:
        for chart in found:
            images = "".join(_image(panel) for panel in chart.panels)
            yield f"<section><h2>{chart.title}</h2><p>{chart.note}</p>"
            yield f'<div class="panels">{images}</div></section>'
    except ModuleNotFoundError as error:
        yield f"<p>{_text(error)}</p>"


def _image(panel: Panel) -> str:
    """As an image and not inline: what is in one knows nothing of the other, nor of the page."""
    data = base64.b64encode(svg([panel]).encode()).decode()
    alt = _text(f"{panel.title}. {panel.about}.")
    return f'<img src="data:image/svg+xml;base64,{data}" alt="{alt}">'


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p>There are none.</p>"
    columns = list(dict.fromkeys(name for row in rows for name in row))
    texts = {c for c in columns if any(isinstance(row.get(c), str) for row in rows)}
    kinds = {column: ' class="text"' if column in texts else "" for column in columns}
    head = "".join(f'<th scope="col"{kinds[c]}>{_text(_heading(c))}</th>' for c in columns)
    body = []
    for row in rows:
        first, *others = (_text(_cell(column, row.get(column))) for column in columns)
        cells = "".join(
            f"<td{kinds[column]}>{text}</td>"
            for column, text in zip(columns[1:], others, strict=True)
        )
        body.append(f'<tr><th scope="row"{kinds[columns[0]]}>{first}</th>{cells}</tr>')
    # It can be scrolled, so it can be reached without a mouse.
    return (
        '<div class="table" role="region" aria-label="All figures" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
"""Seconds of what stands at the begin or the end of a field's name."""


def _heading(column: str) -> str:
    words = [word for word in column.split("_") if word not in UNITS]
    if words[:1] == ["per"]:
        words.insert(0, "time")
    return " ".join(words)


def _cell(column: str, value: object) -> str:
    """A value in the unit that the name of its column says."""
    match value:
        case None:
            return NONE
        case bool():
            return "yes" if value else "no"
        case {"median": median, "min": least, "max": most} if median is not None:
            return f"{_cell(column, median)} ({_cell(column, least)} to {_cell(column, most)})"
        case int() | float():
            words = column.split("_")
            for word in (words[0], words[-1]):
                if word in UNITS:
                    return units.seconds(value * UNITS[word])
            if "bytes" in words:
                return units.size(value)
            if "usd" in words:
                return f"{units.digits(value)} $"
            if column == "ratio" or "over" in words:
                return f"{units.digits(value)}×"
            return f"{value:,}" if isinstance(value, int) else units.digits(value)
        case list():
            return ", ".join(map(str, value))
    return str(value)


def _text(value: object) -> str:
    return escape(plain(value))
