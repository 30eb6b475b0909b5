"""The `fedft` command: look at runs, ask an adapter, fetch built-ins, look at partitions, plan privacy, check a site.

Heavy libraries are imported inside the commands that use them, so that `fedft --help` answers at once. A `FedftError`
becomes one line on standard error and exit code 1; options that contradict or do not suffice, exit code 2.
"""

import json
import logging
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedft import builtin
from fedft.errors import ConfigError, FedftError, PlanError, RunDirectoryError, UsageError

if TYPE_CHECKING:
    from fedft.config import Settings
    from fedft.privacy.planner import Plan

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
            raise typer.Exit(2 if isinstance(error, PlanError | UsageError) else 1) from None

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


@_command
def plan(
    nodes: Annotated[int | None, typer.Option(help="All nodes, N.")] = None,
    cohort: Annotated[int | None, typer.Option(help="Clients a round, n.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds, T.")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Noise over sensitivity, z.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="The ε that may be spent.")] = None,
    delta: Annotated[float | None, typer.Option(help="δ of ε [default: 1e-5].")] = None,
    clipping_norm: Annotated[float | None, typer.Option(help="Longest update of a client, C [default: 1].")] = None,
    parameters: Annotated[
        int | None, typer.Option(help="Trained parameters, d [default: 921,600, LoRA r=16 on q and v of SmolLM2-135M].")
    ] = None,
    run_config: Annotated[
        str | None, typer.Option(help="Take what is not given from the run-config, with these overrides or TOML file.")
    ] = None,
    project: Annotated[Path, typer.Option(help="Folder of fedft's pyproject.toml, for --run-config.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw ε over rounds for three cohorts (png, svg, pdf).")] = None,
) -> None:
    """Plan a run's privacy: give two of --rounds, --noise-multiplier and --epsilon, and get the third."""
    from fedft.privacy.planner import make_plan

    given: dict[str, Any] = {
        "nodes": nodes,
        "cohort": cohort,
        "rounds": rounds,
        "noise_multiplier": noise_multiplier,
        "epsilon": epsilon,
        "delta": delta,
        "clipping_norm": clipping_norm,
        "parameters": parameters,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if run_config is not None:
        given = _from_run_config(_load_settings(project, run_config), given)
    for name in ("nodes", "cohort"):
        if name not in given:
            raise PlanError(f"--{name} is missing; give it, or --run-config")
    made = make_plan(**({"delta": 1e-5, "clipping_norm": 1.0, "parameters": _DEFAULT_PARAMETERS} | given))
    if as_json:
        _out.print(
            json.dumps(made.as_dict(), indent=2, ensure_ascii=False), markup=False, highlight=False, soft_wrap=True
        )
    else:
        _print_plan(made, assumed="parameters" not in given)
    if picture:
        _draw_plan(made, picture.absolute())
        _err.print(f"picture: {picture.absolute()}", highlight=False, soft_wrap=True)


_DEFAULT_PARAMETERS = 921_600


def _from_run_config(settings: "Settings", given: dict[str, Any]) -> dict[str, Any]:
    """Return the given values, completed from the run-config; of rounds, noise and ε exactly two stay."""
    from fedft.aggregation import most_trained
    from fedft.model import adapter_shapes

    dp, strategy = settings.dp, settings.strategy
    both = "noise_multiplier" in given and "epsilon" in given
    values: dict[str, Any] = {} if both else {"rounds": settings.num_server_rounds}
    if "noise_multiplier" not in given and "epsilon" not in given:
        values |= {"epsilon": dp.target_epsilon} if dp.target_epsilon else {"noise_multiplier": dp.noise_multiplier}
    values |= {"delta": dp.delta, "clipping_norm": dp.clipping_norm, "nodes": strategy.min_available_nodes} | given
    values.setdefault("cohort", strategy.cohort_size(values["nodes"]))
    if "parameters" not in values:
        values["parameters"] = most_trained(settings.lora.aggregation, adapter_shapes(settings.model, settings.lora))
    return values


def _print_plan(plan: "Plan", assumed: bool) -> None:
    from fedft.privacy.accounting import format_epsilon

    parameters = "assumed: r=16 on q, v of SmolLM2-135M" if assumed else "trained and noised"
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for name, value, meaning in (
        ("nodes N", f"{plan.nodes:,}", ""),
        ("clients a round n", f"{plan.cohort:,}", ""),
        ("rounds T", f"{plan.rounds:,}", ""),
        ("participations k", f"{plan.participations:,}", "rounds of the most-used node, ⌈T·n/N⌉"),
        ("noise multiplier z", f"{plan.noise_multiplier:.6g}", "noise over sensitivity"),
        ("clipping norm C", f"{plan.clipping_norm:g}", "longest update of a client"),
        ("parameters d", f"{plan.parameters:,}", parameters),
        ("σ", f"{plan.sigma:.4g}", "noise on each coordinate of the mean, zC/n"),
        ("noise norm over C", f"{plan.noise_over_clipping_norm:.3g}", "z√d/n"),
        (f"ε at δ {plan.delta:g}", format_epsilon(plan.epsilon), "a client's data replaced by nothing"),
        ("", format_epsilon(plan.epsilon_replace_one), "a client's data replaced by other data"),
    ):
        table.add_row(name, value, meaning)
    _out.print(table)
    _out.print(f"\nverdict: {plan.verdict}", highlight=False, soft_wrap=True)
    for line in plan.advice:
        _out.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)


