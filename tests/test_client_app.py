"""A real site's side of a message: its policy before anything is loaded, and what its replies hold."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import default_run_config
from flwr.app import ConfigRecord, Context, Message, RecordDict
from test_strategy import inside_a_run

from fedft import client_app
from fedft.adapter import Adapter, adapter_digest
from fedft.config import parse_run_config
from fedft.model import initial_adapter
from fedft.records import record_from_arrays

_fixture = pytest.fixture(autouse=True)(inside_a_run)

OPEN = """
maximum-epsilon = inf
minimum-records = 5
share-metrics = true
"""


class Node:
    """One site: its files, its context, and the messages that a server may send it."""

    def __init__(self, folder: Path, model: Path, policy: str | None, rows: int = 40, **overrides: Any) -> None:
        self.run_config = default_run_config() | {
            "model.name": str(model),
            "train.max-steps": 1,
            "lora.r": 2,
            "dp.noise-multiplier": 1.0,
            **{key.replace("__", ".").replace("_", "-"): value for key, value in overrides.items()},
        }
        lines = [{"question": f"what is vein {i}", "answer": "bone"} for i in range(rows)]
        (folder / "site.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        node_config: dict[str, Any] = {"data-path": str(folder / "site.jsonl")}
        if policy is not None:
            allowed = f'allowed-models = ["{model}"]\n' if "allowed-models" not in policy else ""
            (folder / "policy.toml").write_text(allowed + policy)
            (folder / "policy.toml").chmod(0o644)
            node_config["policy-path"] = str(folder / "policy.toml")
        self.context = Context(1, 1, node_config, RecordDict(), self.run_config)
        self.model = model

    @property
    def first(self) -> Adapter:
        settings = parse_run_config(self.run_config)
        return initial_adapter(settings.model, settings.lora, settings.seed)

    def ask(self, kind: str = "train", server_round: int = 1, **changes: Any) -> Message:
        config = {
            "clipping_norm": 1.0,
            "noise-multiplier": 1.0,
            "most-participations": 2,
            "learning-rate": 1e-2,
            "server-round": server_round,
            "frozen-arrays": b"",
            "first-adapter": adapter_digest(self.first),
            **{key.replace("_", "-") if key != "clipping_norm" else key: value for key, value in changes.items()},
        }
        content = RecordDict({"arrays": record_from_arrays(self.first), "config": ConfigRecord(config)})
        return client_app.app(Message(content, 1, kind), self.context)


def reason(reply: Message) -> str:
    assert reply.has_error()
    assert "\n" not in reply.error.reason
    return str(reply.error.reason)


def metrics(reply: Message) -> dict[str, Any]:
    assert not reply.has_error(), reply.error.reason
    return dict(reply.content.metric_records["metrics"])


def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    for name in ("load_model", "load_tokenizer", "load_site", "load_usable"):
        monkeypatch.setattr(client_app, name, loaded)


def test_site_that_shares_answers_with_its_figures(tmp_path: Path, llama_folder: Path) -> None:
    node = Node(tmp_path, llama_folder, OPEN)
    trained = node.ask()
    assert metrics(trained)["num-examples"] == 36
    assert math.isfinite(metrics(trained)["train_loss"])
    assert metrics(node.ask("evaluate"))["examples"] == 4


def test_site_that_does_not_share_sends_its_update_and_one_word(tmp_path: Path, llama_folder: Path) -> None:
    node = Node(tmp_path, llama_folder, "maximum-epsilon = inf\nminimum-records = 5")
    trained = node.ask()
    assert metrics(trained) == {"not-shared": 1}
    sent, got = node.first, trained.content.array_records["arrays"]
    update = np.concatenate([(got[key].numpy() - sent[key]).ravel() for key in sent])
    assert 0 < np.linalg.norm(update) <= 1.0 + 1e-6
    assert metrics(node.ask("evaluate")) == {"not-shared": 1}


def test_site_without_a_policy_has_the_safe_one(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_is_loaded(monkeypatch)
    node = Node(tmp_path, llama_folder, None, dp__noise_multiplier=0.02)
    for kind in ("train", "evaluate"):
        text = reason(node.ask(kind, noise_multiplier=0.02))
        assert "allowed-models does not name" in text
        assert "maximum-epsilon=8 at δ 1e-05, but the run's ε for this site is 2,801" in text


@pytest.mark.parametrize(
    ("policy", "overrides", "words"),
    [
        ("maximum-rounds = 2", {}, "maximum-rounds=2, but the run plans 3"),
        ("maximum-epsilon = 1", {}, "maximum-epsilon=1"),
        (OPEN, {"dp__unit": "none"}, "does not name dp.unit='none'"),
        ('allowed-models = ["org/x@*"]', {}, "allowed-models does not name"),
        ("nonsense", {}, "this site's policy cannot be used; the log of its SuperNode says why"),
    ],
)
def test_refused_run_gets_the_reason_before_anything_is_loaded(
    tmp_path: Path,
    llama_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    overrides: dict[str, Any],
    words: str,
) -> None:
    nothing_is_loaded(monkeypatch)
    node = Node(tmp_path, llama_folder, policy, **overrides)
    text = reason(node.ask())
    assert text.startswith("refused")
    assert words in text
    assert "policy.toml" not in text
    assert node.context.state.config_records == {}


def test_too_few_records_are_refused_before_the_model_is_loaded(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(tmp_path, llama_folder, "minimum-records = 37\nmaximum-epsilon = inf")
    node.first  # noqa: B018
    monkeypatch.setattr(client_app, "load_model", None)
    monkeypatch.setattr(client_app, "load_tokenizer", None)
    assert reason(node.ask()).endswith("minimum-records=37, and the site has fewer")


def test_rounds_are_counted_at_the_site_and_no_more_are_given_than_announced(
    tmp_path: Path, llama_folder: Path
) -> None:
    node = Node(tmp_path, llama_folder, OPEN)
    assert not node.ask(server_round=1).has_error()
    assert not node.ask(server_round=2).has_error()
    assert "announced at most 2 rounds" in reason(node.ask(server_round=3))
    assert dict(node.context.state.config_records["fedft-counted"]) == {"asked": 2, "spent": 2.0}


def test_noise_lowered_on_the_way_is_refused(tmp_path: Path, llama_folder: Path) -> None:
    node = Node(tmp_path, llama_folder, "maximum-epsilon = 8\nminimum-records = 5")
    assert not node.ask(noise_multiplier=0.8, most_participations=1).has_error()
    assert "maximum-epsilon=8" in reason(node.ask(noise_multiplier=0.8, most_participations=2))


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_multiplier": "much"},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": -1.0},
        {"most_participations": 0},
        {"clipping_norm": math.inf},
        {"clipping_norm": math.nan},
    ],
)
def test_server_that_announces_nonsense_gets_nothing(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    nothing_is_loaded(monkeypatch)
    assert "the server " in reason(Node(tmp_path, llama_folder, OPEN).ask(**changes))


def test_texts_of_errors_stay_at_a_site_that_does_not_share(tmp_path: Path, llama_folder: Path) -> None:
    """They name columns, counts and paths of its data."""
    node = Node(tmp_path, llama_folder, "maximum-epsilon = inf")
    (tmp_path / "site.jsonl").write_text('{"diagnosis": "x"}\n')
    assert reason(node.ask()) == (
        "DataError at this site, which does not share the text; the log of its SuperNode has it"
    )
    node = Node(tmp_path, llama_folder, OPEN)
    (tmp_path / "site.jsonl").write_text('{"diagnosis": "x"}\n')
    assert "has the columns ['diagnosis']" in reason(node.ask())


def test_unforeseen_error_stays_too(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("patient 7")

    monkeypatch.setattr(client_app, "_load_site", fail)
    text = reason(Node(tmp_path, llama_folder, "maximum-epsilon = inf").ask())
    assert text.startswith("RuntimeError at this site")
    with pytest.raises(RuntimeError, match="patient 7"):
        Node(tmp_path, llama_folder, OPEN).ask()
