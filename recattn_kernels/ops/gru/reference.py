"""The GRU in plain PyTorch: the definition that every other backend is tested against.

q = W_hh h[t-1] + bias_hh
r = sigmoid(x_r[t] + q_r);  z = sigmoid(x_z[t] + q_z)
n = tanh(x_n[t] + r * q_n)                              (as cuDNN and torch.nn; reset_after=False: the original,
n = tanh(x_n[t] + W_hn (r * h[t-1]) + bias_hn)           Cho et al., 2014)
h[t] = (1 - z) * n + z * h[t-1]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recattn_kernels.ops.sequence import after_no_steps, compute_dtype, no_steps, recurrent, walk, zeros


def gru(
    x: Tensor,
    weight_hh: Tensor,
    h0: Tensor | None = None,
    *,
    bias_hh: Tensor | None = None,
    reset_after: bool = True,
    layer_norm: tuple[Tensor | None, ...] = (None, None),
    batch_first: bool = False,
    **interruptions: Any,
) -> tuple[Tensor, Tensor]:
    dtype, H = compute_dtype(x.dtype), weight_hh.shape[1]
    h = zeros(x.to(dtype), H, batch_first) if h0 is None else h0.to(dtype)
    h_n_dtype = x.dtype if h0 is None else h0.dtype
    if x.shape[1 if batch_first else 0] == 0:
        output = no_steps(x, H, (weight_hh, h0, bias_hh, *layer_norm))
        return output, after_no_steps(h, output).to(h_n_dtype)

    if reset_after:
        product = recurrent(weight_hh, bias_hh, layer_norm, dtype)

        def step(x_t: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (h,) = states
            x_r, x_z, x_n = x_t.chunk(3, -1)
            q_r, q_z, q_n = product(h).chunk(3, -1)
            r, z = torch.sigmoid(x_r + q_r), torch.sigmoid(x_z + q_z)
            n = torch.tanh(x_n + r * q_n)
            return ((1 - z) * n + z * h,)

    else:
        biases = (None, None) if bias_hh is None else (bias_hh[: 2 * H], bias_hh[2 * H :])
        of_h = recurrent(weight_hh[: 2 * H], biases[0], (None, None), dtype)
        of_reset_h = recurrent(weight_hh[2 * H :], biases[1], (None, None), dtype)

        def step(x_t: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (h,) = states
            q_r, q_z = of_h(h).chunk(2, -1)
            x_r, x_z, x_n = x_t.chunk(3, -1)
            r, z = torch.sigmoid(x_r + q_r), torch.sigmoid(x_z + q_z)
            n = torch.tanh(x_n + of_reset_h(r * h))
            return ((1 - z) * n + z * h,)

    output, (h_n,) = walk(step, x.to(dtype), (h,), batch_first=batch_first, **interruptions)
    return output.to(x.dtype), h_n.to(h_n_dtype)
