"""What travels in Flower's records: adapters and the numbers of a round."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from fedft.adapter import adapter_bytes
from fedft.errors import ConfigError

NOT_SHARED = "not-shared"
"""The one metric of a reply whose site shares no figures; its value is 1."""


def record_from_arrays(adapter: Mapping[str, NDArray[np.floating[Any]]]) -> ArrayRecord:
    """Return arrays as a Flower record of float32."""
    return ArrayRecord({key: Array(np.asarray(value, dtype=np.float32)) for key, value in adapter.items()})


def arrays_from_record(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """Return the arrays of a Flower record, of whatever type and shape it holds.

    Raises:
        ValueError: an array's bytes are not a NumPy array.
    """
    return {key: array.numpy() for key, array in record.items()}


def bytes_from_arrays(adapter: Mapping[str, NDArray[np.float32]]) -> bytes:
    """Return arrays as one value of a `ConfigRecord`: what a node needs but must not answer."""
    return adapter_bytes(adapter) if adapter else b""


def arrays_from_bytes(config: ConfigRecord, key: str) -> dict[str, NDArray[Any]]:
    """Return the arrays that `bytes_from_arrays` packed.

    Raises:
        ConfigError: the value is missing or holds something else.
    """
    value = config.get(key)
    try:
        if not isinstance(value, bytes):
            raise TypeError(f"a value of type {type(value).__name__}")
        return dict(load(value)) if value else {}
    except (SafetensorError, TypeError, ValueError) as error:
        raise ConfigError(f"the server sent {key} as {error}; server and node need the same fedft") from error


def number_of(config: ConfigRecord, key: str) -> float:
    """Return a number that the server sends with a round.

    Raises:
        ConfigError: it is missing or no number.
    """
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"the server sent {key}={value!r}, not a number; server and node need the same fedft")
    return value


def record_size(record: ArrayRecord, config: ConfigRecord | None = None) -> int:
    """Return the bytes of a record's arrays, and of those packed into a configuration."""
    packed = sum(len(value) for value in (config or {}).values() if isinstance(value, bytes))
    return sum(len(array.data) for array in record.values()) + packed
