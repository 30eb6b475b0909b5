"""The frozen base model, its tokenizer and its LoRA adapter. Knows nothing of Flower, data or training.

An adapter is a dictionary from PEFT's state-dict keys to float32 arrays, sorted by key; it is what travels, is clipped,
noised, averaged and saved. Base model and tokenizer are loaded once per process.
"""

import gc
import hashlib
import logging
import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedft import builtin
from fedft.config import LoraSettings, ModelSettings
from fedft.errors import AdapterError, FedftError, ModelError, first_line

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedTokenizerBase

Adapter = dict[str, NDArray[np.float32]]

ADAPTER_FILE = "adapter_model.safetensors"


@lru_cache(maxsize=1)
def load_tokenizer(settings: ModelSettings) -> "PreTrainedTokenizerBase":
    """Return the base model's tokenizer.

    Raises:
        ModelError: it cannot be loaded.
        FetchError: a built-in cannot be fetched.
    """
    from transformers import AutoTokenizer

    with _as_model_error(settings):
        tokenizer = AutoTokenizer.from_pretrained(_source(settings), revision=settings.revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@lru_cache(maxsize=1)
def load_model(settings: ModelSettings, lora: LoraSettings) -> "PeftModel":
    """Return the frozen base model with an adapter of this shape on the device of this process.

    The adapter's values are arbitrary until `set_adapter`. Where the base is quantised, its LoRA weights are float32
    all the same.

    Raises:
        ModelError: the base model cannot be loaded, or has none of the target modules.
        FetchError: a built-in cannot be fetched.
    """
    quiet_libraries()
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from fedft import attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = compute_dtype(settings.dtype)
    arguments: dict[str, Any] = {"revision": settings.revision, "dtype": dtype, "device_map": {"": device}}
    if settings.quantization:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=settings.quantization == 4,
            load_in_8bit=settings.quantization == 8,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
    with _as_model_error(settings):
        base = AutoModelForCausalLM.from_pretrained(_source(settings), **arguments)
        base.config.use_cache = False
        for module in base.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # bitsandbytes would repack 4-bit weights at the first scoring, after which training has no gradients
                module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if device == "cpu" and base.config.model_type in attention.MODEL_TYPES:
            base.set_attn_implementation(attention.NAME)
        model = get_peft_model(base, lora_config(settings, lora))
    gc.collect()
    gc.freeze()  # the trainer collects garbage at every start; the model and the libraries would be walked each time
    return model


def compute_dtype(name: str) -> "torch.dtype":
    """Return the torch dtype of `model.dtype`; `auto` is bfloat16 where this hardware is fast at it, else float32."""
    import torch

    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = _has_cpu_flag("avx512_bf16", "amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def lora_config(settings: ModelSettings, lora: LoraSettings) -> "LoraConfig":
    """Return PEFT's configuration of the adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT computes with it as a number
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_module_names) or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=_source(settings),
        revision=None if _is_on_disk(settings) else settings.revision,
    )


@lru_cache(maxsize=1)
def adapter_shapes(settings: ModelSettings, lora: LoraSettings) -> Mapping[str, tuple[int, ...]]:
    """Return the keys and shapes of the adapter, from the model's configuration alone: no weights are read.

    Raises:
        ModelError: the configuration cannot be loaded, or the model has none of the target modules.
    """
    quiet_libraries()
    import torch
    from peft import get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM

    with _as_model_error(settings):
        config = AutoConfig.from_pretrained(_source(settings), revision=settings.revision)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        model = get_peft_model(skeleton, lora_config(settings, lora))
    shapes = {
        key: tuple(value.shape) for key, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    odd = [key for key, shape in shapes.items() if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if odd:
        raise ModelError(
            f"model.name={settings.name!r}, lora.target-modules={lora.target_modules!r}: {odd[0]} is not the A or B of "
            "a linear layer; name linear modules only"
        )
    return dict(sorted(shapes.items()))


def initial_adapter(settings: ModelSettings, lora: LoraSettings, seed: int) -> Adapter:
    """Return the adapter that a run with this seed starts from, see `new_adapter`.

    Raises:
        ModelError: as `adapter_shapes`.
    """
    return new_adapter(adapter_shapes(settings, lora), seed)


def new_adapter(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Adapter:
    """Return a new adapter that changes nothing: A uniform in ±1/√(inputs), B zero (Hu et al., 2021, section 4.1).

    The same seed gives the same adapter on every machine; `adapter_digest` tells whether it did.

    Args:
        shapes: key to shape, sorted by key.
        seed: the run's.
    """
    rng = np.random.default_rng([seed, 0xA])
    adapter: Adapter = {}
    for key, shape in shapes.items():
        if key.endswith(".lora_A.weight"):
            bound = 1 / math.sqrt(shape[1])
            adapter[key] = rng.uniform(-bound, bound, shape).astype(np.float32)
        else:
            adapter[key] = np.zeros(shape, np.float32)
    return adapter


def fingerprint(settings: ModelSettings) -> str:
    """Return what identifies the base weights: the SHA-256 of a local model's weight files, else the Hub's commit.

    Raises:
        ModelError: the Hub's configuration cannot be loaded.
    """
    from transformers import AutoConfig

    source = Path(_source(settings))
    if not _is_on_disk(settings):
        with _as_model_error(settings):
            config = AutoConfig.from_pretrained(str(source), revision=settings.revision)
        return f"commit {config._commit_hash}"
    digest = hashlib.sha256()
    for file in sorted([*source.glob("*.safetensors"), *source.glob("*.bin")]):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"sha256 {digest.hexdigest()}"


def check_adapter(adapter: Mapping[str, NDArray[Any]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse arrays that are not exactly a finite float32 adapter of these keys and shapes.

    Raises:
        AdapterError: a key is missing or unknown, or an array has another shape or type, or is not finite.
    """
    wrong = sorted(set(adapter) ^ set(shapes))
    if wrong:
        raise AdapterError(f"the adapter lacks or should not have the key {wrong[0]!r} ({len(wrong)} such keys)")
    for key, shape in shapes.items():
        value = adapter[key]
        if value.shape != shape or value.dtype != np.float32:
            raise AdapterError(f"adapter array {key!r} is {value.dtype}{value.shape}, but must be float32{shape}")
        if not np.isfinite(value).all():
            raise AdapterError(f"adapter array {key!r} holds NaN or infinity")


def set_adapter(model: "PeftModel", adapter: Mapping[str, NDArray[np.float32]]) -> None:
    """Copy arrays into the model's adapter.

    Raises:
        AdapterError: as `check_adapter`.
    """
    import torch

    parameters = _adapter_parameters(model)
    check_adapter(adapter, shapes_in(model))
    for key, parameter in parameters.items():
        parameter.data = torch.tensor(adapter[key], dtype=torch.float32, device=parameter.device)


@contextmanager
def only_training(model: "PeftModel", keys: Collection[str]) -> Iterator[None]:
    """Freeze the model's other LoRA parameters inside the block: neither step nor gradient is computed for them."""
    frozen = [value for key, value in _adapter_parameters(model).items() if key not in keys]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def shapes_in(model: "PeftModel") -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes of the model's adapter, as `adapter_shapes` does without the model."""
    return {key: tuple(value.shape) for key, value in _adapter_parameters(model).items()}


def get_adapter(model: "PeftModel") -> Adapter:
    """Return copies of the model's adapter arrays."""
    return {key: value.detach().float().cpu().numpy().copy() for key, value in _adapter_parameters(model).items()}


def save_adapter(folder: Path, adapter: Adapter, settings: ModelSettings, lora: LoraSettings) -> None:
    """Write a plain PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        OSError: the files cannot be written.
    """
    config = lora_config(settings, lora)
    config.inference_mode = True
    config.target_modules = sorted({key.removesuffix(".weight").split(".")[-2] for key in adapter})
    config.save_pretrained(str(folder))
    (folder / ADAPTER_FILE).write_bytes(_as_safetensors(adapter))


def adapter_digest(adapter: Mapping[str, NDArray[np.float32]]) -> str:
    """Return the SHA-256, in hexadecimal, of the adapter's file as `save_adapter` writes it."""
    return hashlib.sha256(_as_safetensors(adapter)).hexdigest()


def _as_safetensors(adapter: Mapping[str, NDArray[np.float32]]) -> bytes:
    from safetensors.numpy import save  # not save_file: it reports a full disk as an error of its own

    return save(dict(adapter), metadata={"format": "pt"})


@contextmanager
def _as_model_error(settings: ModelSettings) -> Iterator[None]:
    """Turn whatever the model libraries raise for a wrong name or module into one line."""
    try:
        yield
    except FedftError:
        raise
    except Exception as error:  # transformers and peft raise a dozen unrelated types
        raise ModelError(
            f"cannot load model.name={settings.name!r} with model.revision={settings.revision!r}, "
            f"model.quantization={settings.quantization} and the lora settings: {first_line(error)}"
        ) from error


def _is_on_disk(settings: ModelSettings) -> bool:
    return builtin.is_builtin(settings.name) or Path(settings.name).expanduser().is_dir()


def _source(settings: ModelSettings) -> str:
    """Return the folder or Hub id that transformers loads."""
    if builtin.is_builtin(settings.name):
        return str(builtin.ensure(settings.name, "model"))
    if settings.name.startswith(("/", ".", "~")) and not _is_on_disk(settings):
        raise ModelError(f"model.name={settings.name!r} is no folder on this machine; give an absolute path that is")
    return str(Path(settings.name).expanduser().absolute()) if _is_on_disk(settings) else settings.name


def _adapter_parameters(model: "PeftModel") -> "dict[str, torch.nn.Parameter]":
    """Return the model's LoRA parameters under PEFT's state-dict keys, sorted."""
    parameters = {
        name.replace(f".{model.active_adapter}.", "."): value
        for name, value in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
    return dict(sorted(parameters.items()))


def _has_cpu_flag(*flags: str) -> bool:
    """Tell whether Linux reports one of these processor flags; False on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any(line.startswith("flags") and set(flags) & set(line.split()) for line in lines)


def quiet_libraries() -> None:
    """Keep progress bars, advice and deprecations of the model libraries out of the run's log; their errors are raised.

    Call it before they are imported: some speak at import.
    """
    for name in ("accelerate", "bitsandbytes", "peft", "torch", "transformers", "trl"):
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"{name}(\.|$)")
    for name in ("accelerate", "bitsandbytes", "bitsandbytes.backends.cpu.ops", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
