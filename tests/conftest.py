"""Settings, tiny models and a tokenizer for the tests, built here: nothing is fetched."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedft.config import Settings, parse_run_config

PROJECT = Path(__file__).parent.parent
TEXT = "what is the cause of low glucose and high peptide an answer nerve artery vein bone fever rash cough virus"


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def default_run_config() -> dict[str, Any]:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    return flatten(project["tool"]["flwr"]["app"]["config"])


def make_settings(**overrides: Any) -> Settings:
    """Return the default settings with overrides such as `lora__r=4` for `lora.r=4`."""
    changes = {key.replace("__", ".").replace("_", "-"): value for key, value in overrides.items()}
    return parse_run_config(default_run_config() | changes)


@pytest.fixture
def run_config() -> dict[str, Any]:
    return default_run_config()


@pytest.fixture
def settings() -> Callable[..., Settings]:
    return make_settings


def build_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def build_llama(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def build_gpt_neox(folder: Path) -> None:
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=1,
        bos_token_id=1,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    build_llama(folder)
    build_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def gpt_neox_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt-neox")
    build_gpt_neox(folder)
    build_tokenizer(folder)
    return folder


@pytest.fixture(params=["llama", "gpt_neox"])
def model_folder(request: pytest.FixtureRequest) -> Path:
    """A Llama-like, then a GPT-NeoX-like base model."""
    folder = request.getfixturevalue(f"{request.param}_folder")
    assert isinstance(folder, Path)
    return folder
