"""slot_attention on the CPU: hands pointers and strides to csrc/cpu/slot_attention_{forward,backward}.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recattn_kernels import backends
from recattn_kernels.ops.slot_attention.contract import empty_forward, sizes_of
from recattn_kernels.ops.slot_attention.reference import scale_of
from recattn_kernels.strides import CPU_DTYPES, contiguous, contiguous_rows, plain, pointer


def forward(*args: Any) -> tuple[Tensor, ...]:
    slot_mask, input_mask = args[4:6]
    updates, attn, mean, den = empty_forward(*args)
    wide = updates if updates.dtype == den.dtype else mean
    if slot_mask is not None or input_mask is not None:
        attn.zero_()  # the kernel goes past what is masked
    holds, common = _common(args[:6], args[6:], den.dtype)
    _cpu().slot_attention_forward(common, pointer(wide), pointer(den), _rows(attn if attn.dim() > 1 else None))
    del holds
    if wide is not updates:
        updates.copy_(wide)
    return updates, attn, mean, den


def backward(
    grads: Sequence[Tensor | None], saved: Sequence[Tensor], inputs: Sequence[Any], options: Any, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    q, k, v, bias, slot_mask, input_mask = inputs
    updates, mean, den = saved
    dtype = den.dtype
    partly = slot_mask is not None or input_mask is not None or q.shape[-2] == 0  # the kernel goes past the rest

    def grad_of(x: Tensor | None, wanted: bool) -> Tensor | None:
        if x is None or not wanted:
            return None
        return torch.zeros_like(x, memory_format=torch.contiguous_format) if partly else x.new_empty(x.shape)

    def wide(x: Tensor | None, wanted: bool) -> Tensor | None:
        return x.new_empty(x.shape, dtype=dtype) if x is not None and wanted else None

    dq, dbias = wide(q, needs[0]), wide(bias, needs[3])
    dk, dv = grad_of(k, needs[1]), grad_of(v, needs[2])
    du, dattn = plain(grads[0], dtype), contiguous(grads[1])
    u = updates if updates.dtype == dtype else mean
    holds, common = _common(inputs, options, dtype)
    _cpu().slot_attention_backward(
        common, pointer(u.contiguous()), pointer(den), pointer(du), _rows(dattn),
        (pointer(dq), pointer(dbias), _rows(dk), _rows(dv)),
    )  # fmt: skip
    del holds
    if dq is not None:
        dq = dq.to(q.dtype)
    if dbias is not None:
        dbias = dbias.to(bias.dtype)
    return dq, dk, dv, dbias, None, None


def _common(inputs: Sequence[Any], options: Sequence[Any], dtype: torch.dtype) -> tuple[list[Any], tuple[Any, ...]]:
    """What both directions take; and the tensors that must live for as long as the kernel reads them."""
    q, k, v, bias, slot_mask, input_mask = inputs
    scale, eps, denominator, joint, _ = options
    holds = [plain(q, dtype), contiguous_rows(k), None if v is None else contiguous_rows(v), plain(bias, dtype)]
    masks = [contiguous(slot_mask), contiguous(input_mask)]
    wide_q, keys, values, wide_bias = holds
    common = (
        tuple(sizes_of(q, k, v)), dtype == torch.float64, (scale_of(q, scale), eps), (denominator, joint),
        torch.get_num_threads(), pointer(wide_q), _rows(keys), _rows(values), pointer(wide_bias), *map(pointer, masks),
    )  # fmt: skip
    return holds + masks, common


def _rows(x: Tensor | None) -> tuple[int, int, int, int, int]:
    """Pointer, dtype, and strides over batch, heads and rows, of (B, [heads,] rows, width)."""
    if x is None:
        return (0, 0, 0, 0, 0)
    return (x.data_ptr(), CPU_DTYPES[x.dtype], x.stride(0), x.stride(1) if x.dim() == 4 else 0, x.stride(-2))


def _cpu() -> Any:
    return backends.extension("_cpu")
