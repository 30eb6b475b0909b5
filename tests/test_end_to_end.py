"""The real thing: `flwr run` with a SuperLink, a simulation and Ray in processes of their own.

Each test has its own FLWR_HOME, HOME and free ports, and ends the SuperLink it started by its pid.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PROJECT
from flower import Flower, read_run
from safetensors.numpy import load_file

from fedft import builtin
from fedft.checkpoint import read_state
from fedft.privacy.accounting import gaussian_epsilon
from fedft.privacy.ledger import Ledger

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    flower = Flower(tmp_path_factory.mktemp("flower"))
    yield flower
    flower.stop()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    words = ["nerve", "artery", "vein", "bone"]
    lines = [
        {"input": f"what is {words[i % 4]} {i}", "output": words[i % 4], "instruction": "Answer"} for i in range(80)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.builtin
def test_built_in_model_learns_from_built_in_data_under_noise(flower: Flower) -> None:
    run_id = flower.start(
        **{"output-dir": str(flower.runs), "num-server-rounds": 2, "train.max-steps": 4, "eval.examples": 16}
    )
    status, log = flower.wait(run_id, 400)
    assert status == "finished:completed", log
    state, metrics = read_run(flower.latest())
    assert (state["status"], state["round"], state["run_id"]) == ("completed", 2, int(run_id))
    assert state["base_model"].startswith("sha256 ")
    assert [line["round"] for line in metrics] == [0, 1, 2]
    assert metrics[-1]["eval_loss"] < metrics[0]["eval_loss"] - 1.0
    assert [(line["replies"], line["failures"]) for line in metrics[1:]] == [(2, 0)] * 2
    assert metrics[-1]["epsilon"] == pytest.approx(gaussian_epsilon(0.02, 2, 1e-5))
    privacy = json.loads((flower.latest() / "privacy.json").read_text())
    assert (privacy["unit"], privacy["releases"], privacy["participations"]) == ("client", 2, 2)
    assert privacy["epsilon_dp_accounting"] == pytest.approx(privacy["epsilon"], rel=1e-6)
    adapter = flower.latest() / privacy["adapter"]["file"]
    assert hashlib.sha256(adapter.read_bytes()).hexdigest() == privacy["adapter"]["sha256"]
    assert Ledger.from_dict(privacy["ledger"]).released == 2
    for words in ("σ 0.01", "this protects nobody", f"adapter: {flower.latest() / 'peft_2'}", "round 2/2"):
        assert words in log
    check_adapter_in_plain_peft(flower.latest() / "peft_2")


def check_adapter_in_plain_peft(adapter: Path) -> None:
    code = f"""
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(builtin.ensure("builtin:smollm2-135m-instruct", "model"))!r})
ids = torch.arange(20)[None]
with torch.inference_mode():
    before = base(input_ids=ids).logits
    after = PeftModel.from_pretrained(base, {str(adapter)!r})(input_ids=ids).logits
