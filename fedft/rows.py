"""Rows from a built-in, the Hugging Face Hub, or local files (jsonl, json, csv, parquet)."""

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedft import builtin
from fedft.errors import DataError, first_line

Row = Mapping[str, Any]

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_LIMIT_KEY = 20_220_325  # any constant: it fixes which rows `data.max-examples` keeps


def load_rows(source: str, split: str, limit: int) -> list[Row]:
    """Return the rows of a data set, at most `limit` of them unless it is 0: always the same ones.

    Args:
        source: `builtin:` and a name, a path, or a Hub id.
        split: of a Hub data set.
        limit: `data.max-examples`.

    Raises:
        DataError: it cannot be found or read, or has no rows.
        FetchError: a built-in cannot be fetched.
    """
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
        keep = np.random.default_rng(_LIMIT_KEY).permutation(len(rows))[:limit]
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
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number} is not JSON: {error}") from error
    return _objects(rows)


def _read_json(file: Path) -> list[Row]:
    return _objects(json.loads(file.read_text(encoding="utf-8-sig")))


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
        raise DataError(
            f"cannot load data.name={name!r}, data.split={split!r} from the Hub: {first_line(error)}; check "
            f"both and the network, or use a local path or {', '.join(builtin.names('data'))}"
        ) from error
