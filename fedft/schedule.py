"""Who trains in a round: a balanced schedule in which no node takes part more often than was planned.

Over T rounds of n of N nodes, each node is in at most k = ⌈T·n/N⌉: a round takes those that took part least so far, and
never one that was in k already. Privacy that is accounted for k rounds instead of T rests on that, and on nothing
random: nobody need be kept from knowing who is in a round.

A node that the plan did not know may be one that was in the run before and came back under another id. When it is first
seen it therefore counts as often as the node that took part most.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from fedft.config import Settings


def most_participations(rounds: int, cohort_size: int, nodes: int) -> int:
    """Return k = ⌈T·n/N⌉, the most rounds that any node takes part in."""
    return -(-rounds * cohort_size // nodes)


def eligible(nodes: Sequence[int], participations: Mapping[int, int], limit: int) -> list[int]:
    """Return the nodes that took part in fewer than `limit` rounds, in the order given."""
    return [node for node in nodes if participations.get(node, 0) < limit]


def draw(nodes: Sequence[int], size: int, participations: Mapping[int, int], rng: np.random.Generator) -> list[int]:
    """Return `size` nodes, or all where they are fewer: those with the fewest participations, ties in random order.

    The draw depends on a node's place in `nodes`, not on its id; the cohort is returned in that order.
    """
    shuffled = rng.permutation(len(nodes)).tolist()
    shuffled.sort(key=lambda place: participations.get(nodes[place], 0))
    return [nodes[place] for place in sorted(shuffled[:size])]


def learning_rate(settings: Settings, server_round: int) -> float:
    """Return a round's learning rate: a half cosine from the maximum in round 1 towards the minimum after the last."""
    low, high = settings.train.learning_rate_min, settings.train.learning_rate_max
    progress = (server_round - 1) / settings.num_server_rounds
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


@dataclass
class Schedule:
    """The plan of a run's cohorts and how far it has come.

    Attributes:
        nodes: the N nodes of the plan, in the order in which they registered.
        cohort_size: n, the planned clients a round.
        limit: k, the most rounds that any node takes part in.
        simulated: the nodes are those of a simulation, where a place in `nodes` is a partition of the data.
        participations: the rounds each node was in, or counts as having been in.
    """

    nodes: list[int] = field(default_factory=list)
    cohort_size: int = 0
    limit: int = 0
    simulated: bool = False
    participations: Counter[int] = field(default_factory=Counter)

    def replanned(self, rounds: int) -> Self:
        """Return this schedule with the limit of another number of rounds."""
        return replace(self, limit=most_participations(rounds, self.cohort_size, len(self.nodes)))

    def admit(self, nodes: Iterable[int]) -> list[int]:
        """Return those of these nodes that were never seen, and count them as the node that took part most."""
        known = {*self.nodes, *self.participations}
        newcomers = [node for node in nodes if node not in known]
        self.participations.update(dict.fromkeys(newcomers, max(self.participations.values(), default=0)))
        return newcomers

    def to_dict(self) -> dict[str, Any]:
        """Return the whole state as JSON can hold it; node ids are texts, for JSON readers without 64-bit integers."""
        return {
            "nodes": [str(node) for node in self.nodes],
            "cohort_size": self.cohort_size,
            "limit": self.limit,
            "simulated": self.simulated,
            "participations": {str(node): count for node, count in self.participations.items()},
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Return the schedule of a saved state.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: the state is damaged.
        """
        counts = {int(node): int(count) for node, count in state["participations"].items()}
        nodes = [int(node) for node in state["nodes"]]
        if not nodes or not 1 <= int(state["cohort_size"]) <= len(nodes) or int(state["limit"]) < 1:
            raise ValueError("the schedule is empty or its cohort larger than its nodes")
        return cls(nodes, int(state["cohort_size"]), int(state["limit"]), bool(state["simulated"]), Counter(counts))
