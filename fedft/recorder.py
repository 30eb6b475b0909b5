"""What a finished round leaves behind: its lines in the run directory and in the log, and the run's final claim."""

import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord

from fedft.adapter import ADAPTER_FILE, adapter_bytes, adapter_digest
from fedft.checkpoint import RunDirectory
from fedft.config import Settings
from fedft.model import save_adapter
from fedft.privacy.accounting import format_epsilon
from fedft.privacy.certificate import certificate, second_opinion
from fedft.privacy.ledger import Ledger
from fedft.records import arrays_from_record
from fedft.report import model_card
from fedft.schedule import learning_rate
from fedft.strategy import CohortFedAvg, RoundReport

_log = logging.getLogger(__name__)


@dataclass
class Recorder:
    """Writes a finished round to the run directory and to the log.

    Attributes:
        next_round: the round to run next; 0 is the evaluation before training.
        trained_round: the last round that changed the adapter; 0 where none did.
    """

    settings: Settings
    directory: RunDirectory
    averaging: CohortFedAvg
    ledger: Ledger | None
    next_round: int = 0
    trained_round: int = 0
    saved: dict[str, str] = field(default_factory=dict)
    """The adapter last saved: its file below the run directory, and that file's SHA-256."""

    def go_on(self, server_round: int, trained_round: int, arrays: ArrayRecord) -> None:
        """Go on after the last finished round of an earlier process.

        A round that the ledger has charged and that did not finish is recorded as failed: its number is used up.
        """
        self.next_round, self.trained_round = server_round + 1, trained_round
        self.saved = self._adapter_on_disk()
        _log.info("the run goes on after round %d of %d", server_round, self.settings.num_server_rounds)
        for entry in self.ledger.entries[server_round:] if self.ledger else []:
            how = "its release was made and is lost" if entry.released else "nothing was released"
            why = f"the run was ended in the middle of it; {how}, its privacy is spent"
            self.finish(entry.server_round, arrays, RoundReport(cohort=len(entry.nodes), failed=why))

    def finish(
        self, number: int, arrays: ArrayRecord, report: RoundReport, train_seconds: float = 0, eval_seconds: float = 0
    ) -> None:
        """Record round `number` as one atomic step and log its line."""
        seconds = {
            "seconds": round(train_seconds + eval_seconds, 3),
            "train_seconds": round(train_seconds, 3),
            "eval_seconds": round(eval_seconds, 3),
        }
        if number and not report.failed:
            self.trained_round = number
        last = number == self.settings.num_server_rounds
        due = self.trained_round == number > 0 and (last or number % self.settings.save_every_round == 0)
        saver = self._saver(number, arrays) if due else None
        position = {"trained_round": self.trained_round, "schedule": self.averaging.schedule.to_dict()}
        packed = adapter_bytes(arrays_from_record(arrays))
        metrics = self._metrics(number, report) | seconds
        self.directory.finish_round(number, metrics, self._privacy(), saver, packed, position)
        self.next_round = number + 1
        self._log_round(number, report, train_seconds + eval_seconds)

    def close(self, arrays: ArrayRecord) -> None:
        """Save the last adapter that a round gave, unless it was already due, and write and log the final claim."""
        if self.trained_round:
            self.directory.keep_adapter(self.trained_round, self._saver(self.trained_round, arrays))
        final = self._privacy()
        if self.ledger:
            final |= second_opinion(self.ledger)
            _log.info(
                "privacy: no client was in more than %d rounds: ε %s at δ %g under zero-out adjacency, %s under "
                "replace-one; the Rényi account that most stacks print says ε %s",
                *(self.ledger.most, format_epsilon(self.ledger.epsilon), self.ledger.mechanism.delta),
                *(format_epsilon(self.ledger.epsilon_replace_one), format_epsilon(final["epsilon_renyi"])),
            )
        self.directory.write_privacy(final)

    def write_privacy(self) -> None:
        """Put the ledger on disk, ahead of the round that is charged or released and not finished."""
        self.directory.write_privacy(self._privacy())

    def _saver(self, number: int, arrays: ArrayRecord) -> Callable[[Path], None]:
        adapter = arrays_from_record(arrays)
        self.saved = {"file": f"peft_{number}/{ADAPTER_FILE}", "sha256": adapter_digest(adapter)}

        def save(folder: Path) -> None:
            save_adapter(folder, adapter, self.settings.model, self.settings.lora)
            card = model_card(self.settings, self.directory.metrics, self._privacy())
            (folder / "README.md").write_text(card, encoding="utf-8")

        return save

    def _adapter_on_disk(self) -> dict[str, str]:
        file = self.directory.path / self.directory.state.get("adapter", "") / ADAPTER_FILE
        if not file.is_file():
            return {}
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        return {"file": f"{file.parent.name}/{ADAPTER_FILE}", "sha256": sha256}

    def _privacy(self) -> dict[str, Any]:
        """Return the content of `privacy.json` now."""
        facts = {
            "aggregation": self.settings.lora.aggregation,
            "base_model": self.directory.state["base_model"],
            "adapter": self.saved,
        }
        if not self.ledger:
            return {"unit": "none", **facts}
        schedule = self.averaging.schedule
        plan = {"nodes": len(schedule.nodes), "rounds": self.settings.num_server_rounds}
        return facts | certificate(self.ledger, **plan, most_planned=schedule.limit)

    def _metrics(self, number: int, report: RoundReport) -> dict[str, Any]:
        """Return a round's line of `metrics.jsonl`, but for the seconds."""
        scores = report.evaluation
        low, high = scores.accuracy_interval
        return {
            "round": number,
            "train_loss": report.train_loss,
            "eval_loss": scores.loss,
            "eval_loss_margin": scores.loss_margin,
            "accuracy": scores.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "eval_examples": scores.examples,
            **self._spent(),
            "learning_rate": learning_rate(self.settings, number) if number else None,
            "cohort": report.cohort,
            "replies": report.replies,
            "failed": report.failed,
            "failures": len(report.failures),
            "failure_reasons": report.failures[:10],
            "not_shared": report.not_shared,
            "bytes_down": report.bytes_down,
            "bytes_up": report.bytes_up,
        }

    def _spent(self) -> dict[str, float | None]:
        """Return the privacy columns of a round's metrics."""
        if not self.ledger:
            return dict.fromkeys(
                ("epsilon", "epsilon_replace_one", "delta", "participations", "clipping_norm", "sigma")
            )
        return {
            "epsilon": self.ledger.epsilon,
            "epsilon_replace_one": self.ledger.epsilon_replace_one,
            "delta": self.ledger.mechanism.delta,
            "participations": self.ledger.most,
            "clipping_norm": self.ledger.round_clipping_norm,
            "sigma": self.ledger.sigma,
        }

    def _log_round(self, number: int, report: RoundReport, seconds: float) -> None:
        scores, parts = report.evaluation, []
        if scores.tokens:
            first = self.directory.metrics[0]["eval_loss"]
            change = f" ({scores.loss - first:+.2f})" if number and first is not None else ""
            parts.append(f"held-out loss {scores.loss:.2f} ± {scores.loss_margin:.2f}{change}")
        if scores.choices:
            low, high = scores.accuracy_interval
            parts.append(f"accuracy {scores.accuracy:.0%} [{low:.0%}, {high:.0%}]")
        if number and not math.isnan(report.train_loss):
            parts.append(f"train loss {report.train_loss:.2f}")
        if number and self.ledger:
            mechanism, spent = self.ledger.mechanism, format_epsilon(self.ledger.epsilon)
            steered = f"C {self.ledger.round_clipping_norm:.3g}, " if mechanism.clipping_quantile else ""
            parts.append(f"{steered}σ {self.ledger.sigma:.4g}, ε {spent} at δ {mechanism.delta:g}")
        if number:
            parts.append(f"{report.replies} replies, {len(report.failures)} failures")
        if report.not_shared:
            parts.append(f"{report.not_shared} without figures, by their sites' policies")
        parts = parts or ["not evaluated"]
        if report.failed:
            _log.warning("round %d failed, the adapter is as before: %s", number, report.failed)
        _log.info("round %d/%d: %s; %.0f s", number, self.settings.num_server_rounds, "; ".join(parts), seconds)
        for reason in dict.fromkeys(report.failures):
            _log.warning("round %d: %s", number, reason)
