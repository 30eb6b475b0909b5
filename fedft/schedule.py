"""Who trains in a round: a balanced schedule in which no node takes part more often than was planned.

Over T rounds of n of N nodes, each node is in at most k = ⌈T·n/N⌉: a round takes those that took part least so far, and
never one that was in k already. Privacy that is accounted for k rounds instead of T rests on that, and on nothing
random: nobody need be kept from knowing who is in a round.
"""

from collections.abc import Mapping, Sequence

import numpy as np


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
