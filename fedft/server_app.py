"""The ServerApp: one run from its configuration to the last adapter.

`main` prepares, `_run` is the federated loop, `_Recorder` keeps what a round leaves behind.
"""

import importlib.metadata
import logging
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

import fedft
from fedft import builtin
from fedft.adapter import ADAPTER_FILE, Adapter, adapter_digest
from fedft.aggregation import trained_keys
from fedft.checkpoint import RunDirectory
from fedft.config import Settings, parse_run_config
from fedft.errors import ConfigError, FedftError, NoFurtherRoundError
from fedft.logs import log_like_flower
from fedft.model import fingerprint, initial_adapter, save_adapter
from fedft.privacy.accounting import calibrate_noise, format_epsilon, verdict
from fedft.privacy.certificate import certificate, second_opinion
from fedft.privacy.ledger import Ledger, Mechanism
from fedft.private_strategy import ClientLevelDP
from fedft.records import arrays_from_record, record_from_arrays
from fedft.report import model_card
from fedft.strategy import CohortFedAvg, RoundReport

_log = logging.getLogger(__name__)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federated fine-tuning that the run-config describes.

    Raises:
        FedftError: the run failed for a reason its message states; the log and `run.json` hold it too.
    """
    log_like_flower()
    try:
        _main(grid, context)
    except FedftError as error:
        _log.error("the run failed: %s", error)
        raise


def _main(grid: Grid, context: Context) -> None:
    settings = parse_run_config(context.run_config)
    directory = RunDirectory.create(_output_dir(settings), context.run_id, _facts(settings))
    _log.info("run directory: %s", directory.path)
    try:
        status, why = _run(grid, settings, directory)
    except Exception as error:
        directory.end("failed", str(error) or type(error).__name__)
        raise
    directory.end(status, why)
    adapter = directory.path / directory.state["adapter"] if "adapter" in directory.state else None
    _log.info("run %s%s; adapter: %s", status, f" ({why})" if why else "", adapter or "none, nothing was trained")
    if adapter:
        _log.info('ask it: fedft generate --adapter %s "What is the most common cause of hypothyroidism?"', adapter)


def _run(grid: Grid, settings: Settings, directory: RunDirectory) -> tuple[str, str]:
    """Run the rounds; return the run's final status and the reason for it."""
    directory.update(base_model=fingerprint(settings.model))
    first = initial_adapter(settings.model, settings.lora, settings.seed)
    averaging = CohortFedAvg(settings.strategy, settings.lora.aggregation, first, settings.seed)
    nodes = averaging.plan(grid, settings.num_server_rounds)
    ledger = _plan_privacy(settings, averaging.cohort_size, averaging.most_participations)
    _log_plan(settings, averaging, first, nodes, ledger)
    run = _Recorder(settings, directory, averaging, nodes, ledger)
    strategy: Strategy = averaging
    if ledger:
        strategy = ClientLevelDP(averaging, ledger, settings.dp.max_epsilon, run.write_privacy)

    arrays = record_from_arrays(first)
    timeout = settings.strategy.round_timeout
    for number in range(settings.num_server_rounds + 1):
        started = time.monotonic()
        if number:
            config = ConfigRecord({"learning-rate": learning_rate(settings, number)})
            try:
                messages = strategy.configure_train(number, arrays, config, grid)
                trained, _ = strategy.aggregate_train(number, grid.send_and_receive(messages, timeout=timeout))
            except NoFurtherRoundError as reason:
                run.close(number - 1, arrays)
                return "stopped", str(reason)
            except FedftError:
                run.close(number - 1, arrays)
                raise
            arrays = trained or arrays
        trained_at = time.monotonic()
        if _is_evaluated(settings, number):
            messages = strategy.configure_evaluate(number, arrays, ConfigRecord(), grid)
            strategy.aggregate_evaluate(number, grid.send_and_receive(messages, timeout=timeout))
        run.finish(number, arrays, averaging.report, trained_at - started, time.monotonic() - trained_at)
    run.close(settings.num_server_rounds, arrays)
    return "completed", ""


def learning_rate(settings: Settings, server_round: int) -> float:
    """Return a round's learning rate: a half cosine from the maximum in round 1 towards the minimum after the last."""
    low, high = settings.train.learning_rate_min, settings.train.learning_rate_max
    progress = (server_round - 1) / settings.num_server_rounds
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


