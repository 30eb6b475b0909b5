"""Real files as sites have them: whatever is wrong is one line that names the setting, its value and the remedy."""

import json
from pathlib import Path

import pytest

from fedft.errors import DataError
from fedft.rows import load_rows

KEY = "node-config data-path"
ROW = {"question": "Wo schmerzt es?", "answer": "Im Fuß"}
LINE = json.dumps(ROW, ensure_ascii=False) + "\n"


def load(path: Path) -> list[dict[str, object]]:
    return [dict(row) for row in load_rows(str(path), "train", 0, KEY)]


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(str(path), "train", 0, KEY)
    assert str(caught.value).startswith(f"{KEY}={str(path)!r}")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.jsonl", LINE.encode()),
        ("mark.jsonl", LINE.encode("utf-8-sig")),
        ("gaps.jsonl", f"\n\n{LINE}  \n\t\n".encode()),
        ("windows.jsonl", LINE.replace("\n", "\r\n").encode()),
        ("no-newline-at-end.jsonl", LINE.strip().encode()),
        ("CAPITALS.JSONL", LINE.encode()),
        ("list.json", json.dumps([ROW]).encode("utf-8-sig")),
        ("table.csv", "question,answer\r\nWo schmerzt es?,Im Fuß\r\n\r\n".encode("utf-8-sig")),
        ("quoted.csv", '"question","answer"\n"Wo schmerzt es?","Im Fuß"\n'.encode()),
    ],
)
def test_one_row_is_read_the_same_from_every_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert load(tmp_path / name) == [ROW]


def test_cells_of_megabytes_are_read(tmp_path: Path) -> None:
    long = "nerve " * 500_000
    (tmp_path / "a.csv").write_text(f"question,answer\n{long},x\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": long, "answer": "x"}))
    assert load(tmp_path / "a.csv") == load(tmp_path / "a.jsonl")


def test_duplicate_rows_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINE * 3)
    assert load(tmp_path / "a.jsonl") == [ROW] * 3


def test_folder_reads_every_format_and_neither_hidden_files_nor_others(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINE)
    (tmp_path / "b.csv").write_text("answer,question\nim Kopf,wo?\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "README.txt").write_text("ours")
    (tmp_path / "folder").mkdir()
    assert load(tmp_path) == [ROW, {"question": "wo?", "answer": "im Kopf"}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b"\n \n", "has no rows"),
        ("a.json", b"", "cannot read 'a.json' as json"),
        ("a.json", b"[]", "has no rows"),
        ("a.csv", b"", "has no rows"),
        ("a.csv", b"question,answer\n", "has no rows"),
        ("a.parquet", b"", "cannot read 'a.parquet' as parquet"),
        ("a.jsonl", LINE.encode("latin-1"), "is not UTF-8; convert it, for example with: iconv"),
        ("a.jsonl", LINE.encode("utf-16"), "byte 0 is not UTF-8"),
        ("a.csv", "question,answer\nwo?,Fuß\n".encode("latin-1"), "is not UTF-8"),
        ("a.jsonl", LINE.encode() + b"{", "line 2 is not JSON"),
        ("a.jsonl", b'"text"\n', "must hold a list of objects"),
        ("a.json", b"[" * 100_000, "nested too deep"),
        ("a.csv", b"question;answer\nwo?;da\n", "not separated by commas"),
        ("a.csv", b"question,question\nwo?,da\n", "names a column twice"),
        ("a.csv", b"question,answer\nwo?,da\nwo?,da,dort\n", "line 3 has more cells than the header"),
        ("a.csv", b'question,answer\nwo?,"da\n', "cannot read 'a.csv' as csv"),
        ("a.xlsx", b"PK", "must end in one of .jsonl, .json, .csv, .parquet"),
    ],
)
def test_wrong_file_is_one_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert words in refusal(tmp_path / name)


def test_one_file_of_a_folder_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINE, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(LINE, encoding="latin-1")
    assert "cannot read 'b.jsonl'" in refusal(tmp_path)


def test_missing_unreadable_and_mixed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not exist on this machine" in refusal(tmp_path / "none.jsonl")
    assert "folder without a file that ends in" in refusal(tmp_path)
    (tmp_path / "a.jsonl").mkdir()
    assert "cannot read 'a.jsonl'" in refusal(tmp_path)
    (tmp_path / "a.jsonl").rmdir()
    (tmp_path / "a.jsonl").write_text(LINE)
    (tmp_path / "b.jsonl").write_text('{"text": "x"}')
    assert "files with different columns" in refusal(tmp_path)

    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for method, words in (("open", "permission denied"), ("iterdir", "cannot be listed"), ("exists", "cannot be read")):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, deny)
            assert words in refusal(tmp_path if method == "iterdir" else tmp_path / "a.jsonl")
