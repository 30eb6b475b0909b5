"""Data sets: read, split, partition, turn into prompts and completions, tokenise.

The shape everywhere inside fedft, from the first line on:

- a *row* is a dictionary as the file or the Hub holds it;
- a `Record` is a row understood: the messages of the prompt, the response, and any multiple-choice options;
- an `Example` is a record as token ids: one prompt, one or more candidate completions, the index of the right one.

The test split depends on the rows and `data.test-fraction` alone, never on `seed`, so that runs stay comparable. It is
stratified by `data.partition-by` where that column exists. In a simulation the remaining rows are dealt to the nodes by
a partitioner of flwr-datasets, and the test rows in equal shares; a real site splits its own file the same way.
"""

import csv
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedft import builtin
from fedft.config import DataSettings, NodeSettings
from fedft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]

_log = logging.getLogger(__name__)

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_SCHEMAS = (("instruction", "output"), ("question", "answer"), ("prompt", "completion"), ("prompt", "response"))
_TEST_SPLIT_KEY = 20_220_324  # any constant: it fixes which rows are held out
_ALPACA_HEADER = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)


@dataclass(frozen=True)
class Record:
    """A row understood."""

    messages: tuple[tuple[str, str], ...]
    """The prompt as (role, text) pairs, the last one the user's."""
    response: str
    options: tuple[str, ...] = ()
    """The candidate responses of a multiple-choice row, `response` among them; empty otherwise."""


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
    train, test = load_split(settings, node, seed)
    columns = _columns(train[0], settings)
    tokenizer = load_tokenizer()

    def examples(rows: Sequence[Row], with_options: bool) -> tuple[Example, ...]:
        records = (_record(row, columns, with_options) for row in rows if _is_usable(row, columns))
        return tuple(tokenize(record, tokenizer, settings.prompt_style, max_length) for record in records)

    site = Site(train=examples(train, with_options=False), test=examples(test, with_options=True))
    if not site.train:
        raise DataError(f"data {_source(settings, node)!r} has no row with both a prompt and a response")
    return site


def load_split(settings: DataSettings, node: NodeSettings, seed: int) -> tuple[list[Row], list[Row]]:
    """Return a node's training rows and test rows.

    Raises:
        DataError: as `load_site`.
    """
    source = _source(settings, node)
    train, test = _split_rows(settings, source)
    indices = _partitions(settings, source, node.num_partitions, seed)[node.partition_id]
    if not indices:
        raise DataError(
            f"data.partitioner={settings.partitioner!r} leaves partition {node.partition_id} of {node.num_partitions} "
            "empty; use fewer SuperNodes, another partitioner, or a larger data.alpha"
        )
    return [train[i] for i in indices], list(test[node.partition_id :: node.num_partitions])


def partition_sizes(settings: DataSettings, num_partitions: int, seed: int) -> list[dict[str, int]]:
    """Return for each partition how many training rows it has of each class of `data.partition-by`.

    Rows are counted under `""` where the data set lacks that column.

    Raises:
        DataError: as `load_site`, but empty partitions are returned as they are.
    """
    train, _ = _split_rows(settings, settings.name)
    sizes = []
    for indices in _partitions(settings, settings.name, num_partitions, seed):
        classes = [str(train[i].get(settings.partition_by, "")) for i in indices]
        sizes.append({name: classes.count(name) for name in sorted(set(classes))})
    return sizes


