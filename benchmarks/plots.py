"""Plots of a benchmark document, as SVG.

    python -m benchmarks.plots FILE.json --into docs/images

A chart is made of panels, each a pair of axes. The page shows each panel as an image of its own, so
that they fit on any screen; a file holds all panels of a chart.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import units

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Row = Mapping[str, Any]
Lines = dict[str, list[tuple[float, float]]]
"""Points of each line, by its name."""

# Okabe and Ito's colours, which the colour-blind tell apart: a backend has the same everywhere.
COLOURS = {
    "wukong": "#0072b2",
    "paper-mode": "#56b4e9",
    "one-per-task": "#56b4e9",
    "distributed": "#d55e00",
    "dask-threads": "#009e73",
    "dask-sync": "#cc79a7",
    "lithops": "#e69f00",
    "ray": "#7a6a00",
    "per-edge": "#777777",
    "ideal": "#222222",
}
# Tol's muted colours: all that is no backend.
OTHERS = (
    "#332288",
    "#cc6677",
    "#117733",
    "#88ccee",
    "#882255",
    "#44aa99",
    "#ddcc77",
    "#aa4499",
    "#999933",
)
GREY = "#bbbbbb"
MORE = (*OTHERS, "#ee7733", "#777777", "#cccccc", "#222222")
"""For what lies side by side in one order."""
MARKERS = "osD^vPX<>"
STAGES = {
    "graph_s": "make the graph",
    "ingest_s": "ingest",
    "number_s": "number",
    "pickle_s": "pickle",
    "upload_s": "upload",
}
WIDTH = 5.0
"""Inches of a panel."""
WIDE = 20
"""Times from which on values are told on a logarithmic scale."""
WHOLE = ("sum", "wall")
"""Of a job, among the rows of its phases."""
LANES = 40
"""So many can be told apart by their names."""
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.size": 9.5,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 1.0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    # Names are text, also with a dollar sign; a plot of the same document is the same file.
    "svg.fonttype": "none",
    "svg.hashsalt": "wukong-async",
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    about: str
    """What there is to see, for those who do not see it."""
    height: float
    """Inches."""
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Chart:
    """Panels that are read in the same way."""

    name: str
    title: str
    note: str
    """How to read them."""
    panels: Sequence[Panel]


def charts(document: Mapping[str, Any]) -> list[Chart]:
    """What there is to plot in a document; nothing if its command is not known."""
    rows = document.get("results", ())
    match document.get("command"):
        case "run":
            found = [_times(rows), _counts(rows), _timelines(document.get("timelines", ()))]
        case "scale":
            found = [_scaling(rows)]
        case "plan":
            found = [_planning(rows)]
        case "overhead":
            found = [_phases(rows)]
        case _:
            found = []
    return [chart for chart in found if chart.panels]


def svg(panels: Sequence[Panel], columns: int = 1) -> str:
    """An image of some panels. ModuleNotFoundError, with what to do, if matplotlib is missing."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Plots need matplotlib: pip install '.[bench]'", name=error.name
        ) from error
    columns = min(columns, len(panels))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(panel.height for panel in row) for row in rows]
    written = io.StringIO()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH * columns, sum(heights)), layout="constrained")
        grid: Any = figure.subfigures(len(rows), columns, height_ratios=heights, squeeze=False)
        for panel, place in zip(panels, grid.flat, strict=False):  # The last row may have room.
            axes = place.subplots()
            axes.set_title(panel.title)
            panel.draw(axes)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", metadata=nothing)
    return written.getvalue()


def plain(value: object) -> str:
    """Text of a document on one line, with nothing in it that cannot be printed."""
    return "".join(c if c.isprintable() else "�" for c in str(value))


# --- run ---


def _times(rows: Iterable[Row]) -> Chart:
    timed = _grouped((row for row in rows if row.get("wall_s")), "workload", "size")
    return Chart(
        "times",
        "Times",
        "Bars are medians, whiskers reach from the fastest run to the slowest. Beside them: the"
        " median, and how many times that of the first backend's same entry. Hatched: what Dask's"
        " own optimisation takes of it.",
        [
            Panel(
                _workload(each[0]),
                "; ".join(f"{_entry(row)} {_time(row)}" for row in each),
                0.9 + 0.27 * len(each),
                partial(_draw_times, each),
            )
            for each in timed
        ],
    )


