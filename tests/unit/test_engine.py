"""The engine by itself: what it decides, given plain facts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from wukong_async import engine as engine_module
from wukong_async.engine import (
    Action,
    Advice,
    Begin,
    Delete,
    Drop,
    Engine,
    Exit,
    Fetch,
    Invoke,
    InvokeAgain,
    Load,
    NoAdvice,
    Publish,
    Run,
    Send,
    State,
    Step,
)
from wukong_async.plan import Plan, make_plan
from wukong_async.protocol import Begun, Commit, Reply, Status


@dataclass
class Script:
    """Answers everything the obvious way, and remembers what was asked."""

    plan: Plan
    claims: list[tuple[int, ...]] = field(default_factory=list)
    seen: list[Action] = field(default_factory=list)
    ran: list[int] = field(default_factory=list)
    memory: set[int] = field(default_factory=set)
    peak: int = 0
    commits: list[Commit] = field(default_factory=list)

    def drive(self, frontier: Sequence[int]) -> Engine:
        engine = Engine()
        while engine.state is not State.EXIT:
            actions = engine.next_actions()
            assert actions, f"{engine} waits for nothing"
            for action in actions:
                self.seen.append(action)
                self.answer(engine, action, frontier)
        self.seen += engine.next_actions()
        return engine

    def answer(self, engine: Engine, action: Action, frontier: Sequence[int]) -> None:
        match action:
            case Begin():
                engine.begun(Begun(Status.OK, 1, 0, "", 10.0, tuple(frontier)))
            case Load():
                engine.loaded(self.plan.specs)
            case Fetch(objects):
                self.memory.update(objects)
                engine.fetched(dict.fromkeys(objects, 100))
            case Run(steps):
                for task, drops in steps:
                    assert self.memory.issuperset(self.plan.specs[task].inputs)
                    self.memory.add(task)
                    self.ran.append(task)
                    self.peak = max(self.peak, len(self.memory))
                    self.memory.difference_update(drops)
                engine.ran()
            case Publish():
                engine.published()
            case Send(_, commit):
                self.commits.append(commit)
                claims = self.claims.pop(0) if self.claims else ()
                engine.replied(Reply(Status.OK, claims, (), not claims))
            case Drop(objects):
                self.memory.difference_update(objects)

    def of(self, kind: type[Action]) -> list[Action]:
        return [action for action in self.seen if isinstance(action, kind)]


def chain(length: int) -> Plan:
    return make_plan({i: [i - 1] if i else [] for i in range(length)}, [length - 1])


def changed(plan: Plan, tasks: Iterable[int], **changes: Any) -> Plan:
    """A plan some of whose tasks are different."""
    specs = list(plan.specs)
    for task in tasks:
        specs[task] = specs[task]._replace(**changes)
    return replace(plan, specs=specs)


def tree(leaves: int) -> Plan:
    level = list(range(leaves))
    graph: dict[int, list[int]] = {i: [] for i in level}
    while len(level) > 1:
        above = [len(graph) + i for i in range(len(level) // 2)]
        graph.update({n: level[2 * i : 2 * i + 2] for i, n in enumerate(above)})
        level = above
    return make_plan(graph, level)


def test_a_chain_is_one_commit_and_one_value_in_memory() -> None:
    script = Script(chain(1000))
    engine = script.drive([0])
    assert script.ran == list(range(1000))
    assert script.commits == [Commit(stay=(), passed=1000, results=(999,))]
    assert script.peak <= 2
    assert not script.of(Fetch)
    assert script.seen[-1] == Exit(Status.OK)
    assert repr(engine).startswith("<Engine EXIT gen=1 seq=1")


def test_a_fan_in_made_here_needs_no_store() -> None:
    script = Script(tree(64))
    script.drive(script.plan.leaves)
    assert [len(action.tasks) for action in script.of(Publish) if isinstance(action, Publish)] == [
        1
    ]
    assert script.commits == [Commit(stay=(), passed=127, results=(126,))]
    assert script.peak <= 8, "depth first: a path to the root, not a whole level"


@pytest.mark.parametrize("leaves", [64, 1024, 8192])
def test_what_is_held_of_a_tree_is_as_much_as_it_is_deep(leaves: int) -> None:
    plan = tree(leaves)
    depth = leaves.bit_length()
    whole = Script(plan)
    whole.drive(plan.leaves)
    assert whole.peak <= depth + 1
    root = len(plan) - 1
    half = Script(plan, claims=[(root,)])
    half.drive(plan.leaves[: leaves // 2])
    assert half.peak <= depth + 1


@pytest.mark.parametrize("width", [64, 1024, 8192])
def test_what_is_held_between_a_fan_out_and_a_tree_is_as_much_as_it_is_deep(width: int) -> None:
    graph: dict[int, list[int]] = {0: []}
    level = []
    for _ in range(width):  # Two tasks in a row from the one root to each leaf.
        graph[len(graph)] = [0]
        graph[len(graph)] = [len(graph) - 1]
        level.append(len(graph) - 1)
    while len(level) > 1:
        above = [len(graph) + i for i in range(len(level) // 2)]
        graph.update({n: level[2 * i : 2 * i + 2] for i, n in enumerate(above)})
        level = above
    script = Script(make_plan(graph, level))
    script.drive([0])
    assert script.commits == [Commit(stay=(), passed=len(graph), results=(len(graph) - 1,))]
    assert script.peak <= width.bit_length() + 3, "the root, a path, and not a whole level"


@pytest.mark.parametrize("limited", [0, 3, 4, 6], ids=["leaf", "leaf later", "fan-in", "root"])
def test_a_task_whose_time_is_limited_runs_by_itself(limited: int) -> None:
    plan = tree(4)
    plan = changed(plan, [limited], limited=True)
    script = Script(plan)
    script.drive(plan.leaves)
    runs = [[step.task for step in run.steps] for run in script.of(Run) if isinstance(run, Run)]
    assert [limited] in runs
    assert script.ran == list(range(7)), "and the order stays"
    assert len(runs) == (2 if limited in {0, 6} else 3)


def test_half_a_tree_arrives_at_the_root_and_a_claim_continues() -> None:
    plan = tree(8)
    root = len(plan) - 1
    half = plan.leaves[:4]
    script = Script(plan, claims=[(root,)])
    script.drive(half)
    mine, other = plan.specs[root].inputs
    first, second = script.commits
    assert first == Commit(stay=(), passed=7, publish=((mine, 1),), arrivals=((root, 2, 1),))
    assert second == Commit(stay=(), passed=1, results=(root,), reads=((mine, 1), (other, 1)))
    assert [a.objects for a in script.of(Fetch) if isinstance(a, Fetch)] == [(other,)]


def test_several_inputs_of_one_fan_in_arrive_together() -> None:
    plan = make_plan({**{i: [] for i in range(10)}, 10: list(range(10))}, [10])
    script = Script(plan)
    script.drive(plan.leaves[:6])
    (commit,) = script.commits
    assert commit.arrivals == ((10, 10, 6),)
    assert commit.publish == tuple((i, 1) for i in range(6))


def test_reads_of_an_output_by_tasks_that_ran_here_are_settled_here() -> None:
    # 0 feeds 1 (runs here) and 3 (a fan-in with 2, which somebody else computes).
    plan = make_plan({"a": [], "b": ["a"], "c": [], "d": ["a", "c"]}, ["b", "d"])
    a = plan.numbers["a"]
    script = Script(plan)
    script.drive([a])
    (commit,) = script.commits
    assert commit.publish == ((a, 1),)
    assert commit.results == (plan.numbers["b"],)


def test_an_output_that_is_also_an_input_is_kept_until_it_is_announced() -> None:
    plan = make_plan({0: [], 1: [0], 2: [1]}, [0, 2])
    script = Script(plan)
    script.drive([0])
    assert script.commits == [Commit(stay=(), passed=3, results=(0, 2))]
    assert script.memory == {0, 2}


def test_what_a_claim_does_not_read_is_dropped() -> None:
    plan = make_plan(
        {"a": [], "b": [], "x": [], "y": [], "f": ["a", "x"], "g": ["b", "y"]}, ["f", "g"]
    )
    number = plan.numbers
    script = Script(plan, claims=[(number["f"],)])
    script.drive([number["a"], number["b"]])
    dropped = [number for a in script.of(Drop) if isinstance(a, Drop) for number in a.objects]
    assert number["b"] in dropped
    assert script.ran == [number["a"], number["b"], number["f"]]


def test_inputs_are_read_ahead_but_not_without_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "FETCH_MOST", 8)
    monkeypatch.setattr(engine_module, "FETCH_FIRST", 2)
    width = 50
    graph: dict[object, list[object]] = {("x", i): [] for i in range(2 * width)}
    graph |= {i: [("x", 2 * i), ("x", 2 * i + 1)] for i in range(width)}
    plan = make_plan(graph, range(width))
    script = Script(plan)
    script.drive([plan.numbers[i] for i in range(width)])
    assert len(script.ran) == width
    assert script.peak <= 2 * 8 + width, "one window runs, one is read, outputs stay"
    fetched = [number for a in script.of(Fetch) if isinstance(a, Fetch) for number in a.objects]
    assert len(fetched) == len(set(fetched)) == 2 * width


def test_large_objects_make_the_window_small() -> None:
    engine = Engine()
    width = 2000
    graph: dict[object, list[object]] = {("x", i): [] for i in range(width)}
    graph |= {i: [("x", i), ("x", (i + 1) % width)] for i in range(width)}
    plan = make_plan(graph, range(width))
    engine.next_actions()
    engine.begun(Begun(Status.OK, 1, 0, "", 10.0, tuple(plan.numbers[i] for i in range(width))))
    sizes: list[int] = []
    for _ in range(20):
        for action in engine.next_actions():
            match action:
                case Load(tasks):
                    engine.loaded([plan.specs[task] for task in tasks])
                case Fetch(objects):
                    sizes.append(len(objects))
                    engine.fetched(dict.fromkeys(objects, 50_000_000))
                case Run():
                    engine.ran()
    assert sizes[0] <= engine_module.FETCH_FIRST, "nothing is known about sizes at first"
    assert max(sizes[1:]) * 50_000_000 <= engine_module.FETCH_BYTES


@pytest.mark.parametrize("status", [Status.GONE, Status.HELD])
def test_an_invocation_without_a_record_exits_at_once(status: Status) -> None:
    engine = Engine()
    assert engine.next_actions() == [Begin()]
    engine.begun(Begun(status))
    assert engine.next_actions() == [Exit(status)]


@pytest.mark.parametrize("status", [Status.FENCED, Status.STOP, Status.STALE, Status.REJECTED])
def test_a_refused_commit_ends_it(status: Status) -> None:
    plan = chain(1)
    engine = _until_send(plan)
    engine.replied(Reply(status))
    assert engine.next_actions() == [Exit(status)]
    assert engine.next_actions() == []


def test_what_is_freed_is_deleted_before_anything_else() -> None:
    engine = _until_send(chain(1))
    engine.replied(Reply(Status.OK, (), ((7, "2:0-1"),), gone=True))
    assert engine.next_actions() == [Delete(((7, "2:0-1"),)), Exit(Status.OK)]


def test_a_failure_commits_at_once_and_alone() -> None:
    plan = chain(3)
    engine = Engine()
    engine.next_actions()
    engine.begun(Begun(Status.OK, 1, 4, "", 10.0, (0,)))
    engine.next_actions()
    engine.loaded(plan.specs)
    assert isinstance(engine.next_actions()[0], Run)
    engine.failed()
    assert engine.next_actions() == [Send(5, Commit(failed=True))]


def test_stopped_once_stopped_for_good() -> None:
    plan = chain(2)
    engine = Engine()
    engine.next_actions()
    engine.begun(Begun(Status.OK, 1, 0, "", 10.0, (0,)))
    engine.next_actions()
    assert engine.refused(Status.FENCED)
    engine.stopped(Status.STOP)
    assert engine.next_actions() == [Exit(Status.FENCED)]
    engine.loaded(plan.specs)
    engine.fetched({})
    engine.ran()
    assert engine.next_actions() == []


def test_blocks_are_loaded_while_tasks_run() -> None:
    plan = chain(4)
    engine = Engine()
    engine.next_actions()
    engine.begun(Begun(Status.OK, 1, 0, "", 10.0, (0,)))
    assert engine.next_actions() == [Load((0,))]
    engine.loaded(plan.specs[:2])
    run, load = engine.next_actions()
    assert isinstance(run, Run)
    assert [step.task for step in run.steps] == [0, 1]
    assert load == Load((2,))


def test_a_literal_is_read_before_the_task_that_needs_it_and_once() -> None:
    plan = chain(3)
    literal = -1
    plan = changed(plan, range(3), literals=(literal,))
    script = Script(plan)
    script.drive([0])
    assert script.ran == [0, 1, 2]
    assert script.commits == [Commit(stay=(), passed=3, results=(2,))]
    fetched = [a.objects for a in script.of(Fetch) if isinstance(a, Fetch)]
    assert fetched == [(literal,)], "it is still there when the next task asks for it"


def _until_send(plan: Plan) -> Engine:
    engine = Engine()
    answers: Mapping[type[Action], object] = {
        Begin: lambda: engine.begun(Begun(Status.OK, 1, 0, "", 10.0, tuple(plan.leaves))),
        Load: lambda: engine.loaded(plan.specs),
        Run: engine.ran,
        Publish: engine.published,
    }
    while True:
        for action in engine.next_actions():
            if isinstance(action, Send):
                return engine
            answers[type(action)]()  # type: ignore[operator]


@pytest.mark.parametrize("early", [True, False])
def test_what_comes_late_is_kept_for_a_hand_over(early: bool) -> None:
    """An input that was fetched, and then made here, is dropped by nobody who did not run."""
    plan = make_plan({0: [], 1: [0], 2: [0], 3: [], 4: [1, 2, 3]}, [4])
    engine = Engine()
    engine.next_actions()
    # A dead incarnation has told of 0: 1 is in the frontier, and reads it from the store.
    bits = bytes([0b1100_0000])
    engine.begun(Begun(Status.OK, 2, 1, "", 10.0, (0, 1), check=True, taken=bits))
    engine.next_actions()
    engine.loaded(plan.specs)
    fetch, run = engine.next_actions()
    assert fetch == Fetch((0,))
    assert isinstance(run, Run)
    assert [task for task, _ in run.steps] == [0, 2, 1]
    assert run.steps[-1].drops == (0,)
    if early:
        engine.fetched({0: 100})
    engine.hand_over()
    engine.ran(2)
    if not early:
        engine.fetched({0: 100})
    actions = engine.next_actions()
    assert not [action for action in actions if isinstance(action, Drop)]
    assert [action.tasks for action in actions if isinstance(action, Publish)] == [(2,)]


# Sharing --------------------------------------------------------------------------------------


class Stepwise:
    """An engine one Run at a time, so that it can be asked to share in between."""

    def __init__(
        self,
        plan: Plan,
        frontier: Sequence[int],
        *,
        threads: int = 1,
        advice: Advice | None = None,
        **begun: Any,
    ) -> None:
        self.plan = plan
        self.engine = Engine(advice, threads=threads)
        self.seen: list[Action] = []
        self.sent: list[Commit] = []
        self.runs: list[tuple[int, ...]] = []
        self.engine.next_actions()
        self.engine.begun(Begun(Status.OK, 1, 0, "", 10.0, tuple(frontier), **begun))
        self.go()

    def go(self) -> None:
        """Answer everything but Run and Send."""
        engine = self.engine
        while actions := engine.next_actions():
            for action in actions:
                self.seen.append(action)
                match action:
                    case Load():
                        engine.loaded(self.plan.specs)
                    case Fetch(objects):
                        engine.fetched(dict.fromkeys(objects, 100))
                    case Run(steps):
                        self.runs.append(tuple(step.task for step in steps))
                    case Publish():
                        engine.published()
                    case Send(_, commit):
                        self.sent.append(commit)

    def ran(self, count: int | None = None, run: int | None = None) -> None:
        self.engine.ran(count, run=run)
        self.go()

    @property
    def dropped(self) -> list[int]:
        drops = [action.objects for action in self.seen if isinstance(action, Drop)]
        return [number for objects in drops for number in objects]

    def share(self, **what: Any) -> bool:
        formed = self.engine.share(**what)
        self.go()
        return formed

    def reply(self, **answer: Any) -> None:
        self.engine.replied(Reply(Status.OK, **answer))
        self.go()


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "RUN_LIMIT", 1)


def wide(width: int) -> Plan:
    """Leaves, and one fan-in of them all: its number is the width."""
    return make_plan({**{i: [] for i in range(width)}, width: list(range(width))}, [width])


def fan_out(width: int) -> Plan:
    """One task with a number of consumers."""
    return make_plan({0: [], **{i: [0] for i in range(1, width + 1)}}, range(1, width + 1))


@pytest.mark.usefixtures("one_by_one")
def test_what_arrives_early_is_published_with_it_and_told_once() -> None:
    job = Stepwise(wide(4), [0, 1, 2])
    assert job.engine.pending == {4: [(0, 0)]}
    assert not job.share(arrive=[4]), "it runs, and is not there yet"
    job.ran()
    assert job.share(arrive=[4])
    assert not job.share(arrive=[4]), "one commit at a time"
    assert job.sent == [Commit(publish=((0, 1),), arrivals=((4, 4, (0,)),))]
    assert job.engine.pending == {4: [(1, 1)]}
    job.reply()
    job.ran()
    job.ran()
    assert job.sent[1] == Commit(
        passed=3, stay=(), publish=((1, 1), (2, 1)), arrivals=((4, 4, 2),)
    ), "what was told is not told again"


@pytest.mark.usefixtures("one_by_one")
def test_a_question_goes_with_what_there_is_to_say() -> None:
    job = Stepwise(wide(4), [0, 1, 2])
    assert job.share(ask=True)
    assert job.sent == [Commit()], "there is nothing"
    job.reply(free=3)
    assert job.engine.free == 3
    job.ran()
    assert job.share(arrive=[4], ask=True)
    assert job.sent[1].arrivals == ((4, 4, (0,)),)


class Hasty(NoAdvice):
    """Some are to be first."""

    def urgent(self, engine: Engine, tasks: Sequence[int]) -> Collection[int]:
        return {task for task in tasks if task % 6 == 1}


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("window", [1, 100])
def test_once_work_is_given_away_what_others_wait_for_goes_first(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "LOAD_AHEAD", window)
    # Ten chains of three, of which the first tasks have run elsewhere.
    graph = {i: [] if i % 3 == 0 else [i - 1] for i in range(30)}
    frontier = range(1, 30, 3)
    job = Stepwise(make_plan(graph, range(2, 30, 3)), frontier, advice=Hasty())
    assert job.share(offers=[frontier[-2:]])
    job.reply(accepted=(True,))
    while job.engine.state is State.WORK:
        job.ran()
    order = [task for run in job.runs for task in run]
    assert sorted(order) == [i for i in range(24) if i % 3], "all but what was given away"
    if window == 1:  # What 4 reads is here, and that of the others has not been asked for.
        assert order == [1, 2, 4, 7, 13, 19, 20, 14, 8, 5, 10, 11, 16, 17, 22, 23]
    else:
        assert order == [1, 7, 13, 19, 20, 14, 8, 2, 4, 5, 10, 11, 16, 17, 22, 23]


@pytest.mark.usefixtures("one_by_one")
def test_what_is_urgent_does_not_hold_up_what_can_be_run() -> None:
    # Five chains of three, of which the first tasks have run elsewhere.
    plan = make_plan({i: [] if i % 3 == 0 else [i - 1] for i in range(15)}, range(2, 15, 3))
    engine = Engine(Hasty())
    engine.next_actions()
    engine.begun(Begun(Status.OK, 1, 0, "", 10.0, (1, 4, 7, 10, 13)))
    engine.next_actions()
    engine.loaded(plan.specs)
    assert Fetch((0, 3, 6, 9, 12)) in engine.next_actions()
    engine.fetched({0: 100, 3: 100, 9: 100})
    assert Run((Step(1, ()),)) in engine.next_actions()
    assert engine.share(offers=[[13]])
    engine.next_actions()
    engine.replied(Reply(Status.OK, accepted=(True,)))
    for task in (2, 4, 5):  # 7 is urgent, but 6 is still on its way.
        engine.ran()
        runs = [a.first for a in engine.next_actions() if isinstance(a, Run)]
        assert runs == [task]
    engine.fetched({6: 100, 12: 100})
    engine.ran()
    assert [a.first for a in engine.next_actions() if isinstance(a, Run)] == [7]


@pytest.mark.usefixtures("one_by_one")
def test_what_is_urgent_stays_so() -> None:
    plan = make_plan({i: [] for i in range(20)}, range(20))
    job = Stepwise(plan, range(20), advice=Hasty())
    assert job.share(offers=[[19]])
    job.reply(accepted=(True,))
    assert job.share(ask=True)
    job.reply()
    for _ in range(4):
        job.ran()
    assert job.runs == [(0,), (1,), (7,), (13,), (2,)]


@pytest.mark.usefixtures("one_by_one")
def test_a_probe_stores_nothing_and_nobody_polls() -> None:
    job = Stepwise(wide(4), [0, 1])
    job.ran()
    job.ran(0)  # The next one has not started.
    assert not job.share(probe=[4]), "one of its inputs has not run"
    job.ran()
    assert job.sent[0].passed == 2
    job = Stepwise(wide(4), [0, 1, 2])
    job.engine.ran()
    assert job.share(probe=[4])
    assert job.sent == [Commit(probes=((4, 4, ((0, 0),)),))]
    assert not [action for action in job.seen if isinstance(action, Publish)]
    job.reply()
    job.engine.ran()
    assert job.share(probe=[4]), "something has run since"
    assert job.sent[1].probes == ((4, 4, ((0, 0), (1, 1))),)
    job.reply()
    assert not job.share(probe=[4]), "nothing has happened since"


def test_a_fan_in_with_a_published_input_is_not_probed() -> None:
    plan = make_plan({"a": [], "x": [], "f": ["a", "x"], "g": ["a", "x"]}, ["f", "g"])
    a, f, g = (plan.numbers[key] for key in "afg")
    job = Stepwise(plan, [a])
    job.engine.ran()
    assert job.share(arrive=[f])
    assert job.sent[0].publish == ((a, 2),), "all readers are counted: some may have read it"
    job.engine.replied(Reply(Status.OK))
    assert not job.engine.share(probe=[g])


def test_a_claim_by_a_probe_runs_here_with_what_is_in_memory() -> None:
    job = Stepwise(wide(2), [0])
    job.engine.ran()
    assert job.share(probe=[2])
    job.reply(claims=(2,))
    assert job.runs == [(0,), (2,)]
    assert [action.objects for action in job.seen if isinstance(action, Fetch)] == [(1,)]
    job.ran()
    assert job.sent[1] == Commit(passed=2, stay=(), results=(2,), reads=((1, 1),)), (
        "what never was in the store is not counted there"
    )


def test_an_input_that_was_brought_already_arrives_no_more() -> None:
    job = Stepwise(wide(3), [0, 1], check=True)
    job.engine.ran()
    assert job.share(probe=[3])
    job.reply(already=(0,))
    assert job.sent[1].arrivals == ((3, 3, (1,)),)
    assert job.sent[1].publish == ((1, 1),)


@pytest.mark.parametrize("before", [0, 1, 2], ids=["ready", "running", "done"])
def test_a_claim_of_something_that_runs_here_is_not_run_again(before: int) -> None:
    """A dead incarnation had brought one input; the other one is the last that was missing."""
    job = _while_its_last_input_runs(check=True)
    for _ in range(before):
        job.ran()
    job.reply(claims=(2,))
    for _ in range(2 - before):
        job.ran()
    assert job.runs == [(0,), (1,), (2,)]
    assert not [action for action in job.seen if isinstance(action, Fetch)]
    assert job.sent[-1].passed == 3


def _while_its_last_input_runs(**begun: Any) -> Stepwise:
    limit, engine_module.RUN_LIMIT = engine_module.RUN_LIMIT, 1
    try:
        job = Stepwise(wide(2), [0, 1], **begun)
        job.engine.ran()
        assert job.share(probe=[2])
    finally:
        engine_module.RUN_LIMIT = limit
    assert job.runs == [(0,), (1,)]
    return job


@pytest.mark.usefixtures("one_by_one")
def test_what_is_offered_is_nobodys_until_the_answer() -> None:
    job = Stepwise(fan_out(4), [0])
    job.ran()
    assert job.runs == [(0,), (1,)]
    assert job.engine.offerable() == [2, 3, 4]
    assert job.share(offers=[[2], [4]])
    assert job.sent == [Commit(publish=((0, 4),), offers=((2,), (4,)))], "its input goes before"
    assert job.engine.offerable() == [3]
    job.ran()
    job.ran()
    assert job.runs == [(0,), (1,), (3,)], "and now it waits"
    job.reply(accepted=(True, False))
    assert Invoke(1, (0,)) in job.seen
    assert job.runs[3:] == [(4,)], "what was refused is run here"
    job.ran()
    commit = job.sent[1]
    assert commit.passed == 4
    assert commit.results == (1, 3, 4)
    assert commit.reads == ((0, 3),), "one reader is elsewhere"
    assert commit.publish == ()


@pytest.mark.usefixtures("one_by_one")
def test_the_frontier_is_offered_beyond_what_is_read_ahead(monkeypatch: Any) -> None:
    monkeypatch.setattr(engine_module, "LOAD_AHEAD", 1)
    plan = make_plan({i: [] for i in range(6)}, range(6))
    job = Stepwise(plan, range(6))
    offerable = job.engine.offerable()
    assert offerable == list(range(6))[-len(offerable) :]
    assert job.share(offers=[offerable])
    assert job.sent == [Commit(offers=(tuple(offerable),))], "nothing to publish"
    job.reply(accepted=(True,))
    while job.engine.state is State.WORK:
        job.ran()
    assert job.sent[1].passed == 6 - len(offerable)
    assert job.sent[1].stay == (), "what was handed does not stay"


def test_a_fenced_offer_may_have_been_accepted() -> None:
    job = Stepwise(fan_out(300), [0])
    job.engine.ran()
    assert job.share(offers=[job.engine.offerable()[-1:]])
    job.engine.replied(Reply(Status.FENCED))
    assert job.engine.next_actions() == [Invoke(1, (0,)), Exit(Status.FENCED)]


# Successors -----------------------------------------------------------------------------------


def test_a_marked_task_waits_until_its_inputs_are_made_again() -> None:
    job = Stepwise(wide(2), [0, 2], marks=((2, (0,)),), check=True)
    assert job.engine.offerable() == [], "what it waits for has to be made here"
    assert job.runs == [(0,)]
    assert [action.objects for action in job.seen if isinstance(action, Fetch)] == [(1,)]
    job.ran()
    assert job.runs == [(0,), (2,)]
    job.ran()
    assert job.sent[0].passed == 2
    assert job.sent[0].publish == ()


def test_what_was_taken_before_is_let_alone() -> None:
    taken = bytes([0x80 >> 0 | 0x80 >> 1])
    job = Stepwise(fan_out(2), [0], check=True, taken=taken)
    assert job.runs == [(0, 2)], "somebody has task 1"
    job.ran()
    (commit,) = job.sent
    assert commit.arrivals == ()
    assert commit.publish == (), "who took it had its input published"


def test_a_successor_says_which_edges_arrive() -> None:
    job = Stepwise(wide(3), [0, 1], check=True)
    job.ran()
    assert job.sent[0].arrivals == ((3, 3, (0, 1)),)


def test_too_many_arrivals_are_told_in_parts_and_pass_last(monkeypatch: Any) -> None:
    monkeypatch.setattr(engine_module, "COMMIT_MOST", 2)
    job = Stepwise(wide(6), range(5))
    job.ran()
    for _ in range(2):
        job.reply()
    assert [commit.stay is None for commit in job.sent] == [True, True, False]
    assert [commit.passed for commit in job.sent] == [0, 0, 5]
    assert [commit.arrivals for commit in job.sent] == [
        *(((6, 6, (0, 1)),), ((6, 6, (2, 3)),), ((6, 6, 1),))
    ]
    published = [task for commit in job.sent for task, _ in commit.publish]
    assert published == list(range(5))


# Handing over ---------------------------------------------------------------------------------


def test_a_hand_over_waits_for_what_runs_and_passes_what_is_done() -> None:
    job = Stepwise(fan_out(3), [0])
    assert job.runs == [(0, 1, 2, 3)]
    job.engine.hand_over()
    assert job.engine.is_leaving
    job.go()
    assert job.sent == []
    assert not job.share(offers=[[3]])
    job.ran(2)
    (commit,) = job.sent
    assert (commit.passed, commit.release, commit.stay) == (2, True, ())
    assert commit.publish == ((0, 2),)
    assert {c: n for c, n, _ in commit.arrivals} == {2: 1, 3: 1}, "they are claimed"
    job.reply(claims=(2, 3))
    assert job.seen[-2:] == [InvokeAgain(), Exit(Status.OK)]


def test_a_hand_over_keeps_what_has_not_run_of_the_frontier() -> None:
    job = Stepwise(wide(4), [0, 1, 2])
    job.engine.hand_over()
    job.ran(1)
    (commit,) = job.sent
    assert (commit.passed, commit.stay) == (1, ((1, ()), (2, ())))
    job.reply()
    assert job.seen[-2:] == [InvokeAgain(), Exit(Status.OK)]


def test_what_is_spoilt_is_handed_over_to_be_made_again() -> None:
    plan = make_plan({0: [], 1: [0], 2: [1], 3: [2], 4: []}, [3, 4])
    job = Stepwise(plan, [0, 4])
    assert job.runs == [(0, 1, 2, 3, 4)]
    assert all(map(job.engine.is_only_here, (0, 1, 2)))
    job.engine.hand_over()
    assert job.engine.ran(3, spoilt=(2, 1))
    job.go()
    (commit,) = job.sent
    assert (commit.passed, commit.stay) == (1, ((4, ()),))
    assert commit.publish == ((0, 1),)
    assert [consumer for consumer, _, _ in commit.arrivals] == [1]


def test_what_somebody_else_has_read_is_not_spoilt() -> None:
    job = Stepwise(fan_out(3), [0])
    job.engine.hand_over()
    assert not job.engine.ran(2, spoilt=(0,))
    job.go()
    assert job.sent == [], "nothing has changed"
    assert job.engine.ran(2)
    job.go()
    assert job.sent[0].passed == 2


@pytest.mark.usefixtures("one_by_one")
def test_what_was_published_is_not_only_here() -> None:
    job = Stepwise(fan_out(3), [0])
    job.ran()
    assert job.engine.is_only_here(0)
    assert job.share(offers=[[3]])
    assert not job.engine.is_only_here(0)
    assert not job.engine.is_only_here(7)


def test_a_hand_over_of_everything_done_invokes_nobody() -> None:
    job = Stepwise(wide(2), [0])
    job.engine.hand_over()
    job.ran()
    job.reply(gone=True)
    assert InvokeAgain() not in job.seen
    assert job.seen[-1] == Exit(Status.OK)


@pytest.mark.usefixtures("one_by_one")
def test_a_hand_over_waits_for_the_answer_to_an_offer() -> None:
    job = Stepwise(fan_out(3), [0])
    job.ran()
    assert job.share(offers=[[3]])
    job.engine.hand_over()
    job.ran()
    assert len(job.sent) == 1
    job.reply(accepted=(False,))
    assert job.sent[1].release
    assert {consumer for consumer, _, _ in job.sent[1].arrivals} == {2, 3}


def test_what_is_claimed_by_a_probe_and_did_not_run_stays_without_what_passes() -> None:
    job = _while_its_last_input_runs()
    job.engine.hand_over()
    job.ran(0)
    job.reply(claims=(2,))
    assert job.sent[1].stay == ((1, ()), (2, ()))
    assert job.sent[1].publish == ((0, 1),), "its mark goes with the data"


def test_what_a_probe_has_claimed_is_offered_with_its_inputs() -> None:
    """Seen once in 600,000 seeds: it got ready here, too, while the answer was on its way."""
    job = _while_its_last_input_runs(check=True)
    job.reply(claims=(2,))
    job.engine.ran()
    assert job.engine.offerable() == [2]
    assert job.share(offers=[[2]])
    assert [task for task, _ in job.sent[1].publish] == [0], "it is in memory, and in no store"


def test_what_a_probe_has_claimed_is_run_here_if_nobody_takes_it() -> None:
    job = _while_its_last_input_runs(check=True)
    job.reply(claims=(2,))
    job.engine.ran()
    assert job.share(offers=[[2]])
    job.reply(accepted=(False,))
    job.go()
    assert job.runs[-1] == (2,)


# Tasks that wait behind others ----------------------------------------------------------------


def test_what_waits_behind_a_task_is_ready_again_for_others() -> None:
    job = Stepwise(wide(4), range(4))
    assert job.runs == [(0, 1, 2, 3, 4)]
    assert job.engine.take_back(2) == 2
    assert list(job.engine.unfinished) == [0, 1]
    assert job.engine.offerable() == [2, 3]
    assert job.engine.pending == {4: [(0, 0), (1, 1)]}
    assert job.share(offers=[(3,)])
    job.reply(accepted=(True,))
    job.ran()
    assert job.runs[1:] == [(2,)]
    job.ran()
    assert job.sent[-1].arrivals == ((4, 4, 3),), "the other one brings its own"


def test_what_is_taken_back_runs_here_in_the_same_order_if_nobody_else_does() -> None:
    job = Stepwise(tree(8), tree(8).leaves)
    (whole,) = job.runs
    for count in (1, 6, 14):
        assert job.engine.take_back(count) == count
        job.ran()
        assert job.runs.pop() == whole[count:]
        job = Stepwise(tree(8), tree(8).leaves)
    assert job.engine.take_back(15) == 15, "there is nothing behind the last one"


def test_a_value_outlasts_what_is_taken_back() -> None:
    job = Stepwise(fan_out(3), [0])
    assert job.engine.take_back(2) == 2
    job.ran()
    runs = [action.steps for action in job.seen if isinstance(action, Run)]
    assert runs == [
        (Step(0, ()), Step(1, ()), Step(2, ()), Step(3, (0,))),
        (Step(2, ()), Step(3, (0,))),
    ]


def test_what_was_read_for_a_task_outlasts_that_it_is_taken_back() -> None:
    plan = make_plan({0: [], 1: [0], 2: [0], 3: [0]}, [1, 2, 3])
    job = Stepwise(plan, [1, 2, 3])
    assert job.engine.take_back(1) == 1
    job.ran()
    assert job.runs == [(1, 2, 3), (2, 3)]
    assert job.dropped == []
    job.ran()
    assert job.dropped == [0]


def test_another_thread_takes_what_waits_behind_a_task() -> None:
    job = Stepwise(wide(4), range(4), threads=2)
    assert job.runs == [(0, 1, 2, 3, 4)]
    assert job.engine.take_back(1, run=0) == 1
    job.go()
    assert job.runs[1:] == [(1, 2, 3)], "and not what waits for all"
    job.ran(run=1)
    assert len(job.runs) == 2
    job.ran(run=0)
    assert job.runs[2:] == [(4,)]


def test_who_was_set_aside_for_what_is_taken_back_is_not_ready() -> None:
    plan = make_plan({"a": [], "b": [], "f": ["a", "b", "x"], "x": []}, ["f"])
    a, b, f, x = (plan.numbers[key] for key in "abfx")
    job = Stepwise(plan, [a, b, x], threads=2)
    assert job.engine.take_back(1, run=a) == 1
    job.go()
    assert job.runs == [(a, b, x, f), (b, x)], "the last one is set aside for the first one"
    assert job.engine.take_back(1, run=b) == 1
    job.ran(run=a)
    assert job.runs[2:] == [(x,)]
    job.ran(run=b)
    assert job.runs[3:] == []
    job.ran(run=x)
    assert job.runs[3:] == [(f,)]


def test_a_literal_that_a_task_waits_for_is_asked_for_once() -> None:
    plan = wide(3)
    plan = changed(plan, [3], literals=(-1,))
    job = Stepwise(plan, range(3))
    assert job.runs == [(0, 1, 2)]
    assert job.engine.take_back(1) == 1
    job.ran()
    assert job.runs[1:] == [(1, 2, 3)], "it has come meanwhile"
    job.ran()
    assert [a.objects for a in job.seen if isinstance(a, Fetch)] == [(-1,)]
    assert job.sent[-1].passed == 4


def test_who_waits_for_a_mark_goes_as_it_came() -> None:
    plan = make_plan({"a": [], "b": [], "c": ["b"]}, ["a", "c"])
    a, b, c = (plan.numbers[key] for key in "abc")
    job = Stepwise(plan, [a, b, c], marks=((c, (b,)),))
    (run,) = job.runs
    assert job.engine.take_back(1) == run.index(b) + 1, "what is behind it may go"
    job.ran()
    job.ran()
    assert job.sent[-1].passed == 3


def test_a_fan_in_that_has_not_been_read_stays_complete() -> None:
    plan = wide(2)
    engine = Engine()
    engine.next_actions()
    engine.begun(Begun(Status.OK, 1, 0, "", 10.0, (0, 1)))
    engine.next_actions()
    engine.loaded(plan.specs[:2])
    assert engine.next_actions() == [Run((Step(0, ()), Step(1, ()))), Load((2,))]
    assert engine.take_back(1) == 2
    engine.loaded(plan.specs[2:])
    assert engine.take_back(1) == 1


@pytest.mark.parametrize("ending", ["leaving", "failing", "spilling", "after a death"])
def test_nothing_is_taken_back_at_the_end(ending: str) -> None:
    job = Stepwise(wide(4), range(4), check=ending == "after a death", taken=b"\0")
    engine = job.engine
    match ending:
        case "leaving":
            engine.hand_over()
        case "failing":
            engine.failed()
        case "spilling":
            engine.spill()
    assert engine.take_back(1) == 5


# Several Runs at once -------------------------------------------------------------------------


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little there is to do, each thread gets some of it."""
    monkeypatch.setattr(engine_module, "LEAST_SPLIT", 0.0)