def split_test(rows: Sequence[Row], fraction: float, stratify_by: str) -> tuple[list[Row], list[Row]]:
    """Split rows into training rows and test rows, `round(fraction * len(rows))` of them, the same at every call.

    Each class of `stratify_by` gives its share up to one row (largest remainders first). Test rows come back shuffled.
    """
    total = round(fraction * len(rows))
    rng = np.random.default_rng(_TEST_SPLIT_KEY)
    strata: dict[str, list[int]] = {}
    for index in rng.permutation(len(rows)).tolist():
        strata.setdefault(str(rows[index].get(stratify_by, "")), []).append(index)
    shares = {name: fraction * len(members) for name, members in strata.items()}
    counts = {name: int(share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: (counts[name] - shares[name], name))
    for name in by_remainder[: max(0, total - sum(counts.values()))]:
        counts[name] += 1
    chosen = [index for name, members in strata.items() for index in members[: counts[name]]]
    held_out = set(chosen)
    test = [rows[i] for i in rng.permutation(chosen).tolist()]
    return [row for index, row in enumerate(rows) if index not in held_out], test


def tokenize(record: Record, tokenizer: "PreTrainedTokenizerBase", prompt_style: str, max_length: int) -> Example:
    """Return a record's token ids, each completion ended by the end-of-turn token.

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
    responses = record.options or (record.response,)
    if tokenizer.chat_template and prompt_style != "alpaca":
        prompt, completions = _render_chat(record, responses, tokenizer)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    else:
        prompt, completions = render_alpaca(record), [text + str(tokenizer.eos_token or "") for text in responses]
        prompt_ids = tokenizer(prompt)["input_ids"]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][: max_length // 2] for text in completions]
    keep = max_length - max(len(completion) for completion in ids)
    return Example(
        prompt=tuple(prompt_ids[-keep:]),
        completions=tuple(tuple(completion) for completion in ids),
        answer=responses.index(record.response),
    )


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


def _columns(row: Row, settings: DataSettings) -> tuple[str, str]:
    """Return the prompt column and the response column; both `messages` for a conversational data set."""
    present = set(row)
    if settings.prompt_column.strip():
        for key, column in (("prompt", settings.prompt_column), ("response", settings.response_column)):
            if column not in present:
                raise DataError(f"data.{key}-column={column!r} is not in the data, which has {sorted(present)}")
        return settings.prompt_column, settings.response_column
    if "messages" in present:
        return "messages", "messages"
    for prompt, response in _SCHEMAS:
        if {prompt, response} <= present:
            return prompt, response
    known = ", ".join("/".join(pair) for pair in (*_SCHEMAS, ("messages",)))
    raise DataError(
        f"the data has the columns {sorted(present)}, none of the known schemas ({known}); "
        "name two with data.prompt-column and data.response-column"
    )


def _is_usable(row: Row, columns: tuple[str, str]) -> bool:
    prompt, response = columns
    if prompt == "messages":
        return _is_conversation(row.get("messages"))
    return bool(_text(row.get(prompt)) and _text(row.get(response)))


def _is_conversation(messages: object) -> bool:
    """Tell whether messages are a list that ends in a non-empty answer of the assistant to someone."""
    return (
        isinstance(messages, list)
        and len(messages) >= 2
        and all(isinstance(m, dict) and _text(m.get("role")) and _text(m.get("content")) for m in messages)
        and messages[-1]["role"] == "assistant"
    )


def _record(row: Row, columns: tuple[str, str], with_options: bool) -> Record:
    prompt, response = columns
    if prompt == "messages":
        turns = row["messages"]
        return Record(tuple((turn["role"], turn["content"]) for turn in turns[:-1]), turns[-1]["content"])
    parts = [_text(row[prompt])]
    if (prompt, response) == _SCHEMAS[0]:
        parts.append(_text(row.get("input")))
    answer = _text(row[response])
    options = row.get("options") if with_options else None
    texts = tuple(_text(option) for option in options) if isinstance(options, list) else ()
    is_choice = len(texts) > 1 and all(texts) and answer in texts
    return Record((("user", "\n\n".join(part for part in parts if part)),), answer, texts if is_choice else ())


def _text(value: object) -> str:
    """Return a cell as stripped text; empty for what is missing (None or NaN)."""
    return "" if value is None or value != value else str(value).strip()


def _source(settings: DataSettings, node: NodeSettings) -> str:
    return node.data_path or settings.name


@lru_cache(maxsize=2)
def _split_rows(settings: DataSettings, source: str) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    rows = _load_rows(source, settings.split, settings.max_examples)
    train, test = split_test(rows, settings.test_fraction, settings.partition_by)
    if not train:
        raise DataError(f"data.test-fraction={settings.test_fraction:g} leaves none of {len(rows)} rows to train on")
    return tuple(train), tuple(test)


def _load_rows(source: str, split: str, limit: int) -> list[Row]:
    if builtin.is_builtin(source):
        rows = _read_path(builtin.ensure(source, "data"))
    elif (path := Path(source).expanduser()).exists():
        rows = _read_path(path)
    elif source.startswith(("/", ".", "~")) or source.endswith(_SUFFIXES):
        raise DataError(f"data path {source!r} does not exist on this machine; give an absolute path that does")
    else:
        rows = _read_hub(source, split)
    if not rows:
        raise DataError(f"data {source!r} has no rows")
    if limit and limit < len(rows):
        keep = np.random.default_rng(_TEST_SPLIT_KEY).permutation(len(rows))[:limit]
        rows = [rows[i] for i in sorted(keep.tolist())]
    return rows


def _read_path(path: Path) -> list[Row]:
    files = sorted(f for f in path.iterdir() if f.suffix in _SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise DataError(f"data folder {str(path)!r} holds no file that ends in {', '.join(_SUFFIXES)}")
    rows: list[Row] = []
    for file in files:
        if file.suffix not in _SUFFIXES:
            raise DataError(f"data file {str(file)!r} must end in one of {', '.join(_SUFFIXES)}")
        try:
            rows += _READERS[file.suffix](file)
        except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:  # pyarrow's errors are ValueErrors
            raise DataError(f"cannot read data file {str(file)!r} as {file.suffix[1:]}: {error}") from error
    if len({frozenset(row) for row in rows}) > 1 and len(files) > 1:
        raise DataError(f"the files in {str(path)!r} have different columns; make them alike, or name one file")
    return rows


def _read_jsonl(file: Path) -> list[Row]:
    rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number} is not JSON: {error}") from error
    return _objects(rows)


def _read_json(file: Path) -> list[Row]:
    return _objects(json.loads(file.read_text(encoding="utf-8")))


def _objects(rows: object) -> list[Row]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it must hold a list of objects")
    return rows


def _read_csv(file: Path) -> list[Row]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return list(csv.DictReader(lines, strict=True))


def _read_parquet(file: Path) -> list[Row]:
    import pyarrow.parquet

    return list(pyarrow.parquet.read_table(file).to_pylist())


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_hub(name: str, split: str) -> list[Row]:
    import datasets

    datasets.disable_progress_bars()
    try:
        return list(datasets.load_dataset(name, split=split).to_list())
    except Exception as error:  # the Hub client raises a dozen unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"cannot load data.name={name!r}, data.split={split!r} from the Hub: {reason}; check both and the network, "
            f"or use a local path or {', '.join(builtin.names('data'))}"
        ) from error


@lru_cache(maxsize=2)
def _partitions(settings: DataSettings, source: str, count: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Return each partition's indices into the training rows."""
    train, _ = _split_rows(settings, source)
    if count == 1:
        return (tuple(range(len(train))),)
    if count > len(train):
        raise DataError(
            f"{count} SuperNodes cannot share the {len(train)} training rows; use at most that many SuperNodes, "
            "or raise data.max-examples"
        )
    column = settings.partition_by
    if settings.partitioner in ("dirichlet", "natural") and column not in train[0]:
        raise DataError(
            f"data.partition-by={column!r} is not in the data, which has {sorted(train[0])}; "
            f"data.partitioner={settings.partitioner!r} needs it"
        )
    order = np.random.default_rng(seed).permutation(len(train)).tolist()
    classes = [str(train[i].get(column, "")) for i in order]
    if settings.partitioner == "natural":
        parts = _deal_groups(classes, count, column)
    else:
        parts = _flwr_partitions(settings, classes, count, seed)
    return tuple(tuple(order[position] for position in part) for part in parts)


def _deal_groups(classes: list[str], count: int, column: str) -> list[list[int]]:
    """Give each partition whole classes: the largest class first, always to the smallest partition."""
    groups: dict[str, list[int]] = {}
    for position, name in enumerate(classes):
        groups.setdefault(name, []).append(position)
    if count > len(groups):
        raise DataError(
            f"data.partition-by={column!r} has {len(groups)} distinct values, fewer than the {count} SuperNodes; "
            "use at most that many, or another data.partitioner"
        )
    parts: list[list[int]] = [[] for _ in range(count)]
    for name in sorted(groups, key=lambda group: (-len(groups[group]), group)):
        min(parts, key=len).extend(groups[name])
    return parts


def _flwr_partitions(settings: DataSettings, classes: list[str], count: int, seed: int) -> list[list[int]]:
    from datasets import Dataset, disable_progress_bars
    from flwr_datasets import partitioner

    disable_progress_bars()
    sized = {
        "iid": partitioner.IidPartitioner,
        "linear": partitioner.LinearPartitioner,
        "square": partitioner.SquarePartitioner,
        "exponential": partitioner.ExponentialPartitioner,
    }
    if settings.partitioner == "dirichlet":
        splitter = partitioner.DirichletPartitioner(
            count, "class", settings.alpha, min_partition_size=0, self_balancing=False, seed=seed
        )
    else:
        splitter = sized[settings.partitioner](count)
    splitter.dataset = Dataset.from_dict({"position": list(range(len(classes))), "class": classes})
    try:
        return [list(splitter.load_partition(index)["position"]) for index in range(count)]
    except ValueError as error:
        raise DataError(
            f"data.partitioner={settings.partitioner!r} cannot share {len(classes)} training rows among {count} "
            f"SuperNodes: {str(error).splitlines()[0]}; use fewer SuperNodes or another partitioner"
        ) from error
