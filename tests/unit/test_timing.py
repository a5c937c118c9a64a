"""The policy is held to what other rules have made of the same cases, in simulated time."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks.cases import CASES, TABLE
from benchmarks.model import RULES, Compared, compare
from benchmarks.timing import Outcome, World

TOLERANCE = 1.05
# Figures of an earlier set of rules: makespan over the best known, cost over the cheapest.
EARLIER = {
    "1,000 × 1 ms": (3.2, 1.8),
    "1,000 × 60 ms": (2.6, 1.8),
    "10 × fork-join of 100 × 60 ms": (2.2, 1.9),
    "10 × fork-join of 100 × 2 ms": (11, 1.5),
    "tree reduction 1,024, 100 ms": (1.2, 1.3),
    "16 × 100 MB, tree, blind": (1.0, 1.0),
    "16 × 400 MB, tree, blind": (7.9, 45),
    "GEMM 8×8 blocks, 2 slots": (1.1, 1.1),
    "TSQR 20 blocks, AWS": (3.0, 2.5),
    "map of 10,000 × 1 s": (1.08, 1.01),
}
WEAK = ["10 × fork-join of 100 × 2 ms", "16 × 400 MB, tree, blind"]


@cache
def blind(name: str) -> Compared:
    return compare(CASES[name], ["blind"])


def test_every_case_of_the_table_has_its_figures() -> None:
    assert [case.name for case in TABLE] == list(EARLIER)


@pytest.mark.parametrize("name", EARLIER)
def test_results_come_no_later_than_by_earlier_rules(name: str) -> None:
    assert blind(name).ratios("blind")[0] <= TOLERANCE * EARLIER[name][0]


@pytest.mark.parametrize("name", EARLIER)
def test_executors_cost_no_more_than_by_earlier_rules(name: str) -> None:
    assert blind(name).ratios("blind")[1] <= TOLERANCE * EARLIER[name][1]


@pytest.mark.parametrize("name", WEAK)
def test_results_come_earlier_than_where_earlier_rules_were_weak(name: str) -> None:
    assert blind(name).ratios("blind")[0] < EARLIER[name][0]


def test_large_outputs_of_quick_tasks_cost_less_than_by_earlier_rules() -> None:
    name = "16 × 400 MB, tree, blind"
    assert blind(name).ratios("blind")[1] < EARLIER[name][1]


@pytest.mark.parametrize("name", EARLIER)
def test_nobody_idles(name: str) -> None:
    assert blind(name).outcomes["blind"].idle == 0


def test_a_wide_fan_out_is_shared_evenly_although_it_is_read_bit_by_bit() -> None:
    compared = compare(CASES["1 → 10,000 → 1, 100 ms, cold"], ["known"])
    assert compared.ratios("known")[0] < 1.5
    assert compared.outcomes["known"].starts <= 1010


def test_of_a_product_of_matrices_hardly_more_is_moved_than_one_factor() -> None:
    world = World(CASES["GEMM 8×8 blocks, 2 slots"], known=True)
    assert world.run().moved <= 1.3 * 2 * 64 * 2e6, "64 blocks of 2 MB, out and in"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["10 × fork-join of 100 × 2 ms", "TSQR 20 blocks, AWS"])
def test_a_case_takes_the_same_each_time(name: str, rule: str) -> None:
    def run() -> Outcome:
        world: World = RULES[rule](CASES[name])
        return world.run()

    assert run() == run()
