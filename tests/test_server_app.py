import logging
from typing import Any

import pytest
from conftest import make_settings

from fedft.errors import ConfigError
from fedft.logs import drop_traceback
from fedft.server_app import _output_dir, _plan_privacy, learning_rate


def test_learning_rate_is_half_a_cosine_over_the_rounds() -> None:
    settings = make_settings(num_server_rounds=10, train__learning_rate_max=5e-5, train__learning_rate_min=1e-6)
    rates = [learning_rate(settings, number) for number in range(1, 11)]
    assert rates[0] == 5e-5
    assert rates[5] == pytest.approx((5e-5 + 1e-6) / 2)
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(settings, 11) == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("changes", "most", "z"),
    [
        ({}, 3, 0.02),
        ({"dp__target_epsilon": 4.5}, 10, 3.08765),
        ({"dp__target_epsilon": 4.5}, 1, 3.08765 / 10**0.5),  # what counts is how often a client takes part
    ],
)
def test_noise_is_as_given_or_calibrated_to_the_target(changes: dict[str, Any], most: int, z: float) -> None:
    ledger = _plan_privacy(make_settings(**changes), 100, most)
    assert ledger is not None
    assert ledger.mechanism.noise_multiplier == pytest.approx(z, rel=1e-5)
    assert ledger.mechanism.cohort_size == 100


def test_no_unit_means_no_mechanism() -> None:
    assert _plan_privacy(make_settings(dp__unit="none"), 2, 1) is None


def test_relative_output_dir_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be an absolute path"):
        _output_dir(make_settings(output_dir="runs"))


def test_tracebacks_are_kept_for_bugs() -> None:
    for error, kept in ((ConfigError("x"), False), (ValueError("x"), True)):
        record = logging.LogRecord("flwr", logging.ERROR, "", 0, "", (), (type(error), error, None))
        assert drop_traceback(record)
        assert bool(record.exc_info) == kept
