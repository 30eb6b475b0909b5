"""A site's policy: which runs may use its data, and what may leave besides the adapter.

The policy is a flat TOML file at the site, named by node-config `policy-path`. A key that is left out has its safe
value; a real site without a file has all of them. The site reads it anew for every message and checks the run before it
loads data or model. A run that is refused gets the reasons and nothing else.

**What it binds.** The client's code at this site: which base model it loads, in how many rounds of a run it trains, and
whether losses and counts leave. **What it cannot.** ε is computed from the noise that the server announces; the site
does not see it being added, and trusts the server with it. Rounds are counted per run and kept by the SuperNode:
another run, or a SuperNode that is started anew, counts from 0. The reason of a refusal leaves, and says what it says,
such as that this site has fewer records than `minimum-records`.
"""

import math
import stat
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fedft import builtin
from fedft.config import ModelSettings
from fedft.errors import PolicyError, first_line
from fedft.privacy.accounting import format_epsilon, gaussian_epsilon

UNITS = ("client", "record", "none")

_ANY_REVISION = "*"


def _key(default: Any, wanted: str, holds: Callable[[Any], bool], meaning: str) -> Any:
    return field(default=default, metadata={"wanted": wanted, "holds": holds, "meaning": meaning})


def _is_whole(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item.strip() for item in value)


@dataclass(frozen=True)
class Policy:
    """What a site allows; the defaults are the safe choice."""

    allowed_models: tuple[str, ...] = _key(
        tuple(builtin.names("model")),
        "a list of names",
        _are_texts,
        "base models: a built-in, an absolute folder, or a Hub id as `name@revision` (`name@*` for any revision)",
    )
    minimum_records: int = _key(
        100, "a whole number >= 1", _is_whole, "training rows with prompt and response that this site must have"
    )
    allowed_units: tuple[str, ...] = _key(
        ("client", "record"),
        "a list of " + ", ".join(UNITS),
        lambda value: _are_texts(value) and set(value) <= set(UNITS),
        "what the run's privacy protects (`dp.unit`); `none` allows runs without privacy, to which no ε applies",
    )
    maximum_epsilon: float = _key(
        8.0, "a number > 0", lambda value: _is_number(value) and value > 0, "largest ε of the whole run for this site"
    )
    delta: float = _key(
        1e-5,
        "a number > 0 and < 1",
        lambda value: _is_number(value) and 0 < value < 1,
        "δ of that ε, whatever the run's",
    )
    maximum_rounds: int = _key(100, "a whole number >= 1", _is_whole, "rounds that the run may plan")
    share_metrics: bool = _key(
        False,
        "true or false",
        lambda value: type(value) is bool,
        "whether losses, counts and the texts of errors may leave; if not, this site is not evaluated",
    )


@dataclass(frozen=True)
class RunFacts:
    """What a site knows of a run when a message arrives.

    Attributes:
        model: the base model.
        unit: `dp.unit`.
        rounds: the run's planned rounds.
        noise_multiplier: z that the server announces.
        participations: the most rounds that the server announces for any node.
        asked: rounds in which this site was asked to train, this one included.
        spent: Σ 1/z² over those rounds: together they cost what one release of noise multiplier 1/√spent does.
    """

    model: ModelSettings
    unit: str
    rounds: int
    noise_multiplier: float = 0.0
    participations: int = 1
    asked: int = 0
    spent: float = 0.0


