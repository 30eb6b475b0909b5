"""The run directory: what a run leaves on disk, written so that a killed process leaves the old state or the new one.

`<output-dir>/<UTC time>-<run id>/` holds

- `run.json`: configuration, versions, status, and `round`, the last finished round: everything else counts up to it;
- `metrics.jsonl`: one line a round, round 0 being the evaluation before training;
- `privacy.json`: the certificate, with the ledger of what was charged and released;
- `peft_<round>/`: the adapter after that round, as PEFT saves it;
- `state_<round>.safetensors`: what the run continues from: the whole adapter after the last finished round.

`<output-dir>/latest` links to the newest. Every file is written beside its place and moved there; `run.json` goes last,
and names the state's file and its SHA-256. The one process that writes holds the lock `.lock`, which the operating
system takes back when the process ends, however it ends.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from filelock import FileLock, Timeout

from fedft.errors import ResumeError, RunDirectoryError
from fedft.files import plain, sync, write_json, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class RunDirectory:
    """A run's folder, opened for writing by the one process that runs it."""

    path: Path
    state: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """The lines of `metrics.jsonl`, as JSON has them."""
    lock: FileLock | None = None

    @classmethod
    def create(cls, output_dir: Path, run_id: int, facts: Mapping[str, Any]) -> Self:
        """Make the folder of a new run and point `latest` at it.

        Args:
            output_dir: absolute folder of the runs; made if need be.
            run_id: Flower's id of the run.
            facts: what `run.json` holds from the start, such as configuration and versions.

        Raises:
            RunDirectoryError: the folder cannot be written.
        """
        now = datetime.now(UTC)
        run = cls(output_dir / f"{now:%Y%m%dT%H%M%SZ}-{run_id}", {})
        run.state = {"run_id": run_id, "round": None, "started": now.isoformat(timespec="seconds"), **facts}
        with _as_run_directory_error(run.path):
            run.path.mkdir(parents=True)
        run._take()
        run.begin(run_id)
        with _as_run_directory_error(run.path):
            link = output_dir / f".latest-{run_id}"
            link.unlink(missing_ok=True)
            link.symlink_to(run.path.name)
            link.replace(output_dir / "latest")
        return run

    @classmethod
    def reopen(cls, path: Path) -> Self:
        """Open the folder of an earlier run for writing, as its last finished round left it; `begin` goes on in it.

        Raises:
            ResumeError: another process is writing it.
            RunDirectoryError: it is no run directory, or cannot be written.
        """
        read_state(path)
        run = cls(path.resolve(), {})
        run._take()
        try:
            run.state, run.metrics = read_state(run.path), read_metrics(run.path)
        except RunDirectoryError:
            run.release()
            raise
        return run

    def begin(self, run_id: int) -> None:
        """Enter a Flower run as the one that writes from now on, and remove what a killed one left half done.

        Raises:
            RunDirectoryError: the folder cannot be written.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        last = self.state["round"]
        self.state.setdefault("runs", []).append({"run_id": run_id, "started": now, "after_round": last})
        self.state |= {"run_id": run_id, "status": "running", "why": "", "ended": None}
        self.state |= {"host": platform.node(), "pid": os.getpid()}
        with _as_run_directory_error(self.path):
            for folder in [*self.path.glob("peft_*"), *self.path.glob(".peft_*.tmp")]:
                if folder.name.startswith(".") or int(folder.name.removeprefix("peft_")) > (last or 0):
                    shutil.rmtree(folder)
            self._write_state()

    def release(self) -> None:
        """Let another process write."""
        if self.lock:
            self.lock.release()

    def finish_round(
        self,
        number: int,
        metrics: Mapping[str, Any],
        privacy: Mapping[str, Any],
        save_adapter: Callable[[Path], None] | None,
        arrays: bytes,
        position: Mapping[str, Any],
    ) -> Path | None:
        """Record a finished round as one step: it counts once `run.json` names it.

        Args:
            number: the round; 0 before training.
            metrics: its line of `metrics.jsonl`.
            privacy: the whole of `privacy.json` after it.
            save_adapter: writes the adapter's files into the folder it is given; None leaves no adapter.
            arrays: the whole adapter, from which the run can be continued.
            position: what else it takes to continue, as JSON can hold it.

        Returns:
            The adapter's folder, if one was written.

        Raises:
            RunDirectoryError: the folder cannot be written.
        """
        adapter = None
        with _as_run_directory_error(self.path):
            self.metrics.append(plain(metrics))
            if save_adapter:
                adapter = self._save_adapter(number, save_adapter)
            state = self.path / f"state_{number}.safetensors"
            write_whole(state, arrays)
            write_whole(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.metrics).encode())
            write_json(self.path / "privacy.json", privacy)
            sha256 = hashlib.sha256(arrays).hexdigest()
            self.state |= {"round": number, "resume": {"file": state.name, "sha256": sha256, **position}}
            if adapter:
                self.state["adapter"] = adapter.name
            self._write_state()
            for old in set(self.path.glob("state_*.safetensors")) - {state}:
                old.unlink()
        return adapter

    def read_arrays(self) -> bytes:
        """Return the adapter that `finish_round` left last.

        Raises:
            ResumeError: it is missing, or is not the one that `run.json` names.
        """
        try:
            file = self.path / Path(self.state["resume"]["file"]).name
            arrays, expected = file.read_bytes(), self.state["resume"]["sha256"]
        except (OSError, KeyError, TypeError) as error:
            raise ResumeError(f"{str(self.path)!r} has no readable state to continue from: {error!r}") from error
        if hashlib.sha256(arrays).hexdigest() != expected:
            raise ResumeError(f"{str(file)!r} does not have the SHA-256 in run.json: it was damaged or edited")
        return arrays

    def write_privacy(self, privacy: Mapping[str, Any]) -> None:
        """Replace `privacy.json` between rounds: with a round that is charged and about to run, or the final claim.

        What it charges may be one round ahead of `run.json`, never behind: a killed process has spent at most what it
        says.

        Raises:
            RunDirectoryError: the folder cannot be written.
        """
        with _as_run_directory_error(self.path):
            write_json(self.path / "privacy.json", privacy)

    def keep_adapter(self, number: int, save_adapter: Callable[[Path], None]) -> None:
        """Save the adapter of round `number` if that round left none.

        Raises:
            RunDirectoryError: the folder cannot be written.
        """
        with _as_run_directory_error(self.path):
            if not (self.path / f"peft_{number}").is_dir():
                self._save_adapter(number, save_adapter)
            self.state["adapter"] = f"peft_{number}"
            self._write_state()

    def update(self, **facts: Any) -> None:
        """Add facts to `run.json`.

        Raises:
            RunDirectoryError: the folder cannot be written.
        """
        self.state |= facts
        with _as_run_directory_error(self.path):
            self._write_state()

    def end(self, status: str, why: str = "") -> None:
        """Record how the run ended: completed, stopped or failed, and the reason unless it is completed.

        Raises:
            RunDirectoryError: the folder cannot be written.
        """
        self.state |= {"status": status, "why": why, "ended": datetime.now(UTC).isoformat(timespec="seconds")}
        with _as_run_directory_error(self.path):
            self._write_state()

    def _save_adapter(self, number: int, save_adapter: Callable[[Path], None]) -> Path:
        target = self.path / f"peft_{number}"
        scratch = self.path / f".peft_{number}.tmp"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            save_adapter(scratch)
            for file in scratch.iterdir():
                sync(file)
            scratch.rename(target)
        except OSError:
            shutil.rmtree(scratch, ignore_errors=True)  # leaves room on a full disk for saying so in run.json
            raise
        return target

    def _take(self) -> None:
        """Become the one process that writes here."""
        self.lock = FileLock(self.path / ".lock", timeout=0, thread_local=False)
        with _as_run_directory_error(self.path):
            try:
                self.lock.acquire()
            except Timeout:
                raise ResumeError(
                    f"resume-from: {str(self.path)!r} is being written by a run that is still going on (pid "
                    f"{read_state(self.path)['pid']}); end it with `flwr stop` first"
                ) from None

    def _write_state(self) -> None:
        write_json(self.path / "run.json", self.state)


def read_runs(output_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the run directories below a folder with their `run.json`, oldest first; unreadable ones are left out."""
    runs = []
    for file in sorted(output_dir.glob("*/run.json")):
        if not file.parent.is_symlink():
            try:
                runs.append((file.parent, read_state(file.parent)))
            except RunDirectoryError:
                continue
    return runs


