"""Start-up: a whole `flwr run` of one round with one step of one example, against a Flower app that does nothing.

    python benchmarks/startup.py [--repeats 3] [--output FILE]

Both run under the same SuperLink and alternate; the app that does nothing sends one message to each of two nodes and
imports nothing but Flower and NumPy. fedft evaluates nothing here. The built-ins are fetched before.
"""

import argparse
import tempfile
from pathlib import Path

from flower import PROJECT, Flower
from measure import alternate, publish, seconds, spread

from fedft import builtin

_APP = """
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    return Message(RecordDict({"metrics": MetricRecord({"n": 1})}), reply_to=message)

@server.main()
def main(grid, context):
    import time
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.1)
    list(grid.send_and_receive([Message(RecordDict(), node, "train") for node in nodes]))
"""
_PROJECT = """
[project]
name = "nothing"
version = "1.0.0"
license = "Apache-2.0"
dependencies = ["flwr[simulation]>=1.41"]
[tool.flwr.app]
publisher = "fedft"
[tool.flwr.app.components]
serverapp = "nothing:server"
clientapp = "nothing:client"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Time start-up.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    for kind in ("model", "data"):
        for name in builtin.names(kind):
            builtin.ensure(name, kind)
    with tempfile.TemporaryDirectory(prefix="fedft-startup-") as folder:
        nothing = Path(folder) / "nothing"
        nothing.mkdir()
        (nothing / "nothing.py").write_text(_APP, encoding="utf-8")
        (nothing / "pyproject.toml").write_text(_PROJECT, encoding="utf-8")
        flower = Flower(Path(folder))

        def run(app: Path, **overrides: object) -> float:
            flower.app = app

            def call() -> None:
                status, log = flower.wait(flower.start(**overrides), 600)
                if status != "finished:completed":
                    raise SystemExit(log)

            return seconds(call)

        least = {
            "num-server-rounds": 1,
            "train.max-steps": 1,
            "train.batch-size": 1,
            "strategy.fraction-evaluate": 0.0,
            "output-dir": str(flower.runs),
        }
        try:
            times = alternate(options.repeats, fedft=lambda: run(PROJECT, **least), nothing=lambda: run(nothing))
        finally:
            flower.stop()
    over = [a - b for a, b in zip(times["fedft"], times["nothing"], strict=True)]
    results = {
        "fedft, s": spread(times["fedft"]),
        "nothing, s": spread(times["nothing"]),
        "difference, s": spread(over),
    }
    publish("startup", results, options.output)


if __name__ == "__main__":
    main()