@pytest.mark.usefixtures("one_by_one")
def test_there_are_as_many_runs_as_threads() -> None:
    job = Stepwise(wide(5), range(5), threads=2)
    assert job.runs == [(0,), (1,)]
    assert job.engine.idle == 0
    job.ran(run=1)
    assert job.runs == [(0,), (1,), (2,)]
    assert list(job.engine.unfinished) == [0, 2]
    for task in (0, 2, 3, 4):
        job.ran(run=task)
    assert job.runs[-1] == (5,)
    job.ran()
    assert [commit.passed for commit in job.sent] == [6]


@pytest.mark.usefixtures("one_by_one")
def test_what_another_run_makes_is_waited_for() -> None:
    plan = make_plan({"a": [], "b": ["a"], "c": [], "f": ["b", "c"], "o": []}, ["f", "o"])
    a, b, c, f, other = (plan.numbers[key] for key in "abcfo")
    job = Stepwise(plan, plan.leaves, threads=2)
    assert job.runs == [(a,), (c,)]
    job.ran(run=c)
    assert job.runs[2:] == [(other,)], "and not the one that reads what the first one makes"
    job.ran(run=a)
    assert job.runs[3:] == [(b,)]
    job.ran(run=other)
    assert len(job.runs) == 4, "there is only what the last one leads to"
    job.ran(run=b)
    assert job.runs[4:] == [(f,)]


