"""When work is shared, and what is kept: rules W1 to W6, one by one."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from wukong_async.engine import Engine, Publish, Run, Send
from wukong_async.plan import make_plan
from wukong_async.policy import (
    Costs,
    Estimate,
    Meter,
    Policy,
    Running,
    Sharing,
    first_groups,
    news_of,
    recalled,
    remembered,
)
from wukong_async.protocol import Begun, Reply, Status

COSTS = Costs(start=0.05, round_trip=0.001, bandwidth=100e6, invoke=0.00025)
MB = 1e6


class Executor:
    """An engine with a policy, and a plan whose tasks are called as their keys begin."""

    def __init__(
        self,
        graph: Mapping[str, Sequence[str]],
        outputs: Sequence[str],
        *,
        known: Mapping[str, tuple[float, float]] | None = None,
        free: int = 999,
        slots: int = 1000,
        alone: bool = True,
        frontier: Sequence[str] = (),
        span: tuple[int, int] | None = None,
        hold: float | None = None,
    ) -> None:
        self.plan = make_plan(graph, outputs)
        self.number = self.plan.numbers
        self.specs = [
            spec._replace(name=key.partition("-")[0])
            for spec, key in zip(self.plan.specs, self.plan.keys, strict=True)
        ]
        estimates = {name: Estimate(10, *figures) for name, figures in (known or {}).items()}
        tasks = [self.number[key] for key in frontier] or self.plan.leaves
        self.policy = Policy(
            COSTS,
            estimates,
            inline_limit=16_384,
            span=span or (0, len(self.plan)),
            slots=slots,
            alone=alone,
            hold=hold,
        )
        self.engine = Engine(self.policy, run_seconds=COSTS.start / 2)
        self.engine.next_actions()
        self.engine.begun(Begun(Status.OK, 1, frontier=tuple(tasks), free=free))
        self.engine.next_actions()
        self.engine.loaded(self.specs)
        self.steps: Sequence[int] = ()
        self.sent: list[Send] = []
        self.go()

    def go(self) -> None:
        for action in self.engine.next_actions():
            if isinstance(action, Run):
                self.steps = [step.task for step in action.steps]
            elif isinstance(action, Send):
                self.sent.append(action)
            elif isinstance(action, Publish):
                self.engine.published()

    def ran(self, seconds: float, size: float = 8.0, now: float = 0.0) -> None:
        """What runs has run."""
        seen = [(task, seconds, size) for task in self.steps]
        self.engine.ran()
        self.policy.ran(self.engine, seen, now)

    def look(self, now: float, grown: float = 0.0) -> Sharing | None:
        running = Running(self.steps[0], 0.0, grown) if self.engine.unfinished else None
        return self.policy.look(self.engine, now, running)

    def shares(self, now: float, grown: float = 0.0) -> list[list[str]]:
        """Groups that are offered now, by key."""
        found = self.look(now, grown)
        groups = [] if found is None else found.offers
        return [[self.plan.keys[task] for task in group] for group in groups]


def independent(count: int) -> tuple[dict[str, Sequence[str]], list[str]]:
    keys = [f"map-{i:04}" for i in range(count)]
    return dict.fromkeys(keys, ()), keys


def pairs(count: int) -> tuple[dict[str, Sequence[str]], list[str]]:
    """Leaves, two and two of which are added."""
    graph: dict[str, Sequence[str]] = {f"leaf-{i:04}": () for i in range(2 * count)}
    sums = [f"add-{i:04}" for i in range(count)]
    for i, key in enumerate(sums):
        graph[key] = (f"leaf-{2 * i:04}", f"leaf-{2 * i + 1:04}")
    return graph, sums


# Costs and estimates ------------------------------------------------------------------------------


def test_what_is_measured_here_counts_more_than_what_others_say() -> None:
    meter = Meter()
    meter.believe(Costs(start=0.2, round_trip=0.5))
    assert meter.costs.start == 0.2
    meter.saw("start", 0.01)
    assert meter.costs.start == pytest.approx(0.01), "the first measurement"
    meter.saw("start", 0.03)
    assert meter.costs.start == pytest.approx(0.02)
    meter.believe(Costs(start=9.0, round_trip=0.25))
    assert meter.costs.start == pytest.approx(0.02)
    assert meter.costs.round_trip == 0.25


def test_a_moving_average_forgets() -> None:
    meter = Meter()
    for _ in range(100):
        meter.saw("round_trip", 1.0)
    for _ in range(20):
        meter.saw("round_trip", 0.001)
    assert meter.costs.round_trip < 0.01


def test_of_bandwidths_the_time_is_averaged() -> None:
    meter = Meter()
    meter.saw("bandwidth", 100.0)
    meter.saw("bandwidth", 1e9)  # One that was cached, say, does not hide the other.
    assert meter.costs.bandwidth == pytest.approx(200.0)


def test_what_was_slow_once_counts_less_than_what_is_faster_now() -> None:
    meter = Meter()
    for _ in range(4):
        meter.saw("start", 0.04)
        meter.saw("bandwidth", 100e6)
    meter.saw("start", 0.01)
    meter.saw("bandwidth", 1000e6)
    assert meter.costs.start == pytest.approx(0.025), "half of it is new"
    assert meter.costs.bandwidth == pytest.approx(100e6 / 0.55)
    for _ in range(4):
        meter.saw("start", 0.01)
        meter.saw("bandwidth", 1000e6)
    start, bandwidth = meter.costs.start, meter.costs.bandwidth
    meter.saw("start", 0.04)
    meter.saw("bandwidth", 100e6)
    assert meter.costs.start == pytest.approx(start + (0.04 - start) / 4)
    assert 1 / meter.costs.bandwidth == pytest.approx(0.75 / bandwidth + 0.25 / 100e6)


def test_a_bandwidth_that_is_not_measured_any_more_is_doubted() -> None:
    meter = Meter()
    meter.believe(Costs(bandwidth=50e6))
    meter.doubt()
    assert meter.costs.bandwidth == 50e6, "nothing was measured"
    meter.saw("bandwidth", 60e6)
    meter.doubt()
    assert meter.costs.bandwidth == 60e6, "it was measured in the last job"
    meter.doubt()
    assert meter.costs.bandwidth == 90e6
    for _ in range(20):
        meter.doubt()
    assert meter.costs.bandwidth == 480e6, "not without end"
    meter.saw("start", 0.05)
    assert "" not in news_of({}, meter, {}), "others are told what was measured"
    meter.saw("bandwidth", 60e6)
    assert meter.costs.bandwidth < 110e6, "what is measured now counts as much as the doubt"
    assert "" in news_of({}, meter, {})


def test_estimates_travel() -> None:
    estimates = {"a": Estimate(50, 0.5, 10.0), "b": Estimate(2, 1.0, 1e6)}
    known, costs = recalled(remembered(estimates, COSTS))
    assert costs == COSTS
    assert known == {"a": Estimate(4, 0.5, 10.0), "b": Estimate(2, 1.0, 1e6)}
    assert recalled({}) == ({}, None)


def test_only_news_are_remembered() -> None:
    meter = Meter()
    for name, value in {"start": 0.05, "bandwidth": 1e8}.items():
        meter.saw(name, value)
    estimates = {
        "slow": Estimate(3, 1.0, 8.0),
        "large": Estimate(3, 1e-6, 1e6),
        "trivial": Estimate(1000, 1e-6, 8.0),
    }
    news = news_of(estimates, meter, {})
    assert set(news) == {"", "slow", "large"}
    assert news_of(estimates, meter, news) == {}
    estimates["slow"].seconds = 1.5
    assert news_of(estimates, meter, news) == {}
    estimates["slow"].seconds = 3.0
    assert set(news_of(estimates, meter, news)) == {"slow"}


# The first executors ------------------------------------------------------------------------------


def test_one_executor_begins_where_nothing_is_known() -> None:
    executor = Executor(*independent(100))
    assert first_groups(executor.specs, executor.plan.leaves, [], COSTS, 1000) == [list(range(100))]


def test_as_many_begin_as_the_work_is_worth() -> None:
    specs = Executor(*independent(100)).specs
    groups = first_groups(
        specs, [s.number for s in specs if not s.inputs], [Estimate(1, 0.1, 8.0)] * 100, COSTS, 1000
    )
    assert 90 < len(groups) <= 100, "10 s are worth as many starts, but for the last ones"
    assert [task for group in groups for task in group] == list(range(100))
    groups = first_groups(
        specs, [s.number for s in specs if not s.inputs], [Estimate(1, 0.1, 8.0)] * 100, COSTS, 2
    )
    assert [len(group) for group in groups] == [50, 50]


def test_fewer_begin_where_much_would_have_to_be_moved() -> None:
    graph, outputs = pairs(8)
    graph["top"] = outputs
    executor = Executor(graph, ["top"])
    large = [Estimate(1, 0.2, 100 * MB)] * len(executor.specs)
    assert len(first_groups(executor.specs, executor.plan.leaves, large, COSTS, 1000)) == 1
    small = [Estimate(1, 0.2, 8.0)] * len(executor.specs)
    assert len(first_groups(executor.specs, executor.plan.leaves, small, COSTS, 1000)) > 8


def test_who_is_invoked_later_begins_with_less() -> None:
    specs = Executor(*independent(1000)).specs
    costs = replace(COSTS, invoke=0.02)
    known = [Estimate(1, 1.0, 8.0)] * 1000
    groups = first_groups(specs, range(1000), known, costs, 100)
    assert functools.reduce(operator.iadd, groups, []) == list(range(1000))
    assert len(groups) == 100
    ends = [0.02 * index + len(group) for index, group in enumerate(groups)]
    # Of tasks of 1 s, fewer would end later: sum(floor(11.3 - 0.02 * i)) is less than 1,000.
    assert 11.4 <= max(ends) <= 11.6
    assert max(ends) - min(ends) <= 1.5


def test_nobody_begins_who_would_come_too_late() -> None:
    specs = Executor(*independent(1000)).specs
    costs = Costs(start=0.001, invoke=0.01)
    groups = first_groups(specs, range(1000), [Estimate(1, 0.02, 8.0)] * 1000, costs, 1000)
    assert functools.reduce(operator.iadd, groups, []) == list(range(1000))
    # They end after 0.64 s, as sum(0.64 - 0.01 * i) up to 0.64 is 20 s.
    assert 50 < len(groups) <= 64
    assert max(0.01 * index + 0.02 * len(group) for index, group in enumerate(groups)) < 0.66


@pytest.mark.parametrize(("batch", "count"), [(1, 10), (3, 4), (100, 1)])
def test_leaves_in_batches(batch: int, count: int) -> None:
    specs = Executor(*independent(10)).specs
    groups = first_groups(
        specs, [s.number for s in specs if not s.inputs], [], COSTS, 1000, leaf_batch=batch
    )
    assert len(groups) == count
    assert functools.reduce(operator.iadd, groups, []) == list(range(10))


# Work ---------------------------------------------------------------------------------------------


def test_an_unseen_task_counts_for_nothing_before_two_starts() -> None:
    executor = Executor(*independent(100))
    assert executor.shares(0.0) == []
    assert executor.shares(0.09) == []
    assert executor.policy.again <= 0.2, "it looks again in time"
    groups = executor.shares(0.21)
    assert 1 <= len(groups) <= math.isqrt(999), "blindly, not too many"
    assert groups[0][-1] == "map-0099", "from the far end"


def test_an_unseen_task_whose_output_will_travel_counts_later() -> None:
    executor = Executor(*pairs(50))
    executor.look(0.0)
    assert executor.shares(0.15) == []
    assert executor.shares(0.31)


def test_blindness_ends_with_the_first_task() -> None:
    executor = Executor(*independent(100))
    assert executor.shares(0.001) == []
    executor.ran(0.06, now=0.06)
    assert executor.shares(0.06)


def test_trivial_work_is_not_shared() -> None:
    executor = Executor(*independent(500), known={"map": (1e-5, 8.0)})
    assert executor.shares(0.0) == []


def test_each_group_is_worth_its_start() -> None:
    executor = Executor(*independent(1000), known={"map": (0.001, 8.0)})
    groups = executor.shares(0.0)
    assert 10 < len(groups) <= 20
    for group in groups:
        assert 0.9 * COSTS.start <= len(group) * 0.001
    given = {key for group in groups for key in group}
    assert len(given) == sum(map(len, groups)), "nobody is offered twice"
    kept = 1000 - len(given)
    assert kept * 0.001 >= max(map(len, groups)) * 0.001, "who keeps need not start"


def test_who_is_invoked_invokes_the_rest() -> None:
    executor = Executor(*independent(2000), known={"map": (1.0, 8.0)})
    assert 30 <= len(executor.shares(0.0)) <= 50


def test_no_more_than_there_are_slots() -> None:
    executor = Executor(*independent(100), known={"map": (1.0, 8.0)}, free=3, slots=4)
    assert len(executor.shares(0.0)) == 3


def test_without_a_free_slot_it_asks_now_and_then() -> None:
    executor = Executor(*independent(100), known={"map": (1.0, 8.0)}, free=0)
    asked = [now for now in (i * 0.01 for i in range(100)) if executor.look(now)]
    assert asked[0] == 0.0
    assert 2 <= len(asked) <= 6
    found = executor.look(9.0)
    assert found is not None
    assert found.ask
    assert not found.offers


def test_who_has_nothing_to_do_keeps_what_it_could_begin() -> None:
    executor = Executor({"map-0": ()}, ["map-0"], known={"map": (10.0, 8.0)})
    executor.engine.ran(0)
    assert executor.shares(1.0) == []


def test_a_group_pays_for_what_has_to_be_moved() -> None:
    """A root whose output goes to all of them: 100 MB take a second each way."""
    graph: dict[str, Sequence[str]] = {"root-0": ()}
    outputs = [f"fork-{i:02}" for i in range(20)]
    graph |= dict.fromkeys(outputs, ("root-0",))
    known = {"root": (0.01, 100 * MB), "fork": (0.03, 8.0)}
    executor = Executor(graph, outputs, known=known)
    executor.ran(0.01, 100 * MB, now=0.01)
    assert executor.shares(0.01) == []
    executor = Executor(graph, outputs, known=known | {"root": (0.01, 8.0)})
    executor.ran(0.01, 8.0, now=0.01)
    assert executor.shares(0.01)


def test_one_of_many_groups_that_does_not_pay_stays() -> None:
    graph, outputs = independent(20)
    # What it makes would have to be written for somebody else's.
    graph |= {"heavy-0": (), "far-0": (), "join-0": ("heavy-0", "far-0")}
    known = {"map": (0.1, 8.0), "heavy": (0.1, 100 * MB)}
    leaves = [*outputs, "heavy-0"]
    executor = Executor(graph, [*outputs, "join-0"], known=known, frontier=leaves)
    groups = executor.shares(0.0)
    assert all(len(group) == 1 for group in groups)
    assert len(groups) > 15
    assert ["heavy-0"] not in groups


def test_while_much_is_read_there_is_a_look_for_each_gift_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor = Executor(*independent(100), known={"map": (1.0, 8.0)}, free=0)
    monkeypatch.setattr(Engine, "stalled", 1000)
    executor.look(0.0)
    assert executor.look(0.001) is None
    assert executor.policy.again > 0.04, "there is nobody to give it to"
    executor = Executor(*independent(100), known={"map": (1.0, 8.0)}, free=50)
    assert executor.shares(0.0)
    assert executor.shares(0.001), "what has been read since then"


def test_a_task_that_makes_much_is_not_given_away_blindly() -> None:
    """How the process grows says what the outputs of such tasks will be."""
    graph, sums = pairs(8)
    graph["top-0"] = sums
    executor = Executor(graph, ["top-0"])
    executor.look(0.0)
    assert executor.shares(0.30)
    executor = Executor(graph, ["top-0"])
    executor.look(0.0)
    assert executor.shares(0.30, grown=400 * MB) == []


# Outputs ------------------------------------------------------------------------------------------


def fan_in(*, size: float, alone: bool = False, free: int = 5) -> Executor:
    """One of two inputs of a fan-in has been made here; somebody else makes the other one."""
    graph: dict[str, Sequence[str]] = {"left-0": (), "right-0": (), "add-0": ("left-0", "right-0")}
    graph["more-0"] = ()
    executor = Executor(
        graph,
        ["add-0", "more-0"],
        frontier=["left-0", "more-0"],
        span=(0, 1),
        alone=alone,
        free=free,
    )
    executor.ran(0.5, size, now=1.0)
    executor.go()
    assert [executor.plan.keys[task] for task in executor.steps] == ["more-0"], "it goes on"
    return executor


def test_while_nobody_else_exists_nothing_is_told() -> None:
    executor = fan_in(size=8.0, alone=True)
    for now in (1.0, 2.0, 60.0):
        found = executor.look(now)
        assert found is None or not (found.arrive or found.probe)


def test_a_small_output_waits_for_company() -> None:
    executor = fan_in(size=8.0)
    assert executor.look(1.0) is None
    found = executor.look(1.06)
    assert found is not None
    assert found.arrive == [executor.number["add-0"]]


def test_a_large_output_is_probed_and_then_told() -> None:
    executor = fan_in(size=10 * MB)
    add = executor.number["add-0"]
    assert executor.look(1.0) is None, "there may be more to probe"
    found = executor.look(1.005)
    assert found is not None
    assert (found.probe, found.arrive) == ([add], [])
    assert executor.engine.share(probe=[add])
    executor.go()
    executor.engine.replied(Reply(Status.OK, free=5))
    assert executor.look(1.3) is None
    found = executor.look(9.0)
    assert found is not None
    assert found.arrive == [add], "it is not kept for ever"


def test_a_large_output_is_kept_while_nobody_has_time() -> None:
    executor = fan_in(size=10 * MB, free=0)
    executor.look(1.2)
    assert executor.engine.share(probe=[executor.number["add-0"]])
    executor.go()
    executor.engine.replied(Reply(Status.OK, free=0))
    found = executor.look(9.0)
    assert found is None or not found.arrive


def test_what_is_large_is_probed_once_more_at_last() -> None:
    executor = fan_in(size=10 * MB)
    add = executor.number["add-0"]
    assert executor.policy.at_last(executor.engine.pending) == ([], [add])
    executor = fan_in(size=8.0)
    assert executor.policy.at_last(executor.engine.pending) == ([], [])


def product() -> Executor:
    """Two by two blocks of a matrix product; the second row is for somebody else."""
    keys = [f"mul-{i}{j}" for i in range(2) for j in range(2)]
    graph: dict[str, Sequence[str]] = {f"{name}-{i}": () for name in "xy" for i in range(2)}
    graph |= {key: (f"x-{key[-2]}", f"y-{key[-1]}") for key in keys}
    known = dict.fromkeys(("x", "y", "mul"), (1.0, 8 * MB))
    return Executor(graph, keys, known=known, slots=2, free=1)


def give(executor: Executor, now: float) -> None:
    """Offer what the policy says, and have it accepted."""
    found = executor.look(now)
    assert found is not None
    assert found.offers
    executor.engine.share(found.arrive, found.probe, found.offers)
    executor.go()
    reply = Reply(Status.OK, free=0, accepted=(True,) * len(found.offers))
    executor.policy.replied(executor.engine, found.offers, reply, now)
    executor.engine.replied(reply)
    executor.go()


def runs_of(executor: Executor, now: float) -> list[str]:
    """Run all that there is, one by one, and tell others what the policy says."""
    ran: list[str] = []
    while executor.engine.unfinished:
        ran += [executor.plan.keys[task] for task in executor.steps]
        executor.ran(1.0, 8 * MB, now)
        now += 1.0
        found = executor.look(now)
        if found is not None and executor.engine.share(found.arrive, found.probe, ask=found.ask):
            executor.go()
            executor.engine.replied(Reply(Status.OK, free=0))
        executor.go()
    return ran


def test_what_others_wait_for_is_made_first() -> None:
    executor = product()
    assert runs_of(executor, 0.0)[:3] == ["x-0", "y-0", "mul-00"], "depth first"
    executor = product()
    give(executor, 0.0)
    assert runs_of(executor, 0.1) == ["x-0", "y-0", "y-1", "mul-01", "mul-00"]


def test_who_asks_for_slots_tells_what_is_due_as_well() -> None:
    executor = product()
    give(executor, 0.0)
    runs_of(executor, 0.1)
    told = [c for send in executor.sent for c, *_ in send.commit.arrivals]
    assert told == [executor.number[key] for key in ("mul-10", "mul-11")]


def test_what_nobody_had_to_wait_for_is_told_when_work_is_given_away() -> None:
    executor = product()
    for _ in range(2):  # x-0 and y-0; mul-00 runs.
        executor.ran(1.0, 8 * MB)
        executor.go()
    assert executor.engine.pending.keys() >= {executor.number["mul-10"]}
    give(executor, 2.0)
    found = executor.look(2.1)
    assert found is not None
    assert found.probe == [executor.number["mul-10"]], "it is large"


def test_what_was_given_away_is_known_however_often_that_was() -> None:
    executor = Executor(*independent(100), known={"map": (1.0, 8.0)})
    policy, accepted = executor.policy, Reply(Status.OK, accepted=(True,))
    for task in (90, 70, 80, 75, 60):
        policy.replied(executor.engine, [range(task, task + 5)], accepted, 0.0)
    given = [task for task in range(100) if not policy.keeps(task)]
    assert given == [*range(60, 65), *range(70, 85), *range(90, 95)]


def test_a_size_is_guessed_through_a_few_tasks_that_were_never_seen() -> None:
    # Each of a square reads the one above it and the one to the left: there are many ways to each.
    size = 40
    graph: dict[str, Sequence[str]] = {
        f"u{i}x{j}": [
            *([f"u{i - 1}x{j}"] if i else []),
            *([f"u{i}x{j - 1}"] if j else []),
        ]
        for i in range(size)
        for j in range(size)
    }
    last = f"u{size - 1}x{size - 1}"
    graph |= {"leaf-0": (), "v-0": ("leaf-0",), "w-0": ("v-0",), "end-0": ("w-0", last)}
    executor = Executor(
        graph, ["end-0"], known={"leaf": (1.0, 8 * MB)}, frontier=["end-0"], alone=False, free=0
    )
    executor.look(1.0)
    claims = (executor.number["end-0"],)
    executor.policy.replied(executor.engine, (), Reply(Status.OK, claims=claims), 1.0)
    found = executor.look(2.0)
    assert found is None or not found.offers


def test_what_reads_the_same_is_claimed_before_that_is_read() -> None:
    keys = [f"mul-{i}" for i in range(3)]
    graph: dict[str, Sequence[str]] = dict.fromkeys(("x-0", "y-0", "y-1", "y-2"), ())
    graph |= {key: ("x-0", f"y-{key[-1]}") for key in keys}
    executor = Executor(
        graph,
        keys,
        known=dict.fromkeys(("x", "y", "mul"), (1.0, 8 * MB)),
        alone=False,
        free=0,
        frontier=["y-0", "y-1", "y-2"],
        span=(1, 7),
    )
    first, second, _ = [executor.number[key] for key in keys]
    for now, expected, claims in ((1.0, first, ()), (2.0, second, (second,))):
        executor.ran(1.0, 8 * MB, now)
        executor.go()
        found = executor.look(now + 0.01)
        assert found is not None
        assert found.probe == [expected]
        assert executor.engine.share(found.arrive, found.probe)
        executor.go()
        reply = Reply(Status.OK, free=0, claims=claims)
        executor.policy.replied(executor.engine, (), reply, now + 0.02)
        executor.engine.replied(reply)
    found = executor.look(2.03)
    assert found is not None
    assert found.probe == [first], "x-0 is there by now"


def test_while_much_is_read_nothing_waits_for_company() -> None:
    executor = fan_in(size=10 * MB)
    add = executor.number["add-0"]
    assert executor.policy.meanwhile(executor.engine, size=MB) == ([], [])
    assert executor.policy.meanwhile(executor.engine, size=100 * MB) == ([], [add])
    executor = fan_in(size=8.0)
    assert executor.policy.meanwhile(executor.engine, size=100 * MB) == ([add], [])
    executor.engine.free = 999
    assert executor.policy.meanwhile(executor.engine, size=100 * MB) == ([], []), "all are gone"


def test_a_run_that_outlasts_a_start_is_late() -> None:
    executor = Executor(*independent(2))
    assert executor.policy.late_at(3.0) == 3.05
    executor.policy.costs = Costs(start=0.005)
    assert executor.policy.late_at(3.0) == 3.025, "nothing shorter is shared"


# The papers' behaviour ----------------------------------------------------------------------------


def test_without_hold_everything_is_offered_one_by_one() -> None:
    executor = Executor(*independent(6), hold=0.0)
    assert len(executor.steps) == 1
    assert executor.shares(0.0) == [[f"map-{i:04}"] for i in range(1, 6)]


def test_with_hold_what_has_waited_is_offered() -> None:
    executor = Executor(*independent(6), hold=1.0)
    assert executor.shares(0.0) == []
    assert executor.policy.again == 1.0
    assert executor.shares(1.0) == [[f"map-{i:04}"] for i in range(1, 6)]


def test_trivial_work_is_not_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = Executor(*independent(100))
    executor.policy.estimates = {executor.specs[0].name: Estimate(5, 1e-4, 8.0)}
    monkeypatch.setattr(Policy, "_work", None)
    assert executor.policy.look(executor.engine, 0.0) is None
    executor.policy.estimates = {executor.specs[0].name: Estimate(5, 1e-3, 8.0)}
    with pytest.raises(TypeError):
        executor.policy.look(executor.engine, 1000.0)