print(float((before - after).abs().max()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.01


@pytest.mark.parametrize("bits", [0, 4])
def test_notebook_preset_runs_on_local_copies_of_the_same_shapes(
    flower: Flower, gpt_neox_folder: Path, rows: Path, bits: int
) -> None:
    preset = (PROJECT / "configs/notebook.toml").read_text()
    preset = re.sub(r'name = "EleutherAI.*"', f'name = "{gpt_neox_folder}"', preset)
    preset = re.sub(r'name = "medalpaca.*"', f'name = "{rows}"', preset)
    preset = preset.replace("quantization = 4", f"quantization = {bits}")
    file = rows.parent / "notebook.toml"
    file.write_text(f'output-dir = "{flower.runs}"\n{preset}')
    nodes = "num-supernodes=20 client-resources-num-cpus=1"
    status, log = flower.wait(flower.start(nodes, run_config=str(file)), 300)
    assert status == "finished:completed", log
    assert "σ 0.0025, ε 2,801 at δ 1e-05; 4 replies, 0 failures" in log
    assert "no client was in more than 2 rounds: ε 2,801 at δ 1e-05 under zero-out adjacency" in log
    assert "this protects nobody" in log
    state, metrics = read_run(flower.latest())
    assert [line["cohort"] for line in metrics] == [0, *[4] * 10]
    assert {path.name for path in flower.latest().glob("peft_*")} == {"peft_5", "peft_10"}
    assert state["config"]["model"]["quantization"] == bits


def test_same_seed_without_privacy_gives_the_same_cohorts_and_adapter(
    flower: Flower, llama_folder: Path, rows: Path
) -> None:
    adapters = []
    for _ in range(2):
        run_id = flower.start(
            "num-supernodes=6 client-resources-num-cpus=2",
            **{
                "output-dir": str(flower.runs),
                "model.name": str(llama_folder),
                "data.name": str(rows),
                "data.prompt-style": "alpaca",
                "dp.unit": "none",
                "strategy.fraction-train": 0.5,
                "strategy.min-available-nodes": 6,
                "num-server-rounds": 2,
                "train.max-steps": 2,
                "eval.every": 2,
            },
        )
        status, log = flower.wait(run_id, 200)
        assert status == "finished:completed", log
        assert "privacy: none" in log
        adapters.append(load_file(flower.latest() / "peft_2" / "adapter_model.safetensors"))
    assert all(np.array_equal(adapters[0][key], adapters[1][key]) for key in adapters[0])


def test_run_whose_process_was_killed_goes_on_to_the_adapter_of_an_uninterrupted_one(
    flower: Flower, llama_folder: Path, rows: Path
) -> None:
    """Half of four nodes a round, so that the cohorts must be carried over to new node ids."""
    settings: dict[str, Any] = {
        "model.name": str(llama_folder),
        "data.name": str(rows),
        "data.prompt-style": "alpaca",
        "dp.unit": "none",
        "num-server-rounds": 4,
        "train.max-steps": 2,
        "strategy.fraction-train": 0.5,
        "strategy.min-available-nodes": 4,
    }
    nodes = "num-supernodes=4 client-resources-num-cpus=1"
    whole = flower.runs / "whole"
    status, log = flower.wait(flower.start(nodes, **settings, **{"output-dir": str(whole)}), 200)
    assert status == "finished:completed", log

    parts = flower.runs / "parts"
    run_id = flower.start(nodes, **settings, **{"output-dir": str(parts)})
    deadline = time.monotonic() + 200
    while not list(parts.glob("*/peft_2")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(read_run((parts / "latest").resolve())[0]["pid"], signal.SIGKILL)
    flower.wait(run_id, 200)
    killed = read_state((parts / "latest").resolve())
    assert killed["status"] == "killed"
    assert 1 <= killed["round"] < 4
    resumed = flower.start(nodes, **settings, **{"output-dir": str(parts), "resume-from": "latest"})
    status, log = flower.wait(resumed, 200)
    assert status == "finished:completed", log

    state, metrics = read_run((parts / "latest").resolve())
    assert [part["run_id"] for part in state["runs"]] == [int(run_id), int(resumed)]
    expected = [line["train_loss"] for line in read_run((whole / "latest").resolve())[1]]
    assert [line["train_loss"] for line in metrics] == expected
    adapters = [load_file(folder / "latest" / "peft_4" / "adapter_model.safetensors") for folder in (whole, parts)]
    assert all(np.array_equal(adapters[0][key], adapters[1][key]) for key in adapters[0])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"num-server-rounds": "abc"}, "num-server-rounds='abc' is not allowed: it must be a whole number"),
        ({"data.name": "/nowhere.jsonl"}, "run-config data.name='/nowhere.jsonl' does not exist on this machine"),
        ({"model.name": "/nowhere"}, "model.name='/nowhere' is no folder on this machine"),
        ({"output-dir": "relative"}, "output-dir='relative' must be an absolute path"),
    ],
)
def test_users_mistake_ends_the_run_as_failed_with_one_clear_line_and_no_traceback(
    flower: Flower, llama_folder: Path, rows: Path, overrides: dict[str, Any], line: str
) -> None:
    run_id = flower.start(
        **{"output-dir": str(flower.runs), "model.name": str(llama_folder), "data.name": str(rows), **overrides}
    )
    status, log = flower.wait(run_id, 200)
    assert status == "finished:failed"
    assert line in log
    assert "Traceback" not in log


def test_epsilon_limit_stops_the_run_before_the_round_that_would_exceed_it(
    flower: Flower, llama_folder: Path, rows: Path
) -> None:
    run_id = flower.start(
        **{
            "output-dir": str(flower.runs),
            "model.name": str(llama_folder),
            "data.name": str(rows),
            "num-server-rounds": 5,
            "save-every-round": 5,
            "train.max-steps": 1,
            "dp.noise-multiplier": 1.0,
            "dp.max-epsilon": 7.0,
        }
    )
    status, log = flower.wait(run_id, 200)
    assert status == "finished:completed", log
    state, metrics = read_run(flower.latest())
    assert (state["status"], state["adapter"]) == ("stopped", "peft_2")
    assert state["why"] == "round 3 would exceed dp.max-epsilon=7"
    assert metrics[-1]["epsilon"] == pytest.approx(gaussian_epsilon(1.0, 2, 1e-5))
