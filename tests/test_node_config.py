from typing import Any

import pytest

from fedft.errors import ConfigError
from fedft.node_config import NodeSettings, parse_node_config


def test_node_config_is_a_partition_or_a_path() -> None:
    assert parse_node_config({"partition-id": 1, "num-partitions": 2}) == NodeSettings(1, 2)
    assert parse_node_config({"data-path": "/a.jsonl"}) == NodeSettings(data_path="/a.jsonl")
    both = {"data-path": "/a.jsonl", "partition-id": 1, "num-partitions": 2}
    assert parse_node_config(both) == NodeSettings(data_path="/a.jsonl")


def test_real_site_always_has_a_policy_and_a_simulated_one_where_it_names_one() -> None:
    partition = {"partition-id": 1, "num-partitions": 2}
    assert parse_node_config({"data-path": "/a.jsonl"}).has_policy
    assert parse_node_config({**partition, "policy-path": "/p.toml"}).has_policy
    assert not parse_node_config({**partition}).has_policy


@pytest.mark.parametrize(
    ("node_config", "words"),
    [
        ({}, "no data-path, and no partition-id.*--node-config"),
        ({"policy-path": "/p.toml"}, "no data-path"),
        ({"partition-id": 0}, "no partition-id with num-partitions"),
        ({"partition-id": 2, "num-partitions": 2}, "partition-id=2 must be >= 0 and <"),
        ({"partition-id": "0", "num-partitions": 2}, "partition-id='0' must be a whole number"),
        ({"partition-id": True, "num-partitions": 2}, "partition-id=True must be a whole number"),
        ({"data-path": 3}, "data-path=3 must be a text"),
        ({"data-path": " "}, "data-path=' ' is empty"),
        ({"data-path": "site.jsonl"}, "data-path='site.jsonl' must be an absolute path"),
        ({"data-path": "/a.jsonl", "policy-path": "p.toml"}, "policy-path='p.toml' must be an absolute path"),
        ({"data-path": "/a.jsonl", "policy-path": ""}, "policy-path='' is empty"),
        ({"data-path": "/a.jsonl", "policy_path": "/p.toml"}, "key 'policy_path' is unknown; there are data-path, "),
        ({"data-path": "/a.jsonl", "prompt-column": "q"}, "must be given together"),
    ],
)
def test_wrong_node_config_is_one_line_with_key_value_and_remedy(node_config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"node-config .*{words}") as caught:
        parse_node_config(node_config)
    assert "\n" not in str(caught.value)
