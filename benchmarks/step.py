"""Training steps: fedft's path against the stock SFTTrainer, and against the arithmetic floor.

    python benchmarks/step.py [--batch-size 8] [--steps 12] [--repeats 3] [--output FILE]

Both train the same examples of the built-in data on the built-in model, with the same tokens, rate and adapter. The
stock trainer has its defaults, except that gradient checkpointing, which costs it a third more, is off.

The floor is the time of the model's own matrix products alone, at the rate measured in the same run: for each useful
token (padding is not), a product with every linear layer forward and one backward (the base is frozen: no weight
gradients), and for each completion token the same with the head. Attention, norms and activations count nothing.
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
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from fedft import task
from fedft.config import NodeSettings
from fedft.data import Example, load_site
from fedft.model import initial_adapter, load_model, load_tokenizer, set_adapter


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

    times = alternate(options.repeats, fedft=ours, stock=lambda: stock("random"))
    stock("sequential")  # fedft's own order of the batches: the losses must agree
    floor = [arithmetic_floor(model, examples, options.batch_size) for _ in range(options.repeats)]
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
    """Return the seconds that the matrix products of one forward and backward pass over the examples take alone."""
    head = model.get_output_embeddings().weight
    shapes: dict[tuple[int, int], int] = {}
    for name, module in model.get_base_model().named_modules():
        weight = getattr(module, "weight", None)
        if (
            weight is not None
            and weight.ndim == 2
            and "lora_" not in name
            and "embed" not in name
            and weight is not head
        ):
            shapes[tuple(weight.shape)] = shapes.get(tuple(weight.shape), 0) + 1
    steps = len(examples) / batch_size
    tokens = round(sum(example.length for example in examples) / steps)
    completion = round(sum(len(example.completion) for example in examples) / steps)
    per_step = sum(count * product_seconds(tokens, *shape, head) for shape, count in shapes.items())
    return steps * (per_step + product_seconds(completion, *head.shape, head))


def product_seconds(rows: int, outputs: int, inputs: int, like: torch.Tensor, repeats: int = 5) -> float:
    """Return the median time of x·Wᵀ and of the product that gives the gradient of x."""
    x = torch.randn(rows, inputs, device=like.device).to(like.dtype)
    grad = torch.randn(rows, outputs, device=like.device).to(like.dtype)
    weight = torch.randn(outputs, inputs, device=like.device).to(like.dtype)
    times = [seconds(lambda: (torch.nn.functional.linear(x, weight), grad @ weight)) for _ in range(repeats + 1)]
    return float(np.median(times[1:]))


if __name__ == "__main__":
    main()