def load_policy(path: str) -> Policy:
    """Return the policy in a file, or the safe one where `path` is empty.

    Raises:
        PolicyError: the file cannot be read, may be written by others than its owner, has an unknown key, or a value of
            the wrong type or range.
    """
    if not path:
        return Policy()
    where = f"node-config policy-path={path!r}"
    try:
        if Path(path).stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PolicyError(f"{where} may be written by others than its owner; forbid that with: chmod go-w")
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise PolicyError(f"{where} cannot be read: {first_line(error)}; correct it or name another file") from error
    known = {item.name.replace("_", "-"): item for item in fields(Policy)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise PolicyError(f"{where}: key {key!r} is unknown; there are {', '.join(known)}")
        if not known[key].metadata["holds"](value):
            raise PolicyError(f"{where}: {key}={value!r} is not allowed: it must be {known[key].metadata['wanted']}")
        values[known[key].name] = tuple(value) if isinstance(value, list) else value
    _check_models(where, values.get("allowed_models", ()))
    return Policy(**values)


def _check_models(where: str, names: tuple[str, ...]) -> None:
    for name in names:
        if "@" not in name and not builtin.is_builtin(name) and not Path(name).is_absolute():
            raise PolicyError(
                f"{where}: allowed-models holds {name!r}, which is no built-in and no absolute folder; name a Hub "
                f"model with its revision: '{name}@<commit>', or '{name}@{_ANY_REVISION}' for any"
            )


def policy_keys() -> dict[str, tuple[Any, str, str]]:
    """Return each key of a policy with its safe value, what it must be, and what it means."""
    return {
        item.name.replace("_", "-"): (item.default, item.metadata["wanted"], item.metadata["meaning"])
        for item in fields(Policy)
    }


def refusals(policy: Policy, run: RunFacts) -> list[str]:
    """Return the reasons for which a policy refuses a run; none where it allows it."""
    reasons = []
    if not _allows_model(policy, run.model):
        reasons.append(f"allowed-models does not name model.name={run.model.name!r} at {run.model.revision!r}")
    if run.unit not in policy.allowed_units:
        reasons.append(f"allowed-units={list(policy.allowed_units)} does not name dp.unit={run.unit!r}")
    if run.rounds > policy.maximum_rounds:
        reasons.append(f"maximum-rounds={policy.maximum_rounds}, but the run plans {run.rounds}")
    if run.unit != "none":
        epsilon = run_epsilon(policy, run)
        if not epsilon <= policy.maximum_epsilon:
            reasons.append(
                f"maximum-epsilon={policy.maximum_epsilon:g} at δ {policy.delta:g}, but the run's ε for this site is "
                f"{format_epsilon(epsilon)}"
            )
    return reasons


def run_epsilon(policy: Policy, run: RunFacts) -> float:
    """Return the zero-out ε at the policy's δ: of the announced plan, or of the rounds asked for, if larger."""
    planned = gaussian_epsilon(run.noise_multiplier, run.participations, policy.delta)
    if not run.spent:
        return planned
    asked = math.inf if math.isinf(run.spent) else gaussian_epsilon(1 / math.sqrt(run.spent), 1, policy.delta)
    return max(planned, asked)


def check_run(policy: Policy, run: RunFacts) -> None:
    """Refuse a run that the policy does not allow, or whose server asks more often than it announced.

    Raises:
        PolicyError: with every reason.
    """
    reasons = refusals(policy, run)
    announced = run.rounds if run.unit == "none" else run.participations
    if run.asked > announced:
        reasons.append(f"the server announced at most {announced} rounds for a node and asks for another")
    if reasons:
        raise PolicyError(f"refused by this site's policy: {'; '.join(reasons)}")


def check_records(policy: Policy, records: int) -> None:
    """Refuse to train on too few records; the reason does not say how many there are.

    Raises:
        PolicyError: they are fewer than `minimum-records`.
    """
    if records < policy.minimum_records:
        raise PolicyError(
            f"refused by this site's policy: minimum-records={policy.minimum_records}, and the site has fewer"
        )


def _allows_model(policy: Policy, model: ModelSettings) -> bool:
    if builtin.is_builtin(model.name):
        return model.name in policy.allowed_models
    folder = Path(model.name).expanduser()
    if folder.is_dir():
        folders = [Path(name) for name in policy.allowed_models if Path(name).is_absolute()]
        return any(allowed.resolve() == folder.resolve() for allowed in folders)
    return not {f"{model.name}@{model.revision}", f"{model.name}@{_ANY_REVISION}"}.isdisjoint(policy.allowed_models)