def _workload(row: Row) -> str:
    size = row.get("size") or "small"
    return _short(row["workload"] if size == "small" else f"{row['workload']}, {size}", 46)


def _entry(row: Row) -> str:
    return _short(f"{row['backend']} {row.get('entry', '')}".strip(), 24)


def _time(row: Row) -> str:
    text = units.seconds(row["wall_s"]["median"])
    if row.get("ratio"):
        text += f", {units.digits(row['ratio']['median'])}×"
    return text if row.get("correct", True) else f"{text}, wrong"


def _draw_times(rows: Sequence[Row], axes: Axes) -> None:
    walls = [row["wall_s"] for row in rows]
    medians = [wall["median"] for wall in walls]
    least, most = min(wall["min"] for wall in walls), max(wall["max"] for wall in walls)
    for y, (row, wall) in enumerate(zip(rows, walls, strict=True)):
        colour = COLOURS.get(row["backend"], GREY)
        axes.barh(y, wall["median"], 0.72, color=colour)
        optimised = min(row.get("optimise_s") or 0.0, wall["median"])
        if optimised:
            # At the end, where it reads right on a logarithmic scale as well.
            axes.barh(
                y,
                optimised,
                0.72,
                left=wall["median"] - optimised,
                color=colour,
                edgecolor="white",
                hatch="////",
                linewidth=0,
            )
        axes.plot([wall["min"], wall["max"]], [y, y], "|-", color="#222222", linewidth=1)
        axes.annotate(
            _time(row),
            (max(wall["max"], wall["median"]), y),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    axes.set_yticks(range(len(rows)), [_entry(row) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    if min(medians) > 0 and max(medians) > WIDE * min(medians):
        axes.set_xscale("log")
        axes.set_xlim(least / 2, most * (2 * most / least) ** 0.45)
    else:
        axes.set_xlim(0, 1.45 * most or 1)
    _ticks(axes.xaxis, units.seconds)


def _counts(rows: Iterable[Row]) -> Chart:
    # A job has one count, however it was called; if it was counted twice, the client's own entry.
    counted = sorted(
        (row for row in rows if row.get("store_commands") is not None),
        key=lambda row: row.get("entry") == "compute",
    )
    kinds: dict[str, Callable[[Row], float | None]] = {
        "Commands to the store": lambda row: row["store_commands"],
        "Bytes into and out of the store": lambda row: (
            (row.get("store_bytes_in") or 0) + (row.get("store_bytes_out") or 0)
        ),
        "Invocations": lambda row: row.get("invocations"),
    }
    panels = []
    for title, kind in kinds.items():
        points: dict[str, dict[str, float]] = {}
        for row in counted:
            value = kind(row)
            if value is not None:
                points.setdefault(plain(row["backend"]), {})[_workload(row)] = value
        if points:
            tell = units.size if title.startswith("Bytes") else units.digits
            about = "; ".join(
                f"{backend}: " + ", ".join(f"{name} {tell(n)}" for name, n in each.items())
                for backend, each in points.items()
            )
            names = list(dict.fromkeys(name for each in points.values() for name in each))
            height = 1.3 + 0.27 * len(names)
            panels.append(Panel(title, about, height, partial(_draw_counts, names, points, tell)))
    return Chart("counts", "Counts", "Of one job each, on a logarithmic scale.", panels)


def _draw_counts(
    names: Sequence[str],
    points: Mapping[str, Mapping[str, float]],
    tell: Callable[[float], str],
    axes: Axes,
) -> None:
    for (backend, each), marker, i in zip(points.items(), cycle(MARKERS), count(), strict=False):
        # Side by side, so that equal ones are both seen.
        aside = 0.5 * ((i + 0.5) / len(points) - 0.5)
        axes.plot(
            list(each.values()),
            [names.index(name) + aside for name in each],
            marker,
            color=COLOURS.get(backend, GREY),
            label=_short(backend),
        )
    axes.set_yticks(range(len(names)), [_short(name, 24) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    values = [value for each in points.values() for value in each.values()]
    if min(values) > 0:
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 2, 2 * max(values))
    else:
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(-0.3, 2 * max(1, *values))
    _ticks(axes.xaxis, tell)
    _legend(axes)


def _timelines(timelines: Iterable[Row]) -> Chart:
    panels = []
    for group in _grouped(timelines, "workload"):
        colours = _colours(group)
        for each in group:
            lanes = [(plain(lane["lane"]), lane["spans"]) for lane in each["lanes"]]
            if not any(spans for _, spans in lanes):
                continue
            end = max(span[1] for _, spans in lanes for span in spans)
            busy = ", ".join(
                f"{name} {sum(stop - start for start, stop, _ in spans) / end:.0%}"
                for name, spans in lanes[:LANES]
            )
            names = list(dict.fromkeys(name for name, _ in colours.values()))
            legend = 0.19 * math.ceil(len(names) / _columns(names))
            panels.append(
                Panel(
                    _short(f"{each['workload']} on {each['backend']}", 46),
                    f"{units.seconds(end)}; busy: {busy}",
                    0.9 + 0.3 * min(len(lanes), LANES / 2) + legend,
                    partial(_draw_timeline, lanes, end, colours),
                )
            )
    return Chart(
        "timelines", "Timelines", "What each sandbox did when, in one of the runs.", panels
    )


def _colours(timelines: Iterable[Row]) -> dict[str, tuple[str, str]]:
    """By what is done: how it is called, and its colour. What takes least shares grey."""
    took: dict[str, float] = defaultdict(float)
    for each in timelines:
        for lane in each["lanes"]:
            for start, stop, label in lane["spans"]:
                took[label] += stop - start
    most = sorted(took, key=lambda label: -took[label])[: len(OTHERS)]
    colours = iter(OTHERS)
    named = {label: (_short(label, 20), next(colours)) for label in took if label in most}
    return {**named, **dict.fromkeys(took.keys() - named, ("others", GREY))}


def _draw_timeline(
    lanes: Sequence[tuple[str, Sequence[tuple[float, float, str]]]],
    end: float,
    colours: Mapping[str, tuple[str, str]],
    axes: Axes,
) -> None:
    for name, colour in dict.fromkeys(colours.values()):
        axes.barh(0, 0, color=colour, label=name)  # For the legend.
        for y, (_, spans) in enumerate(lanes):
            mine = [(a, b) for a, b, label in spans if colours[label] == (name, colour)]
            axes.broken_barh(
                [(a, b - a) for a, b in _joined(sorted(mine), end / 1000)],
                (y - 0.4, 0.8),
                facecolor=colour,
                edgecolor="white",
                linewidth=0.3,
            )
    if len(lanes) <= LANES:
        axes.set_yticks(range(len(lanes)), [_short(name) for name, _ in lanes])
    else:
        axes.set_ylabel(f"{len(lanes)} sandboxes")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_xlim(0, end)
    axes.grid(visible=False, axis="y")
    _ticks(axes.xaxis, units.seconds)
    _legend(axes)


def _joined(spans: Iterable[tuple[float, float]], gap: float) -> list[tuple[float, float]]:
    """The spans, in order, in one where what is between them is too little to be seen."""
    joined: list[tuple[float, float]] = []
    for start, stop in spans:
        if joined and start - joined[-1][1] < gap and stop - start < gap:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


# --- scale ---


def _scaling(rows: Sequence[Row]) -> Chart:
    panels = []
    for each in _grouped((row for row in rows if row.get("wall_s")), "curve", "task_s"):
        first = each[0]
        several = len({row.get("task_s") for row in rows if row["curve"] == first["curve"]}) > 1
        tasks = f", tasks of {units.seconds(first['task_s'])}" if several else ""
        match first["curve"]:
            case "strong":
                title, measure = "Strong scaling: speed-up", _speed_up
            case "weak":
                title, measure = "Weak scaling: efficiency", _efficiency
            case "map":
                title, measure = "Map: time over the ideal", _over_ideal
            case other:
                title, measure = f"{_short(other)}: efficiency", _efficiency
        along = "executors" if len({row["executors"] for row in each}) > 1 else "tasks"
        lines: Lines = {}
        for row in each:
            lines.setdefault(plain(row["engine"]), []).append((row[along], measure(row)))
        if measure is _speed_up:
            lines.setdefault("ideal", [(row[along], row["executors"]) for row in each])
        else:
            lines.setdefault("ideal", [(row[along], 1) for row in each])
        panels.append(
            _lines(title + tasks, lines, along, _percent if measure is _efficiency else _times_as)
        )
    return Chart(
        "scaling",
        "By executors",
        "Beside what as many executors could do that need no time to start and to agree.",
        panels,
    )


def _efficiency(row: Row) -> float:
    return 1 / _over_ideal(row)


def _over_ideal(row: Row) -> float:
    return float(row["wall_s"] / row["ideal_s"])


def _speed_up(row: Row) -> float:
    return _efficiency(row) * float(row["executors"])


# --- plan ---


def _planning(rows: Iterable[Row]) -> Chart:
    known = [row for row in rows if row.get("tasks")]
    panels = []
    for field, title, tell in (
        (
            "us_per_task",
            "Time to plan and upload, per task",
            lambda value: units.seconds(value / 1e6),
        ),
        ("bytes_per_task", "Bytes per task, in the store", units.size),
        ("peak_over_graph", "Peak memory over that of the graph", _times_as),
    ):
        lines: Lines = {}
        for row in known:
            if row.get(field) is not None:
                lines.setdefault(plain(row["shape"]), []).append((row["tasks"], row[field]))
        if lines:
            panels.append(_lines(title, lines, "tasks", tell))
    for each in _grouped(known, "shape"):
        lines = {
            name: [(row["tasks"], row[field] / row["tasks"]) for row in each]
            for field, name in STAGES.items()
            if all(row.get(field) is not None for row in each)
        }
        if lines:
            title = f"{_short(each[0]['shape'])}: time of each step per task"
            panels.append(_lines(title, lines, "tasks", units.seconds))
    return Chart(
        "planning",
        "By the size of the graph",
        "A line that is flat or falls means that the whole grows no faster than the graph.",
        panels,
    )


# --- overhead ---


def _phases(rows: Iterable[Row]) -> Chart:
    workloads = _grouped((row for row in rows if row.get("us_per_task") is not None), "workload")
    about = "; ".join(
        f"{_workload(each[0])}: "
        + ", ".join(
            f"{plain(row['phase'])} {units.seconds(row['us_per_task'] / 1e6)}" for row in each
        )
        for each in workloads
    )
    phases = list(dict.fromkeys(row["phase"] for each in workloads for row in each))
    phases = [phase for phase in phases if phase not in WHOLE]
    height = 1.2 + 0.42 * len(workloads) + 0.2 * math.ceil(len(phases) / 2)
    panel = Panel(
        "Shares of a task's time (in the bars: µs)",
        about,
        height,
        partial(_draw_phases, workloads, phases),
    )
    return Chart(
        "phases",
        "Phases of a task",
        "Where the time of a job goes, spread evenly over its tasks.",
        [panel] if phases else [],
    )


def _draw_phases(workloads: Sequence[Sequence[Row]], phases: Sequence[str], axes: Axes) -> None:
    from matplotlib.ticker import PercentFormatter

    times = [{row["phase"]: row["us_per_task"] for row in rows} for rows in workloads]
    totals = [sum(each.get(phase, 0.0) for phase in phases) for each in times]
    lefts = [0.0] * len(times)
    for i, phase in enumerate(phases):
        colour = MORE[i % len(MORE)]
        shares = [
            each.get(phase, 0.0) / (whole or 1) for each, whole in zip(times, totals, strict=True)
        ]
        axes.barh(
            range(len(shares)),
            shares,
            0.7,
            left=lefts,
            color=colour,
            edgecolor="white",
            linewidth=0.6,
            hatch="///" if i >= len(MORE) else None,
            label=_short(phase, 26),
        )
        for y, share in enumerate(shares):
            text = units.digits(times[y].get(phase, 0.0))
            if share > 0.012 + 0.0225 * len(text):  # It fits.
                axes.text(
                    lefts[y] + share / 2,
                    y,
                    text,
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color=_ink(colour),
                )
            lefts[y] += share
    for y, (each, total) in enumerate(zip(times, totals, strict=True)):
        axes.annotate(
            units.seconds(each.get("wall", total) / 1e6),
            (1, y),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontweight="bold",
        )
    axes.set_yticks(range(len(workloads)), [_short(rows[0]["workload"], 20) for rows in workloads])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(workloads) - 0.5, -0.5)
    axes.set_xlim(0, 1.2)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    _legend(axes)


def _ink(colour: str) -> str:
    """Black or white, whichever is read on the colour."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 130 else "white"


# --- what several of them need ---


def _grouped(rows: Iterable[Row], *fields: str) -> list[list[Row]]:
    """The rows that have the same values there, in the order of their first."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(field) for field in fields), []).append(row)
    return list(groups.values())


def _lines(title: str, lines: Lines, along: str, tell: Callable[[float], str]) -> Panel:
    about = "; ".join(
        f"{name} {tell(min(points)[1])} at {units.digits(min(points)[0])} {along}"
        f" and {tell(max(points)[1])} at {units.digits(max(points)[0])}"
        for name, points in lines.items()
    )
    return Panel(title, about, 3.6, partial(_draw_lines, lines, along, tell))


def _draw_lines(lines: Lines, along: str, tell: Callable[[float], str], axes: Axes) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    others = cycle(OTHERS)
    for (name, points), marker in zip(lines.items(), cycle(MARKERS), strict=False):
        line = list(zip(*sorted(points), strict=True))
        colour = COLOURS.get(name) or next(others)
        if name == "ideal":
            axes.plot(*line, "--", color=colour, linewidth=1.2, label=name, zorder=1)
        else:
            axes.plot(*line, marker + "-", color=colour, label=_short(name))
    xs = sorted({x for points in lines.values() for x, _ in points})
    ys = [y for points in lines.values() for _, y in points]
    axes.set_xscale("log")
    axes.set_xlim(xs[0] / 1.4, xs[-1] * 1.4)
    axes.xaxis.set_major_locator(FixedLocator(xs[:: math.ceil(len(xs) / 7)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: units.digits(x)))
    axes.set_xlabel(along)
    if min(ys) > 0 and max(ys) > WIDE * min(ys):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.1 * max(ys) or 1)
    _ticks(axes.yaxis, tell)
    _legend(axes)


def _times_as(value: float) -> str:
    return f"{units.digits(value)}×"


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _ticks(axis: Axis, tell: Callable[[float], str]) -> None:
    """A few of them, on whatever scale."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axis.get_view_interval()
    match axis.get_scale():
        case "linear":
            axis.set_major_locator(MaxNLocator(5))
        case "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tell(value)))
    axis.set_minor_formatter(NullFormatter())


def _columns(labels: Sequence[str]) -> int:
    """In how many a legend with these labels fits into a panel."""
    longest = max(map(len, labels))
    return 4 if longest < 11 else 3 if longest < 16 else 2


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=_columns(labels),
        handlelength=1.6,
        columnspacing=1.2,
    )


def _short(text: object, limit: int = 16) -> str:
    text = plain(text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plots", description="Plot what --json has written, as SVG."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--into", type=Path, default=Path(), metavar="DIRECTORY")
    options = parser.parse_args(arguments)
    options.into.mkdir(parents=True, exist_ok=True)
    for file in options.files:
        for chart in charts(json.loads(file.read_text())):
            target = options.into / f"{file.stem}-{chart.name}.svg"
            try:
                target.write_text(svg(chart.panels, columns=2))
            except ModuleNotFoundError as error:
                parser.exit(1, f"{error}\n")
            print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
