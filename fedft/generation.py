"""Ask a base model and its fine-tuned adapter the same question. Knows nothing of Flower."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedft import builtin
from fedft.data import render_prompt
from fedft.errors import AdapterError, ModelError, first_line
from fedft.model import compute_dtype, quiet_libraries

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Decoding:
    """How an answer is drawn; sampling is the notebook's: top-p 0.9, temperature 0.7, repetition penalty 1.2."""

    max_new_tokens: int = 100
    sample: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Tuned:
    """A base model with an adapter on it, ready to answer."""

    model: "PeftModel"
    tokenizer: "PreTrainedTokenizerBase"
    prompt_style: str
    base: str


def load_tuned(adapter: Path) -> Tuned:
    """Load an adapter folder on its base model.

    Where the folder lies in a run directory, `run.json` names the base model and the prompt style; elsewhere the
    adapter's own configuration does, and the prompt style is `auto`.

    Raises:
        AdapterError: the folder holds no readable adapter, or it does not fit the base model.
        ModelError: the base model cannot be loaded.
        FetchError: a built-in base model cannot be fetched.
    """
    quiet_libraries()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, revision, prompt_style = _base_of(adapter)
    source = str(builtin.ensure(base, "model")) if builtin.is_builtin(base) else base
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=compute_dtype("auto"))
    except Exception as error:  # transformers raises a dozen unrelated types
        raise ModelError(f"cannot load the base model {base!r} of {str(adapter)!r}: {first_line(error)}") from error
    try:
        tuned = PeftModel.from_pretrained(model, str(adapter))
    except Exception as error:  # so does peft
        raise AdapterError(f"cannot put the adapter {str(adapter)!r} on {base!r}: {first_line(error)}") from error
    return Tuned(tuned.eval(), tokenizer, prompt_style, base)


def answer(tuned: Tuned, question: str, decoding: Decoding) -> Iterator[str]:
    """Yield the base model's answer, then the fine-tuned model's, to the same prompt with the same seed."""
    import torch
    from transformers import set_seed

    prompt = render_prompt(question, tuned.tokenizer, tuned.prompt_style)
    is_chat = bool(tuned.tokenizer.chat_template) and tuned.prompt_style != "alpaca"
    inputs = tuned.tokenizer(prompt, add_special_tokens=not is_chat, return_tensors="pt")
    sampling: dict[str, Any] = {"do_sample": False}
    if decoding.sample:
        sampling = {"do_sample": True, "top_p": 0.9, "temperature": 0.7, "repetition_penalty": 1.2}

    def generate() -> str:
        set_seed(decoding.seed)
        with torch.inference_mode():
            output = tuned.model.generate(
                **inputs,
                **sampling,
                max_new_tokens=decoding.max_new_tokens,
                pad_token_id=tuned.tokenizer.pad_token_id or tuned.tokenizer.eos_token_id,
            )
        new = output[0, inputs["input_ids"].shape[1] :]
        return str(tuned.tokenizer.decode(new, skip_special_tokens=True)).strip()

    with tuned.model.disable_adapter():
        yield generate()
    yield generate()


def _base_of(adapter: Path) -> tuple[str, str, str]:
    """Return the base model's name, its revision and the prompt style."""
    try:
        run = adapter.parent / "run.json"
        if run.is_file():
            config = json.loads(run.read_text(encoding="utf-8"))["config"]
            name = str(Path(config["model"]["name"]).expanduser())
            return name, config["model"]["revision"], config["data"]["prompt_style"]
        own = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        return own["base_model_name_or_path"], own.get("revision") or "main", "auto"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"cannot tell the base model of {str(adapter)!r}: {error}") from error
