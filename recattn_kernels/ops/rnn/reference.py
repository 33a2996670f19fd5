"""The simple recurrent network in plain PyTorch: the definition that every other backend is tested against.

h[t] = act(x[t] + W_hh h[t-1] + bias_hh)                (Elman, 1990; act is tanh or relu)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recattn_kernels.ops.sequence import after_no_steps, compute_dtype, no_steps, recurrent, walk, zeros


def rnn(
    x: Tensor,
    weight_hh: Tensor,
    h0: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    bias_hh: Tensor | None = None,
    layer_norm: tuple[Tensor | None, ...] = (None, None),
    batch_first: bool = False,
    **interruptions: Any,
) -> tuple[Tensor, Tensor]:
    dtype, H = compute_dtype(x.dtype), weight_hh.shape[1]
    act = torch.tanh if nonlinearity == "tanh" else torch.relu
    h = zeros(x.to(dtype), H, batch_first) if h0 is None else h0.to(dtype)
    h_n_dtype = x.dtype if h0 is None else h0.dtype
    if x.shape[1 if batch_first else 0] == 0:
        output = no_steps(x, H, (weight_hh, h0, bias_hh, *layer_norm))
        return output, after_no_steps(h, output).to(h_n_dtype)
    product = recurrent(weight_hh, bias_hh, layer_norm, dtype)

    def step(x_t: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (act(x_t + product(states[0])),)

    output, (h_n,) = walk(step, x.to(dtype), (h,), batch_first=batch_first, **interruptions)
    return output.to(x.dtype), h_n.to(h_n_dtype)
