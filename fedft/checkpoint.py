"""The run directory: what a run leaves on disk, written so that a killed process leaves the old state or the new one.

`<output-dir>/<UTC time>-<run id>/` holds

- `run.json`: configuration, versions, status, and `round`, the last finished round: everything else counts up to it;
- `metrics.jsonl`: one line a round, round 0 being the evaluation before training;
- `privacy.json`: the certificate, with the ledger of what was charged and released;
- `peft_<round>/`: the adapter after that round, as PEFT saves it.

`<output-dir>/latest` links to the newest. Every file is written beside its place and moved there; `run.json` goes last.
"""

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

from fedft.errors import RunDirectoryError

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class RunDirectory:
    """A run's folder, opened for writing by the one process that runs it."""

    path: Path
    state: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)

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
        run.state = {
            "run_id": run_id,
            "status": "running",
            "why": "",
            "round": None,
            "started": now.isoformat(timespec="seconds"),
            "ended": None,
            "host": platform.node(),
            "pid": os.getpid(),
            **facts,
        }
        with _as_run_directory_error(run.path):
            run.path.mkdir(parents=True)
            run._write_state()
            link = output_dir / f".latest-{run_id}"
            link.unlink(missing_ok=True)
            link.symlink_to(run.path.name)
            link.replace(output_dir / "latest")
        return run

    def finish_round(
        self,
        number: int,
        metrics: Mapping[str, Any],
        privacy: Mapping[str, Any],
        save_adapter: Callable[[Path], None] | None,
    ) -> Path | None:
        """Record a finished round as one step: it counts once `run.json` names it.

        Args:
            number: the round; 0 before training.
            metrics: its line of `metrics.jsonl`.
            privacy: the whole of `privacy.json` after it.
            save_adapter: writes the adapter's files into the folder it is given; None leaves no adapter.

        Returns:
            The adapter's folder, if one was written.

        Raises:
            RunDirectoryError: the folder cannot be written.
        """
        adapter = None
        with _as_run_directory_error(self.path):
            self.metrics.append(dict(metrics))
            if save_adapter:
                adapter = self._save_adapter(number, save_adapter)
            _write(self.path / "metrics.jsonl", "".join(json.dumps(_plain(line)) + "\n" for line in self.metrics))
            _write_json(self.path / "privacy.json", privacy)
            self.state["round"] = number
            if adapter:
                self.state["adapter"] = adapter.name
            self._write_state()
        return adapter

    def write_privacy(self, privacy: Mapping[str, Any]) -> None:
        """Replace `privacy.json` between rounds: with a round that is charged and about to run, or the final claim.

        What it charges may be one round ahead of `run.json`, never behind: a killed process has spent at most what it
        says.

        Raises:
            RunDirectoryError: the folder cannot be written.
        """
        with _as_run_directory_error(self.path):
            _write_json(self.path / "privacy.json", privacy)

    def keep_adapter(self, number: int, save_adapter: Callable[[Path], None]) -> None:
        """Save the adapter of round `number` if that round left none.

        Raises:
            RunDirectoryError: the folder cannot be written.
        """
        if not (self.path / f"peft_{number}").is_dir():
            with _as_run_directory_error(self.path):
                self.state["adapter"] = self._save_adapter(number, save_adapter).name
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
                _sync(file)
            scratch.rename(target)
        except OSError:
            shutil.rmtree(scratch, ignore_errors=True)  # leaves room on a full disk for saying so in run.json
            raise
        return target

    def _write_state(self) -> None:
        _write_json(self.path / "run.json", self.state)


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


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write(path, json.dumps(_plain(value), indent=2) + "\n")


def _plain(value: Any) -> Any:
    """Return a value as strict JSON can hold it: NaN and infinity become None and "inf"."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value != value:
        return None
    return "inf" if value == float("inf") else value


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text, encoding="utf-8")
    _sync(scratch)
    scratch.replace(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


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
