import math

import numpy as np
import pytest
from scipy.stats import kstest, norm

from fedft.privacy.accounting import gaussian_epsilon
from fedft.privacy.mechanism import GaussianReleases, clip_update, private_gaussian, update_norm

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


def test_certificate_states_unit_adjacency_delta_and_what_is_left_out() -> None:
    mechanism = releases(z=1.0)
    mechanism.release([], SHAPES)
    certificate = mechanism.certificate()
    assert (certificate["unit"], certificate["releases"], certificate["delta"]) == ("client", 1, 1e-5)
    assert certificate["epsilon"] == gaussian_epsilon(1.0, 1, 1e-5)
    assert "zero-out" in certificate["adjacency"]
    assert len(certificate["not_covered"]) == 3
