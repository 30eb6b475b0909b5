"""A Flower installation of one's own: real `flwr run` with its own FLWR_HOME, HOME and free ports, ended by pid."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fedft import builtin

PROJECT = Path(__file__).parent.parent


class Flower:
    """Runs an app below a folder and reads how the run ended; use `stop` when done."""

    def __init__(self, folder: Path, app: Path = PROJECT) -> None:
        self.app = app
        self.home = folder / "flwr"
        self.runs = folder / "runs"
        self.env = {
            **os.environ,
            "HOME": str(folder),
            "FLWR_HOME": str(self.home),
            "FEDFT_HOME": str(builtin.home()),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
            "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def flwr(self, *arguments: str, timeout: float = 60) -> str:
        """Return what a `flwr` command prints."""
        done = subprocess.run(
            ["flwr", *arguments],
            cwd=self.app,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=True,
        )
        return done.stdout

    def start(self, federation: str = "", run_config: str = "", **overrides: Any) -> str:
        """Start a run and return its id; `overrides` are run-config keys, `run_config` a TOML file instead of them."""
        values = " ".join(f"{key}={value!r}" for key, value in overrides.items())
        extra = ["--federation-config", federation] if federation else []
        if run_config or values:
            extra += ["--run-config", run_config or values]
        return str(json.loads(self.flwr("run", ".", "--format", "json", *extra))["run-id"])

    def wait(self, run_id: str, seconds: float) -> tuple[str, str]:
        """Return how a run ended, such as `finished:completed`, and its whole log.

        Raises:
            TimeoutError: it did not end in time.
        """
        try:
            log = self.flwr(
                "log", run_id, "--stream", timeout=seconds
            )  # ends with the run, and costs no time till then
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"run {run_id} did not end in {seconds} s:\n{error.output}") from None
        while True:
            (row,) = json.loads(self.flwr("ls", "--run-id", run_id, "--format", "json"))["runs"]
            if row["status"].startswith("finished"):
                return row["status"], log
            time.sleep(1)

    def latest(self) -> Path:
        """Return the newest run directory."""
        return (self.runs / "latest").resolve()

    def stop(self) -> None:
        """End the SuperLink, found by its database, and with it the processes below it."""
        database = str(self.home / "local-superlink" / "state.db").encode()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if database in (entry / "cmdline").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGTERM)
            except (OSError, ValueError):
                continue


def read_run(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return `run.json` and the lines of `metrics.jsonl`."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((directory / "run.json").read_text(encoding="utf-8")), [json.loads(line) for line in lines]


def free_port() -> int:
    """Return a port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
