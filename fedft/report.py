"""What a run shows of itself: the model card of an adapter."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedft import builtin
from fedft.config import Settings


def model_card(settings: Settings, metrics: Sequence[Mapping[str, Any]], privacy: Mapping[str, Any]) -> str:
    """Return the README.md of an adapter folder, with the metadata that the Hugging Face Hub reads.

    Args:
        settings: the run's.
        metrics: the lines of `metrics.jsonl` up to the round before this adapter's or to it.
        privacy: the content of `privacy.json`.
    """
    base, data = builtin.origin(settings.model.name), builtin.origin(settings.data.name)
    lines = ["---", "library_name: peft", "pipeline_tag: text-generation"]
    lines += [f"base_model: {base}"] if _is_hub_id(base) else []
    lines += [f"datasets:\n- {data}"] if _is_hub_id(data) else []
    lines += ["tags:", "- lora", "- federated-learning", "- differential-privacy", "- fedft", "---", ""]
    lines += ["# Federated LoRA adapter", ""]
    lines += [f"Base model `{settings.model.name}`, data `{settings.data.name}`, trained by fedft.", ""]
    scored = [line for line in metrics if not math.isnan(line["eval_loss"])]
    if scored:
        lines += ["| Round | Held-out loss (nats per token) | Accuracy | ε |", "|---|---|---|---|"]
        lines += [_score_row(line) for line in scored]
        lines += [""]
    lines += ["## Privacy", ""]
    if privacy["unit"] == "none":
        return "\n".join([*lines, "None: updates were neither clipped nor noised (`dp.unit = none`).", ""])
    lines += [
        f"(ε = {privacy['epsilon']:.6g}, δ = {privacy['delta']:g}) at the level of a client: {privacy['verdict']}.",
        f"Adjacency: {privacy['adjacency']}. Mechanism: {privacy['mechanism']}; C = {privacy['clipping_norm']:g}, "
        f"z = {privacy['noise_multiplier']:g}, n = {privacy['cohort_size']}, {privacy['releases']} releases. "
        f"Not covered: {'; '.join(privacy['not_covered'])}.",
        "",
    ]
    return "\n".join(lines)


def _score_row(line: Mapping[str, Any]) -> str:
    accuracy = "" if math.isnan(line["accuracy"]) else f"{line['accuracy']:.1%}"
    epsilon = "" if line["epsilon"] is None else f"{line['epsilon']:.6g}"
    loss = f"{line['eval_loss']:.3f} ± {line['eval_loss_margin']:.3f}"
    return f"| {line['round']} | {loss} | {accuracy} | {epsilon} |"


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith(("/", ".", "~", builtin.PREFIX))
