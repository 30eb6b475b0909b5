import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedft.errors import LedgerError
from fedft.files import plain
from fedft.privacy.accounting import calibrate_noise, gaussian_epsilon
from fedft.privacy.certificate import certificate, second_opinion
from fedft.privacy.ledger import Ledger, Mechanism
from fedft.privacy.mechanism import release
from fedft.schedule import draw, eligible, most_participations


def run(nodes: int, cohort: int, rounds: int, z: float, **steering: float) -> Ledger:
    """A ledger after a whole run by the schedule."""
    ledger, rng = Ledger(Mechanism(1.0, z, cohort, 1e-5, **steering)), np.random.default_rng(0)
    limit = most_participations(rounds, cohort, nodes)
    for number in range(1, rounds + 1):
        able = eligible(range(2**63, 2**63 + nodes), ledger.participations, limit)
        ledger.charge(number, draw(able, cohort, ledger.participations, rng))
        release(ledger, number, [], {"a": (1,)})
    return ledger


@pytest.mark.parametrize(
    ("nodes", "cohort", "rounds", "z", "epsilon"),
    [(20, 4, 10, 1.0, 6.5730), (20, 4, 100, 1.0, 28.3735), (1000, 50, 100, 2.0, 4.9833)],
)
def test_epsilon_is_that_of_the_most_used_node_as_dp_accounting_has_it(
    nodes: int, cohort: int, rounds: int, z: float, epsilon: float
) -> None:
    from dp_accounting import GaussianDpEvent, get_epsilon_gaussian
    from dp_accounting.pld import PLDAccountant

    ledger = run(nodes, cohort, rounds, z)
    assert ledger.epsilon == pytest.approx(epsilon, abs=1e-3)
    k = math.ceil(rounds * cohort / nodes)
    assert ledger.most == k
    assert ledger.epsilon == pytest.approx(get_epsilon_gaussian(z / math.sqrt(k), 1e-5), rel=1e-6)
    assert ledger.epsilon_replace_one == pytest.approx(get_epsilon_gaussian(z / 2 / math.sqrt(k), 1e-5), rel=1e-6)
    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(z / math.sqrt(k)))
    assert accountant.get_epsilon(1e-5) == pytest.approx(ledger.epsilon, rel=1e-4)  # it rounds up to a grid
    assert second_opinion(ledger)["epsilon_dp_accounting"] == pytest.approx(ledger.epsilon, rel=1e-6)
    assert second_opinion(ledger)["epsilon_renyi"] >= ledger.epsilon


def test_epsilon_counts_the_rounds_of_the_most_used_node_alone() -> None:
    ledger = Ledger(Mechanism(1.0, 1.0, 2, 1e-5))
    for number, nodes in enumerate([(1, 2), (3, 4), (1, 5)], start=1):
        ledger.charge(number, nodes)
        ledger.settle(number)
    assert (ledger.most, ledger.released, ledger.participations[1]) == (2, 3, 2)
    assert ledger.epsilon == gaussian_epsilon(1.0, 2, 1e-5)
    assert ledger.epsilon_after([2, 3]) == ledger.epsilon
    assert ledger.epsilon_after([2, 1]) == gaussian_epsilon(1.0, 3, 1e-5)
    assert ledger.epsilon_after([]) == ledger.epsilon
    lines = certificate(ledger, nodes=5, rounds=4, most_planned=2)["rounds"]
    assert [line["participations"] for line in lines] == [1, 1, 2]
    assert [line["epsilon"] for line in lines] == [gaussian_epsilon(1.0, k, 1e-5) for k in (1, 1, 2)]


def test_noise_calibrated_for_the_planned_participations_is_accounted_back() -> None:
    k = most_participations(10, 4, 20)
    ledger = run(20, 4, 10, calibrate_noise(4.5, k, 1e-5))
    assert ledger.epsilon <= 4.5
    assert ledger.epsilon == pytest.approx(4.5, rel=1e-6)


def test_empty_ledger_has_spent_nothing_and_no_noise_protects_nothing() -> None:
    ledger = Ledger(Mechanism(1.0, 0.0, 2, 1e-5))
    assert (ledger.epsilon, ledger.epsilon_replace_one, ledger.most) == (0.0, 0.0, 0)
    ledger.charge(1, [1])
    assert ledger.epsilon == ledger.epsilon_replace_one == math.inf


def test_round_is_charged_to_the_whole_cohort_even_without_a_release() -> None:
    ledger = Ledger(Mechanism(1.0, 1.0, 3, 1e-5))
    ledger.charge(1, [1, 2, 3])
    assert (ledger.released, ledger.epsilon) == (0, gaussian_epsilon(1.0, 1, 1e-5))
    ledger.charge(2, [1])  # round 1 was lost: it stays charged, and its number is gone
    assert ledger.epsilon == gaussian_epsilon(1.0, 2, 1e-5)
    with pytest.raises(LedgerError, match="round 1 cannot be released"):
        ledger.settle(1)


