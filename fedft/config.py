"""The run-config as frozen, validated settings.

`pyproject.toml` holds every run-config key with its default and meaning. This module holds its type and range: each
dataclass is one table of the run-config, each field one key with `-` written `_`. Flower hands over a flat mapping such
as `{"num-server-rounds": 3, "lora.r": 16}`, in which an override may have any scalar type; `parse_run_config` turns it
into `Settings` or raises one `ConfigError`. No other module sees the mapping.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, get_type_hints

from fedft.errors import ConfigError

Scalar = int | float | bool | str | bytes

_Section = TypeVar("_Section")


def _setting(
    *,
    choices: tuple[int | str, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    required: bool = False,
) -> Any:
    """Declare a run-config key with its range; `required` forbids the empty string."""
    return field(metadata={"range": _Range(choices, at_least, above, at_most, below, required)})


@dataclass(frozen=True)
class _Range:
    choices: tuple[int | str, ...] | None
    at_least: float | None
    above: float | None
    at_most: float | None
    below: float | None
    required: bool

    def __str__(self) -> str:
        if self.choices:
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        bounds = [
            f"{sign} {bound:g}"
            for sign, bound in ((">=", self.at_least), (">", self.above), ("<=", self.at_most), ("<", self.below))
            if bound is not None
        ]
        return " and ".join(bounds) or ("a non-empty text" if self.required else "any text")

    def holds(self, value: Scalar) -> bool:
        if self.choices is not None:
            return value in self.choices
        if isinstance(value, str):
            return bool(value.strip()) or not self.required
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


_MAX_COUNT = 2**31 - 1


@dataclass(frozen=True)
class ModelSettings:
    """The frozen base model (`model.*`)."""

    name: str = _setting(required=True)
    revision: str = _setting(required=True)
    quantization: int = _setting(choices=(0, 4, 8))
    dtype: str = _setting(choices=("auto", "float32", "bfloat16", "float16"))
    gradient_checkpointing: bool = _setting(choices=(False, True))


@dataclass(frozen=True)
class LoraSettings:
    """The adapter (`lora.*`)."""

    r: int = _setting(at_least=1, at_most=4096)
    alpha: float = _setting(above=0, at_most=65536)
    dropout: float = _setting(at_least=0, below=1)
    target_modules: str = _setting()
    aggregation: str = _setting(choices=("lora", "ffa", "rolora", "fedsvd"))

    @property
    def target_module_names(self) -> tuple[str, ...]:
        """The module names of `target-modules`; empty where PEFT chooses."""
        return tuple(name.strip() for name in self.target_modules.split(",") if name.strip())


@dataclass(frozen=True)
class DataSettings:
    """The data set, its prompts, its test split and its simulated partitions (`data.*`)."""

    name: str = _setting(required=True)
    split: str = _setting(required=True)
    prompt_column: str = _setting()
    response_column: str = _setting()
    prompt_style: str = _setting(choices=("auto", "chat", "alpaca"))
    partitioner: str = _setting(choices=("iid", "dirichlet", "natural", "linear", "square", "exponential"))
    alpha: float = _setting(above=0)
    partition_by: str = _setting()
    test_fraction: float = _setting(at_least=0, below=1)
    max_examples: int = _setting(at_least=0, at_most=_MAX_COUNT)


@dataclass(frozen=True)
class TrainSettings:
    """A client's local training in one round (`train.*`)."""

    max_steps: int = _setting(at_least=0, at_most=_MAX_COUNT)
    epochs: int = _setting(at_least=1, at_most=10_000)
    batch_size: int = _setting(at_least=1, at_most=65536)
    gradient_accumulation_steps: int = _setting(at_least=1, at_most=65536)
    learning_rate_max: float = _setting(above=0, at_most=1)
    learning_rate_min: float = _setting(at_least=0, at_most=1)
    max_length: int = _setting(at_least=8, at_most=1_048_576)


@dataclass(frozen=True)
class StrategySettings:
    """Who takes part in a round, and how long the server waits (`strategy.*`)."""

    fraction_train: float = _setting(above=0, at_most=1)
    fraction_evaluate: float = _setting(at_least=0, at_most=1)
    min_available_nodes: int = _setting(at_least=1, at_most=_MAX_COUNT)
    min_replies: int = _setting(at_least=1, at_most=_MAX_COUNT)
    max_failed_rounds: int = _setting(at_least=1, at_most=_MAX_COUNT)
    node_timeout: float = _setting(above=0)
    round_timeout: float = _setting(above=0)

    def cohort_size(self, nodes: int) -> int:
        """Return n, the planned clients a round of this many nodes."""
        return max(1, round(self.fraction_train * nodes))


@dataclass(frozen=True)
class DpSettings:
    """The differential privacy of the run (`dp.*`)."""

    unit: str = _setting(choices=("none", "client"))
    clipping_norm: float = _setting(above=0)
    noise_multiplier: float = _setting(at_least=0)
    target_epsilon: float = _setting(at_least=0)
    max_epsilon: float = _setting(at_least=0)
    delta: float = _setting(above=0, below=1)
    clipping_quantile: float = _setting(at_least=0, below=1)
    clipping_learning_rate: float = _setting(above=0, at_most=10)


