"""What nodes answer, read from Flower's messages. What cannot be read is a ValueError that says why."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import Message, MetricRecord

from fedft.adapter import Adapter, adapter_digest
from fedft.evaluation import EvaluationSums
from fedft.records import NOT_SHARED, arrays_from_record, record_size

_Record = TypeVar("_Record")


@dataclass(frozen=True)
class ClientReply:
    """A usable training reply: the arrays that trained, clipped by the client under privacy.

    Examples and loss are both None where the site's policy does not share them.
    """

    adapter: Adapter
    examples: int | None
    loss: float | None
    size: int
    """Bytes of the arrays."""

    @property
    def order(self) -> tuple[int, float, str]:
        """What replies are sorted by: their content, so that a sum does not depend on who was faster."""
        if self.examples is None or self.loss is None:
            return 0, 0.0, adapter_digest(self.adapter)
        return self.examples, self.loss, ""


def read_training(message: Message) -> ClientReply:
    """Return a training reply; its arrays may be of any keys and shapes.

    Raises:
        ValueError: it holds another number of records, or figures that are none.
    """
    _refuse_error(message)
    arrays = _only(message.content.array_records, "ArrayRecord")
    metrics = _only(message.content.metric_records, "MetricRecord")
    examples, loss = (None, None) if NOT_SHARED in metrics else _read_figures(metrics)
    return ClientReply(arrays_from_record(arrays), examples, loss, record_size(arrays))


def read_evaluation(message: Message) -> EvaluationSums | None:
    """Return an evaluation's sums; None where the site does not share them.

    Raises:
        ValueError: as `read_training`.
    """
    _refuse_error(message)
    metrics = dict(_only(message.content.metric_records, "MetricRecord"))
    return None if NOT_SHARED in metrics else EvaluationSums.from_metrics(metrics)  # type: ignore[arg-type]


def weights(examples: list[int | None]) -> list[float]:
    """Return each reply's share of the average: by examples, the unknown ones as the average of the known."""
    known = [count for count in examples if count is not None]
    average = sum(known) / len(known) if known else 1.0
    shares = [average if count is None else count for count in examples]
    return [share / sum(shares) for share in shares]


def _read_figures(metrics: MetricRecord) -> tuple[int, float]:
    examples, loss = metrics.get("num-examples"), metrics.get("train_loss")
    if not isinstance(examples, int) or examples < 1:
        raise ValueError(f"num-examples={examples!r} is not a whole number >= 1")
    if not isinstance(loss, float) or not math.isfinite(loss):
        raise ValueError(f"train_loss={loss!r} is not a finite number")
    return examples, loss


def _refuse_error(message: Message) -> None:
    """Raise the last line of an error reply: the message of the exception, where it holds a traceback."""
    if message.has_error():
        lines = (message.error.reason or "").strip().splitlines()
        raise ValueError(lines[-1] if lines else f"error code {message.error.code}")


def _only(records: Mapping[str, _Record], kind: str) -> _Record:
    if len(records) != 1:
        raise ValueError(f"the reply holds {len(records)} {kind}s instead of one")
    return next(iter(records.values()))
