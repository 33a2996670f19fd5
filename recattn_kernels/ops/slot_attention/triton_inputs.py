"""dk and dv of several calls of slot_attention in Triton, which repeated.py asks for: configuration and launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from recattn_kernels.ops.slot_attention.contract import Sizes
from recattn_kernels.ops.slot_attention.triton_arguments import (
    INTERPRETER_BLOCK,
    REGISTERS,
    Tile,
    common,
    is_narrow,
)
from recattn_kernels.ops.slot_attention.triton_inputs_kernels import inputs_backward_kernel
from recattn_kernels.triton_launch import Launch, Machine, guard, machine


def plan(sizes: Sizes, k: Tensor, v: Tensor | None, on: Machine) -> Tile:
    rows = max(16, triton.next_power_of_2(sizes.K))
    widest = max(16, triton.next_power_of_2(max(sizes.D, sizes.Dv)))
    if is_narrow(k, v):
        block_d, block_n, num_warps = min(widest, 256), 64, 8
    else:
        block_d, block_n, num_warps = min(widest, 64), 16, 8
    if on.interpreted:
        block_n = INTERPRETER_BLOCK
    return Tile(rows, block_n, block_d, triton.cdiv(max(sizes.D, sizes.Dv, 1), block_d), num_warps)


def inputs_launch(
    calls: Tensor, k: Tensor, v: Tensor | None, slot_mask: Tensor | None, input_mask: Tensor | None,
    scale: float, eps: float, denominator: bool, results: tuple[Tensor | None, Tensor | None], on: Machine,
) -> Launch:  # fmt: skip
    (dk, dv), K = results, calls.shape[-2]
    heads = k.shape[1] if k.dim() == 4 else 1
    sizes = Sizes(k.shape[0], heads, K, k.shape[-2], k.shape[-1], (k if v is None else v).shape[-1])
    tile = plan(sizes, k, v, on)
    arguments = {
        "calls_ptr": calls.contiguous(), "dk_ptr": dk, "dv_ptr": dv, "scale": scale, "T": calls.shape[0], "B": sizes.B,
    } | common(sizes, k, v, slot_mask, input_mask, eps, denominator, is_narrow(k, v), tile, on)  # fmt: skip
    # The first dimension of a grid alone can be large.
    programs = sizes.B * heads * triton.cdiv(sizes.N, tile.block_n) * tile.chunks
    return Launch(inputs_backward_kernel, (programs,), arguments, tile.num_warps, REGISTERS)


def inputs_backward(
    grad: Tensor, k: Tensor, v: Tensor | None, slot_mask: Tensor | None, input_mask: Tensor | None,
    scale: float, eps: float, denominator: bool, needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dk and dv from what every call has handed on: grad, (times, B, [heads,] K, D + Dv + Dv + 2), as repeated.py has
    it. Without v dk has both."""
    none = grad.numel() == 0
    dk, dv = (
        (x.new_zeros if none else x.new_empty)(x.shape) if x is not None and need else None
        for x, need in zip((k, v), needs, strict=True)
    )
    if not none and k.numel() + (0 if v is None else v.numel()) > 0 and (dk is not None or dv is not None):
        with guard(k):
            inputs_launch(grad, k, v, slot_mask, input_mask, scale, eps, denominator, (dk, dv), machine(k)).run()
    return dk, dv