def read_state(run: Path) -> dict[str, Any]:
    """Return a run's `run.json`, with the status `killed` where it claims to run but its process is gone.

    Raises:
        RunDirectoryError: it is missing or damaged.
    """
    try:
        state = json.loads((run / "run.json").read_text(encoding="utf-8"))
        if state["status"] == "running" and state["host"] == platform.node() and not _is_alive(state["pid"]):
            state["status"] = "killed"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"{str(run)!r} is no run directory: cannot read run.json: {error}") from error
    return dict(state)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return a run's metrics up to its last finished round.

    Raises:
        RunDirectoryError: `run.json` or `metrics.jsonl` is missing or damaged.
    """
    last = read_state(run)["round"]
    if last is None:
        return []
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [line for line in map(json.loads, lines) if line["round"] <= last]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"cannot read metrics.jsonl in {str(run)!r}: {error}") from error


def find_adapter(where: Path, output_dir: Path) -> Path:
    """Return the newest adapter folder of a run directory, or the adapter folder itself.

    Args:
        where: a run directory, an adapter folder, or the name of a run directory in `output_dir`, such as `latest`.
        output_dir: folder of the runs.

    Raises:
        RunDirectoryError: there is no such folder, or the run has no adapter yet.
    """
    for candidate in (where.expanduser(), output_dir / where):
        if (candidate / "adapter_config.json").is_file():
            return candidate.resolve()
        if (candidate / "run.json").is_file():
            state = read_state(candidate)
            if "adapter" not in state:
                raise RunDirectoryError(f"{str(candidate.resolve())!r} has no adapter: the run is {state['status']}")
            return candidate.resolve() / str(state["adapter"])
    raise RunDirectoryError(
        f"{str(where)!r} is neither a run directory nor an adapter folder, here or in {str(output_dir)!r}; "
        "`fedft runs` lists the runs"
    )


def _is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    if stat.exists() and stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z":
        return False  # dead, and not yet reaped by its parent
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _as_run_directory_error(path: Path) -> "Iterator[None]":
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"cannot write the run directory {str(path)!r}: {error.strerror or error}; free some space there or set "
            "output-dir to an absolute folder you can write"
        ) from error
