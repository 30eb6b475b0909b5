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


def misused(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
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
            number, line, {}, lambda path: save_adapter(path, adapter, settings.model, settings.lora), b"", {}
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


NOTEBOOK = ("--nodes", "20", "--cohort", "4", "--rounds", "10")


def test_plan_calls_the_notebooks_setting_hopeless_and_exits_with_0() -> None:
    output = run("plan", *NOTEBOOK, "--noise-multiplier", "0.02", "--clipping-norm", "0.5")
    assert "2,801" in output
    assert "verdict: this protects nobody" in output
    assert "do not call this private" in output
    assert "assumed: r=16" in output


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        (("--rounds", "10", "--noise-multiplier", "1"), "epsilon", 6.572970),
        (("--rounds", "10", "--epsilon", "6.572970"), "noise_multiplier", 1.0),
        (("--noise-multiplier", "1", "--epsilon", "6.58"), "rounds", 10),
    ],
)
def test_plan_works_out_the_missing_one_as_json(given: tuple[str, ...], name: str, value: float) -> None:
    facts = json.loads(run("plan", "--nodes", "20", "--cohort", "4", *given, "--parameters", "100", "--json"))
    assert facts[name] == pytest.approx(value, rel=2e-5)
    assert facts["parameters"] == 100


def test_plan_reads_the_run_config_and_counts_the_adapter(llama_folder: Path) -> None:
    overrides = f"model.name='{llama_folder}' lora.r=4 strategy.fraction-train=0.1 dp.target-epsilon=4.5 dp.delta=1e-6"
    given = ("plan", "--run-config", overrides, "--project", str(PROJECT), "--json")
    facts = json.loads(run(*given, "--nodes", "50"))
    assert (facts["nodes"], facts["cohort"], facts["rounds"], facts["delta"]) == (50, 5, 3, 1e-6)
    assert facts["epsilon"] == pytest.approx(4.5, rel=1e-3)
    assert facts["parameters"] == 2 * 4 * (64 + 64 + 64 + 32)  # two layers, r=4: q is 64 to 64, v is 64 to 32
    ffa = ("plan", "--run-config", f"{overrides} lora.aggregation='ffa'", *given[3:], "--nodes", "50")
    assert json.loads(run(*ffa))["parameters"] == 2 * 4 * (64 + 32)
    assert json.loads(run(*given, "--nodes", "50", "--noise-multiplier", "2"))["noise_multiplier"] == 2
    assert json.loads(run(*given, "--nodes", "50", "--noise-multiplier", "2", "--epsilon", "8"))["rounds"] > 10


def test_plan_draws_epsilon_over_rounds(tmp_path: Path) -> None:
    picture = tmp_path / "epsilon.svg"
    CliRunner().invoke(app, ["plan", *NOTEBOOK, "--noise-multiplier", "1", "--picture", str(picture)])
    assert "<svg" in picture.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--nodes", "20", "--cohort", "4"), "exactly two must be given"),
        ((*NOTEBOOK, "--noise-multiplier", "1", "--epsilon", "1"), "exactly two must be given"),
        ((*NOTEBOOK, "--noise-multiplier", "nan"), "noise-multiplier=nan is not allowed"),
        ((*NOTEBOOK, "--epsilon", "-1"), "epsilon=-1.0 is not allowed"),
        (("--cohort", "4"), "--nodes is missing"),
        (("--nodes", "3", "--cohort", "4", "--rounds", "1", "--epsilon", "1"), "cohort=4 is not allowed"),
        (("--nodes", "9", "--cohort", "4", "--noise-multiplier", "0.1", "--epsilon", "1"), "allows not one round"),
    ],
)
def test_plan_refuses_wrong_options_with_one_line(arguments: tuple[str, ...], words: str) -> None:
    assert words in misused("plan", *arguments)


def test_plan_refuses_a_picture_it_cannot_write(tmp_path: Path) -> None:
    for name in ("no/such/folder.png", "epsilon.xyz"):
        given = ["plan", *NOTEBOOK, "--noise-multiplier", "1", "--picture", str(tmp_path / name)]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 2
        assert "cannot write the picture" in result.stderr


def test_plan_imports_no_training_library() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom fedft.cli import app\n"
        f"result = CliRunner().invoke(app, {['plan', *NOTEBOOK, '--epsilon', '4.5']!r})\n"
        "assert result.exit_code == 0, result.output\n"
        "heavy = {'torch', 'transformers', 'flwr', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'flwr', 'datasets', 'matplotlib', 'scipy'}"
    code = f"import sys, fedft, fedft.cli; sys.exit(str({heavy} & set(sys.modules)).removeprefix('set()') or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)
