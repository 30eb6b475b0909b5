import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_settings
from flwr.app import Error, Message, MetricRecord, RecordDict
from test_strategy import Nodes, inside_a_run

from fedft.checkpoint import RunDirectory, read_metrics, read_state
from fedft.config import Settings
from fedft.errors import ConfigError, FederationError
from fedft.evaluation import EvaluationSums
from fedft.logs import drop_traceback
from fedft.privacy.accounting import gaussian_epsilon
from fedft.privacy.ledger import Ledger
from fedft.records import arrays_from_record, record_from_arrays
from fedft.schedule import learning_rate
from fedft.server_app import _output_dir, _plan_privacy, _run

_fixture = pytest.fixture(autouse=True)(inside_a_run)


class FakeFederation(Nodes):
    """A grid whose nodes answer at once: each adds a small step to what trains, or fails as `fails` says."""

    def __init__(self, count: int, fails: Callable[[int, int], bool] = lambda server_round, place: False) -> None:
        super().__init__(count)
        self.fails = fails
        self.asked: Counter[int] = Counter()
        self.before_answering: Callable[[int], None] = lambda server_round: None

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float) -> list[Message]:
        replies = [self._answer(place, message) for place, message in enumerate(messages)]
        return [reply for reply in replies if reply]

    def _answer(self, place: int, message: Message) -> Message | None:
        server_round = int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
        if message.metadata.message_type == "evaluate":
            sums = EvaluationSums.of(2.0, 1, True)
            return Message(RecordDict({"metrics": MetricRecord({**sums.as_metrics()})}), reply_to=message)
        self.asked[message.metadata.dst_node_id] += 1
        self.before_answering(server_round)
        if self.fails(server_round, place):
            return [None, Message(Error(2, "DataError: a bad file"), reply_to=message)][place % 2]
        adapter = arrays_from_record(message.content.array_records["arrays"])
        arrays = record_from_arrays({key: value + np.float32(1e-3) for key, value in adapter.items()})
        metrics = MetricRecord({"num-examples": 10, "train_loss": 2.0})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def run(
    federation: FakeFederation, llama_folder: Path, tmp_path: Path, **changes: Any
) -> tuple[tuple[str, str], RunDirectory]:
    settings = tiny(llama_folder, **changes)
    directory = RunDirectory.create(tmp_path, 1, {})
    return _run(federation, settings, directory), directory  # type: ignore[arg-type]


def tiny(llama_folder: Path, **changes: Any) -> Settings:
    return make_settings(
        **{
            "model__name": str(llama_folder),
            "lora__r": 2,
            "strategy__fraction_train": 0.5,
            "dp__noise_multiplier": 1.0,
            "strategy__node_timeout": 0.01,
            **changes,
        }
    )


