"""Privacy before the run: what a setting will cost, and which noise or how many rounds a budget allows.

**What the figures mean.** ε is that of the most-used client under the balanced cohort schedule: each of N nodes
takes part in at most k = ⌈T·n/N⌉ of T rounds of n clients. Nothing is claimed for not knowing who takes part. The noise
is that of `fedft.privacy.mechanism`: N(0, (zC/n)²) on each of d coordinates, so its expected norm is about zC√d/n, and
z√d/n says how many times longer it is than the longest update a client may send.

**Limits.** The advice is a rule of thumb: whether a model learns under noise depends on more than that ratio.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from fedft.errors import PlanError
from fedft.privacy.accounting import calibrate_noise, format_epsilon, gaussian_epsilon, verdict
from fedft.schedule import most_participations

MOST_ROUNDS = 1_000_000
"""The most rounds a plan may have, as in the run-config."""

_NOISE_TO_AIM_AT = 10.0
"""The noise norm over C above which advice is given; a rule of thumb, see the losses in docs/notebook.md."""

_WEAK = 8.0
"""The ε that is advised where a setting has more: the largest that `verdict` does not call weak."""

_FEW_NODES = 100
"""Fewer nodes than this, and the advice names the record as unit too; a rule of thumb."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run of client-level privacy, planned.

    Attributes:
        nodes: N, all nodes, >= 1.
        cohort: n, the clients of a round, >= 1 and <= N.
        rounds: T, >= 1.
        noise_multiplier: z, the noise's standard deviation over C before the division by n, >= 0.
        delta: δ, > 0 and < 1.
        clipping_norm: C, > 0.
        parameters: d, the coordinates that are trained and noised, >= 1.

    Raises:
        PlanError: a value is out of its range.
    """

    nodes: int
    cohort: int
    rounds: int
    noise_multiplier: float
    delta: float
    clipping_norm: float
    parameters: int

    def __post_init__(self) -> None:
        _check_counts(self.nodes, self.cohort, self.parameters)
        _check_rounds(self.rounds)
        _check(0 <= self.noise_multiplier < math.inf, "noise-multiplier", self.noise_multiplier, "be finite and >= 0")
        _check_delta(self.delta)
        _check(0 < self.clipping_norm < math.inf, "clipping-norm", self.clipping_norm, "be finite and > 0")

    @property
    def participations(self) -> int:
        """The rounds in which the most-used node takes part, k = ⌈T·n/N⌉."""
        return most_participations(self.rounds, self.cohort, self.nodes)

    @property
    def epsilon(self) -> float:
        """ε at δ under zero-out adjacency: all of one client's data replaced by nothing."""
        return gaussian_epsilon(self.noise_multiplier, self.participations, self.delta)

    @property
    def epsilon_replace_one(self) -> float:
        """ε at δ under replace-one adjacency, where an update may turn into its opposite: twice the sensitivity."""
        return gaussian_epsilon(self.noise_multiplier / 2, self.participations, self.delta)

    @property
    def sigma(self) -> float:
        """The noise's standard deviation on each coordinate of the mean, zC/n."""
        return self.noise_multiplier * self.clipping_norm / self.cohort

    @property
    def noise_over_clipping_norm(self) -> float:
        """The norm of one release's noise over C, z√d/n."""
        return self.noise_multiplier * math.sqrt(self.parameters) / self.cohort

    @property
    def verdict(self) -> str:
        """What ε is worth, in plain words."""
        return verdict(self.epsilon)

    @property
    def advice(self) -> list[str]:
        """What to change, most effective first; empty where neither ε nor noise calls for it."""
        return [*_protection_advice(self), *_noise_advice(self)]

    def as_dict(self) -> dict[str, Any]:
        """Return the plan and all that follows from it, for JSON; an infinite ε is None."""
        derived = {
            "participations": self.participations,
            "epsilon": _finite(self.epsilon),
            "epsilon_replace_one": _finite(self.epsilon_replace_one),
            "sigma": self.sigma,
            "noise_over_clipping_norm": self.noise_over_clipping_norm,
            "verdict": self.verdict,
            "advice": self.advice,
        }
        return {**asdict(self), **derived}


def make_plan(
    *,
    nodes: int,
    cohort: int,
    delta: float,
    clipping_norm: float,
    parameters: int,
    rounds: int | None = None,
    noise_multiplier: float | None = None,
    epsilon: float | None = None,
) -> Plan:
    """Return the plan that two of rounds, noise multiplier and ε determine; the third is worked out.

    The noise is the least of six significant figures for which ε is not passed, the rounds are the most.

    Raises:
        PlanError: a value is out of range, not exactly two of the three are given, or the budget allows no round.
    """
    given = {"rounds": rounds, "noise-multiplier": noise_multiplier, "epsilon": epsilon}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 2:
        raise PlanError(
            f"of rounds, noise-multiplier and epsilon exactly two must be given, but here it is {len(named)} "
            f"({', '.join(named) or 'none'}); the third is worked out"
        )
    _check_counts(nodes, cohort, parameters)
    _check_delta(delta)
    if epsilon is not None:
        _check(0 < epsilon < math.inf, "epsilon", epsilon, "be finite and > 0")
    if rounds is None and noise_multiplier is not None and epsilon is not None:
        rounds = _most_rounds(epsilon, noise_multiplier, delta, cohort, nodes)
    if rounds is not None:
        _check_rounds(rounds)
    if noise_multiplier is None and rounds is not None and epsilon is not None:
        noise_multiplier = _rounded_up(calibrate_noise(epsilon, most_participations(rounds, cohort, nodes), delta))
    return Plan(
        nodes=nodes,
        cohort=cohort,
        rounds=rounds or 0,
        noise_multiplier=noise_multiplier or 0.0,
        delta=delta,
        clipping_norm=clipping_norm,
        parameters=parameters,
    )


