"""The Flower strategy of a run: federated averaging of LoRA factors over a balanced schedule of cohorts.

`server_app.py` calls its hooks round by round, and hands it the whole global adapter each time. What travels is what a
node cannot derive: the factors that train in the round as arrays, in both directions, and downwards the frozen ones
that have changed since the run's first adapter, packed into the one `ConfigRecord`. Whatever a node answers is checked
here before it counts: an error, a missing or second reply, or an update that is misshapen or not finite is a failure
with a reason, never an exception.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM
from numpy.typing import NDArray

from fedft import nodes as federation
from fedft.adapter import Adapter, adapter_digest, check_adapter
from fedft.aggregation import after_average, trained_keys
from fedft.config import StrategySettings
from fedft.errors import AdapterError, FederationError, NoFurtherRoundError, RoundError
from fedft.evaluation import EvaluationSums
from fedft.records import arrays_from_record, bytes_from_arrays, record_from_arrays, record_size
from fedft.replies import ClientReply, read_evaluation, read_training, weights
from fedft.schedule import Schedule, draw, eligible

_Read = TypeVar("_Read")


@dataclass
class RoundReport:
    """What happened in one round, for the log and `metrics.jsonl`; filled while the round runs."""

    cohort: int = 0
    replies: int = 0
    failed: str = ""
    """Why the round changed nothing; empty where it did."""
    failures: list[str] = field(default_factory=list)
    not_shared: int = 0
    """Usable training replies without figures, and evaluations that a site's policy does not share."""
    train_loss: float = math.nan
    evaluation: EvaluationSums = field(default_factory=EvaluationSums)
    bytes_down: int = 0
    bytes_up: int = 0