@pytest.mark.usefixtures("split")
def test_no_thread_takes_everything_while_another_one_has_nothing_to_do() -> None:
    job = Stepwise(tree(8), tree(8).leaves, threads=2)
    left, right = job.runs
    assert [task for task in left if not job.plan.specs[task].inputs] == job.plan.leaves[:4]
    assert [task for task in right if not job.plan.specs[task].inputs] == job.plan.leaves[4:]
    assert len(left) == len(right) == 7, "each with what follows from it"
    job.ran(run=left[0])
    job.ran(run=right[0])
    assert job.runs[2] == (14,)


def test_what_takes_no_time_is_not_shared_among_threads() -> None:
    job = Stepwise(tree(8), tree(8).leaves, threads=2)
    assert job.runs == [tuple(range(15))]


@pytest.mark.usefixtures("one_by_one")
def test_a_value_stays_as_long_as_any_run_reads_it() -> None:
    job = Stepwise(fan_out(3), [0], threads=2)
    job.ran()
    assert job.runs[1:] == [(1,), (2,)]
    job.ran(run=1)
    assert job.runs[3:] == [(3,)]
    job.ran(run=3)
    assert job.dropped == []
    job.ran(run=2)
    assert job.dropped == [0]


@pytest.mark.usefixtures("one_by_one")
def test_values_are_dropped_while_something_else_runs() -> None:
    graph: dict[int, list[int]] = {i: [i - 1] if i else [] for i in range(5)}
    plan = make_plan({**graph, 5: [4, 6], 6: []}, [5])
    long = plan.numbers[6]
    job = Stepwise(plan, [0, long], threads=2)
    for task in range(5):
        job.ran(run=task)
    assert job.dropped == [0, 1, 2, 3]
    assert list(job.engine.unfinished) == [long]


