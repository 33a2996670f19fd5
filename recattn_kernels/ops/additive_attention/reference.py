"""Additive attention in plain PyTorch: the definition that every other backend is tested against.

e[n] = weight . act(keys[n] + query);  a = softmax over n of e;  context = sum over n of a[n] values[n]
"""

from __future__ import annotations

import torch
from torch import Tensor

from recattn_kernels.ops.sequence import compute_dtype


def additive_attention(
    query: Tensor,  # (B, A)
    keys: Tensor,  # (B, N, A)
    weight: Tensor,  # (A,)
    values: Tensor,  # (B, N, D)
    mask: Tensor | None,  # (B, N)
    activation: str,
    return_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    dtype = compute_dtype(query.dtype)
    (B, N, A), D = keys.shape, values.shape[2]
    keys, values = keys.to(dtype), values.to(dtype)
    if mask is not None:  # what is masked is not looked at: NaN and infinity stay out of every sum and every gradient
        absent = ~mask.unsqueeze(2)
        keys, values = keys.masked_fill(absent, 0.0), values.masked_fill(absent, 0.0)
    act = torch.tanh if activation == "tanh" else torch.relu
    hidden = act(keys + query.to(dtype).unsqueeze(1))
    e = torch.mm(hidden.reshape(B * N, A), weight.to(dtype).unsqueeze(1)).view(B, N)
    if mask is not None:
        # A row with nothing to attend to takes an even softmax, then zeros: minus infinity alone would make NaN of it.
        e = e.masked_fill(~mask & mask.any(1, keepdim=True), float("-inf"))
    a = torch.softmax(e, 1)
    if mask is not None:
        a = a.masked_fill(~mask, 0.0)
    context = torch.bmm(a.unsqueeze(1), values).view(B, D)
    return context.to(query.dtype), a.to(query.dtype) if return_weights else None