def _draw_plan(plan: "Plan", file: Path) -> None:
    from fedft.figures import draw_epsilon
    from fedft.privacy.planner import epsilon_over_rounds

    if not plan.noise_multiplier > 0:
        raise PlanError("noise-multiplier=0 has an infinite ε, of which there is no picture")
    cohorts = sorted({max(1, plan.cohort // 2), plan.cohort, min(plan.nodes, 2 * plan.cohort)})
    curves = {f"{cohort} of {plan.nodes} a round": epsilon_over_rounds(plan, cohort) for cohort in cohorts}
    draw_epsilon(curves, f"z = {plan.noise_multiplier:.4g}, δ = {plan.delta:g}", file)


@_command
def check_site(
    data: Annotated[str, typer.Option(help="The site's file or folder, as in node-config data-path.")],
    policy: Annotated[str, typer.Option(help="The site's policy, as in node-config policy-path.")] = "",
    run_config: Annotated[str, typer.Option(help="The run's overrides or TOML file, as for `flwr run`.")] = "",
    prompt_column: Annotated[str, typer.Option(help="As in node-config.")] = "",
    response_column: Annotated[str, typer.Option(help="As in node-config.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    project: Annotated[Path, typer.Option(help="Folder of fedft's pyproject.toml.")] = Path(),
) -> None:
    """Tell what a site would bring to a run: data, device, memory, policy. Exit code 1 where it could not take part."""
    from fedft.node_config import parse_node_config

    given = {
        "data-path": str(Path(data).absolute()),
        "policy-path": str(Path(policy).absolute()) if policy else "",
        "prompt-column": prompt_column,
        "response-column": response_column,
    }
    try:
        settings = _load_settings(project, run_config)
        node = parse_node_config({key: value for key, value in given.items() if value})
    except ConfigError as error:
        raise UsageError(str(error)) from error
    from fedft.site_check import check_site as check
    from fedft.site_table import print_site

    with _err.status("reading the data and the model's configuration"):
        report = check(settings, node)
    if as_json:
        text = json.dumps(report.as_dict(), indent=2, ensure_ascii=False)
        _out.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        print_site(report, _out)
    raise typer.Exit(0 if report.ok else 1)


def _load_settings(project: Path, run_config: str) -> "Settings":
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
