import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import kstest, norm

from fedft.privacy import (
    GaussianReleases,
    calibrate_noise,
    clip_update,
    format_epsilon,
    gaussian_epsilon,
    private_gaussian,
    renyi_epsilon,
    update_norm,
    verdict,
)

SHAPES = {"a": (2,), "b": (1, 2)}


def update(*values: float) -> dict[str, np.ndarray]:
    return {"a": np.array(values[:2], float), "b": np.array([values[2:]], float)}


def releases(z: float = 0.0, n: int = 2, c: float = 5.0) -> GaussianReleases:
    return GaussianReleases(clipping_norm=c, noise_multiplier=z, cohort_size=n, delta=1e-5)


def test_clipping_is_joint_over_all_arrays() -> None:
    clipped = clip_update(update(3, 0, 0, 4), 1.0)
    assert clipped is not None
    np.testing.assert_allclose(clipped["a"], [0.6, 0])
    np.testing.assert_allclose(clipped["b"], [[0, 0.8]])
    assert update_norm(clipped) == pytest.approx(1.0)


def test_small_update_is_left_alone() -> None:
    clipped = clip_update(update(3, 0, 0, 4), 10.0)
    assert clipped is not None
    np.testing.assert_array_equal(clipped["b"], [[0, 4]])


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf, 1e200])
def test_zero_or_non_finite_update_is_no_contribution(bad: float) -> None:
    values = (0, 0, 0, 0) if bad == 0 else (1, 0, 0, bad)
    assert clip_update(update(*values), 1.0) is None


def test_release_divides_by_the_planned_cohort_whoever_answers() -> None:
    mean = releases(n=4).release([update(4, 0, 0, 0), update(0, 0, 0, 2)], SHAPES)
    np.testing.assert_allclose(mean["a"], [1, 0])
    np.testing.assert_allclose(mean["b"], [[0, 0.5]])


def test_misshapen_zero_and_non_finite_updates_contribute_nothing() -> None:
    bad = [
        {"a": np.ones(2)},
        {"a": np.ones(3), "b": np.ones((1, 2))},
        {**update(1, 1, 1, 1), "c": np.ones(1)},
        update(math.nan, 0, 0, 0),
        update(0, 0, 0, 0),
    ]
    mechanism = releases()
    mean = mechanism.release([*bad, update(2, 0, 0, 0)], SHAPES)
    np.testing.assert_allclose(mean["a"], [1, 0])
    assert mechanism.releases == 1


def test_a_release_with_no_usable_update_is_counted_too() -> None:
    mechanism = releases(z=1.0)
    mean = mechanism.release([], SHAPES)
    assert mechanism.releases == 1
    assert all(np.abs(value).max() > 0 for value in mean.values())


def test_one_client_moves_the_sum_by_at_most_the_clipping_norm() -> None:
    rng = np.random.default_rng(0)
    for scale in (1e-3, 1.0, 1e6):
        others = [update(*rng.normal(size=4) * scale) for _ in range(5)]
        target = update(*rng.normal(size=4) * scale)
        with_it, without = releases(n=1).release([*others, target], SHAPES), releases(n=1).release(others, SHAPES)
        assert update_norm({key: with_it[key] - without[key] for key in SHAPES}) <= 5.0 * (1 + 1e-12)


def test_noise_has_the_standard_deviation_that_is_accounted() -> None:
    mechanism = GaussianReleases(clipping_norm=2.0, noise_multiplier=1.5, cohort_size=10, delta=1e-5)
    noise = mechanism.release([], {"a": (200_000,)})["a"]
    assert mechanism.sigma == pytest.approx(0.3)
    assert noise.std() == pytest.approx(0.3, rel=0.01)  # 6 standard errors of the estimate


def test_private_gaussian_is_standard_normal() -> None:
    assert kstest(private_gaussian((100_000,)), norm.cdf).pvalue > 1e-6


def test_no_seed_reaches_the_noise() -> None:
    draws = []
    for _ in range(2):
        np.random.seed(0)  # noqa: NPY002 - the global generator is what a library might seed
        draws.append(private_gaussian((3,)))
    assert not np.array_equal(*draws)


def test_building_and_seeding_a_trainer_between_draws_does_not_repeat_the_noise() -> None:
    from transformers import set_seed

    draws = []
    for _ in range(2):
        set_seed(42)
        draws.append(private_gaussian((3,)))
    assert not np.array_equal(*draws)


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


def test_certificate_states_unit_adjacency_delta_and_what_is_left_out() -> None:
    mechanism = releases(z=1.0)
    mechanism.release([], SHAPES)
    certificate = mechanism.certificate()
    assert (certificate["unit"], certificate["releases"], certificate["delta"]) == ("client", 1, 1e-5)
    assert certificate["epsilon"] == gaussian_epsilon(1.0, 1, 1e-5)
    assert "zero-out" in certificate["adjacency"]
    assert len(certificate["not_covered"]) == 3


@pytest.mark.parametrize(
    ("epsilon", "words"),
    [(13862.0, "nobody"), (math.inf, "nobody"), (math.nan, "nobody"), (10.0, "weak"), (2.0, "meaningful")],
)
def test_verdict_is_plain(epsilon: float, words: str) -> None:
    assert words in verdict(epsilon)


def test_epsilon_is_formatted_for_people() -> None:
    assert [format_epsilon(value) for value in (13861.8, 6.573, math.inf)] == ["13,862", "6.57", "inf"]
