import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_settings

from fedft.config import DataSettings
from fedft.data import Site, load_site, load_split, partition_sizes, render_alpaca, tokenize
from fedft.errors import DataError
from fedft.node_config import NodeSettings
from fedft.partition import share_out, split_test
from fedft.schema import Record

ROWS = [{"question": f"q {i}", "answer": f"a {i}", "specialty": "ABC"[i % 3]} for i in range(60)]


def write(folder: Path, rows: list[dict[str, Any]], suffix: str = ".jsonl") -> str:
    file = folder / f"data{suffix}"
    if suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".json":
        file.write_text(json.dumps(rows))
    elif suffix == ".csv":
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    return str(file)


def data(name: str, **changes: Any) -> DataSettings:
    return make_settings(data__name=name, **{f"data__{key}": value for key, value in changes.items()}).data


def site(settings: DataSettings, folder: Path, node: NodeSettings | None = None, max_length: int = 64) -> Site:
    from transformers import AutoTokenizer

    return load_site(settings, node or NodeSettings(), 0, max_length, lambda: AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_reads_the_same_rows(tmp_path: Path, suffix: str) -> None:
    train, test = load_split(data(write(tmp_path, ROWS, suffix)), NodeSettings(), 0)
    assert sorted(row["question"] for row in [*train, *test]) == sorted(row["question"] for row in ROWS)
    assert len(test) == 6


def test_folder_reads_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (tmp_path / "b.json").write_text(json.dumps(ROWS[1:3]))
    train, test = load_split(data(str(tmp_path), test_fraction=0.0), NodeSettings(), 0)
    assert (len(train), test) == (3, [])


def test_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(ROWS[0]), encoding="utf-8-sig")
    train, _ = load_split(data(str(file), test_fraction=0.0), NodeSettings(), 0)
    assert train == [ROWS[0]]


def test_data_path_of_a_site_wins_over_the_runs_data(tmp_path: Path) -> None:
    node = NodeSettings(data_path=write(tmp_path, ROWS))
    train, test = load_split(data("some/hub-data"), node, 0)
    assert len(train) + len(test) == len(ROWS)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "", "no rows"),
        ("a.jsonl", '{"question": "q"}\nnonsense\n', "line 2 is not JSON"),
        ("a.jsonl", "[1, 2]\n", "list of objects"),
        ("a.json", '{"question": "q"}', "list of objects"),
        ("a.csv", "question,answer\n", "no rows"),
        ("a.parquet", "nonsense", "cannot read 'a.parquet' as parquet"),
        ("a.txt", "nonsense", "must end in"),
        ("a.jsonl", '{"text": "q"}\n{"text": "r"}\n', "none of the known schemas"),
        ("a.jsonl", '{"question": "q", "answer": null}\n{"question": " ", "answer": "a"}\n', "no row with both"),
    ],
)
def test_wrong_file_is_one_clear_line(tmp_path: Path, llama_folder: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words) as caught:
        site(data(str(tmp_path / name), test_fraction=0.0), llama_folder)
    assert "\n" not in str(caught.value)


def test_missing_path_and_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_split(data(str(tmp_path / "none.jsonl")), NodeSettings(), 0)
    with pytest.raises(DataError, match="without a file that ends in"):
        load_split(data(str(tmp_path)), NodeSettings(), 0)


def test_named_column_that_is_missing_is_refused(tmp_path: Path, llama_folder: Path) -> None:
    settings = data(write(tmp_path, ROWS), prompt_column="question", response_column="output")
    with pytest.raises(DataError, match=r"run-config data.response-column='output' is not in run-config data.name="):
        site(settings, llama_folder)


def test_split_is_stratified_disjoint_and_independent_of_the_seed(tmp_path: Path) -> None:
    settings = data(write(tmp_path, ROWS), test_fraction=0.2)
    (train, test), (_, again) = (load_split(settings, NodeSettings(), seed) for seed in (0, 1))
    assert test == again
    assert Counter(row["specialty"] for row in test) == {"A": 4, "B": 4, "C": 4}
    assert {row["question"] for row in train}.isdisjoint(row["question"] for row in test)


def test_split_gives_the_asked_share_of_uneven_strata() -> None:
    rows = [{"c": "x"}] * 7 + [{"c": "y"}] * 8 + [{"c": "z"}] * 5
    train, test = split_test(rows, 0.25, "c")
    assert (len(train), len(test)) == (15, 5)
    assert Counter(row["c"] for row in test) == {"x": 2, "y": 2, "z": 1}


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet", "natural", "linear", "square", "exponential"])
def test_partitions_share_out_every_training_row_once(tmp_path: Path, partitioner: str) -> None:
    settings = data(write(tmp_path, ROWS), partitioner=partitioner, alpha=5.0)
    parts = [load_split(settings, NodeSettings(i, 3), 7) for i in range(3)]
    train = [row["question"] for part, _ in parts for row in part]
    test = [row["question"] for _, part in parts for row in part]
    assert sorted(train + test) == sorted(row["question"] for row in ROWS)
    assert [sum(sizes.values()) for sizes in partition_sizes(settings, 3, 7)] == [len(part) for part, _ in parts]


def test_natural_partitions_hold_whole_classes(tmp_path: Path) -> None:
    sizes = partition_sizes(data(write(tmp_path, ROWS), partitioner="natural"), 3, 0)
    assert sorted(tuple(counts.items()) for counts in sizes) == [(("A", 18),), (("B", 18),), (("C", 18),)]


