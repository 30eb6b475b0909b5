"""The `fedft` command: look at runs, ask an adapter, fetch built-ins, look at partitions.

Heavy libraries are imported inside the commands that use them, so that `fedft --help` answers at once. A `FedftError`
becomes one line on standard error and exit code 1.
"""

import logging
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedft import builtin
from fedft.errors import ConfigError, FedftError, RunDirectoryError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated fine-tuning of language models with differential privacy. Runs start with `flwr run .`.",
)
_out = Console()
_err = Console(stderr=True)

RunsDir = Annotated[Path | None, typer.Option("--output-dir", help="Folder of the runs [default: $FEDFT_HOME/runs].")]


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command that reports a `FedftError` as one line."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        try:
            function(*args, **kwargs)
        except FedftError as error:
            _err.print(f"fedft: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None

    app.command()(run)
    return run


@_command
def runs(output_dir: RunsDir = None) -> None:
    """List the runs: how they ended, their held-out loss and accuracy, their ε."""
    from fedft.checkpoint import read_metrics, read_runs

    folder = (output_dir or builtin.home() / "runs").absolute()
    found = read_runs(folder)
    if not found:
        _out.print(f"no runs in {folder}; start one with: flwr run . --stream", soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("run", "status", "round", "loss", "acc.", "ε"):
        table.add_column(column, no_wrap=True)
    for path, state in found:
        try:
            rounds = f"{state['round'] or 0}/{state['config']['num_server_rounds']}"
            table.add_row(path.name, state["status"], rounds, *_summary(read_metrics(path)))
        except (RunDirectoryError, KeyError, TypeError):
            table.add_row(path.name, "damaged", "", "", "", "")
    _out.print(folder, highlight=False, soft_wrap=True)
    _out.print(table)
    for path, state in found:
        if state.get("why"):
            _out.print(f"{path.name} {state['status']}: {state['why']}", markup=False, highlight=False, soft_wrap=True)


def _summary(lines: list[dict[str, Any]]) -> tuple[str, str, str]:
    from fedft.privacy.accounting import format_epsilon

    losses = [line["eval_loss"] for line in lines if line["eval_loss"] is not None]
    scores = [line["accuracy"] for line in lines if line["accuracy"] is not None]
    epsilon = lines[-1]["epsilon"] if lines else None
    return (
        f"{losses[0]:.2f} → {losses[-1]:.2f}" if losses else "",
        f"{scores[-1]:.0%}" if scores else "",
        "none" if epsilon is None else format_epsilon(float(epsilon)),
    )


@_command
def generate(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    adapter: Annotated[Path, typer.Option(help="A run directory, its name, or an adapter folder.")] = Path("latest"),
    sample: Annotated[
        bool, typer.Option("--sample/--greedy", help="Sample as the notebook does, or take the likeliest token.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    output_dir: RunsDir = None,
) -> None:
    """Ask the base model and the fine-tuned one the same question."""
    from fedft.checkpoint import find_adapter
    from fedft.generation import Decoding, answer, load_tuned

    if not question.strip():
        raise ConfigError("question='' is empty; ask something")
    folder = find_adapter(adapter, (output_dir or builtin.home() / "runs").absolute())
    with _err.status("loading the base model and the adapter"):
        tuned = load_tuned(folder)
    _out.print(f"[bold]question[/bold]   {question}", soft_wrap=True)
    answers = answer(tuned, question, Decoding(max_new_tokens, sample, seed))
    for name, detail in (("base model", tuned.base), ("fine-tuned", str(folder))):
        with _err.status(f"{name} is answering"):
            text = next(answers)
        _out.print(f"\n[bold]{name}[/bold] [dim]{detail}[/dim]", soft_wrap=True)
        _out.print(text, markup=False, highlight=False, soft_wrap=True)


@_command
def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Built-ins to fetch [default: all].")] = None,
) -> None:
    """Fetch, verify and convert the built-in model and data set ahead of time."""
    known = {name: kind for kind in ("model", "data") for name in builtin.names(kind)}
    for name in names or known:
        if name not in known:
            raise ConfigError(f"built-in {name!r} is unknown; there are: {', '.join(known)}")
        with _err.status(f"fetching {name}"):
            folder = builtin.ensure(name, known[name])
        _out.print(f"{name}  {folder}", soft_wrap=True)


@_command
def partitions(
    nodes: Annotated[int, typer.Option(min=1, help="SuperNodes to share the data among.")] = 20,
    run_config: Annotated[str, typer.Option(help="Run-config overrides or a TOML file, as for `flwr run`.")] = "",
    picture: Annotated[Path, typer.Option(help="Picture to write (png, svg or pdf).")] = Path("partitions.png"),
    project: Annotated[Path, typer.Option(help="Folder of fedft's pyproject.toml.")] = Path(),
) -> None:
    """Show how the training rows are shared among simulated SuperNodes: sizes and class mix."""
    from fedft.data import partition_sizes
    from fedft.report import draw_partitions

    settings = _load_settings(project, run_config)
    with _err.status("partitioning"):
        sizes = partition_sizes(settings.data, nodes, settings.seed)
    by = settings.data.partition_by
    title = f"{settings.data.name}, {settings.data.partitioner}, {nodes} nodes"
    table = Table("partition", "rows", f"largest classes by {by}", title=title, title_justify="left")
    for index, counts in enumerate(sizes):
        largest = sorted(counts, key=lambda name: (-counts[name], name))[:3]
        mix = ", ".join(f"{name} {counts[name] / sum(counts.values()):.0%}" for name in largest if name)
        table.add_row(str(index), str(sum(counts.values())), mix)
    _out.print(table)
    draw_partitions(sizes, title, picture.absolute())
    _out.print(f"picture: {picture.absolute()}", soft_wrap=True)


def _load_settings(project: Path, run_config: str) -> Any:
    from click import ClickException
    from flwr.common.config import get_fused_config_from_dir, parse_config_args

    from fedft.config import parse_run_config

    try:
        return parse_run_config(get_fused_config_from_dir(project, parse_config_args([run_config])))
    except (OSError, ValueError, KeyError, ClickException) as error:
        raise ConfigError(
            f"cannot read the run-config of {str(project.absolute())!r} with --run-config {run_config!r}: {error}; run "
            "this in the folder of fedft's pyproject.toml, or name it with --project"
        ) from error
