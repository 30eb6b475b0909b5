"""fedft's log in a Flower process."""

import logging

from fedft.errors import FedftError


def log_like_flower() -> None:
    """Send fedft's log where Flower's goes, and keep tracebacks for bugs: a `FedftError` says all in one line."""
    flower, own = logging.getLogger("flwr"), logging.getLogger("fedft")
    own.handlers, own.propagate = flower.handlers, False
    own.setLevel(logging.INFO)
    if drop_traceback not in flower.filters:
        flower.addFilter(drop_traceback)


def drop_traceback(record: logging.LogRecord) -> bool:
    """Let a log record pass, without the traceback of a `FedftError`."""
    if record.exc_info and isinstance(record.exc_info[1], FedftError):
        record.exc_info = None
    return True
