from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_settings
from peft import PeftModel
from torch.nn.functional import cross_entropy

from fedft import attention, task
from fedft.adapter import Adapter
from fedft.config import Settings
from fedft.data import Example
from fedft.errors import AdapterError
from fedft.model import initial_adapter, load_model, load_tokenizer, set_adapter


def setup(folder: Path, **changes: Any) -> tuple[Settings, PeftModel, Adapter]:
    settings = make_settings(
        **{
            "model__name": str(folder),
            "model__dtype": "float32",
            "lora__r": 4,
            "train__max_steps": 3,
            "train__batch_size": 2,
            **changes,
        }
    )
    model = load_model(settings.model, settings.lora)
    return settings, model, initial_adapter(settings.model, settings.lora, 0)


def make_examples(count: int, options: int = 1) -> list[Example]:
    rng = np.random.default_rng(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(2, 250, rng.integers(low, high)).tolist())

    return [
        Example(ids(3, 20), tuple(ids(1, 6) for _ in range(options)), int(rng.integers(options))) for _ in range(count)
    ]


def train(settings: Settings, model: PeftModel, adapter: Adapter, seed: int = 0, **changes: Any) -> task.TrainResult:
    return task.train(
        model,
        load_tokenizer(settings.model),
        adapter,
        settings=settings.train,
        **{
            "examples": make_examples(20),
            "learning_rate": 1e-2,
            "gradient_checkpointing": False,
            "seed": seed,
            **changes,
        },
    )


