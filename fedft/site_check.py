"""What a site would bring to a run, told to its administrator before it joins: data, device, memory, policy.

Nothing leaves the machine. Where the run's base model or tokenizer is not on it, it is fetched as in a run.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedft.config import Settings
from fedft.data import columns_of, load_split, tokenize
from fedft.errors import FedftError
from fedft.footprint import Device, Footprint, estimate, find_device
from fedft.model import load_tokenizer
from fedft.node_config import NodeSettings
from fedft.policy import Policy, RunFacts, check_records, load_policy, refusals, run_epsilon
from fedft.privacy.accounting import chosen_noise
from fedft.rows import Row, data_files
from fedft.schedule import most_participations
from fedft.schema import Columns, defects

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLE = 2000
"""Most training rows that are tokenised for the figures of length."""
_UNTRUNCATED = 2**30


@dataclass(frozen=True)
class DataFacts:
    """What fedft sees in a site's data."""

    files: list[str]
    ignored: list[str]
    """Other files of the folder."""
    rows: int
    dropped: dict[str, int]
    """Rows that cannot be used, by reason."""
    duplicates: int
    """Rows that say the same as one before them."""
    columns: list[str]
    schema: str
    train: int
    """Usable rows to train on."""
    test: int
    """Usable rows held out."""


@dataclass(frozen=True)
class LengthFacts:
    """Tokens of prompt and response together, before truncation, of the training rows or a sample of them."""

    examples: int
    shortest: int
    median: int
    p90: int
    p99: int
    longest: int
    max_length: int
    """`train.max-length`."""
    truncated: int
    """Examples that lose a part to it."""
    prompt: str
    """The first example's prompt as trained on."""
    completion: str
    """Its completion, from which the loss is computed."""


@dataclass
class SiteReport:
    """Everything that could be found out; what could not is None and has its reason in `problems`."""

    data_path: str
    policy_path: str
    data: DataFacts | None = None
    lengths: LengthFacts | None = None
    device: Device | None = None
    footprint: Footprint | None = None
    policy: Policy | None = None
    epsilon: float | None = None
    """ε that the run-config plans for this site, at the policy's δ; None without privacy."""
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing stands in the way of this site's taking part."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON; an infinite ε is a text."""
        totals = {"total": self.footprint.total} if self.footprint else {}
        facts = asdict(self) | {"ok": self.ok}
        if self.footprint:
            facts["footprint"] |= totals
        if self.policy:
            facts["policy"]["maximum_epsilon"] = _finite(self.policy.maximum_epsilon)
        return facts | {"epsilon": None if self.epsilon is None else _finite(self.epsilon)}


def check_site(settings: Settings, node: NodeSettings) -> SiteReport:
    """Return what a site with this node-config would bring to a run with these settings. Raises nothing of fedft's."""
    report = SiteReport(node.data_path, node.policy_path)
    for part in (_check_policy, _check_data, _check_memory):
        try:
            part(report, settings, node)
        except FedftError as error:
            report.problems.append(str(error))
    return report


def _check_policy(report: SiteReport, settings: Settings, node: NodeSettings) -> None:
    report.policy = load_policy(node.policy_path)
    run = planned_run(settings)
    if run.unit != "none":
        report.epsilon = run_epsilon(report.policy, run)
    report.problems += [f"the policy refuses this run: {reason}" for reason in refusals(report.policy, run)]


def planned_run(settings: Settings) -> RunFacts:
    """Return the run as its run-config plans it, with `strategy.min-available-nodes` nodes."""
    dp, nodes, rounds = settings.dp, settings.strategy.min_available_nodes, settings.num_server_rounds
    most = most_participations(rounds, settings.strategy.cohort_size(nodes), nodes)
    noise = chosen_noise(dp.target_epsilon, dp.noise_multiplier, most, dp.delta)
    return RunFacts(settings.model, dp.unit, rounds, noise, most)


def _check_data(report: SiteReport, settings: Settings, node: NodeSettings) -> None:
    train, test = load_split(settings.data, node, settings.seed)
    columns = columns_of([*train, *test], settings.data, node)
    report.data = _data_facts(Path(node.data_path), train, test, columns)
    usable = [row for row in train if not columns.defect(row)]
    if not usable:
        report.problems.append(f"node-config data-path={node.data_path!r} has no row with both a prompt and a response")
        return
    report.lengths = _length_facts(usable, columns, load_tokenizer(settings.model), settings)
    if report.policy:
        check_records(report.policy, len(usable))


def _data_facts(path: Path, train: Sequence[Row], test: Sequence[Row], columns: Columns) -> DataFacts:
    files, ignored = data_files(path) if path.is_dir() else ([path], [])
    rows = [*train, *test]
    seen = Counter(repr(sorted(row.items())) for row in rows)
    return DataFacts(
        files=[file.name for file in files],
        ignored=[file.name for file in ignored],
        rows=len(rows),
        dropped=dict(defects(rows, columns)),
        duplicates=len(rows) - len(seen),
        columns=sorted({column for row in rows for column in row}),
        schema=str(columns),
        train=len(train) - defects(train, columns).total(),
        test=len(test) - defects(test, columns).total(),
    )


def _length_facts(
    rows: Sequence[Row], columns: Columns, tokenizer: "PreTrainedTokenizerBase", settings: Settings
) -> LengthFacts:
    chosen = np.random.default_rng(0).permutation(len(rows))[:_SAMPLE].tolist() if len(rows) > _SAMPLE else None
    records = [columns.record(rows[i], False) for i in (chosen or range(len(rows)))]
    style, limit = settings.data.prompt_style, settings.train.max_length
    whole = tokenize(records, tokenizer, style, _UNTRUNCATED)
    lengths = np.array([example.length for example in whole])
    (first,) = tokenize(records[:1], tokenizer, style, limit)
    shortest, median, p90, p99, longest = np.quantile(lengths, (0, 0.5, 0.9, 0.99, 1), method="higher").tolist()
    return LengthFacts(
        examples=len(records),
        shortest=shortest,
        median=median,
        p90=p90,
        p99=p99,
        longest=longest,
        max_length=limit,
        truncated=sum(item.length > limit or len(item.completion) > limit // 2 for item in whole),
        prompt=str(tokenizer.decode(list(first.prompt))),
        completion=str(tokenizer.decode(list(first.completion))),
    )


def _check_memory(report: SiteReport, settings: Settings, node: NodeSettings) -> None:
    report.device = find_device()
    longest = settings.train.max_length
    if report.lengths and report.data and report.lengths.examples == report.data.train:
        longest = min(longest, report.lengths.longest)
    report.footprint = estimate(settings, longest, report.device)
    free = report.device.free
    if free is not None and report.footprint.total > free:
        report.problems.append(
            f"training is estimated to take {report.footprint.total / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free; "
            "free some, or ask for a smaller model.name, train.batch-size or train.max-length, model.quantization=4 or "
            "model.gradient-checkpointing=true"
        )


def _finite(value: float) -> float | str:
    return value if np.isfinite(value) else "inf"