@pytest.mark.parametrize(
    ("number", "nodes", "message"),
    [
        (1, [1], "round 1 cannot be charged: the next round is 2"),
        (3, [1], "round 3 cannot be charged: the next round is 2"),
        (2, [], "names 0 nodes"),
        (2, [1, 1], "names 2 nodes, 1 of them distinct"),
        (2, [1, 2, 3], "a cohort is 1 to 2 distinct nodes"),
    ],
)
def test_replays_gaps_and_impossible_cohorts_are_refused(number: int, nodes: list[int], message: str) -> None:
    ledger = Ledger(Mechanism(1.0, 1.0, 2, 1e-5))
    ledger.charge(1, [1, 2])
    with pytest.raises(LedgerError, match=message):
        ledger.charge(number, nodes)
    assert (len(ledger.entries), ledger.most) == (1, 1)


@pytest.mark.parametrize("steering", [{}, {"clipping_quantile": 0.5}])
def test_saved_ledger_is_the_same_ledger(tmp_path: Path, steering: dict[str, float]) -> None:
    ledger = run(20, 4, 10, 0.1 + 0.2, **steering)
    ledger.charge(11, [2**64 - 1, 3])  # pending, as a killed process leaves it
    again = Ledger.from_dict(json.loads(json.dumps(plain(ledger.to_dict()), allow_nan=False)))
    assert again == ledger
    assert again.clipping_norm == ledger.clipping_norm
    again.charge(12, [3])
    assert again.participations[3] == ledger.participations[3] + 1


def _drop_round(state: dict[str, Any]) -> None:
    del state["rounds"][1]


def _drop_last(state: dict[str, Any]) -> None:
    state["rounds"].pop()


def _double(state: dict[str, Any]) -> None:
    state["rounds"].append(state["rounds"][-1])


def _raise_noise(state: dict[str, Any]) -> None:
    state["mechanism"]["noise_multiplier"] = 5.0


def _raise_norm(state: dict[str, Any]) -> None:
    state["rounds"][1]["clipping_norm"] *= 2


def _raise_share(state: dict[str, Any]) -> None:
    state["rounds"][-1]["unclipped_share"] = 0.123


def _lower_count(state: dict[str, Any]) -> None:
    node = next(iter(state["participations"]))
    state["participations"][node] -= 1


def _swap_node(state: dict[str, Any]) -> None:
    state["rounds"][0]["nodes"][0] = "5"


def _lose_mechanism(state: dict[str, Any]) -> None:
    del state["mechanism"]


def _misname(state: dict[str, Any]) -> None:
    state["mechanism"]["sigma"] = 1.0


def _damage(state: dict[str, Any]) -> None:
    state["rounds"] = "?"


def _unrelease(state: dict[str, Any]) -> None:
    state["rounds"][-1]["released"] = False


@pytest.mark.parametrize(
    "edit",
    [
        _drop_round,
        _drop_last,
        _double,
        _raise_noise,
        _raise_norm,
        _raise_share,
        _lower_count,
        _swap_node,
        _lose_mechanism,
        _misname,
        _damage,
        _unrelease,
    ],
)
def test_edited_or_damaged_ledger_is_refused_with_one_line(edit: Callable[[dict[str, Any]], None]) -> None:
    state = run(6, 2, 6, 1.0, clipping_quantile=0.5).to_dict()
    Ledger.from_dict(state)
    edit(state)
    with pytest.raises(LedgerError, match=r"ledger|round") as caught:
        Ledger.from_dict(state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"clipping_norm": 0.0},
        {"clipping_norm": math.nan},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"cohort_size": 0},
        {"delta": 0.0},
        {"clipping_quantile": 1.0},
        {"clipping_learning_rate": 0.0},
    ],
)
def test_impossible_mechanism_is_refused(wrong: dict[str, float]) -> None:
    figures: dict[str, Any] = {"clipping_norm": 1.0, "noise_multiplier": 1.0, "cohort_size": 2, "delta": 1e-5, **wrong}
    with pytest.raises(LedgerError, match=next(iter(wrong))):
        Mechanism(**figures)


def test_certificate_states_the_claim_and_what_is_left_out() -> None:
    claim = certificate(run(20, 4, 10, 1.0, clipping_quantile=0.5), nodes=20, rounds=10, most_planned=2)
    assert (claim["unit"], claim["releases"], claim["delta"], claim["nodes"]) == ("client", 10, 1e-5, 20)
    assert claim["epsilon"] == gaussian_epsilon(1.0, 2, 1e-5)
    assert claim["epsilon_replace_one"] == gaussian_epsilon(0.5, 2, 1e-5)
    assert "zero-out" in claim["adjacency"]
    assert "quantile" in claim["mechanism"]
    assert claim["update_noise_multiplier"] > claim["noise_multiplier"] == 1.0
    assert (claim["participations"], claim["participations_planned"]) == (2, 2)
    assert claim["participation_histogram"] == {"2": 20}
    assert len({line["clipping_norm"] for line in claim["rounds"]}) == 10
    left_out = " ".join(claim["not_covered"])
    assert all(words in left_out for words in ("losses", "trusted", "two Flower node ids", "sampling"))
