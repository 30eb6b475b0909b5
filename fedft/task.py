"""Local training of the adapter, and held-out scoring. Knows nothing of Flower.

Training is trl's `SFTTrainer` with the completion-only loss, less what a federated round does not need: the language
model's head sees the positions that predict a completion token and no others, batches hold examples of like length,
padding is on the right and therefore needs no attention mask, and no per-token entropy or accuracy is computed.
"""

import tempfile
import warnings
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl import SFTConfig, SFTTrainer

from fedft.adapter import Adapter, check_adapter
from fedft.config import TrainSettings
from fedft.data import Example
from fedft.errors import AdapterError
from fedft.evaluation import EvaluationSums
from fedft.model import get_adapter, only_training, quiet_libraries, set_adapter

_EVALUATION_BATCH = 8
_IGNORED = -100
_POOL = 100  # batches cut from examples that are sorted by length together


@dataclass(frozen=True)
class TrainResult:
    """What one client's local training gave."""

    adapter: Adapter
    """The arrays that trained."""
    loss: float
    """Mean training loss over the steps, in nats per completion token."""
    steps: int
    tokens: int
    """Prompt and completion tokens trained on, padding not counted."""


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Adapter,
    examples: Sequence[Example],
    settings: TrainSettings,
    *,
    learning_rate: float,
    gradient_checkpointing: bool,
    seed: int,
    trained: Collection[str] | None = None,
) -> TrainResult:
    """Train the adapter on a node's examples for one round and return what trained of it.

    Args:
        model: from `load_model`; left with the trained adapter.
        tokenizer: the model's.
        adapter: the global adapter to start from.
        examples: the node's training examples, at least one.
        settings: batch size, steps or epochs.
        learning_rate: constant within the round.
        gradient_checkpointing: recompute activations in the backward pass.
        seed: decides which examples are drawn, their order and the dropout.
        trained: the keys of the adapter that train; None is all. The others are frozen.

    Raises:
        AdapterError: `adapter` does not fit the model, or training made it non-finite or left it unchanged.
    """
    keys = list(adapter) if trained is None else [key for key in adapter if key in trained]
    drawn = draw_examples([example.length for example in examples], settings, np.random.default_rng([seed, 0xB]))
    rows = [_training_row(examples[index]) for index in drawn]
    with tempfile.TemporaryDirectory(prefix="fedft-") as scratch:
        trainer = _make_trainer(model, tokenizer, rows, settings, scratch, learning_rate, gradient_checkpointing, seed)
        try:
            set_adapter(model, adapter)  # after the trainer's own start, which casts the LoRA weights of a 4-bit base
            with only_training(model, keys), adapter_in_bfloat16(model):  # also while checkpoints are recomputed
                outcome = trainer.train()
        finally:
            vars(model.get_base_model()).pop("forward", None)  # undo the trainer's patch: it would pile up
    after = get_adapter(model)
    result = {key: after[key] for key in keys}
    check_adapter(result, {key: adapter[key].shape for key in keys})
    if all(np.array_equal(result[key], adapter[key]) for key in keys):
        raise AdapterError("training left the adapter unchanged; is train.learning-rate-max too small?")
    return TrainResult(result, float(outcome.training_loss), int(outcome.global_step), sum(map(_tokens, rows)))


def draw_examples(lengths: Sequence[int], settings: TrainSettings, rng: np.random.Generator) -> list[int]:
    """Return the indices one round trains on, in order: batches of like length, the batches shuffled.

    With `max-steps` it draws as many examples as the steps need, without replacement until every example was drawn;
    otherwise every example once an epoch. Batches are cut from pools of random examples sorted by length, larger than
    a short round needs where there are more: the larger the pool, the less padding.
    """
    count, size = len(lengths), settings.batch_size
    wanted = settings.max_steps * size * settings.gradient_accumulation_steps or settings.epochs * count
    indices: list[int] = []
    while len(indices) < wanted:
        order = rng.permutation(count).tolist()
        first = -len(indices) % size  # so many complete the last batch of the epoch before
        last = first + max(0, count - first) // size * size  # and those from here on begin that of the next
        pools = [
            sorted(order[i : min(i + _POOL * size, last)], key=lengths.__getitem__)
            for i in range(first, last, _POOL * size)
        ]
        batches = [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]
        indices += order[:first]
        indices += [index for batch in rng.permutation(len(batches)) for index in batches[batch]]
        indices += order[last:]
    return indices[:wanted]


def evaluate(model: PeftModel, adapter: Adapter, examples: Sequence[Example]) -> EvaluationSums:
    """Score held-out examples under the base model with this adapter.

    An example's options are scored in one pass: they follow the prompt side by side, each seeing the prompt and itself
    alone.

    Raises:
        AdapterError: `adapter` does not fit the model.
    """
    set_adapter(model, adapter)
    model.eval()
    total = EvaluationSums()
    ordered = sorted(examples, key=lambda example: len(example.prompt) + sum(map(len, example.completions)))
    with torch.inference_mode(), adapter_in_bfloat16(model):
        for start in range(0, len(ordered), _EVALUATION_BATCH):
            batch = ordered[start : start + _EVALUATION_BATCH]
            for example, scores in zip(batch, _score(model, batch), strict=True):
                per_token = [nll / len(ids) for nll, ids in zip(scores, example.completions, strict=True)]
                correct = int(np.argmin(per_token)) == example.answer if len(scores) > 1 else None
                total += EvaluationSums.of(scores[example.answer], len(example.completion), correct)
    return total