def privacy_of(directory: RunDirectory) -> dict[str, Any]:
    return json.loads((directory.path / "privacy.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("aggregation", ["lora", "ffa", "rolora", "fedsvd"])
def test_run_in_which_a_third_of_each_cohort_fails_completes_with_the_ledger_right(
    llama_folder: Path, tmp_path: Path, aggregation: str
) -> None:
    federation = FakeFederation(24, fails=lambda server_round, place: (place + server_round) % 3 == 0)
    outcome, directory = run(
        federation,
        llama_folder,
        tmp_path,
        num_server_rounds=5,
        lora__aggregation=aggregation,
        dp__clipping_quantile=0.5,
    )
    assert outcome == ("completed", "")
    metrics = read_metrics(directory.path)
    assert [(line["cohort"], line["replies"], line["failures"]) for line in metrics[1:]] == [(12, 8, 4)] * 5
    privacy = privacy_of(directory)
    ledger = Ledger.from_dict(privacy["ledger"])
    assert ledger.participations == federation.asked
    assert (ledger.released, ledger.most, sum(federation.asked.values())) == (5, 3, 60)
    assert [line["epsilon"] for line in metrics] == [gaussian_epsilon(1.0, k, 1e-5) for k in (0, 1, 1, 2, 2, 3)]
    assert privacy["epsilon"] == gaussian_epsilon(1.0, 3, 1e-5) == pytest.approx(privacy["epsilon_dp_accounting"], 1e-6)
    assert [line["clipping_norm"] for line in privacy["rounds"]] == [line["clipping_norm"] for line in metrics[1:]]
    adapter = directory.path / privacy["adapter"]["file"]
    assert hashlib.sha256(adapter.read_bytes()).hexdigest() == privacy["adapter"]["sha256"]
    card = (adapter.parent / "README.md").read_text()
    assert privacy["adapter"]["sha256"] in card
    assert f"| Aggregation | {aggregation} |" in card
    assert privacy["base_model"].startswith("sha256 ")


def test_same_seed_gives_the_same_cohorts_whatever_the_node_ids(llama_folder: Path, tmp_path: Path) -> None:
    places = []
    for ids in (list(range(100, 110)), [7, 3, 11, 2, 90, 40, 41, 1, 6, 5]):
        federation = FakeFederation(10)
        federation.ids = ids
        _, directory = run(federation, llama_folder, tmp_path / str(ids[0]), dp__unit="client")
        rounds = privacy_of(directory)["ledger"]["rounds"]
        places.append([[ids.index(int(node)) for node in entry["nodes"]] for entry in rounds])
    assert places[0] == places[1]
    assert len({tuple(cohort) for cohort in places[0]}) > 1


def test_limit_ends_the_run_as_stopped_before_the_round_that_would_exceed_it(
    llama_folder: Path, tmp_path: Path
) -> None:
    federation = FakeFederation(4)
    limit = gaussian_epsilon(1.0, 2, 1e-5) + 0.01
    outcome, directory = run(
        federation, llama_folder, tmp_path, num_server_rounds=9, save_every_round=9, dp__max_epsilon=limit
    )
    assert outcome == ("stopped", f"round 5 would exceed dp.max-epsilon={limit:g}")  # 4 nodes, 2 a round, 2 rounds each
    assert read_metrics(directory.path)[-1]["epsilon"] == privacy_of(directory)["epsilon"] <= limit
    assert set(federation.asked.values()) == {2}
    assert (directory.path / "peft_4" / "adapter_model.safetensors").is_file()
    assert privacy_of(directory)["adapter"]["file"] == "peft_4/adapter_model.safetensors"


def test_run_stops_when_too_few_nodes_may_still_take_part(llama_folder: Path, tmp_path: Path) -> None:
    federation = FakeFederation(4)

    def lose(server_round: int) -> None:
        if server_round == 2:
            federation.ids = federation.ids[:1]

    federation.before_answering = lose
    outcome, directory = run(federation, llama_folder, tmp_path, num_server_rounds=8)
    status, why = outcome
    assert status == "stopped"
    assert "0 nodes that were in fewer than 4 rounds, the most that was planned, and strategy.min-replies=1" in why
    assert max(federation.asked.values()) == 4
    assert read_state(directory.path)["adapter"] == f"peft_{read_state(directory.path)['round']}"
    cohorts = [line["cohort"] for line in read_metrics(directory.path)]
    assert cohorts[:3] == [0, 2, 2]
    assert set(cohorts[3:]) == {1}


def test_failed_round_stays_charged_and_changes_nothing_and_the_run_goes_on(llama_folder: Path, tmp_path: Path) -> None:
    federation = FakeFederation(4, fails=lambda server_round, _: server_round in (2, 3))
    outcome, directory = run(federation, llama_folder, tmp_path, num_server_rounds=5, save_every_round=2)
    assert outcome == ("completed", "")
    ledger = Ledger.from_dict(privacy_of(directory)["ledger"])
    assert [entry.released for entry in ledger.entries] == [True, False, False, True, True]
    assert ledger.participations == federation.asked
    lines = read_metrics(directory.path)
    assert [line["failed"] for line in lines[:2]] == ["", ""]
    for line in lines[2:4]:
        assert line["failed"].startswith("only 0 of 2 clients sent a usable update")
        assert (line["replies"], line["failures"], line["eval_loss"]) == (0, 2, None)
    assert {path.name for path in directory.path.glob("peft_*")} == {"peft_4", "peft_5"}


@pytest.mark.parametrize(("allowed", "rounds"), [(1, 2), (3, 4)])
def test_failed_rounds_in_a_row_end_the_run_with_the_last_good_adapter(
    llama_folder: Path, tmp_path: Path, allowed: int, rounds: int
) -> None:
    federation = FakeFederation(4, fails=lambda server_round, _: server_round >= 2)
    changes = {"num_server_rounds": 9, "save_every_round": 9, "strategy__max_failed_rounds": allowed}
    with pytest.raises(FederationError, match=rf"max-failed-rounds={allowed} reached.*only 0 of 2 clients sent"):
        run(federation, llama_folder, tmp_path, **changes)
    (directory,) = tmp_path.glob("*-1")
    state, privacy = read_state(directory), json.loads((directory / "privacy.json").read_text())
    assert (state["round"], state["adapter"]) == (rounds, "peft_1")
    ledger = Ledger.from_dict(privacy["ledger"])
    assert [entry.released for entry in ledger.entries] == [True] + [False] * (rounds - 1)
    assert ledger.participations == federation.asked
    assert privacy["adapter"]["file"] == "peft_1/adapter_model.safetensors"


def test_failures_count_in_a_row_alone(llama_folder: Path, tmp_path: Path) -> None:
    federation = FakeFederation(4, fails=lambda server_round, _: server_round % 2 == 1)
    outcome, directory = run(
        federation, llama_folder, tmp_path, num_server_rounds=7, strategy__max_failed_rounds=2, dp__unit="none"
    )
    assert outcome == ("completed", "")
    assert [bool(line["failed"]) for line in read_metrics(directory.path)[1:]] == [True, False] * 3 + [True]
    assert read_state(directory.path)["adapter"] == "peft_6"


@pytest.mark.parametrize("moment", ["while the clients train", "at the checkpoint"])
def test_killed_run_has_the_round_in_its_ledger_before_anything_of_it_left(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    federation = FakeFederation(4)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    def arrange(server_round: int) -> None:
        if server_round == 2 and moment == "while the clients train":
            die()
        if server_round == 2:
            monkeypatch.setattr(RunDirectory, "finish_round", die)

    federation.before_answering = arrange
    with pytest.raises(KeyboardInterrupt):
        run(federation, llama_folder, tmp_path)
    (directory,) = tmp_path.glob("*-1")
    assert read_state(directory)["round"] == 1
    ledger = Ledger.from_dict(json.loads((directory / "privacy.json").read_text())["ledger"])
    released = moment == "at the checkpoint"
    assert [(entry.server_round, entry.released) for entry in ledger.entries] == [(1, True), (2, released)]
    assert set(federation.asked) <= set(ledger.participations)
    assert ledger.epsilon == gaussian_epsilon(1.0, ledger.most, 1e-5)


def test_run_without_privacy_keeps_the_schedule_and_claims_nothing(llama_folder: Path, tmp_path: Path) -> None:
    federation = FakeFederation(6)
    outcome, directory = run(federation, llama_folder, tmp_path, num_server_rounds=4, dp__unit="none")
    assert outcome == ("completed", "")
    assert set(federation.asked.values()) == {2}
    assert privacy_of(directory)["unit"] == "none"
    assert "epsilon" not in privacy_of(directory)


def test_learning_rate_is_half_a_cosine_over_the_rounds() -> None:
    settings = make_settings(num_server_rounds=10, train__learning_rate_max=5e-5, train__learning_rate_min=1e-6)
    rates = [learning_rate(settings, number) for number in range(1, 11)]
    assert rates[0] == 5e-5
    assert rates[5] == pytest.approx((5e-5 + 1e-6) / 2)
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(settings, 11) == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("changes", "most", "z"),
    [
        ({}, 3, 0.02),
        ({"dp__target_epsilon": 4.5}, 10, 3.08765),
        ({"dp__target_epsilon": 4.5}, 1, 3.08765 / 10**0.5),  # what counts is how often a client takes part
    ],
)
def test_noise_is_as_given_or_calibrated_to_the_target(changes: dict[str, Any], most: int, z: float) -> None:
    ledger = _plan_privacy(make_settings(**changes), 100, most)
    assert ledger is not None
    assert ledger.mechanism.noise_multiplier == pytest.approx(z, rel=1e-5)
    assert ledger.mechanism.cohort_size == 100


def test_no_unit_means_no_mechanism() -> None:
    assert _plan_privacy(make_settings(dp__unit="none"), 2, 1) is None


def test_relative_output_dir_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be an absolute path"):
        _output_dir(make_settings(output_dir="runs"))


def test_tracebacks_are_kept_for_bugs() -> None:
    for error, kept in ((ConfigError("x"), False), (ValueError("x"), True)):
        record = logging.LogRecord("flwr", logging.ERROR, "", 0, "", (), (type(error), error, None))
        assert drop_traceback(record)
        assert bool(record.exc_info) == kept