def epsilon_over_rounds(plan: Plan, cohort: int) -> list[float]:
    """Return ε after each round of the plan, were its cohort another; the noise multiplier stays."""
    counts = (most_participations(number, cohort, plan.nodes) for number in range(1, plan.rounds + 1))
    return [gaussian_epsilon(plan.noise_multiplier, count, plan.delta) for count in counts]


def _most_rounds(epsilon: float, noise_multiplier: float, delta: float, cohort: int, nodes: int) -> int:
    """Return the most rounds within the budget: k releases at z cost what one at z/√k does."""
    _check(0 < noise_multiplier < math.inf, "noise-multiplier", noise_multiplier, "be finite and > 0 for an epsilon")
    single = calibrate_noise(epsilon, 1, delta)
    count = min(int((noise_multiplier / single) ** 2), MOST_ROUNDS)
    if gaussian_epsilon(noise_multiplier, count, delta) > epsilon:
        count -= 1
    if not count >= 1:
        spent = format_epsilon(gaussian_epsilon(noise_multiplier, 1, delta))
        raise PlanError(
            f"epsilon={epsilon:g} allows not one round: a single one at noise-multiplier={noise_multiplier:g} costs "
            f"{spent}; give noise-multiplier >= {math.ceil(single * 1000) / 1000:g} or a larger epsilon"
        )
    return min(count * nodes // cohort, MOST_ROUNDS)


def _rounded_up(value: float) -> float:
    """Return the next number of six significant figures, so that what is printed can be used."""
    scale = 10.0 ** (5 - math.floor(math.log10(value)))
    return math.ceil(value * scale) / scale


def _protection_advice(plan: Plan) -> list[str]:
    if not plan.epsilon > _WEAK:
        return []
    needed = calibrate_noise(_WEAK, plan.participations, plan.delta)
    hopeless = "do not call this private: " if plan.verdict == verdict(math.inf) else ""
    return [f"{hopeless}ε {_WEAK:g} needs a noise multiplier of {needed:.3g} over {plan.participations} participations"]


def _noise_advice(plan: Plan) -> list[str]:
    """Advise on noise that drowns the updates: at this noise, or at the one that the protection asks for."""
    noise = plan.noise_multiplier
    if plan.epsilon > _WEAK:
        noise = calibrate_noise(_WEAK, plan.participations, plan.delta)
    ratio = noise * math.sqrt(plan.parameters) / plan.cohort
    if not ratio > _NOISE_TO_AIM_AT:
        return []
    per_round = math.ceil(noise * math.sqrt(plan.parameters) / _NOISE_TO_AIM_AT)
    fewer = int((_NOISE_TO_AIM_AT * plan.cohort / noise) ** 2)
    more_nodes = math.ceil(per_round * plan.nodes / plan.cohort)
    advice = [
        f"at a noise multiplier of {noise:.3g} the noise is {ratio:.3g} times as long as an update may be, and likely "
        f"to drown what is learned; aim at {_NOISE_TO_AIM_AT:g} times or less",
        f"train B alone (lora.aggregation='ffa') and lower lora.r: {fewer:,} parameters instead of {plan.parameters:,} "
        f"would bring {_NOISE_TO_AIM_AT:g} times",
        f"or take more clients a round: so would {per_round:,} a round of {more_nodes:,} nodes",
    ]
    if plan.nodes < _FEW_NODES:
        advice.append(
            f"{plan.nodes} nodes are few for a client-level guarantee: with many records at each, protect the record "
            "(DP-SGD inside each site), which fedft does not offer yet"
        )
    return advice


def _check_counts(nodes: int, cohort: int, parameters: int) -> None:
    _check(nodes >= 1, "nodes", nodes, "be >= 1")
    _check(1 <= cohort <= nodes, "cohort", cohort, f"be >= 1 and <= nodes={nodes}")
    _check(parameters >= 1, "parameters", parameters, "be >= 1")


def _check_rounds(rounds: int) -> None:
    _check(1 <= rounds <= MOST_ROUNDS, "rounds", rounds, f"be >= 1 and <= {MOST_ROUNDS}")


def _check_delta(delta: float) -> None:
    _check(0 < delta < 1, "delta", delta, "be > 0 and < 1; at most one over the number of nodes is usual")


def _check(holds: bool, name: str, value: float, must: str) -> None:
    if not holds:
        raise PlanError(f"{name}={value} is not allowed: it must {must}")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
