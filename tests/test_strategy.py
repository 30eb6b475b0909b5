"""Toy clients with numbers worked out by hand, through real Flower messages."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from conftest import make_settings
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import fixedclipping_mod
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity

from fedft.errors import FederationError
from fedft.evaluation import EvaluationSums
from fedft.privacy.ledger import Ledger, Mechanism
from fedft.private_strategy import ClientLevelDP
from fedft.records import arrays_from_record, record_from_arrays
from fedft.strategy import CohortFedAvg

A, B = "x.lora_A.weight", "x.lora_B.weight"
START = {A: np.array([[1, 1]], np.float32), B: np.array([[1], [1]], np.float32)}


def inside_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower makes messages only inside a task of a run."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


_fixture = pytest.fixture(autouse=True)(inside_a_run)


class Nodes:
    """A grid that only knows who is connected, in the order in which they registered."""

    def __init__(self, count: int, ids: list[int] | None = None) -> None:
        self.ids = ids or [2**63 - 2 + index for index in range(count)]  # on both sides of the largest int64

    def get_nodes(self) -> Iterable[NodeInfo]:
        times = [f"2026-01-01T00:00:{index // 1000:02}.{index % 1000:03}000+00:00" for index in range(len(self.ids))]
        return [NodeInfo(node_id=node, registered_at=at) for node, at in zip(self.ids, times, strict=True)][::-1]


def averaging(aggregation: str = "lora", **changes: Any) -> CohortFedAvg:
    settings = make_settings(**{f"strategy__{key}": value for key, value in changes.items()})
    return CohortFedAvg(settings.strategy, aggregation, START, seed=0)


def ask(strategy: CohortFedAvg | ClientLevelDP, nodes: Nodes, server_round: int = 1, rounds: int = 10) -> list[Message]:
    inner = strategy.strategy if isinstance(strategy, ClientLevelDP) else strategy
    inner.plan(nodes, rounds)  # type: ignore[arg-type]
    return list(strategy.configure_train(server_round, record_from_arrays(START), ConfigRecord(), nodes))  # type: ignore[arg-type]


def moved(*values: float) -> dict[str, np.ndarray]:
    """The start plus an update."""
    return {
        A: START[A] + np.array([values[:2]], np.float32),
        B: START[B] + np.array([[value] for value in values[2:]], np.float32),
    }


def reply(message: Message, adapter: dict[str, np.ndarray], examples: Any = 10, loss: Any = 2.0) -> Message:
    metrics = MetricRecord({"num-examples": examples, "train_loss": loss})
    record = ArrayRecord({key: Array(value) for key, value in adapter.items()})
    return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)


def unshared(message: Message, adapter: dict[str, np.ndarray]) -> Message:
    answer = reply(message, adapter)
    answer.content.metric_records["metrics"] = MetricRecord({"not-shared": 1})
    return answer


def result(outcome: tuple[ArrayRecord | None, Any]) -> dict[str, np.ndarray]:
    assert outcome[0] is not None
    return arrays_from_record(outcome[0])


def private(n: int = 4, z: float = 0.0, c: float = 5.0, **changes: Any) -> ClientLevelDP:
    return ClientLevelDP(averaging(**changes), Ledger(Mechanism(c, z, n, 1e-5)))


def test_cohort_is_the_asked_share_and_changes_with_the_round() -> None:
    strategy = averaging(fraction_train=0.2, min_available_nodes=20)
    nodes = Nodes(20)
    cohorts = [[message.metadata.dst_node_id for message in ask(strategy, nodes, number)] for number in range(1, 6)]
    assert {len(set(cohort)) for cohort in cohorts} == {4}
    assert all(set(cohort) <= set(nodes.ids) for cohort in cohorts)
    assert len({tuple(cohort) for cohort in cohorts}) > 1


def test_waiting_for_nodes_ends_with_key_value_and_remedy() -> None:
    with pytest.raises(FederationError, match=r"1 nodes are connected.*node-timeout=0\.01.*but 2 are needed"):
        averaging(node_timeout=0.01).plan(Nodes(1), 1)  # type: ignore[arg-type]


def test_min_replies_beyond_the_cohort_is_refused_before_training() -> None:
    with pytest.raises(FederationError, match="larger than the cohort of 1"):
        averaging(fraction_train=0.1, min_available_nodes=4, min_replies=2).plan(Nodes(4), 1)  # type: ignore[arg-type]


def test_plain_averaging_weights_by_examples() -> None:
    strategy = averaging()
    first, second = ask(strategy, Nodes(2))
    replies = [reply(first, moved(4, 0, 0, 0), 30, 3.0), reply(second, moved(0, 8, 0, 0), 10, 1.0)]
    mean = result(strategy.aggregate_train(1, replies))
    np.testing.assert_allclose(mean[A], [[1 + 3, 1 + 2]])
    np.testing.assert_allclose(mean[B], [[1], [1]])
    assert strategy.report.train_loss == 2.5
    assert (strategy.report.replies, strategy.report.failures) == (2, [])


def test_reply_without_figures_counts_as_the_average_of_those_with() -> None:
    strategy = averaging(min_available_nodes=3)
    first, second, third = ask(strategy, Nodes(3))
    replies = [
        reply(first, moved(4, 0, 0, 0), 30, 3.0),
        reply(second, moved(0, 8, 0, 0), 10, 1.0),
        unshared(third, moved(0, 0, 6, 0)),
    ]
    mean = result(strategy.aggregate_train(1, replies))
    np.testing.assert_allclose(mean[A], [[1 + 4 * 30 / 60, 1 + 8 * 10 / 60]], rtol=1e-6)
    np.testing.assert_allclose(mean[B], [[1 + 6 * 20 / 60], [1]], rtol=1e-6)
    report = strategy.report
    assert (report.train_loss, report.replies, report.not_shared, report.failures) == (2.5, 3, 1, [])


@pytest.mark.parametrize("unit", ["none", "client"])
def test_round_in_which_nobody_shares_figures_is_a_round(unit: str) -> None:
    strategy = private(n=2) if unit == "client" else averaging()
    inner = strategy.strategy if isinstance(strategy, ClientLevelDP) else strategy
    messages = ask(strategy, Nodes(2))
    updates = (moved(4, 0, 0, 0), moved(0, 2, 0, 0))
    replies = [unshared(message, update) for message, update in zip(messages, updates, strict=True)]
    mean = result(strategy.aggregate_train(1, replies[::-1]))
    np.testing.assert_allclose(mean[A], [[3, 2]])
    assert (inner.report.replies, inner.report.not_shared, inner.report.failures) == (2, 2, [])
    assert math.isnan(inner.report.train_loss)


def test_evaluation_that_is_not_shared_is_no_failure() -> None:
    strategy = averaging()
    strategy.plan(Nodes(2), 1)  # type: ignore[arg-type]
    first, second = strategy.configure_evaluate(0, record_from_arrays(START), ConfigRecord(), Nodes(2))  # type: ignore[arg-type]
    sums = EvaluationSums.of(2.0, 1, True)
    shared = Message(RecordDict({"metrics": MetricRecord({**sums.as_metrics()})}), reply_to=first)
    silent = Message(RecordDict({"metrics": MetricRecord({"not-shared": 1})}), reply_to=second)
    strategy.aggregate_evaluate(0, [shared, silent])
    assert (strategy.report.evaluation, strategy.report.not_shared, strategy.report.failures) == (sums, 1, [])


def test_sites_are_told_what_they_compute_the_runs_epsilon_from() -> None:
    strategy = private(n=2, z=1.5, fraction_train=0.5, min_available_nodes=4)
    nodes = Nodes(4)
    trains = ask(strategy, nodes, rounds=3)
    evaluates = strategy.configure_evaluate(1, record_from_arrays(START), ConfigRecord(), nodes)  # type: ignore[arg-type]
    for message in (*trains, *evaluates):
        config = message.content.config_records["config"]
        assert (config["noise-multiplier"], config["most-participations"]) == (1.5, 2)


def test_average_does_not_depend_on_the_order_of_the_replies() -> None:
    rng = np.random.default_rng(0)
    updates = [rng.normal(size=4) * 10.0**power for power in range(-8, 8, 2)]
    means = []
    for order in (1, -1):
        strategy = averaging(min_available_nodes=8)
        messages = ask(strategy, Nodes(8))
        replies = [
            reply(message, moved(*update), examples)
            for examples, (message, update) in enumerate(zip(messages, updates, strict=True), start=1)
        ]
        means.append(result(strategy.aggregate_train(1, replies[::order])))
    assert all(np.array_equal(means[0][key], means[1][key]) for key in START)


def test_private_mean_has_equal_weights_and_a_fixed_denominator() -> None:
    strategy = private(n=4, min_available_nodes=4)
    messages = ask(strategy, Nodes(4))
    replies = [reply(messages[0], moved(4, 0, 0, 0), 10_000), reply(messages[1], moved(0, 0, 4, 0), 1)]
    mean = result(strategy.aggregate_train(1, replies))  # two of four never answered
    np.testing.assert_allclose(mean[A], [[2, 1]])
    np.testing.assert_allclose(mean[B], [[2], [1]])
    assert strategy.strategy.report.failures == ["no reply within strategy.round-timeout"] * 2


def test_server_clips_again_what_a_client_did_not() -> None:
    strategy = private(n=2, c=5.0)
    messages = ask(strategy, Nodes(2))
    mean = result(strategy.aggregate_train(1, [reply(messages[0], moved(30, 0, 0, 40))]))
    np.testing.assert_allclose(mean[A], [[1 + 3 / 2, 1]])
    np.testing.assert_allclose(mean[B], [[1], [1 + 4 / 2]])


Damage = Callable[[Message], Message]
DAMAGED: dict[str, Damage] = {
    "error": lambda message: Message(Error(2, "Traceback\n  File x\nDataError: a bad file"), reply_to=message),
    "nan": lambda message: reply(message, moved(math.nan, 0, 0, 0)),
    "infinity": lambda message: reply(message, moved(math.inf, 0, 0, 0)),
    "shape": lambda message: reply(message, {key: value[:1] for key, value in moved(1, 1, 1, 1).items()}),
    "dtype": lambda message: reply(
        message, {key: value.astype(np.float64) for key, value in moved(1, 1, 1, 1).items()}
    ),
    "missing key": lambda message: reply(message, {A: START[A]}),
    "extra key": lambda message: reply(message, {**moved(1, 1, 1, 1), "y": np.ones(1, np.float32)}),
    "no arrays": lambda message: Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message),
    "no metrics": lambda message: Message(RecordDict({"arrays": record_from_arrays(START)}), reply_to=message),
    "negative examples": lambda message: reply(message, moved(1, 1, 1, 1), -5),
    "huge loss": lambda message: reply(message, moved(1, 1, 1, 1), 1, math.nan),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("unit", ["none", "client"])
def test_damaged_reply_contributes_nothing_and_is_reported(damage: str, unit: str) -> None:
    strategy = private(n=2) if unit == "client" else averaging()
    inner = strategy.strategy if isinstance(strategy, ClientLevelDP) else strategy
    good, bad = ask(strategy, Nodes(2))
    mean = result(strategy.aggregate_train(1, [reply(good, moved(2, 0, 0, 0)), DAMAGED[damage](bad)]))
    np.testing.assert_allclose(mean[A], [[2 if unit == "client" else 3, 1]])
    assert inner.report.replies == 1
    assert len(inner.report.failures) == 1
    assert f"node {bad.metadata.dst_node_id}" in inner.report.failures[0] or damage == "error"
    assert "\n" not in inner.report.failures[0]


def test_zero_update_counts_as_no_contribution() -> None:
    strategy = private(n=2)
    first, second = ask(strategy, Nodes(2))
    mean = result(strategy.aggregate_train(1, [reply(first, moved(2, 0, 0, 0)), reply(second, moved(0, 0, 0, 0))]))
    np.testing.assert_allclose(mean[A], [[2, 1]])


def test_too_few_replies_end_the_round_without_a_release() -> None:
    strategy = private(n=2, min_replies=2)
    first, second = ask(strategy, Nodes(2))
    with pytest.raises(FederationError, match=r"only 1 of 2 clients.*min-replies=2; the first failure: .*a bad file"):
        strategy.aggregate_train(1, [reply(first, moved(1, 0, 0, 0)), DAMAGED["error"](second)])
    assert strategy.ledger.released == 0
    assert strategy.ledger.participations == dict.fromkeys((m.metadata.dst_node_id for m in (first, second)), 1)


def test_noise_is_in_every_coordinate_and_cast_to_float32_last() -> None:
    strategy = private(n=2, z=1.0)
    messages = ask(strategy, Nodes(2))
    replies = [reply(message, moved(1, 0, 0, 0)) for message in messages]
    mean = result(strategy.aggregate_train(1, replies))
    exact = moved(1, 0, 0, 0)
    assert all((mean[key] != exact[key]).all() for key in START)
    assert {value.dtype for value in mean.values()} == {np.dtype(np.float32)}
    assert strategy.ledger.released == 1


def test_client_side_clipping_mod_gets_the_norm_and_agrees_with_the_server() -> None:
    strategy = private(n=1, c=1.0, min_available_nodes=1)
    (message,) = ask(strategy, Nodes(1))
    out = fixedclipping_mod(message, None, lambda msg, _: reply(msg, moved(3, 0, 0, 4)))  # type: ignore[arg-type]
    mean = result(strategy.aggregate_train(1, [out]))
    np.testing.assert_allclose(mean[A], [[1.6, 1]], rtol=1e-6)
    np.testing.assert_allclose(mean[B], [[1], [1.8]], rtol=1e-6)


def test_infinite_norm_makes_the_clipping_mod_leave_an_update_alone() -> None:
    (message, _) = ask(averaging(), Nodes(2))
    out = fixedclipping_mod(message, None, lambda msg, _: reply(msg, moved(3, 0, 0, 4)))  # type: ignore[arg-type]
    arrays = arrays_from_record(out.content.array_records["arrays"])
    np.testing.assert_allclose(arrays[B], [[1], [5]])


def test_evaluation_pools_the_nodes_and_reports_who_failed() -> None:
    strategy = averaging(min_available_nodes=3)
    strategy.plan(Nodes(3), 1)  # type: ignore[arg-type]
    messages = strategy.configure_evaluate(0, record_from_arrays(START), ConfigRecord(), Nodes(3))  # type: ignore[arg-type]
    sums = [EvaluationSums.of(2.0, 1, True), EvaluationSums.of(4.0, 3, None)]
    replies = [
        Message(RecordDict({"metrics": MetricRecord({**part.as_metrics()})}), reply_to=message)
        for part, message in zip(sums, messages, strict=False)
    ]
    replies.append(DAMAGED["error"](messages[2]))
    strategy.aggregate_evaluate(0, replies)
    assert strategy.report.evaluation == sums[0] + sums[1]
    assert strategy.report.failures[0].endswith("a bad file")


def test_bytes_are_counted_both_ways() -> None:
    strategy = averaging()
    messages = ask(strategy, Nodes(2))
    strategy.aggregate_train(1, [reply(message, moved(1, 0, 0, 0)) for message in messages])
    assert strategy.report.bytes_down == strategy.report.bytes_up > 2 * 4 * 4


def test_second_answer_and_one_of_a_node_that_was_not_asked_contribute_nothing() -> None:
    """Otherwise one client could move the sum by more than the clipping norm."""
    strategy = private(n=2, min_available_nodes=4, fraction_train=0.5)
    nodes = Nodes(4)
    first, second = ask(strategy, nodes)
    (stranger, *_) = set(nodes.ids) - {message.metadata.dst_node_id for message in (first, second)}
    forged = Message(RecordDict(), stranger, "train")
    replies = [reply(first, moved(2, 0, 0, 0))] * 2 + [reply(forged, moved(2, 0, 0, 0))]
    mean = result(strategy.aggregate_train(1, replies))
    np.testing.assert_allclose(mean[A], [[2, 1]])
    assert [
        failure.endswith("not asked, or has answered already") for failure in strategy.strategy.report.failures
    ] == [
        True,
        True,
    ]


def test_factors_that_do_not_train_are_neither_asked_for_nor_noised() -> None:
    strategy = ClientLevelDP(averaging("ffa"), Ledger(Mechanism(5.0, 1.0, 2, 1e-5)))
    messages = ask(strategy, Nodes(2))
    assert [list(message.content.array_records["arrays"]) for message in messages] == [[B], [B]]
    mean = result(strategy.aggregate_train(1, [reply(message, {B: START[B] + 1}) for message in messages]))
    np.testing.assert_array_equal(mean[A], START[A])
    assert (mean[B] != START[B]).all()


def test_update_of_a_frozen_factor_is_refused() -> None:
    strategy = ClientLevelDP(averaging("ffa"), Ledger(Mechanism(5.0, 0.0, 2, 1e-5)))
    good, bad = ask(strategy, Nodes(2))
    strategy.aggregate_train(1, [reply(good, {B: START[B] + 1}), reply(bad, moved(1, 1, 1, 1))])
    assert strategy.strategy.report.replies == 1


def test_round_is_charged_and_written_before_its_messages_leave() -> None:
    written: list[int] = []
    ledger = Ledger(Mechanism(5.0, 1.0, 2, 1e-5))
    strategy = ClientLevelDP(averaging(), ledger, write_ledger=lambda: written.append(len(ledger.entries)))
    messages = ask(strategy, Nodes(2))
    assert written == [1]
    assert ledger.participations == dict.fromkeys((message.metadata.dst_node_id for message in messages), 1)


def test_steered_clipping_norm_reaches_the_clients_of_the_next_round() -> None:
    strategy = ClientLevelDP(averaging(), Ledger(Mechanism(4.0, 0.0, 2, 1e-5, clipping_quantile=0.5)))
    nodes = Nodes(2)
    messages = ask(strategy, nodes)
    strategy.aggregate_train(1, [reply(message, moved(1, 0, 0, 0)) for message in messages])  # both are below 4
    after = [message.content.config_records["config"]["clipping_norm"] for message in ask(strategy, nodes, 2)]
    assert after == [4.0 * math.exp(-0.2 * (1.0 - 0.5))] * 2
