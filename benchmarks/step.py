"""Training steps: fedft's path against the stock SFTTrainer, and against the arithmetic floor.

    python benchmarks/step.py [--batch-size 8] [--steps 12] [--repeats 3] [--output FILE]

Both train the same examples of the built-in data on the built-in model, with the same tokens, rate and adapter. The
stock trainer has its defaults, except that gradient checkpointing, which costs it a third more, is off.

The floor is the arithmetic of the useful tokens (padding is not) at the rate of the model's own linear layers, measured
beside each of fedft's runs. It counts the products forward and backward: each linear layer's with its input and, as the
base is frozen, with its gradient alone; the head's at completion tokens; the adapter's, with weight gradients; and the
causal half of the attention scores. Norms, rotary embeddings, activations and the optimiser count nothing.
"""

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from measure import alternate, publish, ratio, seconds, spread
from presets import settings_with
from torch.nn.functional import linear
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from fedft import task
from fedft.data import Example, load_site
from fedft.model import initial_adapter, load_model, load_tokenizer, set_adapter
from fedft.node_config import NodeSettings


def main() -> None:
    parser = argparse.ArgumentParser(description="Time training steps.")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    settings = settings_with(
        **{"model.name": options.model, "train.batch-size": options.batch_size, "train.max-steps": options.steps}
    )
    tokenizer = load_tokenizer(settings.model)
    model = load_model(settings.model, settings.lora)
    adapter = initial_adapter(settings.model, settings.lora, settings.seed)
    site = load_site(settings.data, NodeSettings(0, 2), settings.seed, settings.train.max_length, lambda: tokenizer)
    drawn = task.draw_examples(
        [example.length for example in site.train], settings.train, np.random.default_rng([0, 0xB])
    )
    examples = [site.train[index] for index in drawn]
    losses: dict[str, float] = {}

    def ours() -> float:
        def call() -> None:
            result = task.train(
                model,
                tokenizer,
                adapter,
                site.train,
                settings.train,
                learning_rate=1e-4,
                gradient_checkpointing=False,
                seed=0,
            )
            losses["fedft"] = result.loss

        return seconds(call)

    def stock(sampling: str) -> float:
        def call() -> None:
            trainer = stock_trainer(model, tokenizer, examples, options.batch_size, sampling)
            set_adapter(model, adapter)
            losses[sampling] = trainer.train().training_loss

        elapsed = seconds(call)
        vars(model.get_base_model()).pop("forward", None)
        return elapsed

    times = alternate(
        options.repeats,
        fedft=ours,
        floor=lambda: arithmetic_floor(model, examples, options.batch_size),
        stock=lambda: stock("random"),
    )
    stock("sequential")  # fedft's own order of the batches: the losses must agree
    floor = times["floor"]
    tokens = sum(example.length for example in examples)
    publish(
        "step",
        {
            "fedft, s": spread(times["fedft"]),
            "stock SFTTrainer, s": spread(times["stock"]),
            "arithmetic floor, s": spread(floor),
            "stock / fedft": ratio(times["stock"], times["fedft"]),
            "floor / fedft (share of the floor's speed)": ratio(floor, times["fedft"]),
            "fedft, tokens/s": spread([tokens / value for value in times["fedft"]]),
            "loss, fedft": losses["fedft"],
            "loss, stock on the same batches": losses["sequential"],
            "tokens": tokens,
        },
        options.output,
    )


def stock_trainer(model: Any, tokenizer: Any, examples: list[Example], batch_size: int, sampling: str) -> Any:
    """Return trl's trainer on tokenised examples."""
    arguments = SFTConfig(
        tempfile.mkdtemp(prefix="fedft-step-"),
        per_device_train_batch_size=batch_size,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        train_sampling_strategy=sampling,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = Dataset.from_list([task._training_row(example) for example in examples])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def arithmetic_floor(model: Any, examples: list[Example], batch_size: int) -> float:
    """Return the seconds that the arithmetic of one forward and backward pass over the examples takes alone."""
    head = model.get_output_embeddings()
    linears = [
        module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and module is not head
    ]
    tokens = sum(example.length for example in examples)
    rate = product_rate({tuple(module.weight.shape) for module in linears}, tokens * batch_size // len(examples), head)
    adapter = sum(value.numel() for value in model.parameters() if value.requires_grad)
    config = model.config
    width = config.hidden_size * config.num_hidden_layers  # query heads times their size, in all layers
    flops = 4 * tokens * sum(module.weight.numel() for module in linears)
    flops += 4 * sum(len(example.completion) for example in examples) * head.weight.numel()
    flops += 6 * tokens * adapter
    flops += 6 * width * sum(example.length**2 for example in examples)
    return flops / rate


def product_rate(shapes: set[tuple[int, ...]], rows: int, like: torch.nn.Linear) -> float:
    """Return the FLOP/s of x·Wᵀ and the product that gives the gradient of x, over weights W of these shapes."""
    flops = elapsed = 0.0
    for outputs, inputs in shapes:
        x, grad, weight = (
            torch.randn(*shape, device=like.weight.device).to(like.weight.dtype)
            for shape in ((rows, inputs), (rows, outputs), (outputs, inputs))
        )
        times = [seconds(lambda: (linear(x, weight), grad @ weight)) for _ in range(20)]  # noqa: B023
        elapsed += float(np.median(times[1:]))
        flops += 4 * rows * outputs * inputs
    return flops / elapsed


if __name__ == "__main__":
    main()
