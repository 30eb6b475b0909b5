"""Files that are whole whenever a process is killed, and JSON that every reader accepts."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write strict JSON as `write_whole` does."""
    write_whole(path, (json.dumps(plain(value), indent=2) + "\n").encode())


def plain(value: Any) -> Any:
    """Return a value as strict JSON can hold it: NaN and infinity become None and "inf"."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and value != value:
        return None
    return "inf" if value == float("inf") else value


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there: whoever reads finds the old content or the new one."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_bytes(content)
    sync(scratch)
    scratch.replace(path)


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
