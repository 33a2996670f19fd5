"""The input projection of every step at once: the one product of a recurrent layer that does not wait for a state."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def project(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input (..., D) weight^T + bias, with weight (G*H, D) and bias (G*H,): (..., G*H)."""
    return F.linear(input, weight, bias)
