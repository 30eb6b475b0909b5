import dataclasses
import json
import math
from typing import Any

import pytest

from fedft.errors import PlanError
from fedft.privacy.accounting import gaussian_epsilon
from fedft.privacy.ledger import Ledger, Mechanism
from fedft.privacy.planner import MOST_ROUNDS, Plan, epsilon_over_rounds, make_plan
from fedft.schedule import most_participations


def plan(**changes: Any) -> Plan:
    given = {"nodes": 20, "cohort": 4, "delta": 1e-5, "clipping_norm": 0.5, "parameters": 921_600}
    return make_plan(**(given | changes))


@pytest.mark.parametrize(
    ("nodes", "cohort", "rounds", "z", "epsilon"),
    [(20, 4, 10, 1.0, 6.572970), (20, 4, 100, 1.0, 28.373474), (1000, 50, 100, 2.0, 4.983306)],
)
def test_epsilon_is_that_of_the_most_used_node(nodes: int, cohort: int, rounds: int, z: float, epsilon: float) -> None:
    made = plan(nodes=nodes, cohort=cohort, rounds=rounds, noise_multiplier=z)
    assert made.epsilon == pytest.approx(epsilon, rel=1e-6)


@pytest.mark.parametrize(("nodes", "cohort", "rounds"), [(20, 4, 10), (7, 3, 5), (1000, 100, 11)])
def test_plan_is_what_schedule_and_ledger_will_say(nodes: int, cohort: int, rounds: int) -> None:
    made = plan(nodes=nodes, cohort=cohort, rounds=rounds, epsilon=3.0)
    ledger = Ledger(Mechanism(made.clipping_norm, made.noise_multiplier, cohort, made.delta))
    assert made.participations == most_participations(rounds, cohort, nodes)
    assert made.epsilon == ledger.epsilon_of(made.participations)
    assert made.sigma == ledger.sigma


def test_the_notebooks_setting_protects_nobody_and_says_so() -> None:
    made = plan(rounds=10, noise_multiplier=0.02)
    assert made.participations == 2
    assert made.epsilon == gaussian_epsilon(0.02, 2, 1e-5) > 2800
    assert made.sigma == 0.0025
    assert made.noise_over_clipping_norm == pytest.approx(0.02 * 960 / 4)
    assert made.verdict == "this protects nobody"
    assert made.advice[0].startswith("do not call this private")
    assert "protect the record" in made.advice[-1]


def test_replace_one_adjacency_costs_what_half_the_noise_does() -> None:
    made = plan(rounds=10, noise_multiplier=2.0)
    assert made.epsilon_replace_one == plan(rounds=10, noise_multiplier=1.0).epsilon


@pytest.mark.parametrize(
    ("rounds", "cohort", "nodes", "count"), [(10, 4, 20, 2), (10, 100, 1000, 1), (11, 100, 1000, 2), (1, 1, 3, 1)]
)
def test_participations_are_rounded_up(rounds: int, cohort: int, nodes: int, count: int) -> None:
    assert most_participations(rounds, cohort, nodes) == count


@pytest.mark.parametrize("target", [0.05, 0.5, 4.5, 8.0, 30.0, 1000.0])
@pytest.mark.parametrize(("nodes", "cohort", "rounds"), [(1000, 100, 10), (20, 4, 10), (7, 3, 100), (50, 50, 5000)])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_calibrated_noise_accounts_back_to_the_target_and_not_above(
    target: float, nodes: int, cohort: int, rounds: int, delta: float
) -> None:
    made = plan(nodes=nodes, cohort=cohort, rounds=rounds, epsilon=target, delta=delta)
    printed = float(f"{made.noise_multiplier:.6g}")
    again = plan(nodes=nodes, cohort=cohort, rounds=rounds, noise_multiplier=printed, delta=delta)
    assert target * 0.999 <= again.epsilon <= target


