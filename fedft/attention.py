"""Attention on the CPU by plain matrix products, registered with transformers as an attention implementation.

PyTorch's fused attention is built for long sequences; on the CPU its backward pass is 2 to 4 times slower than products
of whole score matrices for examples of 50 to 250 tokens (docs/performance.md). transformers' own eager attention copies
keys and values once per query head; here the query heads that share a key head are rows of one product instead.
"""

from typing import Any

import torch
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention, softmax
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "fedft_products"
MODEL_TYPES = frozenset({"gpt_neox", "llama", "mistral", "qwen2", "qwen3"})
"""Architectures whose attention is this formula, no more: no soft cap, no sinks. Tested against their own."""

_MOST_SCORES = 2**24  # of a layer; they are kept for the backward pass, and fused attention is as fast beyond


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return softmax(scaling · Q·Kᵀ + mask)·V, shape [batch, positions, query heads, size], and no weights.

    Args:
        module: the attention layer, unused.
        query: shape [batch, query heads, positions, size].
        key: shape [batch, key heads, source positions, size]; the query heads are a multiple of the key heads.
        value: as `key`.
        attention_mask: added to the scores, broadcast to [batch, 1, positions, source positions].
        scaling: factor of the scores; None is 1/√size.
        dropout: probability of dropping an attention weight.
    """
    batch, heads, positions, size = query.shape
    shared, sources = key.shape[1:3]
    scaling = size**-0.5 if scaling is None else scaling
    if batch * heads * positions * sources > _MOST_SCORES:
        fused = scaled_dot_product_attention(
            query, key, value, attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=heads != shared
        )
        return fused.transpose(1, 2).contiguous(), None
    rows = heads // shared * positions
    scores = torch.matmul(query.reshape(batch, shared, rows, size), key.transpose(2, 3)).mul_(scaling)
    scores = scores.view(batch, shared, heads // shared, positions, sources)
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, None, :, :sources]
    weights = drop(softmax(scores, dim=-1), dropout) if dropout else softmax(scores, dim=-1)
    mixed = torch.matmul(weights.view(batch, shared, rows, sources), value)
    return mixed.view(batch, heads, positions, size).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)
