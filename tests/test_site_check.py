import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, make_settings
from test_policy import write as write_policy
from typer.testing import CliRunner

from fedft import site_check
from fedft.cli import app
from fedft.config import Settings
from fedft.footprint import Device, estimate
from fedft.model import load_model
from fedft.node_config import NodeSettings
from fedft.privacy.accounting import gaussian_epsilon
from fedft.site_check import SiteReport, check_site, planned_run

CPU = Device("CPU", 2, 16 * 10**9, 8 * 10**9)


def site(folder: Path, rows: int = 120) -> str:
    lines = [{"question": f"what is vein {i}", "answer": "bone"} for i in range(rows)]
    lines += [{"question": "why", "answer": ""}, {"question": "why", "answer": None}, lines[0]]
    (folder / "site.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "site.jsonl")


def settings(model: Path, **changes: Any) -> Settings:
    return make_settings(**{"model__name": str(model), "lora__r": 2, "dp__noise_multiplier": 2.0, **changes})


def allowing(folder: Path, model: Path, text: str = "") -> str:
    return write_policy(folder, f'allowed-models = ["{model}"]\n{text}')


def check(folder: Path, model: Path, policy: str = "", **changes: Any) -> SiteReport:
    node = NodeSettings(data_path=site(folder), policy_path=allowing(folder, model, policy))
    return check_site(settings(model, **changes), node)


def test_site_that_fits_is_told_what_it_brings(tmp_path: Path, llama_folder: Path) -> None:
    report = check(tmp_path, llama_folder, data__test_fraction=0.1)
    assert report.ok, report.problems
    assert report.data is not None
    assert report.lengths is not None
    assert (report.data.rows, report.data.duplicates, report.data.schema) == (123, 1 + 1 - 1, "question/answer")
    assert report.data.dropped == {"'answer' is empty": 2}
    assert report.data.train + report.data.test == 121
    assert report.lengths.examples == report.data.train
    assert report.lengths.shortest <= report.lengths.median <= report.lengths.p99 <= report.lengths.longest
    assert report.lengths.completion == "bone<eos>"
    assert report.lengths.prompt.endswith("### Response:\n")
    assert report.epsilon == gaussian_epsilon(2.0, 3, 1e-5)


def test_truncated_examples_are_counted(tmp_path: Path, llama_folder: Path) -> None:
    report = check(tmp_path, llama_folder, train__max_length=8)
    assert report.lengths is not None
    assert report.lengths.truncated == report.lengths.examples > 0
    assert report.lengths.longest > 8


@pytest.mark.parametrize(
    ("policy", "changes", "problem"),
    [
        ("maximum-rounds = 2", {}, "the policy refuses this run: maximum-rounds=2"),
        ("", {"dp__unit": "none"}, "does not name dp.unit='none'"),
        ("minimum-records = 1000", {}, "minimum-records=1000, and the site has fewer"),
        ("nonsense", {}, "policy-path="),
        ("", {"data__prompt_column": "a", "data__response_column": "b"}, "data.prompt-column='a' is not in"),
        ("", {"data__test_fraction": 0.999}, "leaves none"),
    ],
)
def test_every_problem_is_found_and_the_rest_is_still_told(
    tmp_path: Path, llama_folder: Path, policy: str, changes: dict[str, Any], problem: str
) -> None:
    report = check(tmp_path, llama_folder, policy, **changes)
    assert any(problem in line for line in report.problems), report.problems
    assert report.footprint is not None


def test_model_that_does_not_fit_is_a_problem_with_remedies(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_check, "find_device", lambda: Device("CPU", 2, 10**9, 10**8))
    (problem,) = check(tmp_path, llama_folder).problems
    assert "estimated to take" in problem
    assert "model.quantization=4" in problem


def test_estimate_counts_weights_and_adapter_exactly(model_folder: Path) -> None:
    chosen = settings(model_folder, model__dtype="float32")
    found = estimate(chosen, 64, CPU)
    model = load_model(chosen.model, chosen.lora)
    frozen = sum(value.numel() for name, value in model.named_parameters() if "lora" not in name)
    trained = sum(value.numel() for name, value in model.named_parameters() if "lora" in name)
    assert (found.parameters, found.weights, found.adapter) == (frozen, 4 * frozen, 16 * trained)
    # two layers of width 64 with 4 heads, batch 8, 64 tokens, 4 bytes
    assert found.activations == 2 * 8 * 64 * 64 * (34 + 5 * 4 * 64 / 64) * 4 / 2
    assert found.loss == 3 * 4 * 8 * 32 * 512
    assert found.total == sum((found.weights, found.adapter, found.activations, found.loss, found.libraries))


def test_estimate_is_smaller_with_quantisation_and_with_checkpointing(llama_folder: Path) -> None:
    sizes = [estimate(settings(llama_folder, model__quantization=bits), 64, CPU).weights for bits in (0, 8, 4)]
    assert sizes == sorted(sizes, reverse=True)
    plain, saved = (
        estimate(settings(llama_folder, model__gradient_checkpointing=on), 64, CPU).activations for on in (False, True)
    )
    assert saved < plain
    assert estimate(settings(llama_folder), 64, Device("GPU", 2, 1, 1, 1, 1)).libraries == 0


def test_plan_takes_the_noise_from_the_target() -> None:
    run = planned_run(make_settings(dp__target_epsilon=4.0, num_server_rounds=10, strategy__fraction_train=0.5))
    assert run.participations == 5
    assert gaussian_epsilon(run.noise_multiplier, 5, 1e-5) == pytest.approx(4.0, rel=1e-6)


def command(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["check-site", "--project", str(PROJECT), *arguments], env={"COLUMNS": "300"})
    assert "Traceback" not in result.output
    return result.exit_code, result.stdout, result.stderr


def test_command_prints_a_table_and_exits_with_0_or_1(tmp_path: Path, llama_folder: Path) -> None:
    run = f"model.name='{llama_folder}' lora.r=2 dp.noise-multiplier=2.0"
    given = ("--data", site(tmp_path), "--run-config", run)
    code, output, _ = command(*given, "--policy", allowing(tmp_path, llama_folder))
    assert code == 0, output
    for words in ("question/answer", "123, 1 of them", "2 where 'answer' is empty", "bone<eos>", "ok: this site can"):
        assert words in output
    code, output, _ = command(*given)
    assert code == 1
    assert "problem: the policy refuses this run: allowed-models does not name" in output


def test_command_prints_json_that_any_reader_takes(tmp_path: Path, llama_folder: Path) -> None:
    run = f"model.name='{llama_folder}' lora.r=2 dp.noise-multiplier=0.0"
    policy = allowing(tmp_path, llama_folder, "maximum-epsilon = inf")
    code, output, _ = command("--data", site(tmp_path), "--run-config", run, "--policy", policy, "--json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    facts = json.loads(output, parse_constant=refuse)
    assert code == 0
    assert (facts["ok"], facts["epsilon"], facts["policy"]["maximum_epsilon"]) == (True, "inf", "inf")
    assert math.isclose(
        facts["footprint"]["total"], sum(v for k, v in facts["footprint"].items() if k not in ("total", "parameters"))
    )


@pytest.mark.parametrize(
    "arguments",
    [(), ("--data", "x.jsonl", "--run-config", "nonsense=1"), ("--data", "x.jsonl", "--prompt-column", "q")],
)
def test_command_used_wrongly_exits_with_2(arguments: tuple[str, ...]) -> None:
    code, output, error = command(*arguments)
    assert (code, output) == (2, "")
    assert error


def test_file_that_is_not_there_is_a_problem_and_not_misuse(tmp_path: Path, llama_folder: Path) -> None:
    run = f"model.name='{llama_folder}' dp.noise-multiplier=2.0"
    code, output, _ = command("--data", str(tmp_path / "none.jsonl"), "--run-config", run)
    assert code == 1
    assert "node-config data-path=" in output
    assert "does not exist" in output
