import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, make_settings
from typer.testing import CliRunner

from fedft.checkpoint import RunDirectory
from fedft.cli import app
from fedft.model import initial_adapter, save_adapter


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def make_run(folder: Path, base: Path) -> RunDirectory:
    settings = make_settings(model__name=str(base), lora__r=4)
    config = {
        "num_server_rounds": 1,
        "model": {"name": str(base), "revision": "main"},
        "data": {"prompt_style": "auto"},
    }
    directory = RunDirectory.create(folder / "runs", 7, {"config": config})
    adapter = initial_adapter(settings.model, settings.lora, 0)
    for number, loss in ((0, 6.5), (1, 4.25)):
        line = {"round": number, "eval_loss": loss, "accuracy": None, "epsilon": 1462.1}
        directory.finish_round(
            number, line, {}, lambda path: save_adapter(path, adapter, settings.model, settings.lora)
        )
    return directory


def test_runs_says_how_to_start_one_and_then_lists_them(tmp_path: Path, llama_folder: Path) -> None:
    assert "start one with: flwr run . --stream" in run("runs")
    directory = make_run(tmp_path / "home", llama_folder)
    directory.end("failed", "no [node] came")
    output = run("runs")
    assert "6.50 → 4.25" in output
    assert "1,462" in output
    assert f"{directory.path.name} failed: no [node] came" in output


def test_runs_lists_the_others_when_one_is_damaged(tmp_path: Path, llama_folder: Path) -> None:
    make_run(tmp_path / "home", llama_folder)
    damaged = RunDirectory.create(tmp_path / "home" / "runs", 8, {})
    output = run("runs")
    assert "6.50 → 4.25" in output
    assert f"{damaged.path.name} damaged" in output


def test_generate_puts_the_base_models_answer_beside_the_adapters(tmp_path: Path, llama_folder: Path) -> None:
    directory = make_run(tmp_path / "home", llama_folder)
    output = run("generate", "low glucose?", "--max-new-tokens", "5", "--sample", "--seed", "3")
    base, tuned = output.split("base model")[1].split("fine-tuned")
    assert str(directory.path / "peft_1") in tuned
    assert base.splitlines()[1:-2] == tuned.splitlines()[1:-1]  # the new adapter changes nothing yet
    assert run("generate", "low glucose?", "--adapter", str(directory.path / "peft_1"), "--max-new-tokens", "2")


def test_generate_works_on_an_adapter_folder_alone(tmp_path: Path, llama_folder: Path) -> None:
    settings = make_settings(model__name=str(llama_folder), lora__r=4)
    adapter = initial_adapter(settings.model, settings.lora, 0)
    save_adapter(tmp_path, adapter, settings.model, settings.lora)
    assert "fine-tuned" in run("generate", "why?", "--adapter", str(tmp_path), "--max-new-tokens", "2")


def test_generate_refuses_with_one_line(tmp_path: Path, llama_folder: Path) -> None:
    assert "neither a run directory nor an adapter folder" in refused("generate", "why?")
    assert "question='' is empty" in refused("generate", " ")
    directory = make_run(tmp_path / "home", llama_folder)
    (directory.path / "peft_1" / "adapter_model.safetensors").write_bytes(b"nonsense")
    assert "cannot put the adapter" in refused("generate", "why?")


def test_partitions_shows_sizes_and_class_mix(tmp_path: Path) -> None:
    rows = [{"question": str(i), "answer": "a", "specialty": "xy"[i % 2]} for i in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    override = f"data.name='{tmp_path / 'rows.json'}' data.partitioner='natural'"
    picture = tmp_path / "p.png"
    output = run(
        "partitions", "--nodes", "2", "--run-config", override, "--picture", str(picture), "--project", str(PROJECT)
    )
    assert "x 100%" in output
    assert str(picture) in output
    assert picture.is_file()


@pytest.mark.parametrize("override", ["data.partitioner='random'", "nonsense=1", "none.toml"])
def test_partitions_refuses_a_wrong_run_config_with_one_line(override: str) -> None:
    assert "run-config" in refused("partitions", "--run-config", override, "--project", str(PROJECT))


def test_partitions_outside_the_project_says_where_to_run_it(tmp_path: Path) -> None:
    assert "--project" in refused("partitions", "--project", str(tmp_path))


def test_fetch_refuses_an_unknown_built_in() -> None:
    assert "there are: builtin:smollm2-135m-instruct, builtin:medmcqa" in refused("fetch", "builtin:none")


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'flwr', 'datasets', 'matplotlib', 'scipy'}"
    code = f"import sys, fedft, fedft.cli; sys.exit(str({heavy} & set(sys.modules)).removeprefix('set()') or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)
