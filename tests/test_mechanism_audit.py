"""An attack on the mechanism, through the real strategy: what the releases show must stay below what is claimed.

The target sends a canary update ten times as long as may be, or nothing: a zero update, an error, or no reply, by the
case. The attacker knows everything but that and the noise, and scores a release by its projection on the canary. All
clients are in every round, so one release costs ε(z, 1). The claim is audited at the δ that people print, 1e-5, where
it is 8.00, and at 0.3 on the same curve, where it is 1.43 and a few thousand releases tell most.

Chances: the noise comes from the operating system, so no seed repeats a run. A right mechanism fails a case with a
probability below 2e-6, by the confidence of the bound; its bound at δ = 0.3 is 0.16 with a standard deviation of 0.12.
Noise that is half of what it should be gives 2.89 ± 0.19, weights by examples 2.78 ± 0.03: seven deviations and more
above the claim (200 simulated audits of Gaussian scores each).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from conftest import make_settings
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray
from test_strategy import Nodes

from fedft.audit import audit_scores
from fedft.privacy import mechanism
from fedft.privacy.accounting import gaussian_epsilon
from fedft.privacy.ledger import Ledger, Mechanism
from fedft.private_strategy import ClientLevelDP
from fedft.records import arrays_from_record, record_from_arrays
from fedft.replies import ClientReply
from fedft.strategy import CohortFedAvg

AGGREGATIONS = ("lora", "ffa", "rolora", "fedsvd")
N, Z, C = 4, 0.6, 2.0
DELTAS = (1e-5, 0.3)
CONFIDENCE = 1 - 1e-6
TRIALS = 700  # of either world
MUTATION_TRIALS = 2400
A, B = "x.lora_A.weight", "x.lora_B.weight"
SENT = {A: np.array([[0.6, 0.8, 0.0]], np.float32), B: np.array([[0.3], [-0.2], [0.1]], np.float32)}  # A's row: norm 1
DIRECTIONS = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
Update = dict[str, NDArray[Any]]


@pytest.fixture(autouse=True)
def _inside_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower makes messages only inside a task of a run."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


Answer = Callable[[Message, int], Message | None]


def updated(examples: int) -> Answer:
    """Answer with an update of length 10·C along the client's own direction, in the arrays that were asked for."""
    return lambda message, client: Message(content(keys_of(message), client, 10 * C, examples), reply_to=message)


def unchanged(message: Message, client: int) -> Message:
    return Message(content(keys_of(message), client, 0.0, 10), reply_to=message)


def not_a_number(message: Message, client: int) -> Message:
    return Message(content(keys_of(message), client, math.nan, 10), reply_to=message)


def failed(message: Message, client: int) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "DataError: no such file"), reply_to=message)


def late(message: Message, client: int) -> None:
    return None


def keys_of(message: Message) -> tuple[str, ...]:
    return tuple(sorted(message.content.array_records["arrays"]))


@lru_cache
def content(keys: tuple[str, ...], client: int, length: float, examples: int) -> RecordDict:
    """Return the reply with these arrays moved by this length along the client's direction."""
    moved = {key: SENT[key] + length * part for key, part in direction(keys, client).items()}
    arrays = ArrayRecord({key: Array(value.astype(np.float32)) for key, value in moved.items()})
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": examples, "train_loss": 2.0})})


@lru_cache
def direction(keys: tuple[str, ...], client: int) -> Update:
    """Return a client's unit vector over these arrays."""
    sizes = [SENT[key].size for key in keys]
    flat = DIRECTIONS[client, : sum(sizes)]
    parts = np.split(flat / np.linalg.norm(flat), np.cumsum(sizes)[:-1])
    return {key: part.reshape(SENT[key].shape) for key, part in zip(keys, parts, strict=True)}


@dataclass(frozen=True)
class Case:
    """How the target answers with its canary and without, and how the three others do."""

    present: Answer
    absent: Answer
    others: tuple[Answer, Answer, Answer]


CASES = {
    "equal sizes": Case(updated(10), unchanged, (updated(10),) * 3),
    "unequal sizes": Case(updated(970), unchanged, (updated(10),) * 3),
    "failures": Case(updated(10), failed, (updated(10), failed, not_a_number)),
    "late replies": Case(updated(10), late, (updated(10), late, late)),
}


