"""The ServerApp: one run from its configuration to the last adapter.

`main` prepares, `_run` is the federated loop, `_Recorder` keeps what a round leaves behind.
"""

import importlib.metadata
import logging
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

import fedft
from fedft import builtin
from fedft.checkpoint import RunDirectory
from fedft.config import Settings, parse_run_config
from fedft.errors import ConfigError, FedftError
from fedft.logs import log_like_flower
from fedft.model import adapter_shapes, fingerprint, initial_adapter, save_adapter
from fedft.privacy.accounting import calibrate_noise, format_epsilon, verdict
from fedft.privacy.mechanism import GaussianReleases
from fedft.records import arrays_from_record, record_from_arrays
from fedft.report import model_card
from fedft.strategy import ClientLevelDP, CohortFedAvg, RoundReport

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
    adapter = directory.path / str(directory.state["adapter"])
    _log.info("run %s%s; adapter: %s", status, f" ({why})" if why else "", adapter)
    _log.info('ask it: fedft generate --adapter %s "What is the most common cause of hypothyroidism?"', adapter)


def _run(grid: Grid, settings: Settings, directory: RunDirectory) -> tuple[str, str]:
    """Run the rounds; return the run's final status and the reason for it."""
    directory.update(base_model=fingerprint(settings.model))
    averaging = CohortFedAvg(settings.strategy, adapter_shapes(settings.model, settings.lora), settings.seed)
    nodes = averaging.plan(grid)
    releases = _plan_privacy(settings, averaging.cohort_size)
    strategy: Strategy = ClientLevelDP(averaging, releases) if releases else averaging
    _log_plan(settings, averaging, nodes, releases)
    run = _Recorder(settings, directory, releases)

    arrays = record_from_arrays(initial_adapter(settings.model, settings.lora, settings.seed))
    timeout = settings.strategy.round_timeout
    for number in range(settings.num_server_rounds + 1):
        started = time.monotonic()
        if number:
            if releases and settings.dp.max_epsilon and releases.next_epsilon > settings.dp.max_epsilon:
                run.save(number - 1, arrays)
                return "stopped", f"round {number} would exceed dp.max-epsilon={settings.dp.max_epsilon:g}"
            config = ConfigRecord({"learning-rate": learning_rate(settings, number)})
            try:
                messages = strategy.configure_train(number, arrays, config, grid)
                trained, _ = strategy.aggregate_train(number, grid.send_and_receive(messages, timeout=timeout))
            except FedftError:
                run.save(number - 1, arrays)
                raise
            arrays = trained or arrays
        trained_at = time.monotonic()
        if _is_evaluated(settings, number):
            messages = strategy.configure_evaluate(number, arrays, ConfigRecord(), grid)
            strategy.aggregate_evaluate(number, grid.send_and_receive(messages, timeout=timeout))
        run.finish(number, arrays, averaging.report, trained_at - started, time.monotonic() - trained_at)
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
    releases: GaussianReleases | None
    first_loss: float = math.nan

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
            "epsilon": self.releases.epsilon if self.releases else None,
            "delta": self.releases.delta if self.releases else None,
            "sigma": self.releases.sigma if self.releases else None,
            "learning_rate": learning_rate(self.settings, number) if number else None,
            "cohort": report.cohort,
            "replies": report.replies,
            "failures": len(report.failures),
            "failure_reasons": report.failures[:10],
            "seconds": round(train_seconds + eval_seconds, 3),
            "train_seconds": round(train_seconds, 3),
            "eval_seconds": round(eval_seconds, 3),
            "bytes_down": report.bytes_down,
            "bytes_up": report.bytes_up,
        }
        last = number == self.settings.num_server_rounds
        due = number and (last or number % self.settings.save_every_round == 0)
        self.directory.finish_round(number, metrics, self._privacy(), self._saver(arrays) if due else None)
        self._log_round(number, report, train_seconds + eval_seconds)

    def save(self, number: int, arrays: ArrayRecord) -> None:
        """Save the adapter of the last finished round, unless it was already due."""
        if number:
            self.directory.keep_adapter(number, self._saver(arrays))

    def _saver(self, arrays: ArrayRecord) -> Callable[[Path], None]:
        def save(folder: Path) -> None:
            save_adapter(folder, arrays_from_record(arrays), self.settings.model, self.settings.lora)
            card = model_card(self.settings, self.directory.metrics, self._privacy())
            (folder / "README.md").write_text(card, encoding="utf-8")

        return save

    def _privacy(self) -> dict[str, Any]:
        return self.releases.certificate() if self.releases else {"unit": "none"}

    def _log_round(self, number: int, report: RoundReport, seconds: float) -> None:
        scores, parts = report.evaluation, []
        if scores.tokens:
            change = f" ({scores.loss - self.first_loss:+.2f})" if number else ""
            parts.append(f"held-out loss {scores.loss:.2f} ± {scores.loss_margin:.2f}{change}")
        if scores.choices:
            low, high = scores.accuracy_interval
            parts.append(f"accuracy {scores.accuracy:.0%} [{low:.0%}, {high:.0%}]")
        if number:
            parts.append(f"train loss {report.train_loss:.2f}")
        if number and self.releases:
            spent = format_epsilon(self.releases.epsilon)
            parts.append(f"σ {self.releases.sigma:.4g}, ε {spent} at δ {self.releases.delta:g}")
        if number:
            parts.append(f"{report.replies} replies, {len(report.failures)} failures")
        parts = parts or ["not evaluated"]
        _log.info("round %d/%d: %s; %.0f s", number, self.settings.num_server_rounds, "; ".join(parts), seconds)
        for reason in dict.fromkeys(report.failures):
            _log.warning("round %d: %s", number, reason)


