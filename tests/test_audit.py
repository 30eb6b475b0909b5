import math

import numpy as np
import pytest
from scipy.stats import binom

from fedft.audit import audit_scores, clopper_pearson, epsilon_lower_bound
from fedft.errors import AuditError
from fedft.privacy.accounting import gaussian_epsilon


@pytest.mark.parametrize(
    ("hits", "trials", "alpha", "lower", "upper"),
    [
        (0, 10, 0.05, 0.0, 1 - 0.05**0.1),  # no hit: (1-p)^10 = alpha
        (10, 10, 0.05, 0.05**0.1, 1.0),  # all hits: p^10 = alpha
        (1, 2, 0.19, 0.1, 0.9),  # 1-(1-p)^2 = 0.19 at p = 0.1; 1-p^2 = 0.19 at p = 0.9
    ],
)
def test_limits_worked_out_by_hand(hits: int, trials: int, alpha: float, lower: float, upper: float) -> None:
    assert clopper_pearson(hits, trials, alpha) == pytest.approx((lower, upper))


def test_limits_are_where_the_binomial_tail_is_alpha() -> None:
    lower, upper = clopper_pearson(37, 400, 1e-4)
    assert binom.sf(36, 400, lower) == pytest.approx(1e-4)
    assert binom.cdf(37, 400, upper) == pytest.approx(1e-4)


def test_bound_worked_out_by_hand() -> None:
    # confidence 0.62 leaves alpha = 0.19 to either limit: TPR 1 of 2 >= 0.1, FPR 0 of 1 <= 0.81: no bound from them
    assert epsilon_lower_bound(1, 2, 0, 1, 0.0, 0.62) == 0.0
    # all of 10, none of 10 at alpha = 0.05: TPR >= p, FPR <= 1 - p, p = 0.05^0.1
    p = 0.05**0.1
    assert epsilon_lower_bound(10, 10, 0, 10, 0.0, 0.9) == pytest.approx(math.log(p / (1 - p)))
    assert epsilon_lower_bound(10, 10, 0, 10, 0.1, 0.9) == pytest.approx(math.log((p - 0.1) / (1 - p)))


def test_bound_sees_an_attack_that_is_only_sure_of_the_absence() -> None:
    # no canary missed in 1000, half of the others called: TNR / FNR is large, TPR / FPR is not
    alpha = 0.5e-2
    missed = 1 - alpha ** (1 / 1000)
    right, _ = clopper_pearson(500, 1000, alpha)
    assert epsilon_lower_bound(1000, 1000, 500, 1000, 0.0, 0.99) == pytest.approx(math.log(right / missed))


def test_bound_is_below_a_gaussians_epsilon_and_comes_near_it() -> None:
    rng = np.random.default_rng(0)
    true = gaussian_epsilon(1.0, 1, 0.1)
    bound = audit_scores(rng.normal(1, 1, 200_000), rng.normal(0, 1, 200_000), 0.1, 0.999)
    assert 0.9 * true < bound < true


def test_scores_that_tell_nothing_bound_nothing() -> None:
    rng = np.random.default_rng(1)
    assert audit_scores(rng.normal(size=4000), rng.normal(size=4000), 1e-5, 0.9999) < 0.1
    assert audit_scores(np.zeros(10), np.zeros(10), 0.0, 0.9) == 0.0


@pytest.mark.parametrize(
    "scores", [np.zeros(1), np.zeros((2, 2)), np.array([0.0, math.nan]), np.array([math.inf, 0.0])]
)
def test_unusable_scores_are_refused(scores: np.ndarray) -> None:
    with pytest.raises(AuditError, match="outside has shape"):
        audit_scores(np.zeros(4), scores, 0.1, 0.9)


def test_values_out_of_range_are_refused() -> None:
    for hits, trials in ((-1, 2), (3, 2), (0, 0)):
        with pytest.raises(AuditError, match=f"hits={hits} of trials={trials}"):
            clopper_pearson(hits, trials, 0.1)
    for value in (0.0, 1.0, math.nan):
        with pytest.raises(AuditError, match="alpha="):
            clopper_pearson(1, 2, value)
        with pytest.raises(AuditError, match="confidence="):
            epsilon_lower_bound(1, 2, 1, 2, 0.0, value)
    for delta in (-0.1, 1.0, math.nan):
        with pytest.raises(AuditError, match="delta="):
            epsilon_lower_bound(1, 2, 1, 2, delta, 0.9)
