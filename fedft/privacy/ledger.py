"""The account of a run's releases: who took part in which, under which clipping norm, and the (ε, δ) that this costs.

**What is accounted.** `Mechanism` holds the figures of one release; the noise is drawn from them (`mechanism.py`) and ε
is computed from them, so the two cannot disagree. The privacy of a client is that of the releases it took part in: k
Gaussian releases of noise multiplier z compose to one of z/√k, exactly. The ledger counts each node's participations,
and its ε is that of the node with the most. It claims nothing for the randomness of cohorts.

**When.** A round is charged to its whole cohort before anything is sent, whoever answers later, and whether or not the
round ends in a release. So a process that is killed at any moment has charged at least what it has released.

**Limits.** A node is its Flower node id. One that the plan did not know may be a client that comes back under another
id, and is counted as the one that took part most; a client that is connected under two ids at once counts as two. The
checksum of the saved state shows damage and careless edits; it is no signature.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from fedft.errors import LedgerError
from fedft.privacy.accounting import gaussian_epsilon


@dataclass(frozen=True)
class Mechanism:
    """The figures of one release, which noise and account both read.

    Attributes:
        clipping_norm: C of the first round, the L2 bound of one client's update, > 0.
        noise_multiplier: z of the whole release, noise over sensitivity under zero-out adjacency, >= 0.
        cohort_size: n, the planned number of clients a round and the fixed denominator, >= 1.
        delta: δ of the reported ε.
        clipping_quantile: γ, the share of the updates that C is steered to leave unclipped; 0 leaves C as it is.
        clipping_learning_rate: η of that steering.

    Raises:
        LedgerError: a value is out of its range.
    """

    clipping_norm: float
    noise_multiplier: float
    cohort_size: int
    delta: float
    clipping_quantile: float = 0.0
    clipping_learning_rate: float = 0.2

    def __post_init__(self) -> None:
        for name, holds in (
            ("clipping_norm", 0 < self.clipping_norm < math.inf),
            ("noise_multiplier", 0 <= self.noise_multiplier < math.inf),
            ("cohort_size", self.cohort_size >= 1),
            ("delta", 0 < self.delta < 1),
            ("clipping_quantile", 0 <= self.clipping_quantile < 1),
            ("clipping_learning_rate", 0 < self.clipping_learning_rate < math.inf),
        ):
            if not holds:
                raise LedgerError(f"{name}={getattr(self, name)!r} is out of range for a Gaussian release")

    @property
    def bit_noise(self) -> float:
        """σ_b, the standard deviation of the noise on the sum of the clipping bits ±½; 0 where none are counted.

        n/20 is what Andrew et al. (2019, arXiv 1905.03871) use; at least z, so that the bits, of sensitivity
        ½, never take more than a quarter of the release's 1/z².
        """
        if not self.clipping_quantile or not self.noise_multiplier:
            return 0.0
        return max(self.cohort_size / 20, self.noise_multiplier)

    @property
    def update_noise_multiplier(self) -> float:
        """z_Δ = (1/z² − 1/(2σ_b)²)^(−1/2): with the bits' noise, update and bits are one release of z (theorem 1)."""
        if not self.bit_noise:
            return self.noise_multiplier
        return 1 / math.sqrt(self.noise_multiplier**-2 - (2 * self.bit_noise) ** -2)

    def sigma(self, clipping_norm: float) -> float:
        """Return the standard deviation of the noise on each coordinate of the mean: z_Δ·C/n."""
        return self.update_noise_multiplier * clipping_norm / self.cohort_size

    def next_clipping_norm(self, clipping_norm: float, unclipped_share: float | None) -> float:
        """Return C·exp(−η(b̃ − γ)), the norm after a round with the noised share b̃ of unclipped updates."""
        if unclipped_share is None:
            return clipping_norm
        return clipping_norm * math.exp(-self.clipping_learning_rate * (unclipped_share - self.clipping_quantile))


_NODE_LISTS = ("nodes", "newcomers")


@dataclass(frozen=True)
class RoundEntry:
    """One round: its cohort, its C, whether it was released, and the noised share of unclipped updates, if taken.

    `newcomers` are the nodes that were first seen in this round and that the plan did not know, in its cohort or not.
    """

    server_round: int
    nodes: tuple[int, ...]
    clipping_norm: float
    released: bool = False
    unclipped_share: float | None = None
    newcomers: tuple[int, ...] = ()


