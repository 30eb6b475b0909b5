"""Scale: rounds with 10, 100 and 1,000 SuperNodes, 50 of them (or all) a round, one step of batch 2 each.

    python benchmarks/scale.py [--nodes 10 100 1000] [--rounds 4] [--output FILE]

Prints the seconds a client costs in a round after the first, and for the process that holds server and simulation and
for the actor the peak memory, and how much of it was added after the first half of the run (`--nodes 10 --rounds 20`:
does it stay flat?). Nothing is evaluated; one actor has all cores.
"""

import argparse
import os
import tempfile
import threading
from pathlib import Path

from flower import Flower, read_run
from measure import publish, spread


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure rounds over many SuperNodes.")
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(prefix="fedft-scale-") as folder:
        flower = Flower(Path(folder))
        try:
            for nodes in options.nodes:
                samples: dict[str, list[float]] = {}
                done = threading.Event()
                watcher = threading.Thread(target=watch, args=(samples, done))
                watcher.start()
                try:
                    lines = run(flower, nodes, min(nodes, 50), options.rounds)
                finally:
                    done.set()
                    watcher.join()
                results[f"{nodes} nodes: seconds a client"] = spread(
                    [line["seconds"] / line["cohort"] for line in lines[2:]]
                )
                for name, sizes in samples.items():
                    results[f"{nodes} nodes: {name}, MiB"] = max(sizes)
                    results[f"{nodes} nodes: {name}, second half over first"] = max(sizes) / max(
                        sizes[: len(sizes) // 2]
                    )
        finally:
            flower.stop()
    publish("scale", results, options.output)


def run(flower: Flower, nodes: int, cohort: int, rounds: int) -> list[dict[str, float]]:
    """Return the lines of `metrics.jsonl` of one run."""
    overrides = {
        "num-server-rounds": rounds,
        "save-every-round": rounds,
        "train.max-steps": 1,
        "train.batch-size": 2,
        "strategy.fraction-train": cohort / nodes,
        "strategy.fraction-evaluate": 0.0,
        "strategy.min-available-nodes": nodes,
        "output-dir": str(flower.runs),
    }
    federation = f"num-supernodes={nodes} client-resources-num-cpus={os.cpu_count()}"
    status, log = flower.wait(flower.start(federation, **overrides), 3000)
    if status != "finished:completed":
        raise SystemExit(log)
    return read_run(flower.latest())[1]


def watch(samples: dict[str, list[float]], done: threading.Event) -> None:
    """Sample the resident set of the simulation process and of the largest actor twice a second, until done."""
    while not done.wait(0.5):
        now: dict[str, float] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes()
                status = (entry / "status").read_text()
            except OSError:
                continue
            kinds = {b"ClientAppActor": "actor", b"flwr-simulation": "server and simulation"}
            name = next((kinds[mark] for mark in kinds if mark in command), "")
            if name and "VmRSS:" in status:
                now[name] = max(now.get(name, 0.0), int(status.split("VmRSS:")[1].split()[0]) / 2**10)
        for name, size in now.items():
            samples.setdefault(name, []).append(size)


if __name__ == "__main__":
    main()