@dataclass(frozen=True)
class EvalSettings:
    """Held-out evaluation at the nodes (`eval.*`)."""

    examples: int = _setting(at_least=0, at_most=_MAX_COUNT)
    every: int = _setting(at_least=1, at_most=_MAX_COUNT)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The whole run-config."""

    num_server_rounds: int = _setting(at_least=1, at_most=1_000_000)
    save_every_round: int = _setting(at_least=1, at_most=1_000_000)
    seed: int = _setting(at_least=0, at_most=2**32 - 1)
    output_dir: str = _setting()
    resume_from: str = _setting()
    model: ModelSettings
    lora: LoraSettings
    data: DataSettings
    train: TrainSettings
    strategy: StrategySettings
    dp: DpSettings
    eval: EvalSettings


_TABLES: dict[str, type[Any]] = {
    "model": ModelSettings,
    "lora": LoraSettings,
    "data": DataSettings,
    "train": TrainSettings,
    "strategy": StrategySettings,
    "dp": DpSettings,
    "eval": EvalSettings,
}


def parse_run_config(run_config: Mapping[str, Scalar]) -> Settings:
    """Parse Flower's flat run-config.

    Raises:
        ConfigError: an unknown or missing key, a wrong type, a value out of range, or a contradiction.
    """
    unknown = sorted(set(run_config) - set(run_config_ranges()))
    if unknown:
        raise ConfigError(f"run-config key {unknown[0]!r} is unknown; README.md lists the keys")
    tables = {name: _parse_table(table, f"{name}.", run_config) for name, table in _TABLES.items()}
    settings = _parse_table(Settings, "", run_config, **tables)
    _refuse_contradictions(settings)
    return settings


def run_config_ranges() -> dict[str, tuple[str, str]]:
    """Return each run-config key with the name of its type and its range in words."""
    ranges = {}
    for prefix, table in (("", Settings), *((f"{name}.", table) for name, table in _TABLES.items())):
        for item in fields(table):
            if "range" in item.metadata:
                kind = get_type_hints(table)[item.name].__name__
                ranges[prefix + item.name.replace("_", "-")] = (kind, str(item.metadata["range"]))
    return ranges


def _parse_table(table: type[_Section], prefix: str, run_config: Mapping[str, Scalar], **given: object) -> _Section:
    hints = get_type_hints(table)
    values = dict(given)
    for item in fields(table):  # type: ignore[arg-type]
        if item.name not in given:
            key = prefix + item.name.replace("_", "-")
            values[item.name] = _parse_value(key, hints[item.name], item.metadata["range"], run_config)
    return table(**values)


def _parse_value(key: str, kind: type, allowed: _Range, run_config: Mapping[str, Scalar]) -> Scalar:
    if key not in run_config:
        raise ConfigError(f"run-config key {key!r} is missing; [tool.flwr.app.config] in pyproject.toml must hold it")
    value = run_config[key]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind or not allowed.holds(value):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        wanted = names[kind] if kind is bool else f"{names[kind]}, {allowed}"
        raise ConfigError(f"run-config {key}={run_config[key]!r} is not allowed: it must be {wanted}")
    return value


def _refuse_contradictions(settings: Settings) -> None:
    train, dp, strategy = settings.train, settings.dp, settings.strategy
    if train.learning_rate_min > train.learning_rate_max:
        raise ConfigError(
            f"run-config train.learning-rate-min={train.learning_rate_min:g} is larger than "
            f"train.learning-rate-max={train.learning_rate_max:g}; lower the one or raise the other"
        )
    if strategy.min_replies > strategy.min_available_nodes:
        raise ConfigError(
            f"run-config strategy.min-replies={strategy.min_replies} is larger than "
            f"strategy.min-available-nodes={strategy.min_available_nodes}; a round could not succeed"
        )
    if bool(settings.data.prompt_column.strip()) != bool(settings.data.response_column.strip()):
        raise ConfigError(
            f"run-config data.prompt-column={settings.data.prompt_column!r} and "
            f"data.response-column={settings.data.response_column!r} must be given together, or neither"
        )
    needs_column = settings.data.partitioner in ("dirichlet", "natural")
    if needs_column and not settings.data.partition_by.strip():
        raise ConfigError(
            f"run-config data.partition-by='' must name a column for data.partitioner={settings.data.partitioner!r}"
        )
    if dp.unit == "none" and (dp.target_epsilon or dp.max_epsilon):
        raise ConfigError(
            f"run-config dp.target-epsilon={dp.target_epsilon:g} and dp.max-epsilon={dp.max_epsilon:g} need "
            "dp.unit='client'; with dp.unit='none' both must be 0"
        )
    if dp.unit == "none" and dp.clipping_quantile:
        raise ConfigError(
            f"run-config dp.clipping-quantile={dp.clipping_quantile:g} needs dp.unit='client'; with dp.unit='none' "
            "nothing is clipped and it must be 0"
        )
    if dp.unit == "client" and dp.max_epsilon and not dp.target_epsilon and not dp.noise_multiplier:
        raise ConfigError(
            f"run-config dp.max-epsilon={dp.max_epsilon:g} cannot hold with dp.noise-multiplier=0; raise the noise"
        )
