"""The update of update.py on the CPU: hands pointers to csrc/cpu/slot_update.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recattn_kernels.ops.slot_attention.update import empty
from recattn_kernels.strides import cpu, huge_pages, pointer


def forward(*args: Any) -> tuple[Tensor, ...]:
    *inputs, eps = args
    inputs = [x.contiguous() for x in inputs]
    result, *kept = empty(*inputs, eps)
    huge_pages(result, *kept)
    cpu().slot_update_forward(_common(inputs, kept, eps), pointer(result))
    return result, *kept


def backward(
    grad: Tensor, saved: Sequence[Tensor], inputs: Sequence[Tensor], eps: float, needs: Sequence[bool]
) -> list[Tensor | None]:
    inputs = [x.contiguous() for x in inputs]
    grad = grad.contiguous()
    grads = [x.new_empty(x.shape) if need else None for x, need in zip(inputs, needs, strict=True)]
    huge_pages(*grads)
    cpu().slot_update_backward(_common(inputs, saved, eps), pointer(grad), tuple(map(pointer, grads)))
    return grads


def _common(inputs: Sequence[Tensor], kept: Sequence[Tensor], eps: float) -> tuple[Any, ...]:
    """What both directions take."""
    (R, D), M = inputs[1].shape, kept[-1].shape[1]
    return (R, D, M), torch.get_num_threads(), eps, tuple(map(pointer, inputs)), tuple(map(pointer, kept))
