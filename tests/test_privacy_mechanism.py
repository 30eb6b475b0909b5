import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kstest, norm

from fedft.errors import LedgerError
from fedft.privacy.ledger import Ledger, Mechanism
from fedft.privacy.mechanism import clip_update, private_gaussian, release, update_norm

SHAPES = {"a": (2,), "b": (1, 2)}


def update(*values: float) -> dict[str, np.ndarray]:
    return {"a": np.array(values[:2], float), "b": np.array([values[2:]], float)}


def charged(z: float = 0.0, n: int = 2, c: float = 5.0, **steering: float) -> Ledger:
    """A ledger whose first round is charged to its whole cohort."""
    ledger = Ledger(Mechanism(c, z, n, 1e-5, **steering))
    ledger.charge(1, range(n))
    return ledger


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
    mean = release(charged(n=4), 1, [update(4, 0, 0, 0), update(0, 0, 0, 2)], SHAPES)
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
    ledger = charged()
    mean = release(ledger, 1, [*bad, update(2, 0, 0, 0)], SHAPES)
    np.testing.assert_allclose(mean["a"], [1, 0])
    assert ledger.released == 1


def test_a_release_with_no_usable_update_is_counted_too() -> None:
    ledger = charged(z=1.0)
    mean = release(ledger, 1, [], SHAPES)
    assert ledger.released == 1
    assert all(np.abs(value).max() > 0 for value in mean.values())


def test_one_client_moves_the_sum_by_at_most_the_clipping_norm() -> None:
    rng = np.random.default_rng(0)
    for scale in (1e-3, 1.0, 1e6):
        others = [update(*rng.normal(size=4) * scale) for _ in range(5)]
        target = update(*rng.normal(size=4) * scale)
        with_it, without = (release(charged(n=1), 1, sent, SHAPES) for sent in ([*others, target], others))
        assert update_norm({key: with_it[key] - without[key] for key in SHAPES}) <= 5.0 * (1 + 1e-12)


def test_noise_has_the_standard_deviation_that_is_accounted() -> None:
    ledger = charged(c=2.0, z=1.5, n=10)
    noise = release(ledger, 1, [], {"a": (200_000,)})["a"]
    assert ledger.sigma == pytest.approx(0.3)
    assert noise.std() == pytest.approx(0.3, rel=0.01)  # 6 standard errors of the estimate


def test_private_gaussian_is_standard_normal() -> None:
    assert kstest(private_gaussian((100_000,)), norm.cdf).pvalue > 1e-6


def test_no_seed_reaches_the_noise() -> None:
    draws = []
    for _ in range(2):
        np.random.seed(0)  # noqa: NPY002 - the global generator is what a library might seed
        draws.append(private_gaussian((3,)))
    assert not np.array_equal(*draws)


def test_building_and_seeding_a_trainer_between_releases_does_not_repeat_the_noise(
    tmp_path: Path, llama_folder: Path
) -> None:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    noises, globals_ = [], []
    for _ in range(2):
        Trainer(model, TrainingArguments(str(tmp_path), seed=42, use_cpu=True, report_to="none"))
        globals_.append(np.random.normal())  # noqa: NPY002 - shows that the trainer did seed the global generator
        set_seed(42)
        noises.append(release(charged(z=1.0), 1, [], SHAPES))
    assert globals_[0] == globals_[1]
    assert not any(np.array_equal(noises[0][key], noises[1][key]) for key in SHAPES)


def test_release_of_a_round_that_was_not_charged_or_was_released_already_is_refused() -> None:
    ledger = charged(z=1.0)
    release(ledger, 1, [], SHAPES)
    for number in (1, 2):
        with pytest.raises(LedgerError, match=f"round {number} cannot be released"):
            release(ledger, number, [], SHAPES)
    assert ledger.released == 1


def test_clipping_norm_follows_the_share_of_unclipped_updates() -> None:
    ledger = charged(n=4, c=2.0, clipping_quantile=0.5, clipping_learning_rate=0.2)
    release(ledger, 1, [update(1, 0, 0, 0), update(0.5, 0, 0, 0), update(9, 0, 0, 0)], SHAPES)
    assert ledger.entries[0].unclipped_share == 0.5 + (0.5 + 0.5 - 0.5) / 4  # the fourth is missing: 0
    assert ledger.clipping_norm == pytest.approx(2.0 * math.exp(-0.2 * (0.625 - 0.5)))


def test_update_that_the_client_clipped_in_float32_counts_as_clipped() -> None:
    rng = np.random.default_rng(0)
    start = rng.normal(size=10_000).astype(np.float32)
    step = rng.normal(size=10_000)
    sent = start + (step * (0.1 / np.linalg.norm(step))).astype(np.float32)
    ledger = charged(n=1, c=0.1, clipping_quantile=0.5)
    release(ledger, 1, [{"a": sent.astype(np.float64) - start}], {"a": (10_000,)})
    assert ledger.entries[0].unclipped_share == 0.0


def test_clipping_norm_finds_the_quantile_of_the_norms_with_and_without_noise() -> None:
    norms = np.linspace(0.5, 2.0, 100)
    for z in (0.0, 1.0):
        ledger = Ledger(Mechanism(10.0, z, 100, 1e-5, clipping_quantile=0.3))
        for number in range(1, 101):
            ledger.charge(number, range(100))
            release(ledger, number, [{"a": np.array([norm])} for norm in norms], {"a": (1,)})
        assert ledger.clipping_norm == pytest.approx(np.quantile(norms, 0.3), abs=0.15)


@pytest.mark.parametrize(("z", "n"), [(0.5, 4), (1.0, 100), (3.0, 10), (0.02, 2)])
def test_update_and_bits_together_are_one_release_of_the_stated_noise(z: float, n: int) -> None:
    """Both, scaled to noise 1, move by at most 1/z in L2 when a client of norm C and bit ½ is left out."""
    mechanism = Mechanism(3.0, z, n, 1e-5, clipping_quantile=0.5)
    moved_update = mechanism.clipping_norm / (mechanism.update_noise_multiplier * mechanism.clipping_norm)
    moved_bit = 0.5 / mechanism.bit_noise
    assert math.hypot(moved_update, moved_bit) == pytest.approx(1 / z, rel=1e-12)
    assert mechanism.bit_noise == max(n / 20, z)
    ledger = charged(z=z, n=n, c=3.0, clipping_quantile=0.5)
    noise = release(ledger, 1, [], {"a": (200_000,)})["a"]
    assert noise.std() == pytest.approx(mechanism.update_noise_multiplier * 3.0 / n, rel=0.01)


def test_bits_are_noised_as_accounted() -> None:
    shares = []
    for _ in range(2000):
        ledger = charged(z=1.0, n=100, clipping_quantile=0.5)
        release(ledger, 1, [], {})
        shares.append(ledger.entries[0].unclipped_share)
    assert np.std(shares) == pytest.approx(5 / 100, rel=0.1)  # σ_b = n/20; 6 standard errors of the estimate
    assert np.mean(shares) == pytest.approx(0.5, abs=0.01)
