"""Which LoRA factors train and travel in a round, and what the server does after averaging. Knows nothing of Flower.

The update of a module is the product B·A, with A of shape [r, in] and B of shape [out, r]; B starts at zero. Averaging
both factors averages neither the product nor its noise, so three schemes hold one factor still while the other trains:

- `lora`: A and B train (Hu et al., 2021, arXiv 2106.09685, averaged by factor);
- `ffa`: A is frozen at its start, the same everywhere; B trains (Sun et al., 2024, arXiv 2403.12313);
- `rolora`: B trains in odd rounds, A in even ones (Chen et al., 2024, arXiv 2409.02346); B first, because A's gradient
  is zero while B is;
- `fedsvd`: B trains, and after each average the server refactors B·A so that A's rows are orthonormal (Lee et al.,
  2025, arXiv 2505.12805). That reads the noised average alone: post-processing.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from fedft.adapter import Adapter

_A, _B = ".lora_A.weight", ".lora_B.weight"


def trained_keys(aggregation: str, server_round: int, keys: Iterable[str]) -> list[str]:
    """Return the adapter keys that train in a round, and travel as arrays in both directions.

    Args:
        aggregation: `lora.aggregation`.
        server_round: counted from 1.
        keys: the adapter's.
    """
    if aggregation == "lora":
        return list(keys)
    factor = _A if aggregation == "rolora" and server_round % 2 == 0 else _B
    return [key for key in keys if key.endswith(factor)]


def most_trained(aggregation: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the most parameters that train in a round."""
    return max(sum(math.prod(shapes[key]) for key in trained_keys(aggregation, number, shapes)) for number in (1, 2))


def after_average(aggregation: str, adapter: Adapter) -> Adapter:
    """Return the global adapter that the next round starts from."""
    if aggregation != "fedsvd":
        return adapter
    refactored = dict(adapter)
    for key in adapter:
        if key.endswith(_A):
            other = key.removesuffix(_A) + _B
            refactored[key], refactored[other] = refactor(adapter[key], adapter[other])
    return refactored


def refactor(a: NDArray[np.float32], b: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return A' and B' with B'·A' = B·A, A' = Vᵀ and B' = U·S of the product's singular value decomposition.

    The rows of A' are orthonormal, also where the product has a lower rank than r, or is zero. The product itself is
    never formed: QR of both factors leaves a core of at most r×r. Where r exceeds a side of the product, the rows of A'
    beyond that side are zero, and so are their columns of B'.

    Args:
        a: shape [r, in].
        b: shape [out, r].
    """
    left, left_core = np.linalg.qr(b.astype(np.float64))
    right, right_core = np.linalg.qr(a.astype(np.float64).T)
    u, s, vt = np.linalg.svd(left_core @ right_core.T, full_matrices=False)
    new_a, new_b = np.zeros(a.shape, np.float32), np.zeros(b.shape, np.float32)
    new_a[: len(s)] = vt @ right.T
    new_b[:, : len(s)] = left @ (u * s)
    return new_a, new_b
