"""The deployment guide, run as it stands: its blocks, with other folders and ports, as processes over TLS.

Three sites with files of three kinds, one of which refuses the run. Every process is started and ended here.
"""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import PROJECT
from flower import free_port, read_run

from fedft import builtin

pytestmark = [pytest.mark.e2e, pytest.mark.deployment, pytest.mark.builtin]

PAGE = (PROJECT / "docs/deployment.md").read_text(encoding="utf-8")
FILES = {1: "data.jsonl", 2: "data.csv", 3: "data.parquet"}


class Rehearsal:
    """The page's commands below a folder of this test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = {port: str(free_port()) for port in ("8000", "9094")}
        self.processes: list[subprocess.Popen[bytes]] = []
        (folder / "home").mkdir()
        (folder / "home" / "cache").symlink_to(builtin.ensure("builtin:smollm2-135m-instruct", "model").parent)
        self.env = {
            **os.environ,
            "HOME": str(folder),
            "FLWR_TELEMETRY_ENABLED": "0",
            "COLUMNS": "250",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def block(self, name: str, site: int = 1, run_id: str = "") -> str:
        """Return the page's block of that name, for a site, with this test's folder and ports."""
        before = self.block("environment") if name != "environment" else ""
        (text,) = re.findall(rf"<!-- test: {name} -->\n```bash\n(.*?)```", PAGE, re.DOTALL)
        if site != 1:
            self.ports.setdefault(f"909{3 + site}", str(free_port()))
        text = (
            text.replace("site-1", f"site-{site}").replace("data.jsonl", FILES[site]).replace("9094", f"909{3 + site}")
        )
        text = re.sub(r"\b(8000|909\d)\b", lambda found: self.ports[found[0]], text)
        return before + str(text.replace("/srv/fedft", str(self.folder)).replace("RUN_ID", run_id))

    def run(self, name: str, site: int = 1, seconds: float = 180, run_id: str = "") -> str:
        """Run a block to its end; return what it prints."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.block(name, site, run_id)],
            cwd=PROJECT,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, f"{name}: {done.stdout}"
        return done.stdout

    def start(self, name: str, site: int = 1) -> Path:
        """Start a block that keeps running; return its log."""
        log = self.folder / f"{name}-{site}.log"
        with log.open("wb") as out:
            command = ["bash", "-c", self.block(name, site).replace("\nflower-", "\nexec flower-")]
            self.processes.append(
                subprocess.Popen(
                    command, cwd=PROJECT, env=self.env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
                )
            )
        return log

    def listens(self, port: str, seconds: float = 180) -> None:
        """Wait until something listens on one of the page's ports."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert all(process.poll() is None for process in self.processes)
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(self.ports[port]))) == 0:
                    return
            time.sleep(0.1)
        raise TimeoutError(f"nothing listens on {port} after {seconds} s")

    def stop(self) -> None:
        """End every process of this test, and what they started; SuperNodes first."""
        for process in reversed(self.processes):
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, number)  # the group is the process's own
                    process.wait(10)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue


@pytest.fixture
def rehearsal(tmp_path: Path) -> Iterator[Rehearsal]:
    rehearsal = Rehearsal(tmp_path)
    yield rehearsal
    rehearsal.stop()


def write_data(folder: Path, site: int) -> None:
    """Write 150 questions in the shape of the built-in data, other ones at each site."""
    names = ["median nerve", "ulnar nerve", "radial artery", "femoral vein"]
    rows = [
        {
            "question": f"Which structure is number {i} of site {site}?",
            "options": names,
            "answer": names[(i + site) % 4],
        }
        for i in range(150)
    ]
    file = folder / FILES[site]
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8-sig")
    elif file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, ["question", "answer"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)


def test_three_sites_over_tls_complete_a_run_that_one_of_them_refuses(rehearsal: Rehearsal) -> None:
    rehearsal.run("certificates")
    rehearsal.start("superlink")
    rehearsal.run("name")
    for site in FILES:
        rehearsal.run("key", site)
        rehearsal.run("policy", site)
        write_data(rehearsal.folder / f"site-{site}", site)
    policies = {site: rehearsal.folder / f"site-{site}" / "policy.toml" for site in FILES}
    policies[2].write_text("")
    policies[3].write_text("maximum-epsilon = 0.5\n")
    checked = rehearsal.run("check")
    assert "ok: this site can take part in this run" in checked
    rehearsal.listens("8000")
    logs = {}
    for site in FILES:
        rehearsal.run("register", site)
        logs[site] = rehearsal.start("supernode", site)

    log = rehearsal.run("run", seconds=900)

    watched = rehearsal.run("watch")
    assert "finished:completed" in watched
    state, metrics = read_run((rehearsal.folder / "home" / "runs" / "latest").resolve())
    assert (state["status"], state["round"]) == ("completed", 2), log
    assert [(line["cohort"], line["replies"]) for line in metrics] == [(0, 0), (3, 2), (3, 2)]
    refusal = "refused by this site's policy: maximum-epsilon=0.5 at δ 1e-05, but the run's ε for this site is 2.9"
    for line in metrics:
        assert all(refusal in reason for reason in line["failure_reasons"]), line
    assert [line["failures"] for line in metrics] == [1, 1, 2]  # an evaluation, a training, and both
    assert [line["not_shared"] for line in metrics] == [1, 1, 2]  # of the site with the empty policy
    assert [line["eval_examples"] for line in metrics] == [4, 0, 4]  # of the one that shares
    assert refusal in log
    assert refusal in logs[3].read_text(encoding="utf-8")

    run_id = re.findall(r"\d{15,}", rehearsal.run("run-without-stream"))[0]
    assert "stopped" in rehearsal.run("stop", run_id=run_id) + rehearsal.run("watch")