def test_seed_decides_the_partitions(tmp_path: Path) -> None:
    settings = data(write(tmp_path, ROWS))
    first, second = (load_split(settings, NodeSettings(0, 3), seed)[0] for seed in (0, 1))
    assert first == load_split(settings, NodeSettings(0, 3), 0)[0]
    assert first != second


@pytest.mark.parametrize(
    ("changes", "count", "words"),
    [
        ({}, 100, "100 SuperNodes cannot share"),
        ({"partitioner": "natural"}, 4, "3 distinct values"),
        ({"partitioner": "natural", "partition_by": "ward"}, 2, "data.partition-by='ward' is not in the data"),
        ({"partitioner": "exponential"}, 40, "data.partitioner='exponential' cannot share"),
        ({"partitioner": "dirichlet", "alpha": 0.001}, 30, "leaves partition"),
        ({"max_examples": 1, "test_fraction": 0.9}, 1, "leaves none"),
    ],
)
def test_impossible_partitioning_is_one_clear_line(
    tmp_path: Path, changes: dict[str, Any], count: int, words: str
) -> None:
    settings = data(write(tmp_path, ROWS), **changes)
    with pytest.raises(DataError, match=words):
        _ = [load_split(settings, NodeSettings(index, count), 0) for index in range(count)]


def test_max_examples_limits_the_rows(tmp_path: Path) -> None:
    train, test = load_split(data(write(tmp_path, ROWS), max_examples=20), NodeSettings(), 0)
    assert (len(train), len(test)) == (18, 2)


@pytest.mark.parametrize(
    ("row", "instruction"),
    [
        ({"instruction": "do", "input": "this", "output": "done"}, "do\n\nthis"),
        ({"instruction": "do", "input": None, "output": "done"}, "do"),
        ({"question": "why", "answer": "done"}, "why"),
        ({"prompt": "why", "completion": "done"}, "why"),
        ({"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "done"}]}, "why"),
    ],
)
def test_every_schema_is_found(tmp_path: Path, llama_folder: Path, row: dict[str, Any], instruction: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    (example,) = site(data(write(tmp_path, [row]), test_fraction=0.0), llama_folder, max_length=512).train
    assert tokenizer.decode(example.prompt) == render_alpaca(Record((("user", instruction),), ""))
    assert tokenizer.decode(example.completion) == "done<eos>"


def test_chat_template_is_used_where_there_is_one(llama_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    record = Record((("user", "why"),), "done")
    with pytest.raises(DataError, match="no chat template"):
        tokenize([record], tokenizer, "chat", 64)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (example,) = tokenize([record], tokenizer, "auto", 64)
    assert tokenizer.decode(example.prompt) == "<user>why<eos>\n<assistant>"
    assert tokenizer.decode(example.completion) == "done<eos>"
    assert tokenizer.decode(tokenize([record], tokenizer, "alpaca", 512)[0].prompt).startswith("Below is")


def test_template_that_does_not_end_in_the_response_is_refused(llama_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.chat_template = "{{ messages|length }}{% if add_generation_prompt %}<assistant>{% endif %}"
    with pytest.raises(DataError, match="does not end in the response"):
        tokenize([Record((("user", "why"),), "done")], tokenizer, "auto", 64)


def test_long_prompt_loses_its_beginning_and_never_the_response(llama_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    record = Record((("user", "nerve " * 200),), "vein")
    (example,) = tokenize([record], tokenizer, "auto", 32)
    assert example.length == 32
    assert tokenizer.decode(example.completion) == "vein<eos>"
    assert tokenizer.decode(example.prompt).endswith("### Response:\n")
    (long_answer,) = tokenize([Record((("user", "why"),), "bone " * 200)], tokenizer, "auto", 32)
    assert (len(long_answer.completion), long_answer.length) == (16, 32)


def test_options_are_kept_for_the_test_split_only(tmp_path: Path, llama_folder: Path) -> None:
    rows = [{"question": f"q {i}", "answer": "b", "options": ["a", "b", "c"]} for i in range(10)]
    rows[0]["options"] = ["a", "c"]  # without the answer: no multiple choice
    result = site(data(write(tmp_path, rows), test_fraction=0.5, partition_by=""), llama_folder)
    assert {len(example.completions) for example in result.train} == {1}
    assert {(len(example.completions), example.answer) for example in result.test} <= {(3, 1), (1, 0)}
    assert (3, 1) in {(len(example.completions), example.answer) for example in result.test}


def test_hub_that_cannot_be_reached_is_one_line_with_the_alternatives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"cannot load run-config data.name='some/data'.*route;.*builtin:") as caught:
        load_split(data("some/data"), NodeSettings(), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("rows", "count"), [(10, 3), (7, 7), (101, 20)])
def test_iid_partitions_have_the_sizes_flwr_datasets_gives(rows: int, count: int) -> None:
    from datasets import Dataset
    from flwr_datasets.partitioner import IidPartitioner

    settings = make_settings(data__partitioner="iid").data
    ours = share_out(settings, [{"question": str(i)} for i in range(rows)], count, seed=0)
    theirs = IidPartitioner(count)
    theirs.dataset = Dataset.from_dict({"position": list(range(rows))})
    assert [len(part) for part in ours] == [len(theirs.load_partition(i)) for i in range(count)]