@dataclass
class _Recorder:
    """Writes a finished round to the run directory and to the log."""

    settings: Settings
    directory: RunDirectory
    averaging: CohortFedAvg
    nodes: int
    ledger: Ledger | None
    first_loss: float = math.nan
    saved: dict[str, str] = field(default_factory=dict)
    """The adapter last saved: its file below the run directory, and that file's SHA-256."""

    def finish(
        self, number: int, arrays: ArrayRecord, report: RoundReport, train_seconds: float, eval_seconds: float
    ) -> None:
        """Record round `number` as one atomic step and log its line."""
        scores = report.evaluation
        if not number:
            self.first_loss = scores.loss
        low, high = scores.accuracy_interval
        metrics = {
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
            "failures": len(report.failures),
            "failure_reasons": report.failures[:10],
            "not_shared": report.not_shared,
            "seconds": round(train_seconds + eval_seconds, 3),
            "train_seconds": round(train_seconds, 3),
            "eval_seconds": round(eval_seconds, 3),
            "bytes_down": report.bytes_down,
            "bytes_up": report.bytes_up,
        }
        last = number == self.settings.num_server_rounds
        due = number and (last or number % self.settings.save_every_round == 0)
        saver = self._saver(number, arrays) if due else None
        self.directory.finish_round(number, metrics, self._privacy(), saver)
        self._log_round(number, report, train_seconds + eval_seconds)

    def close(self, number: int, arrays: ArrayRecord) -> None:
        """Save the adapter of the last finished round, unless it was already due, and write and log the final claim."""
        if number:
            self.directory.keep_adapter(number, self._saver(number, arrays))
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
        """Put the ledger on disk with a round that is charged and has not begun."""
        self.directory.write_privacy(self._privacy())

    def _saver(self, number: int, arrays: ArrayRecord) -> Callable[[Path], None]:
        adapter = arrays_from_record(arrays)
        self.saved = {"file": f"peft_{number}/{ADAPTER_FILE}", "sha256": adapter_digest(adapter)}

        def save(folder: Path) -> None:
            save_adapter(folder, adapter, self.settings.model, self.settings.lora)
            card = model_card(self.settings, self.directory.metrics, self._privacy())
            (folder / "README.md").write_text(card, encoding="utf-8")

        return save

    def _privacy(self) -> dict[str, Any]:
        """Return the content of `privacy.json` now."""
        facts = {
            "aggregation": self.settings.lora.aggregation,
            "base_model": self.directory.state["base_model"],
            "adapter": self.saved,
        }
        if not self.ledger:
            return {"unit": "none", **facts}
        plan = {"nodes": self.nodes, "rounds": self.settings.num_server_rounds}
        return facts | certificate(self.ledger, **plan, most_planned=self.averaging.most_participations)

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
            change = f" ({scores.loss - self.first_loss:+.2f})" if number else ""
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
        _log.info("round %d/%d: %s; %.0f s", number, self.settings.num_server_rounds, "; ".join(parts), seconds)
        for reason in dict.fromkeys(report.failures):
            _log.warning("round %d: %s", number, reason)


def _plan_privacy(settings: Settings, cohort_size: int, most: int) -> Ledger | None:
    """Return an empty ledger with the run's mechanism; `most` is the most rounds any node is to take part in."""
    dp = settings.dp
    if dp.unit == "none":
        return None
    z = calibrate_noise(dp.target_epsilon, most, dp.delta) if dp.target_epsilon else dp.noise_multiplier
    steering = (dp.clipping_quantile, dp.clipping_learning_rate)
    ledger = Ledger(Mechanism(dp.clipping_norm, z, cohort_size, dp.delta, *steering))
    if dp.max_epsilon and ledger.epsilon_of(1) > dp.max_epsilon:
        raise ConfigError(
            f"run-config dp.max-epsilon={dp.max_epsilon:g} allows not one round: a single release at noise multiplier "
            f"{z:g} has ε {format_epsilon(ledger.epsilon_of(1))}; raise one or the other"
        )
    return ledger


def _is_evaluated(settings: Settings, number: int) -> bool:
    due = number % settings.eval.every == 0 or number == settings.num_server_rounds
    return due and settings.strategy.fraction_evaluate > 0 and settings.data.test_fraction > 0


def _log_plan(settings: Settings, averaging: CohortFedAvg, first: Adapter, nodes: int, ledger: Ledger | None) -> None:
    size = sum(value.size for value in first.values())
    trained = max(
        sum(first[key].size for key in trained_keys(settings.lora.aggregation, number, first)) for number in (1, 2)
    )
    _log.info(
        "%s on %s: %d nodes, %d a round, %d rounds; the adapter has %s parameters%s",
        settings.model.name,
        settings.data.name,
        nodes,
        averaging.cohort_size,
        settings.num_server_rounds,
        f"{size:,}",
        "" if trained == size else f", {trained:,} of them train in a round ({settings.lora.aggregation})",
    )
    if ledger is None:
        _log.info("privacy: none (dp.unit='none')")
        return
    mechanism, most = ledger.mechanism, averaging.most_participations
    end = ledger.epsilon_of(most)
    _log.info(
        "privacy: unit client, zero-out adjacency: C %g, z %.4g, σ %.4g; a client is in at most %d rounds: "
        "ε %s at δ %g: %s",
        *(ledger.clipping_norm, mechanism.noise_multiplier, ledger.sigma, most),
        *(format_epsilon(end), mechanism.delta, verdict(end)),
    )
    _log.info(
        "privacy: the noise's norm is %.3g times that of a clipped update",
        ledger.sigma * math.sqrt(trained) / ledger.clipping_norm,
    )


def _facts(settings: Settings) -> dict[str, Any]:
    libraries = ("flwr", "torch", "transformers", "peft", "trl", "numpy")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    return {
        "config": asdict(settings),
        "versions": {"fedft": fedft.__version__, "python": platform.python_version(), **versions},
    }


def _output_dir(settings: Settings) -> Path:
    folder = Path(settings.output_dir).expanduser() if settings.output_dir.strip() else builtin.home() / "runs"
    if not folder.is_absolute():
        raise ConfigError(
            f"run-config output-dir={settings.output_dir!r} must be an absolute path: a relative one would land where "
            "the local SuperLink was started"
        )
    return folder
