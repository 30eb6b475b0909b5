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
_LONGEST_CELL = 2**31 - 1  # of a csv file, in characters; Python's own limit is 131,072
_LIMIT_KEY = 20_220_325  # any constant: it fixes which rows `data.max-examples` keeps


def load_rows(source: str, split: str, limit: int, key: str = "run-config data.name") -> list[Row]:
    """Return the rows of a data set, at most `limit` of them unless it is 0: always the same ones.

    Args:
        source: `builtin:` and a name, a path, or a Hub id.
        split: of a Hub data set.
        limit: `data.max-examples`.
        key: the setting that names the source, for the errors.

    Raises:
        DataError: it cannot be found or read, or has no rows.
        FetchError: a built-in cannot be fetched.
    """
    origin = f"{key}={source!r}"
    if builtin.is_builtin(source):
        rows = _read_path(builtin.ensure(source, "data"), origin)
    elif _exists(path := Path(source).expanduser(), origin):
        rows = _read_path(path, origin)
    elif source.startswith(("/", ".", "~")) or path.suffix.lower() in _SUFFIXES:
        raise DataError(f"{origin} does not exist on this machine; give an absolute path that does")
    else:
        rows = _read_hub(source, split)
    if not rows:
        raise DataError(f"{origin} has no rows; name a file that has some")
    if limit and limit < len(rows):
        keep = np.random.default_rng(_LIMIT_KEY).permutation(len(rows))[:limit]
        rows = [rows[i] for i in sorted(keep.tolist())]
    return rows


def data_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of a folder that are read as data, and those that are not; hidden ones are in neither.

    Raises:
        OSError: the folder cannot be listed.
    """
    files = [file for file in sorted(folder.iterdir()) if not file.name.startswith(".")]
    known = [file for file in files if file.suffix.lower() in _SUFFIXES]
    return known, [file for file in files if file not in known]


def _exists(path: Path, origin: str) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a folder above it may not be entered
        raise DataError(f"{origin} cannot be read: {first_line(error)}; let the SuperNode's user read it") from error


def _read_path(path: Path, origin: str) -> list[Row]:
    try:
        files = data_files(path)[0] if path.is_dir() else [path]
    except OSError as error:
        raise DataError(f"{origin} cannot be listed: {first_line(error)}; let the SuperNode's user read it") from error
    if not files:
        raise DataError(f"{origin} is a folder without a file that ends in {', '.join(_SUFFIXES)}; put one there")
    rows: list[Row] = []
    columns: set[frozenset[str]] = set()
    for file in files:
        if file.suffix.lower() not in _SUFFIXES:
            raise DataError(f"{origin} must end in one of {', '.join(_SUFFIXES)}, or be a folder; convert or rename it")
        read = _read_file(file, origin)
        rows += read
        if read:
            columns.add(frozenset(column for row in read for column in row))
    if len(columns) > 1:
        raise DataError(f"{origin} is a folder of files with different columns; make them alike, or name one file")
    return rows


def _read_file(file: Path, origin: str) -> list[Row]:
    where = f"{origin}: cannot read {file.name!r} as {file.suffix[1:].lower()}"
    try:
        return _READERS[file.suffix.lower()](file)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {error.start} is not UTF-8; convert it, for example with: iconv -f WINDOWS-1252 -t UTF-8"
        ) from error
    except RecursionError as error:
        raise DataError(f"{where}: its values are nested too deep; make rows flat objects") from error
    except PermissionError as error:
        raise DataError(f"{where}: permission denied; let the SuperNode's user read it") from error
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"{where}: {first_line(error)}; correct the file") from error


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
    csv.field_size_limit(_LONGEST_CELL)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        header = list(reader.fieldnames or ())
        if len(set(header)) < len(header):
            raise ValueError("its header names a column twice")
        if len(header) == 1 and any(sign in header[0] for sign in ";\t|"):
            raise ValueError("its columns are not separated by commas")
        rows: list[Row] = []
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num} has more cells than the header")
            rows.append(row)
        return rows


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
            f"cannot load run-config data.name={name!r}, data.split={split!r} from the Hub: {first_line(error)}; check "
            f"both and the network, or use a local path or {', '.join(builtin.names('data'))}"
        ) from error
