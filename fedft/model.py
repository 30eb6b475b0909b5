"""The frozen base model, its tokenizer, and the adapter in it. Knows nothing of Flower, data or training.

Base model and tokenizer are loaded once per process.
"""

import gc
import hashlib
import importlib.metadata
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedft import builtin
from fedft.adapter import ADAPTER_FILE, Adapter, adapter_bytes, check_adapter, new_adapter
from fedft.config import LoraSettings, ModelSettings
from fedft.errors import FedftError, ModelError, first_line
from fedft.files import write_json

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def adapter_shapes(settings: ModelSettings, lora: LoraSettings) -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes of the adapter, sorted, from the model's configuration alone: no weights are read.

    Raises:
        ModelError: the configuration cannot be loaded, or the model has none of the target modules.
    """
    return {key: tuple(shape) for key, shape in _described(settings, lora)["shapes"].items()}


@lru_cache(maxsize=1)
def _described(settings: ModelSettings, lora: LoraSettings) -> dict[str, Any]:
    """Return the adapter's `shapes` and PEFT's `config` of it.

    Both are kept in fedft's cache, under what they follow from, where the model is on disk: the server of a run then
    imports neither PyTorch nor PEFT, which takes longer than a short round.
    """
    source = Path(_source(settings)) / "config.json"
    if not _is_on_disk(settings) or not source.is_file():
        return _describe(settings, lora)
    versions = [importlib.metadata.version(name) for name in ("fedft", "peft", "transformers")]
    origin = [source.read_text(encoding="utf-8"), str(source), asdict(settings), asdict(lora), versions]
    name = hashlib.sha256(json.dumps(origin).encode()).hexdigest()
    file = builtin.home() / "cache" / "adapters" / f"{name}.json"
    with suppress(OSError, ValueError, TypeError):
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if {"shapes", "config"} <= set(found):
            return found
    described = _describe(settings, lora)
    with suppress(OSError):  # a cache that cannot be written costs time, nothing else
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, described)
    return described


def _describe(settings: ModelSettings, lora: LoraSettings) -> dict[str, Any]:
    """Build the model without weights, wrap it, and read shapes and configuration off it."""
    quiet_libraries()
    from peft import get_peft_model, get_peft_model_state_dict

    with _as_model_error(settings):
        saved = lora_config(settings, lora)
        model = get_peft_model(base_skeleton(settings), saved)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    odd = [key for key in state if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if odd:
        raise ModelError(
            f"model.name={settings.name!r}, lora.target-modules={lora.target_modules!r}: {odd[0]} is not the A or B of "
            "a linear layer; name linear modules only"
        )
    saved.inference_mode = True
    saved.target_modules = sorted({key.removesuffix(".weight").split(".")[-2] for key in state})
    with tempfile.TemporaryDirectory(prefix="fedft-") as folder:
        saved.save_pretrained(folder)
        written = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    return {"shapes": {key: list(state[key].shape) for key in sorted(state)}, "config": written}


def base_skeleton(settings: ModelSettings) -> "PreTrainedModel":
    """Return the base model without its weights, on torch's meta device, from its configuration alone.

    Raises:
        ModelError: the configuration cannot be loaded.
    """
    quiet_libraries()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with _as_model_error(settings):
        config = AutoConfig.from_pretrained(_source(settings), revision=settings.revision)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def initial_adapter(settings: ModelSettings, lora: LoraSettings, seed: int) -> Adapter:
    """Return the adapter that a run with this seed starts from, see `new_adapter`.

    Raises:
        ModelError: as `adapter_shapes`.
    """
    return new_adapter(adapter_shapes(settings, lora), seed)


def fingerprint(settings: ModelSettings) -> str:
    """Return what identifies the base weights: the SHA-256 of a local model's weight files, else the Hub's commit.

    Raises:
        ModelError: the Hub's configuration cannot be loaded.
    """
    source = Path(_source(settings))
    if not _is_on_disk(settings):
        with _as_model_error(settings):
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(str(source), revision=settings.revision)
        return f"commit {config._commit_hash}"
    digest = hashlib.sha256()
    for file in sorted([*source.glob("*.safetensors"), *source.glob("*.bin")]):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"sha256 {digest.hexdigest()}"


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
    config = json.dumps(_described(settings, lora)["config"], indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(config, encoding="utf-8")
    (folder / ADAPTER_FILE).write_bytes(adapter_bytes(adapter))


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

    Call it before they are imported: some speak at import. bitsandbytes, which peft imports in any case, is imported
    here without PyTorch's compiler, which its functions for the CPU would load at import and start at the first use.
    """
    for name in ("accelerate", "bitsandbytes", "peft", "torch", "transformers", "trl"):
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"{name}(\.|$)")
    for name in ("accelerate", "bitsandbytes", "bitsandbytes.backends.cpu.ops", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    _import_bitsandbytes()


def _import_bitsandbytes() -> None:
    import torch

    def compile_nothing(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
        return function or (lambda given: given)

    if "bitsandbytes" not in sys.modules:
        compiler, torch.compile = torch.compile, compile_nothing  # type: ignore[assignment]
        try:
            import bitsandbytes  # noqa: F401
        finally:
            torch.compile = compiler
