"""The promise of the schedule under churn, and its closed forms."""

from collections import Counter

import numpy as np
import pytest

from fedft.schedule import draw, eligible, most_participations


@pytest.mark.parametrize(
    ("rounds", "cohort", "nodes", "most"), [(10, 4, 20, 2), (100, 50, 1000, 5), (3, 2, 2, 3), (10, 3, 7, 5)]
)
def test_most_participations_is_the_mean_rounded_up(rounds: int, cohort: int, nodes: int, most: int) -> None:
    assert most_participations(rounds, cohort, nodes) == most


@pytest.mark.parametrize(("rounds", "cohort", "nodes"), [(10, 4, 20), (10, 3, 7), (5, 1, 3), (4, 6, 6), (100, 4, 20)])
def test_stable_federation_fills_every_cohort_and_balances_to_within_one(rounds: int, cohort: int, nodes: int) -> None:
    rng, counts = np.random.default_rng(0), Counter[int]()
    limit = most_participations(rounds, cohort, nodes)
    for _ in range(rounds):
        chosen = draw(eligible(range(nodes), counts, limit), cohort, counts, rng)
        assert len(set(chosen)) == cohort
        counts.update(chosen)
        assert max(counts[node] for node in range(nodes)) - min(counts[node] for node in range(nodes)) <= 1
    assert max(counts.values()) == limit


@pytest.mark.parametrize("seed", range(30))
def test_no_node_exceeds_the_limit_whoever_joins_and_leaves(seed: int) -> None:
    rng, counts = np.random.default_rng(seed), Counter[int]()
    nodes, cohort, rounds = int(rng.integers(2, 30)), int(rng.integers(1, 10)), int(rng.integers(1, 30))
    cohort = min(cohort, nodes)
    limit = most_participations(rounds, cohort, nodes)
    connected, next_id = set(range(nodes)), nodes
    for _ in range(rounds):
        connected -= {node for node in connected if rng.random() < 0.2}
        joining = int(rng.integers(0, 4))
        connected |= set(range(next_id, next_id + joining)) | {n for n in range(next_id) if rng.random() < 0.05}
        next_id += joining
        able = eligible(sorted(connected), counts, limit)
        chosen = draw(able, cohort, counts, rng)
        assert len(chosen) == len(set(chosen)) == min(cohort, len(able))
        assert set(chosen) <= connected
        left_out = set(able) - set(chosen)
        if chosen and left_out:
            assert max(counts[node] for node in chosen) <= min(counts[node] for node in left_out)
        counts.update(chosen)
        assert max(counts.values(), default=0) <= limit


def test_draw_depends_on_the_places_and_not_on_the_ids() -> None:
    first, second = (draw(ids, 3, {}, np.random.default_rng(0)) for ids in ([5, 9, 2, 7, 1], [50, 10, 30, 20, 40]))
    assert [[5, 9, 2, 7, 1].index(node) for node in first] == [[50, 10, 30, 20, 40].index(node) for node in second]
    draws = {tuple(draw(range(20), 4, {}, np.random.default_rng(seed))) for seed in range(5)}
    assert len(draws) == 5
