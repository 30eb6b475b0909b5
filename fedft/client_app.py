"""The ClientApp: a message in, a message out. One round at one node is `_train`; scoring is `_evaluate`."""

import gc
import importlib
import logging
import time
import zlib
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
from flwr.app import Context, Error, Message, MetricRecord, MetricRecordValues, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.common.constant import ErrorCode

from fedft.adapter import Adapter, adapter_digest, new_adapter
from fedft.config import Settings, parse_run_config
from fedft.data import Site, load_site
from fedft.errors import AdapterError, FedftError
from fedft.logs import log_like_flower
from fedft.model import load_model, load_tokenizer, quiet_libraries, shapes_in
from fedft.node import NodeSettings, parse_node_config
from fedft.records import arrays_from_bytes, arrays_from_record, number_of, record_from_arrays

_log = logging.getLogger(__name__)

app = ClientApp()


@app.train(mods=[fixedclipping_mod])
def train(message: Message, context: Context) -> Message:
    """Train the received adapter on this node's data; `fixedclipping_mod` then clips the update."""
    return _answer(message, context, _train)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the received adapter on this node's held-out examples."""
    return _answer(message, context, _evaluate)


def _train(message: Message, settings: Settings, node: NodeSettings) -> RecordDict:
    from fedft import task

    started = time.monotonic()
    config = message.content.config_records["config"]
    site = _load_site(settings, node)
    adapter = _received_adapter(message, settings)
    result = task.train(
        load_model(settings.model, settings.lora),
        load_tokenizer(settings.model),
        adapter,
        site.train,
        settings.train,
        learning_rate=number_of(config, "learning-rate"),
        gradient_checkpointing=settings.model.gradient_checkpointing,
        seed=_round_seed(settings, node, int(number_of(config, "server-round"))),
        trained=message.content.array_records["arrays"],
    )
    metrics: dict[str, MetricRecordValues] = {
        "num-examples": len(site.train),
        "train_loss": result.loss,
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": time.monotonic() - started,
    }
    return RecordDict({"arrays": record_from_arrays(result.adapter), "metrics": MetricRecord(metrics)})


def _evaluate(message: Message, settings: Settings, node: NodeSettings) -> RecordDict:
    from fedft import task

    examples = _load_site(settings, node).test
    if settings.eval.examples:
        examples = examples[: settings.eval.examples]
    sums = task.evaluate(load_model(settings.model, settings.lora), _received_adapter(message, settings), examples)
    return RecordDict({"metrics": MetricRecord({**sums.as_metrics()})})


def _answer(
    message: Message, context: Context, handle: Callable[[Message, Settings, NodeSettings], RecordDict]
) -> Message:
    """Handle a message; what a user or site got wrong is answered as an error of one line, without a traceback."""
    log_like_flower()
    try:
        settings = parse_run_config(context.run_config)
        node = parse_node_config(context.node_config)
        _load(settings, node)
        return Message(handle(message, settings, node), reply_to=message)
    except FedftError as error:
        _log.error("%s", error)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message)


def _load(settings: Settings, node: NodeSettings) -> None:
    """Import and load, at a process's first message, what the handlers then find loaded.

    The garbage collector is off meanwhile: it would walk a heap that only grows, and make the imports a third longer.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        quiet_libraries()
        importlib.import_module("fedft.task")
        _load_site(settings, node)
        load_model(settings.model, settings.lora)
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


def _load_site(settings: Settings, node: NodeSettings) -> Site:
    return load_site(settings.data, node, settings.seed, settings.train.max_length, _tokenizer_loader(settings))


@lru_cache(maxsize=1)  # the same object at every call: it is part of `load_site`'s cache key
def _tokenizer_loader(settings: Settings) -> Callable[[], object]:
    return partial(load_tokenizer, settings.model)


def _round_seed(settings: Settings, node: NodeSettings, server_round: int) -> int:
    """Return the seed of a node's round: another for each round, node and run seed."""
    place = node.partition_id if not node.data_path else zlib.crc32(node.data_path.encode())
    return int(np.random.SeedSequence([settings.seed, place, server_round]).generate_state(1)[0])
