"""The ClientApp: a message in, a message out. One round at one node is `_train`; scoring is `_evaluate`.

At a real site its policy comes first: a message that it does not allow is answered before data or model is loaded.
"""

import gc
import importlib
import logging
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, MessageType, MetricRecord, MetricRecordValues, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.common.constant import ErrorCode
from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM

from fedft.adapter import Adapter, adapter_digest, new_adapter
from fedft.config import Settings, parse_run_config
from fedft.data import Site, load_site, load_usable
from fedft.errors import AdapterError, ConfigError, FedftError, PolicyError
from fedft.logs import log_like_flower
from fedft.model import load_model, load_tokenizer, quiet_libraries, shapes_in
from fedft.node_config import NodeSettings, parse_node_config
from fedft.records import NOT_SHARED, arrays_from_bytes, arrays_from_record, number_of, record_from_arrays

if TYPE_CHECKING:
    from fedft.policy import Policy, RunFacts

_log = logging.getLogger(__name__)

_COUNTED = "fedft-counted"
"""The record of the node's state for a run: rounds it was asked to train in, and their Σ 1/z²."""

_UNTOLD = "{} at this site, which does not share the text; the log of its SuperNode has it"

app = ClientApp()


@app.train(mods=[fixedclipping_mod])
def train(message: Message, context: Context) -> Message:
    """Train the received adapter on this node's data; `fixedclipping_mod` then clips the update."""
    return _answer(message, context, _train)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the received adapter on this node's held-out examples."""
    return _answer(message, context, _evaluate)


@dataclass(frozen=True)
class _Job:
    """What a message asks of a node, once it is allowed."""

    message: Message
    settings: Settings
    node: NodeSettings
    policy: "Policy | None"

    @property
    def shares_metrics(self) -> bool:
        return self.policy is None or self.policy.share_metrics


def _train(job: _Job) -> RecordDict:
    _load(job)
    from fedft import task

    started = time.monotonic()
    message, settings = job.message, job.settings
    config = message.content.config_records["config"]
    site = _load_site(job)
    adapter = _received_adapter(message, settings)
    result = task.train(
        load_model(settings.model, settings.lora),
        load_tokenizer(settings.model),
        adapter,
        site.train,
        settings.train,
        learning_rate=number_of(config, "learning-rate"),
        gradient_checkpointing=settings.model.gradient_checkpointing,
        seed=_round_seed(settings, job.node, int(number_of(config, "server-round"))),
        trained=message.content.array_records["arrays"],
    )
    metrics: dict[str, MetricRecordValues] = {
        "num-examples": len(site.train),
        "train_loss": result.loss,
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": time.monotonic() - started,
    }
    if not job.shares_metrics:
        metrics = {NOT_SHARED: 1}
    return RecordDict({"arrays": record_from_arrays(result.adapter), "metrics": MetricRecord(metrics)})


def _evaluate(job: _Job) -> RecordDict:
    if not job.shares_metrics:
        return RecordDict({"metrics": MetricRecord({NOT_SHARED: 1})})
    _load(job)
    from fedft import task

    settings = job.settings
    examples = _load_site(job).test
    if settings.eval.examples:
        examples = examples[: settings.eval.examples]
    model = load_model(settings.model, settings.lora)
    sums = task.evaluate(model, _received_adapter(job.message, settings), examples)
    return RecordDict({"metrics": MetricRecord({**sums.as_metrics()})})


def _answer(message: Message, context: Context, handle: Callable[[_Job], RecordDict]) -> Message:
    """Handle a message; what a user or site got wrong is answered as an error of one line, without a traceback.

    What went wrong with the data, the model or the training stays at a site that shares no metrics: its text may tell
    of the data. The reason of a refusal does not stay.
    """
    log_like_flower()
    shares = True
    try:
        job = _job(message, context)
        shares = job.shares_metrics
        return Message(handle(job), reply_to=message)
    except FedftError as error:
        _log.error("%s", error)
        told = shares or isinstance(error, ConfigError | PolicyError)
        reason = str(error) if told else _UNTOLD.format(type(error).__name__)
    except Exception as error:
        if shares:
            raise
        _log.exception("an error that is not shared")
        reason = _UNTOLD.format(type(error).__name__)
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def _job(message: Message, context: Context) -> _Job:
    """Return what a message asks, after the node's policy allowed it; a round of training is counted first.

    Raises:
        ConfigError: run-config, node-config or what the server sent is wrong.
        PolicyError: the policy refuses, or cannot be used.
    """
    settings = parse_run_config(context.run_config)
    node = parse_node_config(context.node_config)
    if not node.has_policy:
        return _Job(message, settings, node, None)
    from fedft.policy import check_run, load_policy

    try:
        policy = load_policy(node.policy_path)
    except PolicyError as error:
        _log.error("%s", error)
        raise PolicyError("refused: this site's policy cannot be used; the log of its SuperNode says why") from error
    facts = _run_facts(message, context, settings)
    check_run(policy, facts)
    context.state.config_records[_COUNTED] = ConfigRecord({"asked": facts.asked, "spent": facts.spent})
    return _Job(message, settings, node, policy)


