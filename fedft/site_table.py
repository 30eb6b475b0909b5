"""A `SiteReport` for people, on a terminal."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedft.footprint import Device, Footprint
from fedft.policy import Policy
from fedft.privacy.accounting import format_epsilon
from fedft.site_check import DataFacts, LengthFacts, SiteReport


def print_site(report: SiteReport, out: Console) -> None:
    """Print what was found, an example as it is trained on, and what stands in the way."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for name, value in _rows(report):
        table.add_row(name, Text(value))
    out.print(table)
    if report.lengths:
        out.print("\n[bold]an example, as it is trained on[/bold] (the loss is that of the second part)")
        for part in (report.lengths.prompt, report.lengths.completion):
            out.print(Text(part), style="dim" if part is report.lengths.prompt else "", soft_wrap=True)
    out.print()
    for problem in report.problems:
        out.print(Text(f"problem: {problem}", style="red"), soft_wrap=True)
    if report.ok:
        out.print("ok: this site can take part in this run")


def _rows(report: SiteReport) -> Iterator[tuple[str, str]]:
    if report.data:
        yield from _data_rows(report.data)
    if report.lengths:
        yield from _length_rows(report.lengths)
    if report.device:
        yield from _device_rows(report.device)
    if report.footprint:
        yield from _footprint_rows(report.footprint)
    if report.policy:
        yield from _policy_rows(report.policy, report.policy_path, report.epsilon)


def _data_rows(data: DataFacts) -> Iterator[tuple[str, str]]:
    ignored = f"; not read: {', '.join(data.ignored)}" if data.ignored else ""
    yield "files", f"{', '.join(data.files)}{ignored}"
    yield "columns", ", ".join(data.columns)
    yield "schema", data.schema
    yield "rows", f"{data.rows:,}, {data.duplicates:,} of them repeat another"
    for reason, count in data.dropped.items():
        yield "left out", f"{count:,} where {reason}"
    yield "split", f"{data.train:,} to train on, {data.test:,} held out"


def _length_rows(lengths: LengthFacts) -> Iterator[tuple[str, str]]:
    yield (
        "tokens",
        f"{lengths.shortest:,} to {lengths.longest:,}; median {lengths.median:,}, 90% {lengths.p90:,}, 99% "
        f"{lengths.p99:,} ({lengths.examples:,} training rows)",
    )
    yield "truncated", f"{lengths.truncated:,} at train.max-length={lengths.max_length:,}"


def _device_rows(device: Device) -> Iterator[tuple[str, str]]:
    yield "device", f"{device.name}, {device.cores} processor cores"
    yield "memory", f"{_gigabytes(device.ram_free)} free of {_gigabytes(device.ram_total)}"
    if device.gpu_total is not None:
        yield "GPU memory", f"{_gigabytes(device.gpu_free)} free of {_gigabytes(device.gpu_total)}"


def _footprint_rows(footprint: Footprint) -> Iterator[tuple[str, str]]:
    parts = ("weights", "adapter", "activations", "loss", "libraries")
    listed = ", ".join(f"{part} {_gigabytes(getattr(footprint, part))}" for part in parts)
    yield "base model", f"{footprint.parameters:,} parameters"
    yield "training takes", f"at most about {_gigabytes(footprint.total)}, an estimate: {listed}"


def _policy_rows(policy: Policy, path: str, epsilon: float | None) -> Iterator[tuple[str, str]]:
    yield "policy", path or "none given: the safe one"
    if epsilon is not None:
        yield "ε of this run", f"{format_epsilon(epsilon)} at δ {policy.delta:g}, allowed {policy.maximum_epsilon:g}"
    yield "metrics leave", "yes" if policy.share_metrics else "no"


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.2f} GB"
