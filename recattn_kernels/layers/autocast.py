"""Which dtypes a layer meets under torch.autocast, and outside it."""

from __future__ import annotations

import torch
from torch import Tensor

from recattn_kernels import checks


def autocasts(input: Tensor) -> bool:
    """Whether torch.autocast is on for the device of input."""
    if not torch._C._is_any_autocast_enabled():
        return False
    device = input.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def accepted_dtypes(input: Tensor, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What input may have beside a weight of this dtype: under autocast any, as the products cast it."""
    return checks.FLOATING if autocasts(input) else (dtype,)


def projected_dtype(input: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Of a product of input with a weight, both of this dtype before autocast, which leaves float64 alone."""
    if dtype != torch.float64 and autocasts(input):
        return torch.get_autocast_dtype(input.device.type)
    return dtype
