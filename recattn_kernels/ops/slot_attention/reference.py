"""Slot attention in plain PyTorch: the definition that every other backend is tested against.

A[k, n] = softmax over k of scale * q[k] . k[n] + bias[k]         (joint: over the heads' k together)
W[k, n] = (A[k, n] + eps) / sum over n of (A[k, n] + eps)         (denominator: A[k, n] / (sum over n of A[k, n] + eps))
updates[k] = sum over n of W[k, n] v[n]

A masked slot has A = W = 0, a masked input no part in any sum: what either holds is never read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recattn_kernels.ops.sequence import compute_dtype


def slot_attention(
    q: Tensor, k: Tensor, v: Tensor | None, bias: Tensor | None, slot_mask: Tensor | None, input_mask: Tensor | None,
    scale: float | None, eps: float, denominator: bool, joint: bool, return_attn: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    dtype = compute_dtype(q.dtype)
    heads = q.dim() == 4
    wide_q, wide_k = q.to(dtype), k.to(dtype)
    wide_v = wide_k if v is None else v.to(dtype)
    logits_bias = None if bias is None else bias.to(dtype).unsqueeze(-1)  # (B, [heads,] K, 1)
    slots = inputs = None
    if slot_mask is not None:  # (B, [1,] K, 1)
        slots = slot_mask[:, None, :, None] if heads else slot_mask[:, :, None]
        wide_q = wide_q.masked_fill(~slots, 0)
        logits_bias = None if logits_bias is None else logits_bias.masked_fill(~slots, 0)
    if input_mask is not None:  # (B, [1,] N, 1)
        inputs = input_mask[:, None, :, None] if heads else input_mask[:, :, None]
        wide_k, wide_v = wide_k.masked_fill(~inputs, 0), wide_v.masked_fill(~inputs, 0)

    logits = torch.matmul(wide_q * scale_of(q, scale), wide_k.transpose(-1, -2))  # (B, [heads,] K, N)
    if logits_bias is not None:
        logits = logits + logits_bias
    if slots is not None:
        none = ~slots.any(-2, keepdim=True)  # a sample without slots: its softmax is of zeros, and comes to nothing
        logits = logits.masked_fill(~(slots | none), -torch.inf)
    attn = _softmax(logits, joint and heads)
    weights = attn if denominator else attn + eps
    for kept in (slots, None if inputs is None else inputs.transpose(-1, -2)):
        if kept is not None:
            attn, weights = attn.masked_fill(~kept, 0), weights.masked_fill(~kept, 0)

    total = weights.sum(-1, keepdim=True)
    total = total + eps if denominator else total
    empty = total == 0
    updates = torch.matmul(weights, wide_v) / total.masked_fill(empty, 1)
    if slots is not None:  # 0 beside values that are not finite too
        updates = updates.masked_fill(~slots, 0)
    return updates.to(q.dtype), attn.to(q.dtype) if return_attn else None


def scale_of(q: Tensor, scale: float | None) -> float:
    return max(q.shape[-1], 1) ** -0.5 if scale is None else scale


def _softmax(logits: Tensor, joint: bool) -> Tensor:
    if not joint:
        return logits.softmax(-2)
    return logits.flatten(-3, -2).softmax(-2).view(logits.shape)
