"""Which rows are held out, and how the others are shared among simulated nodes.

The test split depends on the rows and the share alone, never on a seed, so that runs stay comparable.
"""

from collections.abc import Sequence

import numpy as np

from fedft.config import DataSettings
from fedft.errors import DataError
from fedft.rows import Row

_TEST_SPLIT_KEY = 20_220_324  # any constant: it fixes which rows are held out


def split_test(rows: Sequence[Row], fraction: float, stratify_by: str) -> tuple[list[Row], list[Row]]:
    """Split rows into training rows and test rows, `round(fraction * len(rows))` of them, the same at every call.

    Each class of `stratify_by` gives its share up to one row (largest remainders first). Test rows come back shuffled.
    """
    total = round(fraction * len(rows))
    rng = np.random.default_rng(_TEST_SPLIT_KEY)
    strata: dict[str, list[int]] = {}
    for index in rng.permutation(len(rows)).tolist():
        strata.setdefault(str(rows[index].get(stratify_by, "")), []).append(index)
    shares = {name: fraction * len(members) for name, members in strata.items()}
    counts = {name: int(share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: (counts[name] - shares[name], name))
    for name in by_remainder[: max(0, total - sum(counts.values()))]:
        counts[name] += 1
    chosen = [index for name, members in strata.items() for index in members[: counts[name]]]
    held_out = set(chosen)
    test = [rows[i] for i in rng.permutation(chosen).tolist()]
    return [row for index, row in enumerate(rows) if index not in held_out], test


def share_out(settings: DataSettings, train: Sequence[Row], count: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Return the indices of the training rows of each of `count` partitions; a partition may be empty.

    Raises:
        DataError: more partitions than rows or classes, a missing column, or sizes the partitioner cannot make.
    """
    if count == 1:
        return (tuple(range(len(train))),)
    if count > len(train):
        raise DataError(
            f"{count} SuperNodes cannot share the {len(train)} training rows; use at most that many SuperNodes, "
            "or raise data.max-examples"
        )
    column = settings.partition_by
    if settings.partitioner in ("dirichlet", "natural") and column not in train[0]:
        raise DataError(
            f"data.partition-by={column!r} is not in the data, which has {sorted(train[0])}; "
            f"data.partitioner={settings.partitioner!r} needs it"
        )
    order = np.random.default_rng(seed).permutation(len(train)).tolist()
    classes = [str(train[i].get(column, "")) for i in order]
    if settings.partitioner == "iid":  # as flwr-datasets would, whose import takes longer than the sharing
        parts = [part.tolist() for part in np.array_split(np.arange(len(train)), count)]
    elif settings.partitioner == "natural":
        parts = _deal_groups(classes, count, column)
    else:
        parts = _flwr_partitions(settings, classes, count, seed)
    return tuple(tuple(order[position] for position in part) for part in parts)


def _deal_groups(classes: list[str], count: int, column: str) -> list[list[int]]:
    """Give each partition whole classes: the largest class first, always to the smallest partition."""
    groups: dict[str, list[int]] = {}
    for position, name in enumerate(classes):
        groups.setdefault(name, []).append(position)
    if count > len(groups):
        raise DataError(
            f"data.partition-by={column!r} has {len(groups)} distinct values, fewer than the {count} SuperNodes; "
            "use at most that many, or another data.partitioner"
        )
    parts: list[list[int]] = [[] for _ in range(count)]
    for name in sorted(groups, key=lambda group: (-len(groups[group]), group)):
        min(parts, key=len).extend(groups[name])
    return parts


def _flwr_partitions(settings: DataSettings, classes: list[str], count: int, seed: int) -> list[list[int]]:
    from datasets import Dataset, disable_progress_bars
    from flwr_datasets import partitioner

    disable_progress_bars()
    sized = {
        "linear": partitioner.LinearPartitioner,
        "square": partitioner.SquarePartitioner,
        "exponential": partitioner.ExponentialPartitioner,
    }
    if settings.partitioner == "dirichlet":
        splitter = partitioner.DirichletPartitioner(
            count, "class", settings.alpha, min_partition_size=0, self_balancing=False, seed=seed
        )
    else:
        splitter = sized[settings.partitioner](count)
    splitter.dataset = Dataset.from_dict({"position": list(range(len(classes))), "class": classes})
    try:
        return [list(splitter.load_partition(index)["position"]) for index in range(count)]
    except ValueError as error:
        raise DataError(
            f"data.partitioner={settings.partitioner!r} cannot share {len(classes)} training rows among {count} "
            f"SuperNodes: {str(error).splitlines()[0]}; use fewer SuperNodes or another partitioner"
        ) from error
