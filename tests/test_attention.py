import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedft import attention


def tiny(model_type: str) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4} | ({} if model_type == "gpt_neox" else {"num_key_value_heads": 2})
    extra = {"head_dim": 8} if model_type == "qwen3" else {"sliding_window": 6} if model_type == "mistral" else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **heads, **extra))


def logits_and_gradient(model: torch.nn.Module, name: str, **inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    model.set_attn_implementation(name)  # type: ignore[operator]
    weight = next(value for key, value in model.named_parameters() if "layers.0." in key and value.ndim == 2)
    logits = model(**inputs, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits.square().mean(), [weight])
    return logits.detach(), gradient


@pytest.mark.parametrize("most_scores", [2**24, 0], ids=["products", "fused beyond the limit"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model_type", sorted(attention.MODEL_TYPES))
def test_attention_equals_the_models_own(
    model_type: str, padded: bool, most_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_MOST_SCORES", most_scores)
    model = tiny(model_type)
    inputs = {"input_ids": torch.arange(36).reshape(3, 12) % 64}
    if padded:
        inputs["attention_mask"] = (torch.arange(12)[None] < torch.tensor([[12], [9], [5]])).long()
    seen = inputs.get("attention_mask", torch.ones(3, 12)).bool()
    expected, expected_gradient = logits_and_gradient(model, "eager", **inputs)
    logits, gradient = logits_and_gradient(model, attention.NAME, **inputs)
    torch.testing.assert_close(logits[seen], expected[seen], atol=1e-5, rtol=1e-4)
    if not padded:  # what a fully masked row gives is not defined, and flows into the gradient
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-3)


def test_generation_with_a_cache_equals_the_models_own() -> None:
    model = tiny("llama")
    ids = torch.arange(7)[None]
    answers = []
    for name in ("eager", attention.NAME):
        model.set_attn_implementation(name)  # type: ignore[operator]
        answers.append(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0))  # type: ignore[operator]
    assert torch.equal(*answers)
