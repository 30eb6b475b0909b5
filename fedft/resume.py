"""Continuing a run from its directory: what must be as it was, and where the run goes on. Knows nothing of Flower.

A run goes on after its last finished round, in the same directory. Under privacy a round that was charged and did not
finish keeps its number and stays charged: the run goes on with the number after it, so that no more than
`num-server-rounds` rounds are ever charged. Without privacy the round is repeated, with the cohort it had.

**Limits.** The checks find damage, careless edits and files that do not belong together. Whoever can write the
directory and takes the trouble can make them agree: there is no signature.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load

import fedft
from fedft.adapter import Adapter
from fedft.checkpoint import RunDirectory
from fedft.config import Settings
from fedft.errors import ConfigError, LedgerError, ResumeError
from fedft.privacy.certificate import spent_by_round
from fedft.privacy.ledger import Ledger, Mechanism
from fedft.schedule import Schedule

MAY_DIFFER = frozenset(
    {
        *("num-server-rounds", "save-every-round", "output-dir", "resume-from", "eval.examples", "eval.every"),
        *("strategy.min-available-nodes", "strategy.min-replies", "strategy.max-failed-rounds"),
        *("strategy.node-timeout", "strategy.round-timeout"),
    }
)
"""The run-config keys that may change: how far the run goes, what it waits for, scores and keeps."""


@dataclass(frozen=True)
class Position:
    """Where a run goes on.

    Attributes:
        server_round: the last round that is finished.
        trained_round: the last round that changed the adapter; 0 where none did.
        adapter: after that round.
        schedule: with the limit of the rounds planned now.
        ledger: what was charged and released, at most one round ahead of `server_round`; None without privacy.
    """

    server_round: int
    trained_round: int
    adapter: Adapter
    schedule: Schedule
    ledger: Ledger | None


def find_run(resume_from: str, output_dir: Path) -> Path:
    """Return the run directory that `resume-from` names.

    Raises:
        ConfigError: it is neither `latest` nor an absolute path, or there is no run.
    """
    path = output_dir / "latest" if resume_from.strip() == "latest" else Path(resume_from.strip()).expanduser()
    if not path.is_absolute() or not (path / "run.json").is_file():
        raise ConfigError(
            f"run-config resume-from={resume_from!r} names no run: there is no {str(path / 'run.json')!r}; give "
            "'latest', or the absolute path of a run directory; `fedft runs` lists the runs"
        )
    return path.resolve()


def check_same_run(state: Mapping[str, Any], settings: Settings) -> None:
    """Refuse to continue what `run.json` describes under other settings or another fedft.

    Raises:
        ResumeError: a key differs that must not, the run is over, or its fedft is another.
    """
    made_by = str(state.get("versions", {}).get("fedft", "unknown"))
    if _series(made_by) != _series(fedft.__version__):
        raise ResumeError(
            f"resume-from: the run was made by fedft {made_by}, this is {fedft.__version__}; use the former"
        )
    before, now = _flat(state.get("config", {})), _flat(asdict(settings))
    wrong = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    wrong = [key for key in wrong if key not in MAY_DIFFER]
    if wrong:
        listed = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in wrong)
        raise ResumeError(f"resume-from: the run was started with another configuration: {listed}; give the former")
    _check_rounds(before.get("num-server-rounds"), state, settings)


def read_position(directory: RunDirectory, settings: Settings, base_model: str) -> Position:
    """Return where a run goes on, with everything about it checked.

    Args:
        directory: reopened.
        settings: those of the run that goes on.
        base_model: the fingerprint of its base model.

    Raises:
        ResumeError: the base model is another, or the state is missing, damaged, or of another round.
        LedgerError: the ledger is damaged, or is not the one that the metrics and the state belong to.
    """
    state = directory.state
    if state.get("base_model") != base_model:
        raise ResumeError(
            f"resume-from: model.name={settings.model.name!r} has other weights than the run was made with: "
            f"{base_model}, not {state.get('base_model')}; put those back"
        )
    try:
        adapter = dict(sorted(load(directory.read_arrays()).items()))
        saved = Schedule.from_dict(state["resume"]["schedule"])
        schedule, trained_round = saved.replanned(settings.num_server_rounds), int(state["resume"]["trained_round"])
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise ResumeError(f"resume-from: the state of {str(directory.path)!r} cannot be read: {error!r}") from error
    lines = directory.metrics
    if [line["round"] for line in lines] != list(range(state["round"] + 1)):
        raise ResumeError(f"resume-from: metrics.jsonl in {str(directory.path)!r} lacks a round or has one twice")
    ledger = None
    if settings.dp.unit != "none":
        ledger = _read_ledger(directory.path)
        _check_ledger(ledger, lines)
        schedule = replace(schedule, participations=Counter(ledger.participations))
    return Position(state["round"], trained_round, adapter, schedule, ledger)


def check_mechanism(ledger: Ledger, planned: Mechanism) -> None:
    """Refuse a ledger whose mechanism is not what the run-config plans for the same nodes.

    Raises:
        LedgerError: they differ.
    """
    found = ledger.mechanism
    z = found.noise_multiplier
    if replace(planned, noise_multiplier=z) != found or not math.isclose(planned.noise_multiplier, z, rel_tol=1e-6):
        raise LedgerError(f"the saved ledger is of another mechanism, {found}, than the run-config plans, {planned}")


def _check_rounds(before: int | None, state: Mapping[str, Any], settings: Settings) -> None:
    now, done = settings.num_server_rounds, state["round"] or 0
    if now != before and settings.dp.target_epsilon:
        raise ResumeError(
            f"resume-from: run-config num-server-rounds={now} was {before}, and dp.target-epsilon="
            f"{settings.dp.target_epsilon:g} chose the noise for that; keep it, or start a new run"
        )
    if done >= now:
        raise ResumeError(
            f"resume-from: all of the run's {now} rounds are finished (status {state['status']}); raise "
            "num-server-rounds to go on"
        )


def _read_ledger(run: Path) -> Ledger:
    try:
        return Ledger.from_dict(json.loads((run / "privacy.json").read_text(encoding="utf-8"))["ledger"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"cannot read the ledger in {str(run / 'privacy.json')!r}: {error!r}") from error


def _check_ledger(ledger: Ledger, lines: list[dict[str, Any]]) -> None:
    """Refuse a ledger that is behind the metrics, more than one round ahead, or tells another story of a round."""
    done, charged = len(lines) - 1, len(ledger.entries)
    if charged not in (done, done + 1):
        raise LedgerError(
            f"the saved ledger has {charged} rounds, but {done} are finished: privacy.json does not belong to "
            "metrics.jsonl"
        )
    for line, entry in zip(lines[1:], spent_by_round(ledger), strict=False):
        for key in ("cohort", "clipping_norm", "participations"):
            if line.get(key) != entry[key]:
                raise LedgerError(
                    f"round {line['round']} has {key} {entry[key]} in the saved ledger and {line.get(key)} in "
                    "metrics.jsonl: one of them was edited"
                )


def _series(version: str) -> tuple[str, ...]:
    """Return the part of a version within which run directories stay readable: major, and minor while that is 0."""
    major, minor, *_ = [*version.split("."), "", ""]
    return (major, minor) if major == "0" else (major,)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a saved configuration under its run-config keys."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        key = prefix + name.replace("_", "-")
        flat |= _flat(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat
