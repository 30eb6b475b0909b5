import numpy as np
import pytest
from flwr.app import ConfigRecord

from fedft.errors import ConfigError
from fedft.records import arrays_from_bytes, bytes_from_arrays, record_from_arrays, record_size

ARRAYS = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones((1, 2), np.float32)}


def test_packed_arrays_come_back_bit_for_bit() -> None:
    unpacked = arrays_from_bytes(ConfigRecord({"x": bytes_from_arrays(ARRAYS)}), "x")
    assert set(unpacked) == set(ARRAYS)
    assert all(np.array_equal(unpacked[key], ARRAYS[key]) for key in ARRAYS)
    assert arrays_from_bytes(ConfigRecord({"x": bytes_from_arrays({})}), "x") == {}


@pytest.mark.parametrize("value", [None, "text", 3, b"not arrays"])
def test_packed_arrays_of_another_fedft_are_one_clear_line(value: str | int | bytes | None) -> None:
    config = ConfigRecord({} if value is None else {"x": value})
    with pytest.raises(ConfigError, match=r"the server sent x as .*need the same fedft"):
        arrays_from_bytes(config, "x")


def test_size_counts_arrays_and_packed_arrays() -> None:
    record = record_from_arrays(ARRAYS)
    assert record_size(record) > 4 * 8
    assert record_size(record, ConfigRecord({"x": b"12345", "y": 1.0, "z": "text"})) == record_size(record) + 5
