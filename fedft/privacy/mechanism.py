"""Client-level differential privacy: clip, add up, noise. Knows nothing of Flower; `ledger.py` accounts for it.

**Guarantee.** For one release, each client's update is clipped to L2 norm C over all its arrays jointly, the clipped
updates are summed, N(0, (zC)²) is added to each coordinate, and the sum is divided by n, the planned cohort size. n is
fixed before the round and does not depend on who answers. Two data sets are neighbours if one client's data is replaced
by nothing (zero-out adjacency); that moves the sum by at most C in L2, so a release is a Gaussian mechanism of noise
over sensitivity z, and the k releases that a client is part of compose to one of z/√k. A client that fails, is late,
refuses, or sends a zero, non-finite or misshapen update contributes zero, and the release happens all the same. If one
client's data is replaced by other data instead (replace-one adjacency), the sum moves by up to 2C: the same with z/2.

**Adaptive clipping** (Andrew et al., 2019, arXiv 1905.03871). A release may also hold the noised sum of bits, +½ for an
update below C and −½ for a clipped one. Bits and update of a client have one joint sensitivity, and the noise of both
is chosen so that together they are one Gaussian release of z; see `Mechanism.update_noise_multiplier`.

**Not covered.** Losses, example counts, error texts and who took part are not noised. The server sees each clipped
update before the noise and is trusted. Floating-point arithmetic is not exact real arithmetic: the four-draw sum below
hinders reconstruction of the noise's low bits, it does not prove their absence.

**Edge cases.** z = 0 gives ε = ∞. A NaN norm is never compared: such an update contributes zero.
"""

import math
import os
from collections.abc import Iterable, Mapping

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray
from scipy.special import ndtri

from fedft.privacy.ledger import Ledger

GENERATOR = "ChaCha20 under a key from the operating system for each array; four draws, added in float64"

Update = Mapping[str, NDArray[np.float64]]

_BELOW = 1 - 1e-3
"""Share of C below which an update counts as unclipped: a client's own clipping in float32 misses C by less."""


def release(
    ledger: Ledger, server_round: int, updates: Iterable[Update], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, NDArray[np.float64]]:
    """Return the noised mean update, (Σ clip(Δ_i) + N(0, (z_Δ·C)²)) / n, of a charged round, and settle it.

    Args:
        ledger: holds z, n and the round's C; under adaptive clipping it learns the next.
        server_round: the round charged last.
        updates: the clients' updates, each with exactly the keys and shapes of `shapes`, or anything else, which
            contributes zero.
        shapes: key to shape of the arrays that are released.

    Raises:
        LedgerError: the round is not charged, or was released already; nothing is drawn then.
    """
    clipping_norm, mechanism = ledger.pending(server_round).clipping_norm, ledger.mechanism
    total = {key: np.zeros(shape) for key, shape in shapes.items()}
    bits = 0.0
    for update in updates:
        clipped = clip_update(update, clipping_norm) if _fits(update, shapes) else None
        if clipped is not None:
            bits += 0.5 if update_norm(clipped) < _BELOW * clipping_norm else -0.5
            for key, value in clipped.items():
                total[key] += value
    scale = mechanism.update_noise_multiplier * clipping_norm
    mean = {
        key: (value + scale * private_gaussian(value.shape)) / mechanism.cohort_size for key, value in total.items()
    }
    share = None
    if mechanism.clipping_quantile:
        noised = bits + mechanism.bit_noise * float(private_gaussian(()))
        share = min(1.0, max(0.0, 0.5 + noised / mechanism.cohort_size))
    ledger.settle(server_round, share)
    return mean


def clip_update(update: Update, clipping_norm: float) -> dict[str, NDArray[np.float64]] | None:
    """Return the update scaled to L2 norm at most C over all arrays jointly; None if it is zero or not finite."""
    norm = update_norm(update)
    if not 0 < norm < math.inf:
        return None
    return {key: value * min(1.0, clipping_norm / norm) for key, value in update.items()}


def update_norm(update: Update) -> float:
    """Return the L2 norm over all arrays jointly; NaN or infinity where an entry is, or where the norm overflows."""
    with np.errstate(all="ignore"):
        return math.sqrt(sum(float(np.vdot(value, value)) for value in update.values()))


def private_gaussian(shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return standard Gaussian noise in float64 that no seed reaches.

    The uniform bits are a ChaCha20 key stream under a key fresh from the operating system at every call. Each value is
    the sum of four draws, halved, so that one value's bits do not determine its draws (arXiv 2107.10138, section 4).
    """
    count = math.prod(shape)
    stream = Cipher(ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor()
    total = np.zeros(count)
    for _ in range(4):
        bits = np.frombuffer(stream.update(bytes(8 * count)), dtype=np.uint64)
        total += ndtri(((bits >> np.uint64(11)) + 0.5) * 2.0**-53)
    return (total / 2).reshape(shape)


def _fits(update: Update, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return set(update) == set(shapes) and all(update[key].shape == shape for key, shape in shapes.items())
