"""The README and docs say what the code does: tables and commands are compared with their source."""

import itertools
import re
import shlex
import subprocess
import tomllib

import pytest
from conftest import PROJECT, default_run_config
from typer.main import get_command

from fedft.cli import app
from fedft.config import parse_run_config, run_config_ranges

README = (PROJECT / "README.md").read_text(encoding="utf-8")
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


def run_config_table() -> str:
    """The README's table of the run-config, from pyproject.toml's defaults and comments and config.py's ranges."""
    text = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split("[tool.flwr.app.config]\n")[1].split("\n[tool.ruff]")[0]
    comments, prefix = {}, ""
    for line in section.splitlines():
        if header := re.match(r"\[tool\.flwr\.app\.config\.(\w+)\]", line):
            prefix = f"{header[1]}."
        elif entry := re.match(r"([\w-]+) = .*?  ?# (.*)", line):
            comments[prefix + entry[1]] = entry[2]
    defaults, ranges = default_run_config(), run_config_ranges()
    rows = [
        f"| `{key}` | `{str(value).lower() if isinstance(value, bool) else repr(value)}` | {ranges[key][0]}, "
        f"{ranges[key][1]} | {comments[key]} |"
        for key, value in defaults.items()
    ]
    return "\n".join(["| Key | Default | Type and range | Meaning |", "|---|---|---|---|", *rows])


def test_readme_table_is_the_run_config() -> None:
    table = run_config_table()
    assert table in README, f"put this table into README.md:\n{table}"


def test_every_fedft_command_in_the_docs_exists_with_its_options() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    found = set()
    for page in PAGES:
        for line in re.findall(r"^(?:\$ )?fedft (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            name, *arguments = shlex.split(line, comments=True)
            options = {
                option for parameter in commands[name].params for option in parameter.opts + parameter.secondary_opts
            }
            assert {word for word in arguments if word.startswith("--")} <= options, line
            found.add(name)
    assert found == set(commands)


def test_every_run_config_in_the_docs_is_accepted() -> None:
    from flwr.common.config import parse_config_args

    seen = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^flwr run .*$", text, re.MULTILINE):
            words = shlex.split(line, comments=True)
            for flag, value in itertools.pairwise(words):
                if flag == "--run-config":
                    value = str(PROJECT / value) if value.endswith(".toml") else value
                    parse_run_config(default_run_config() | parse_config_args([value]))
                    seen += 1
    assert seen >= 4


def test_presets_are_accepted() -> None:
    from flwr.common.config import parse_config_args

    for preset in (PROJECT / "configs").glob("*.toml"):
        parse_run_config(default_run_config() | parse_config_args([str(preset)]))


def test_links_and_files_named_in_the_docs_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_first_screen_has_the_two_commands() -> None:
    first = "\n".join(README.splitlines()[:45])
    assert 'pip install -e ".[dev]" && scripts/check' in first
    assert "flwr run . --stream" in first
    assert "fedft generate" in first


def test_app_bundle_ships_the_package_and_no_data(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A private file left in the project must not reach the nodes."""
    import shutil
    import sys
    import zipfile
    from pathlib import Path

    folder = tmp_path_factory.mktemp("project")
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(PROJECT / name, folder)
    shutil.copytree(PROJECT / "fedft", folder / "fedft", ignore=shutil.ignore_patterns("__pycache__"))
    for private in ("patients.jsonl", "data/patients.json", "fedft/patients.jsonl", "notes.md", "site.toml", "x.py"):
        (folder / private).parent.mkdir(exist_ok=True)
        (folder / private).write_text("{}")
    flwr = Path(sys.executable).parent / "flwr"
    subprocess.run([flwr, "build", "--app", str(folder)], cwd=folder, check=True, capture_output=True)
    (bundle,) = folder.glob("*.fab")
    shipped = set(zipfile.ZipFile(bundle).namelist())
    assert {"fedft/server_app.py", "fedft/client_app.py", "pyproject.toml"} <= shipped
    modules = {str(file.relative_to(PROJECT)) for file in (PROJECT / "fedft").rglob("*.py")}
    assert shipped - modules <= {"pyproject.toml", "LICENSE", "README.md", ".info/CONTENT"}, shipped - modules


def test_requirements_have_upper_bounds() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11"
    open_ended = [item for item in project["dependencies"] if "<" not in item and not item.startswith("pip>")]
    assert open_ended == []
