"""Flower strategies of a run: federated averaging over a cohort, and its wrapping in client-level privacy.

The only join of Flower's strategies with `fedft.privacy`. Both classes are Flower `Strategy` objects; `server_app.py`
calls their hooks round by round. Whatever a node answers is checked here before it counts: an error, a missing reply,
or an adapter that is misshapen or not finite is a failure with a reason, never an exception.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM
from numpy.typing import NDArray

from fedft.config import StrategySettings
from fedft.errors import AdapterError, FederationError
from fedft.evaluation import EvaluationSums
from fedft.model import Adapter, check_adapter
from fedft.privacy.mechanism import GaussianReleases
from fedft.records import arrays_from_record, record_from_arrays, record_size

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.5

_Read = TypeVar("_Read")
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class ClientReply:
    """A usable training reply."""

    adapter: Adapter
    examples: int
    loss: float


@dataclass
class RoundReport:
    """What happened in one round, for the log and `metrics.jsonl`; filled while the round runs."""

    cohort: int = 0
    replies: int = 0
    failures: list[str] = field(default_factory=list)
    train_loss: float = math.nan
    evaluation: EvaluationSums = field(default_factory=EvaluationSums)
    bytes_down: int = 0
    bytes_up: int = 0


class CohortFedAvg(FedAvg):
    """Federated averaging (McMahan et al., 2017, arXiv 1602.05629) over cohorts of one planned size.

    Adapters are averaged with the clients' numbers of examples as weights. A round with fewer usable replies than
    `strategy.min-replies` raises `FederationError`.
    """

    def __init__(self, settings: StrategySettings, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
        super().__init__(fraction_train=settings.fraction_train, min_available_nodes=settings.min_available_nodes)
        self.settings = settings
        self.shapes = shapes
        self.seed = seed
        self.cohort_size = 0
        self.report = RoundReport()
        self._sent: Adapter = {}
        self._awaited = 0

    def plan(self, grid: Grid) -> int:
        """Wait for the nodes and fix the cohort size, `fraction-train` of those connected; return how many they are.

        Raises:
            FederationError: fewer than `min-available-nodes` within `node-timeout`.
        """
        nodes = self._wait_for(grid, self.settings.min_available_nodes, "strategy.min-available-nodes")
        self.cohort_size = max(1, round(self.settings.fraction_train * len(nodes)))
        if self.settings.min_replies > self.cohort_size:
            raise FederationError(
                f"strategy.min-replies={self.settings.min_replies} is larger than the cohort of {self.cohort_size} "
                f"(strategy.fraction-train={self.settings.fraction_train:g} of {len(nodes)} nodes)"
            )
        return len(nodes)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the training messages of a round's cohort; starts a new `report`.

        `fixedclipping_mod` needs a clipping norm in every one: infinity, unless the configuration holds another.
        """
        config = ConfigRecord({KEY_CLIPPING_NORM: math.inf, **config})
        self.report = RoundReport()
        self._sent = arrays_from_record(arrays)
        nodes = self._wait_for(grid, self.settings.min_replies, "strategy.min-replies")
        chosen = _draw(nodes, self.cohort_size, [self.seed, 0xC, server_round])
        self.report.cohort = len(chosen)
        return self._messages(server_round, arrays, config, chosen, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the average of the usable adapters, weighted by examples.

        Raises:
            FederationError: fewer usable replies than `min-replies`.
        """
        usable = self.usable_replies(replies)
        weight = sum(reply.examples for reply in usable)
        mean = {key: np.zeros(shape) for key, shape in self.shapes.items()}
        for reply in usable:
            for key, value in reply.adapter.items():
                mean[key] += value * (reply.examples / weight)
        return record_from_arrays(mean), MetricRecord({"train_loss": self.report.train_loss})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the evaluation messages to `fraction-evaluate` of the nodes."""
        nodes = list(grid.get_node_ids())
        count = math.ceil(self.settings.fraction_evaluate * len(nodes))
        chosen = _draw(nodes, count, [self.seed, 0xE, server_round])
        return self._messages(server_round, arrays, config, chosen, MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return loss and accuracy over all nodes' held-out examples, and keep their sums in `report`."""
        sums = self._collect(replies, _read_evaluation, "evaluation: ")
        total = sum(sums, start=EvaluationSums())
        self.report.evaluation = total
        return MetricRecord({"eval_loss": total.loss}) if total.tokens else None

    def usable_replies(self, replies: Iterable[Message]) -> list[ClientReply]:
        """Return the replies that hold a usable adapter, and enter all others in `report` as failures.

        Their order is that of their content, so that a sum over them does not depend on who was faster.

        Raises:
            FederationError: they are fewer than `min-replies`.
        """
        usable = self._collect(replies, self._read_training, "")
        usable.sort(key=lambda reply: (reply.examples, reply.loss))
        self.report.replies = len(usable)
        if usable:
            examples = sum(reply.examples for reply in usable)
            self.report.train_loss = sum(reply.loss * reply.examples for reply in usable) / examples
        if len(usable) < self.settings.min_replies:
            raise FederationError(
                f"only {len(usable)} of {self.report.cohort} clients sent a usable update, strategy.min-replies="
                f"{self.settings.min_replies}; the first failure: {self.report.failures[0]}"
            )
        return usable

    def update_of(self, reply: ClientReply) -> dict[str, NDArray[np.float64]]:
        """Return a reply's adapter less the one that was sent, in float64."""
        return {key: reply.adapter[key].astype(np.float64) - self._sent[key] for key in self.shapes}

    @property
    def sent(self) -> Adapter:
        """The adapter that this round's cohort was sent."""
        return self._sent

    def _wait_for(self, grid: Grid, count: int, key: str) -> list[int]:
        deadline = time.monotonic() + self.settings.node_timeout
        nodes = list(grid.get_node_ids())
        if len(nodes) < count:
            _log.info("waiting up to %gs for %d nodes; %d connected", self.settings.node_timeout, count, len(nodes))
        while len(nodes) < count:
            if time.monotonic() > deadline:
                raise FederationError(
                    f"{len(nodes)} nodes are connected after strategy.node-timeout={self.settings.node_timeout:g}s, "
                    f"but {key}={count}; start more SuperNodes or lower that key"
                )
            time.sleep(_POLL_SECONDS)
            nodes = list(grid.get_node_ids())
        return nodes

    def _messages(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, nodes: list[int], kind: str
    ) -> list[Message]:
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({**config, "server-round": server_round})})
        self.report.bytes_down += record_size(arrays) * len(nodes)
        self._awaited = len(nodes)
        return list(self._construct_messages(content, nodes, kind))

    def _collect(self, replies: Iterable[Message], read: Callable[[Message], _Read], what: str) -> list[_Read]:
        """Return what `read` makes of the replies; errors and missing replies become failures of the report."""
        results = []
        for message in replies:
            self._awaited -= 1
            try:
                if message.has_error():
                    raise ValueError(_reason(message))
                results.append(read(message))
            except (AdapterError, ValueError) as error:
                self.report.failures.append(f"{what}node {message.metadata.src_node_id}: {error}")
        self.report.failures += [f"{what}no reply within strategy.round-timeout"] * self._awaited
        return results

    def _read_training(self, message: Message) -> ClientReply:
        arrays = _only(message.content.array_records, "ArrayRecord")
        metrics = _only(message.content.metric_records, "MetricRecord")
        self.report.bytes_up += record_size(arrays)
        examples, loss = metrics.get("num-examples"), metrics.get("train_loss")
        if not isinstance(examples, int) or examples < 1:
            raise ValueError(f"num-examples={examples!r} is not a whole number >= 1")
        if not isinstance(loss, float) or not math.isfinite(loss):
            raise ValueError(f"train_loss={loss!r} is not a finite number")
        adapter = arrays_from_record(arrays)
        check_adapter(adapter, self.shapes)
        return ClientReply(adapter, examples, loss)