def _run_facts(message: Message, context: Context, settings: Settings) -> "RunFacts":
    """Return what this site knows of the run: what the server announces, and what it asked of this site so far.

    Raises:
        ConfigError: a figure of the noise is missing or out of range.
    """
    from fedft.policy import RunFacts

    is_training = message.metadata.message_type == MessageType.TRAIN
    counted = context.state.config_records.get(_COUNTED, ConfigRecord({"asked": 0, "spent": 0.0}))
    asked, spent = int(number_of(counted, "asked")) + is_training, number_of(counted, "spent")
    run = (settings.model, settings.dp.unit, settings.num_server_rounds)
    if settings.dp.unit == "none":
        return RunFacts(*run, asked=asked, spent=spent)
    config = message.content.config_records["config"]
    noise, most = number_of(config, "noise-multiplier"), int(number_of(config, "most-participations"))
    bound = number_of(config, KEY_CLIPPING_NORM) if is_training else 1.0
    if not (0 <= noise < math.inf and most >= 1 and 0 < bound < math.inf):
        raise ConfigError(
            f"the server announces noise-multiplier={noise:g}, most-participations={most}, clipping-norm={bound:g}; "
            "they must be finite, the last two above 0"
        )
    cost = 1 / noise**2 if noise**2 else math.inf
    return RunFacts(*run, noise, most, asked, spent + (cost if is_training else 0.0))


def _load(job: _Job) -> None:
    """Import and load, at a process's first message, what the handlers then find loaded.

    The garbage collector is off meanwhile: it would walk a heap that only grows, and make the imports a third longer.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        quiet_libraries()
        importlib.import_module("fedft.task")
        _load_site(job)
        load_model(job.settings.model, job.settings.lora)
    finally:
        if enabled:
            gc.enable()


def _received_adapter(message: Message, settings: Settings) -> Adapter:
    """Return the global adapter: the run's first one, with what changed since and was sent in its place.

    Raises:
        AdapterError: this node derives another first adapter from the seed than the server did.
    """
    config = message.content.config_records["config"]
    first, digest = _first_adapter(settings)
    if config.get("first-adapter") != digest:
        raise AdapterError(
            "this node derives another first adapter than the server; both need the same base model, run-config and "
            "fedft"
        )
    arrays = message.content.array_records["arrays"]
    return {**first, **arrays_from_bytes(config, "frozen-arrays"), **arrays_from_record(arrays)}


@lru_cache(maxsize=1)
def _first_adapter(settings: Settings) -> tuple[Adapter, str]:
    adapter = new_adapter(shapes_in(load_model(settings.model, settings.lora)), settings.seed)
    return adapter, adapter_digest(adapter)


def _load_site(job: _Job) -> Site:
    """Return the node's examples; a site's policy is asked before tokenizer and model are loaded."""
    settings, node = job.settings, job.node
    if job.policy:
        from fedft.policy import check_records

        check_records(job.policy, len(load_usable(settings.data, node, settings.seed).train))
    return load_site(settings.data, node, settings.seed, settings.train.max_length, _tokenizer_loader(settings))


@lru_cache(maxsize=1)  # the same object at every call: it is part of `load_site`'s cache key
def _tokenizer_loader(settings: Settings) -> Callable[[], object]:
    return partial(load_tokenizer, settings.model)


def _round_seed(settings: Settings, node: NodeSettings, server_round: int) -> int:
    """Return the seed of a node's round: another for each round, node and run seed."""
    place = node.partition_id if not node.data_path else zlib.crc32(node.data_path.encode())
    return int(np.random.SeedSequence([settings.seed, place, server_round]).generate_state(1)[0])
