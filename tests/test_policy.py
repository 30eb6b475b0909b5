import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, make_settings

from fedft.errors import PolicyError
from fedft.policy import Policy, RunFacts, check_records, check_run, load_policy, policy_keys, refusals, run_epsilon
from fedft.privacy.accounting import calibrate_noise, gaussian_epsilon

RUN = RunFacts(make_settings().model, "client", 3, noise_multiplier=2.0, participations=3)


def write(folder: Path, text: str) -> str:
    file = folder / "policy.toml"
    file.write_text(text)
    file.chmod(0o644)
    return str(file)


def model(name: str, revision: str = "main") -> Any:
    return make_settings(model__name=name, model__revision=revision).model


def test_no_file_and_an_empty_file_are_the_safe_policy(tmp_path: Path) -> None:
    assert load_policy("") == load_policy(write(tmp_path, "")) == Policy()
    safe = Policy()
    assert (safe.share_metrics, safe.maximum_epsilon, "none" in safe.allowed_units) == (False, 8.0, False)
    assert safe.allowed_models == ("builtin:smollm2-135m-instruct",)
    assert refusals(safe, RUN) == []


def test_every_key_is_read(tmp_path: Path) -> None:
    text = """
    allowed-models = ["/models/a", "org/b@main"]
    minimum-records = 7
    allowed-units = ["none"]
    maximum-epsilon = inf
    delta = 1e-7
    maximum-rounds = 9
    share-metrics = true
    """
    assert load_policy(write(tmp_path, text)) == Policy(
        ("/models/a", "org/b@main"), 7, ("none",), math.inf, 1e-7, 9, share_metrics=True
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("maximum-epsilom = 3", "key 'maximum-epsilom' is unknown; there are allowed-models, "),
        ("maximum_epsilon = 3", "key 'maximum_epsilon' is unknown"),
        ("[dp]\nmaximum-epsilon = 3", "key 'dp' is unknown"),
        ("maximum-epsilon = 0", "maximum-epsilon=0 is not allowed: it must be a number > 0"),
        ("maximum-epsilon = nan", "maximum-epsilon=nan is not allowed"),
        ("maximum-epsilon = '3'", "maximum-epsilon='3' is not allowed"),
        ("delta = 1", "delta=1 is not allowed: it must be a number > 0 and < 1"),
        ("minimum-records = 0", "minimum-records=0 is not allowed: it must be a whole number >= 1"),
        ("maximum-rounds = true", "maximum-rounds=True is not allowed"),
        ("maximum-rounds = 1.5", "maximum-rounds=1.5 is not allowed"),
        ("share-metrics = 1", "share-metrics=1 is not allowed: it must be true or false"),
        ("allowed-units = ['site']", "it must be a list of client, record, none"),
        ("allowed-units = 'client'", "it must be a list of"),
        ("allowed-models = [3]", "it must be a list of names"),
        ("allowed-models = ['org/name']", "'org/name', which is no built-in.*'org/name@<commit>'"),
        ("allowed-models = ['models/a']", "no absolute folder"),
        ("nonsense", "cannot be read"),
    ],
)
def test_wrong_policy_is_one_line_with_file_key_and_remedy(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(PolicyError, match=f"^node-config policy-path={path!r}.*{words}") as caught:
        load_policy(path)
    assert "\n" not in str(caught.value)


def test_policy_that_is_missing_or_may_be_written_by_others_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot be read"):
        load_policy(str(tmp_path / "none.toml"))
    path = write(tmp_path, "")
    for mode in (0o664, 0o646):
        Path(path).chmod(mode)
        with pytest.raises(PolicyError, match="chmod go-w"):
            load_policy(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": model("org/name")}, "allowed-models does not name model.name='org/name' at 'main'"),
        ({"unit": "none"}, "allowed-units=['client', 'record'] does not name dp.unit='none'"),
        ({"rounds": 101}, "maximum-rounds=100, but the run plans 101"),
        ({"noise_multiplier": 0.02}, "maximum-epsilon=8 at δ 1e-05, but the run's ε for this site is 4,118"),
        ({"noise_multiplier": 0.0}, "the run's ε for this site is inf"),
        ({"spent": math.inf}, "the run's ε for this site is inf"),
    ],
)
def test_safe_policy_refuses(change: dict[str, Any], words: str) -> None:
    (reason,) = refusals(Policy(), replace(RUN, **change))
    assert words in reason
    with pytest.raises(PolicyError, match=re.escape(words)):
        check_run(Policy(), replace(RUN, **change))


