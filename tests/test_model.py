import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROJECT, make_settings

from fedft import model
from fedft.adapter import ADAPTER_FILE, adapter_digest, check_adapter, new_adapter
from fedft.config import Settings
from fedft.errors import AdapterError, ModelError
from fedft.model import (
    adapter_shapes,
    compute_dtype,
    fingerprint,
    get_adapter,
    initial_adapter,
    load_model,
    load_tokenizer,
    quiet_libraries,
    save_adapter,
    set_adapter,
    shapes_in,
)


def settings_for(folder: Path, **changes: Any) -> Settings:
    return make_settings(**{"model__name": str(folder), "model__dtype": "float32", "lora__r": 4, **changes})


def test_shapes_from_the_configuration_are_those_of_the_loaded_model(model_folder: Path) -> None:
    settings = settings_for(model_folder)
    shapes = adapter_shapes(settings.model, settings.lora)
    adapter = get_adapter(load_model(settings.model, settings.lora))
    assert {key: value.shape for key, value in adapter.items()} == shapes
    assert list(adapter) == sorted(adapter)
    assert {value.dtype for value in adapter.values()} == {np.dtype(np.float32)}


def test_adapter_survives_the_way_through_the_model(model_folder: Path) -> None:
    settings = settings_for(model_folder)
    model = load_model(settings.model, settings.lora)
    rng = np.random.default_rng(0)
    shapes = adapter_shapes(settings.model, settings.lora)
    adapter = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    set_adapter(model, adapter)
    for key, value in get_adapter(model).items():
        np.testing.assert_array_equal(value, adapter[key])


def test_initial_adapter_changes_nothing_and_depends_on_the_seed(model_folder: Path) -> None:
    settings = settings_for(model_folder)
    model = load_model(settings.model, settings.lora)
    first, again, other = (initial_adapter(settings.model, settings.lora, seed) for seed in (1, 1, 2))
    a = next(key for key in first if ".lora_A." in key)
    np.testing.assert_array_equal(first[a], again[a])
    assert not np.array_equal(first[a], other[a])
    assert np.abs(first[a]).max() <= 1 / np.sqrt(first[a].shape[1])
    set_adapter(model, first)
    ids = torch.arange(10)[None]
    with torch.inference_mode(), model.eval().disable_adapter():
        base = model(input_ids=ids).logits
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=ids).logits, base)


def test_first_adapter_is_the_same_from_the_model_and_from_its_configuration(model_folder: Path) -> None:
    settings = settings_for(model_folder)
    shapes = shapes_in(load_model(settings.model, settings.lora))
    assert shapes == adapter_shapes(settings.model, settings.lora)
    assert list(shapes) == list(adapter_shapes(settings.model, settings.lora))
    first = initial_adapter(settings.model, settings.lora, 1)
    assert adapter_digest(new_adapter(shapes, 1)) == adapter_digest(first) != adapter_digest(new_adapter(shapes, 2))


def test_digest_is_that_of_the_saved_file(tmp_path: Path, llama_folder: Path) -> None:
    settings = settings_for(llama_folder)
    adapter = initial_adapter(settings.model, settings.lora, 1)
    save_adapter(tmp_path, adapter, settings.model, settings.lora)
    assert hashlib.sha256((tmp_path / ADAPTER_FILE).read_bytes()).hexdigest() == adapter_digest(adapter)


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "dtype", "nan"])
def test_adapter_that_does_not_fit_is_refused_with_its_key(damage: str) -> None:
    shapes = {"x.lora_A.weight": (2, 3), "x.lora_B.weight": (3, 2)}
    adapter: dict[str, Any] = {key: np.ones(shape, np.float32) for key, shape in shapes.items()}
    check_adapter(adapter, shapes)
    key = "x.lora_B.weight"
    if damage == "missing":
        del adapter[key]
    elif damage == "unknown":
        key = "y.lora_B.weight"
        adapter[key] = adapter["x.lora_B.weight"]
    elif damage == "shape":
        adapter[key] = adapter[key].T
    elif damage == "dtype":
        adapter[key] = adapter[key].astype(np.float64)
    else:
        adapter[key][0, 0] = np.nan
    with pytest.raises(AdapterError, match=key):
        check_adapter(adapter, shapes)


