"""One step of a GRU from its gates in plain PyTorch: the definition that every other backend is tested against.

r = sigmoid(x_r + q_r);  z = sigmoid(x_z + q_z);  n = tanh(x_n + r * q_n)
h' = (1 - z) * n + z * h
"""

from __future__ import annotations

import torch
from torch import Tensor

from recattn_kernels.ops.sequence import compute_dtype


def gru_step(x_gates: Tensor, h_gates: Tensor, h: Tensor) -> tuple[Tensor]:
    dtype = compute_dtype(x_gates.dtype)
    x_r, x_z, x_n = x_gates.to(dtype).chunk(3, -1)
    q_r, q_z, q_n = h_gates.to(dtype).chunk(3, -1)
    r, z = torch.sigmoid(x_r + q_r), torch.sigmoid(x_z + q_z)
    n = torch.tanh(x_n + r * q_n)
    return (((1 - z) * n + z * h.to(dtype)).to(h.dtype),)
