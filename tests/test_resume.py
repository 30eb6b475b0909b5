"""Runs that are killed and go on: nothing lost, nothing spent unseen, and what does not match is refused."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PROJECT, default_run_config
from flwr.app import Context, Message, RecordDict
from flwr.common.constant import HEARTBEAT_INTERVAL_INF
from flwr.proto.node_pb2 import NodeInfo
from private import LocalGrid
from safetensors.numpy import load_file
from test_server_app import FakeFederation
from test_strategy import inside_a_run

from fedft import private_strategy, server_app
from fedft.checkpoint import RunDirectory, read_metrics, read_state
from fedft.errors import ConfigError, FederationError, FedftError, LedgerError, ResumeError
from fedft.privacy.accounting import gaussian_epsilon
from fedft.privacy.ledger import Ledger
from fedft.records import arrays_from_record, record_from_arrays
from fedft.strategy import CohortFedAvg

_fixture = pytest.fixture(autouse=True)(inside_a_run)

ROUNDS = 5


class Killed(BaseException):
    """What a test raises where a process would be killed: nothing may catch it."""


class Clients(FakeFederation):
    """Nodes whose update depends on their place and the round, as that of real clients does."""

    def __init__(self, count: int = 4, first_id: int = 100, simulated: bool = True) -> None:
        super().__init__(count)
        self.ids = list(range(first_id, first_id + count))
        self.simulated = simulated
        self.hooks: dict[str, Callable[[int], None]] = {}

    def get_nodes(self) -> Iterable[NodeInfo]:
        for node in super().get_nodes():
            node.heartbeat_interval = HEARTBEAT_INTERVAL_INF if self.simulated else 30.0
            yield node

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float) -> list[Message]:
        messages = list(messages)
        config = messages[0].content.config_records["config"]
        kind = messages[0].metadata.message_type
        self.hooks.get(kind, lambda _: None)(int(config["server-round"]))  # type: ignore[arg-type]
        return super().send_and_receive(messages, timeout=timeout)

    def _answer(self, place: int, message: Message) -> Message | None:
        reply = super()._answer(place, message)
        if reply and reply.has_content() and "arrays" in reply.content.array_records:
            adapter = arrays_from_record(reply.content.array_records["arrays"])
            server_round = int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
            step = 1e-4 * server_round * (1 + self.ids.index(message.metadata.dst_node_id))
            reply.content["arrays"] = record_from_arrays({key: value * (1 + step) for key, value in adapter.items()})
        return reply


def run_config(llama_folder: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    return {
        **default_run_config(),
        "model.name": str(llama_folder),
        "output-dir": str(runs),
        "lora.r": 2,
        "num-server-rounds": ROUNDS,
        "save-every-round": ROUNDS,
        "strategy.fraction-train": 0.5,
        "strategy.node-timeout": 0.01,
        "dp.noise-multiplier": 1.0,
        **{key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()},
    }


def run(grid: Any, config: dict[str, Any], run_id: int = 1) -> Path:
    """Run the ServerApp to its end and return the run directory."""
    context = Context(run_id=run_id, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    server_app.main(grid, context)
    return (Path(config["output-dir"]) / "latest").resolve()


def ledger_of(directory: Path) -> Ledger:
    return Ledger.from_dict(json.loads((directory / "privacy.json").read_text())["ledger"])


def adapter_of(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / read_state(directory)["adapter"] / "adapter_model.safetensors")


def die(*_: object) -> None:
    raise Killed


def at_round_2(act: Callable[[], None]) -> Callable[[int], None]:
    return lambda server_round: act() if server_round == 2 else None


MOMENTS = {  # what is charged of round 2, what is released, and whether the round is finished on disk
    "before the charge": (False, False, False),
    "after the charge": (True, False, False),
    "while the clients train": (True, False, False),
    "after the release": (True, True, False),
    "before the write": (True, True, False),
    "peft_2": (True, True, False),
    "state_2.safetensors": (True, True, False),
    "metrics.jsonl": (True, True, False),
    "privacy.json": (True, True, False),
    "run.json": (True, True, False),
    "after the write": (True, True, True),
}


@contextmanager
def killed_at(moment: str, clients: Clients) -> Iterator[None]:
    """Let a run die at this moment of round 2, and expect that it does."""
    with pytest.MonkeyPatch.context() as patch:
        if moment == "while the clients train":
            clients.before_answering = at_round_2(die)
        elif moment in ("after the charge", "after the release"):
            clients.hooks["train" if moment == "after the charge" else "evaluate"] = at_round_2(die)
        elif moment == "before the charge":
            patch.setattr(CohortFedAvg, "_next_cohort", dying(CohortFedAvg._next_cohort, die))
        else:
            before, after = moment_of_the_write(moment, patch)
            patch.setattr(RunDirectory, "finish_round", dying(RunDirectory.finish_round, before, after))
        with pytest.raises(Killed):
            yield


def dying(method: Any, before: Callable[[], None], after: Callable[[], None] = lambda: None) -> Any:
    """Return a method of a round that acts before and after itself in round 2."""

    def call(self: Any, number: int, *arguments: Any) -> Any:
        at_round_2(before)(number)
        result = method(self, number, *arguments)
        at_round_2(after)(number)
        return result

    return call


def moment_of_the_write(moment: str, patch: pytest.MonkeyPatch) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return what to do before and after the write of round 2, so that it dies at this moment."""
    if moment in ("before the write", "after the write"):
        return (die, die) if moment == "before the write" else (lambda: None, die)

    def die_moving(move: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        return lambda source, target: die() if target.name == moment else move(source, target)  # type: ignore

    def arrange() -> None:
        for name in ("rename", "replace"):
            patch.setattr(Path, name, die_moving(getattr(Path, name)))

    return arrange, lambda: None


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_without_privacy_goes_on_to_the_same_adapter(
    llama_folder: Path, tmp_path: Path, moment: str
) -> None:
    """Also the same cohorts, though a simulation has new node ids."""
    changes = {"dp__unit": "none", "save_every_round": 1}
    whole = run(Clients(), run_config(llama_folder, tmp_path / "whole", **changes))
    clients = Clients(first_id=200)
    with killed_at(moment, clients):
        run(clients, run_config(llama_folder, tmp_path, **changes))
    again = Clients(first_id=300)
    resumed = run(again, run_config(llama_folder, tmp_path, **changes, resume_from="latest"), run_id=2)
    expected, found = adapter_of(whole), adapter_of(resumed)
    assert all(np.array_equal(expected[key], found[key]) for key in expected)
    columns = ("round", "train_loss", "learning_rate", "cohort", "replies", "failed", "eval_loss")
    expected_lines, lines = read_metrics(whole), read_metrics(resumed)
    assert [[line[key] for key in columns] for line in lines] == [
        [line[key] for key in columns] for line in expected_lines
    ]
    state = read_state(resumed)
    finished = 2 if moment == "after the write" else 1
    assert [part["after_round"] for part in state["runs"]] == [None, finished]
    assert (state["status"], state["round"], state["adapter"]) == ("completed", ROUNDS, f"peft_{ROUNDS}")
    assert {path.name for path in resumed.glob("peft_*")} == {f"peft_{number}" for number in range(1, ROUNDS + 1)}
    assert [path.name for path in resumed.glob("state_*")] == [f"state_{ROUNDS}.safetensors"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_private_run_loses_no_charge_and_goes_on_with_the_next_number(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    released: list[int] = []
    release = private_strategy.release

    def noting(ledger: Ledger, server_round: int, *arguments: Any) -> Any:
        released.append(server_round)
        return release(ledger, server_round, *arguments)

    monkeypatch.setattr(private_strategy, "release", noting)
    charged, seen, finished = MOMENTS[moment]
    changes = {"dp__clipping_quantile": 0.5, "save_every_round": 1}
    clients = Clients()
    with killed_at(moment, clients):
        run(clients, run_config(llama_folder, tmp_path, **changes))
    directory = (tmp_path / "latest").resolve()
    before = ledger_of(directory)
    assert [entry.released for entry in before.entries] == [True, seen][: 1 + charged]

    again = Clients(first_id=300)
    assert run(again, run_config(llama_folder, tmp_path, **changes, resume_from="latest"), run_id=2) == directory
    after = ledger_of(directory)
    assert after.entries[: len(before.entries)] == before.entries
    assert [entry.server_round for entry in after.entries] == [1, 2, 3, 4, 5]
    assert [entry.server_round for entry in after.entries if entry.released] == released
    asked = [clients.asked[200 - 100 + place] + again.asked[300 + place] for place in range(4)]
    counted = [after.participations[100 + place] for place in range(4)]
    assert all(count >= times for count, times in zip(counted, asked, strict=True))
    assert sum(counted) - sum(asked) == 2 * (moment == "after the charge") + (moment == "while the clients train")
    assert after.epsilon == gaussian_epsilon(1.0, 3, 1e-5)  # ⌈5·2/4⌉, as planned
    lines = read_metrics(directory)
    assert [line["round"] for line in lines] == [0, 1, 2, 3, 4, 5]
    lost = charged and not finished
    assert [bool(line["failed"]) for line in lines] == [False, False, lost, False, False, False]
    assert ("is lost" in lines[2]["failed"]) == (lost and seen)


def test_killed_before_the_first_round_is_finished_starts_over_in_the_same_directory(
    llama_folder: Path, tmp_path: Path
) -> None:
    clients = Clients()
    clients.hooks["evaluate"] = die
    with pytest.raises(Killed):
        run(clients, run_config(llama_folder, tmp_path))
    (directory,) = tmp_path.glob("*-1")
    assert run(Clients(), run_config(llama_folder, tmp_path, resume_from=str(directory)), run_id=2) == directory
    assert ledger_of(directory).released == ROUNDS


def test_killed_while_resuming_goes_on_all_the_same(llama_folder: Path, tmp_path: Path) -> None:
    config = run_config(llama_folder, tmp_path)
    for attempt in range(1, 4):
        clients = Clients(first_id=1000 * attempt)
        clients.hooks["train"] = lambda number, attempt=attempt: die() if number == 2 * attempt - 1 else None  # type: ignore
        with pytest.raises(Killed):
            run(clients, config, attempt)
        config = run_config(llama_folder, tmp_path, resume_from="latest")
    directory = run(Clients(first_id=9000), config, 4)
    assert [entry.released for entry in ledger_of(directory).entries] == [False, True, False, True, False]
    assert read_state(directory)["adapter"] == "peft_4"
    assert len(read_state(directory)["runs"]) == 4


def test_sigkill_frees_the_directory(llama_folder: Path, tmp_path: Path) -> None:
    """The real thing, in a process of its own: no exception is raised, no `finally` runs."""
    code = f"""
import os, signal, sys
sys.path[:0] = [{str(PROJECT / "tests")!r}, {str(PROJECT / "benchmarks")!r}]
import pytest
import test_resume as t
t.inside_a_run(pytest.MonkeyPatch())
clients = t.Clients()
clients.before_answering = t.at_round_2(lambda: os.kill(os.getpid(), signal.SIGKILL))
t.run(clients, t.run_config({str(llama_folder)!r}, {str(tmp_path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    directory = (tmp_path / "latest").resolve()
    assert read_state(directory)["status"] == "killed"
    run(Clients(first_id=300), run_config(llama_folder, tmp_path, resume_from="latest"), run_id=2)
    assert [entry.released for entry in ledger_of(directory).entries] == [True, False, True, True, True]


def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real ClientApp, on a partitioned file, half of the clients a round."""
    rows = tmp_path / "rows.jsonl"
    words = ["nerve", "artery", "vein", "bone"]
    lines = [{"question": f"what is {words[i % 4]} {i}", "answer": words[i % 4]} for i in range(40)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {
        "dp__unit": "none",
        "data__name": str(rows),
        "data__prompt_style": "alpaca",
        "train__max_steps": 1,
        "train__batch_size": 2,
        "num_server_rounds": 4,
        "eval__every": 4,
        "lora__aggregation": "fedsvd",
    }

    def start(folder: Path, run_id: int, shift: int = 0, **more: Any) -> Path:
        config = run_config(llama_folder, folder, **changes, **more)
        grid = LocalGrid(4, config)
        grid.contexts = {node + shift: context for node, context in grid.contexts.items()}
        nodes = [NodeInfo(node_id=node, heartbeat_interval=HEARTBEAT_INTERVAL_INF) for node in grid.contexts]
        monkeypatch.setattr(grid, "get_nodes", lambda: nodes)
        return run(grid, config, run_id)

    whole = start(tmp_path / "whole", 1)
    with killed_at("run.json", Clients()):
        start(tmp_path / "parts", 1, shift=50)
    resumed = start(tmp_path / "parts", 2, shift=70, resume_from="latest")
    expected, found = adapter_of(whole), adapter_of(resumed)
    assert all(np.array_equal(expected[key], found[key]) for key in expected)
    assert [line["train_loss"] for line in read_metrics(resumed)] == [
        line["train_loss"] for line in read_metrics(whole)
    ]


def interrupted(llama_folder: Path, runs: Path, clients: Clients | None = None, **changes: Any) -> Path:
    """Return the directory of a run that died in round 3."""
    clients = clients or Clients()
    clients.hooks["train"] = lambda number: die() if number == 3 else None  # type: ignore
    with pytest.raises(Killed):
        run(clients, run_config(llama_folder, runs, **changes))
    return (runs / "latest").resolve()


def test_simulation_of_another_size_and_impossible_replies_are_refused(llama_folder: Path, tmp_path: Path) -> None:
    interrupted(llama_folder, tmp_path)
    config = run_config(llama_folder, tmp_path, resume_from="latest")
    with pytest.raises(FederationError, match=r"min-replies=3 is larger than the cohort of 2"):
        run(Clients(), config | {"strategy.min-replies": 3, "strategy.min-available-nodes": 3}, 4)
    for clients in (Clients(6), Clients(simulated=False)):
        with pytest.raises(FederationError, match=r"simulation of 4 nodes.*num-supernodes=4"):
            run(clients, config, 2)
    run(Clients(), config, 3)


def test_nodes_of_a_deployment_are_recognised_by_their_ids(llama_folder: Path, tmp_path: Path) -> None:
    directory = interrupted(llama_folder, tmp_path, Clients(simulated=False))
    run(Clients(simulated=False), run_config(llama_folder, tmp_path, resume_from="latest"), 2)
    ledger = ledger_of(directory)
    assert sorted(ledger.participations.values()) == [2, 2, 3, 3]
    assert not any(entry.newcomers for entry in ledger.entries)


def test_nodes_that_cannot_be_recognised_count_as_the_one_that_took_part_most(
    llama_folder: Path, tmp_path: Path
) -> None:
    """Three of four come back under other ids: nobody, whoever it was, is in more rounds than was planned."""
    directory = interrupted(llama_folder, tmp_path, Clients(simulated=False))
    before = ledger_of(directory)
    assert before.most == 2
    again = Clients(simulated=False)
    again.ids = [100, 901, 902, 903]
    run(again, run_config(llama_folder, tmp_path, resume_from="latest"), 2)
    after = ledger_of(directory)
    assert after.entries[3].newcomers == (901, 902, 903)
    for node in again.ids:
        inherited = before.participations[100] if node == 100 else 2
        assert after.participations[node] == inherited + again.asked[node] <= 3
    assert after.epsilon == gaussian_epsilon(1.0, 3, 1e-5)


def test_more_rounds_continue_a_finished_run_with_its_claim_computed_again(llama_folder: Path, tmp_path: Path) -> None:
    config = run_config(llama_folder, tmp_path)
    directory = run(Clients(), config)
    again = {**config, "resume-from": "latest"}
    with pytest.raises(ResumeError, match=r"all of the run's 5 rounds are finished \(status completed\)"):
        run(Clients(), again, 2)
    run(Clients(), {**again, "num-server-rounds": 8}, 3)
    privacy = json.loads((directory / "privacy.json").read_text())
    assert (privacy["rounds_planned"], privacy["releases"], privacy["participations_planned"]) == (8, 8, 4)
    assert privacy["epsilon"] == gaussian_epsilon(1.0, 4, 1e-5)
    assert {path.name for path in directory.glob("peft_*")} == {"peft_5", "peft_8"}


def test_noise_that_was_chosen_for_a_number_of_rounds_keeps_it(llama_folder: Path, tmp_path: Path) -> None:
    directory = interrupted(llama_folder, tmp_path, dp__target_epsilon=4.5)
    config = run_config(llama_folder, tmp_path, dp__target_epsilon=4.5, resume_from="latest")
    with pytest.raises(ResumeError, match=r"num-server-rounds=6 was 5, and dp\.target-epsilon=4\.5 chose the noise"):
        run(Clients(), {**config, "num-server-rounds": 6}, 2)
    run(Clients(), config, 3)
    assert ledger_of(directory).epsilon == pytest.approx(4.5)
    assert ledger_of(directory).epsilon <= 4.5


@pytest.mark.parametrize(
    ("key", "value"), [("seed", 7), ("train.max-steps", 9), ("dp.delta", 1e-6), ("dp.max-epsilon", 50.0), ("lora.r", 4)]
)
def test_another_configuration_is_refused_with_the_keys_that_differ(
    llama_folder: Path, tmp_path: Path, key: str, value: Any
) -> None:
    directory = interrupted(llama_folder, tmp_path)
    files = {path: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    before = default_run_config() | run_config(llama_folder, tmp_path)
    config = run_config(llama_folder, tmp_path, resume_from="latest", eval__every=2) | {key: value}
    with pytest.raises(ResumeError) as caught:
        run(Clients(), config, 2)
    assert f"another configuration: {key} was {before[key]!r} and is {value!r}; give the former" in str(caught.value)
    assert {path: path.read_bytes() for path in directory.iterdir() if path.is_file()} == files


def edit_json(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


def swap_state(directory: Path) -> None:
    file = directory / "state_2.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def swap_base(directory: Path) -> None:
    edit_json(directory / "run.json", lambda state: state.update(base_model="sha256 00"))


def age(directory: Path) -> None:
    edit_json(directory / "run.json", lambda state: state["versions"].update(fedft="9.0.0"))


def halve_cohort(directory: Path) -> None:
    edit_json(directory / "run.json", lambda state: state["resume"]["schedule"].update(cohort_size=1))


def empty_schedule(directory: Path) -> None:
    edit_json(directory / "run.json", lambda state: state["resume"]["schedule"].update(nodes=[]))


def edit_ledger(directory: Path) -> None:
    edit_json(directory / "privacy.json", lambda state: state["ledger"]["rounds"].pop())


def lose_ledger(directory: Path) -> None:
    (directory / "privacy.json").unlink()


def put_old_ledger_back(directory: Path) -> None:
    """A ledger that is whole, and was this run's a round or two before."""

    def forget(state: dict[str, Any]) -> None:
        ledger = Ledger.from_dict(state["ledger"])
        older = Ledger(ledger.mechanism)
        older.charge(1, ledger.entries[0].nodes)
        older.settle(1)
        state["ledger"] = older.to_dict()

    edit_json(directory / "privacy.json", forget)


def put_other_ledger(directory: Path) -> None:
    """A ledger that is whole and long enough, of other cohorts."""

    def forge(state: dict[str, Any]) -> None:
        ledger = Ledger.from_dict(state["ledger"])
        other = Ledger(ledger.mechanism)
        for number in (1, 2, 3):
            other.charge(number, [number])
            other.settle(number)
        state["ledger"] = other.to_dict()

    edit_json(directory / "privacy.json", forge)


def cut_metrics(directory: Path) -> None:
    file = directory / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (swap_state, ResumeError, "does not have the SHA-256 in run.json"),
        (swap_base, ResumeError, "has other weights than the run was made with"),
        (age, ResumeError, "made by fedft 9.0.0"),
        (halve_cohort, LedgerError, "another mechanism"),
        (empty_schedule, ResumeError, "cannot be read"),
        (edit_ledger, LedgerError, "participations are not those of its rounds"),
        (lose_ledger, LedgerError, "cannot read the ledger"),
        (put_old_ledger_back, LedgerError, "has 1 rounds, but 2 are finished"),
        (put_other_ledger, LedgerError, "round 1 has cohort 1 in the saved ledger and 2 in metrics.jsonl"),
        (cut_metrics, ResumeError, "lacks a round"),
    ],
)
def test_tampered_run_directory_is_refused_with_one_line(
    llama_folder: Path, tmp_path: Path, damage: Callable[[Path], None], error: type[FedftError], words: str
) -> None:
    directory = interrupted(llama_folder, tmp_path)
    damage(directory)
    asked = Clients()
    with pytest.raises(error, match=words) as caught:
        run(asked, run_config(llama_folder, tmp_path, resume_from="latest"), 2)
    assert "\n" not in str(caught.value)
    assert not asked.asked


def test_run_that_is_still_going_on_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    directory = interrupted(llama_folder, tmp_path)
    first = RunDirectory.reopen(directory)
    with pytest.raises(ResumeError, match="being written by a run that is still going on"):
        run(Clients(), run_config(llama_folder, tmp_path, resume_from="latest"), 2)
    first.release()
    run(Clients(), run_config(llama_folder, tmp_path, resume_from="latest"), 3)


@pytest.mark.parametrize("where", ["latest", "relative", "/nowhere"])
def test_resume_from_that_names_no_run_is_refused(llama_folder: Path, tmp_path: Path, where: str) -> None:
    with pytest.raises(ConfigError, match=f"resume-from='{where}' names no run"):
        run(Clients(), run_config(llama_folder, tmp_path, resume_from=where))
    assert list(tmp_path.iterdir()) == []


def test_run_that_failed_for_want_of_replies_can_go_on(llama_folder: Path, tmp_path: Path) -> None:
    clients = Clients()
    clients.fails = lambda server_round, _: server_round >= 2
    with pytest.raises(FederationError, match="max-failed-rounds=2"):
        run(clients, run_config(llama_folder, tmp_path, strategy__max_failed_rounds=2))
    directory = (tmp_path / "latest").resolve()
    assert read_state(directory)["status"] == "failed"
    run(Clients(first_id=300), run_config(llama_folder, tmp_path, resume_from="latest"), 2)
    assert [entry.released for entry in ledger_of(directory).entries] == [True, False, False, True, True]
    assert read_state(directory)["status"] == "completed"
