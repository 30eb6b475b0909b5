"""The project's own run-config with overrides, for benchmarks that call fedft without Flower."""

from typing import Any

from flower import PROJECT
from flwr.common.config import get_fused_config_from_dir

from fedft.config import Settings, parse_run_config


def settings_with(**overrides: Any) -> Settings:
    """Return the default settings with overrides such as `**{"lora.r": 4}`."""
    return parse_run_config(get_fused_config_from_dir(PROJECT, overrides))