def token_nll(
    model: PeftModel, input_ids: torch.Tensor, where: tuple[torch.Tensor, ...], targets: torch.Tensor, **inputs: Any
) -> torch.Tensor:
    """Return the negative log-likelihood of target tokens, in nats, shape [tokens].

    Args:
        model: the model.
        input_ids: shape [batch, positions].
        where: row and position whose output predicts each target, two index tensors of shape [tokens].
        targets: token ids, shape [tokens].
        inputs: further arguments of the model's forward.

    The head is given those positions alone, through a hook on its input: logits of the prompt are never computed. Call
    it inside `adapter_in_bfloat16`.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, arguments: (arguments[0][where],))
    bf16 = model.dtype == torch.bfloat16
    try:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            logits = model(input_ids=input_ids, use_cache=False, **inputs).logits
    finally:
        hook.remove()
    return cross_entropy(logits.float(), targets, reduction="none")


def _score(model: PeftModel, batch: Sequence[Example]) -> list[list[float]]:
    """Return each completion's negative log-likelihood, in nats, for each example."""
    width = max(len(example.prompt) + sum(map(len, example.completions)) for example in batch)
    ids = torch.zeros((len(batch), width), dtype=torch.long)
    positions = torch.zeros((len(batch), width), dtype=torch.long)
    visible = torch.eye(width, dtype=torch.bool).repeat(len(batch), 1, 1)
    rows: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    for row, example in enumerate(batch):
        prompt = len(example.prompt)
        ids[row, :prompt] = torch.tensor(example.prompt)
        positions[row, :prompt] = torch.arange(prompt)
        visible[row, :prompt, :prompt] = torch.ones(prompt, prompt, dtype=torch.bool).tril()
        start = prompt
        for completion in example.completions:
            stop = start + len(completion)
            ids[row, start:stop] = torch.tensor(completion)
            positions[row, start:stop] = torch.arange(prompt, prompt + len(completion))
            visible[row, start:stop, :prompt] = True
            visible[row, start:stop, start:stop] = torch.ones(len(completion), len(completion), dtype=torch.bool).tril()
            rows += [row] * len(completion)
            sources += [prompt - 1, *range(start, stop - 1)]
            targets += completion
            start = stop
    device, dtype = model.device, model.dtype
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
    nll = token_nll(
        model,
        ids.to(device),
        (torch.tensor(rows, device=device), torch.tensor(sources, device=device)),
        torch.tensor(targets, device=device),
        attention_mask=mask[:, None].to(device),
        position_ids=positions.to(device),
    )
    pieces = iter(nll.split([len(ids) for example in batch for ids in example.completions]))
    return [[float(next(pieces).sum()) for _ in example.completions] for example in batch]


def adapter_in_bfloat16(model: PeftModel) -> AbstractContextManager[None]:
    """Keep PEFT from casting a bfloat16 base's activations to the adapter's float32; autocast casts its weights."""
    return disable_input_dtype_casting(model, model.dtype == torch.bfloat16)


def _training_row(example: Example) -> dict[str, list[int]]:
    return {
        "input_ids": [*example.prompt, *example.completion],
        "labels": [_IGNORED] * len(example.prompt) + list(example.completion),
    }


def _tokens(row: dict[str, list[int]]) -> int:
    return len(row["input_ids"])


class _CompletionTrainer(SFTTrainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean negative log-likelihood of the completion tokens of all accumulated batches."""
        labels = inputs["labels"][:, 1:]
        where = (labels != _IGNORED).nonzero(as_tuple=True)
        nll = token_nll(model, inputs["input_ids"], where, labels[where])
        return nll.sum() / (nll.numel() if num_items_in_batch is None else num_items_in_batch)


def _make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, list[int]]],
    settings: TrainSettings,
    scratch: str,
    learning_rate: float,
    gradient_checkpointing: bool,
    seed: int,
) -> _CompletionTrainer:
    quiet_libraries()
    arguments = SFTConfig(
        output_dir=scratch,
        num_train_epochs=1,  # the rows are already those of the round, in order
        train_sampling_strategy="sequential",
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        gradient_checkpointing=gradient_checkpointing,
        bf16=False,  # autocast; the base has its own dtype, the adapter is float32
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer = _CompletionTrainer(
            model, arguments, data_collator=_collate, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad on the right: under causal attention no token sees the padding after it."""
    return {
        key: pad_sequence([torch.tensor(row[key]) for row in rows], batch_first=True, padding_value=filler)
        for key, filler in (("input_ids", 0), ("labels", _IGNORED))
    }
