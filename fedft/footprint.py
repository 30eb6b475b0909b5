"""What a machine has, and a rough bound of what a client's training takes of it, before any weight is read.

The bound adds up the frozen weights, the adapter with its gradient and AdamW's two moments, the activations of the
largest batch, and the loss. Activations are those of a plain transformer layer, s·b·h·(34 + 5·a·s/h) bytes at 16 bits
for sequence s, batch b, width h and a heads (Korthikanti et al., 2022, arXiv 2205.05198, equation 1). It is an
estimate: real architectures, kernels and allocators differ, most often downwards.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedft.config import Settings
from fedft.model import adapter_shapes, base_skeleton, compute_dtype

_LIBRARIES = 1.0e9  # resident bytes of Python with torch, transformers, peft and trl; 0.6 to 0.9 GB on Linux
_QUANTISED_BYTES = {4: 0.5 + 4 / 64, 8: 1 + 4 / 1024}  # a weight, with its share of the blocks' scales


@dataclass(frozen=True)
class Device:
    """Where this machine would train; memory is in bytes, None where it cannot be found out."""

    name: str
    cores: int
    ram_total: int | None
    ram_free: int | None
    gpu_total: int | None = None
    gpu_free: int | None = None

    @property
    def free(self) -> int | None:
        """The free memory that training needs: the GPU's where there is one."""
        return self.ram_free if self.gpu_total is None else self.gpu_free


@dataclass(frozen=True)
class Footprint:
    """An estimate, in bytes, of the memory that one client's training takes at its peak."""

    parameters: int
    """Parameters of the frozen base model, a number and not bytes."""
    weights: int
    adapter: int
    """The adapter, its gradient and AdamW's two moments, all float32."""
    activations: int
    loss: int
    """Logits of the completions in float32, their softmax and their gradient."""
    libraries: int

    @property
    def total(self) -> int:
        """All of it together."""
        return self.weights + self.adapter + self.activations + self.loss + self.libraries


def find_device() -> Device:
    """Return what training would run on here: the first CUDA device, or else the processor."""
    import torch

    total, free = _ram()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not torch.cuda.is_available():
        return Device("CPU", cores, total, free)
    gpu_free, gpu_total = torch.cuda.mem_get_info()
    return Device(torch.cuda.get_device_name(), cores, total, free, gpu_total, gpu_free)


def estimate(settings: Settings, longest: int, device: Device) -> Footprint:
    """Return what a client's training would take at most, from the model's configuration alone.

    Args:
        settings: the run's.
        longest: tokens of the longest example after truncation.
        device: where it trains; on a GPU the libraries' memory is not counted.

    Raises:
        ModelError: the configuration cannot be loaded, or the model has none of the target modules.
    """
    skeleton = base_skeleton(settings.model)
    size = compute_dtype(settings.model.dtype).itemsize
    adapter = sum(math.prod(shape) for shape in adapter_shapes(settings.model, settings.lora).values())
    config = skeleton.config.get_text_config()
    tokens = settings.train.batch_size * longest
    return Footprint(
        parameters=sum(value.numel() for value in skeleton.parameters()),
        weights=_weight_bytes(skeleton, settings.model.quantization, size),
        adapter=4 * 4 * adapter,
        activations=_activation_bytes(config, settings, longest, size),
        loss=3 * 4 * int(tokens / 2) * int(config.vocab_size),
        libraries=int(_LIBRARIES) if device.gpu_total is None else 0,
    )


def _weight_bytes(skeleton: Any, bits: int, size: int) -> int:
    """Return the bytes of the frozen weights; quantisation leaves embeddings, head and norms as they are."""
    import torch

    head = skeleton.get_output_embeddings()
    linear = {
        id(module.weight): module.weight.numel()
        for module in skeleton.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    quantised = sum(linear.values()) if bits else 0
    rest = sum(value.numel() for value in skeleton.parameters()) - quantised
    return int(rest * size + quantised * _QUANTISED_BYTES.get(bits, 0))


def _activation_bytes(config: Any, settings: Settings, longest: int, size: int) -> int:
    width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    tokens = settings.train.batch_size * longest
    layer = tokens * width * (34 + 5 * heads * longest / width) * size / 2
    if settings.model.gradient_checkpointing:
        return int(layer + layers * tokens * width * size)
    return int(layers * layer)


def _ram() -> tuple[int | None, int | None]:
    """Return the memory of this machine, or of its container, and what is free of it; None off Linux."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
        total, free = kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError):
        return None, None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no control group, or one without a limit
        return total, free
    return min(total, limit), min(free, limit - used)
