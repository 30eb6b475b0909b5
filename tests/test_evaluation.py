import math
from typing import Any

import numpy as np
import pytest

from fedft.evaluation import EvaluationSums


def example_sums(nll: list[float], tokens: list[int], correct: list[bool | None]) -> EvaluationSums:
    parts = [EvaluationSums.of(*values) for values in zip(nll, tokens, correct, strict=True)]
    return sum(parts, start=EvaluationSums())


def test_figures_worked_out_by_hand() -> None:
    sums = example_sums([2.0, 4.0], [1, 3], [True, False])
    assert sums.loss == 1.5
    assert sums.accuracy == 0.5
    assert (sums.examples, sums.choices) == (2, 2)


def test_nodes_sums_add_up_to_the_pooled_figures() -> None:
    rng = np.random.default_rng(0)
    nll, tokens = rng.uniform(1, 20, 30).tolist(), rng.integers(1, 9, 30).tolist()
    pooled = example_sums(nll, tokens, [True] * 30)
    split = example_sums(nll[:7], tokens[:7], [True] * 7) + example_sums(nll[7:], tokens[7:], [True] * 23)
    assert split.loss == pytest.approx(pooled.loss)
    assert split.loss_margin == pytest.approx(pooled.loss_margin)


def test_loss_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        tokens = rng.integers(1, 12, 60)
        nll = tokens * 2.0 + rng.normal(0, 3, 60)  # the loss per token is 2
        sums = example_sums(np.maximum(nll, 0).tolist(), tokens.tolist(), [None] * 60)
        hits += abs(sums.loss - 2.0 - 0.03) < sums.loss_margin + 0.03
    assert 0.90 < hits / 400 <= 1.0


def test_wilson_interval_equals_the_published_formula() -> None:
    low, high = example_sums([1.0] * 10, [1] * 10, [True] * 3 + [False] * 7).accuracy_interval
    assert (low, high) == pytest.approx((0.1078, 0.6032), abs=1e-4)


def test_nothing_scored_is_nan_not_zero() -> None:
    nothing = EvaluationSums()
    assert all(map(math.isnan, (nothing.loss, nothing.loss_margin, nothing.accuracy, *nothing.accuracy_interval)))


@pytest.mark.parametrize(
    "change",
    [{"nll": math.nan}, {"nll": -1.0}, {"tokens": 1.5}, {"examples": None}, {"correct": 9}, {"examples": 100}],
)
def test_damaged_metrics_are_refused(change: dict[str, Any]) -> None:
    metrics = example_sums([2.0, 4.0], [1, 3], [True, False]).as_metrics()
    assert EvaluationSums.from_metrics(metrics).loss == 1.5
    with pytest.raises(ValueError, match="evaluation metric"):
        EvaluationSums.from_metrics(metrics | change)
