"""Federated rounds in a real `flwr run` simulation against a bare PyTorch loop over the same examples in one process.

    python benchmarks/round.py [--nodes 2] [--cohort 2] [--steps 8] [--batch-size 8] [--rounds 4] [--actors 1]

Runs of the app and of the loop alternate; rounds after the first count, for in the first every process loads the model.
Nothing is evaluated. The loop is a for-statement over the batches that the clients draw: forward, backward, AdamW, the
same loss and attention, no trainer, no messages, no clipping of the update. `--nodes 20 --cohort 4 --steps 1
--batch-size 2` is the workload of Flower's FlowerTune example.
"""

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from flower import Flower, read_run
from measure import publish, seconds, spread
from presets import settings_with

from fedft import task
from fedft.client_app import _round_seed
from fedft.config import Settings
from fedft.data import load_site
from fedft.model import initial_adapter, load_model, load_tokenizer, set_adapter
from fedft.node_config import NodeSettings


def main() -> None:
    parser = argparse.ArgumentParser(description="Time federated rounds.")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cohort", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    overrides = {
        "num-server-rounds": options.rounds,
        "save-every-round": options.rounds,
        "train.max-steps": options.steps,
        "train.batch-size": options.batch_size,
        "strategy.fraction-train": options.cohort / options.nodes,
        "strategy.fraction-evaluate": 0.0,
        "strategy.min-available-nodes": options.nodes,
    }
    settings = settings_with(**overrides)
    cpus = max(1, (os.cpu_count() or 1) // options.actors)
    federated: list[float] = []
    bare: list[float] = []
    with tempfile.TemporaryDirectory(prefix="fedft-round-") as folder:
        flower = Flower(Path(folder))
        try:
            for _ in range(options.repeats):
                federation = f"num-supernodes={options.nodes} client-resources-num-cpus={cpus}"
                run = flower.start(federation, **overrides, **{"output-dir": str(flower.runs)})
                status, log = flower.wait(run, 1800)
                if status != "finished:completed":
                    raise SystemExit(log)
                federated += [line["seconds"] for line in read_run(flower.latest())[1][2:]]
                bare += bare_rounds(settings, options.nodes, options.cohort, options.rounds)[1:]
        finally:
            flower.stop()
    overhead = [(a - b) / options.cohort for a, b in zip(federated, bare, strict=True)]
    publish(
        "round",
        {
            "federated round, s": spread(federated),
            "bare loop, s": spread(bare),
            "federated / bare": float(np.median(federated) / np.median(bare)),
            "overhead per client message, s": spread(overhead),
        },
        options.output,
    )


def bare_rounds(settings: Settings, nodes: int, cohort: int, rounds: int) -> list[float]:
    """Return the seconds of each round of a plain training loop over the cohort's examples."""
    tokenizer = load_tokenizer(settings.model)
    model = load_model(settings.model, settings.lora)
    adapter = initial_adapter(settings.model, settings.lora, settings.seed)
    sites = [
        load_site(settings.data, NodeSettings(i, nodes), settings.seed, settings.train.max_length, lambda: tokenizer)
        for i in range(cohort)
    ]
    device = model.device

    def one_round(number: int) -> None:
        for index, site in enumerate(sites):
            set_adapter(model, adapter)
            model.train()
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
            seed = _round_seed(settings, NodeSettings(index, nodes), number)  # the examples that the client draws
            drawn = task.draw_examples(
                [example.length for example in site.train], settings.train, np.random.default_rng([seed, 0xB])
            )
            size = settings.train.batch_size
            for start in range(0, len(drawn), size):
                batch = task._collate([task._training_row(site.train[i]) for i in drawn[start : start + size]])
                labels = batch["labels"][:, 1:].to(device)
                where = (labels != -100).nonzero(as_tuple=True)
                loss = task.token_nll(model, batch["input_ids"].to(device), where, labels[where]).mean()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimiser.step()
                optimiser.zero_grad()

    with task.adapter_in_bfloat16(model):
        return [seconds(partial(one_round, number)) for number in range(1, rounds + 1)]


if __name__ == "__main__":
    main()