def test_saved_adapter_loads_in_plain_peft_with_the_same_output(model_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    settings = settings_for(model_folder)
    rng = np.random.default_rng(0)
    shapes = adapter_shapes(settings.model, settings.lora)
    adapter = {key: rng.normal(size=shape, scale=0.1).astype(np.float32) for key, shape in shapes.items()}
    save_adapter(tmp_path, adapter, settings.model, settings.lora)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    ours = load_model(settings.model, settings.lora)
    set_adapter(ours, adapter)
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        torch.testing.assert_close(plain(input_ids=ids).logits, ours.eval()(input_ids=ids).logits)
        assert not torch.allclose(plain(input_ids=ids).logits, plain.base_model.model.lm_head.weight.sum())


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base_has_the_same_float32_adapter(llama_folder: Path, bits: int) -> None:
    settings = settings_for(llama_folder, model__quantization=bits)
    model = load_model(settings.model, settings.lora)
    kinds = {type(module).__name__ for module in model.modules()}
    assert {4: "Linear4bit", 8: "Linear8bitLt"}[bits] in kinds
    adapter = get_adapter(model)
    assert {key: value.shape for key, value in adapter.items()} == adapter_shapes(settings.model, settings.lora)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__name": "/nowhere/model"}, "is no folder"),
        ({"lora__target_modules": "no_such_module"}, "no_such_module"),
        ({"lora__target_modules": "embed_tokens"}, "not the A or B of a linear layer"),
    ],
)
def test_wrong_model_settings_are_one_clear_line(llama_folder: Path, changes: dict[str, Any], words: str) -> None:
    settings = settings_for(llama_folder, **changes)
    with pytest.raises(ModelError, match=words) as caught:
        adapter_shapes(settings.model, settings.lora)
    assert "\n" not in str(caught.value)


def test_folder_that_holds_no_model_is_one_clear_line(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    with pytest.raises(ModelError, match=r"cannot load model\.name"):
        load_model(settings.model, settings.lora)
    with pytest.raises(ModelError, match=r"cannot load model\.name"):
        load_tokenizer(settings.model)


def test_dtype_is_taken_as_named_and_auto_is_one_of_them() -> None:
    assert compute_dtype("float16") is torch.float16
    assert compute_dtype("auto") in (torch.bfloat16, torch.float32)


def test_fingerprint_changes_with_the_weights(llama_folder: Path, gpt_neox_folder: Path) -> None:
    first, second = (fingerprint(settings_for(folder).model) for folder in (llama_folder, gpt_neox_folder))
    assert first.startswith("sha256 ")
    assert first != second
    assert first == fingerprint(dataclasses.replace(settings_for(llama_folder).model, dtype="auto"))


def test_the_adapters_description_is_kept_and_a_damaged_one_is_made_anew(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDFT_HOME", str(tmp_path))
    settings = settings_for(llama_folder, lora__r=3)
    model._described.cache_clear()
    shapes = adapter_shapes(settings.model, settings.lora)
    (kept,) = (tmp_path / "cache" / "adapters").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(model, "_describe", lambda *_: pytest.fail("the description was not kept"))
        model._described.cache_clear()
        assert adapter_shapes(settings.model, settings.lora) == shapes
    for damage in ("", "[]", "{"):
        kept.write_text(damage)
        model._described.cache_clear()
        assert adapter_shapes(settings.model, settings.lora) == shapes
    other = settings_for(llama_folder, lora__r=5)
    assert adapter_shapes(other.model, other.lora) != shapes
    model._described.cache_clear()


def test_a_server_with_a_kept_description_imports_no_model_library(llama_folder: Path) -> None:
    settings = settings_for(llama_folder)
    initial_adapter(settings.model, settings.lora, 1)
    script = (
        "import sys; sys.path.insert(0, 'tests'); import fedft.server_app; from conftest import make_settings;"
        "from fedft.model import initial_adapter, save_adapter, fingerprint; from pathlib import Path;"
        f"s = make_settings(model__name={str(llama_folder)!r}, model__dtype='float32', lora__r=4);"
        "fingerprint(s.model); initial_adapter(s.model, s.lora, 1);"
        "print(sorted({'torch', 'transformers', 'peft', 'trl', 'datasets', 'bitsandbytes'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
