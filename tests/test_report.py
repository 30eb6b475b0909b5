from pathlib import Path

import pytest
from conftest import make_settings

from fedft.errors import RunDirectoryError
from fedft.privacy.certificate import certificate
from fedft.privacy.ledger import Ledger, Mechanism
from fedft.report import draw_partitions, model_card

LINE = {"round": 0, "eval_loss": 6.5, "eval_loss_margin": 0.4, "accuracy": 0.3, "epsilon": None}


def test_model_card_has_the_hubs_metadata_and_the_claim() -> None:
    ledger = Ledger(Mechanism(1.0, 0.02, 2, 1e-5))
    for number in range(1, 11):
        ledger.charge(number, [2**64 - 1, 7])
        ledger.settle(number)
    claim = {
        **certificate(ledger, nodes=2, rounds=12, most_planned=12),
        "aggregation": "ffa",
        "base_model": "sha256 ab",
        "adapter": {"file": "peft_10/adapter_model.safetensors", "sha256": "cd"},
    }
    unscored = {**LINE, "round": 1, "eval_loss": None, "accuracy": None}
    card = model_card(make_settings(), [LINE, unscored], claim)
    head, body = card.split("---\n")[1:3]
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in head
    assert "datasets:\n- openlifescienceai/medmcqa" in head
    assert "| 0 | 6.500 ± 0.400 | 30.0% |  |" in body
    assert "\n| 1 |" not in body
    assert "(ε = 13173.4, δ = 1e-05) at the level of a client: this protects nobody" in body
    for line in (
        "ε = 51347.7 for replaced by other data",
        "| Clients a round n, of N | 2 of 2 |",
        "| Rounds | 12 planned, 10 released |",
        "| Rounds per client | at most 10; 12 planned |",
        "| Clients by rounds | 2 in 10 |",
        "| Aggregation | ffa |",
        "| Base model | sha256 ab |",
        "| Adapter | peft_10/adapter_model.safetensors, sha256 cd |",
        "- amplification by sampling: none is claimed",
    ):
        assert line in body
    assert str(2**64 - 1) not in card, "who took part stays in privacy.json"


def test_model_card_of_a_run_without_privacy_and_on_local_files_claims_nothing() -> None:
    card = model_card(make_settings(model__name="/a/model", data__name="/a/b.jsonl"), [], {"unit": "none"})
    assert "base_model" not in card
    assert "datasets" not in card
    assert "None: updates were neither clipped nor noised" in card


def test_picture_of_partitions_is_drawn_for_many_and_for_no_classes(tmp_path: Path) -> None:
    draw_partitions([{str(i): i + 1 for i in range(15)}, {"3": 4}], "title", tmp_path / "a.png")
    draw_partitions([{"": 3}], "title", tmp_path / "b.svg")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "12 others" not in (tmp_path / "b.svg").read_text()


def test_picture_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    for file in (tmp_path / "a.nonsense", tmp_path / "none" / "a.png"):
        with pytest.raises(RunDirectoryError, match="cannot write the picture"):
            draw_partitions([{"": 3}], "title", file)
