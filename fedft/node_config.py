"""A node's own settings, from the node-config that its SuperNode was started with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedft.config import Scalar
from fedft.errors import ConfigError

_EXAMPLE = """--node-config 'data-path="/data/site.jsonl" policy-path="/data/policy.toml"'"""
_TEXTS = ("data-path", "policy-path", "prompt-column", "response-column")
_COUNTS = ("partition-id", "num-partitions")


@dataclass(frozen=True)
class NodeSettings:
    """What a node trains on: a simulated partition, or a real site's own data; and what the site allows.

    Attributes:
        partition_id: index of the partition, in a simulation.
        num_partitions: how many there are.
        data_path: file or folder of a real site; empty in a simulation.
        policy_path: the site's policy; empty where it has none.
        prompt_column: column of the prompt in the site's data; empty is the run's `data.prompt-column`.
        response_column: the same for the response.
    """

    partition_id: int = 0
    num_partitions: int = 1
    data_path: str = ""
    policy_path: str = ""
    prompt_column: str = ""
    response_column: str = ""

    @property
    def has_policy(self) -> bool:
        """Whether a policy binds the run here: at every real site, at a simulated one where it names one."""
        return bool(self.data_path or self.policy_path)


def parse_node_config(node_config: Mapping[str, Scalar]) -> NodeSettings:
    """Parse a node-config: `data-path` at a real site, `partition-id` and `num-partitions` in a simulation.

    Raises:
        ConfigError: an unknown key, a wrong type or range, a path that is not absolute, one key of a pair without the
            other, or neither a path nor a partition.
    """
    unknown = sorted(set(node_config) - {*_TEXTS, *_COUNTS})
    if unknown:
        raise ConfigError(
            f"node-config key {unknown[0]!r} is unknown; there are {', '.join((*_TEXTS, *_COUNTS))}; start the "
            f"SuperNode with, for example, {_EXAMPLE}"
        )
    texts = {key: _text(node_config, key) for key in _TEXTS}
    for key in ("data-path", "policy-path"):
        texts[key] = _absolute(key, texts[key])
    if bool(texts["prompt-column"]) != bool(texts["response-column"]):
        raise ConfigError(
            f"node-config prompt-column={texts['prompt-column']!r} and response-column={texts['response-column']!r} "
            "must be given together, or neither"
        )
    index, count = (0, 1) if texts["data-path"] else _partition(node_config)
    return NodeSettings(index, count, **{key.replace("-", "_"): value for key, value in texts.items()})


def _text(node_config: Mapping[str, Scalar], key: str) -> str:
    value = node_config.get(key, "")
    if not isinstance(value, str):
        raise ConfigError(f'node-config {key}={value!r} must be a text, in quotes: {key}="..."')
    if key in node_config and not value.strip():
        raise ConfigError(f"node-config {key}={value!r} is empty; fill it in or leave the key out")
    return value


def _absolute(key: str, value: str) -> str:
    if value and not Path(value).is_absolute():
        raise ConfigError(
            f"node-config {key}={value!r} must be an absolute path: training does not run in the folder in which the "
            "SuperNode was started"
        )
    return value


def _partition(node_config: Mapping[str, Scalar]) -> tuple[int, int]:
    if not all(key in node_config for key in _COUNTS):
        raise ConfigError(
            "node-config has no data-path, and no partition-id with num-partitions; start the SuperNode with "
            f"{_EXAMPLE}"
        )
    index, count = node_config["partition-id"], node_config["num-partitions"]
    for key, value in (("partition-id", index), ("num-partitions", count)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"node-config {key}={value!r} must be a whole number")
    if not 0 <= int(index) < int(count):
        raise ConfigError(f"node-config partition-id={index!r} must be >= 0 and < num-partitions={count!r}")
    return int(index), int(count)
