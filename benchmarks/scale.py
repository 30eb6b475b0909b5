"""Scale: rounds with 10, 100 and 1,000 SuperNodes, 50 of them (or all) a round, one step of batch 2 each.

    python benchmarks/scale.py [--nodes 10 100 1000] [--rounds 4] [--output FILE]

Prints the seconds a client costs in a round after the first, and the peak memory of the process that holds server and
simulation and of the largest actor. Nothing is evaluated; one actor has all cores.
"""

import argparse
import os
import tempfile
import threading
import time
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
                peaks: dict[str, float] = {}
                done = threading.Event()
                watcher = threading.Thread(target=watch, args=(peaks, done))
                watcher.start()
                try:
                    lines = run(flower, nodes, min(nodes, 50), options.rounds)
                finally:
                    done.set()
                    watcher.join()
                results[f"{nodes} nodes: seconds a client"] = spread(
                    [line["seconds"] / line["cohort"] for line in lines[2:]]
                )
                for name, peak in peaks.items():
                    results[f"{nodes} nodes: {name}, MiB"] = peak
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


def watch(peaks: dict[str, float], done: threading.Event) -> None:
    """Keep the highest resident set of the simulation process and of any actor, until done."""
    while not done.is_set():
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                status = (entry / "status").read_text()
            except OSError:
                continue
            name = (
                "actor"
                if b"ClientAppActor" in command
                else "server and simulation"
                if b"flwr-simulation" in command
                else ""
            )
            if name and "VmHWM:" in status:
                peak = int(status.split("VmHWM:")[1].split()[0]) / 2**10
                peaks[name] = max(peaks.get(name, 0.0), peak)
        time.sleep(0.5)


if __name__ == "__main__":
    main()