@dataclass
class Ledger:
    """What a run has charged and released so far, and its cost for the node that took part most."""

    mechanism: Mechanism
    entries: list[RoundEntry] = field(default_factory=list)
    participations: Counter[int] = field(default_factory=Counter)

    def charge(self, server_round: int, nodes: Iterable[int], newcomers: Iterable[int] = ()) -> None:
        """Enter a round for its whole cohort, before anything is sent to it.

        Newcomers count from now on as the node that took part most before this round.

        Raises:
            LedgerError: the round is not the next one, the cohort is empty, too large, or names a node twice, or a
                newcomer is none.
        """
        cohort, new = tuple(nodes), tuple(newcomers)
        if server_round != len(self.entries) + 1:
            raise LedgerError(f"round {server_round} cannot be charged: the next round is {len(self.entries) + 1}")
        if not 1 <= len(set(cohort)) == len(cohort) <= self.mechanism.cohort_size:
            raise LedgerError(
                f"round {server_round} names {len(cohort)} nodes, {len(set(cohort))} of them distinct; a cohort is "
                f"1 to {self.mechanism.cohort_size} distinct nodes"
            )
        if len(set(new)) != len(new) or set(new) & set(self.participations):
            raise LedgerError(f"round {server_round} names a newcomer that took part before, or names one twice")
        self.entries.append(RoundEntry(server_round, cohort, self.clipping_norm, newcomers=new))
        self.participations.update(dict.fromkeys(new, self.most))
        self.participations.update(cohort)

    def settle(self, server_round: int, unclipped_share: float | None = None) -> None:
        """Mark the round that was charged last as released.

        Raises:
            LedgerError: as `pending`.
        """
        self.entries[-1] = replace(self.pending(server_round), released=True, unclipped_share=unclipped_share)

    def pending(self, server_round: int) -> RoundEntry:
        """Return the entry of the round that was charged last and is not yet released.

        Raises:
            LedgerError: `server_round` is not that round: it was never charged, or its release was made.
        """
        if not self.entries or self.entries[-1].server_round != server_round or self.entries[-1].released:
            raise LedgerError(f"round {server_round} cannot be released: it is not charged, or was released already")
        return self.entries[-1]

    @property
    def clipping_norm(self) -> float:
        """C of the next round."""
        if not self.entries:
            return self.mechanism.clipping_norm
        return self.mechanism.next_clipping_norm(self.entries[-1].clipping_norm, self.entries[-1].unclipped_share)

    @property
    def round_clipping_norm(self) -> float:
        """C of the round that was charged last; of the first, before any was."""
        return self.entries[-1].clipping_norm if self.entries else self.mechanism.clipping_norm

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise on each coordinate of the mean, in the round that was charged last."""
        return self.mechanism.sigma(self.round_clipping_norm)

    @property
    def released(self) -> int:
        """Releases made so far."""
        return sum(entry.released for entry in self.entries)

    @property
    def most(self) -> int:
        """Participations of the node that took part most: k."""
        return max(self.participations.values(), default=0)

    @property
    def epsilon(self) -> float:
        """ε at δ so far, for the node that took part most, under zero-out adjacency: sensitivity C."""
        return self.epsilon_of(self.most)

    @property
    def epsilon_replace_one(self) -> float:
        """The same under replace-one adjacency, one client's data replaced by other data: sensitivity 2C."""
        return gaussian_epsilon(self.mechanism.noise_multiplier / 2, self.most, self.mechanism.delta)

    def epsilon_of(self, participations: int) -> float:
        """Return the zero-out ε at δ of a node that took part this often."""
        return gaussian_epsilon(self.mechanism.noise_multiplier, participations, self.mechanism.delta)

    def epsilon_after(self, nodes: Iterable[int], newcomers: Iterable[int] = ()) -> float:
        """Return what `epsilon` would be after one more round of these nodes, some of which may be newcomers."""
        counts = self.participations | Counter(dict.fromkeys(newcomers, self.most))
        return self.epsilon_of(max([self.most, *(counts[node] + 1 for node in nodes)]))

    def to_dict(self) -> dict[str, Any]:
        """Return the whole state as JSON can hold it; node ids are texts, for JSON readers without 64-bit integers."""
        state: dict[str, Any] = {
            "mechanism": asdict(self.mechanism),
            "rounds": [
                {**asdict(entry), **{key: [str(node) for node in getattr(entry, key)] for key in _NODE_LISTS}}
                for entry in self.entries
            ],
            "participations": {str(node): count for node, count in sorted(self.participations.items())},
        }
        return {**state, "sha256": _checksum(state)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Return the ledger of a saved state, entered again round by round.

        Raises:
            LedgerError: the state is damaged or was edited: a round is missing or doubled, a clipping norm does not
                follow from the round before, the participations are not those of the rounds, or the checksum differs.
        """
        try:
            ledger = cls(Mechanism(**state["mechanism"]))
            for item in state["rounds"]:
                nodes = {key: tuple(int(node) for node in item[key]) for key in _NODE_LISTS}
                ledger._enter_again(RoundEntry(**{**item, **nodes}))
            counted = {int(node): count for node, count in state["participations"].items()}
            checksum = state["sha256"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LedgerError(f"the saved ledger cannot be read: {type(error).__name__}: {error}") from error
        if counted != ledger.participations:
            raise LedgerError("the saved ledger's participations are not those of its rounds")
        if checksum != ledger.to_dict()["sha256"]:
            raise LedgerError("the saved ledger does not have its checksum: it was damaged or edited")
        return ledger

    def _enter_again(self, entry: RoundEntry) -> None:
        self.charge(entry.server_round, entry.nodes, entry.newcomers)
        if self.entries[-1].clipping_norm != entry.clipping_norm:
            raise LedgerError(f"round {entry.server_round} of the saved ledger has another clipping norm than it must")
        self.entries[-1] = entry


def _checksum(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