class CohortFedAvg(FedAvg):
    """Federated averaging (McMahan et al., 2017, arXiv 1602.05629) over cohorts of one planned size.

    Adapters are averaged with the clients' numbers of examples as weights; one that does not share its number counts as
    the average of those that do. A round with fewer usable replies than `strategy.min-replies` raises `RoundError`.

    Args:
        settings: who takes part, and how long to wait.
        aggregation: `lora.aggregation`.
        first: the run's first adapter, which every node derives from the seed.
        seed: the run's; decides the cohorts.
    """

    def __init__(self, settings: StrategySettings, aggregation: str, first: Adapter, seed: int) -> None:
        super().__init__(fraction_train=settings.fraction_train, min_available_nodes=settings.min_available_nodes)
        self.settings = settings
        self.aggregation = aggregation
        self.seed = seed
        self.schedule = Schedule()
        self.cohort: list[int] = []
        self.newcomers: list[int] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.report = RoundReport()
        self._first = first
        self._first_digest = adapter_digest(first)
        self._sent: Adapter = {}
        self._awaited = 0
        self._unanswered: set[int] = set()
        self._planned: dict[int, int] = {}

    def plan(self, grid: Grid, rounds: int) -> None:
        """Wait for the nodes and plan the cohorts.

        The cohort size is `fraction-train` of the nodes connected; with the rounds it decides how often each node may
        take part, see `schedule`.

        Raises:
            FederationError: fewer than `min-available-nodes` within `node-timeout`.
        """
        nodes = self._enough_nodes(grid, self.settings.min_available_nodes)
        size = self.settings.cohort_size(len(nodes))
        simulated = federation.are_simulated(nodes)
        self.schedule = Schedule(federation.ids(nodes), size, simulated=simulated).replanned(rounds)
        self._check_replies()

    def plan_on(self, grid: Grid, schedule: Schedule) -> None:
        """Wait for the nodes and go on with the schedule of an earlier run.

        Nodes are recognised by their ids. A simulation makes new ones for the same partitions of the data: its nodes
        are recognised by the order in which they registered, and the schedule keeps the ids it was planned with.

        Raises:
            FederationError: as `plan`, or a simulation does not have the nodes that it had.
        """
        self.schedule = schedule
        self._check_replies()
        count = len(schedule.nodes) if schedule.simulated else 0
        nodes = self._enough_nodes(grid, max(count, self.settings.min_available_nodes))
        if not schedule.simulated:
            return
        if len(nodes) != count or not federation.are_simulated(nodes):
            raise FederationError(
                f"the run is a simulation of {count} nodes and finds {len(nodes)} that are not those; continue it with "
                f'--federation-config "num-supernodes={count}"'
            )
        self._planned = dict(zip(federation.ids(nodes), schedule.nodes, strict=True))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the training messages of a round's cohort; starts a new `report`.

        `fixedclipping_mod` needs a clipping norm in every one: infinity, unless the configuration holds another.

        Raises:
            NoFurtherRoundError: fewer than `min-replies` nodes may still take part, after `node-timeout`.
        """
        self.report = RoundReport()
        self._sent = arrays_from_record(arrays)
        cohort = self._next_cohort(server_round, grid)
        self.report.cohort = len(cohort)
        self._unanswered = set(cohort)
        trained = trained_keys(self.aggregation, server_round, self._sent)
        self.shapes = {key: self._sent[key].shape for key in trained}
        changed = self._changed(self._sent)
        frozen = bytes_from_arrays({key: changed[key] for key in changed if key not in self.shapes})
        config = ConfigRecord({KEY_CLIPPING_NORM: math.inf, **config, "frozen-arrays": frozen})
        return self._messages(
            server_round, {key: self._sent[key] for key in trained}, config, cohort, MessageType.TRAIN
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the average of the usable adapters, weighted by examples.

        Raises:
            RoundError: fewer usable replies than `min-replies`.
        """
        usable = self.usable_replies(replies)
        mean = {key: np.zeros(shape) for key, shape in self.shapes.items()}
        for reply, weight in zip(usable, weights([reply.examples for reply in usable]), strict=True):
            for key, value in reply.adapter.items():
                mean[key] += value * weight
        return self.averaged(mean)

    def averaged(self, arrays: Mapping[str, NDArray[np.float64]]) -> tuple[ArrayRecord, MetricRecord]:
        """Return the whole global adapter after a round, given its trained arrays, with the round's training loss."""
        trained = {key: value.astype(np.float32) for key, value in arrays.items()}
        adapter = after_average(self.aggregation, {**self._sent, **trained})
        return record_from_arrays(adapter), MetricRecord({"train_loss": self.report.train_loss})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the evaluation messages to `fraction-evaluate` of the nodes, the same ones in every round."""
        nodes = federation.ids(federation.connected(grid))
        count = math.ceil(self.settings.fraction_evaluate * len(nodes))
        chosen = draw(nodes, count, {}, np.random.default_rng([self.seed, 0xE]))
        config = ConfigRecord({**config, "frozen-arrays": b""})
        changed = self._changed(arrays_from_record(arrays))
        return self._messages(server_round, changed, config, chosen, MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return loss and accuracy over all nodes' held-out examples, and keep their sums in `report`."""
        read = self._collect(replies, read_evaluation, "evaluation: ")
        shared = [sums for sums in read if sums is not None]
        self.report.not_shared += len(read) - len(shared)
        total = sum(shared, start=EvaluationSums())
        self.report.evaluation = total
        return MetricRecord({"eval_loss": total.loss}) if total.tokens else None

    def usable_replies(self, replies: Iterable[Message]) -> list[ClientReply]:
        """Return the replies that hold a usable adapter, and enter all others in `report` as failures.

        Their order is that of their content, so that a sum over them does not depend on who was faster.

        Raises:
            RoundError: they are fewer than `min-replies`.
        """
        usable = self._collect(replies, self._read_training, "")
        usable.sort(key=lambda reply: reply.order)
        self.report.replies = len(usable)
        shared = [(reply.examples, reply.loss) for reply in usable if reply.examples and reply.loss is not None]
        self.report.not_shared += len(usable) - len(shared)
        if shared:
            examples = sum(count for count, _ in shared)
            self.report.train_loss = sum(loss * count for count, loss in shared) / examples
        if len(usable) < self.settings.min_replies:
            raise RoundError(
                f"only {len(usable)} of {self.report.cohort} clients sent a usable update, strategy.min-replies="
                f"{self.settings.min_replies}; the first failure: {self.report.failures[0]}"
            )
        return usable

    def update_of(self, reply: ClientReply) -> dict[str, NDArray[np.float64]]:
        """Return a reply's adapter less the one that was sent, in float64."""
        return {key: reply.adapter[key].astype(np.float64) - self._sent[key] for key in self.shapes}

    @property
    def sent(self) -> Adapter:
        """The whole adapter that this round's cohort started from."""
        return self._sent

    def _check_replies(self) -> None:
        size, nodes = self.schedule.cohort_size, len(self.schedule.nodes)
        if self.settings.min_replies > size:
            raise FederationError(
                f"strategy.min-replies={self.settings.min_replies} is larger than the cohort of {size} "
                f"(strategy.fraction-train={self.settings.fraction_train:g} of {nodes} nodes)"
            )

    def _enough_nodes(self, grid: Grid, wanted: int) -> list[NodeInfo]:
        timeout = self.settings.node_timeout
        nodes = federation.wait_for(grid, wanted, timeout)
        if len(nodes) < wanted:
            raise FederationError(
                f"{len(nodes)} nodes are connected after strategy.node-timeout={timeout:g}s, but {wanted} are needed "
                f"(strategy.min-available-nodes={self.settings.min_available_nodes}); start more SuperNodes or lower "
                "that key"
            )
        return nodes

    def _next_cohort(self, server_round: int, grid: Grid) -> list[int]:
        """Return the ids of a round's cohort, and enter it into the schedule."""
        schedule, wanted = self.schedule, self.settings.min_replies
        self.newcomers = []
        nodes = federation.wait_for(grid, wanted, self.settings.node_timeout, self._eligible)
        if len(nodes) < wanted:
            raise NoFurtherRoundError(
                f"round {server_round} finds {len(nodes)} nodes that were in fewer than {schedule.limit} "
                f"rounds, the most that was planned, and strategy.min-replies={wanted}"
            )
        rng = np.random.default_rng([self.seed, 0xC, server_round])
        live = {self._id_in_plan(node): node.node_id for node in nodes}
        self.cohort = draw(list(live), schedule.cohort_size, schedule.participations, rng)
        schedule.participations.update(self.cohort)
        return [live[node] for node in self.cohort]

    def _eligible(self, nodes: list[NodeInfo]) -> list[NodeInfo]:
        planned = [self._id_in_plan(node) for node in nodes]
        self.newcomers += self.schedule.admit(planned)
        able = set(eligible(planned, self.schedule.participations, self.schedule.limit))
        return [node for node, known in zip(nodes, planned, strict=True) if known in able]

    def _id_in_plan(self, node: NodeInfo) -> int:
        return self._planned.get(node.node_id, node.node_id)

    def _changed(self, adapter: Adapter) -> Adapter:
        """Return the arrays that no node can derive from the seed."""
        return {key: value for key, value in adapter.items() if not np.array_equal(value, self._first[key])}

    def _messages(
        self, server_round: int, adapter: Adapter, config: ConfigRecord, nodes: list[int], kind: str
    ) -> list[Message]:
        arrays = record_from_arrays(adapter)
        config = ConfigRecord({**config, "first-adapter": self._first_digest, "server-round": server_round})
        content = RecordDict({"arrays": arrays, "config": config})
        self.report.bytes_down += record_size(arrays, config) * len(nodes)
        self._awaited = len(nodes)
        return list(self._construct_messages(content, nodes, kind))

    def _collect(self, replies: Iterable[Message], read: Callable[[Message], _Read], what: str) -> list[_Read]:
        """Return what `read` makes of the replies; errors and missing replies become failures of the report."""
        results = []
        for message in replies:
            self._awaited -= 1
            try:
                results.append(read(message))
            except (AdapterError, ValueError) as error:
                self.report.failures.append(f"{what}node {message.metadata.src_node_id}: {error}")
        self.report.failures += [f"{what}no reply within strategy.round-timeout"] * self._awaited
        return results

    def _read_training(self, message: Message) -> ClientReply:
        reply = read_training(message)
        self.report.bytes_up += reply.size
        check_adapter(reply.adapter, self.shapes)
        if message.metadata.src_node_id not in self._unanswered:
            raise ValueError("it was not asked, or has answered already")  # one client counts once, whatever arrives
        self._unanswered.discard(message.metadata.src_node_id)
        return reply