class ClientLevelDP(Strategy):
    """`CohortFedAvg` wrapped in client-level differential privacy with fixed clipping and a fixed denominator.

    Clients clip through Flower's `fixedclipping_mod`; the server clips again, adds the updates up with equal weights,
    divides by the planned cohort size and adds noise, as `fedft.privacy` states and counts it.
    """

    def __init__(self, strategy: CohortFedAvg, releases: GaussianReleases) -> None:
        self.strategy = strategy
        self.releases = releases

    def summary(self) -> None:
        """Log the mechanism."""
        _log.info("privacy: unit client, C=%g, z=%g", self.releases.clipping_norm, self.releases.noise_multiplier)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the cohort's training messages, with the clipping norm for `fixedclipping_mod`."""
        with_clipping = ConfigRecord({**config, KEY_CLIPPING_NORM: self.releases.clipping_norm})
        return self.strategy.configure_train(server_round, arrays, with_clipping, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the sent adapter plus one noised mean update, cast to float32 last.

        Raises:
            FederationError: fewer usable replies than `min-replies`; then nothing is released.
        """
        usable = self.strategy.usable_replies(replies)
        mean = self.releases.release(map(self.strategy.update_of, usable), self.strategy.shapes)
        adapter = {key: self.strategy.sent[key] + value for key, value in mean.items()}
        return record_from_arrays(adapter), MetricRecord({"train_loss": self.strategy.report.train_loss})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the evaluation messages; they need no privacy beyond that of the adapter."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the held-out figures, which are not noised."""
        return self.strategy.aggregate_evaluate(server_round, replies)


def _draw(nodes: Sequence[int], count: int, seed: list[int]) -> list[int]:
    order = np.random.default_rng(seed).permutation(len(nodes))[:count]
    ordered = sorted(nodes)
    return sorted(ordered[index] for index in order)


def _read_evaluation(message: Message) -> EvaluationSums:
    return EvaluationSums.from_metrics(dict(_only(message.content.metric_records, "MetricRecord")))  # type: ignore[arg-type]


def _reason(message: Message) -> str:
    """Return the last line of an error reply: the message of the exception, where it holds a traceback."""
    lines = (message.error.reason or "").strip().splitlines()
    return lines[-1] if lines else f"error code {message.error.code}"


def _only(records: Mapping[str, _Record], kind: str) -> _Record:
    if len(records) != 1:
        raise ValueError(f"the reply holds {len(records)} {kind}s instead of one")
    return next(iter(records.values()))
