"""Learning under client-level privacy: held-out loss over aggregations, noise multipliers and seeds.

    python benchmarks/private.py [--output FILE] [--aggregations lora ffa] [--noise 0 0.5 1 2] [--seeds 0 1 2]

A cell is one whole run of the ServerApp and the ClientApp in this process: schedule, strategy, ledger, training and
checkpoint are the real ones, a stand-in for the grid calls the ClientApp, and Flower's runtime is left out. The setting
is `configs/private-1000.toml` with another noise; `--nodes`, `--cohort` and `--rounds` change its size. Afterwards base
and fine-tuned model are scored on the same held-out questions. The table gives the loss after the run, and the share of
the gap between the base model and the run with z = 0 of the same seed and aggregation that is closed.

Cells that are in the output file already are not run again, so that a grid of hours can be stopped and continued.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from flower import PROJECT, read_run
from flwr.app import Context, Message, RecordDict
from flwr.common.config import get_fused_config_from_dir, parse_config_args
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity
from safetensors.numpy import load_file

from fedft import client_app, server_app, task
from fedft.adapter import ADAPTER_FILE
from fedft.config import DataSettings, ModelSettings, Settings, parse_run_config
from fedft.data import Example, load_site, load_split
from fedft.model import initial_adapter, load_model, load_tokenizer
from fedft.node_config import NodeSettings

PRESET = PROJECT / "configs" / "private-1000.toml"


class LocalGrid:
    """Simulated nodes in this process: a message is handed to the ClientApp, its answer handed back."""

    def __init__(self, count: int, run_config: dict[str, Any]) -> None:
        self.contexts = {
            index + 1: Context(
                run_id=1,
                node_id=index + 1,
                node_config={"partition-id": index, "num-partitions": count},
                state=RecordDict(),
                run_config=run_config,
            )
            for index in range(count)
        }

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return all nodes: they are always there."""
        return [NodeInfo(node_id=node) for node in self.contexts]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Return the answers, one after the other; there is no limit of time."""
        return [client_app.app(message, self.contexts[message.metadata.dst_node_id]) for message in messages]


def main() -> None:
    options = parse_options()
    for name in ("_run_id", "_node_id", "_task_id"):  # Flower makes messages only inside a task of a run
        setattr(TaskIdentity, name, 1)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    size = {"nodes": options.nodes, "cohort": options.cohort, "rounds": options.rounds, "examples": options.examples}
    facts = {**size, "preset": options.preset.name, "run_config": options.run_config}
    results = read_results(options.output, facts)
    wanted = [(kind, z, seed) for seed in options.seeds for kind in options.aggregations for z in options.noise]
    for number, (kind, z, seed) in enumerate(wanted, start=1):
        name = f"{kind} z={z:g} seed={seed}"
        if name not in results["cells"]:
            print(f"[{number}/{len(wanted)}] {name}", flush=True)
            results["cells"][name] = run_cell(options, kind, z, seed)
            write_results(options.output, results)
        cell = results["cells"][name]
        print(
            f"[{number}/{len(wanted)}] {name}: held-out loss {cell['before']:.3f} to {cell['after']:.3f}, "
            f"ε {cell['epsilon']}, {cell['seconds']:.0f} s",
            flush=True,
        )
    print(table(results["cells"], options.aggregations, options.noise, options.seeds))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Learning under client-level privacy.")
    parser.add_argument("--aggregations", nargs="+", default=["lora", "ffa", "rolora", "fedsvd"])
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0, 0.5, 1.0, 2.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--examples", type=int, default=200, help="held-out questions; 0 is all")
    parser.add_argument("--preset", type=Path, default=PRESET)
    parser.add_argument("--run-config", default="", help="more overrides, as for flwr run")
    parser.add_argument("--output", type=Path, help="JSON file of the cells, read first and then added to")
    return parser.parse_args()


def run_cell(options: argparse.Namespace, aggregation: str, noise: float, seed: int) -> dict[str, Any]:
    """Return what one run gave: held-out loss before and after, ε, seconds."""
    with tempfile.TemporaryDirectory(prefix="fedft-private-") as folder:
        overrides = {
            **parse_config_args([str(options.preset)]),
            **parse_config_args([options.run_config]),
            "seed": seed,
            "num-server-rounds": options.rounds,
            "save-every-round": options.rounds,
            "output-dir": folder,
            "lora.aggregation": aggregation,
            "strategy.min-available-nodes": options.nodes,
            "strategy.fraction-train": options.cohort / options.nodes,
            "strategy.fraction-evaluate": 0.0,
            "strategy.min-replies": 1,
            "dp.noise-multiplier": noise,
            "dp.target-epsilon": 0.0,
            "dp.max-epsilon": 0.0,
        }
        run_config = get_fused_config_from_dir(PROJECT, overrides)
        settings = parse_run_config(run_config)
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=run_config)
        started = time.perf_counter()
        server_app.main(LocalGrid(options.nodes, run_config), context)
        seconds = time.perf_counter() - started
        directory = (Path(folder) / "latest").resolve()
        lines = read_run(directory)[1]
        adapter = load_file(directory / f"peft_{options.rounds}" / ADAPTER_FILE)
    first = initial_adapter(settings.model, settings.lora, seed)
    return {
        "before": held_out_loss(settings, first, options.examples),
        "after": held_out_loss(settings, adapter, options.examples),
        "train_losses": [round(line["train_loss"], 4) for line in lines[1:]],
        "epsilon": lines[-1]["epsilon"] if noise else None,
        "failures": sum(line["failures"] for line in lines),
        "bytes_up": sum(line["bytes_up"] for line in lines),
        "seconds": round(seconds, 1),
    }


def held_out_loss(settings: Settings, adapter: dict[str, Any], examples: int) -> float:
    """Return the loss on the same held-out questions for every cell, in nats per token."""
    chosen = held_out(settings.data, settings.model, settings.train.max_length, examples)
    return task.evaluate(load_model(settings.model, settings.lora), adapter, chosen).loss


@lru_cache(maxsize=1)
def held_out(data: DataSettings, model: ModelSettings, max_length: int, examples: int) -> tuple[Example, ...]:
    """Return the first node's share of the held-out questions, of as many nodes as make that share large enough."""
    rows = load_split(data, NodeSettings(), 0)[1]
    shares = max(1, len(rows) // examples) if examples else 1
    site = load_site(data, NodeSettings(0, shares), 0, max_length, lambda: load_tokenizer(model))
    return site.test[: examples or None]


def read_results(file: Path | None, facts: dict[str, Any]) -> dict[str, Any]:
    if not file or not file.exists():
        return {"benchmark": "private", **facts, "cells": {}}
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    other = {key: results.get(key) for key in facts if results.get(key) != facts[key]}
    if other:
        sys.exit(f"{file} holds cells of another setting: {other}; name another --output")
    return results


def write_results(file: Path | None, results: dict[str, Any]) -> None:
    if file:
        draft = file.with_suffix(".part")
        draft.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(file)


def table(cells: dict[str, Any], aggregations: list[str], noise: list[float], seeds: list[int]) -> str:
    """Return a Markdown table: mean held-out loss over the seeds, its range, and the share of the gap closed."""
    heads = " | ".join(f"z = {z:g}" for z in noise)
    rows = [f"| Aggregation | base model | {heads} |", "|---" * (len(noise) + 2) + "|"]
    for kind in aggregations:
        groups = [[cells[f"{kind} z={z:g} seed={seed}"] for seed in seeds] for z in noise]
        before = statistics.mean(cell["before"] for cell in groups[0])
        reference = [cells.get(f"{kind} z=0 seed={seed}") for seed in seeds]
        rows.append(f"| {kind} | {before:.2f} | " + " | ".join(entry(group, reference) for group in groups) + " |")
    return "\n".join(rows)


def entry(group: list[dict[str, Any]], reference: list[dict[str, Any] | None]) -> str:
    after = [cell["after"] for cell in group]
    text = f"{statistics.mean(after):.2f} [{min(after):.2f}, {max(after):.2f}]"
    gaps = [cell["before"] - best["after"] for cell, best in zip(group, reference, strict=True) if best]
    if len(gaps) < len(group) or not all(gap > 0 for gap in gaps):
        return text
    shares = [(cell["before"] - cell["after"]) / gap for cell, gap in zip(group, gaps, strict=True)]
    return f"{text}, {statistics.mean(shares):.0%}"


if __name__ == "__main__":
    main()
