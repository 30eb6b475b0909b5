"""What the benchmarks share: alternating repeats, medians with spread, a table, a JSON file."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fedft


def alternate(repeats: int, **variants: Callable[[], float]) -> dict[str, list[float]]:
    """Return each variant's figures from `repeats` rounds of all variants in turn, the first round uncounted."""
    figures: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, variant in variants.items():
            figure = variant()
            if repeat:
                figures[name].append(figure)
    return figures


def seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes, on the GPU too where there is one."""
    import torch

    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def spread(values: list[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Return the spread of the ratios of figures measured side by side."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def publish(name: str, results: Mapping[str, Any], output: Path | None) -> None:
    """Print results as a table, one line a figure, and write them as JSON where asked."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    facts = {
        "benchmark": name,
        "fedft": fedft.__version__,
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
    }
    print(" | ".join(f"{key} {value}" for key, value in facts.items()))
    width = max(map(len, results))
    for key, value in results.items():
        if isinstance(value, dict):
            text = f"{value['median']:10.3f}   [{value['min']:.3f}, {value['max']:.3f}]"
        else:
            text = f"{value:10.3f}" if isinstance(value, float) else f"{value!s:>10}"
        print(f"{key:<{width}}  {text}")
    if output:
        output.write_text(json.dumps({**facts, "results": dict(results)}, indent=2) + "\n", encoding="utf-8")
