import math

import pytest
from scipy.integrate import quad
from scipy.stats import norm

from fedft.privacy.accounting import calibrate_noise, format_epsilon, gaussian_epsilon, renyi_epsilon, verdict


@pytest.mark.parametrize(
    ("z", "k", "epsilon"),
    [(1.0, 2, 6.572970), (1.0, 10, 17.856587), (1.0, 20, 28.373474), (2.0, 5, 4.983306), (0.02, 10, 13173.3517)],
)
def test_epsilon_equals_known_values(z: float, k: int, epsilon: float) -> None:
    assert gaussian_epsilon(z, k, 1e-5) == pytest.approx(epsilon, rel=1e-6)


@pytest.mark.parametrize(("z", "k"), [(0.7, 1), (1.0, 10), (5.0, 3)])
def test_epsilon_satisfies_the_definition_of_delta_by_quadrature(z: float, k: int) -> None:
    mu = math.sqrt(k) / z
    epsilon = gaussian_epsilon(z, k, 1e-5)

    def excess(x: float) -> float:
        return max(0.0, norm.pdf(x, mu) - math.exp(epsilon) * norm.pdf(x))

    start = epsilon / mu + mu / 2  # where the likelihood ratio reaches e^ε
    assert quad(excess, start, start + 40, epsabs=1e-14)[0] == pytest.approx(1e-5, rel=1e-5)


def test_epsilon_at_the_edges() -> None:
    assert gaussian_epsilon(1.0, 0, 1e-5) == 0
    assert gaussian_epsilon(0.0, 1, 1e-5) == math.inf
    assert gaussian_epsilon(1e9, 1, 1e-5) == 0
    assert gaussian_epsilon(1e-3, 1_000_000, 1e-5) > 5e11


def test_the_simple_account_of_the_notebook_is_13862_and_bounds_the_exact_one() -> None:
    assert renyi_epsilon(0.02, 10, 1e-5) == pytest.approx(13861.78, abs=0.01)
    for z, k in ((0.02, 10), (1.0, 3), (4.0, 100)):
        assert renyi_epsilon(z, k, 1e-5) > gaussian_epsilon(z, k, 1e-5)


@pytest.mark.parametrize(("target", "k"), [(0.5, 1), (4.5, 10), (8.0, 100), (1000.0, 3)])
def test_calibrated_noise_accounts_back_to_the_target(target: float, k: int) -> None:
    z = calibrate_noise(target, k, 1e-5)
    assert target * 0.999 < gaussian_epsilon(z, k, 1e-5) <= target


@pytest.mark.parametrize(
    ("epsilon", "words"),
    [(13862.0, "nobody"), (math.inf, "nobody"), (math.nan, "nobody"), (10.0, "weak"), (2.0, "meaningful")],
)
def test_verdict_is_plain(epsilon: float, words: str) -> None:
    assert words in verdict(epsilon)


def test_epsilon_is_formatted_for_people() -> None:
    assert [format_epsilon(value) for value in (13861.8, 6.573, math.inf)] == ["13,862", "6.57", "inf"]
