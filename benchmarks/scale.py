"""The papers' scaling curves, in a cloud that is simulated on this machine: see cloud.py.

    python -m benchmarks scale                                    # up to 1,000 executors; minutes
    python -m benchmarks scale --executors 1,100,10000 --curve weak

- strong: the same tasks on more and more executors
- tree: the same tree reduction on more and more executors
- weak: more and more executors, as many tasks for each
- map: 10,000 tasks of 1 s on 1,000 executors

Each on executors that do not exist yet, in three ways: `wukong-first`, when nothing is known of the
tasks; `wukong`, when an earlier job has left how long they take and what a start costs (that of
`wukong-first`, or a short one that is not told of);
`one-per-task`, which is `leaf_batch=1, hold=0`, the way of the Wukong paper. All are compared with
`ideal`: the earliest end on environments that were all asked for at once, come as the platform lets
them, and do nothing but tasks; or the longest path, if that takes longer.
"""

from __future__ import annotations

import argparse
import math
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any
from unittest import mock

import psutil
from dask._task_spec import Task, TaskRef

from benchmarks.cloud import Cloud, Platform, stretched
from benchmarks.document import document, outputs, write
from wukong_async import WukongClient
from wukong_async.watcher import Watcher

CURVES = ("strong", "weak", "map", "tree")
EXECUTORS = (1, 10, 100, 1000)
FULL = (*EXECUTORS, 10_000)
STRONG_TASKS = 4000
TREE_LEAVES = 1024
WEAK_TASKS = 4
"""For each executor."""
MAP_TASKS, MAP_EXECUTORS = 10_000, 1000
ENGINES: Mapping[str, Mapping[str, Any]] = {
    "wukong-first": {},
    "wukong": {},
    "one-per-task": {"leaf_batch": 1, "hold": 0},
}
"""Settings of each. The second one knows what the first one has seen."""
REHEARSAL = 4
"""Tasks of an earlier job, where `wukong-first` is not measured."""
EASY, STEEPNESS, LEAST_DILATION = 150, 1.1, 0.05
"""So many executors that begin at once are no load for this machine, and twice as many need a
little more than twice as much time. With few there is time to spare: where a run would take longer
than `LONGEST`, CPU weighs more, which only makes it look worse."""
LONGEST = 60.0
"""Seconds that a run may take here, ideally; what would take longer is computed, not measured."""
SAMPLE = 0.25
"""Seconds between two looks at the machine."""
BUSY = 0.9
MOST_CPU, MOST_BUSY, MOST_STORE = 0.7, 0.15, 0.7
"""Above that, this machine was the bottleneck, or a store of the cloud would have been."""
LEAST_EFFICIENCY, MOST_EXECUTORS, MOST_OVER = 0.8, 1000, 1.15
"""The targets: of strong scaling, up to so many executors; and of the map."""
LINE = "{:<7} {:<13} {:>9} {:>6} {:>8} {:>8} {:>10} {:>8} {:>8}"
COLUMNS = (
    *("curve", "engine", "executors", "tasks", "wall s", "ideal s", "efficiency", "invoked"),
    "billed s",
)
MORE = "  {:>6} {:>5} {:>5} {:>6}"
MORE_COLUMNS = ("× slow", "CPU", "busy", "store")


