"""One step of an LSTM from its gates in plain PyTorch: the definition that every other backend is tested against.

i, f, g, o = gates
c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
h = sigmoid(o) * tanh(c')
"""

from __future__ import annotations

import torch
from torch import Tensor

from recattn_kernels.ops.sequence import compute_dtype


def lstm_step(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(gates.dtype)
    i, f, g, o = gates.to(dtype).chunk(4, -1)
    new = torch.sigmoid(f) * c.to(dtype) + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(new)
    return h.to(gates.dtype), new.to(c.dtype)
