"""Each aggregation through the real strategy, the real client handlers and the tiny models; the SVD by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_settings
from flwr.app import ConfigRecord, Message
from flwr.clientapp.mod import fixedclipping_mod
from test_strategy import Nodes, inside_a_run
from test_task import make_examples

from fedft import client_app
from fedft.adapter import Adapter
from fedft.aggregation import refactor, trained_keys
from fedft.config import Settings
from fedft.data import Site
from fedft.errors import AdapterError
from fedft.model import get_adapter, initial_adapter, load_model
from fedft.node_config import NodeSettings
from fedft.privacy.ledger import Ledger, Mechanism
from fedft.private_strategy import ClientLevelDP
from fedft.records import arrays_from_record, record_from_arrays
from fedft.strategy import CohortFedAvg

AGGREGATIONS = ["lora", "ffa", "rolora", "fedsvd"]
NODE = NodeSettings(0, 2)

_fixture = pytest.fixture(autouse=True)(inside_a_run)


@pytest.mark.parametrize(
    ("aggregation", "rounds"),
    [("lora", ["AB", "AB", "AB"]), ("ffa", ["B", "B", "B"]), ("rolora", ["B", "A", "B"]), ("fedsvd", ["B", "B", "B"])],
)
def test_factors_that_train_in_the_first_rounds(aggregation: str, rounds: list[str]) -> None:
    keys = ["q.lora_A.weight", "q.lora_B.weight", "v.lora_A.weight", "v.lora_B.weight"]
    for number, factors in enumerate(rounds, start=1):
        assert trained_keys(aggregation, number, keys) == [key for key in keys if key.split("_")[1][0] in factors]


def svd_reference(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slow and obvious: the singular value decomposition of the whole product, cut to its rank-r part."""
    u, s, vt = np.linalg.svd(b.astype(np.float64) @ a.astype(np.float64))
    r = min(a.shape[0], len(s))
    return vt[:r], u[:, :r] * s[:r]


@pytest.mark.parametrize(("r", "inputs", "outputs"), [(4, 30, 20), (1, 5, 7), (8, 8, 8), (6, 4, 20), (6, 20, 4)])
def test_refactoring_keeps_the_product_and_makes_the_rows_orthonormal(r: int, inputs: int, outputs: int) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(r, inputs)).astype(np.float32), rng.normal(size=(outputs, r)).astype(np.float32)
    new_a, new_b = refactor(a, b)
    assert (new_a.shape, new_b.shape, new_a.dtype, new_b.dtype) == (a.shape, b.shape, a.dtype, b.dtype)
    np.testing.assert_allclose(new_b @ new_a, b @ a, atol=1e-5)
    rank = min(r, inputs, outputs)
    np.testing.assert_allclose(new_a[:rank] @ new_a[:rank].T, np.eye(rank), atol=1e-6)
    ref_a, ref_b = svd_reference(a, b)
    np.testing.assert_allclose(np.abs(new_a[:rank]), np.abs(ref_a[:rank]), atol=1e-4)  # up to each row's sign
    np.testing.assert_allclose(np.abs(new_b[:, :rank]), np.abs(ref_b[:, :rank]), atol=1e-4)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_refactoring_of_a_product_of_low_rank_leaves_rows_that_can_train(rank: int) -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4, 30)).astype(np.float32)
    b = (rng.normal(size=(20, rank)) @ rng.normal(size=(rank, 4))).astype(np.float32)
    new_a, new_b = refactor(a, b)
    np.testing.assert_allclose(new_b @ new_a, b @ a, atol=1e-5)
    np.testing.assert_allclose(new_a @ new_a.T, np.eye(4), atol=1e-6)


