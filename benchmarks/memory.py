"""Peak memory of a client: base weights in full, 8 and 4 bit, with and without gradient checkpointing.

    python benchmarks/memory.py [--batch-size 8] [--steps 2] [--output FILE]

Each variant trains in a process of its own. On the CPU the figure is the process's peak resident set, Python and the
libraries included (a process that only imports them is listed first); on a GPU it is what torch allocated at the peak.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from measure import publish


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a client's peak memory.")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(train(options.variant, options.batch_size, options.steps)))
        return
    results = {}
    for variant in (
        "imports alone",
        "none",
        "none, checkpointing",
        "8 bit",
        "8 bit, checkpointing",
        "4 bit",
        "4 bit, checkpointing",
    ):
        command = [sys.executable, __file__, "--variant", variant, "--batch-size", str(options.batch_size)]
        done = subprocess.run([*command, "--steps", str(options.steps)], stdout=subprocess.PIPE, text=True, check=True)
        results[f"{variant}, MiB"] = float(json.loads(done.stdout.splitlines()[-1]))
    publish("memory", results, options.output)


def train(variant: str, batch_size: int, steps: int) -> float:
    """Train a little in this process and return its peak memory in MiB."""
    import torch
    from presets import settings_with

    from fedft import task
    from fedft.data import load_site
    from fedft.model import initial_adapter, load_model, load_tokenizer
    from fedft.node_config import NodeSettings

    if variant != "imports alone":
        bits = int(variant[0]) if variant[0].isdigit() else 0
        settings = settings_with(
            **{"model.quantization": bits, "train.batch-size": batch_size, "train.max-steps": steps}
        )
        tokenizer = load_tokenizer(settings.model)
        site = load_site(settings.data, NodeSettings(0, 2), settings.seed, settings.train.max_length, lambda: tokenizer)
        task.train(
            load_model(settings.model, settings.lora),
            tokenizer,
            initial_adapter(settings.model, settings.lora, settings.seed),
            site.train,
            settings.train,
            learning_rate=1e-4,
            gradient_checkpointing="checkpointing" in variant,
            seed=0,
        )
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
