"""What a node trains on and is tested on: rows understood, rendered as prompts, tokenised.

The shape everywhere inside fedft, from the first line on:

- a *row* is a dictionary as the file or the Hub holds it;
- a `Record` is a row understood: the messages of the prompt, the response, and any multiple-choice options;
- an `Example` is a record as token ids: one prompt, one or more candidate completions, the index of the right one.

The test split depends on the rows and `data.test-fraction` alone, never on `seed`, so that runs stay comparable. It is
stratified by `data.partition-by` where that column exists. In a simulation the remaining rows are dealt to the nodes by
a partitioner of flwr-datasets, and the test rows in equal shares; a real site splits its own file the same way.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from fedft.config import DataSettings
from fedft.errors import DataError
from fedft.node_config import NodeSettings
from fedft.partition import share_out, split_test
from fedft.rows import Row, load_rows
from fedft.schema import Columns, Record, defects, find_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_ALPACA_HEADER = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)


@dataclass(frozen=True)
class Example:
    """A record as token ids."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    answer: int
    """The index in `completions` of the right one."""

    @property
    def completion(self) -> tuple[int, ...]:
        """The right completion."""
        return self.completions[self.answer]

    @property
    def length(self) -> int:
        """Tokens of the prompt and the right completion."""
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class Site:
    """What one node trains on and what it is tested on."""

    train: tuple[Example, ...]
    test: tuple[Example, ...]


@dataclass(frozen=True)
class Split:
    """A node's usable rows, and the columns to read in them."""

    train: tuple[Row, ...]
    test: tuple[Row, ...]
    columns: Columns


@lru_cache(maxsize=1024)  # one entry per simulated node that this process has served
def load_site(
    settings: DataSettings,
    node: NodeSettings,
    seed: int,
    max_length: int,
    load_tokenizer: Callable[[], "PreTrainedTokenizerBase"],
) -> Site:
    """Return a node's tokenised training and test examples.

    Args:
        settings: the run's data settings.
        node: which partition, or which file.
        seed: decides the partitions, not the test split.
        max_length: tokens an example may have; longer prompts lose their beginning.
        load_tokenizer: returns the base model's tokenizer; hashable, and called once.

    Raises:
        DataError: the rows cannot be read, understood or partitioned, or none are left to train on.
    """
    split = load_usable(settings, node, seed)
    tokenizer = load_tokenizer()

    def examples(rows: Sequence[Row], with_options: bool) -> tuple[Example, ...]:
        records = [split.columns.record(row, with_options) for row in rows]
        return tokenize(records, tokenizer, settings.prompt_style, max_length)

    return Site(train=examples(split.train, with_options=False), test=examples(split.test, with_options=True))


@lru_cache(maxsize=1)
def load_usable(settings: DataSettings, node: NodeSettings, seed: int) -> Split:
    """Return the rows of a node that have a prompt and a response; those that lack one are counted in the log.

    Raises:
        DataError: as `load_site`.
    """
    train, test = load_split(settings, node, seed)
    columns = columns_of([*train, *test], settings, node)
    unusable = defects([*train, *test], columns)
    if unusable:
        why = ", ".join(f"{count} where {reason}" for reason, count in unusable.most_common(3))
        _log.warning("%d of %d rows are left out: %s", unusable.total(), len(train) + len(test), why)
    usable = [tuple(row for row in rows if not columns.defect(row)) for rows in (train, test)]
    if not usable[0]:
        raise DataError(f"{_origin(settings, node)} has no row with both a prompt and a response to train on; add some")
    return Split(usable[0], usable[1], columns)


def load_split(settings: DataSettings, node: NodeSettings, seed: int) -> tuple[list[Row], list[Row]]:
    """Return a node's training rows and test rows.

    Raises:
        DataError: as `load_site`.
    """
    source, key = _source(settings, node)
    train, test = _split_rows(settings, source, key)
    indices = _partitions(settings, source, key, node.num_partitions, seed)[node.partition_id]
    if not indices:
        raise DataError(
            f"data.partitioner={settings.partitioner!r} leaves partition {node.partition_id} of {node.num_partitions} "
            "empty; use fewer SuperNodes, another partitioner, or a larger data.alpha"
        )
    return [train[i] for i in indices], list(test[node.partition_id :: node.num_partitions])


def columns_of(rows: Sequence[Row], settings: DataSettings, node: NodeSettings) -> Columns:
    """Return the columns of prompt and response: those that the node names, that the run names, or that are found.

    Raises:
        DataError: a named column is missing, or the rows follow no known schema.
    """
    named, keys = (node.prompt_column, node.response_column), "node-config *-column"
    if not any(named):
        named, keys = (settings.prompt_column.strip(), settings.response_column.strip()), "run-config data.*-column"
    return find_columns(rows, named, keys, _origin(settings, node))


