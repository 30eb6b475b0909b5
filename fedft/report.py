"""What fedft shows: the model card of an adapter, the picture of a partitioning."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedft import builtin
from fedft.config import Settings
from fedft.errors import RunDirectoryError

_COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")  # C7 is grey, which is for the rest


def model_card(settings: Settings, metrics: Sequence[Mapping[str, Any]], privacy: Mapping[str, Any]) -> str:
    """Return the README.md of an adapter folder, with the metadata that the Hugging Face Hub reads.

    Args:
        settings: the run's.
        metrics: the lines of `metrics.jsonl` up to the round before this adapter's or to it, with None for no figure
            and "inf" for infinity.
        privacy: the content of `privacy.json`.
    """
    base, data = builtin.origin(settings.model.name), builtin.origin(settings.data.name)
    lines = ["---", "library_name: peft", "pipeline_tag: text-generation"]
    lines += [f"base_model: {base}"] if _is_hub_id(base) else []
    lines += [f"datasets:\n- {data}"] if _is_hub_id(data) else []
    lines += ["tags:", "- lora", "- federated-learning", "- differential-privacy", "- fedft", "---", ""]
    lines += ["# Federated LoRA adapter", ""]
    lines += [f"Base model `{settings.model.name}`, data `{settings.data.name}`, trained by fedft.", ""]
    scored = [line for line in metrics if line["eval_loss"] is not None]
    if scored:
        lines += ["| Round | Held-out loss (nats per token) | Accuracy | ε |", "|---|---|---|---|"]
        lines += [_score_row(line) for line in scored]
        lines += [""]
    lines += ["## Privacy", ""]
    if privacy["unit"] == "none":
        return "\n".join([*lines, "None: updates were neither clipped nor noised (`dp.unit = none`).", ""])
    return "\n".join([*lines, *_claim(privacy), ""])


def _claim(privacy: Mapping[str, Any]) -> list[str]:
    """Return the certificate as a model card states it: in a sentence, then line by line."""
    histogram = ", ".join(f"{nodes} in {count}" for count, nodes in privacy["participation_histogram"].items())
    adapter = privacy["adapter"]
    norms = [line["clipping_norm"] for line in privacy["rounds"]] or [privacy["clipping_norm"]]
    steered = f", from {norms[0]:.6g} to {norms[-1]:.6g} over the rounds" if privacy["bit_noise"] else ""
    facts = {
        "Unit": privacy["unit"],
        "Adjacency": f"{privacy['adjacency']}; ε = {privacy['epsilon_replace_one']:.6g} for replaced by other data",
        "Mechanism": privacy["mechanism"],
        "Clipping norm C": f"{privacy['clipping_norm']:.6g}{steered}",
        "Noise multiplier z": f"{privacy['noise_multiplier']:.6g}",
        "Clients a round n, of N": f"{privacy['cohort_size']} of {privacy['nodes']}",
        "Rounds": f"{privacy['rounds_planned']} planned, {privacy['releases']} released",
        "Rounds per client": f"at most {privacy['participations']}; {privacy['participations_planned']} planned",
        "Clients by rounds": histogram or "none",
        "Aggregation": privacy["aggregation"],
        "Generator": privacy["generator"],
        "Base model": privacy["base_model"],
        "Adapter": f"{adapter['file']}, sha256 {adapter['sha256']}" if adapter else "none",
    }
    return [
        f"(ε = {privacy['epsilon']:.6g}, δ = {privacy['delta']:g}) at the level of a client: {privacy['verdict']}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {fact} |" for name, fact in facts.items()),
        "",
        "Outside this claim:",
        "",
        *(f"- {item}" for item in privacy["not_covered"]),
    ]


def _score_row(line: Mapping[str, Any]) -> str:
    accuracy = "" if line["accuracy"] is None else f"{line['accuracy']:.1%}"
    epsilon = "" if line["epsilon"] is None else f"{float(line['epsilon']):.6g}"
    margin = "" if line["eval_loss_margin"] is None else f" ± {line['eval_loss_margin']:.3f}"
    loss = f"{line['eval_loss']:.3f}{margin}"
    return f"| {line['round']} | {loss} | {accuracy} | {epsilon} |"


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith(("/", ".", "~", builtin.PREFIX))


def draw_partitions(sizes: Sequence[Mapping[str, int]], title: str, file: Path) -> None:
    """Draw each partition's rows as a bar, stacked by class, largest class first, into a PNG, SVG or PDF file.

    Raises:
        RunDirectoryError: the file cannot be written, or its ending is none of these.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    totals: dict[str, int] = {}
    for counts in sizes:
        for name, count in counts.items():
            totals[name] = totals.get(name, 0) + count
    ranked = sorted(totals, key=lambda name: (-totals[name], name))
    layers = {name: [counts.get(name, 0) for counts in sizes] for name in ranked[: len(_COLOURS)]}
    rest = ranked[len(_COLOURS) :]
    if rest:
        layers[f"{len(rest)} others"] = [sum(counts.get(name, 0) for name in rest) for counts in sizes]

    figure = Figure(figsize=(max(6.0, 0.35 * len(sizes) + 3.0), 4.5), layout="constrained")
    axes = figure.subplots()
    bottom = [0] * len(sizes)
    for (name, heights), colour in zip(layers.items(), (*_COLOURS, "0.7"), strict=False):
        axes.bar(range(len(sizes)), heights, bottom=bottom, label=name, color=colour, width=0.85)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set(title=title, xlabel="partition", ylabel="training rows")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if any(layers):
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"cannot write the picture {str(file)!r}: {error}") from error
