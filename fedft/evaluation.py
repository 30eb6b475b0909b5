"""Held-out scores as sums that add up over nodes, and the figures and intervals they give.

A node sends sums, not averages, so the server's figures are those of the pooled examples whatever the nodes' sizes. The
sums are not noised: they are outside every privacy claim.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Self

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class EvaluationSums:
    """Sums over scored examples; `nll` is an example's negative log-likelihood in nats, `tokens` its completion's."""

    examples: int = 0
    nll: float = 0.0
    tokens: int = 0
    nll_squared: float = 0.0
    tokens_squared: float = 0.0
    nll_tokens: float = 0.0
    choices: int = 0
    """Multiple-choice examples."""
    correct: int = 0
    """Those of them whose right option has the highest log-likelihood per token."""

    @classmethod
    def of(cls, nll: float, tokens: int, correct: bool | None) -> Self:
        """Return one example's sums; `correct` is None where it has no options."""
        return cls(
            examples=1,
            nll=nll,
            tokens=tokens,
            nll_squared=nll * nll,
            tokens_squared=float(tokens * tokens),
            nll_tokens=nll * tokens,
            choices=int(correct is not None),
            correct=int(bool(correct)),
        )

    def __add__(self, other: Self) -> Self:
        return type(self)(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def as_metrics(self) -> dict[str, int | float]:
        """Return the sums under their names, as a node's reply carries them."""
        return asdict(self)

    @classmethod
    def from_metrics(cls, metrics: dict[str, int | float]) -> Self:
        """Return the sums of a node's reply.

        Raises:
            ValueError: a sum is missing, of the wrong type, negative or not finite, or the counts contradict.
        """
        values: dict[str, int | float] = {}
        for item in fields(cls):
            value = metrics.get(item.name)
            if item.type is int and not isinstance(value, int):
                raise ValueError(f"evaluation metric {item.name}={value!r} is not a whole number")
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"evaluation metric {item.name}={value!r} is not a finite number >= 0")
            values[item.name] = value
        sums = cls(**values)  # type: ignore[arg-type]
        if not sums.correct <= sums.choices <= sums.examples <= sums.tokens:
            raise ValueError("evaluation metrics contradict each other: correct <= choices <= examples <= tokens")
        return sums

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per completion token, in nats; NaN without examples."""
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def loss_margin(self) -> float:
        """Half the width of the 95% interval of `loss`: the ratio estimator's (Cochran, Sampling Techniques, 6.4)."""
        if self.examples < 2 or not self.tokens:
            return math.nan
        residuals = self.nll_squared - 2 * self.loss * self.nll_tokens + self.loss**2 * self.tokens_squared
        variance = max(0.0, residuals) / (self.examples - 1) * self.examples
        return _Z95 * math.sqrt(variance) / self.tokens

    @property
    def accuracy(self) -> float:
        """Share of the multiple-choice examples answered right; NaN without any."""
        return self.correct / self.choices if self.choices else math.nan

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of `accuracy` (Wilson, 1927); (NaN, NaN) without any."""
        if not self.choices:
            return math.nan, math.nan
        n, share, z2 = self.choices, self.accuracy, _Z95**2
        centre = (share + z2 / (2 * n)) / (1 + z2 / n)
        margin = _Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        return max(0.0, centre - margin), min(1.0, centre + margin)