class Federation:
    """Two nodes that run the real client handlers on the tiny model, and the real strategy, in one process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, aggregation: str, **changes: Any) -> None:
        self.settings: Settings = make_settings(
            **{
                "model__name": str(folder),
                "model__dtype": "float32",
                "lora__r": 4,
                "lora__aggregation": aggregation,
                "train__max_steps": 2,
                "train__batch_size": 2,
                "train__learning_rate_max": 1e-2,
                **changes,
            }
        )
        monkeypatch.setattr(client_app, "_load_site", lambda *_: Site(make_examples(10), make_examples(4)))
        self.adapter = initial_adapter(self.settings.model, self.settings.lora, self.settings.seed)
        self.averaging = CohortFedAvg(self.settings.strategy, aggregation, self.adapter, self.settings.seed)
        self.nodes: Any = Nodes(2)
        self.averaging.plan(self.nodes, 10)
        self.ledger = Ledger(Mechanism(100.0, 0.0, 2, 1e-5))
        self.strategy = ClientLevelDP(self.averaging, self.ledger)

    def train(self, number: int) -> tuple[list[Message], list[Message]]:
        config = ConfigRecord({"learning-rate": 1e-2})
        sent = self.strategy.configure_train(number, record_from_arrays(self.adapter), config, self.nodes)
        replies = [fixedclipping_mod(message, None, self._answer) for message in sent]  # type: ignore[arg-type]
        arrays, _ = self.strategy.aggregate_train(number, replies)
        assert arrays is not None
        self.adapter = arrays_from_record(arrays)
        return sent, replies

    def _answer(self, message: Message, _: object) -> Message:
        return Message(client_app._train(client_app._Job(message, self.settings, NODE, None)), reply_to=message)

    def evaluate(self, number: int) -> Adapter:
        """Return the adapter that a node scores."""
        arrays = record_from_arrays(self.adapter)
        message = self.strategy.configure_evaluate(number, arrays, ConfigRecord(), self.nodes)[0]
        client_app._evaluate(client_app._Job(message, self.settings, NODE, None))
        return get_adapter(load_model(self.settings.model, self.settings.lora))


def equal(first: Adapter, second: Adapter) -> bool:
    return list(first) == list(second) and all(np.array_equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_trained_factors_move_and_travel_and_frozen_ones_do_neither(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, aggregation: str
) -> None:
    federation = Federation(model_folder, monkeypatch, aggregation)
    keys = list(federation.adapter)
    for number in (1, 2, 3):
        before = federation.adapter
        sent, replies = federation.train(number)
        trained = trained_keys(aggregation, number, keys)
        assert federation.averaging.report.failures == []
        for message in (*sent, *replies):
            assert list(message.content.array_records["arrays"]) == trained
        for key in keys:
            moved = not np.array_equal(before[key], federation.adapter[key])
            assert moved == (key in trained or aggregation == "fedsvd"), (number, key)
        assert equal(federation.evaluate(number), federation.adapter), "a node scores another adapter than the server's"
    model = load_model(federation.settings.model, federation.settings.lora)
    assert all(value.requires_grad for name, value in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("aggregation", ["ffa", "rolora", "fedsvd"])
def test_model_is_bit_for_bit_the_frozen_factors_it_was_sent(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, aggregation: str
) -> None:
    federation = Federation(llama_folder, monkeypatch, aggregation)
    for number in (1, 2, 3):
        before = federation.adapter
        federation.train(number)
        trained = trained_keys(aggregation, number, before)
        in_model = get_adapter(load_model(federation.settings.model, federation.settings.lora))
        assert all(np.array_equal(in_model[key], before[key]) == (key not in trained) for key in before)


def test_frozen_factors_are_sent_only_once_a_node_cannot_derive_them(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sizes(aggregation: str) -> list[tuple[int, int]]:
        federation = Federation(llama_folder, monkeypatch, aggregation)
        reports = []
        for number in (1, 2, 3):
            federation.train(number)
            reports.append((federation.averaging.report.bytes_down // 2, federation.averaging.report.bytes_up // 2))
        return reports

    lora, ffa, rolora, fedsvd = map(sizes, AGGREGATIONS)
    adapter = Federation(llama_folder, monkeypatch, "lora").adapter
    a, b = (4 * sum(adapter[key].size for key in adapter if f".lora_{factor}." in key) for factor in "AB")
    slack = 200 * len(adapter)  # the headers of the arrays

    def near(figures: list[tuple[int, int]], expected: list[tuple[int, int]]) -> bool:
        return all(
            0 <= x - y < slack for pair in zip(figures, expected, strict=True) for x, y in zip(*pair, strict=True)
        )

    assert near(lora, [(a + b, a + b)] * 3)
    assert near(ffa, [(b, b)] * 3)
    assert near(rolora, [(b, b), (a + b, a), (a + b, b)])
    assert near(fedsvd, [(b, b), (a + b, b), (a + b, b)])


def test_refactoring_by_the_strategy_keeps_the_model_and_makes_a_orthonormal(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, refactored = (Federation(llama_folder, monkeypatch, name) for name in ("ffa", "fedsvd"))
    plain.train(1)
    refactored.train(1)
    for key in plain.adapter:
        if ".lora_A." in key:
            other = key.replace(".lora_A.", ".lora_B.")
            product = plain.adapter[other] @ plain.adapter[key]
            assert np.abs(product).max() > 1e-4
            new_a = refactored.adapter[key]
            np.testing.assert_allclose(refactored.adapter[other] @ new_a, product, atol=1e-6)
            np.testing.assert_allclose(new_a @ new_a.T, np.eye(len(new_a)), atol=1e-5)


def test_node_that_derives_another_first_adapter_refuses(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation(llama_folder, monkeypatch, "ffa")
    config = ConfigRecord({"learning-rate": 1e-2})
    arrays = record_from_arrays(federation.adapter)
    message = federation.strategy.configure_train(1, arrays, config, federation.nodes)[0]
    other = make_settings(
        **{
            "model__name": str(llama_folder),
            "model__dtype": "float32",
            "lora__r": 4,
            "lora__aggregation": "ffa",
            "seed": 1,
        }
    )
    with pytest.raises(AdapterError, match="derives another first adapter"):
        client_app._train(client_app._Job(message, other, NODE, None))
