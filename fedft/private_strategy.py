"""`CohortFedAvg` wrapped in client-level differential privacy: the only join of Flower's strategies with the ledger."""

import logging
from collections.abc import Callable, Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM

from fedft.errors import NoFurtherRoundError
from fedft.privacy.ledger import Ledger
from fedft.privacy.mechanism import release
from fedft.strategy import CohortFedAvg

_log = logging.getLogger(__name__)


class ClientLevelDP(Strategy):
    """Client-level privacy with a fixed denominator: clients clip, and the server clips again, adds up and adds noise.

    Clients clip through Flower's `fixedclipping_mod`. Updates count with equal weights, the sum is divided by the
    planned cohort size whoever answers, and the noise is what the ledger accounts for.

    Args:
        strategy: draws the cohorts and checks the replies.
        ledger: charged with each round before its messages leave; holds the figures of the noise.
        max_epsilon: the zero-out ε that no round may exceed; 0 is no limit.
        write_ledger: puts the ledger on disk; called when a round is charged, before its messages are returned, and
            when its release is made, before anyone sees it.
    """

    def __init__(
        self,
        strategy: CohortFedAvg,
        ledger: Ledger,
        max_epsilon: float = 0.0,
        write_ledger: Callable[[], None] = lambda: None,
    ) -> None:
        self.strategy = strategy
        self.ledger = ledger
        self.max_epsilon = max_epsilon
        self.write_ledger = write_ledger

    def summary(self) -> None:
        """Log the mechanism."""
        _log.info("privacy: unit client, C=%g, z=%g", self.ledger.clipping_norm, self.ledger.mechanism.noise_multiplier)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the cohort's training messages, with the clipping norm for `fixedclipping_mod`; charge the cohort.

        Raises:
            NoFurtherRoundError: the round would exceed `max_epsilon`, or as the wrapped strategy.
            LedgerError: the round was charged before, or is not the next one.
        """
        config = ConfigRecord({**config, KEY_CLIPPING_NORM: self.ledger.clipping_norm, **self._announced()})
        messages = self.strategy.configure_train(server_round, arrays, config, grid)
        cohort, newcomers = self.strategy.cohort, self.strategy.newcomers
        if self.max_epsilon and self.ledger.epsilon_after(cohort, newcomers) > self.max_epsilon:
            raise NoFurtherRoundError(f"round {server_round} would exceed dp.max-epsilon={self.max_epsilon:g}")
        self.ledger.charge(server_round, cohort, newcomers)
        self.write_ledger()
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the sent adapter plus one noised mean update, cast to float32 last.

        Raises:
            RoundError: fewer usable replies than `min-replies`: nothing is released, the round stays charged.
        """
        usable = self.strategy.usable_replies(replies)
        mean = release(self.ledger, server_round, map(self.strategy.update_of, usable), self.strategy.shapes)
        self.write_ledger()
        return self.strategy.averaged({key: self.strategy.sent[key] + value for key, value in mean.items()})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the evaluation messages; they need no privacy beyond that of the adapter."""
        config = ConfigRecord({**config, **self._announced()})
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the held-out figures, which are not noised."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def _announced(self) -> dict[str, float | int]:
        """Return what a site computes the run's ε from, to hold it against its policy."""
        return {
            "noise-multiplier": self.ledger.mechanism.noise_multiplier,
            "most-participations": self.strategy.schedule.limit,
        }
