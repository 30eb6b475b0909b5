import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedft.checkpoint import RunDirectory, find_adapter, read_metrics, read_runs, read_state
from fedft.errors import ResumeError, RunDirectoryError


def save(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def line(number: int) -> dict[str, Any]:
    return {"round": number, "eval_loss": float("nan"), "epsilon": float("inf")}


def finished_run(folder: Path, rounds: int = 2, run_id: int = 7) -> RunDirectory:
    run = RunDirectory.create(folder, run_id, {"config": {"seed": 1}})
    for number in range(rounds + 1):
        run.finish_round(number, line(number), {"epsilon": 1.0}, save if number else None, str(number).encode(), {})
    return run


def test_run_directory_holds_what_the_run_left(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    run.end("completed")
    state = read_state(run.path)
    assert run.path.is_absolute()
    assert run.path.name.endswith("-7")
    assert (state["status"], state["round"], state["adapter"], state["config"]) == (
        "completed",
        2,
        "peft_2",
        {"seed": 1},
    )
    assert sorted(path.name for path in run.path.iterdir()) == [
        ".lock",
        "metrics.jsonl",
        "peft_1",
        "peft_2",
        "privacy.json",
        "run.json",
        "state_2.safetensors",
    ]
    assert [entry["round"] for entry in read_metrics(run.path)] == [0, 1, 2]
    assert (tmp_path / "latest").resolve() == run.path


def test_files_are_strict_json_whatever_the_numbers(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    run = finished_run(tmp_path)
    text = (run.path / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(text, parse_constant=refuse) == {"round": 0, "eval_loss": None, "epsilon": "inf"}


def test_latest_follows_the_newest_run(tmp_path: Path) -> None:
    finished_run(tmp_path, run_id=1)
    newest = finished_run(tmp_path, run_id=2)
    assert (tmp_path / "latest").resolve() == newest.path
    assert [state["run_id"] for _, state in read_runs(tmp_path)] == [1, 2]


@pytest.mark.parametrize("moment", ["adapter", "state_2.safetensors", "metrics.jsonl", "privacy.json", "run.json"])
def test_death_at_any_moment_of_a_round_leaves_the_round_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    run = finished_run(tmp_path, rounds=1)
    replace = Path.replace

    def die(source: Path, target: Path) -> Path:
        if target.name == moment:
            raise KeyboardInterrupt
        return replace(source, target)

    def die_saving(folder: Path) -> None:
        save(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        run.finish_round(2, line(2), {"epsilon": 2.0}, die_saving if moment == "adapter" else save, b"2", {})
    assert read_state(run.path)["round"] == 1
    assert [entry["round"] for entry in read_metrics(run.path)] == [0, 1]
    assert find_adapter(run.path, tmp_path).name == "peft_1"
    run.release()
    assert RunDirectory.reopen(run.path).read_arrays() == b"1"


def test_adapter_of_a_round_that_left_none_can_be_kept(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, 7, {})
    run.finish_round(3, line(3), {}, None, b"3", {})
    run.keep_adapter(3, save)
    run.keep_adapter(3, lambda _: pytest.fail("it is there already"))
    assert find_adapter(Path("latest"), tmp_path) == run.path / "peft_3"


def test_run_whose_process_is_gone_is_shown_as_killed(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    assert read_state(run.path)["status"] == "running"
    child = os.fork()
    if not child:
        os._exit(0)
    run.update(pid=child)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # dead, but not reaped
    assert read_state(run.path)["status"] == "killed"
    os.waitpid(child, 0)
    assert read_state(run.path)["status"] == "killed"


def test_adapter_is_found_by_run_by_name_and_by_folder(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    expected = run.path / "peft_2"
    assert find_adapter(run.path, Path("/elsewhere")) == expected
    assert find_adapter(Path(run.path.name), tmp_path) == expected
    assert find_adapter(run.path / "peft_1", Path("/elsewhere")) == run.path / "peft_1"
    with pytest.raises(RunDirectoryError, match="neither a run directory nor an adapter"):
        find_adapter(Path("none"), tmp_path)
    empty = RunDirectory.create(tmp_path, 8, {})
    with pytest.raises(RunDirectoryError, match="has no adapter"):
        find_adapter(empty.path, tmp_path)


def test_damaged_run_directory_is_one_clear_line_and_left_out_of_the_list(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    (run.path / "run.json").write_text('{"status": ')
    with pytest.raises(RunDirectoryError, match=r"cannot read run\.json"):
        read_state(run.path)
    assert read_runs(tmp_path) == []


def test_unwritable_place_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match=r"cannot write the run directory.*set output-dir"):
        RunDirectory.create(tmp_path / "file" / "runs", 7, {})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_is_one_clear_line_and_keeps_the_round_before(tmp_path: Path) -> None:
    run = finished_run(tmp_path, rounds=1)

    def fill(folder: Path) -> None:
        with Path("/dev/full").open("w") as file:
            file.write("x" * 100_000)

    with pytest.raises(RunDirectoryError, match="No space left on device; free some space"):
        run.finish_round(2, line(2), {}, fill, b"2", {})
    assert read_state(run.path)["round"] == 1
    assert not list(run.path.glob(".peft*"))


def test_privacy_can_run_ahead_of_the_round_and_is_replaced_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(tmp_path, rounds=1)
    run.write_privacy({"epsilon": 2.0})
    assert json.loads((run.path / "privacy.json").read_text()) == {"epsilon": 2.0}
    assert read_state(run.path)["round"] == 1

    def die(source: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        run.write_privacy({"epsilon": 3.0})
    assert json.loads((run.path / "privacy.json").read_text()) == {"epsilon": 2.0}


def test_directory_has_one_writer_at_a_time(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    with pytest.raises(ResumeError, match=rf"being written by a run that is still going on \(pid {os.getpid()}\)"):
        RunDirectory.reopen(run.path)
    run.release()
    again = RunDirectory.reopen(run.path)
    assert (again.state["round"], len(again.metrics)) == (2, 3)


def test_writer_that_goes_on_removes_what_a_killed_one_left_half_done(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    for name in ("peft_3", ".peft_4.tmp"):
        (run.path / name).mkdir()
    run.release()
    again = RunDirectory.reopen(run.path)
    again.begin(8)
    assert sorted(path.name for path in run.path.iterdir() if path.is_dir()) == ["peft_1", "peft_2"]
    state = read_state(run.path)
    assert (state["run_id"], state["status"]) == (8, "running")
    assert [(part["run_id"], part["after_round"]) for part in state["runs"]] == [(7, None), (8, 2)]


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"x")])
def test_missing_or_edited_state_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    run = finished_run(tmp_path)
    assert run.read_arrays() == b"2"
    damage(run.path / "state_2.safetensors")
    with pytest.raises(ResumeError, match=r"no readable state|does not have the SHA-256"):
        run.read_arrays()
