"""Rows understood: which columns hold prompt and response, which rows can be used, and what they say."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedft.errors import DataError
from fedft.rows import Row

_SCHEMAS = (("instruction", "output"), ("question", "answer"), ("prompt", "completion"), ("prompt", "response"))


@dataclass(frozen=True)
class Record:
    """A row understood."""

    messages: tuple[tuple[str, str], ...]
    """The prompt as (role, text) pairs, the last one the user's."""
    response: str
    options: tuple[str, ...] = ()
    """The candidate responses of a multiple-choice row, `response` among them; empty otherwise."""


@dataclass(frozen=True)
class Columns:
    """The columns of prompt and response; both `messages` for a conversational data set."""

    prompt: str
    response: str

    def __str__(self) -> str:
        return self.prompt if self.is_conversation else f"{self.prompt}/{self.response}"

    @property
    def is_conversation(self) -> bool:
        """Whether a row is a list of messages."""
        return self.prompt == self.response == "messages"

    def defect(self, row: Row) -> str:
        """Return in a few words why a row cannot be used; empty where it can."""
        if self.is_conversation:
            return "" if _is_conversation(row.get("messages")) else "messages that do not end in an assistant's answer"
        for column in (self.prompt, self.response):
            value = row.get(column)
            if not _text(value):
                kind = type(value).__name__
                return f"{column!r} is empty" if _is_scalar(value) else f"{column!r} is no text but of type {kind}"
        return ""

    def record(self, row: Row, with_options: bool) -> Record:
        """Return a usable row as a record, with its multiple-choice options where they are asked for and whole."""
        if self.is_conversation:
            turns = [(str(turn["role"]), str(turn["content"])) for turn in row["messages"]]
            return Record(tuple(turns[:-1]), turns[-1][1])
        parts = [_text(row[self.prompt])]
        if (self.prompt, self.response) == _SCHEMAS[0]:
            parts.append(_text(row.get("input")))
        answer = _text(row[self.response])
        options = row.get("options") if with_options else None
        texts = tuple(_text(option) for option in options) if isinstance(options, list) else ()
        is_choice = len(texts) > 1 and all(texts) and answer in texts
        return Record((("user", "\n\n".join(part for part in parts if part)),), answer, texts if is_choice else ())


def find_columns(rows: Iterable[Row], named: tuple[str, str], keys: str, origin: str) -> Columns:
    """Return the named columns, or those of the first known schema that the rows have.

    Args:
        rows: a column that any of them has is there.
        named: columns of prompt and response; empty where they are to be found.
        keys: the settings that name them, such as `run-config data.*-column`, for the error.
        origin: the setting that names the data, and its value, for the error.

    Raises:
        DataError: a named column is missing, or the rows follow no known schema.
    """
    present = sorted({column for row in rows for column in row})
    if any(named):
        for kind, column in zip(("prompt", "response"), named, strict=True):
            if column not in present:
                key = keys.replace("*", kind)
                raise DataError(
                    f"{key}={column!r} is not in {origin}, which has the columns {present}; name one of them"
                )
        return Columns(*named)
    if "messages" in present:
        return Columns("messages", "messages")
    for prompt, response in _SCHEMAS:
        if {prompt, response} <= set(present):
            return Columns(prompt, response)
    known = ", ".join("/".join(pair) for pair in (*_SCHEMAS, ("messages",)))
    raise DataError(
        f"{origin} has the columns {present}, none of the known schemas ({known}); name two with run-config "
        "data.prompt-column and data.response-column, or with node-config prompt-column and response-column"
    )


def defects(rows: Sequence[Row], columns: Columns) -> Counter[str]:
    """Return why rows cannot be used, and how many rows for each reason."""
    return Counter(defect for row in rows if (defect := columns.defect(row)))


def _is_conversation(messages: object) -> bool:
    """Tell whether messages are a list that ends in a non-empty answer of the assistant to someone."""
    return (
        isinstance(messages, list)
        and len(messages) >= 2
        and all(isinstance(m, dict) and _text(m.get("role")) and _text(m.get("content")) for m in messages)
        and messages[-1]["role"] == "assistant"
    )


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)


def _text(value: object) -> str:
    """Return a cell as stripped text; empty for what is missing (None or NaN) and for lists, objects and bytes."""
    return str(value).strip() if _is_scalar(value) and value is not None and value == value else ""