@pytest.mark.parametrize("target", [1.0, 4.5, 8.0, 100.0])
@pytest.mark.parametrize("z", [1.0, 3.0, 5.5])
@pytest.mark.parametrize(("nodes", "cohort"), [(1000, 100), (20, 4), (7, 3), (5, 5)])
def test_most_rounds_fit_the_budget_and_one_more_does_not(target: float, z: float, nodes: int, cohort: int) -> None:
    if gaussian_epsilon(z, 1, 1e-5) > target:
        with pytest.raises(PlanError, match="allows not one round"):
            plan(nodes=nodes, cohort=cohort, noise_multiplier=z, epsilon=target)
        return
    made = plan(nodes=nodes, cohort=cohort, noise_multiplier=z, epsilon=target)
    assert made.epsilon <= target < dataclasses.replace(made, rounds=made.rounds + 1).epsilon


def test_the_noise_that_the_refusal_names_is_enough() -> None:
    with pytest.raises(PlanError, match=r"costs 4\.38; give noise-multiplier >= 3\.731 or"):
        plan(noise_multiplier=1.0, epsilon=1.0)
    assert plan(noise_multiplier=3.731, epsilon=1.0).rounds == 5


def test_rounds_end_at_the_most_that_a_run_may_have() -> None:
    assert plan(noise_multiplier=1e9, epsilon=1.0).rounds == MOST_ROUNDS


def test_private_and_learnable_setting_gets_no_advice() -> None:
    made = plan(nodes=1000, cohort=100, rounds=10, epsilon=4.5, parameters=92_160)
    assert made.advice == []
    assert "meaningful" in made.verdict


def test_private_setting_that_drowns_the_update_says_what_would_not() -> None:
    made = plan(nodes=1000, cohort=100, rounds=10, epsilon=2.0, parameters=9_216_000)
    drowned, fewer, more = made.advice
    assert f"{made.noise_over_clipping_norm:.3g} times as long" in drowned
    parameters = int(fewer.split("lora.r: ")[1].split()[0].replace(",", ""))
    cohort, nodes = (int(word.replace(",", "")) for word in more.split() if word[0].isdigit())
    assert 9.99 < dataclasses.replace(made, parameters=parameters).noise_over_clipping_norm <= 10
    larger = dataclasses.replace(made, nodes=nodes, cohort=cohort)
    assert 9.8 < larger.noise_over_clipping_norm <= 10
    assert larger.participations == made.participations


def test_epsilon_over_rounds_is_that_of_each_rounds_participations() -> None:
    curve = epsilon_over_rounds(plan(rounds=6, noise_multiplier=1.0), 10)
    assert curve == [gaussian_epsilon(1.0, count, 1e-5) for count in (1, 1, 2, 2, 3, 3)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"nodes": 0},
        {"cohort": 0},
        {"cohort": 21},
        {"rounds": 0},
        {"rounds": MOST_ROUNDS + 1},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"delta": 0.0},
        {"delta": 1.0},
        {"delta": math.nan},
        {"clipping_norm": 0.0},
        {"clipping_norm": math.nan},
        {"parameters": 0},
    ],
)
def test_value_out_of_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(PlanError, match=rf"^{name.replace('_', '-')}=.* is not allowed: it must be "):
        plan(**({"rounds": 10, "noise_multiplier": 1.0} | wrong))
    with pytest.raises(PlanError, match=r" is not allowed: it must be "):
        dataclasses.replace(plan(rounds=10, noise_multiplier=1.0), **wrong)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_budget_out_of_range_is_refused(epsilon: float) -> None:
    for other in ({"rounds": 10}, {"noise_multiplier": 1.0}):
        with pytest.raises(PlanError, match=r"^epsilon=.* must be finite and > 0"):
            plan(epsilon=epsilon, **other)


@pytest.mark.parametrize(
    "given", [{}, {"rounds": 1}, {"epsilon": 1.0}, {"rounds": 1, "noise_multiplier": 1.0, "epsilon": 1.0}]
)
def test_exactly_two_of_three_must_be_given(given: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="exactly two must be given"):
        plan(**given)


def test_without_noise_epsilon_is_infinite_and_json_says_null() -> None:
    made = plan(rounds=10, noise_multiplier=0.0)
    assert made.epsilon == math.inf
    assert made.verdict == "this protects nobody"
    facts = json.loads(json.dumps(made.as_dict(), allow_nan=False))
    assert facts["epsilon"] is None
    assert facts["participations"] == 2
    with pytest.raises(PlanError, match="noise-multiplier=0"):
        plan(noise_multiplier=0.0, epsilon=1.0)
