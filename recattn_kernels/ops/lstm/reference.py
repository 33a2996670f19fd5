"""The LSTM in plain PyTorch: the definition that every other backend is tested against.

i, f, g, o = x[t] + W_hh h[t-1] + bias_hh               (Hochreiter and Schmidhuber, 1997; Gers et al., 2000)
c[t] = sigmoid(f) * c[t-1] + sigmoid(i) * tanh(g)
h[t] = sigmoid(o) * tanh(c[t])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recattn_kernels.ops import sequence
from recattn_kernels.ops.sequence import after_no_steps, compute_dtype, no_steps, recurrent, walk, zeros


def lstm(
    x: Tensor,
    weight_hh: Tensor,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    bias_hh: Tensor | None = None,
    layer_norm: tuple[Tensor | None, ...] = (None, None, None, None),
    batch_first: bool = False,
    **interruptions: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, H = compute_dtype(x.dtype), weight_hh.shape[1]
    h, c = (zeros(x.to(dtype), H, batch_first) if s is None else s.to(dtype) for s in (h0, c0))
    h_n_dtype, c_n_dtype = (x.dtype if s is None else s.dtype for s in (h0, c0))
    if x.shape[1 if batch_first else 0] == 0:
        output = no_steps(x, H, (weight_hh, h0, c0, bias_hh, *layer_norm))
        return output, after_no_steps(h, output).to(h_n_dtype), after_no_steps(c, output).to(c_n_dtype)
    product = recurrent(weight_hh, bias_hh, layer_norm, dtype)
    weight_c, bias_c = layer_norm[2:]

    def step(x_t: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h, c = states
        i, f, g, o = (x_t + product(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        normed = c if weight_c is None or bias_c is None else sequence.layer_norm(c, weight_c, bias_c)
        return torch.sigmoid(o) * torch.tanh(normed), c

    output, (h_n, c_n) = walk(step, x.to(dtype), (h, c), batch_first=batch_first, **interruptions)
    return output.to(x.dtype), h_n.to(h_n_dtype), c_n.to(c_n_dtype)