def partition_sizes(settings: DataSettings, num_partitions: int, seed: int) -> list[dict[str, int]]:
    """Return for each partition how many training rows it has of each class of `data.partition-by`.

    Rows are counted under `""` where the data set lacks that column.

    Raises:
        DataError: as `load_site`, but empty partitions are returned as they are.
    """
    source, key = _source(settings, NodeSettings())
    train, _ = _split_rows(settings, source, key)
    sizes = []
    for indices in _partitions(settings, source, key, num_partitions, seed):
        classes = [str(train[i].get(settings.partition_by, "")) for i in indices]
        sizes.append({name: classes.count(name) for name in sorted(set(classes))})
    return sizes


def tokenize(
    records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase", prompt_style: str, max_length: int
) -> tuple[Example, ...]:
    """Return the records' token ids, each completion ended by the end-of-turn token.

    The chat template renders prompt and response where `prompt_style` is `chat`, or `auto` and the tokenizer has one;
    otherwise the Alpaca prompt does. Where prompt and completion exceed `max_length`, the prompt loses its beginning,
    and a completion longer than half of `max_length` its end.

    Raises:
        DataError: `chat` for a tokenizer without a template, or a template that does not end in the response.
    """
    if prompt_style == "chat" and not tokenizer.chat_template:
        raise DataError(
            "data.prompt-style='chat', but the base model's tokenizer has no chat template; use 'auto' or 'alpaca'"
        )
    if not records:
        return ()
    chat = bool(tokenizer.chat_template) and prompt_style != "alpaca"
    responses = [record.options or (record.response,) for record in records]
    if chat:
        rendered = [_render_chat(record, texts, tokenizer) for record, texts in zip(records, responses, strict=True)]
    else:
        end = str(tokenizer.eos_token or "")
        rendered = [
            (render_alpaca(record), [text + end for text in texts])
            for record, texts in zip(records, responses, strict=True)
        ]
    # two calls for all records: the tokenizer is much slower one text at a time
    prompts = tokenizer([prompt for prompt, _ in rendered], add_special_tokens=not chat)["input_ids"]
    completions = iter(
        tokenizer([text for _, texts in rendered for text in texts], add_special_tokens=False)["input_ids"]
    )
    examples = []
    for record, texts, prompt in zip(records, responses, prompts, strict=True):
        ids = tuple(tuple(next(completions)[: max_length // 2]) for _ in texts)
        keep = max_length - max(map(len, ids))
        examples.append(Example(prompt=tuple(prompt[-keep:]), completions=ids, answer=texts.index(record.response)))
    return tuple(examples)


def render_alpaca(record: Record) -> str:
    """Return the Alpaca prompt of a record (Taori et al., 2023, Stanford Alpaca)."""
    instruction = "\n\n".join(text for _, text in record.messages)
    return f"{_ALPACA_HEADER}\n\n### Instruction:\n{instruction}\n\n### Response:\n"


def render_prompt(question: str, tokenizer: "PreTrainedTokenizerBase", prompt_style: str) -> str:
    """Return the prompt of one free question, as `tokenize` renders a record's."""
    record = Record((("user", question),), "")
    if tokenizer.chat_template and prompt_style != "alpaca":
        return _render_chat(record, ("",), tokenizer)[0]
    return render_alpaca(record)


def _render_chat(
    record: Record, responses: Sequence[str], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[str, list[str]]:
    messages = [{"role": role, "content": text} for role, text in record.messages]
    prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    completions = []
    for response in responses:
        turn = [*messages, {"role": "assistant", "content": response}]
        whole = str(tokenizer.apply_chat_template(turn, tokenize=False))
        if not whole.startswith(prompt):
            raise DataError(
                "the tokenizer's chat template does not end in the response; use data.prompt-style='alpaca'"
            )
        completions.append(whole[len(prompt) :].rstrip())  # a newline after the end-of-turn token is never generated
    return prompt, completions


def _source(settings: DataSettings, node: NodeSettings) -> tuple[str, str]:
    """Return what is read, and the key that names it."""
    return (node.data_path, "node-config data-path") if node.data_path else (settings.name, "run-config data.name")


def _origin(settings: DataSettings, node: NodeSettings) -> str:
    source, key = _source(settings, node)
    return f"{key}={source!r}"


@lru_cache(maxsize=2)
def _split_rows(settings: DataSettings, source: str, key: str) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    rows = load_rows(source, settings.split, settings.max_examples, key)
    train, test = split_test(rows, settings.test_fraction, settings.partition_by)
    if not train:
        raise DataError(
            f"run-config data.test-fraction={settings.test_fraction:g} leaves none of the {len(rows)} rows of "
            f"{key}={source!r} to train on; lower it or add rows"
        )
    return tuple(train), tuple(test)


@lru_cache(maxsize=2)
def _partitions(settings: DataSettings, source: str, key: str, count: int, seed: int) -> tuple[tuple[int, ...], ...]:
    return share_out(settings, _split_rows(settings, source, key)[0], count, seed)