@dataclass(frozen=True)
class Point:
    """One place on one curve."""

    curve: str
    executors: int
    tasks: int
    seconds: float
    """Of each task."""
    path: int = 1
    """Tasks in a row."""

    @property
    def leaves(self) -> int:
        """Tasks without inputs."""
        return self.tasks if self.path == 1 else (self.tasks + 1) // 2

    def graph(self, dilation: float) -> tuple[dict[Any, Task], list[Any]]:
        """Tasks that sleep, and the keys that are asked for."""
        pause = self.seconds * dilation
        if self.path == 1:
            tasks = [("nap", i) for i in range(self.tasks)]
            return {key: Task(key, nap, pause) for key in tasks}, tasks
        level: list[Any] = [("nap", i) for i in range(self.leaves)]
        made = {key: Task(key, nap, pause) for key in level}
        depth = 0
        while len(level) > 1:
            depth += 1
            above = [("nap", depth, i) for i in range(len(level) // 2)]
            for key, a, b in zip(above, level[::2], level[1::2], strict=True):
                made[key] = Task(key, nap, pause, TaskRef(a), TaskRef(b))
            level = above
        return made, level


def nap(seconds: float, *inputs: int) -> int:
    """Take so long; how many leaves are below."""
    time.sleep(seconds)
    return sum(inputs) or 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is told of one engine at one point. Times are seconds of the model."""

    curve: str
    engine: str
    executors: int
    tasks: int
    task_s: float
    wall_s: float
    """Until the results are in the client."""
    ideal_s: float
    efficiency: float
    """The ideal over the wall time."""
    invocations: int
    billed_ms: int
    measured: bool = False
    """Else it is computed."""
    dilation: float | None = None
    cpu: float | None = None
    """Share of this machine that was in use;"""
    busy: float | None = None
    """share of the time in which nearly all of it was."""
    store: float | None = None
    """Share of the time in which a store of the cloud would have been at work: a core is all it
    has."""

    @property
    def doubts(self) -> list[str]:
        """Why the figure is not to be trusted."""
        found = []
        if (self.cpu or 0) > MOST_CPU or (self.busy or 0) > MOST_BUSY:
            found.append("too slow: this machine was busy; dilate more")
        if (self.store or 0) > MOST_STORE:
            found.append("too fast: the store would be busy")
        return found


def points(
    curves: Iterable[str], executors: Sequence[int], seconds: float, tasks: Mapping[str, int]
) -> Iterator[Point]:
    """Those of some curves."""
    for curve in curves:
        if curve == "map":
            yield Point("map", min(MAP_EXECUTORS, max(executors)), tasks["map"], seconds)
            continue
        for each in executors:
            match curve:
                case "strong":
                    yield Point(curve, each, tasks["strong"], seconds)
                case "weak":
                    yield Point(curve, each, tasks["weak"] * each, seconds)
                case "tree":
                    leaves = tasks["tree"]
                    yield Point(curve, each, 2 * leaves - 1, seconds, leaves.bit_length())


class Watch:
    """How busy this machine and this process, the client, are while the body runs."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        """Of the machine, that were in use;"""
        self.steps: list[tuple[float, float]] = []
        """seconds that have passed, and of the client's CPU, but for what it takes to invoke."""
        self._invoking = False
        self._stepping = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="wukong-watch", daemon=True)

    def __enter__(self) -> Watch:
        psutil.cpu_percent()
        self._patch = mock.patch.object(Watcher, "invoke", self._watched(Watcher.invoke))
        self._patch.start()
        self._before = time.perf_counter(), time.process_time()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()
        self._stop.set()
        self._thread.join()
        self._step()

    def _watched(self, invoke: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        async def invoked(*args: Any) -> None:
            self._step()
            self._invoking = True
            try:
                await invoke(*args)
            finally:
                self._step()
                self._invoking = False

        return invoked

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE):
            self._step()
            # Where this thread was held up, so was everything else.
            self.shares += [1.0] * int(self.steps[-1][0] / SAMPLE / 2)
            self.shares.append(psutil.cpu_percent() / 100)

    def _step(self) -> None:
        with self._stepping:
            now = time.perf_counter(), time.process_time()
            cpu = 0.0 if self._invoking else now[1] - self._before[1]
            self.steps.append((now[0] - self._before[0], cpu))
            self._before = now

    def modelled(self, dilation: float) -> float:
        """What has passed, in seconds of the model.

        Nothing else of the cloud runs on the client's machine, so its CPU is not to weigh less:
        where it had more to do than would fit into the time, that took as long. Its events begin as
        far apart as its CPU has sent them, so that is in what has passed.
        """
        return sum(max(passed / dilation, cpu) for passed, cpu in self.steps)

    @property
    def cpu(self) -> float:
        """The mean share that was in use."""
        return sum(self.shares) / max(1, len(self.shares))

    @property
    def busy(self) -> float:
        """The share of the time in which nearly all was in use."""
        return sum(share > BUSY for share in self.shares) / max(1, len(self.shares))


def measure(
    cloud: Cloud,
    point: Point,
    platform: Platform,
    engines: Sequence[str],
    dilation: float | None = None,
) -> Iterator[Row]:
    """The ideal, and each engine."""
    platform = replace(platform, executors=point.executors)
    ideal = platform.ideal(point.tasks, point.seconds, point.path)
    dilation = dilation or dilation_for(min(point.executors, platform.burst), ideal)
    yield _ideal(point, "ideal", ideal)
    if point.executors == 1 and ideal * LEAST_DILATION > LONGEST:
        yield from (_ideal(point, engine, ideal) for engine in engines)
        return
    cloud.forget(dilation)
    if "wukong-first" not in engines:
        earlier = replace(point, tasks=min(point.tasks, REHEARSAL), path=1)
        _measured(cloud, earlier, platform, dilation, "wukong-first", ideal)
    for engine in engines:
        yield _measured(cloud, point, platform, dilation, engine, ideal)


def dilation_for(executors: int, ideal: float) -> float:
    """How much slower everything is by default, if as many begin at once and it takes so long."""
    return max(LEAST_DILATION, min(1.0, LONGEST / ideal), (executors / EASY) ** STEEPNESS)


def _ideal(point: Point, engine: str, ideal: float) -> Row:
    """What needs no measuring."""
    billed = round(point.tasks * point.seconds * 1000)
    executors = min(point.executors, point.tasks)
    return _row(point, engine, ideal, ideal, executors, billed)


def _row(
    point: Point, engine: str, wall: float, ideal: float, invocations: int, billed_ms: int
) -> Row:
    return Row(
        curve=point.curve,
        engine=engine,
        executors=point.executors,
        tasks=point.tasks,
        task_s=point.seconds,
        wall_s=wall,
        ideal_s=ideal,
        efficiency=ideal / wall,
        invocations=invocations,
        billed_ms=billed_ms,
    )


def _measured(
    cloud: Cloud, point: Point, platform: Platform, dilation: float, engine: str, ideal: float
) -> Row:
    settings = cloud.reset(platform, dilation)
    with (
        stretched(dilation),
        WukongClient(set_as_default=False, **settings, **ENGINES[engine]) as client,
    ):
        graph, keys = point.graph(dilation)
        with Watch() as watch:
            found = client.get(graph, keys)
        assert sum(found) == point.leaves
        used = cloud.used()
    wall = watch.modelled(dilation)
    row = _row(point, engine, wall, ideal, used.invocations, round(used.billed * 1000))
    return replace(
        row,
        measured=True,
        dilation=dilation,
        cpu=watch.cpu,
        busy=watch.busy,
        store=used.store_cpu / wall,
    )


def show(row: Row) -> None:
    """A row of the table."""
    said = LINE.format(
        *(row.curve, row.engine, row.executors, row.tasks),
        *(f"{row.wall_s:.2f}", f"{row.ideal_s:.2f}", f"{row.efficiency:.0%}"),
        *(row.invocations, f"{row.billed_ms / 1000:.0f}"),
    )
    if row.measured:
        shares = (f"{share:.0%}" for share in (row.cpu, row.busy, row.store) if share is not None)
        said += MORE.format(f"{row.dilation:g}", *shares) + "  ".join(["", *row.doubts])
    print(said, flush=True)


@dataclass(frozen=True)
class Target:
    """What is to be reached, and whether it is."""

    what: str
    limit: str
    found: str
    met: bool


def targets(rows: Sequence[Row]) -> list[Target]:
    """Those that these rows tell of."""
    found = []
    for curve in ("strong", "map"):
        for engine in ("wukong-first", "wukong"):
            mine = [
                row
                for row in rows
                if (row.curve, row.engine) == (curve, engine) and row.executors <= MOST_EXECUTORS
            ]
            if not mine:
                continue
            worst = min(mine, key=_efficiency)
            over = worst.wall_s / worst.ideal_s
            if curve == "strong":
                limit, met = f"≥ {LEAST_EFFICIENCY:.0%}", worst.efficiency >= LEAST_EFFICIENCY
                said = f"{worst.efficiency:.0%}, at {worst.executors}"
            else:
                limit, met = f"≤ {MOST_OVER} × ideal", over <= MOST_OVER
                said = f"{over:.2f} × ideal"
            said += f" ({worst.doubts[0]})" if worst.doubts else ""
            found.append(Target(f"{curve}, {engine}", limit, said, met))
    return found


def _efficiency(row: Row) -> float:
    return row.efficiency


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `scale` command."""
    parser = commands.add_parser(
        "scale",
        help="strong and weak scaling in a simulated cloud",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--curve", type=_names(CURVES), default=("strong", "weak", "map"), help=",".join(CURVES)
    )
    parser.add_argument(
        "--engine",
        type=_names(ENGINES),
        default=("wukong", "one-per-task"),
        help=",".join(ENGINES),
    )
    parser.add_argument(
        "--executors", type=_counts, default=EXECUTORS, help="comma-separated; default: up to 1000"
    )
    parser.add_argument(
        "--full",
        dest="executors",
        action="store_const",
        const=FULL,
        help="up to 10,000 executors; takes most of an hour",
    )
    parser.add_argument(
        "--dilation",
        type=_positive,
        metavar="D",
        help="how much slower everything is than in the cloud; default: as much as it takes",
    )
    parser.add_argument("--task", type=_positive, default=1.0, help="seconds of each task; 1")
    tasks = {
        "strong": (STRONG_TASKS, "tasks of `strong`"),
        "weak": (WEAK_TASKS, "tasks of `weak` for each executor"),
        "map": (MAP_TASKS, "tasks of `map`"),
        "tree": (TREE_LEAVES, "leaves of `tree`, a power of two"),
    }
    for curve, (default, text) in tasks.items():
        parser.add_argument(f"--{curve}-tasks", type=_count, default=default, help=text)
    for field in fields(Platform):
        if field.name != "executors":
            kind = int if field.name in ("burst", "seed") else float
            parser.add_argument(
                f"--{field.name.replace('_', '-')}",
                type=kind,
                default=field.default,
                help=f"of the modelled platform; default: {field.default}",
            )
    outputs(parser)
    parser.set_defaults(call=run)


def run(options: argparse.Namespace) -> int:
    """The `scale` command."""
    chosen = {f.name: getattr(options, f.name) for f in fields(Platform) if f.name != "executors"}
    platform = Platform(**chosen)
    tasks = {curve: getattr(options, f"{curve}_tasks") for curve in CURVES}
    print("\n".join(f"{name:<10} {value:g}" for name, value in chosen.items()))
    print(LINE.format(*COLUMNS) + MORE.format(*MORE_COLUMNS))
    rows: list[Row] = []
    measured: dict[Point, list[Row]] = {}
    with Cloud() as cloud:
        for point in points(options.curve, options.executors, options.task, tasks):
            same = replace(point, curve="")
            known = measured.get(same)
            made = (
                (replace(row, curve=point.curve) for row in known)
                if known is not None
                else measure(cloud, point, platform, options.engine, options.dilation)
            )
            measured[same] = []
            for row in made:
                measured[same].append(row)
                rows.append(row)
                show(row)
    met = targets(rows)
    for target in met:
        print(
            f"{'met' if target.met else 'MISSED':<7} {target.what:<22} {target.found}"
            f"  (target {target.limit})"
        )
    settings = {
        "platform": chosen,
        "dilation": options.dilation,
        "targets": [asdict(target) for target in met],
    }
    write(options, document("scale", settings, [asdict(row) for row in rows]))
    return 0


def _names(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return tuple(name for name in known if name in names)

    return parse


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({_count(each) for each in text.split(",")}))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return value