def _plan_privacy(settings: Settings, cohort_size: int) -> GaussianReleases | None:
    dp = settings.dp
    if dp.unit == "none":
        return None
    z = calibrate_noise(dp.target_epsilon, settings.num_server_rounds, dp.delta) if dp.target_epsilon else None
    releases = GaussianReleases(dp.clipping_norm, dp.noise_multiplier if z is None else z, cohort_size, dp.delta)
    if dp.max_epsilon and releases.next_epsilon > dp.max_epsilon:
        raise ConfigError(
            f"run-config dp.max-epsilon={dp.max_epsilon:g} allows not one round: a single release at noise multiplier "
            f"{releases.noise_multiplier:g} has ε {format_epsilon(releases.next_epsilon)}; raise one or the other"
        )
    return releases


def _is_evaluated(settings: Settings, number: int) -> bool:
    due = number % settings.eval.every == 0 or number == settings.num_server_rounds
    return due and settings.strategy.fraction_evaluate > 0 and settings.data.test_fraction > 0


def _log_plan(settings: Settings, averaging: CohortFedAvg, nodes: int, releases: GaussianReleases | None) -> None:
    size = sum(math.prod(shape) for shape in averaging.shapes.values())
    _log.info(
        "%s on %s: %d nodes, %d a round, %d rounds; the adapter has %s parameters",
        settings.model.name,
        settings.data.name,
        nodes,
        averaging.cohort_size,
        settings.num_server_rounds,
        f"{size:,}",
    )
    if releases is None:
        _log.info("privacy: none (dp.unit='none')")
        return
    end = replace(releases, releases=settings.num_server_rounds)
    _log.info(
        "privacy: unit client, zero-out adjacency: C %g, z %.4g, σ %.4g; after %d releases ε %s at δ %g: %s",
        *(releases.clipping_norm, releases.noise_multiplier, releases.sigma, end.releases),
        *(format_epsilon(end.epsilon), end.delta, verdict(end.epsilon)),
    )
    _log.info(
        "privacy: the simple Rényi account would say ε %s; the noise's norm is %.3g times that of a clipped update",
        format_epsilon(end.renyi_epsilon),
        releases.sigma * math.sqrt(size) / releases.clipping_norm,
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
