import tomllib
from typing import Any

import pytest
from conftest import PROJECT, flatten, make_settings

from fedft.config import parse_run_config, run_config_ranges
from fedft.errors import ConfigError


def test_pyproject_defaults_are_valid_and_complete(run_config: dict[str, Any]) -> None:
    parse_run_config(run_config)
    assert set(run_config) == set(run_config_ranges())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num-server-rounds", "abc"),
        ("num-server-rounds", 0),
        ("num-server-rounds", True),
        ("num-server-rounds", 3.0),
        ("seed", -1),
        ("resume-from", 1),
        ("model.name", " "),
        ("model.quantization", 5),
        ("model.dtype", "int8"),
        ("model.gradient-checkpointing", 1),
        ("lora.r", 0),
        ("lora.aggregation", "fedit"),
        ("dp.clipping-quantile", 1.0),
        ("dp.clipping-learning-rate", 0.0),
        ("lora.dropout", 1.0),
        ("lora.aggregation", "median"),
        ("data.partitioner", "random"),
        ("data.alpha", 0),
        ("data.test-fraction", 1.0),
        ("train.batch-size", 0),
        ("train.learning-rate-max", float("nan")),
        ("train.learning-rate-max", "1e-3"),
        ("strategy.fraction-train", 0.0),
        ("strategy.fraction-train", 1.5),
        ("dp.unit", "record"),
        ("dp.clipping-norm", 0.0),
        ("dp.clipping-norm", float("inf")),
        ("dp.noise-multiplier", -0.1),
        ("dp.noise-multiplier", float("nan")),
        ("dp.delta", 1.0),
    ],
)
def test_wrong_value_is_refused_in_one_line_with_key_and_value(
    run_config: dict[str, Any], key: str, value: object
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run_config(run_config | {key: value})
    assert f"{key}={value!r}" in str(caught.value)
    assert "must be" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whole_number_is_accepted_for_a_float(run_config: dict[str, Any]) -> None:
    assert parse_run_config(run_config | {"lora.alpha": 32, "dp.clipping-norm": 1}).lora.alpha == 32.0


def test_unknown_and_missing_keys_are_refused(run_config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"'lora\.rank' is unknown"):
        parse_run_config(run_config | {"lora.rank": 8})
    del run_config["lora.r"]
    with pytest.raises(ConfigError, match=r"'lora\.r' is missing"):
        parse_run_config(run_config)


@pytest.mark.parametrize(
    "contradiction",
    [
        {"train__learning_rate_min": 1e-2},
        {"strategy__min_replies": 3},
        {"data__prompt_column": "input"},
        {"data__partitioner": "natural", "data__partition_by": ""},
        {"dp__unit": "none", "dp__max_epsilon": 8.0},
        {"dp__unit": "none", "dp__clipping_quantile": 0.5},
        {"dp__noise_multiplier": 0.0, "dp__max_epsilon": 8.0},
    ],
)
def test_contradiction_is_refused(contradiction: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make_settings(**contradiction)


def test_target_module_names_are_split() -> None:
    assert make_settings(lora__target_modules=" q_proj, v_proj ,").lora.target_module_names == ("q_proj", "v_proj")
    assert make_settings().lora.target_module_names == ()


def test_notebook_preset_has_the_notebooks_figures(run_config: dict[str, Any]) -> None:
    preset = flatten(tomllib.loads((PROJECT / "configs/notebook.toml").read_text(encoding="utf-8")))
    settings = parse_run_config(run_config | preset)
    assert (settings.model.name, settings.data.name) == (
        "EleutherAI/pythia-70m",
        "medalpaca/medical_meadow_medical_flashcards",
    )
    assert (settings.model.quantization, settings.model.gradient_checkpointing) == (4, True)
    assert (settings.lora.r, settings.lora.alpha, settings.lora.dropout) == (16, 64, 0.075)
    assert settings.lora.target_module_names == ()
    assert (settings.data.prompt_column, settings.data.response_column) == ("input", "output")
    assert (settings.data.prompt_style, settings.data.partitioner) == ("alpaca", "iid")
    train = settings.train
    assert (train.max_steps, train.batch_size, train.gradient_accumulation_steps, train.max_length) == (1, 2, 1, 512)
    assert (train.learning_rate_max, train.learning_rate_min) == (5e-5, 1e-6)
    assert (settings.num_server_rounds, settings.save_every_round) == (10, 5)
    assert (settings.strategy.fraction_train, settings.strategy.min_available_nodes) == (0.2, 20)
    assert (settings.dp.unit, settings.dp.clipping_norm, settings.dp.noise_multiplier) == ("client", 0.5, 0.02)
    cohort = round(settings.strategy.fraction_train * settings.strategy.min_available_nodes)
    assert settings.dp.noise_multiplier * settings.dp.clipping_norm / cohort == pytest.approx(0.0025)
