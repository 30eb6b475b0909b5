"""The LoRA adapter as arrays: what travels, is clipped, noised, averaged and saved. Knows no model and no PyTorch.

An adapter is a dictionary from PEFT's state-dict keys to float32 arrays, sorted by key.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedft.errors import AdapterError

Adapter = dict[str, NDArray[np.float32]]

ADAPTER_FILE = "adapter_model.safetensors"


def new_adapter(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Adapter:
    """Return a new adapter that changes nothing: A uniform in ±1/√(inputs), B zero (Hu et al., 2021, section 4.1).

    The same seed gives the same adapter on every machine; `adapter_digest` tells whether it did.

    Args:
        shapes: key to shape, sorted by key.
        seed: the run's.
    """
    rng = np.random.default_rng([seed, 0xA])
    adapter: Adapter = {}
    for key, shape in shapes.items():
        if key.endswith(".lora_A.weight"):
            bound = 1 / math.sqrt(shape[1])
            adapter[key] = rng.uniform(-bound, bound, shape).astype(np.float32)
        else:
            adapter[key] = np.zeros(shape, np.float32)
    return adapter


def check_adapter(adapter: Mapping[str, NDArray[Any]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse arrays that are not exactly a finite float32 adapter of these keys and shapes.

    Raises:
        AdapterError: a key is missing or unknown, or an array has another shape or type, or is not finite.
    """
    wrong = sorted(set(adapter) ^ set(shapes))
    if wrong:
        raise AdapterError(f"the adapter lacks or should not have the key {wrong[0]!r} ({len(wrong)} such keys)")
    for key, shape in shapes.items():
        value = adapter[key]
        if value.shape != shape or value.dtype != np.float32:
            raise AdapterError(f"adapter array {key!r} is {value.dtype}{value.shape}, but must be float32{shape}")
        if not np.isfinite(value).all():
            raise AdapterError(f"adapter array {key!r} holds NaN or infinity")


def adapter_digest(adapter: Mapping[str, NDArray[np.float32]]) -> str:
    """Return the SHA-256, in hexadecimal, of the adapter's file as `save_adapter` writes it."""
    return hashlib.sha256(adapter_bytes(adapter)).hexdigest()


def adapter_bytes(adapter: Mapping[str, NDArray[np.float32]]) -> bytes:
    """Return the adapter as the content of its file, in safetensors format."""
    from safetensors.numpy import save  # not save_file: it reports a full disk as an error of its own

    return save(dict(adapter), metadata={"format": "pt"})
