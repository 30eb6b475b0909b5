"""Client-level differential privacy: clip, add up, noise, account. Knows nothing of Flower.

**Guarantee.** For one release, each client's update is clipped to L2 norm C over all its arrays jointly, the clipped
updates are summed, N(0, (zC)²) is added to each coordinate, and the sum is divided by n, the planned cohort size. n is
fixed before the round and does not depend on who answers. Two data sets are neighbours if one client's data is
replaced by nothing (zero-out adjacency); that moves the sum by at most C in L2, so a release is a Gaussian mechanism of
noise over sensitivity z, and T releases compose to one of z/√T. A client that fails, is late, refuses, or sends a zero,
non-finite or misshapen update contributes zero, and the release happens all the same.

**Not covered.** Losses, example counts, error texts and who took part are not noised. The server sees each clipped
update before the noise and is trusted. Floating-point arithmetic is not exact real arithmetic: the four-draw sum below
hinders reconstruction of the noise's low bits, it does not prove their absence.

**Edge cases.** z = 0 gives ε = ∞. A NaN norm is never compared: such an update contributes zero.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray
from scipy.special import ndtri

from fedft.privacy.accounting import gaussian_epsilon, renyi_epsilon, verdict

Update = Mapping[str, NDArray[np.float64]]


@dataclass
class GaussianReleases:
    """The mechanism of a run and, in the same object, the account of what it has released.

    Attributes:
        clipping_norm: C, the L2 bound of one client's update, > 0.
        noise_multiplier: z, the noise's standard deviation over C, >= 0.
        cohort_size: n, the planned number of clients a round, >= 1.
        delta: δ of the reported ε.
        releases: noised aggregates released so far.
    """

    clipping_norm: float
    noise_multiplier: float
    cohort_size: int
    delta: float
    releases: int = 0

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise on each coordinate of the mean: z·C/n."""
        return self.noise_multiplier * self.clipping_norm / self.cohort_size

    @property
    def epsilon(self) -> float:
        """ε of all releases so far at δ: every client is taken to have been in every release."""
        return gaussian_epsilon(self.noise_multiplier, self.releases, self.delta)

    @property
    def next_epsilon(self) -> float:
        """ε after one release more."""
        return gaussian_epsilon(self.noise_multiplier, self.releases + 1, self.delta)

    @property
    def renyi_epsilon(self) -> float:
        """ε of all releases so far by the simple account, see `renyi_epsilon`."""
        return renyi_epsilon(self.noise_multiplier, self.releases, self.delta)

    def certificate(self) -> dict[str, Any]:
        """Return the claim with all it rests on and leaves out, as `privacy.json` holds it."""
        return {
            "unit": "client",
            "adjacency": "zero-out: all of one client's data replaced by nothing",
            "mechanism": "Gaussian on the sum of clipped updates, divided by the planned cohort size",
            "clipping_norm": self.clipping_norm,
            "noise_multiplier": self.noise_multiplier,
            "cohort_size": self.cohort_size,
            "sigma": self.sigma,
            "releases": self.releases,
            "participations_assumed": self.releases,
            "delta": self.delta,
            "epsilon": self.epsilon,
            "epsilon_renyi": self.renyi_epsilon,
            "verdict": verdict(self.epsilon),
            "generator": "ChaCha20 under a key from the operating system at each array, four draws",
            "not_covered": [
                "losses, accuracies, example counts, error texts and who took part",
                "the server, which sees every clipped update before the noise",
                "amplification by sampling: none is claimed",
            ],
        }

    def release(
        self, updates: Iterable[Update], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, NDArray[np.float64]]:
        """Return the noised mean update, (Σ clip(Δ_i) + N(0, (zC)²)) / n, and count it.

        Args:
            updates: the clients' updates, each with exactly the keys and shapes of `shapes`, or anything else, which
                contributes zero.
            shapes: key to shape of the arrays that are released.
        """
        total = {key: np.zeros(shape) for key, shape in shapes.items()}
        for update in updates:
            clipped = clip_update(update, self.clipping_norm) if _fits(update, shapes) else None
            for key, value in (clipped or {}).items():
                total[key] += value
        self.releases += 1
        scale = self.noise_multiplier * self.clipping_norm
        return {key: (value + scale * private_gaussian(value.shape)) / self.cohort_size for key, value in total.items()}


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
