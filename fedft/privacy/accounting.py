"""What Gaussian releases cost: ε from the noise multiplier, the noise multiplier from ε."""

import math
from functools import lru_cache

from scipy.optimize import brentq
from scipy.special import log_ndtr

_NO_PROTECTION = 20.0
"""The ε from which the log says that nobody is protected: a likelihood ratio of e^20 distinguishes anyone."""


@lru_cache(maxsize=1024)
def gaussian_epsilon(noise_multiplier: float, releases: int, delta: float) -> float:
    """Return the least ε for which `releases` Gaussian releases of this noise multiplier are (ε, δ)-DP.

    Exact up to floating point: the releases compose to one of z/√releases, whose δ(ε) is known in closed form (Balle
    and Wang, 2018, arXiv 1805.06530, theorem 8).
    """
    if not releases:
        return 0.0
    if not noise_multiplier > 0:
        return math.inf
    mu = math.sqrt(releases) / noise_multiplier
    log_delta = math.log(delta)

    def excess(epsilon: float) -> float:
        upper, lower = float(log_ndtr(mu / 2 - epsilon / mu)), float(log_ndtr(-mu / 2 - epsilon / mu))
        gap = epsilon + lower - upper
        return upper + math.log1p(-math.exp(gap)) - log_delta if gap < 0 else -math.inf

    if excess(0.0) <= 0:
        return 0.0
    ceiling = mu * mu / 2 + mu * math.sqrt(-2 * log_delta)  # the zCDP bound (Bun and Steinke, 2016, proposition 1.3)
    while excess(ceiling) > 0:
        ceiling *= 1.001
    return float(brentq(excess, 0.0, ceiling, xtol=1e-12, rtol=1e-12))


def calibrate_noise(target_epsilon: float, releases: int, delta: float) -> float:
    """Return the least noise multiplier, up to 1e-9 of itself, whose ε after `releases` is at most the target's."""
    low, high = 1e-6, 1.0
    while gaussian_epsilon(high, releases, delta) > target_epsilon:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        if gaussian_epsilon(middle, releases, delta) > target_epsilon:
            low = middle
        else:
            high = middle
    return high


def chosen_noise(target_epsilon: float, noise_multiplier: float, releases: int, delta: float) -> float:
    """Return the noise multiplier of a run: calibrated for its target, or the given one where the target is 0."""
    return calibrate_noise(target_epsilon, releases, delta) if target_epsilon else noise_multiplier


def renyi_epsilon(noise_multiplier: float, releases: int, delta: float) -> float:
    """Return ε by the simple account most stacks use: Rényi orders and dp-accounting's default conversion.

    An upper bound of `gaussian_epsilon`, for comparison with figures published elsewhere.
    """
    if not releases or not noise_multiplier > 0:
        return math.inf if releases else 0.0
    from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    accountant.compose(SelfComposedDpEvent(GaussianDpEvent(noise_multiplier), releases))
    return float(accountant.get_epsilon(delta))


def dp_accounting_epsilon(noise_multiplier: float, releases: int, delta: float) -> float:
    """Return what Google's dp-accounting says for the same releases as `gaussian_epsilon`: a second implementation."""
    if not releases or not noise_multiplier > 0:
        return math.inf if releases else 0.0
    from dp_accounting import get_epsilon_gaussian

    return float(get_epsilon_gaussian(noise_multiplier / math.sqrt(releases), delta))


def format_epsilon(epsilon: float) -> str:
    """Return an ε for people: three significant figures below 100, whole above."""
    return f"{epsilon:,.0f}" if epsilon >= 100 else f"{epsilon:.3g}"


def verdict(epsilon: float) -> str:
    """Return in plain words what an ε is worth."""
    if not epsilon < _NO_PROTECTION:
        return "this protects nobody"
    return "weak protection" if epsilon > 8 else "protection in the range that is usually called meaningful"