def one_by_one(model: PeftModel, prompt: tuple[int, ...], completion: tuple[int, ...]) -> float:
    """The slow, obvious reference: one sequence, all logits, no padding."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return float(cross_entropy(logits, ids[0, len(prompt) :], reduction="sum"))


def test_scores_equal_one_by_one_for_every_option(model_folder: Path) -> None:
    _, model, adapter = setup(model_folder)
    examples = make_examples(11, options=4)
    sums = task.evaluate(model, adapter, examples)
    nll = tokens = correct = 0.0
    for example in examples:
        scores = [one_by_one(model, example.prompt, completion) for completion in example.completions]
        per_token = [score / len(ids) for score, ids in zip(scores, example.completions, strict=True)]
        nll += scores[example.answer]
        tokens += len(example.completion)
        correct += int(np.argmin(per_token)) == example.answer
    assert sums.nll == pytest.approx(nll, rel=1e-5)
    assert (sums.examples, sums.tokens, sums.choices, sums.correct) == (11, tokens, 11, correct)


def test_examples_without_options_have_a_loss_and_no_accuracy(model_folder: Path) -> None:
    _, model, adapter = setup(model_folder)
    sums = task.evaluate(model, adapter, make_examples(3))
    assert (sums.examples, sums.choices) == (3, 0)
    assert task.evaluate(model, adapter, []).examples == 0


def test_training_loss_equals_the_stock_trainers_on_the_same_batches(model_folder: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    settings, model, adapter = setup(model_folder)
    ours = train(settings, model, adapter)
    drawn = task.draw_examples(
        [example.length for example in make_examples(20)], settings.train, np.random.default_rng([0, 0xB])
    )
    rows = [task._training_row(make_examples(20)[index]) for index in drawn]
    arguments = SFTConfig(
        str(tmp_path),
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    stock = SFTTrainer(
        model, arguments, train_dataset=Dataset.from_list(rows), processing_class=load_tokenizer(settings.model)
    )
    stock.remove_callback(PrinterCallback)
    set_adapter(model, adapter)
    assert stock.train().training_loss == pytest.approx(ours.loss, abs=1e-3)
    vars(model.get_base_model()).pop("forward", None)


def test_training_learns_and_leaves_no_trace_in_the_model(model_folder: Path) -> None:
    settings, model, adapter = setup(model_folder, train__max_steps=30)
    before = task.evaluate(model, adapter, make_examples(20)).loss
    result = train(settings, model, adapter)
    assert task.evaluate(model, result.adapter, make_examples(20)).loss < before - 0.1
    assert (result.steps, result.tokens > 0) == (30, True)
    assert "forward" not in vars(model.get_base_model())
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_same_seed_gives_the_same_adapter_bit_for_bit_and_another_seed_another(llama_folder: Path) -> None:
    settings, model, adapter = setup(llama_folder)
    first, again, other = (train(settings, model, adapter, seed).adapter for seed in (1, 1, 2))
    assert all(np.array_equal(first[key], again[key]) for key in adapter)
    assert not all(np.array_equal(first[key], other[key]) for key in adapter)


def test_gradient_checkpointing_and_accumulation_change_nothing_but_the_cost(llama_folder: Path) -> None:
    settings, model, adapter = setup(llama_folder, train__batch_size=4, train__max_steps=1)
    plain = train(settings, model, adapter, gradient_checkpointing=False, examples=make_examples(4))
    checkpointed = train(settings, model, adapter, gradient_checkpointing=True, examples=make_examples(4))
    assert checkpointed.loss == pytest.approx(plain.loss, abs=1e-5)
    split, _, _ = setup(llama_folder, train__batch_size=2, train__gradient_accumulation_steps=2, train__max_steps=1)
    accumulated = train(split, model, adapter, examples=make_examples(4))
    assert accumulated.steps == plain.steps == 1
    assert accumulated.loss == pytest.approx(plain.loss, abs=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base_still_trains_after_scoring(llama_folder: Path, bits: int) -> None:
    settings, model, adapter = setup(llama_folder, model__quantization=bits)
    task.evaluate(model, adapter, make_examples(2))
    result = train(settings, model, adapter)
    assert {value.dtype for value in result.adapter.values()} == {np.dtype(np.float32)}
    assert any(np.abs(result.adapter[key] - adapter[key]).max() > 1e-4 for key in adapter)


def test_frozen_factors_get_no_gradient_and_can_train_again_afterwards(llama_folder: Path) -> None:
    settings, model, adapter = setup(llama_folder)
    trained = [key for key in adapter if ".lora_B." in key]
    graded: set[str] = set()
    hooks = [
        value.register_hook(lambda _, name=name: graded.add(name))
        for name, value in model.named_parameters()
        if "lora_" in name
    ]
    result = train(settings, model, adapter, trained=trained)
    assert list(result.adapter) == trained
    assert {name for name in graded if ".lora_A." in name} == set()
    assert len(graded) == len(trained)
    graded.clear()
    assert list(train(settings, model, adapter).adapter) == list(adapter)
    assert len(graded) == len(adapter)
    for hook in hooks:
        hook.remove()


def test_training_that_fails_leaves_no_factor_frozen(llama_folder: Path) -> None:
    settings, model, adapter = setup(llama_folder)
    with pytest.raises(AdapterError, match="left the adapter unchanged"):
        train(settings, model, adapter, learning_rate=0.0, trained=[key for key in adapter if ".lora_B." in key])
    assert all(value.requires_grad for name, value in model.named_parameters() if "lora_" in name)


def test_update_of_zero_is_an_error_not_a_reply(llama_folder: Path) -> None:
    settings, model, adapter = setup(llama_folder)
    with pytest.raises(AdapterError, match="left the adapter unchanged"):
        train(settings, model, adapter, learning_rate=0.0)


def test_non_finite_update_is_an_error_not_a_reply(llama_folder: Path) -> None:
    settings, model, adapter = setup(llama_folder)
    with pytest.raises(AdapterError, match="NaN or infinity"):
        train(settings, model, adapter, learning_rate=float("inf"))


@pytest.mark.parametrize(("steps", "epochs", "wanted"), [(3, 1, 12), (10, 1, 40), (0, 2, 20), (1, 1, 4)])
def test_draws_cover_the_examples_evenly(steps: int, epochs: int, wanted: int) -> None:
    settings = make_settings(train__max_steps=steps, train__epochs=epochs, train__batch_size=4).train
    drawn = task.draw_examples(list(range(10)), settings, np.random.default_rng(0))
    counts = Counter(drawn)
    assert len(drawn) == wanted
    assert max(counts.values()) - min(counts[i] for i in range(10)) <= 1


def test_batches_hold_examples_of_like_length() -> None:
    settings = make_settings(train__max_steps=0, train__batch_size=4).train
    lengths = np.random.default_rng(0).integers(1, 1000, 64).tolist()
    drawn = [lengths[index] for index in task.draw_examples(lengths, settings, np.random.default_rng(0))]
    spreads = [max(drawn[i : i + 4]) - min(drawn[i : i + 4]) for i in range(0, 64, 4)]
    assert np.mean(spreads) < 100
    assert drawn != sorted(drawn)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_training_runs_on_a_gpu(llama_folder: Path, bits: int) -> None:
    settings, model, adapter = setup(llama_folder, model__quantization=bits, model__dtype="bfloat16")
    assert model.device.type == "cuda"
    assert train(settings, model, adapter).steps == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU keeps its fused attention")
def test_on_the_cpu_known_architectures_attend_by_plain_products(model_folder: Path) -> None:
    _, model, _ = setup(model_folder)
    assert model.config._attn_implementation == attention.NAME


def test_bfloat16_base_computes_the_adapter_in_bfloat16_and_trains_it_in_float32(llama_folder: Path) -> None:
    settings, model, adapter = setup(llama_folder, model__dtype="bfloat16")
    seen = []
    layer = next(module for name, module in model.named_modules() if name.endswith("lora_B.default"))
    hook = layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    result = train(settings, model, adapter)
    hook.remove()
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for value in result.adapter.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("bits", [0, 4])
def test_gradient_checkpointing_of_a_bfloat16_base_gives_the_same_adapter(model_folder: Path, bits: int) -> None:
    settings, model, adapter = setup(model_folder, model__dtype="bfloat16", model__quantization=bits, lora__dropout=0.1)
    plain, checkpointed = (train(settings, model, adapter, gradient_checkpointing=it).adapter for it in (False, True))
    assert all(np.array_equal(plain[key], checkpointed[key]) for key in plain)