def test_every_reason_is_told_at_once() -> None:
    with pytest.raises(PolicyError, match=r"policy: allowed-models .*; allowed-units.*; maximum-rounds"):
        check_run(Policy(), replace(RUN, model=model("/x"), unit="none", rounds=1000))


def test_epsilon_is_measured_at_the_sites_delta_over_the_announced_participations() -> None:
    assert run_epsilon(Policy(), RUN) == gaussian_epsilon(2.0, 3, 1e-5)
    assert run_epsilon(Policy(delta=1e-9), RUN) == gaussian_epsilon(2.0, 3, 1e-9)
    exact = replace(RUN, noise_multiplier=calibrate_noise(8.0, 3, 1e-5))
    assert refusals(Policy(), exact) == []
    assert refusals(Policy(), replace(exact, participations=4)) != []


def test_server_that_lowers_the_noise_on_the_way_is_found_out() -> None:
    """Each message alone would pass; what the rounds cost together does not."""
    run = replace(RUN, participations=2, asked=2, spent=1 / 0.65**2 + 1 / 1.2**2)
    assert max(gaussian_epsilon(0.65, 1, 1e-5), gaussian_epsilon(1.2, 2, 1e-5)) < 8 < run_epsilon(Policy(), run)
    assert run_epsilon(Policy(), replace(run, spent=2 / 2.0**2)) == pytest.approx(gaussian_epsilon(2.0, 2, 1e-5))


def test_server_that_asks_more_often_than_announced_is_refused() -> None:
    check_run(Policy(), replace(RUN, asked=3))
    with pytest.raises(PolicyError, match="announced at most 3 rounds for a node and asks for another"):
        check_run(Policy(), replace(RUN, asked=4))
    with pytest.raises(PolicyError, match="announced at most 3 rounds"):
        check_run(Policy(allowed_units=("none",)), replace(RUN, unit="none", asked=4))


def test_run_without_privacy_needs_the_unit_none_and_then_has_no_epsilon() -> None:
    run = RunFacts(make_settings().model, "none", 3, asked=1)
    assert refusals(Policy(allowed_units=("none",)), run) == []


def test_models_are_allowed_by_name_folder_and_revision(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    policy = Policy(allowed_models=(str(tmp_path / "model"), "org/pinned@abc", "org/any@*"))

    def allowed(name: str, revision: str = "main") -> bool:
        return not refusals(policy, replace(RUN, model=model(name, revision)))

    assert allowed(str(tmp_path / "model"))
    assert allowed(str(tmp_path / "link"))
    assert not allowed(str(tmp_path))
    assert allowed("org/pinned", "abc")
    assert not allowed("org/pinned", "main")
    assert allowed("org/any", "whatever")
    assert not allowed("builtin:smollm2-135m-instruct")


def test_too_few_records_are_refused_without_telling_how_many() -> None:
    check_records(Policy(minimum_records=41), 41)
    with pytest.raises(PolicyError) as caught:
        check_records(Policy(minimum_records=42), 41)
    assert str(caught.value) == "refused by this site's policy: minimum-records=42, and the site has fewer"


def policy_table() -> str:
    def shown(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        return "[" + ", ".join(f'"{item}"' for item in value) + "]" if isinstance(value, tuple) else f"{value:g}"

    rows = [f"| `{key}` | `{shown(safe)}` | {wanted} | {what} |" for key, (safe, wanted, what) in policy_keys().items()]
    return "\n".join(["| Key | Without the key | Must be | Meaning |", "|---|---|---|---|", *rows])


def test_table_in_the_docs_is_the_policy() -> None:
    table = policy_table()
    page = (PROJECT / "docs/deployment.md").read_text(encoding="utf-8")
    assert table in page, f"put this table into docs/deployment.md:\n{table}"
