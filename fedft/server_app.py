"""The ServerApp: one run from its configuration to the last adapter.

`main` prepares, `_run` is the federated loop, a `Recorder` keeps what a round leaves behind.
"""

import importlib.metadata
import logging
import math
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

import fedft
from fedft import builtin
from fedft.adapter import Adapter, check_adapter
from fedft.aggregation import most_trained
from fedft.checkpoint import RunDirectory
from fedft.config import Settings, parse_run_config
from fedft.errors import ConfigError, FederationError, FedftError, NoFurtherRoundError, RoundError
from fedft.logs import log_like_flower
from fedft.model import fingerprint, initial_adapter
from fedft.privacy.accounting import chosen_noise, format_epsilon, verdict
from fedft.privacy.ledger import Ledger, Mechanism
from fedft.private_strategy import ClientLevelDP
from fedft.recorder import Recorder
from fedft.records import record_from_arrays
from fedft.resume import Position, check_mechanism, check_same_run, find_run, read_position
from fedft.schedule import Schedule, learning_rate
from fedft.strategy import CohortFedAvg

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
    directory, position = _open(settings, context.run_id)
    _log.info("run directory: %s", directory.path)
    try:
        status, why = _run(grid, settings, directory, position)
        directory.end(status, why)
    except Exception as error:
        directory.end("failed", str(error) or type(error).__name__)
        raise
    finally:
        directory.release()
    adapter = directory.path / directory.state["adapter"] if "adapter" in directory.state else None
    _log.info("run %s%s; adapter: %s", status, f" ({why})" if why else "", adapter or "none, nothing was trained")
    if adapter:
        _log.info('ask it: fedft generate --adapter %s "What is the most common cause of hypothyroidism?"', adapter)


def _open(settings: Settings, run_id: int) -> tuple[RunDirectory, Position | None]:
    """Return a new run directory, or the one that the run goes on in and where; one that is refused stays as it is."""
    if not settings.resume_from.strip():
        return RunDirectory.create(_output_dir(settings), run_id, _facts(settings)), None
    directory = RunDirectory.reopen(find_run(settings.resume_from, _output_dir(settings)))
    try:
        check_same_run(directory.state, settings)
        position = None
        if directory.state["round"] is not None:
            position = read_position(directory, settings, fingerprint(settings.model))
        directory.begin(run_id)
        directory.update(**_facts(settings))
    except FedftError:
        directory.release()
        raise
    return directory, position


def _run(grid: Grid, settings: Settings, directory: RunDirectory, position: Position | None = None) -> tuple[str, str]:
    """Run the rounds, from the first or on from `position`; return the run's final status and the reason for it."""
    run, strategy, arrays = _prepare(grid, settings, directory, position)
    failed, allowed = 0, settings.strategy.max_failed_rounds
    for number in range(run.next_round, settings.num_server_rounds + 1):
        started, why = time.monotonic(), ""
        try:
            if number:
                arrays = _train(strategy, number, arrays, grid, settings)
        except NoFurtherRoundError as reason:
            run.close(arrays)
            return "stopped", str(reason)
        except RoundError as error:
            why = str(error)
        except FedftError:
            run.close(arrays)
            raise
        report = run.averaging.report
        report.failed, failed = why, failed + 1 if why else 0
        trained_at = time.monotonic()
        if not why and _is_evaluated(settings, number):
            messages = strategy.configure_evaluate(number, arrays, ConfigRecord(), grid)
            replies = grid.send_and_receive(messages, timeout=settings.strategy.round_timeout)
            strategy.aggregate_evaluate(number, replies)
        run.finish(number, arrays, report, trained_at - started, time.monotonic() - trained_at)
        if failed == allowed:
            run.close(arrays)
            raise FederationError(f"strategy.max-failed-rounds={allowed} reached, the last one: {why}")
    run.close(arrays)
    return "completed", ""


def _train(strategy: Strategy, number: int, arrays: ArrayRecord, grid: Grid, settings: Settings) -> ArrayRecord:
    """Return the global adapter after one round of training."""
    config = ConfigRecord({"learning-rate": learning_rate(settings, number)})
    messages = strategy.configure_train(number, arrays, config, grid)
    replies = grid.send_and_receive(messages, timeout=settings.strategy.round_timeout)
    trained, _ = strategy.aggregate_train(number, replies)
    return trained or arrays


def _prepare(
    grid: Grid, settings: Settings, directory: RunDirectory, position: Position | None
) -> tuple[Recorder, Strategy, ArrayRecord]:
    """Return the run's recorder, its strategy, and the adapter that its next round starts from."""
    first = initial_adapter(settings.model, settings.lora, settings.seed)
    averaging = CohortFedAvg(settings.strategy, settings.lora.aggregation, first, settings.seed)
    if position:
        check_adapter(position.adapter, {key: value.shape for key, value in first.items()})
        averaging.plan_on(grid, position.schedule)
    else:
        directory.update(base_model=fingerprint(settings.model))
        averaging.plan(grid, settings.num_server_rounds)
    schedule = averaging.schedule
    ledger = _plan_privacy(settings, schedule.cohort_size, schedule.limit)
    if ledger and position and position.ledger:
        check_mechanism(position.ledger, ledger.mechanism)
        ledger = position.ledger
    _log_plan(settings, schedule, first, ledger)
    run = Recorder(settings, directory, averaging, ledger)
    arrays = record_from_arrays(position.adapter if position else first)
    if position:
        run.go_on(position.server_round, position.trained_round, arrays)
    if ledger:
        return run, ClientLevelDP(averaging, ledger, settings.dp.max_epsilon, run.write_privacy), arrays
    return run, averaging, arrays


def _plan_privacy(settings: Settings, cohort_size: int, most: int) -> Ledger | None:
    """Return an empty ledger with the run's mechanism; `most` is the most rounds any node is to take part in."""
    dp = settings.dp
    if dp.unit == "none":
        return None
    z = chosen_noise(dp.target_epsilon, dp.noise_multiplier, most, dp.delta)
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


def _log_plan(settings: Settings, schedule: Schedule, first: Adapter, ledger: Ledger | None) -> None:
    size = sum(value.size for value in first.values())
    trained = most_trained(settings.lora.aggregation, {key: value.shape for key, value in first.items()})
    _log.info(
        "%s on %s: %d nodes, %d a round, %d rounds; the adapter has %s parameters%s",
        settings.model.name,
        settings.data.name,
        len(schedule.nodes),
        schedule.cohort_size,
        settings.num_server_rounds,
        f"{size:,}",
        "" if trained == size else f", {trained:,} of them train in a round ({settings.lora.aggregation})",
    )
    if ledger is None:
        _log.info("privacy: none (dp.unit='none')")
        return
    mechanism, most = ledger.mechanism, schedule.limit
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