@pytest.mark.usefixtures("one_by_one")
def test_literals_stay_as_long_as_any_run_reads_them() -> None:
    plan = wide(4)
    plan = changed(plan, range(4), literals=(-1,))
    job = Stepwise(plan, range(4), threads=2)
    for task in (0, 2, 3):
        job.ran(run=task)
        assert job.dropped == []
    job.ran(run=1)
    assert job.dropped == [-1]


def test_limited_tasks_run_at_the_same_time() -> None:
    plan = wide(3)
    plan = changed(plan, range(2), limited=True)
    job = Stepwise(plan, range(3), threads=3)
    assert job.runs == [(0,), (1,), (2,)]


@pytest.mark.usefixtures("one_by_one")
def test_what_follows_from_a_run_is_not_offered() -> None:
    plan = make_plan({0: [], 1: [0], 2: [0], 3: [], 4: [], 5: []}, range(1, 6))
    job = Stepwise(plan, plan.leaves, threads=2)
    assert len(job.runs) == 2
    reached = set(plan.specs[plan.numbers[0]].consumers)
    assert reached.isdisjoint(job.engine.offerable())
    job.ran(run=plan.numbers[0])
    assert reached.intersection(job.engine.offerable())


@pytest.mark.usefixtures("one_by_one")
def test_a_hand_over_waits_for_all_runs() -> None:
    job = Stepwise(wide(4), [0, 1, 2], threads=2)
    job.engine.hand_over()
    job.ran(run=1)
    assert job.sent == []
    job.ran(0, run=0)
    (commit,) = job.sent
    assert (commit.passed, commit.stay) == (1, ((0, ()), (2, ())))


