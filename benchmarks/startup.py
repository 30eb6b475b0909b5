"""Start-up: a whole `flwr run` of one round with one step of one example, against Flower apps that do nothing.

    python benchmarks/startup.py [--repeats 3] [--output FILE]

All run under the same SuperLink and alternate. The app that does nothing sends one message to each of two nodes and
imports nothing but Flower and NumPy; a second one does nothing either, but its client imports the libraries that local
training needs. fedft evaluates nothing here. The built-ins are fetched before.
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
    LIBRARIES
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
        apps = {}
        for name, libraries in (("nothing", ""), ("imports", "from trl import SFTTrainer; import peft")):
            apps[name] = Path(folder) / name
            apps[name].mkdir()
            (apps[name] / "nothing.py").write_text(_APP.replace("LIBRARIES", libraries), encoding="utf-8")
            (apps[name] / "pyproject.toml").write_text(_PROJECT.replace('"nothing"', f'"{name}"'), encoding="utf-8")
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
            times = alternate(
                options.repeats,
                fedft=lambda: run(PROJECT, **least),
                nothing=lambda: run(apps["nothing"]),
                imports=lambda: run(apps["imports"]),
            )
        finally:
            flower.stop()

    def over(name: str) -> dict[str, float]:
        return spread([a - b for a, b in zip(times[name], times["nothing"], strict=True)])

    results = {
        "fedft, s": spread(times["fedft"]),
        "nothing, s": spread(times["nothing"]),
        "fedft over nothing, s": over("fedft"),
        "imports alone over nothing, s": over("imports"),
    }
    publish("startup", results, options.output)


if __name__ == "__main__":
    main()