def releases(case: Case, aggregation: str, trials: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the scores of `trials` releases with the canary, and of as many without, all from one long run."""
    settings = make_settings(strategy__min_available_nodes=N)
    averaging = CohortFedAvg(settings.strategy, aggregation, SENT, seed=0)
    strategy = ClientLevelDP(averaging, Ledger(Mechanism(C, Z, N, DELTAS[0])))
    nodes: Any = Nodes(N)
    sent = record_from_arrays(SENT)
    averaging.plan(nodes, 2 * trials)
    scores: dict[bool, list[float]] = {True: [], False: []}
    for number in range(1, 2 * trials + 1):
        present = number % 4 < 2  # both factors of rolora in both worlds
        messages = strategy.configure_train(number, sent, ConfigRecord(), nodes)
        answers = (case.present if present else case.absent, *case.others)
        replies = [
            answer(message, client) for client, (answer, message) in enumerate(zip(answers, messages, strict=True))
        ]
        arrays, _ = strategy.aggregate_train(number, [reply for reply in replies if reply is not None])
        assert arrays is not None
        scores[present].append(score(arrays_from_record(arrays), aggregation, direction(keys_of(messages[0]), 0)))
    return np.array(scores[True]), np.array(scores[False])


def score(released: Update, aggregation: str, canary: Update) -> float:
    """Return the projection of the released mean on the canary's direction, in units of C/n."""
    if aggregation == "fedsvd":
        released = {B: released[B] @ released[A] @ SENT[A].T}  # A's row has norm 1: undoes the refactoring
    return sum(float(np.vdot(released[key] - SENT[key], part)) for key, part in canary.items()) * N / C


def excess(scores: tuple[NDArray[np.float64], NDArray[np.float64]]) -> float:
    """Return by how much what is shown passes what is claimed, at the worse δ."""
    return max(audit_scores(*scores, delta, CONFIDENCE) - gaussian_epsilon(Z, 1, delta) for delta in DELTAS)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("case", CASES)
def test_releases_show_no_more_than_is_claimed(case: str, aggregation: str) -> None:
    scores = releases(CASES[case], aggregation, TRIALS)
    assert excess(scores) <= 0
    assert np.mean(scores[0]) - np.mean(scores[1]) == pytest.approx(
        1.0, abs=8 * Z * math.sqrt(2 / TRIALS)
    )  # the attack
    # sees the canary at the clipped length: an audit that looked past it could not fail


def test_audit_sees_halved_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = mechanism.private_gaussian
    monkeypatch.setattr(mechanism, "private_gaussian", lambda shape: draw(shape) / 2)
    assert excess(releases(CASES["equal sizes"], "lora", MUTATION_TRIALS)) > 0


def test_audit_sees_weights_by_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[float] = []
    update_of, clip = CohortFedAvg.update_of, mechanism.clip_update

    def weighed(self: CohortFedAvg, reply: ClientReply) -> Update:
        weights.append(N * reply.examples / 1000)
        return update_of(self, reply)

    def clip_and_weigh(update: Update, clipping_norm: float) -> Update | None:
        clipped, weight = clip(update, clipping_norm), weights.pop()
        return clipped and {key: value * weight for key, value in clipped.items()}

    monkeypatch.setattr(CohortFedAvg, "update_of", weighed)
    monkeypatch.setattr(mechanism, "clip_update", clip_and_weigh)
    assert excess(releases(CASES["unequal sizes"], "lora", TRIALS)) > 0


def test_audit_sees_an_average_over_those_that_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    answered: list[int] = []
    usable, clip = CohortFedAvg.usable_replies, mechanism.clip_update

    def counted(self: CohortFedAvg, replies: Any) -> list[ClientReply]:
        result = usable(self, replies)
        answered[:] = [len(result)]
        return result

    def clip_and_scale(update: Update, clipping_norm: float) -> Update | None:
        clipped = clip(update, clipping_norm)
        return clipped and {key: value * (N / answered[0]) for key, value in clipped.items()}

    monkeypatch.setattr(CohortFedAvg, "usable_replies", counted)
    monkeypatch.setattr(mechanism, "clip_update", clip_and_scale)
    assert excess(releases(CASES["late replies"], "lora", MUTATION_TRIALS)) > 0