@pytest.mark.usefixtures("one_by_one")
def test_what_another_run_is_about_to_pass_with_is_not_spoilt() -> None:
    job = Stepwise(fan_out(2), [0], threads=2)
    job.ran()
    assert job.runs[1:] == [(1,), (2,)]
    assert job.engine.is_only_here(0, run=1)
    job.engine.hand_over()
    assert not job.engine.ran(0, spoilt=(0,), run=1)
    job.ran(0, run=2)
    assert job.engine.ran(0, spoilt=(0,), run=1)
    job.go()
    assert job.sent[0].passed == 0
    assert job.sent[0].stay == ((0, ()),)


@pytest.mark.usefixtures("one_by_one")
def test_nothing_is_dropped_that_a_hand_over_may_have_to_make_something_of() -> None:
    job = Stepwise(make_plan({0: [], 1: [0], 2: [], 3: [1, 2]}, [3]), [0, 2], threads=2)
    job.ran(run=0)
    assert job.runs == [(0,), (2,), (1,)]
    job.engine.ran(run=1)
    job.engine.hand_over()
    job.ran(run=2)
    assert job.dropped == []


@pytest.mark.usefixtures("one_by_one")
def test_what_another_run_makes_again_was_read_from_the_store() -> None:
    """Seen once in 50,000 seeds: it was taken for used up, and its new value was gone."""
    plan = make_plan({"x": [], "y": ["x"], "z": []}, ["y", "z"])
    x, y, z = (plan.numbers[key] for key in "xyz")
    taken = bytes([0x80 >> x | 0x80 >> y | 0x80 >> z])
    job = Stepwise(plan, [y, z], threads=2, check=True, taken=taken)
    assert job.runs == [(y,), (z,)]
    job.engine._scheduled.add(x)
    job.engine._running[z] = (Step(x, ()),)
    assert not job.engine.is_only_here(x, run=y)
    assert job.engine.is_only_here(x, run=z)


def test_an_object_whose_reader_was_handed_over_is_not_needed() -> None:
    plan = make_plan({0: [], 1: [0], 2: [0]}, [1, 2])
    engine = Engine()
    engine.next_actions()
    engine.begun(Begun(Status.OK, 1, 0, "", 10.0, (1,)))
    engine.next_actions()
    engine.loaded(plan.specs)
    assert engine.next_actions() == [Fetch((0,))]
    assert engine.is_needed(0)
    assert engine.share(offers=[engine.offerable()])
    assert not engine.is_needed(0)


def test_a_renewal_that_comes_after_the_last_commit_is_no_end() -> None:
    job = Stepwise(wide(2), [0, 1])
    job.ran()
    assert job.sent, "the last commit is in flight, and has ended the record"
    assert not job.engine.refused(Status.FENCED)
    assert job.engine.refused(Status.STOP)
