"""What a run claims: the (ε, δ) of its ledger, with all that it rests on and all that it leaves out."""

from collections import Counter
from typing import Any

from fedft.privacy.accounting import dp_accounting_epsilon, renyi_epsilon, verdict
from fedft.privacy.ledger import Ledger
from fedft.privacy.mechanism import GENERATOR

_MECHANISM = "Gaussian on the sum of clipped updates, divided by the planned cohort size whoever answers"
_ADAPTIVE = (
    "; the clipping norm follows a quantile of the updates' norms, whose bits are noised within the same release"
)
NOT_COVERED = (
    "losses, accuracies, example counts, error texts and who took part",
    "the server, which sees every clipped update before the noise and is trusted",
    "a site that is connected under two Flower node ids at once: it counts as two clients",
    "amplification by sampling: none is claimed",
    "floating-point arithmetic, beyond the four draws",
)


def certificate(ledger: Ledger, *, nodes: int, rounds: int, most_planned: int) -> dict[str, Any]:
    """Return the claim as `privacy.json` holds it, with the ledger's state.

    Args:
        ledger: the run's, at any moment; a round that is charged and not yet released counts as spent.
        nodes: N, connected when the run was planned.
        rounds: T, planned.
        most_planned: k, the most rounds the schedule lets any node take part in.
    """
    mechanism = ledger.mechanism
    histogram = Counter(count for count in ledger.participations.values() if count)
    return {
        "unit": "client",
        "adjacency": "zero-out: all of one client's data replaced by nothing",
        "mechanism": _MECHANISM + (_ADAPTIVE if mechanism.clipping_quantile else ""),
        "clipping_norm": ledger.round_clipping_norm,
        "noise_multiplier": mechanism.noise_multiplier,
        "update_noise_multiplier": mechanism.update_noise_multiplier,
        "bit_noise": mechanism.bit_noise,
        "cohort_size": mechanism.cohort_size,
        "nodes": nodes,
        "rounds_planned": rounds,
        "sigma": ledger.sigma,
        "releases": ledger.released,
        "participations_planned": most_planned,
        "participations": ledger.most,
        "participation_histogram": {str(count): histogram[count] for count in sorted(histogram)},
        "delta": mechanism.delta,
        "epsilon": ledger.epsilon,
        "epsilon_replace_one": ledger.epsilon_replace_one,
        "verdict": verdict(ledger.epsilon),
        "generator": GENERATOR,
        "not_covered": list(NOT_COVERED),
        "rounds": spent_by_round(ledger),
        "ledger": ledger.to_dict(),
    }


def second_opinion(ledger: Ledger) -> dict[str, float]:
    """Return the zero-out ε by dp-accounting: exactly, and by the Rényi account that most stacks print.

    Imports dp-accounting, which takes a second or two.
    """
    figures = (ledger.mechanism.noise_multiplier, ledger.most, ledger.mechanism.delta)
    return {"epsilon_dp_accounting": dp_accounting_epsilon(*figures), "epsilon_renyi": renyi_epsilon(*figures)}


def spent_by_round(ledger: Ledger) -> list[dict[str, Any]]:
    """Return a line a round: its cohort's size, its C, and what the node that took part most had spent after it."""
    counts: Counter[int] = Counter()
    most, lines = 0, []
    for entry in ledger.entries:
        counts.update(dict.fromkeys(entry.newcomers, most))
        counts.update(entry.nodes)
        most = max(most, *(counts[node] for node in entry.nodes))
        lines.append(
            {
                "round": entry.server_round,
                "cohort": len(entry.nodes),
                "clipping_norm": entry.clipping_norm,
                "released": entry.released,
                "participations": most,
                "epsilon": ledger.epsilon_of(most),
            }
        )
    return lines
