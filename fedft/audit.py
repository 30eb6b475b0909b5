"""Membership scores to an empirical lower bound on ε.

An attacker who sees a release scores how much it looks as if the target's canary update were in it. If the release is
(ε, δ)-DP, then for any threshold on that score TPR <= e^ε·FPR + δ and TNR <= e^ε·FNR + δ (Kairouz, Oh and Viswanath,
2015, arXiv 1311.0776, theorem 2.1). Exact binomial confidence limits on the four rates turn counts into a lower bound
on ε (Jagielski, Ullman and Oprea, 2020, arXiv 2006.07709).

**Limits.** A bound above the claim refutes the claim, at the stated confidence. A bound below it proves nothing: a
better attack may exist, and T trials cannot show more than about ln(T) in any case. Scores must be independent of each
other, and the threshold must not be chosen on the scores that are counted: `audit_scores` sees to the second alone.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from fedft.errors import AuditError


def clopper_pearson(hits: int, trials: int, alpha: float) -> tuple[float, float]:
    """Return lower and upper limits of a binomial rate, each missed with probability at most alpha.

    Exact (Clopper and Pearson, 1934): quantiles of the beta distribution.

    Raises:
        AuditError: not 0 <= hits <= trials, no trial, or alpha not in (0, 1).
    """
    if not 0 <= hits <= trials or not trials >= 1:
        raise AuditError(f"hits={hits} of trials={trials} is not allowed: it must be 0 <= hits <= trials, trials >= 1")
    if not 0 < alpha < 1:
        raise AuditError(f"alpha={alpha} is not allowed: it must be > 0 and < 1")
    lower = float(betaincinv(hits, trials - hits + 1, alpha)) if hits else 0.0
    upper = float(betaincinv(hits + 1, trials - hits, 1 - alpha)) if hits < trials else 1.0
    return lower, upper


def epsilon_lower_bound(
    true_positives: int, positives: int, false_positives: int, negatives: int, delta: float, confidence: float
) -> float:
    """Return the ε that the counts of one fixed test refute all values below of, at this confidence; at least 0.

    Args:
        true_positives: releases with the canary that the test calls so, of `positives`.
        positives: releases with the canary, >= 1.
        false_positives: releases without the canary that the test calls to have it, of `negatives`.
        negatives: releases without the canary, >= 1.
        delta: δ of the claim, >= 0 and < 1.
        confidence: probability with which the bound holds, > 0 and < 1.

    Raises:
        AuditError: a value is out of range.
    """
    if not 0 <= delta < 1:
        raise AuditError(f"delta={delta} is not allowed: it must be >= 0 and < 1")
    if not 0 < confidence < 1:
        raise AuditError(f"confidence={confidence} is not allowed: it must be > 0 and < 1")
    alpha = (1 - confidence) / 2  # two limits, of which neither may fail
    tpr_low, _ = clopper_pearson(true_positives, positives, alpha)
    _, fpr_high = clopper_pearson(false_positives, negatives, alpha)
    return max(0.0, _log_ratio(tpr_low - delta, fpr_high), _log_ratio(1 - fpr_high - delta, 1 - tpr_low))


def audit_scores(inside: NDArray[np.float64], outside: NDArray[np.float64], delta: float, confidence: float) -> float:
    """Return a lower bound on ε from scores of releases with and without the canary; high means with.

    The threshold is the one with the largest bound on the first half of either array; the bound is that of the second
    halves.

    Args:
        inside: scores of releases with the canary, shape [trials], at least two, independent, all finite.
        outside: scores of releases without it, likewise.
        delta: δ of the claim.
        confidence: probability with which the bound holds.

    Raises:
        AuditError: too few scores, a score that is not finite, or as `epsilon_lower_bound`.
    """
    for name, scores in (("inside", inside), ("outside", outside)):
        if scores.ndim != 1 or not scores.size >= 2 or not np.isfinite(scores).all():
            raise AuditError(f"{name} has shape {scores.shape}; it must hold at least two scores, all finite, in a row")
    first_in, second_in = np.array_split(inside, 2)
    first_out, second_out = np.array_split(outside, 2)

    def bound(threshold: float, with_canary: NDArray[np.float64], without: NDArray[np.float64]) -> float:
        hits, alarms = int((with_canary >= threshold).sum()), int((without >= threshold).sum())
        return epsilon_lower_bound(hits, with_canary.size, alarms, without.size, delta, confidence)

    candidates = np.unique(np.quantile(np.concatenate([first_in, first_out]), np.linspace(0, 1, 401)))
    best = max(candidates, key=lambda threshold: bound(float(threshold), first_in, first_out))
    return bound(float(best), second_in, second_out)


def _log_ratio(numerator: float, denominator: float) -> float:
    return math.log(numerator / denominator) if numerator > 0 else -math.inf
